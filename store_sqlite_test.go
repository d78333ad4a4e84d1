package task

import (
	"bufio"
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/mynt-nas/task/internal/testos"
)

// sqliteSoon is how long what nothing keeps waiting may take.
const sqliteSoon = 5 * time.Second

func sqliteOpen(t testing.TB, path string) *SQLiteStore {
	t.Helper()
	s, err := OpenSQLite(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func sqliteUse(t testing.TB, db *sql.DB) *SQLiteStore {
	t.Helper()
	s, err := NewSQLiteStore(db)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func sqliteManager(t testing.TB, db Persistence) *Manager {
	t.Helper()
	m, err := New(db, WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// sqliteDB opens a database as an application does.
func sqliteDB(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite3", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func sqliteExecute(t testing.TB, q interface {
	ExecContext(context.Context, string, ...any) (sql.Result, error)
}, script string) {
	t.Helper()
	if _, err := q.ExecContext(context.Background(), script); err != nil {
		t.Fatalf("%v: %s", err, script)
	}
}

// sqliteMake makes a database file and closes it again.
func sqliteMake(t testing.TB, path, script string) string {
	t.Helper()
	db := sqliteDB(t, path)
	sqliteExecute(t, db, script)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func sqliteTexts(t testing.TB, q querier, query string) []string {
	t.Helper()
	all, err := texts(q, query)
	if err != nil {
		t.Fatalf("%v: %s", err, query)
	}
	return all
}

// sqliteBytes returns the rows of a query's columns as types and bytes.
func sqliteBytes(t testing.TB, q querier, from string, columns ...string) []string {
	t.Helper()
	cells := make([]string, len(columns))
	for i, c := range columns {
		cells[i] = fmt.Sprintf(`'%s=' || typeof("%s") || ':' || hex("%[2]s")`, strings.ReplaceAll(c, "'", "''"), c)
	}
	return sqliteTexts(t, q, "SELECT "+strings.Join(cells, " || ' ' || ")+" FROM "+from)
}

// sqliteDump returns all of a database but the table tasks.
func sqliteDump(t testing.TB, q querier) []string {
	t.Helper()
	all := sqliteTexts(t, q, `SELECT type || ' ' || name || ' ' || coalesce(sql, '') FROM sqlite_master WHERE tbl_name <> 'tasks' ORDER BY 1`)
	for _, pragma := range []string{"user_version", "application_id", "journal_mode", "synchronous", "busy_timeout", "foreign_keys",
		"auto_vacuum", "page_size", "encoding", "cache_size", "recursive_triggers", "secure_delete", "locking_mode", "wal_autocheckpoint"} {
		all = append(all, pragma+" "+strings.Join(sqliteTexts(t, q, "PRAGMA "+pragma), " "))
	}
	for _, table := range sqliteTexts(t, q, `SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'tasks' ORDER BY 1`) {
		columns := sqliteTexts(t, q, fmt.Sprintf("SELECT name FROM pragma_table_info('%s')", table))
		for _, row := range sqliteBytes(t, q, fmt.Sprintf("%q ORDER BY 1", table), columns...) {
			all = append(all, table+" "+row)
		}
	}
	return all
}

func sqliteSame(t testing.TB, what string, got, want []string) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	for i := range max(len(got), len(want)) {
		var g, w string
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Errorf("%s, line %d:\n got %q\nwant %q", what, i, g, w)
		}
	}
}

// sqliteTree returns all files below a directory with their modes and bytes.
// No database in it may be open: to open its file drops SQLite's locks.
func sqliteTree(t testing.TB, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var data []byte
		if d.Type().IsRegular() {
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		all = append(all, fmt.Sprintf("%s %v %x", path, d.Type(), data))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func sqliteNames(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func sqliteOp(id string, state State) *Operation {
	now := time.Now().UTC().Truncate(time.Microsecond)
	return &Operation{ID: id, Name: "name of " + id, State: state, CreatedAt: now, UpdatedAt: now}
}

func sqliteIDs(t testing.TB, s Persistence, limit, offset int) string {
	t.Helper()
	ops, err := s.List(limit, offset)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]string, len(ops))
	for i, op := range ops {
		ids[i] = op.ID
	}
	return strings.Join(ids, " ")
}

// sqliteReceive returns what comes out of c before long.
func sqliteReceive[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing after 30 s", what)
		panic("unreachable")
	}
}

// sqliteSpecSchema is the schema as the specification has it.
func sqliteSpecSchema(t testing.TB) string {
	t.Helper()
	spec, err := os.ReadFile("testdata/SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```sql\n(.*?)```").FindSubmatch(spec)
	if m == nil {
		t.Fatal("the specification has no schema")
	}
	return string(m[1])
}

func TestSQLiteNewFile(t *testing.T) {
	defer testos.Umask(0o022)()
	dir := t.TempDir()
	path := filepath.Join(dir, "new.db")
	s := sqliteOpen(t, path)
	m := sqliteManager(t, s)
	op, err := m.Submit("work", func(context.Context, func(int)) (any, error) { return 1, nil })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Wait(t.Context(), op.ID); err != nil {
		t.Fatal(err)
	}

	t.Run("schema", func(t *testing.T) {
		spec := sqliteDB(t, ":memory:")
		spec.SetMaxOpenConns(1)
		sqliteExecute(t, spec, sqliteSpecSchema(t))
		const columns = `SELECT cid || ' ' || name || ' ' || type || ' ' || "notnull" || ' ' || coalesce(dflt_value, 'none') || ' ' || pk
			FROM pragma_table_xinfo('tasks')`
		want := append(sqliteTexts(t, spec, columns), "9 started_at DATETIME 0 none 0", "10 owner TEXT 0 none 0")
		sqliteSame(t, "columns", sqliteTexts(t, s.db, columns), want)
		sqliteSame(t, "indexes", sqliteTexts(t, s.db, "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"),
			[]string{"CREATE INDEX tasks_state_not_done ON tasks (state) WHERE state <> 'DONE'"})
		sqliteSame(t, "other tables", sqliteTexts(t, s.db, "SELECT name FROM sqlite_master WHERE tbl_name <> 'tasks'"), nil)
	})
	t.Run("every connection", func(t *testing.T) {
		for i := range s.db.Stats().MaxOpenConnections {
			c, err := s.db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal", "busy_timeout": "8000"} {
				if got := sqliteTexts(t, c, "PRAGMA "+pragma); got[0] != want {
					t.Errorf("connection %d: %s = %s, want %s", i, pragma, got[0], want)
				}
			}
		}
		if n := s.db.Stats().OpenConnections; n < 4 {
			t.Errorf("%d connections, want several", n)
		}
	})
	t.Run("modes", func(t *testing.T) {
		if runtime.GOOS == "windows" {
			t.Skip("this system has no file modes")
		}
		files := []string{path, path + "-shm", path + "-wal"}
		if own := s.owner.Path(); own != "" {
			files = append(files, own)
		}
		for _, file := range files {
			if info, err := os.Lstat(file); err != nil {
				t.Error(err)
			} else if info.Mode() != 0o600 {
				t.Errorf("%s has mode %v, want 0600", file, info.Mode())
			}
		}
		if got := sqliteNames(t, dir); len(got) != len(files) {
			t.Errorf("files %q, want %q", got, files)
		}
	})
	t.Run("closed", func(t *testing.T) {
		for range 2 {
			if err := errors.Join(m.Close(), s.Close()); err != nil {
				t.Fatal(err)
			}
		}
		sqliteSame(t, "files", sqliteNames(t, dir), []string{"new.db"})
		if _, err := s.List(1, 0); err == nil {
			t.Error("List works on a closed store")
		}
		if err := s.Save(sqliteOp("late", StatePending)); err == nil {
			t.Error("Save works on a closed store")
		}
	})
}

func TestSQLitePaths(t *testing.T) {
	names := []string{"plain.db", "two words", "hash#tag", "per%cent", "percent%41", "%", "a&mode=memory", "a+b", "it's", "semi;colon",
		"ünï 日本 \U0001F4BE", "-dash", ":memory: not", "file:x", "équ=al", "[x]{y}", "back`tick", "~", "%00", "%2e%2e%2fx"}
	if runtime.GOOS != "windows" {
		names = append(names, "what?", "x?mode=ro&cache=shared", "?", `dou"ble`, `back\slash`, "new\nline", "*")
	}
	if runtime.GOOS == "linux" {
		names = append(names, "not\xffutf8")
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			for where, path := range map[string]string{"file": name, "directory": filepath.Join(name, "x.db")} {
				root := t.TempDir()
				path := filepath.Join(root, path)
				if where == "directory" {
					if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
						t.Fatal(err)
					}
				}
				s := sqliteOpen(t, path)
				if err := s.Save(sqliteOp("first", StateDone)); err != nil {
					t.Fatal(err)
				}
				app := sqliteUse(t, sqliteDB(t, dsn(path)))
				if s.owner.Path() != "" && !slices.Equal(app.owner.Others(), []string{s.owner.ID}) {
					t.Errorf("%s: the other store sees the owners %q", where, app.owner.Others())
				}
				if err := errors.Join(app.Close(), app.db.Close(), s.Close()); err != nil {
					t.Fatal(err)
				}
				sqliteSame(t, where+": files", sqliteNames(t, root), []string{name})
				if got := sqliteIDs(t, sqliteOpen(t, path), 10, 0); got != "first" {
					t.Errorf("%s: opened again it has %q", where, got)
				}
			}
		})
	}
}

