package task_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// The fuzz targets. As ordinary tests they run what f.Add and testdata/fuzz
// give them. To look for more, with a TMPDIR in memory that is not waited for:
//
//	go test -run - -fuzz FuzzRow -fuzztime 10m .

// fuzzColumns are those that FuzzRow fills, in the order of its arguments.
var fuzzColumns = []string{"id", "name", "state", "progress", "metadata", "result", "error",
	"created_at", "updated_at", "started_at", "owner"}

// The storage classes of a cell, as FuzzRow's classes has them: four bits for
// each column, from the right.
const (
	fuzzText = iota
	fuzzBlob
	fuzzInteger
	fuzzReal
	fuzzNull
	fuzzClasses
)

// Owners that FuzzRow can't know by name.
const (
	fuzzOwnerLives = "the one that lives"
	fuzzOwnerSelf  = "the one that reads"
)

// FuzzRow reads a row that other code has written, every cell of it arbitrary:
// it spoils nothing but itself.
func FuzzRow(f *testing.F) {
	type row struct {
		classes uint64
		cells   [11]string
	}
	good := row{0, [11]string{"bad", "other code", "RUNNING", "42", `{"a":1}`, `[2]`, "oops",
		"2024-05-06 07:08:09.123456", "2024-05-06 07:08:09.123456", "2024-05-06 07:08:09.123456", fuzzDead}}
	with := func(column string, class uint64, cell string) row {
		r := good
		i := slices.Index(fuzzColumns, column)
		r.classes |= class << (4 * i)
		r.cells[i] = cell
		return r
	}
	number := func(n uint64) string { return string(binary.LittleEndian.AppendUint64(nil, n)) }
	seeds := []row{good, {0x22222222222, good.cells}, {0x33333333333, good.cells}, {0x44444444444, good.cells},
		{0x11111111111, good.cells}, {}, {0x11111111111, [11]string{}}}
	for _, id := range []string{"", "done", "orphan", "a\x00b", "\xff", "'; DROP TABLE tasks; --"} {
		seeds = append(seeds, with("id", fuzzText, id))
	}
	for _, state := range []string{"PENDING", "DONE", "FAILED", "CANCELLED", "", "running", "RUNNING\x00", "\xff", "PAUSED"} {
		seeds = append(seeds, with("state", fuzzText, state))
	}
	for _, progress := range []string{"", "-1", "101", "1e300", "half", "99999999999999999999"} {
		seeds = append(seeds, with("progress", fuzzText, progress), with("progress", fuzzBlob, progress))
	}
	for _, n := range []uint64{0, 1 << 63, math.MaxInt64, math.MaxUint64, math.Float64bits(math.NaN()), math.Float64bits(math.Inf(-1))} {
		for _, column := range []string{"progress", "created_at", "updated_at", "started_at", "owner"} {
			seeds = append(seeds, with(column, fuzzInteger, number(n)), with(column, fuzzReal, number(n)))
		}
	}
	for _, cell := range []string{"", "null", " null ", "{", "\"\xff\"", "1e999", `{"a":1}{}`, "NaN", "\x00", strings.Repeat("[", 9999) + strings.Repeat("]", 9999)} {
		seeds = append(seeds, with("metadata", fuzzText, cell), with("result", fuzzBlob, cell))
	}
	for _, cell := range []string{"", "0000-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00", "9999-12-31 23:59:59.999999", "99999-01-01 00:00:00",
		"2024-05-06 07:08:09.123456789 +0200 CEST m=+0.1", "-99999999999", "253402300800", "CURRENT_TIMESTAMP", "a b c d"} {
		seeds = append(seeds, with("created_at", fuzzText, cell), with("updated_at", fuzzText, cell), with("started_at", fuzzBlob, cell))
	}
	for _, owner := range []string{"", fuzzOwnerLives, fuzzOwnerSelf, strings.ToUpper(fuzzDead), "{" + fuzzDead + "}", "urn:uuid:" + fuzzDead,
		"canary", "/canary", "/../canary", "../canary", "\x00", "a\x00b", "\xff"} {
		seeds = append(seeds, with("owner", fuzzText, owner), with("owner", fuzzBlob, owner))
	}
	for _, r := range seeds {
		c := r.cells
		f.Add(r.classes, []byte(c[0]), []byte(c[1]), []byte(c[2]), []byte(c[3]), []byte(c[4]), []byte(c[5]),
			[]byte(c[6]), []byte(c[7]), []byte(c[8]), []byte(c[9]), []byte(c[10]))
	}

	db := newFuzzRowDB(f)
	f.Fuzz(func(t *testing.T, classes uint64, id, name, state, progress, metadata, result, err, created, updated, started, owner []byte) {
		cells := [][]byte{id, name, state, progress, metadata, result, err, created, updated, started, owner}
		db.check(t, classes, cells)
	})
}

