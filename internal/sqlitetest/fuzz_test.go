//go:build cgo && !task_nosqlite3

package sqlitetest

import (
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

// The fuzz targets. As ordinary tests they run the inputs of f.Add and testdata/fuzz.
// To fuzz:
//
//	go test -run - -fuzz FuzzRow -fuzztime 10m ./internal/sqlitetest

// fuzzColumns lists the columns that FuzzRow fills, in the order of its arguments.
var fuzzColumns = []string{"id", "name", "state", "progress", "metadata", "result", "error",
	"created_at", "updated_at", "started_at", "owner"}

// The storage classes of a cell in FuzzRow's argument classes: four bits per column,
// from the right.
const (
	fuzzText = iota
	fuzzBlob
	fuzzInteger
	fuzzReal
	fuzzNull
	fuzzClasses
)

// Owners whose IDs FuzzRow can't know.
const (
	fuzzOwnerLives = "the one that lives"
	fuzzOwnerSelf  = "the one that reads"
)

// FuzzRow reads a row that other code has written, with arbitrary cells. The row must
// affect nothing but itself.
func FuzzRow(f *testing.F) {
	for _, r := range fuzzSeeds() {
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

// A fuzzRow is a row that FuzzRow writes: see fuzzColumns and the storage classes.
type fuzzRow struct {
	classes uint64
	cells   [11]string
}

// fuzzSeeds returns rows with one bad cell, and some in which all are bad.
func fuzzSeeds() []fuzzRow {
	good := fuzzRow{0, [11]string{"bad", "other code", "RUNNING", "42", `{"a":1}`, `[2]`, "oops",
		"2024-05-06 07:08:09.123456", "2024-05-06 07:08:09.123456", "2024-05-06 07:08:09.123456", fuzzDead}}
	with := func(column string, class uint64, cell string) fuzzRow {
		r := good
		i := slices.Index(fuzzColumns, column)
		r.classes |= class << (4 * i)
		r.cells[i] = cell
		return r
	}
	number := func(n uint64) string { return string(binary.LittleEndian.AppendUint64(nil, n)) }
	seeds := []fuzzRow{good, {0x22222222222, good.cells}, {0x33333333333, good.cells}, {0x44444444444, good.cells},
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
	return seeds
}

// fuzzDead is the ID of an owner that never existed.
const fuzzDead = "11111111-2222-4333-8444-555555555555"

// A fuzzRowDB is the database of FuzzRow. It is cleared and refilled for each row,
// because creating a new one would take longer than everything else.
type fuzzRowDB struct {
	dir     string
	raw     *sql.DB           // for other code
	living  *task.SQLiteStore // plays another live process
	livesAs string            // the ID of living
	reader  *task.SQLiteStore // of the manager under test
	readsAs string
}

func newFuzzRowDB(f *testing.F) *fuzzRowDB {
	path := testkit.FastPath(f)
	d := &fuzzRowDB{dir: filepath.Dir(path)}
	d.living = testkit.OpenSQLite(f, path)
	d.reader = testkit.OpenSQLite(f, path)
	raw, err := sql.Open("sqlite3", path)
	testkit.Must(f, err)
	f.Cleanup(func() { raw.Close() })
	raw.SetMaxOpenConns(1)
	d.raw = raw
	d.livesAs = d.ownerOf(f, d.living)
	d.readsAs = d.ownerOf(f, d.reader)
	// Anything that an owner might be mistaken for.
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
		return // SQLite has refused the row
	}
	before := d.dump(t)
	files := fuzzTree(t, d.dir)

	bad := d.list(t, d.reader, neighbours, false)
	d.plausible(t, bad)
	d.told(t, bad, classes, cells)

	m, err := task.New(d.reader, testkit.Quiet)
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
	d.changed(t, before, recovered)
	if now := fuzzTree(t, d.dir); !slices.Equal(now, files) {
		t.Errorf("files: %q, were %q", now, files)
	}
}

// changed checks that recovery has changed only the orphan and, if it is an orphan too,
// the bad row.
func (d *fuzzRowDB) changed(t *testing.T, before []map[string]string, recovered bool) {
	t.Helper()
	for i, row := range d.dump(t) {
		for column, cell := range row {
			own := i == 3 && recovered || row["id"] == before[2]["id"] // the bad row and the orphan
			if own && slices.Contains([]string{"state", "error", "updated_at"}, column) {
				continue
			}
			if cell != before[i][column] {
				t.Errorf("row %d: %s was %s and is %s", i, column, before[i][column], cell)
			}
		}
	}
}

// fill writes the neighbours: a finished row, one of a live owner, and an orphan. It
// returns them as they should be read.
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
			class = fuzzText // no program writes these as bytes
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

// dump returns all cells with their storage classes, byte for byte.
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

// list checks the neighbours in a list of a store or a manager, and returns the bad
// row.
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
		testkit.WantSame(t, "Get", op, want)
		testkit.WantSame(t, "List", ops[i+1], want)
	}
	return ops[0]
}

// A fuzzReader is a store or a manager.
type fuzzReader interface {
	List(limit, offset int) ([]*task.Operation, error)
	Get(id string) (*task.Operation, error)
}

// A fuzzManager is a manager whose Get and List have the signatures of a store.
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

// plausible checks what must hold for any operation that is read from a store.
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

// encodes checks that a client can decode what a manager returns.
func (d *fuzzRowDB) encodes(t *testing.T, op *task.Operation) {
	t.Helper()
	raw, err := json.Marshal(op)
	if err != nil || !utf8.Valid(raw) {
		t.Errorf("%v: %q", err, raw)
	}
	back := testkit.Received(t, raw)
	if back.Name != op.Name || back.Error != op.Error || !back.UpdatedAt.Equal(op.UpdatedAt) {
		t.Errorf("%+v was encoded and is %+v", op, back)
	}
}

// told checks that a valid cell is read as its value.
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
			got, want = testkit.Parsed(op.Metadata), testkit.Parsed(json.RawMessage(text))
		case "result":
			got, want = testkit.Parsed(op.Result), testkit.Parsed(json.RawMessage(text))
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %#v, want %#v", column, got, want)
		}
	}
}