// Wherever the path leads, it leads all openers to the same files.
func TestSQLiteLinks(t *testing.T) {
	for _, test := range []struct {
		name, other string // another way to real/x.db
	}{
		{"relative", filepath.Join("real", "x.db")},
		{"not clean", filepath.Join("real", "x.db") + "/../../real//./x.db"},
		{"symbolic link", "link"},
		{"relative symbolic link to a symbolic link", "link2"},
		{"symbolic link to the directory", filepath.Join("dir", "x.db")},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			t.Chdir(root)
			path := filepath.Join(root, "real", "x.db")
			if err := errors.Join(os.Mkdir("real", 0o700), os.Symlink(path, "link"), os.Symlink("link", "link2"),
				os.Symlink("real", "dir")); err != nil {
				t.Fatal(err)
			}
			a := sqliteOpen(t, path)
			before := sqliteNames(t, root)
			b := sqliteOpen(t, test.other)
			t.Chdir(t.TempDir())
			if err := errors.Join(a.Save(sqliteOp("a", StateDone)), b.Save(sqliteOp("b", StateDone))); err != nil {
				t.Fatal(err)
			}
			if got := sqliteIDs(t, a, 10, 0); got != "b a" {
				t.Errorf("one store has %q, want both operations", got)
			}
			if a.owner.Path() != "" && !slices.Equal(b.owner.Others(), []string{a.owner.ID}) {
				t.Errorf("the stores don't see each other: %v", b.owner.Others())
			}
			sqliteSame(t, "files beside the directory", sqliteNames(t, root), before)
			if err := errors.Join(a.Close(), b.Close()); err != nil {
				t.Fatal(err)
			}
			sqliteSame(t, "files", sqliteNames(t, filepath.Dir(path)), []string{"x.db"})
		})
	}
}

func TestSQLiteMemory(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	s, other := sqliteOpen(t, ":memory:"), sqliteOpen(t, ":memory:")
	m := sqliteManager(t, s)
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			op, err := m.Submit(fmt.Sprint(i), func(context.Context, func(int)) (any, error) { return i, nil })
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := m.Wait(t.Context(), op.ID); err != nil {
				t.Error(err)
			}
			if _, ok := m.Get(op.ID); !ok {
				t.Errorf("Get doesn't find %s", op.ID)
			}
			if _, err := m.List(20, 0); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if ops, err := m.List(20, 0); err != nil || len(ops) != 16 {
		t.Errorf("List: %d operations, %v, want 16", len(ops), err)
	}
	if got := sqliteIDs(t, other, 20, 0); got != "" {
		t.Errorf("another database in memory has %q", got)
	}
	sqliteSame(t, "files", sqliteNames(t, dir), nil)
}

// A sqliteCell is a cell as other code may have left it.
type sqliteCell struct {
	column, literal string // as SQL
	want            string // as the manager shows it; see sqliteShown
}

var sqliteCells = []sqliteCell{
	{"id", "'plain'", "plain"},
	{"id", "''", ""},
	{"id", "42", "42"},
	{"id", "CAST(x'6100' || x'62' AS TEXT)", "a\x00b"},
	{"id", "CAST(x'61ff62' AS TEXT)", "a\xffb"},
	{"id", "x'426c6f62'", "Blob"},
	{"id", "'../../etc/passwd'", "../../etc/passwd"},
	{"id", "'it''s \"%?#'", `it's "%?#`},

	{"name", "'plain'", "plain"},
	{"name", "''", ""},
	{"name", "7", "7"},
	{"name", "CAST(x'61ff62' AS TEXT)", "a\uFFFDb"},
	{"name", "CAST(x'610062' AS TEXT)", "a\x00b"},
	{"name", "x'61ff62'", "a\uFFFDb"},

	{"progress", "42", "42"},
	{"progress", "'42'", "42"},
	{"progress", "'42%'", "42"},
	{"progress", "33.7", "33"},
	{"progress", "1e300", "100"},
	{"progress", "-1e300", "0"},
	{"progress", "101", "100"},
	{"progress", "-5", "0"},
	{"progress", "9223372036854775807", "100"},
	{"progress", "-9223372036854775808", "0"},
	{"progress", "'half'", "0"},
	{"progress", "''", "0"},
	{"progress", "x'3432'", "42"},
	{"progress", "x''", "0"},
	{"progress", "NULL", "0"},

	{"error", "'disk full'", "disk full"},
	{"error", "''", ""},
	{"error", "NULL", ""},
	{"error", "CAST(x'ff' AS TEXT)", "\uFFFD"},
	{"error", "x'6f6f7073'", "oops"},
}

// sqliteJSONs are metadata and results: what is in the cell, and what it means.
var sqliteJSONs = [][2]string{
	{`'{"pool":"tank","n":12345678901234567890}'`, `{"n":12345678901234567890,"pool":"tank"}`},
	{`' [1, 2.50] '`, `[1,2.50]`},
	{`'true'`, `true`},
	{`42`, `42`},
	{`'1e999'`, `1e999`},
	{`'"\ud800"'`, "\"\uFFFD\""},
	{`CAST(x'22ff22' AS TEXT)`, "\"\uFFFD\""},
	{`x'7b7d'`, `{}`},
	{`'null'`, `null`},
	{`' null '`, `null`},
	{`NULL`, `null`},
	{`''`, `null`},
	{`'no json'`, `null`},
	{`'{"a":1'`, `null`},
	{`'{"a":1} trailing'`, `null`},
	{`'{"a":1}{"b":2}'`, `null`},
	{`'NaN'`, `null`},
	{`CAST(x'2200' || x'22' AS TEXT)`, `null`},
	{`x'00ff'`, `null`},
	{`CAST(zeroblob(70000) AS TEXT)`, `null`},
	{`replace(hex(zeroblob(5500)), '0', '[') || replace(hex(zeroblob(5500)), '0', ']')`, `null`}, // too deep for Go
}

// sqliteTimes are times: what is in the cell, and what it means.
var sqliteTimes = [][2]string{
	{`'2024-05-06 07:08:09.123456'`, "2024-05-06T07:08:09.123456Z"},
	{`'2024-05-06T07:08:09Z'`, "2024-05-06T07:08:09Z"},
	{`'2024-05-06T07:08:09.123456789+02:00'`, "2024-05-06T05:08:09.123456789Z"},
	{`'2024-05-06 07:08:09.123456789+02:00'`, "2024-05-06T05:08:09.123456789Z"},
	{`'2024-05-06 07:08:09-07:00'`, "2024-05-06T14:08:09Z"},
	{`'2024-05-06 07:08:09.5Z'`, "2024-05-06T07:08:09.5Z"},
	{`'2024-05-06 07:08:09'`, "2024-05-06T07:08:09Z"},
	{`'2024-05-06T07:08:09'`, "2024-05-06T07:08:09Z"},
	{`'2024-05-06 07:08'`, "2024-05-06T07:08:00Z"},
	{`'2024-05-06T07:08'`, "2024-05-06T07:08:00Z"},
	{`'2024-05-06'`, "2024-05-06T00:00:00Z"},
	{`'2024-05-06 07:08:09.123456789 +0200 CEST m=+0.000123'`, "2024-05-06T05:08:09.123456789Z"},
	{`'2024-05-06 07:08:09.1 -0330 NST m=-12.5'`, "2024-05-06T10:38:09.1Z"},
	{`'2024-05-06 07:08:09 +0000 UTC'`, "2024-05-06T07:08:09Z"},
	{`'2024-05-06 07:08:09.25 +0545 +0545'`, "2024-05-06T01:23:09.25Z"},
	{`'2024-05-06 07:08:09 +0200'`, "2024-05-06T05:08:09Z"},
	{`CAST('2024-05-06 07:08:09' AS BLOB)`, "2024-05-06T07:08:09Z"},
	{`1714979289`, "2024-05-06T07:08:09Z"},
	{`'1714979289'`, "2024-05-06T07:08:09Z"},
	{`1714979289123`, "2024-05-06T07:08:09.123Z"},
	{`0`, "1970-01-01T00:00:00Z"},
	{`NULL`, ""},
	{`''`, ""},
	{`'yesterday'`, ""},
	{`'a b c d e f'`, ""},
	{`'2024-13-45 99:99:99'`, ""},
	{`'2024-05-06 07:08:09 +9999 CEST m=+1'`, ""},
	{`x'00ff'`, ""},
	{`CAST(x'ff00' AS TEXT)`, ""},
	// What JSON can't say is no time either.
	{`'0000-01-01T00:00:00+23:00'`, ""},
	{`'9999-12-31T23:59:59-23:00'`, ""},
	{`9223372036854775807`, ""},
	{`-9223372036854775808`, ""},
	{`-99999999999`, ""},
	{`1714979289123456789`, ""},
}

// sqliteStates are states: what is in the cell, and which it is.
var sqliteStates = [][2]string{
	{"'DONE'", "DONE"},
	{"'FAILED'", "FAILED"},
	{"'CANCELLED'", "CANCELLED"},
	{"'PENDING'", "PENDING"},
	{"'RUNNING'", "RUNNING"},
	{"x'52554e4e494e47'", "RUNNING"},
	{"x'444f4e45'", "DONE"},
	{"'paused'", "paused"},
	{"'running'", "running"},
	{"' RUNNING'", " RUNNING"},
	{"''", ""},
	{"5", "5"},
	{"CAST(x'ff' AS TEXT)", "\xff"},
}

// sqliteShown returns what an operation shows of a column.
func sqliteShown(op *Operation, column string) string {
	text := func(v any) string { raw, _ := json.Marshal(v); return string(raw) }
	moment := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.Format(time.RFC3339Nano)
	}
	switch column {
	case "id":
		return op.ID
	case "name":
		return op.Name
	case "state":
		return string(op.State)
	case "progress":
		return fmt.Sprint(op.Progress)
	case "metadata":
		return text(op.Metadata)
	case "result":
		return text(op.Result)
	case "error":
		return op.Error
	case "created_at":
		return moment(op.CreatedAt)
	case "updated_at":
		return moment(op.UpdatedAt)
	default:
		return moment(op.StartedAt)
	}
}