// fuzzDead is the ID of an owner that never was.
const fuzzDead = "11111111-2222-4333-8444-555555555555"

// A fuzzRowDB is the database of FuzzRow, cleared and filled again for each
// row: to make one anew would take longer than all the rest.
type fuzzRowDB struct {
	dir     string
	raw     *sql.DB           // of other code
	living  *task.SQLiteStore // of another process, as it were
	livesAs string            // the ID of living
	reader  *task.SQLiteStore // of the manager that is to stand what it reads
	readsAs string
}

func newFuzzRowDB(f *testing.F) *fuzzRowDB {
	d := &fuzzRowDB{dir: f.TempDir()}
	path := filepath.Join(d.dir, "tasks.db")
	d.living = openSQLite(f, path)
	d.reader = openSQLite(f, path)
	raw, err := sql.Open("sqlite3", path)
	testkit.Must(f, err)
	f.Cleanup(func() { raw.Close() })
	raw.SetMaxOpenConns(1)
	d.raw = raw
	d.livesAs = d.ownerOf(f, d.living)
	d.readsAs = d.ownerOf(f, d.reader)
	// Whatever an owner might be taken for.
	for _, dir := range []string{path + "-owner-", path + "-owner-.."} {
		testkit.Must(f, os.Mkdir(dir, 0o700))
		testkit.Must(f, os.WriteFile(filepath.Join(dir, "canary"), nil, 0o600))
	}
	testkit.Must(f, os.WriteFile(path+"-owner-canary", nil, 0o600))
	testkit.Must(f, os.WriteFile(filepath.Join(d.dir, "canary"), nil, 0o600))
	return d
}

func (d *fuzzRowDB) ownerOf(f *testing.F, s *task.SQLiteStore) (id string) {
	testkit.Must(f, s.Save(&task.Operation{ID: "who", Name: "who", State: task.StateDone}))
	testkit.Must(f, d.raw.QueryRow(`DELETE FROM tasks RETURNING owner`).Scan(&id))
	return id
}

func (d *fuzzRowDB) check(t *testing.T, classes uint64, cells [][]byte) {
	switch owner := &cells[len(cells)-1]; string(*owner) {
	case fuzzOwnerLives:
		*owner = []byte(d.livesAs)
	case fuzzOwnerSelf:
		*owner = []byte(d.readsAs)
	}
	neighbours := d.fill(t)
	if !d.insert(t, classes, cells) {
		return // SQLite would not have it
	}
	before := d.dump(t)
	files := fuzzTree(t, d.dir)

	bad := d.list(t, d.reader, neighbours, false)
	d.plausible(t, bad)
	d.told(t, bad, classes, cells)

	m, err := task.New(d.reader, quiet)
	testkit.Must(t, err)
	defer m.Close()
	got := d.list(t, fuzzManager{m}, neighbours, true)
	d.plausible(t, got)
	d.encodes(t, got)
	alone := bad.ID != "" && neighbours[bad.ID] == nil
	if alone {
		again, ok := m.Get(bad.ID)
		if !ok || again.Name != got.Name || again.State != got.State || !reflect.DeepEqual(again.Metadata, got.Metadata) {
			t.Errorf("Get(%q): %+v, List shows %+v", bad.ID, again, got)
		}
	}
	owner := d.cell(t, "owner")
	live := bad.State == task.StatePending || bad.State == task.StateRunning
	recovered := live && owner != d.livesAs && owner != d.readsAs
	if recovered && (got.State != task.StateFailed || got.Error != testkit.RestartText || time.Since(got.UpdatedAt) > time.Hour) {
		t.Errorf("not recovered: %+v", got)
	}
	if !recovered && (got.State != bad.State || got.Error != bad.Error) {
		t.Errorf("%+v has become %+v", bad, got)
	}
	if alone {
		d.asked(t, m, got)
	}
	for i, row := range d.dump(t) {
		for column, cell := range row {
			own := i == 3 && recovered || row["id"] == before[2]["id"] // the row itself, and the orphan
			if own && slices.Contains([]string{"state", "error", "updated_at"}, column) {
				continue
			}
			if cell != before[i][column] {
				t.Errorf("row %d: %s was %s and is %s", i, column, before[i][column], cell)
			}
		}
	}
	if now := fuzzTree(t, d.dir); !slices.Equal(now, files) {
		t.Errorf("files: %q, were %q", now, files)
	}
}