// asked calls a manager for an operation that it did not run.
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

// fuzzTree lists everything below a directory.
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

// FuzzPath opens databases at arbitrary paths. Each is opened at that path and nowhere
// else, or not at all.
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

// The ways in which FuzzPath opens a path.
const (
	fuzzRelative   = 1 << iota // the test's directory is the working directory
	fuzzWithParent             // the parent directory exists
	fuzzPathModes  = 1 << iota
)

// fuzzLocal reports whether a path stays in its directory, however it may be misread.
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
	want := filepath.Join(dir, path) // the meaning of the path, whatever it looks like
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
	m, err := task.New(s, testkit.Quiet)
	testkit.Must(t, err)
	op := testkit.Submit(t, m, func(context.Context, func(int)) (any, error) { return path, nil })
	testkit.Wait(t, m, op.ID)
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
	if got, err := testkit.OpenSQLite(t, path).Get(op.ID); err != nil || got.State != task.StateDone {
		t.Errorf("opened again: %+v, %v", got, err)
	}
}

// fuzzModes checks that all files of an open database are accessible only to their
// owner.
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

// fuzzPathMustOpen checks that there was a reason to refuse a path.
func fuzzPathMustOpen(t *testing.T, path, want string, why error) {
	t.Helper()
	parent, err := os.Stat(filepath.Dir(want))
	switch {
	case path == "", strings.Contains(path, "\x00"), err != nil, !parent.IsDir():
	case os.IsPathSeparator(path[len(path)-1]), filepath.Base(path) == ".": // names a directory
	case len(filepath.Base(want)) > 255-len("-owner-"+fuzzDead), len(want) > 400:
	default:
		if _, err := os.Stat(want); err == nil {
			return // the path is a directory
		}
		t.Errorf("%q was refused: %v", path, why)
	}
}