// A table made from the specification's schema and filled by other code, is
// taken over with all that is in it, finished or interrupted.
func TestSQLiteTakeover(t *testing.T) {
	cells := slices.Clone(sqliteCells)
	for _, column := range []string{"metadata", "result"} {
		for _, c := range sqliteJSONs {
			cells = append(cells, sqliteCell{column, c[0], c[1]})
		}
	}
	for _, column := range []string{"created_at", "updated_at"} {
		for _, c := range sqliteTimes {
			cells = append(cells, sqliteCell{column, c[0], c[1]})
		}
	}
	states := make([]sqliteCell, len(sqliteStates))
	for i, c := range sqliteStates {
		states[i] = sqliteCell{"state", c[0], c[1]}
	}
	for _, test := range []struct {
		name, state string
		cells       []sqliteCell
		open        func(t *testing.T, path string) *SQLiteStore
	}{
		{"finished", "DONE", cells, func(t *testing.T, path string) *SQLiteStore { return sqliteOpen(t, path) }},
		{"interrupted", "RUNNING", cells, func(t *testing.T, path string) *SQLiteStore { return sqliteOpen(t, path) }},
		{"any state", "", states, func(t *testing.T, path string) *SQLiteStore { return sqliteOpen(t, path) }},
		{"in the application's database", "DONE", cells, func(t *testing.T, path string) *SQLiteStore { return sqliteUse(t, sqliteDB(t, path)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "taken.db")
			sqliteTakeover(t, sqliteMake(t, path, sqliteSpecSchema(t)), test.state, test.cells, test.open)
		})
	}
}

func sqliteTakeover(t *testing.T, path, state string, cells []sqliteCell, open func(*testing.T, string) *SQLiteStore) {
	var script strings.Builder
	for i, c := range cells {
		row := map[string]string{"id": fmt.Sprintf("'row-%d'", i), "name": "'other code'", "state": "'" + state + "'", c.column: c.literal}
		fmt.Fprintf(&script, "INSERT INTO tasks (id, name, state) VALUES (%s, %s, %s);", row["id"], row["name"], row["state"])
		if !slices.Contains([]string{"id", "name", "state"}, c.column) {
			fmt.Fprintf(&script, "UPDATE tasks SET %s = %s WHERE rowid = %d;", c.column, c.literal, i+1)
		}
	}
	sqliteMake(t, path, "BEGIN;"+script.String()+"COMMIT")
	before := sqliteCellBytes(t, path)

	s := open(t, path)
	m := sqliteManager(t, s)
	ops, err := m.List(len(cells)+10, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(ops) != len(cells) {
		t.Fatalf("List returns %d operations, want %d", len(ops), len(cells))
	}
	slices.Reverse(ops)
	orphan := make([]bool, len(cells))
	for i, c := range cells {
		was := state
		if c.column == "state" {
			was = c.want
		}
		orphan[i] = was == "RUNNING" || was == "PENDING"
		t.Run(c.column+" "+fmt.Sprintf("%.60s", c.literal), func(t *testing.T) {
			sqliteTaken(t, m, ops[i], c, orphan[i])
		})
	}
	if err := errors.Join(m.Close(), s.Close(), s.db.Close()); err != nil {
		t.Fatal(err)
	}

	after := sqliteCellBytes(t, path)
	for i, row := range before {
		for column, was := range row {
			if orphan[i] && slices.Contains([]string{"state", "error", "updated_at"}, column) {
				continue
			}
			if got := after[i][column]; got != was {
				t.Errorf("row of %s %.60s: %s was %.60s and is %.60s", cells[i].column, cells[i].literal, column, was, got)
			}
		}
	}
}

// sqliteTaken checks one operation that was taken over.
func sqliteTaken(t *testing.T, m *Manager, op *Operation, c sqliteCell, orphan bool) {
	want := c.want
	if orphan {
		if op.State != StateFailed || op.Error != errTextRestart {
			t.Errorf("it is %s with the error %q, want it recovered", op.State, op.Error)
		}
		if time.Since(op.UpdatedAt).Abs() > time.Hour {
			t.Errorf("updated at %v, want now", op.UpdatedAt)
		}
		switch c.column {
		case "state":
			want = string(StateFailed)
		case "error":
			want = errTextRestart
		case "updated_at":
			want = sqliteShown(op, c.column)
		}
	}
	if got := sqliteShown(op, c.column); got != want {
		t.Errorf("List shows %.80q, want %.80q", got, want)
	}
	if _, err := json.Marshal(op); err != nil {
		t.Error(err)
	}
	got, ok := m.Get(op.ID)
	if !ok {
		t.Fatal("Get doesn't find it")
	}
	if got.CreatedAt != op.CreatedAt || got.State != op.State || sqliteShown(got, c.column) != want {
		t.Errorf("Get shows %+v, List %+v", got, op)
	}
}

// sqliteCellBytes returns the nine columns of all rows, byte for byte.
func sqliteCellBytes(t *testing.T, path string) []map[string]string {
	t.Helper()
	db := sqliteDB(t, path)
	defer db.Close()
	var rows []map[string]string
	for _, column := range requiredColumns {
		for i, cell := range sqliteBytes(t, db, "tasks ORDER BY rowid", column) {
			if i == len(rows) {
				rows = append(rows, map[string]string{})
			}
			rows[i][column] = cell
		}
	}
	return rows
}

// SQLite lets a primary key that is no rowid be NULL.
func TestSQLiteNullID(t *testing.T) {
	path := sqliteMake(t, filepath.Join(t.TempDir(), "null.db"), sqliteSpecSchema(t)+`
		INSERT INTO tasks (id, name, state) VALUES (NULL, 'a', 'DONE'), (NULL, 'b', 'RUNNING');`)
	m := sqliteManager(t, sqliteOpen(t, path))
	ops, err := m.List(10, 0)
	if err != nil || len(ops) != 2 || ops[0].State != StateFailed || ops[1].State != StateDone {
		t.Errorf("List = %v, %v", ops, err)
	}
}

const sqliteApp = `
CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, at DATETIME DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE pools (name TEXT PRIMARY KEY, owner INTEGER REFERENCES users(id) DEFERRABLE INITIALLY DEFERRED, raw BLOB) WITHOUT ROWID;
CREATE INDEX tasks_by_user ON users (name);
CREATE VIEW recent AS SELECT * FROM users WHERE at > '2024';
CREATE TABLE log (line TEXT);
CREATE TRIGGER logging AFTER INSERT ON users BEGIN INSERT INTO log VALUES ('new user ' || NEW.name); END;
INSERT INTO users (name) VALUES ('ann'), ('bob');
INSERT INTO pools VALUES ('tank', 1, x'00ff'), ('dozer', 2, NULL);
PRAGMA user_version = 7;
PRAGMA application_id = 77;
`

func TestSQLiteApplication(t *testing.T) {
	for _, test := range []struct {
		name, params string
		conns        int
	}{
		{"as go-sqlite3 opens it", "", 0},
		{"WAL", "_journal_mode=WAL", 0},
		{"one connection", "", 1},
		{"one connection, WAL, no busy timeout", "_journal_mode=WAL&_busy_timeout=0", 1},
		{"no busy timeout", "_busy_timeout=0", 0},
		{"foreign keys", "_foreign_keys=1&_journal_mode=TRUNCATE", 0},
		{"exclusive transactions", "_txlock=exclusive", 0},
		{"times in a location", "_loc=auto", 0},
		{"exclusive locking", "_locking_mode=EXCLUSIVE", 1},
		{"case-sensitive like, recursive triggers", "_case_sensitive_like=1&_recursive_triggers=1", 0},
		{"in memory", "mode=memory", 1},
		{"shared cache", "cache=shared", 1},
		{"in memory, shared cache", "mode=memory&cache=shared", 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			db := sqliteDB(t, "file:"+filepath.ToSlash(filepath.Join(dir, "app.db"))+"?"+test.params)
			db.SetMaxOpenConns(test.conns)
			db.SetMaxIdleConns(max(2, test.conns))
			sqliteExecute(t, db, sqliteApp)
			before := sqliteDump(t, db)
			for round := range 2 {
				s := sqliteUse(t, db)
				m := sqliteManager(t, s)
				sqliteLife(t, m, 10*round)
				if err := errors.Join(m.Close(), s.Close()); err != nil {
					t.Fatal(err)
				}
			}
			sqliteSame(t, "the application's own", sqliteDump(t, db), before)
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			for _, name := range sqliteNames(t, dir) {
				if strings.Contains(name, "owner") {
					t.Errorf("there is still %s", name)
				}
			}
		})
	}
}

// sqliteLife lets ten operations live, in a history of n.
func sqliteLife(t *testing.T, m *Manager, n int) {
	t.Helper()
	fns := map[string]Func{
		"DONE": func(ctx context.Context, update func(int)) (any, error) {
			update(40)
			return map[string]any{"n": 1}, SetMetadata(ctx, "changed")
		},
		"FAILED":    func(context.Context, func(int)) (any, error) { return nil, errors.New("no") },
		"CANCELLED": func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return nil, ctx.Err() },
	}
	var all sync.WaitGroup
	for i := range 10 {
		want := []string{"DONE", "FAILED", "CANCELLED"}[i%3]
		all.Go(func() {
			op, err := m.Submit(want, fns[want], WithMetadata(i))
			if err != nil {
				t.Error(err)
				return
			}
			if want == "CANCELLED" {
				if err := op.Cancel(); err != nil {
					t.Error(err)
				}
			}
			if _, err := m.List(5, 0); err != nil {
				t.Error(err)
			}
			op, err = m.Wait(t.Context(), op.ID)
			if err != nil {
				t.Error(err)
				return
			}
			if string(op.State) != want {
				t.Errorf("Wait = %+v, want it %s", op, want)
			}
			if stored, ok := m.Get(op.ID); !ok || fmt.Sprint(*stored) != fmt.Sprint(*op) {
				t.Errorf("Get = %+v, want %+v", stored, op)
			}
		})
	}
	all.Wait()
	if ops, err := m.List(1000, 0); err != nil || len(ops) != n+10 {
		t.Errorf("List returns %d operations, %v, want %d", len(ops), err, n+10)
	}
}

// A sqliteSpy is a go-sqlite3 connector that has its hook called with every
// statement, which runs when the hook calls run.
type sqliteSpy struct {
	dsn  string
	hook func(query string, run func() error) error
}

func (s *sqliteSpy) Driver() driver.Driver { return nil }