// fill writes the neighbours: a finished row, one of an owner that lives, and
// an orphan. It returns them as they are to be read.
func (d *fuzzRowDB) fill(t *testing.T) map[string]*task.Operation {
	_, err := d.raw.Exec(`DELETE FROM tasks`)
	testkit.Must(t, err)
	at := time.Date(2024, 5, 6, 7, 8, 9, 123456000, time.UTC)
	rows := map[string]*task.Operation{}
	var saves []*task.Operation
	for _, id := range []string{"done", "live", "orphan"} {
		op := &task.Operation{ID: id, Name: "good " + id, State: task.StateRunning, Progress: 7, Error: "half",
			Metadata: json.RawMessage(`{"n":1}`), Result: json.RawMessage(`["r"]`), CreatedAt: at, StartedAt: at, UpdatedAt: at}
		if id == "done" {
			op.State = task.StateDone
		}
		shown := *op
		shown.Metadata, shown.Result = map[string]any{"n": json.Number("1")}, []any{"r"}
		rows[id] = &shown
		saves = append(saves, op)
	}
	testkit.Must(t, errors.Join(d.living.WriteBatch(saves, nil)...))
	_, err = d.raw.Exec(`UPDATE tasks SET owner = ? WHERE id = 'orphan'`, fuzzDead)
	testkit.Must(t, err)
	return rows
}

// insert writes the bad row, and reports whether that was possible.
func (d *fuzzRowDB) insert(t *testing.T, classes uint64, cells [][]byte) bool {
	exprs := make([]string, len(cells))
	args := make([]any, len(cells))
	for i, cell := range cells {
		class := classes >> (4 * i) & 0xf
		if column := fuzzColumns[i]; class%fuzzClasses == fuzzBlob && (column == "id" || column == "state") {
			class = fuzzText // nobody writes these as bytes
		}
		exprs[i], args[i] = fuzzCell(class, cell)
	}
	_, err := d.raw.Exec(`INSERT INTO tasks (`+strings.Join(fuzzColumns, ", ")+`) VALUES (`+strings.Join(exprs, ", ")+`)`, args...)
	if err != nil && !strings.Contains(err.Error(), "constraint") {
		t.Fatal(err)
	}
	return err == nil
}

func fuzzCell(class uint64, cell []byte) (expr string, arg any) {
	var eight [8]byte
	copy(eight[:], cell)
	n := binary.LittleEndian.Uint64(eight[:])
	switch class % fuzzClasses {
	case fuzzText:
		return "CAST(? AS TEXT)", append([]byte{}, cell...)
	case fuzzBlob:
		return "?", append([]byte{}, cell...)
	case fuzzInteger:
		return "?", int64(n)
	case fuzzReal:
		return "?", math.Float64frombits(n)
	default:
		return "?", nil
	}
}

// dump returns all cells with their classes, byte for byte.
func (d *fuzzRowDB) dump(t *testing.T) (rows []map[string]string) {
	var exprs []string
	for _, c := range fuzzColumns {
		exprs = append(exprs, "typeof("+c+") || ' ' || quote("+c+")")
	}
	all, err := d.raw.Query(`SELECT ` + strings.Join(exprs, ", ") + ` FROM tasks ORDER BY rowid`)
	testkit.Must(t, err)
	defer all.Close()
	for all.Next() {
		cells := make([]string, len(exprs))
		to := make([]any, len(exprs))
		for i := range cells {
			to[i] = &cells[i]
		}
		testkit.Must(t, all.Scan(to...))
		row := make(map[string]string)
		for i, c := range fuzzColumns {
			row[c] = cells[i]
		}
		rows = append(rows, row)
	}
	testkit.Must(t, all.Err())
	return rows
}

// cell returns a cell of the bad row as text.
func (d *fuzzRowDB) cell(t *testing.T, column string) string {
	var text sql.NullString
	testkit.Must(t, d.raw.QueryRow(`SELECT CAST(`+column+` AS TEXT) FROM tasks ORDER BY rowid DESC LIMIT 1`).Scan(&text))
	return text.String
}