func (s *sqliteSpy) Connect(context.Context) (driver.Conn, error) {
	db, err := sql.Open("sqlite3", "")
	if err != nil {
		return nil, err
	}
	defer db.Close()
	c, err := db.Driver().Open(s.dsn)
	return &sqliteSpyConn{c, s}, err
}

type sqliteSpyConn struct {
	driver.Conn
	spy *sqliteSpy
}

func (c *sqliteSpyConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (res driver.Result, err error) {
	err = c.spy.hook(query, func() (err error) {
		res, err = c.Conn.(driver.ExecerContext).ExecContext(ctx, query, args)
		return err
	})
	return res, err
}

func (c *sqliteSpyConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (rows driver.Rows, err error) {
	err = c.spy.hook(query, func() (err error) {
		rows, err = c.Conn.(driver.QueryerContext).QueryContext(ctx, query, args)
		return err
	})
	return rows, err
}

// sqliteSpied opens a database as an application does that has no busy
// timeout, and returns what sets the hook.
func sqliteSpied(t testing.TB, path string) (db *sql.DB, set func(func(query string, run func() error) error)) {
	var hook atomic.Value
	set = func(h func(string, func() error) error) { hook.Store(h) }
	set(func(_ string, run func() error) error { return run() })
	db = sql.OpenDB(&sqliteSpy{path + "?_busy_timeout=0", func(query string, run func() error) error {
		return hook.Load().(func(string, func() error) error)(query, run)
	}})
	t.Cleanup(func() { db.Close() })
	return db, set
}

// TestSQLiteHolder is no test, but the other process of those that need one:
// it runs a script in a database and commits once its standard input ends.
func TestSQLiteHolder(t *testing.T) {
	path := os.Getenv("SQLITE_HOLDER_PATH")
	if path == "" {
		return
	}
	release := sqliteHold(t, path, os.Getenv("SQLITE_HOLDER_SCRIPT"))
	fmt.Println("holding")
	io.Copy(io.Discard, os.Stdin)
	release()
}

// sqliteHold runs a script that begins a transaction and reads or writes.
func sqliteHold(t testing.TB, path, script string) (release func()) {
	t.Helper()
	c, err := sqliteDB(t, path).Conn(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	sqliteExecute(t, c, script)
	return func() {
		t.Helper()
		sqliteExecute(t, c, "COMMIT")
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// sqliteHoldElsewhere does the same in another process.
func sqliteHoldElsewhere(t testing.TB, path, script string) (release func()) {
	t.Helper()
	cmd := osexec.Command(os.Args[0], "-test.run=^TestSQLiteHolder$", "-test.count=1")
	cmd.Env = append(os.Environ(), "SQLITE_HOLDER_PATH="+path, "SQLITE_HOLDER_SCRIPT="+script)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "holding\n" {
		t.Fatalf("the other process says %q, %v", line, err)
	}
	return sync.OnceFunc(func() {
		t.Helper()
		in.Close()
		io.Copy(io.Discard, lines)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}

// While somebody else holds the database, the store waits, busy timeout or not.
func TestSQLiteLocked(t *testing.T) {
	const (
		writing = "BEGIN IMMEDIATE; INSERT INTO users (name) VALUES ('eve')"
		alone   = "BEGIN EXCLUSIVE; INSERT INTO users (name) VALUES ('eve')"
		reading = "BEGIN; SELECT * FROM users"
	)
	submit := func(m *Manager, _ string) error {
		op, err := m.Submit("late", func(context.Context, func(int)) (any, error) { return nil, nil })
		if err != nil {
			return err
		}
		_, err = m.Wait(context.Background(), op.ID)
		return err
	}
	list := func(m *Manager, id string) error {
		ops, err := m.List(10, 0)
		if err == nil && (len(ops) != 1 || ops[0].ID != id) {
			err = fmt.Errorf("List returns %v", ops)
		}
		return err
	}
	get := func(m *Manager, id string) error {
		if op, ok := m.Get(id); !ok || op.ID != id {
			return fmt.Errorf("Get returns %v, %v", op, ok)
		}
		return nil
	}
	open := func(m *Manager, _ string) error {
		s, err := NewSQLiteStore(m.db.(*SQLiteStore).db)
		if err != nil {
			return err
		}
		return s.Close()
	}
	for _, test := range []struct {
		name, journal, script string
		hold                  func(testing.TB, string, string) func()
		do                    func(m *Manager, id string) error
		again                 string // how the statement begins that must be tried again
	}{
		{"Submit beside a writer", "WAL", writing, sqliteHold, submit, "BEGIN IMMEDIATE"},
		{"Submit beside a writing process", "WAL", writing, sqliteHoldElsewhere, submit, "BEGIN IMMEDIATE"},
		{"Submit beside a writer with a rollback journal", "DELETE", writing, sqliteHold, submit, "BEGIN IMMEDIATE"},
		{"Submit beside a reader with a rollback journal", "DELETE", reading, sqliteHold, submit, "COMMIT"},
		{"Submit beside a reading process with a rollback journal", "DELETE", reading, sqliteHoldElsewhere, submit, "COMMIT"},
		{"List beside a writer with a rollback journal", "DELETE", alone, sqliteHold, list, "SELECT"},
		{"List beside a writing process with a rollback journal", "DELETE", alone, sqliteHoldElsewhere, list, "SELECT"},
		{"Get beside a writer with a rollback journal", "DELETE", alone, sqliteHold, get, "SELECT"},
		{"NewSQLiteStore beside a writer", "WAL", writing, sqliteHold, open, "BEGIN IMMEDIATE"},
		{"NewSQLiteStore beside a writing process with a rollback journal", "DELETE", alone, sqliteHoldElsewhere, open, "SELECT"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := sqliteMake(t, filepath.Join(t.TempDir(), "app.db"), sqliteApp+"PRAGMA journal_mode = "+test.journal)
			db, set := sqliteSpied(t, path)
			m := sqliteManager(t, sqliteUse(t, db))
			op, err := m.Submit("early", func(context.Context, func(int)) (any, error) { return nil, nil })
			if err != nil {
				t.Fatal(err)
			}
			if _, err := m.Wait(t.Context(), op.ID); err != nil {
				t.Fatal(err)
			}

			release := test.hold(t, path, test.script)
			attempts := make(chan struct{}, 2)
			set(func(query string, run func() error) error {
				if strings.HasPrefix(query, test.again) {
					select {
					case attempts <- struct{}{}:
					default:
					}
				}
				return run()
			})
			done := make(chan error, 1)
			go func() { done <- test.do(m, op.ID) }()
			for len(attempts) < cap(attempts) {
				select {
				case err := <-done:
					t.Fatalf("returned %v while the database was locked", err)
				case <-time.After(time.Millisecond):
				}
			}
			release()
			if err := sqliteReceive(t, test.name, done); err != nil {
				t.Error(err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The database that the store opened itself waits by its busy timeout.
func TestSQLiteLockedOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "own.db")
	m := sqliteManager(t, sqliteOpen(t, path))
	release := sqliteHoldElsewhere(t, path, "BEGIN IMMEDIATE; CREATE TABLE other (x)")
	done := make(chan error, 1)
	go func() {
		_, err := m.Submit("work", func(context.Context, func(int)) (any, error) { return nil, nil })
		done <- err
	}()
	if _, err := m.List(10, 0); err != nil { // readers don't wait in WAL mode
		t.Error(err)
	}
	select {
	case err := <-done:
		t.Errorf("Submit returned %v while the database was locked", err)
	case <-time.After(50 * time.Millisecond):
	}
	release()
	if err := sqliteReceive(t, "Submit", done); err != nil {
		t.Error(err)
	}
}

// What stays locked for too long, or may be for all that can be told without
// knowing the driver, is an error in the end, and nothing has happened. All
// cases wait at once.
func TestSQLiteGivesUp(t *testing.T) {
	never := func(context.Context, func(int)) (any, error) { panic("it runs") }
	submit := func(m *Manager, release func()) error {
		_, err := m.Submit("never", never)
		release()
		if ops, err := m.List(10, 0); err != nil || len(ops) != 0 {
			t.Errorf("List = %v, %v, want nothing", ops, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		return err
	}
	app := func() (string, *sql.DB) {
		path := sqliteMake(t, filepath.Join(t.TempDir(), "app.db"), sqliteApp)
		return path, sqliteDB(t, path+"?_busy_timeout=0")
	}
	var all sync.WaitGroup
	took := make(map[string]time.Duration)
	errs := make(map[string]error)
	var mu sync.Mutex // guards took and errs
	try := func(name string, do func() error) {
		all.Go(func() {
			start := time.Now()
			err := do()
			mu.Lock()
			defer mu.Unlock()
			took[name], errs[name] = time.Since(start), err
		})
	}

	path, db := app()
	locked := sqliteManager(t, sqliteUse(t, db))
	release := sqliteHold(t, path, "BEGIN IMMEDIATE")
	try("Submit, the database is locked", func() error { return submit(locked, release) })

	_, db = app()
	db.SetMaxOpenConns(1)
	held := sqliteManager(t, sqliteUse(t, db))
	c, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	try("Submit, the only connection is in use", func() error { return submit(held, func() { c.Close() }) })

	db, set := sqliteSpied(t, filepath.Join(t.TempDir(), "app.db"))
	failing := sqliteUse(t, db)
	set(func(query string, run func() error) error {
		if query == "BEGIN IMMEDIATE" {
			return errors.New("the disk is on fire")
		}
		return run()
	})
	try("WriteBatch, BEGIN fails", func() error {
		errs := failing.WriteBatch([]*Operation{sqliteOp("a", StatePending), sqliteOp("b", StatePending)}, []*Operation{sqliteOp("a", StateDone)})
		if len(errs) != 3 || errs[0] != errs[1] || errs[0] != errs[2] {
			t.Errorf("errors %v, want everybody's the same", errs)
		}
		if got := sqliteIDs(t, failing, 10, 0); got != "" {
			t.Errorf("stored is %q", got)
		}
		return errs[0]
	})

	noise := filepath.Join(t.TempDir(), "noise")
	if err := os.WriteFile(noise, []byte(strings.Repeat("no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	db = sqliteDB(t, noise)
	try("NewSQLiteStore, not a database", func() error {
		_, err := NewSQLiteStore(db)
		return err
	})

	all.Wait()
	for name, err := range errs {
		t.Run(name, func(t *testing.T) {
			if err == nil {
				t.Error("it succeeded")
			}
			if took[name] > writeTimeout+sqliteSoon {
				t.Errorf("it took %v", took[name])
			}
		})
	}
}

// sqliteAdvice is what an error must have that tells a person what to do.
var sqliteAdvice = regexp.MustCompile(`\b(use|choose|rename|create|make|remove|must be)\b`)

// sqliteRefused checks that an attempt to open a store fails, soon, with an
// error that is of use, and leaves everything in the directory as it was.
func sqliteRefused(t *testing.T, dir, want string, open func() (*SQLiteStore, error)) {
	t.Helper()
	before := sqliteTree(t, dir)
	start := time.Now()
	s, err := open()
	took := time.Since(start)
	if err == nil {
		s.Close()
		t.Fatal("it succeeded")
	}
	if s != nil {
		t.Error("there is a store with the error")
	}
	if !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "task: ") || strings.Count(err.Error(), "task: ") != 1 {
		t.Errorf("error %q, want it to say %q, after one prefix", err, want)
	}
	if !sqliteAdvice.MatchString(err.Error()) {
		t.Errorf("error %q doesn't say what to do", err)
	}
	if took > sqliteSoon {
		t.Errorf("it took %v", took)
	}
	sqliteSame(t, "files", sqliteTree(t, dir), before)
}

func TestSQLiteRefusesTable(t *testing.T) {
	schema := sqliteSpecSchema(t)
	replace := func(old, new string) string {
		if !strings.Contains(schema, old) {
			t.Fatalf("the schema has no %q", old)
		}
		return strings.Replace(schema, old, new, 1)
	}
	for _, test := range []struct{ name, script, want string }{
		{"view", "CREATE TABLE x (id); CREATE VIEW tasks AS SELECT * FROM x", "a view called tasks"},
		{"view in capitals", "CREATE VIEW Tasks AS SELECT 1", "a view called tasks"},
		{"WITHOUT ROWID", replace("\n);", "\n) WITHOUT ROWID;"), "without a rowid"},
		{"WITHOUT ROWID but a column of that name", replace("\n);", ", rowid TEXT\n) WITHOUT ROWID;"), "rowid"},
		{"column called rowid", replace("\n);", ", RowID TEXT\n);"), "rowid"},
		{"other columns", "CREATE TABLE tasks (id TEXT PRIMARY KEY, title TEXT, done BOOL); INSERT INTO tasks VALUES ('a', 'milk', 0)",
			"no column name, state, progress, metadata, result, error, created_at, updated_at"},
		{"one column less", replace("metadata TEXT,", ""), "no column metadata"},
		{"virtual table", "CREATE VIRTUAL TABLE tasks USING rtree(id, x0, x1)", "no column name"},
		{"no primary key", replace("id TEXT PRIMARY KEY", "id TEXT"), "primary key is not id"},
		{"another primary key", replace("id TEXT PRIMARY KEY,\n    name TEXT NOT NULL", "id TEXT, name TEXT PRIMARY KEY"), "primary key is not id"},
		{"primary key of two", strings.Replace(replace("\n);", ", PRIMARY KEY (id, name)\n);"), " PRIMARY KEY", "", 1), "primary key is not id"},
		{"id INTEGER PRIMARY KEY", replace("id TEXT PRIMARY KEY", "id INTEGER PRIMARY KEY"), "won't take an operation"},
		{"extra column NOT NULL", replace("\n);", ", tenant TEXT NOT NULL\n);"), "won't take an operation"},
		{"trigger against inserts", schema + "CREATE TRIGGER no BEFORE INSERT ON tasks BEGIN SELECT RAISE(ABORT, 'hands off'); END", "hands off"},
		{"trigger against updates", schema + "CREATE TRIGGER no BEFORE UPDATE ON tasks BEGIN SELECT RAISE(ROLLBACK, 'hands off'); END", "hands off"},
		{"trigger that ignores", schema + "CREATE TRIGGER no BEFORE INSERT ON tasks BEGIN SELECT RAISE(IGNORE); END", "won't take an operation"},
		{"CHECK", replace("state TEXT NOT NULL", "state TEXT NOT NULL CHECK (state IN ('todo', 'doing', 'done'))"), "won't take an operation"},
		{"UNIQUE where it can't be", schema + "CREATE UNIQUE INDEX one ON tasks (progress); INSERT INTO tasks (id, name, state) VALUES ('a', 'a', 'DONE')",
			"won't take an operation"},
	} {
		for _, journal := range []string{"DELETE", "WAL"} {
			make := func(t *testing.T) (dir, path string) {
				dir = t.TempDir()
				return dir, sqliteMake(t, filepath.Join(dir, "app.db"), sqliteApp+test.script+"; PRAGMA journal_mode = "+journal)
			}
			t.Run("OpenSQLite/"+journal+"/"+test.name, func(t *testing.T) {
				dir, path := make(t)
				sqliteRefused(t, dir, test.want, func() (*SQLiteStore, error) { return OpenSQLite(path) })
			})
			t.Run("NewSQLiteStore/"+journal+"/"+test.name, func(t *testing.T) {
				dir, path := make(t)
				sqliteRefused(t, dir, test.want, func() (*SQLiteStore, error) {
					db := sqliteDB(t, path)
					defer db.Close()
					return NewSQLiteStore(db)
				})
			})
		}
	}
}

func TestSQLiteRefusesFile(t *testing.T) {
	write := func(name, data string) func(string) (string, error) {
		return func(dir string) (string, error) {
			path := filepath.Join(dir, name)
			return path, os.WriteFile(path, []byte(data), 0o600)
		}
	}
	at := func(name string) func(string) (string, error) {
		return func(dir string) (string, error) { return filepath.Join(dir, name), nil }
	}
	sound, err := os.ReadFile(sqliteMake(t, filepath.Join(t.TempDir(), "sound.db"), sqliteApp+sqliteSpecSchema(t)))
	if err != nil {
		t.Fatal(err)
	}
	var noise strings.Builder
	for i := range 8192 {
		noise.WriteByte(byte(i*i>>3 ^ i*151))
	}
	for _, test := range []struct {
		name string
		make func(dir string) (path string, err error)
		want string
	}{
		{"text", write("x.db", strings.Repeat("a shopping list\n", 100)), "not a database"},
		{"short text", write("x.db", "milk"), "not a database"},
		{"random bytes", write("x.db", noise.String()), "not a database"},
		{"header only", write("x.db", string(sound[:100])), "database"},
		{"truncated", write("x.db", string(sound[:len(sound)/2])), "database"},
		{"header, then noise", write("x.db", string(sound[:100])+noise.String()), "database"},
		{"directory", func(dir string) (string, error) {
			return filepath.Join(dir, "d"), os.Mkdir(filepath.Join(dir, "d"), 0o700)
		}, "not a regular file"},
		{"no directory", at("none/x.db"), "no directory"},
		{"no directory above", at("none/none/x.db"), "no directory"},
		{"file for a directory", func(dir string) (string, error) {
			_, err := write("file", "")(dir)
			return filepath.Join(dir, "file", "x.db"), err
		}, "directory"},
		{"dangling symbolic link", func(dir string) (string, error) {
			return filepath.Join(dir, "link"), os.Symlink(filepath.Join(dir, "gone.db"), filepath.Join(dir, "link"))
		}, "link"},
		{"symbolic link to itself", func(dir string) (string, error) {
			return filepath.Join(dir, "loop"), os.Symlink("loop", filepath.Join(dir, "loop"))
		}, "link"},
		{"named pipe", func(dir string) (string, error) {
			return filepath.Join(dir, "pipe"), testos.Mkfifo(filepath.Join(dir, "pipe"))
		},
			"not a regular file"},
		{"read-only file", func(dir string) (string, error) {
			path := filepath.Join(dir, "x.db")
			return path, errors.Join(os.WriteFile(path, sound, 0o600), os.Chmod(path, 0o444))
		}, "read-only"},
		{"name too long", at(strings.Repeat("x", 250)), "too long"},
		{"NUL", at("a\x00b"), "NUL"},
		{"nothing", func(string) (string, error) { return "", nil }, "path is empty"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			path, err := test.make(dir)
			if errors.Is(err, errors.ErrUnsupported) {
				t.Skip("not on this system")
			}
			if err != nil {
				t.Fatal(err)
			}
			sqliteRefused(t, dir, test.want, func() (*SQLiteStore, error) { return OpenSQLite(path) })
		})
	}
}

// What file modes forbid is refused also where it is not root who tries.
func TestSQLiteRefusesByMode(t *testing.T) {
	for _, test := range []struct {
		name, journal   string
		dirMode, dbMode os.FileMode // dbMode 0: no file
		want            string
	}{
		{"read-only file", "DELETE", 0o777, 0o444, "read-only"},
		{"somebody else's file", "DELETE", 0o777, 0o644, "read"},
		{"somebody else's file in WAL mode", "WAL", 0o777, 0o644, "read"},
		{"somebody else's file with all it needs", "DELETE; " + createTable + ";" + createIndex, 0o777, 0o644, "read"},
		{"unreadable file", "DELETE", 0o777, 0o200, "open"},
		{"read-only directory", "DELETE", 0o555, 0o666, "permission denied"},
		{"read-only directory, new file", "", 0o555, 0, "permission denied"},
		{"directory that can't be entered", "DELETE", 0o600, 0o666, "permission denied"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(testos.Dir(t), "d")
			path := filepath.Join(dir, "x.db")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if test.dbMode != 0 {
				sqliteMake(t, path, sqliteApp+"PRAGMA journal_mode = "+test.journal)
				mode := test.dbMode
				if os.Geteuid() != 0 && mode == 0o644 { // nobody else's files here
					mode = 0o444
				}
				if err := os.Chmod(path, mode); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(dir, test.dirMode); err != nil {
				t.Fatal(err)
			}
			defer os.Chmod(dir, 0o700)
			before := sqliteModeTree(t, dir)
			var s *SQLiteStore
			var err error
			start := time.Now()
			if !testos.Unprivileged(func() { s, err = OpenSQLite(path) }) {
				t.Skip("can't do without root's rights here")
			}
			if took := time.Since(start); took > sqliteSoon {
				t.Errorf("it took %v", took)
			}
			if err == nil {
				s.Close()
				t.Fatal("it succeeded")
			}
			if !strings.Contains(err.Error(), test.want) || !sqliteAdvice.MatchString(err.Error()) {
				t.Errorf("error %q, want it to say %q and what to do", err, test.want)
			}
			if test.journal == "WAL" {
				return // who may only read a database in WAL mode can't remove what SQLite then makes
			}
			sqliteSame(t, "files", sqliteModeTree(t, dir), before)
		})
	}
}

// sqliteModeTree is sqliteTree with a directory that may be closed to the test.
func sqliteModeTree(t testing.TB, dir string) []string {
	t.Helper()
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, info.Mode().Perm())
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		return sqliteTree(t, dir)
	}
	return sqliteNames(t, dir)
}

// A sqliteFakeDriver is that of a database of another kind.
type sqliteFakeDriver struct{}

func (sqliteFakeDriver) Connect(context.Context) (driver.Conn, error) { return sqliteFakeDriver{}, nil }
func (sqliteFakeDriver) Driver() driver.Driver                        { return nil }
func (sqliteFakeDriver) Begin() (driver.Tx, error) {
	return nil, errors.New("syntax error at or near BEGIN")
}
func (sqliteFakeDriver) Close() error { return nil }
func (sqliteFakeDriver) Prepare(query string) (driver.Stmt, error) {
	return nil, fmt.Errorf("syntax error at or near %.6s", query)
}

func TestSQLiteRefusesDB(t *testing.T) {
	closed := sqliteDB(t, filepath.Join(t.TempDir(), "x.db"))
	closed.Close()
	other := sql.OpenDB(sqliteFakeDriver{})
	defer other.Close()
	for _, test := range []struct {
		name string
		db   *sql.DB
		want string
	}{
		{"nil", nil, "nil"},
		{"of another kind", other, "is it SQLite?"},
		{"closed", closed, "closed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			start := time.Now()
			s, err := NewSQLiteStore(test.db)
			if err == nil || s != nil {
				t.Fatalf("NewSQLiteStore = %v, %v", s, err)
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %q, want it to say %q", err, test.want)
			}
			if took := time.Since(start); took > sqliteSoon {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// sqliteKinds are the two ways to a store.
var sqliteKinds = map[string]func(t testing.TB) *SQLiteStore{
	"own": func(t testing.TB) *SQLiteStore { return sqliteOpen(t, filepath.Join(t.TempDir(), "own.db")) },
	"application's": func(t testing.TB) *SQLiteStore {
		return sqliteUse(t, sqliteDB(t, filepath.Join(t.TempDir(), "app.db")))
	},
	"memory": func(t testing.TB) *SQLiteStore { return sqliteOpen(t, ":memory:") },
}

func TestSQLitePersistence(t *testing.T) {
	for name, open := range sqliteKinds {
		t.Run(name, func(t *testing.T) {
			t.Run("what is saved is got", func(t *testing.T) { sqliteRoundTrip(t, open(t)) })
			t.Run("saved twice", func(t *testing.T) {
				s := open(t)
				first := sqliteOp("a", StatePending)
				second := sqliteOp("a", StateRunning)
				second.Name = "second"
				if err := s.Save(first); err != nil {
					t.Fatal(err)
				}
				if err := s.Save(second); err == nil {
					t.Error("the second Save succeeded")
				}
				if got, err := s.Get("a"); err != nil || got.Name != first.Name || got.State != StatePending {
					t.Errorf("Get = %+v, %v, want the first", got, err)
				}
			})
			t.Run("unknown", func(t *testing.T) {
				s := open(t)
				if op, err := s.Get("nobody"); !errors.Is(err, ErrNotFound) || op != nil {
					t.Errorf("Get = %v, %v, want ErrNotFound", op, err)
				}
				if err := s.Update(sqliteOp("nobody", StateDone)); !errors.Is(err, ErrNotFound) {
					t.Errorf("Update = %v, want ErrNotFound", err)
				}
				if got := sqliteIDs(t, s, 10, 0); got != "" {
					t.Errorf("Update made %q", got)
				}
			})
			for _, state := range []State{StateDone, StateFailed, StateCancelled} {
				t.Run("finished as "+string(state), func(t *testing.T) { sqliteFinal(t, open(t), state) })
			}
			t.Run("deleted", func(t *testing.T) {
				s := open(t)
				op := sqliteOp("a", StatePending)
				if err := s.Save(op); err != nil {
					t.Fatal(err)
				}
				sqliteExecute(t, s.db, "DELETE FROM tasks")
				op.State = StateDone
				if err := s.Update(op); !errors.Is(err, ErrNotFound) {
					t.Errorf("Update = %v, want ErrNotFound", err)
				}
				if got := sqliteIDs(t, s, 10, 0); got != "" {
					t.Errorf("Update made %q again", got)
				}
			})
			t.Run("pages", func(t *testing.T) { sqlitePages(t, open(t)) })
		})
	}
}

func sqliteRoundTrip(t *testing.T, s *SQLiteStore) {
	op := sqliteOp("a", StatePending)
	op.Name, op.Error = "a\x00b 'quoted' \U0001F4BE", "an error\x00too"
	op.Metadata = json.RawMessage(`{"a":[1,null]}`)
	if err := s.Save(op); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		got, err := s.Get("a")
		if err != nil {
			t.Fatal(err)
		}
		g, w := *got, *op
		if fmt.Sprintf("%+v", g) != fmt.Sprintf("%+v", w) {
			t.Errorf("Get = %+v\nwant  %+v", g, w)
		}
	}
	check()
	op.State, op.Progress, op.Error = StateRunning, 37, ""
	op.StartedAt = op.CreatedAt.Add(time.Millisecond)
	op.UpdatedAt = op.StartedAt.Add(time.Microsecond)
	op.Metadata, op.Result = nil, json.RawMessage(`12345678901234567890`)
	if err := s.Update(op); err != nil {
		t.Fatal(err)
	}
	check()
	want := []string{fmt.Sprintf("a|RUNNING|37|NULL|'12345678901234567890'|NULL|'%s'|'%s'|'%s'", formatTime(op.CreatedAt),
		formatTime(op.UpdatedAt), formatTime(op.StartedAt))}
	sqliteSame(t, "stored form", sqliteTexts(t, s.db, `SELECT id || '|' || state || '|' || progress || '|' || quote(metadata) || '|' ||
		quote(result) || '|' || quote(error) || '|' || quote(created_at) || '|' || quote(updated_at) || '|' || quote(started_at)
		FROM tasks WHERE owner = '`+s.owner.ID+`'`), want)
}

func sqliteFinal(t *testing.T, s *SQLiteStore, state State) {
	op := sqliteOp("a", StateRunning)
	if err := s.Save(op); err != nil {
		t.Fatal(err)
	}
	op.State = state
	if err := s.Update(op); err != nil {
		t.Fatal(err)
	}
	late := sqliteOp("a", StateRunning)
	late.Error = "late"
	for _, late.State = range []State{StatePending, StateRunning, StateDone, StateFailed, StateCancelled} {
		if err := s.Update(late); !errors.Is(err, ErrNotFound) {
			t.Errorf("Update to %s = %v, want ErrNotFound", late.State, err)
		}
	}
	for op, err := range s.Recover("again") {
		t.Errorf("recovered %v, %v", op, err)
	}
	if got, err := s.Get("a"); err != nil || got.State != state || got.Error != "" {
		t.Errorf("Get = %+v, %v, want it %s", got, err, state)
	}
}

func sqlitePages(t *testing.T, s *SQLiteStore) {
	at := time.Now()
	for _, id := range []string{"c", "a", "e", "b", "d"} { // all at the same time
		op := sqliteOp(id, StatePending)
		op.CreatedAt, op.UpdatedAt = at, at
		if err := s.Save(op); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Update(sqliteOp("a", StateDone)); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		limit, offset int
		want          string
	}{
		{10, 0, "d b e a c"},
		{5, 0, "d b e a c"},
		{2, 0, "d b"},
		{2, 2, "e a"},
		{2, 4, "c"},
		{2, 5, ""},
		{2, 1000, ""},
		{0, 0, ""},
		{math.MaxInt, 3, "a c"},
		{math.MaxInt, math.MaxInt, ""},
	} {
		if got := sqliteIDs(t, s, test.limit, test.offset); got != test.want {
			t.Errorf("List(%d, %d) = %q, want %q", test.limit, test.offset, got, test.want)
		}
	}
	sqliteExecute(t, s.db, "VACUUM")
	if got := sqliteIDs(t, s, 10, 0); got != "d b e a c" {
		t.Errorf("after VACUUM: %q", got)
	}
}

// One bad row fails alone, wherever it is.
func TestSQLiteBatch(t *testing.T) {
	save := func(id string) *Operation { return sqliteOp(id, StatePending) }
	named := func(id, name string) *Operation { op := save(id); op.Name = name; return op }
	with := func(id string, v any) *Operation { op := save(id); op.Metadata = v; return op }
	done := func(id string, result any) *Operation { op := sqliteOp(id, StateDone); op.Result = result; return op }
	trigger := func(kind string) string {
		return fmt.Sprintf(`CREATE TRIGGER t1 BEFORE INSERT ON tasks WHEN NEW.name = 'bad' BEGIN SELECT RAISE(%s); END;
			CREATE TRIGGER t2 BEFORE UPDATE ON tasks WHEN NEW.result LIKE '%%bad%%' BEGIN SELECT RAISE(%[1]s); END`, kind)
	}
	for _, test := range []struct {
		name, script   string
		saves, updates []*Operation
		want           string // the outcome of each: + stored, - error, ? ErrNotFound
	}{
		{"nothing", "", nil, nil, ""},
		{"all good", "", []*Operation{save("a"), save("b")}, []*Operation{done("old", 1)}, "+++"},
		{"twice the same", "", []*Operation{save("a"), save("b"), save("a"), save("c")}, []*Operation{done("old", 1)}, "++-++"},
		{"there already", "", []*Operation{save("a"), save("old"), save("b")}, nil, "+-+"},
		{"metadata that is no JSON", "", []*Operation{with("a", 1), with("b", make(chan int)), with("c", "x")}, nil, "+-+"},
		{"result that is no JSON", "", []*Operation{save("a")}, []*Operation{done("old", math.NaN()), done("older", 1)}, "+-+"},
		{"unknown", "", []*Operation{save("a")}, []*Operation{done("nobody", 1), done("old", 1)}, "+?+"},
		{"unknown and bad", "", []*Operation{save("a"), save("old")}, []*Operation{done("nobody", 1), done("old", 1)}, "+-?+"},
		{"saved and finished", "", []*Operation{save("a")}, []*Operation{sqliteOp("a", StateRunning), done("a", 1)}, "+++"},
		{"only bad ones", "", []*Operation{save("old"), save("older")}, nil, "--"},
		{"trigger that aborts", trigger("ABORT, 'no'"), []*Operation{save("a"), named("b", "bad"), save("c")}, []*Operation{done("old", "bad"), done("older", 1)}, "+-+-+"},
		{"trigger that rolls back", trigger("ROLLBACK, 'no'"), []*Operation{save("a"), named("b", "bad"), save("c")}, []*Operation{done("old", "bad"), done("older", 1)}, "+-+-+"},
		{"trigger that fails", trigger("FAIL, 'no'"), []*Operation{save("a"), named("b", "bad"), save("c")}, []*Operation{done("old", "bad"), done("older", 1)}, "+-+-+"},
		{"trigger that ignores", trigger("IGNORE"), []*Operation{save("a"), named("b", "bad"), save("c")}, []*Operation{done("older", 1)}, "+-++"},
		{"a single one rolled back", trigger("ROLLBACK, 'no'"), []*Operation{named("b", "bad")}, nil, "-"},
	} {
		for kind, open := range sqliteKinds {
			t.Run(test.name+"/"+kind, func(t *testing.T) {
				s := open(t)
				for _, id := range []string{"old", "older"} {
					if err := s.Save(save(id)); err != nil {
						t.Fatal(err)
					}
				}
				if test.script != "" {
					sqliteExecute(t, s.db, test.script)
				}
				errs := s.WriteBatch(test.saves, test.updates)
				var got strings.Builder
				for i, op := range slices.Concat(test.saves, test.updates) {
					switch {
					case errs[i] == nil:
						got.WriteByte('+')
					case errors.Is(errs[i], ErrNotFound):
						got.WriteByte('?')
					default:
						got.WriteByte('-')
					}
					stored, err := s.Get(op.ID)
					if errs[i] == nil && (err != nil || i >= len(test.saves) && op.State.Finished() && stored.State != op.State) {
						t.Errorf("%s: no error, but in the database is %+v, %v", op.ID, stored, err)
					}
				}
				if len(errs) != len(test.saves)+len(test.updates) || got.String() != test.want {
					t.Errorf("errors %q, want %s", errs, test.want)
				}
				sqliteIdle(t, s)
			})
		}
	}
}

// sqliteIdle checks that no connection is in a transaction, and that the store
// goes on working.
func sqliteIdle(t *testing.T, s *SQLiteStore) {
	t.Helper()
	var conns []*sql.Conn
	for range s.db.Stats().Idle {
		c, err := s.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		if inTransaction(c) {
			t.Error("a connection was left in a transaction")
		}
	}
	for _, c := range conns {
		c.Close()
	}
	if err := s.Save(sqliteOp("one more", StatePending)); err != nil {
		t.Errorf("Save after that: %v", err)
	}
}

// What fails the whole transaction is everybody's error, and so says each.
func TestSQLiteBatchFailsWhole(t *testing.T) {
	fault := errors.New("the disk is on fire")
	for _, test := range []struct {
		name    string
		prefix  string // of the statements that fail
		times   int    // how many of them
		commits bool   // the transaction has ended with that statement
		ok      bool   // it succeeds when tried again
	}{
		{name: "begin, for a while", prefix: "BEGIN IMMEDIATE", times: 3, ok: true},
		{name: "commit, for a while", prefix: "COMMIT", times: 3, ok: true},
		{name: "commit, and it is over", prefix: "COMMIT", times: 1, commits: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			db, set := sqliteSpied(t, filepath.Join(t.TempDir(), "app.db"))
			db.SetMaxOpenConns(1)
			s := sqliteUse(t, db)
			var n atomic.Int32
			set(func(query string, run func() error) error {
				if !strings.HasPrefix(query, test.prefix) || int(n.Add(1)) > test.times {
					return run()
				}
				if test.commits {
					run()
				}
				return fault
			})
			errs := s.WriteBatch([]*Operation{sqliteOp("a", StatePending), sqliteOp("b", StatePending)}, []*Operation{sqliteOp("a", StateDone)})
			for i, err := range errs {
				if test.ok != (err == nil) || !test.ok && !errors.Is(err, fault) {
					t.Errorf("member %d: error %v", i, err)
				}
			}
			if len(errs) != 3 {
				t.Errorf("%d errors, want 3", len(errs))
			}
			set(func(_ string, run func() error) error { return run() })
			want := ""
			if test.ok || test.commits {
				want = "b a"
			}
			if got := sqliteIDs(t, s, 10, 0); got != want {
				t.Errorf("stored is %q, want %q", got, want)
			}
			sqliteIdle(t, s)
		})
	}
}

// A connection that can't be brought out of its transaction is given up.
func TestSQLiteRollbackFails(t *testing.T) {
	db, set := sqliteSpied(t, filepath.Join(t.TempDir(), "app.db"))
	db.SetMaxOpenConns(1)
	s := sqliteUse(t, db)
	if err := s.Save(sqliteOp("a", StatePending)); err != nil {
		t.Fatal(err)
	}
	var broken atomic.Bool
	broken.Store(true)
	set(func(query string, run func() error) error {
		if query == "ROLLBACK" && broken.Load() {
			return errors.New("no rollback")
		}
		return run()
	})
	if err := s.Save(sqliteOp("a", StatePending)); err == nil {
		t.Error("saved twice")
	}
	broken.Store(false)
	sqliteIdle(t, s)
}

// However long the history, recovery looks at what the index has.
func TestSQLitePlan(t *testing.T) {
	for _, analyze := range []string{"", "ANALYZE"} {
		t.Run("after "+analyze, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "app.db")
			sqliteOpen(t, path).Close()
			sqliteMake(t, path, fmt.Sprintf(`
				WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
				INSERT INTO tasks (id, name, state, owner) SELECT i, 'x', CASE WHEN i %% 100 = 0 THEN 'RUNNING' ELSE 'DONE' END, '%s' FROM n;
				%s`, uuid.NewString(), analyze))
			db, set := sqliteSpied(t, path)
			s := sqliteUse(t, db)
			var mu sync.Mutex
			var queries []string
			set(func(query string, run func() error) error {
				mu.Lock()
				defer mu.Unlock()
				if strings.Contains(query, "PENDING") {
					queries = append(queries, query)
				}
				return run()
			})
			n := 0
			for _, err := range s.Recover("gone") {
				if err != nil {
					t.Fatal(err)
				}
				n++
			}
			if n != 10 || len(queries) < 2 {
				t.Errorf("recovered %d operations with %d queries, want 10 with at least 2", n, len(queries))
			}
			for _, query := range queries {
				plan := sqlitePlan(t, db, query)
				if !strings.Contains(plan, "INDEX tasks_state_not_done (state=?)") || strings.Contains(plan, "SCAN tasks") {
					t.Errorf("plan %q of %s", plan, query)
				}
			}
		})
	}
}

func sqlitePlan(t *testing.T, db *sql.DB, query string) string {
	t.Helper()
	args := make([]any, strings.Count(regexp.MustCompile(`'[^']*'`).ReplaceAllString(query, ""), "?"))
	rows, err := db.Query("EXPLAIN QUERY PLAN "+query, args...)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var plan []string
	for rows.Next() {
		var id, parent, unused int
		var detail string
		if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
			t.Fatal(err)
		}
		plan = append(plan, detail)
	}
	return strings.Join(plan, "; ")
}

// More orphans than fit into one transaction, of several owners.
func TestSQLiteRecoverMany(t *testing.T) {
	for name, open := range sqliteKinds {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			if err := s.Save(sqliteOp("mine", StateRunning)); err != nil {
				t.Fatal(err)
			}
			sqliteExecute(t, s.db, fmt.Sprintf(`
				WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
				INSERT INTO tasks (id, name, state, owner)
				SELECT i, 'x', CASE i %% 2 WHEN 0 THEN 'RUNNING' ELSE 'PENDING' END,
					CASE i %% 4 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN '../../etc/passwd' ELSE '%s' END FROM n`,
				5*recoverChunk, uuid.NewString()))
			for range s.Recover("gone") {
				break // a caller may stop
			}
			seen := make(map[string]bool)
			for op, err := range s.Recover("gone") {
				if err != nil {
					t.Fatal(err)
				}
				if seen[op.ID] || op.State != StateFailed || op.Error != "gone" || op.ID == "mine" {
					t.Fatalf("recovered %+v", op)
				}
				seen[op.ID] = true
			}
			if want := 4 * recoverChunk; len(seen) != want {
				t.Errorf("recovered %d, want %d after those of the first transaction", len(seen), want)
			}
			left := sqliteTexts(t, s.db, "SELECT id FROM tasks WHERE state <> 'FAILED'")
			sqliteSame(t, "left", left, []string{"mine"})
			if got := sqliteTexts(t, s.db, "SELECT count(*) FROM tasks WHERE error = 'gone' AND owner IS NOT 'x'"); got[0] != fmt.Sprint(5*recoverChunk) {
				t.Errorf("%s are FAILED, want %d", got[0], 5*recoverChunk)
			}
		})
	}
}

// The file of a database that is deleted under an open store is missed, and
// nothing takes its place.
func TestSQLiteDeleted(t *testing.T) {
	for _, test := range []struct {
		name   string
		remove func(path string) error
	}{
		{"file", os.Remove},
		{"file and WAL", func(path string) error {
			return errors.Join(os.Remove(path), os.Remove(path+"-wal"), os.Remove(path+"-shm"))
		}},
		{"directory", func(path string) error { return os.RemoveAll(filepath.Dir(path)) }},
		{"replaced", func(path string) error { return errors.Join(os.Rename(path, path+"2"), os.WriteFile(path, nil, 0o600)) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			if runtime.GOOS == "windows" {
				t.Skip("this system keeps open files")
			}
			dir := filepath.Join(t.TempDir(), "d")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "x.db")
			s := sqliteOpen(t, path)
			op := sqliteOp("a", StatePending)
			if err := s.Save(op); err != nil {
				t.Fatal(err)
			}
			if err := test.remove(path); err != nil {
				t.Fatal(err)
			}
			_, list := s.List(10, 0)
			_, get := s.Get("a")
			for what, err := range map[string]error{"Save": s.Save(sqliteOp("b", StatePending)), "Update": s.Update(op), "List": list, "Get": get} {
				if err == nil {
					t.Errorf("%s succeeded without a database", what)
				}
			}
			s.Close()
			if info, err := os.Lstat(path); err == nil && info.Size() > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a new file: %v, %v", info, err)
			}
		})
	}
}

// Many processes open a new file at once.
func TestSQLiteOpenedAtOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.db")
	var all sync.WaitGroup
	stores := make([]*SQLiteStore, 16)
	for i := range stores {
		all.Go(func() {
			var err error
			if stores[i], err = OpenSQLite(path); err != nil {
				t.Error(err)
			} else if err := stores[i].Save(sqliteOp(fmt.Sprint(i), StatePending)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	if ops, err := stores[0].List(100, 0); err != nil || len(ops) != len(stores) {
		t.Errorf("List returns %d operations, %v, want %d", len(ops), err, len(stores))
	}
	for _, s := range stores {
		all.Go(func() {
			for op, err := range s.Recover("gone") {
				t.Errorf("recovered %v, %v though all live", op, err)
			}
		})
	}
	all.Wait()
	for _, s := range stores {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	sqliteSame(t, "files", sqliteNames(t, dir), []string{"x.db"})
}

// Without cgo the package builds, and says what is missing. Where the tests
// have cgo, they run themselves once more without.
func TestSQLiteWithoutCgo(t *testing.T) {
	s, err := OpenSQLite(filepath.Join(t.TempDir(), "x.db"))
	if err != nil {
		if !strings.Contains(err.Error(), "CGO_ENABLED=1") || !strings.Contains(err.Error(), "NewSQLiteStore") {
			t.Errorf("error %q doesn't say what to do", err)
		}
		return
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	cmd := osexec.Command("go", "test", "-run=^TestSQLiteWithoutCgo$", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// One bad operation costs a few transactions, however many are beside it.
func TestSQLiteBatchBadMembers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "app.db")
	db, set := sqliteSpied(t, path)
	s := sqliteUse(t, db)
	sqliteExecute(t, db, `CREATE TRIGGER bad BEFORE INSERT ON tasks WHEN new.name = 'bad' BEGIN SELECT RAISE(ABORT, 'bad row'); END`)
	var mu sync.Mutex
	begins := 0
	set(func(query string, run func() error) error {
		mu.Lock()
		defer mu.Unlock()
		if strings.HasPrefix(query, "BEGIN IMMEDIATE") {
			begins++
		}
		return run()
	})
	const n = 1000
	ops := make([]*Operation, n)
	for i := range ops {
		ops[i] = sqliteOp(fmt.Sprint(i), StatePending)
		if i == 0 || i == 500 || i == n-1 {
			ops[i].Name = "bad"
		}
	}
	for i, err := range s.WriteBatch(ops, nil) {
		if bad := ops[i].Name == "bad"; (err != nil) != bad || bad && !strings.Contains(err.Error(), "bad row") {
			t.Errorf("operation %d: %v", i, err)
		}
	}
	if got, err := s.List(2*n, 0); err != nil || len(got) != n-3 {
		t.Errorf("%d are stored, %v", len(got), err)
	}
	if begins > 10 {
		t.Errorf("%d transactions", begins)
	}
}

// A task's clock goes on from CreatedAt, whatever is done to the system's.
func TestTaskClock(t *testing.T) {
	for _, ahead := range []time.Duration{-time.Hour, 0, time.Hour} {
		began := time.Now()
		task := &task{began: began, first: Operation{CreatedAt: began.Add(ahead).UTC()}}
		if d := task.now().Sub(task.first.CreatedAt); d < -time.Microsecond || d > time.Minute {
			t.Errorf("the clock was set by %v since: %v have passed", -ahead, d)
		}
	}
}

// By state, the index answers, in its own order, whatever else is asked; by
// Before, the rowid does.
func TestSQLitePlanFiltered(t *testing.T) {
	for _, analyze := range []string{"", "ANALYZE"} {
		path := filepath.Join(t.TempDir(), "app.db")
		sqliteOpen(t, path).Close()
		sqliteMake(t, path, `
			WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
			INSERT INTO tasks (id, name, state) SELECT i, 'x', CASE WHEN i % 10 = 0 THEN 'FAILED' ELSE 'DONE' END FROM n;
			`+analyze)
		db, set := sqliteSpied(t, path)
		s := sqliteUse(t, db)
		for _, test := range []struct {
			f           Filter
			want, avoid string
		}{
			{Filter{States: []State{StateFailed}}, "INDEX tasks_state_not_done (state=?", "SCAN tasks"},
			{Filter{States: []State{StateFailed, StateCancelled}, Before: "500"}, "INDEX tasks_state_not_done (state=? AND rowid<?)", "SCAN tasks"},
			{Filter{States: []State{StateFailed}, Name: "x"}, "INDEX tasks_state_not_done (state=?", "SCAN tasks"},
			{Filter{Before: "500"}, "INTEGER PRIMARY KEY (rowid<?)", "TEMP B-TREE"},
		} {
			var got string
			set(func(query string, run func() error) error {
				if strings.HasPrefix(query, "SELECT") && strings.Contains(query, "OFFSET") {
					got = query
				}
				return run()
			})
			ops, err := s.ListFiltered(test.f, 5, 0)
			set(func(_ string, run func() error) error { return run() })
			if err != nil || len(ops) != 5 {
				t.Errorf("%+v: %d operations, %v", test.f, len(ops), err)
			}
			if plan := sqlitePlan(t, db, got); !strings.Contains(plan, test.want) || strings.Contains(plan, test.avoid) {
				t.Errorf("%+v: plan %q of %s", test.f, plan, got)
			}
		}
	}
}

// What Prune can't read, or can't name, it leaves alone, and it ends.
func TestSQLitePruneLeaves(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	s := sqliteOpen(t, path)
	var script strings.Builder
	old := 0
	for i, cell := range sqliteTimes {
		fmt.Fprintf(&script, "INSERT INTO tasks (id, name, state, updated_at) VALUES ('t%d', %d, 'DONE', %s);\n", i, i, cell[0])
		if cell[1] != "" {
			old++
		}
	}
	for i, state := range []string{"'PENDING'", "'RUNNING'", "'PAUSED'", "''", "CAST('DONE' AS BLOB)"} {
		fmt.Fprintf(&script, "INSERT INTO tasks (id, name, state, updated_at) VALUES ('s%d', 'state', %s, '2024-01-01');\n", i, state)
	}
	for i := range 3 * pruneChunk { // keys that are no text
		fmt.Fprintf(&script, "INSERT INTO tasks (id, name, state, updated_at) VALUES (CAST('b%d' AS BLOB), 'blob', 'DONE', '2024-01-01');\n", i)
	}
	script.WriteString("INSERT INTO tasks (id, name, state, updated_at) VALUES (NULL, 'null', 'DONE', '2024-01-01'), ('', 'empty', 'DONE', '2024-01-01');\n")
	for i := range 3 * pruneChunk {
		fmt.Fprintf(&script, "INSERT INTO tasks (id, name, state, updated_at) VALUES ('o%d', 'old', 'FAILED', '2024-01-01');\n", i)
		fmt.Fprintf(&script, "INSERT INTO tasks (rowid, id, name, state, updated_at) VALUES (-%d, 'n%d', 'negative', 'CANCELLED', '2024-01-01');\n", i+1, i)
	}
	sqliteMake(t, path, script.String())
	script.Reset()
	script.WriteString("CREATE TRIGGER keep BEFORE DELETE ON tasks WHEN old.name = 'keep' BEGIN SELECT RAISE(IGNORE); END;\n")
	for i := range 3 * pruneChunk {
		fmt.Fprintf(&script, "INSERT INTO tasks (id, name, state, updated_at) VALUES ('k%d', 'keep', 'DONE', '2024-01-01');\n", i)
	}
	sqliteMake(t, path, script.String())
	n := 0
	for some, err := range s.Prune(time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)) {
		if n += some; err != nil || some > pruneChunk {
			t.Fatal(some, err)
		}
	}
	if want := old + 6*pruneChunk + 1; n != want {
		t.Errorf("deleted %d rows, want %d", n, want)
	}
	ops, err := s.List(10_000, 0)
	if want := len(sqliteTimes) - old + 5 + 6*pruneChunk + 1; err != nil || len(ops) != want {
		t.Errorf("%d rows are left, %v, want %d", len(ops), err, want)
	}
}