// list checks the neighbours as a store or a manager shows them, and returns
// the bad one.
func (d *fuzzRowDB) list(t *testing.T, from fuzzReader, neighbours map[string]*task.Operation, recovered bool) *task.Operation {
	t.Helper()
	ops, err := from.List(10, 0)
	if err != nil || len(ops) != 4 {
		t.Fatalf("List: %d operations, %v", len(ops), err)
	}
	for i, op := range ops {
		page, err := from.List(1, i)
		if err != nil || len(page) != 1 || page[0].ID != op.ID {
			t.Fatalf("List(1, %d): %v, %v", i, page, err)
		}
	}
	for i, id := range []string{"orphan", "live", "done"} {
		op, err := from.Get(id)
		if err != nil {
			t.Fatalf("Get(%s): %v", id, err)
		}
		want := *neighbours[id]
		if recovered && id == "orphan" {
			want.State, want.Error, want.UpdatedAt = task.StateFailed, testkit.RestartText, op.UpdatedAt
		}
		fuzzSame(t, "Get", op, want)
		fuzzSame(t, "List", ops[i+1], want)
	}
	return ops[0]
}

// A fuzzReader is a store or a manager.
type fuzzReader interface {
	List(limit, offset int) ([]*task.Operation, error)
	Get(id string) (*task.Operation, error)
}

// A fuzzManager is a manager whose Get and List have the form of a store's.
type fuzzManager struct{ m *task.Manager }

func (f fuzzManager) List(limit, offset int) ([]*task.Operation, error) {
	return f.m.List(limit, offset)
}

func (f fuzzManager) Get(id string) (*task.Operation, error) {
	if op, ok := f.m.Get(id); ok {
		return op, nil
	}
	return nil, task.ErrNotFound
}

// fuzzSame compares all that an operation shows.
func fuzzSame(t *testing.T, how string, op *task.Operation, want task.Operation) {
	t.Helper()
	if got := fuzzShown(op); !reflect.DeepEqual(got, fuzzShown(&want)) {
		t.Errorf("%s: got %#v\nwant %#v", how, got, fuzzShown(&want))
	}
}

// fuzzShown returns all that an operation shows, its JSON parsed.
func fuzzShown(op *task.Operation) task.Operation {
	parsed := func(v any) any {
		if raw, ok := v.(json.RawMessage); ok {
			return fuzzParsed(raw)
		}
		return v
	}
	return task.Operation{ID: op.ID, Name: op.Name, State: op.State, Progress: op.Progress, Metadata: parsed(op.Metadata),
		Result: parsed(op.Result), Error: op.Error, CreatedAt: op.CreatedAt, StartedAt: op.StartedAt, UpdatedAt: op.UpdatedAt}
}

// plausible checks what holds for whatever is read from a store.
func (d *fuzzRowDB) plausible(t *testing.T, op *task.Operation) {
	t.Helper()
	if !utf8.ValidString(op.Name) || !utf8.ValidString(op.Error) {
		t.Errorf("not UTF-8: %+v", op)
	}
	if op.Progress < 0 || op.Progress > 100 {
		t.Errorf("progress %d", op.Progress)
	}
	for _, at := range []time.Time{op.CreatedAt, op.StartedAt, op.UpdatedAt} {
		if y := at.Year(); y < 0 || y > 9999 || at.Location() != time.UTC {
			t.Errorf("time %v", at)
		}
	}
	if _, err := json.Marshal(op); err != nil {
		t.Error(err)
	}
}

// encodes checks that a client can read what a manager gives.
func (d *fuzzRowDB) encodes(t *testing.T, op *task.Operation) {
	t.Helper()
	raw, err := json.Marshal(op)
	if err != nil || !utf8.Valid(raw) {
		t.Errorf("%v: %q", err, raw)
	}
	back := fuzzBack(t, raw)
	if back.Name != op.Name || back.Error != op.Error || !back.UpdatedAt.Equal(op.UpdatedAt) {
		t.Errorf("%+v was encoded and is %+v", op, back)
	}
}

// fuzzBack returns an operation as a client reads it.
func fuzzBack(t *testing.T, raw []byte) (op task.Operation) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&op); err != nil {
		t.Errorf("a client can't read it: %v: %.100q", err, raw)
	}
	return op
}

// told checks that a cell which makes sense is read as what it says.
func (d *fuzzRowDB) told(t *testing.T, op *task.Operation, classes uint64, cells [][]byte) {
	t.Helper()
	for i, column := range fuzzColumns {
		if classes>>(4*i)&0xf > fuzzBlob {
			continue
		}
		text := string(cells[i])
		var got, want any
		switch column {
		case "id":
			got, want = op.ID, text
		case "state":
			got, want = string(op.State), text
		case "name":
			got, want = op.Name, strings.ToValidUTF8(text, "\uFFFD")
		case "error":
			got, want = op.Error, strings.ToValidUTF8(text, "\uFFFD")
		case "metadata":
			got, want = fuzzParsed(op.Metadata), fuzzParsed(json.RawMessage(text))
		case "result":
			got, want = fuzzParsed(op.Result), fuzzParsed(json.RawMessage(text))
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %#v, want %#v", column, got, want)
		}
	}
}

// fuzzParsed returns what a json.RawMessage says; nil if that is no JSON.
func fuzzParsed(v any) any {
	raw, _ := v.(json.RawMessage)
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var parsed any
	if !json.Valid(raw) || d.Decode(&parsed) != nil {
		return nil
	}
	return parsed
}

// asked asks a manager for what it did not run.
func (d *fuzzRowDB) asked(t *testing.T, m *task.Manager, op *task.Operation) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	live := op.State == task.StatePending || op.State == task.StateRunning
	waited, err := m.Wait(ctx, op.ID)
	if waited == nil || waited.State != op.State || live != errors.Is(err, context.Canceled) || !live && err != nil {
		t.Errorf("Wait: %+v, %v", waited, err)
	}
	err = m.Cancel(op.ID)
	if live != (err == nil) || live == errors.Is(err, task.ErrNotFound) {
		t.Errorf("Cancel: %v", err)
	}
}

// fuzzTree lists what is below a directory.
func fuzzTree(t testing.TB, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			names = append(names, strings.TrimPrefix(path, dir))
		}
		return err
	})
	testkit.Must(t, err)
	return names
}

// FuzzRoundTrip has arbitrary values go the whole way: what is read is what a
// round trip through JSON gives, before a restart and after it.
func FuzzRoundTrip(f *testing.F) {
	for _, name := range []string{"", "plain", "\x00", "a\xffb", "日本語 🎉\n", "'; DROP TABLE tasks; --", strings.Repeat("long", 1000)} {
		f.Add(name, "", []byte(nil), []byte(nil), []byte(nil), name)
	}
	for kind := range byte(valueKinds) {
		v := []byte{kind, 3, 'a', 0xff, 'b', 1, 2, 3, 4, 5, 6, 7, 8}
		f.Add("kind", "key", v, []byte(nil), v, "")
		f.Add("nested", "", []byte(nil), append([]byte{valueList, 2}, v...), append([]byte{valueMap, 2}, v...), "error")
	}
	for _, raw := range []string{"null", " null ", "{", `{"a":1,"a":2}`, "1e999", "\"\\ud800\"", "\"\xff\"", `"<>&\u2028"`, "[1,2.50]", "{}{}", " 7 ", "-0", `{"":{"":[]}}`, "\"\x00\""} {
		v := append([]byte{valueRaw, byte(len(raw))}, raw...)
		f.Add("raw", "", v, v, v, "")
	}
	for _, hundreds := range []byte{2, 101} { // the latter deeper than JSON can be read
		v := []byte{valueDeep, hundreds, 0}
		f.Add("deep", "", []byte(nil), v, v, "")
	}

	// Opened and closed for each round; one file for all, because making one
	// takes long.
	path := testkit.FastPath(f)
	f.Fuzz(func(t *testing.T, name, key string, metadata, change, result []byte, failure string) {
		r := &fuzzRound{name: name, key: key, metadata: decodeValue(metadata), result: decodeValue(result), failure: failure}
		if len(change) > 0 {
			r.change = []any{decodeValue(change)}
		}
		memory := task.NewMemoryStore()
		r.check(t, func() (task.Persistence, func() error) { return memory, func() error { return nil } })
		r.check(t, func() (task.Persistence, func() error) {
			s, err := task.OpenSQLite(path)
			testkit.Must(t, err)
			return s, s.Close
		})
	})
}

type fuzzRound struct {
	name, key        string
	metadata, result any
	change           []any // one for SetMetadata, if any
	failure          string
}

func (r *fuzzRound) check(t *testing.T, open func() (task.Persistence, func() error)) {
	db, closeDB := open()
	m, err := task.New(db, quiet)
	testkit.Must(t, err)
	id, want := r.run(t, m)
	if id == "" {
		if page, err := m.List(1, 0); err != nil || len(page) > 0 && page[0].Name == r.name && r.name == "" {
			t.Errorf("List: %v, %v", page, err)
		}
		testkit.Must(t, errors.Join(m.Close(), closeDB()))
		return
	}
	waited, err := m.Wait(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	want.ID, want.CreatedAt, want.StartedAt, want.UpdatedAt = id, waited.CreatedAt, waited.StartedAt, waited.UpdatedAt
	r.same(t, "Wait", waited, want)
	r.read(t, "before the restart", m, want)
	testkit.Must(t, m.Close())
	r.read(t, "after Close", m, want)
	testkit.Must(t, closeDB())

	db, closeDB = open()
	m, err = task.New(db, quiet)
	testkit.Must(t, err)
	r.read(t, "after the restart", m, want)
	testkit.Must(t, errors.Join(m.Close(), closeDB()))
}

// run submits an operation and returns its ID and what is to be read of it; ""
// if it rightly was not accepted.
func (r *fuzzRound) run(t *testing.T, m *task.Manager) (id string, want task.Operation) {
	t.Helper()
	metadata, badMetadata := valueAsRead(r.metadata)
	result, badResult := valueAsRead(r.result)
	want = task.Operation{Name: strings.ToValidUTF8(r.name, "\uFFFD"), State: task.StateDone, Progress: 100, Metadata: metadata, Result: result}
	if r.failure != "" {
		want.State, want.Progress, want.Error = task.StateFailed, 0, strings.ToValidUTF8(r.failure, "\uFFFD")
	}
	if badResult {
		want.Error += "…result not kept: "
	}

	opts := []task.SubmitOption{task.WithMetadata(r.metadata)}
	if r.key != "" {
		opts = append(opts, task.WithLock(r.key))
	}
	op, err := m.Submit(r.name, func(ctx context.Context, _ func(int)) (any, error) {
		for _, v := range r.change {
			changed, bad := valueAsRead(v)
			if err := task.SetMetadata(ctx, v); (err != nil) != bad || bad && !strings.Contains(err.Error(), "metadata") {
				t.Errorf("SetMetadata: %v", err)
			}
			if !bad {
				want.Metadata = changed
			}
		}
		if r.failure != "" {
			return r.result, errors.New(r.failure)
		}
		return r.result, nil
	}, opts...)
	if err != nil {
		if refused := err.Error(); op != nil || r.name == "" && !strings.Contains(refused, "name is empty") ||
			r.name != "" && !(badMetadata && strings.Contains(refused, "metadata: ")) {
			t.Errorf("Submit: %v, %v", op, err)
		}
		return "", want
	}
	if r.name == "" || badMetadata {
		t.Errorf("Submit took the name %q and the metadata %#v", r.name, r.metadata)
	}
	if _, err := m.Wait(context.Background(), op.ID); err != nil {
		t.Fatal(err)
	}
	return op.ID, want
}

func (r *fuzzRound) read(t *testing.T, when string, m *task.Manager, want task.Operation) {
	t.Helper()
	op, ok := m.Get(want.ID)
	if !ok {
		t.Fatalf("%s: Get doesn't find it", when)
	}
	r.same(t, when+": Get", op, want)
	page, err := m.List(1, 0)
	if err != nil || len(page) != 1 {
		t.Fatalf("%s: List: %v, %v", when, page, err)
	}
	r.same(t, when+": List", page[0], want)
}

func (r *fuzzRound) same(t *testing.T, how string, op *task.Operation, want task.Operation) {
	t.Helper()
	got := *op
	if before, after, ok := strings.Cut(want.Error, "…"); ok {
		if !strings.HasPrefix(got.Error, before) || !strings.Contains(got.Error, after) {
			t.Errorf("%s: error %q, want %q", how, got.Error, want.Error)
		}
		want.Error = got.Error
	}
	fuzzSame(t, how, &got, want)
	if !utf8.ValidString(got.Name) || !utf8.ValidString(got.Error) {
		t.Errorf("%s: not UTF-8: %+v", how, got)
	}
	raw, err := json.Marshal(op)
	if err != nil || !utf8.Valid(raw) {
		t.Fatalf("%s: %v", how, err)
	}
	fuzzBack(t, raw)
	for what, decode := range map[*any]func(any) error{&want.Result: op.DecodeResult, &want.Metadata: op.DecodeMetadata} {
		var raw json.RawMessage
		if err := decode(&raw); err != nil || !reflect.DeepEqual(fuzzParsed(raw), *what) {
			t.Errorf("%s: decoded as %s, %v, want %#v", how, raw, err, *what)
		}
	}
}

// valueAsRead returns what is to be read of a value, and whether JSON can't
// hold it.
func valueAsRead(v any) (read any, bad bool) {
	defer func() {
		if recover() != nil {
			read, bad = nil, true
		}
	}()
	raw, err := json.Marshal(v)
	if err != nil || !json.Valid(raw) {
		return nil, true
	}
	return fuzzParsed(json.RawMessage(raw)), false
}

// The kinds of Go values that decodeValue makes.
const (
	valueNil = iota
	valueBool
	valueInt
	valueUint
	valueFloat
	valueString
	valueBytes
	valueList
	valueMap
	valueIntMap
	valueStruct
	valuePointer
	valueNilPointer
	valueRaw
	valueNumber
	valueTime
	valueMarshaler
	valuePanic
	valueError
	valueChan
	valueFunc
	valueComplex
	valueCycle
	valueDeep
	valueKinds
)

// decodeValue makes a Go value of bytes, one that JSON can hold or can't.
func decodeValue(data []byte) any {
	r := &byteReader{data}
	return r.value(8)
}

type byteReader struct{ data []byte }

func (r *byteReader) byte() byte {
	if len(r.data) == 0 {
		return 0
	}
	b := r.data[0]
	r.data = r.data[1:]
	return b
}

// bytes returns as many bytes as the next one says.
func (r *byteReader) bytes() []byte {
	n := min(int(r.byte()), len(r.data))
	b := r.data[:n]
	r.data = r.data[n:]
	return b
}

func (r *byteReader) uint64() (n uint64) {
	for range 8 {
		n = n<<8 | uint64(r.byte())
	}
	return n
}

type (
	valueStructs struct {
		A any            `json:"a"`
		B string         `json:"b,omitempty"`
		C *valueStructs  `json:",omitempty"`
		D float32        `json:"d,string"`
		E map[string]any `json:"-"`
		f int
	}
	valueMarshal struct{ raw []byte }
)

func (m valueMarshal) MarshalJSON() ([]byte, error) { return m.raw, nil }

func (r *byteReader) value(depth int) any {
	kind := r.byte() % valueKinds
	if depth == 0 && (kind == valueList || kind == valueMap || kind == valueStruct || kind == valuePointer) {
		kind = valueInt
	}
	switch kind {
	case valueBool:
		return r.byte()%2 == 1
	case valueInt:
		return int64(r.uint64())
	case valueUint:
		return r.uint64()
	case valueFloat:
		return math.Float64frombits(r.uint64())
	case valueString:
		return string(r.bytes())
	case valueBytes:
		return r.bytes()
	case valueList:
		list := make([]any, 0, 4)
		for range r.byte() % 8 {
			list = append(list, r.value(depth-1))
		}
		return list
	case valueMap:
		m := map[string]any{}
		for range r.byte() % 8 {
			m[string(r.bytes())] = r.value(depth - 1)
		}
		return m
	case valueIntMap:
		return map[int8]string{int8(r.byte()): string(r.bytes()), int8(r.byte()): "x"}
	case valueStruct:
		return valueStructs{A: r.value(depth - 1), B: string(r.bytes()), C: &valueStructs{D: float32(r.byte()) / 3}, f: 1}
	case valuePointer:
		v := r.value(depth - 1)
		return &v
	case valueNilPointer:
		return (*int)(nil)
	case valueRaw:
		return json.RawMessage(r.bytes())
	case valueNumber:
		return json.Number(r.bytes())
	case valueTime:
		return time.Unix(int64(r.uint64()), 0).UTC()
	case valueMarshaler:
		return valueMarshal{r.bytes()}
	case valuePanic:
		return []any{1, panicJSON{}}
	case valueError:
		return errors.New(string(r.bytes()))
	case valueChan:
		return make(chan int)
	case valueFunc:
		return func() {}
	case valueComplex:
		return complex(1, float64(r.byte()))
	case valueCycle:
		m := map[string]any{"k": string(r.bytes())}
		m["self"] = m
		return m
	case valueDeep:
		return deep(100*int(r.byte()) + int(r.byte()) - 10)
	default:
		return nil
	}
}

// FuzzPath opens databases at arbitrary paths: there, and nowhere else, or not
// at all.
func FuzzPath(f *testing.F) {
	for _, path := range []string{"plain.db", "", ".", "..", "a/..", "a/../b", "./a", "a//b", "a/", "a/.", " ", "  a  ", "a\nb", "a\tb", "a\x00b", "\xff\xfe", "a?b", "a?mode=memory",
		"a?mode=ro&cache=shared", "a#b", "a%b", "a%41", "%00", "%2e%2e%2fx", "a&b=c", "a+b", "a;b", "'", "\"", "`", "\\", "*", "~", "-", "|", "file:a", "file:a?mode=memory",
		"file::memory:", ":memory:", " :memory:", ":memory: ", ":memory:?cache=shared", "./:memory:", ":MEMORY:", "a:memory:", "memory:", "日本語 🎉", strings.Repeat("n", 255), strings.Repeat("n", 256),
		strings.Repeat("n", 212), strings.Repeat("n", 213), "a-wal", "a-journal", "a-owner-" + fuzzDead, "x/-owner-/y"} {
		f.Add(path, byte(fuzzWithParent))
		if strings.Contains(path, ":") || !filepath.IsLocal(path) {
			f.Add(path, byte(fuzzRelative))
		}
	}
	for _, n := range []int{300, 3000} {
		f.Add(strings.Repeat("d/", n)+"x", byte(0))
	}
	f.Fuzz(func(t *testing.T, path string, mode byte) {
		if !fuzzLocal(path) {
			t.Skip("leads out of the directory of the test")
		}
		fuzzPath(t, path, mode%fuzzPathModes)
	})
}

// How FuzzPath opens a path.
const (
	fuzzRelative   = 1 << iota // with the directory of the test as the working one
	fuzzWithParent             // whose parent directory is there
	fuzzPathModes  = 1 << iota
)

// fuzzLocal reports whether a path stays in its directory, however it may be
// misread.
func fuzzLocal(path string) bool {
	for _, p := range []string{path, strings.ReplaceAll(path, "\\", "/"), strings.Replace(path, "\x00", "", 1)} {
		if p = strings.TrimPrefix(strings.ToLower(strings.TrimSpace(p)), "file:"); p == "" {
			continue
		}
		if !filepath.IsLocal(p) {
			return false
		}
	}
	return true
}

func fuzzPath(t *testing.T, path string, mode byte) {
	root := filepath.Dir(testkit.FastPath(t))
	dir := filepath.Join(root, "in", "here")
	testkit.Must(t, os.MkdirAll(dir, 0o700))
	t.Chdir(dir)
	want := filepath.Join(dir, path) // what a path means, no matter what it looks like
	if mode&fuzzRelative == 0 {
		path = dir + string(filepath.Separator) + path
	}
	if mode&fuzzWithParent != 0 {
		os.MkdirAll(filepath.Dir(want), 0o700)
	}
	before := fuzzTree(t, root)
	s, err := task.OpenSQLite(path)
	if err != nil {
		if !strings.HasPrefix(err.Error(), "task: open database ") {
			t.Errorf("error %q", err)
		}
		if after := fuzzTree(t, root); !slices.Equal(after, before) {
			t.Errorf("%q: %v, and it left %q", path, err, after)
		}
		fuzzPathMustOpen(t, path, want, err)
		return
	}
	m, err := task.New(s, quiet)
	testkit.Must(t, err)
	op := submit(t, m, func(context.Context, func(int)) (any, error) { return path, nil })
	wait(t, m, op.ID)
	if path != ":memory:" {
		fuzzModes(t, want)
	}
	testkit.Must(t, errors.Join(m.Close(), s.Close()))

	expected := slices.Clone(before)
	if path != ":memory:" {
		expected = append(expected, strings.TrimPrefix(want, root))
	}
	after := fuzzTree(t, root)
	slices.Sort(expected)
	if slices.Sort(after); !slices.Equal(after, expected) {
		t.Fatalf("%q: there are %q, want %q", path, after, expected)
	}
	if path == ":memory:" {
		return
	}
	s, err = task.OpenSQLite(path)
	testkit.Must(t, err)
	if got, err := s.Get(op.ID); err != nil || got.State != task.StateDone {
		t.Errorf("opened again: %+v, %v", got, err)
	}
	testkit.Must(t, s.Close())
	testkit.Must(t, os.RemoveAll(filepath.Join(root, "in")))
}

// fuzzModes checks that all the files of an open database are its owner's only.
func fuzzModes(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	testkit.Must(t, err)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), filepath.Base(path)) || e.IsDir() {
			continue
		}
		got, err := e.Info()
		testkit.Must(t, err)
		if got.Mode() != 0o600 && runtime.GOOS != "windows" {
			t.Errorf("%q has the mode %v", e.Name(), got.Mode())
		}
	}
}

// fuzzPathMustOpen checks that a path was refused for a reason.
func fuzzPathMustOpen(t *testing.T, path, want string, why error) {
	t.Helper()
	parent, err := os.Stat(filepath.Dir(want))
	switch {
	case path == "", strings.Contains(path, "\x00"), err != nil, !parent.IsDir():
	case os.IsPathSeparator(path[len(path)-1]), filepath.Base(path) == ".": // names a directory
	case len(filepath.Base(want)) > 255-len("-owner-"+fuzzDead), len(want) > 400:
	default:
		if _, err := os.Stat(want); err == nil {
			return // a directory is there
		}
		t.Errorf("%q was refused: %v", path, why)
	}
}
