package task

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/mynt-nas/task/internal/hookdriver"
	"github.com/mynt-nas/task/internal/testos"
)

// The tests for any driver are in internal/sqlitetest. Those that do not concern
// operations are in internal/sqlitefile.

// sqliteSoon limits calls that wait for nothing.
const sqliteSoon = 5 * time.Second

func sqliteOpen(t testing.TB, path string) *SQLiteStore {
	t.Helper()
	s, err := OpenSQLite(path)
	return sqliteOpened(t, s, err)
}

func sqliteUse(t testing.TB, db *sql.DB) *SQLiteStore {
	t.Helper()
	s, err := NewSQLiteStore(db)
	return sqliteOpened(t, s, err)
}

func sqliteOpened(t testing.TB, s *SQLiteStore, err error) *SQLiteStore {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// SetTimeout sets how long calls of a store wait, for external tests.
func SetTimeout(s *SQLiteStore, d time.Duration) { s.db.Timeout = d }

// sqliteKinds are the three kinds of stores.
var sqliteKinds = map[string]func(t testing.TB) *SQLiteStore{
	"own": func(t testing.TB) *SQLiteStore { return sqliteOpen(t, filepath.Join(t.TempDir(), "own.db")) },
	"application's": func(t testing.TB) *SQLiteStore {
		return sqliteUse(t, sqliteDB(t, filepath.Join(t.TempDir(), "app.db")))
	},
	"memory": func(t testing.TB) *SQLiteStore { return sqliteOpen(t, ":memory:") },
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

// sqliteMake creates a database file and closes it.
func sqliteMake(t testing.TB, path, script string) string {
	t.Helper()
	db := sqliteDB(t, path)
	sqliteExecute(t, db, script)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func sqliteTexts(t testing.TB, q interface {
	QueryContext(context.Context, string, ...any) (*sql.Rows, error)
}, query string) (all []string) {
	t.Helper()
	rows, err := q.QueryContext(context.Background(), query)
	if err != nil {
		t.Fatalf("%v: %s", err, query)
	}
	defer rows.Close()
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			t.Fatal(err)
		}
		all = append(all, text)
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

// sqliteTree returns all files below a directory with their modes and bytes. No
// database in it may be open: opening its file drops SQLite's locks.
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

// sqliteSpecSchema is the schema of SPEC.md.
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
		want := append(sqliteTexts(t, spec, columns), "9 started_at DATETIME 0 none 0", "10 owner TEXT 0 none 0",
			"11 message TEXT 0 none 0", "12 cancel_cause TEXT 0 none 0", "13 cancel_requested_at DATETIME 0 none 0")
		sqliteSame(t, "columns", sqliteTexts(t, s.db, columns), want)
		sqliteSame(t, "indexes", sqliteTexts(t, s.db, "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY sql"),
			[]string{"CREATE INDEX tasks_cancelling ON tasks (ifnull(CAST(owner AS TEXT), '')) WHERE (state = 'PENDING' OR state = 'RUNNING') AND cancel_requested_at IS NOT NULL",
				"CREATE INDEX tasks_finished ON tasks (ifnull(updated_at, '')) WHERE (state = 'DONE' OR state = 'FAILED' OR state = 'CANCELLED')",
				"CREATE INDEX tasks_state_not_done ON tasks (state) WHERE state <> 'DONE'",
				"CREATE INDEX tasks_unfinished ON tasks (ifnull(CAST(owner AS TEXT), '')) WHERE (state = 'PENDING' OR state = 'RUNNING')"})
		sqliteSame(t, "other tables", sqliteTexts(t, s.db, "SELECT name FROM sqlite_master WHERE tbl_name <> 'tasks'"), nil)
	})
	t.Run("every connection", func(t *testing.T) {
		check := func(name string, c *sql.Conn) {
			for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal", "busy_timeout": "1000", "journal_size_limit": "67108864"} {
				if got := sqliteTexts(t, c, "PRAGMA "+pragma); got[0] != want {
					t.Errorf("%s: %s = %s, want %s", name, pragma, got[0], want)
				}
			}
		}
		var readers func(n int) error
		readers = func(n int) error {
			return s.db.Read(t.Context(), func(c *sql.Conn) error {
				if check(fmt.Sprint("reader ", n), c); n > 1 {
					return readers(n - 1)
				}
				return s.db.Write(s.db.Deadline(), func(c *sql.Conn) error { check("writer", c); return nil })
			})
		}
		if err := readers(4); err != nil {
			t.Error(err)
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
				db := sqliteDB(t, "file:"+(&url.URL{Path: filepath.ToSlash(path)}).EscapedPath())
				app := sqliteUse(t, db)
				if s.owner.Path() != "" && !slices.Equal(app.owner.Others(), []string{s.owner.ID}) {
					t.Errorf("%s: the other store sees the owners %q", where, app.owner.Others())
				}
				if err := errors.Join(app.Close(), db.Close(), s.Close()); err != nil {
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

// All openers of a path use the same files.
func TestSQLiteLinks(t *testing.T) {
	for _, test := range []struct {
		name, other string // another path of real/x.db
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

// A sqliteCell is a cell as other code may have stored it.
type sqliteCell struct {
	literal string // SQL
	want    string // what the manager shows; see sqliteShown
}

var (
	sqliteJSONs = []sqliteCell{
		{`'{"pool":"tank","n":12345678901234567890}'`, `{"n":12345678901234567890,"pool":"tank"}`},
		{`' [1, 2.50] '`, `[1,2.50]`}, {`'true'`, `true`}, {`42`, `42`}, {`'1e999'`, `1e999`},
		{`'"\ud800"'`, "\"\uFFFD\""}, {`CAST(x'22ff22' AS TEXT)`, "\"\uFFFD\""}, {`x'7b7d'`, `{}`},
		{`'null'`, `null`}, {`' null '`, `null`}, {`NULL`, `null`}, {`''`, `null`}, {`'no json'`, `null`},
		{`'{"a":1'`, `null`}, {`'{"a":1} trailing'`, `null`}, {`'{"a":1}{"b":2}'`, `null`}, {`'NaN'`, `null`},
		{`CAST(x'2200' || x'22' AS TEXT)`, `null`}, {`x'00ff'`, `null`}, {`CAST(zeroblob(70000) AS TEXT)`, `null`},
		{`replace(hex(zeroblob(5500)), '0', '[') || replace(hex(zeroblob(5500)), '0', ']')`, `null`}, // nested too deeply for Go
	}
	sqliteTimes = []sqliteCell{
		{`'2024-05-06 07:08:09.123456'`, "2024-05-06T07:08:09.123456Z"},
		{`'2024-05-06 07:08:09'`, "2024-05-06T07:08:09Z"},
		{`'2024-05-06T07:08:09Z'`, "2024-05-06T07:08:09Z"},
		{`'2024-05-06T07:08:09.123456789+02:00'`, "2024-05-06T05:08:09.123456789Z"},
		{`'2024-05-06 07:08:09.123456789+02:00'`, "2024-05-06T05:08:09.123456789Z"},
		{`'2024-05-06 07:08:09-07:00'`, "2024-05-06T14:08:09Z"},
		{`'2024-05-06 07:08:09.123456789 +0200 CEST m=+0.000123'`, "2024-05-06T05:08:09.123456789Z"},
		{`'2024-05-06 07:08:09.1 -0330 NST m=-12.5'`, "2024-05-06T10:38:09.1Z"},
		{`'2024-05-06 07:08:09 +0000 UTC'`, "2024-05-06T07:08:09Z"},
		{`'2024-05-06 07:08:09.25 +0545 +0545'`, "2024-05-06T01:23:09.25Z"},
		// Anything else is not a time.
		{`'2024-05-06T07:08:09'`, ""}, {`'2024-05-06 07:08'`, ""}, {`'2024-05-06'`, ""}, {`1714979289`, ""}, {`0`, ""}, {`1.5`, ""},
		{`NULL`, ""}, {`''`, ""}, {`'yesterday'`, ""}, {`'a b c d e f'`, ""}, {`'2024-13-45 99:99:99'`, ""},
		{`'2024-05-06 07:08:09 +9999 CEST m=+1'`, ""}, {`x'00ff'`, ""}, {`CAST(x'ff00' AS TEXT)`, ""},
		{`'0000-01-01T00:00:00+23:00'`, ""}, {`'9999-12-31T23:59:59-23:00'`, ""}, // JSON can't represent these
	}
	sqliteCells = map[string][]sqliteCell{
		"id": {{"'plain'", "plain"}, {"''", ""}, {"42", "42"}, {"'../../etc/passwd'", "../../etc/passwd"}, {"'it''s \"%?#'", `it's "%?#`},
			{"CAST(x'6100' || x'62' AS TEXT)", "a\x00b"}, {"CAST(x'61ff62' AS TEXT)", "a\xffb"}},
		"name": {{"'plain'", "plain"}, {"''", ""}, {"7", "7"}, {"CAST(x'61ff62' AS TEXT)", "a\uFFFDb"},
			{"CAST(x'610062' AS TEXT)", "a\x00b"}, {"x'61ff62'", "a\uFFFDb"}},
		"progress": {{"42", "42"}, {"'42'", "42"}, {"'42%'", "42"}, {"33.7", "33"}, {"1e300", "100"}, {"-1e300", "0"}, {"101", "100"},
			{"-5", "0"}, {"9223372036854775807", "100"}, {"-9223372036854775808", "0"}, {"'half'", "0"}, {"''", "0"}, {"x''", "0"}, {"NULL", "0"}},
		"error": {{"'disk full'", "disk full"}, {"''", ""}, {"NULL", ""}, {"CAST(x'ff' AS TEXT)", "\uFFFD"}, {"x'6f6f7073'", "oops"}},
		"state": {{"'DONE'", "DONE"}, {"'FAILED'", "FAILED"}, {"'CANCELLED'", "CANCELLED"}, {"'PENDING'", "PENDING"}, {"'RUNNING'", "RUNNING"},
			{"'paused'", "paused"}, {"'running'", "running"}, {"' RUNNING'", " RUNNING"}, {"''", ""}, {"5", "5"}, {"CAST(x'ff' AS TEXT)", "\xff"}},
		"metadata": sqliteJSONs, "result": sqliteJSONs, "created_at": sqliteTimes, "updated_at": sqliteTimes,
	}
)

// sqliteShown returns what an operation shows for a column.
func sqliteShown(op *Operation, column string) string {
	text := func(v any) string { raw, _ := json.Marshal(v); return string(raw) }
	moment := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.Format(time.RFC3339Nano)
	}
	return map[string]string{
		"id": op.ID, "name": op.Name, "state": string(op.State), "progress": fmt.Sprint(op.Progress), "error": op.Error,
		"metadata": text(op.Metadata), "result": text(op.Result), "created_at": moment(op.CreatedAt), "updated_at": moment(op.UpdatedAt),
	}[column]
}

// OpenSQLite takes over a table that was created with the schema of SPEC.md and filled
// by other code, with all its rows, finished or interrupted. Recovery changes only the
// cells that it must change.
func TestSQLiteTakeover(t *testing.T) {
	for _, state := range []string{"DONE", "RUNNING"} {
		for column, cells := range sqliteCells {
			for kind, open := range map[string]func(path string) *SQLiteStore{
				"own":           func(path string) *SQLiteStore { return sqliteOpen(t, path) },
				"application's": func(path string) *SQLiteStore { return sqliteUse(t, sqliteDB(t, path)) },
			} {
				t.Run(state+"/"+column+"/"+kind, func(t *testing.T) { sqliteTakeover(t, state, column, cells, open) })
			}
		}
	}
}

func sqliteTakeover(t *testing.T, state, column string, cells []sqliteCell, open func(path string) *SQLiteStore) {
	script := sqliteSpecSchema(t) + "BEGIN;"
	for i, c := range cells {
		script += fmt.Sprintf("INSERT INTO tasks (id, name, state) VALUES ('row-%d', 'other code', '%s'); UPDATE tasks SET %s = %s WHERE rowid = %d;",
			i, state, column, c.literal, i+1)
	}
	path := sqliteMake(t, filepath.Join(t.TempDir(), "taken.db"), script+"COMMIT")
	before := sqliteRows(t, path)
	s := open(path)
	m := sqliteManager(t, s)
	ops, err := m.List(len(cells)+10, 0)
	if err != nil || len(ops) != len(cells) {
		t.Fatalf("List returns %d operations, %v, want %d", len(ops), err, len(cells))
	}
	slices.Reverse(ops)
	for i, c := range cells {
		was, want := state, c.want
		if column == "state" {
			was = c.want
		}
		orphan := was == "RUNNING" || was == "PENDING"
		if orphan {
			want = map[string]string{"state": "FAILED", "error": errTextRestart, "updated_at": sqliteShown(ops[i], column)}[column]
			if want == "" {
				want = c.want
			}
			if ops[i].State != StateFailed || ops[i].Error != errTextRestart || time.Since(ops[i].UpdatedAt).Abs() > time.Hour {
				t.Errorf("%s: %+v, want it recovered now", c.literal, ops[i])
			}
			before[i] = sqliteRecovered.ReplaceAllString(before[i], "")
		}
		if got := sqliteShown(ops[i], column); got != want {
			t.Errorf("%.60s: List shows %.80q, want %.80q", c.literal, got, want)
		}
		if _, err := json.Marshal(ops[i]); err != nil {
			t.Error(err)
		}
		if got, ok := m.Get(ops[i].ID); !ok || sqliteShown(got, column) != want || got.State != ops[i].State {
			t.Errorf("%.60s: Get shows %+v, want %.80q", c.literal, got, want)
		}
	}
	if err := errors.Join(m.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	after := sqliteRows(t, path)
	for i := range before {
		if !strings.Contains(before[i], " state=") { // not recovered
			after[i] = sqliteRecovered.ReplaceAllString(after[i], "")
		}
	}
	sqliteSame(t, "cells", after, before)
}

// sqliteRecovered lists the columns that recovery changes.
var sqliteRecovered = regexp.MustCompile(` (state|error|updated_at)=\S*`)

// sqliteRows returns the columns of SPEC.md in all rows, as types and bytes.
func sqliteRows(t *testing.T, path string) []string {
	t.Helper()
	db := sqliteDB(t, path)
	defer db.Close()
	var cells []string
	for _, c := range schema.Required {
		cells = append(cells, fmt.Sprintf(`' %s=' || typeof(%[1]s) || ':' || hex(%[1]s)`, c))
	}
	return sqliteTexts(t, db, "SELECT "+strings.Join(cells, " || ")+" FROM tasks ORDER BY rowid")
}

// TestSQLiteHolder is not a test. It is the helper process of other tests: it locks a
// database until its standard input ends.
func TestSQLiteHolder(t *testing.T) {
	path := os.Getenv("SQLITE_HOLDER_PATH")
	if path == "" {
		return
	}
	c, err := sqliteDB(t, path).Conn(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sqliteExecute(t, c, "BEGIN IMMEDIATE; CREATE TABLE other (x)")
	fmt.Println("holding")
	io.Copy(io.Discard, os.Stdin)
	sqliteExecute(t, c, "COMMIT")
}

// sqliteHold locks a database from another process.
func sqliteHold(t testing.TB, path string) (release func()) {
	t.Helper()
	cmd := osexec.Command(os.Args[0], "-test.run=^TestSQLiteHolder$", "-test.count=1")
	cmd.Env = append(os.Environ(), "SQLITE_HOLDER_PATH="+path)
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
	return func() {
		t.Helper()
		in.Close()
		io.Copy(io.Discard, lines)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

// While another process locks the database, writes wait and reads don't. If it stays
// locked for too long, the whole batch fails and nothing is stored. Both hold for a
// database that OpenSQLite has opened, too.
func TestSQLiteLocked(t *testing.T) {
	for kind, open := range map[string]func(t *testing.T, path string) *SQLiteStore{
		"own": func(t *testing.T, path string) *SQLiteStore { return sqliteOpen(t, path) },
		"application's": func(t *testing.T, path string) *SQLiteStore {
			return sqliteUse(t, sqliteDB(t, path+"?_journal_mode=WAL&_busy_timeout=0"))
		},
	} {
		t.Run(kind, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.db")
			s := open(t, path)
			if err := s.Save(sqliteOp("early", StatePending)); err != nil {
				t.Fatal(err)
			}
			release := sqliteHold(t, path)
			s.db.Timeout = 20 * time.Millisecond
			errs := s.WriteBatch([]*Operation{sqliteOp("a", StatePending), sqliteOp("a", StatePending)}, []*Operation{sqliteOp("early", StateDone)})
			if len(errs) != 3 || errs[0] == nil || errs[0] != errs[1] || errs[0] != errs[2] || !strings.Contains(errs[0].Error(), "locked") {
				t.Errorf("errors %v, want everybody's the same", errs)
			}
			s.db.Timeout = 30 * time.Second
			if got := sqliteIDs(t, s, 10, 0); got != "early" {
				t.Errorf("stored is %q", got)
			}
			done := make(chan error, 1)
			go func() { done <- s.Save(sqliteOp("late", StatePending)) }()
			select {
			case err := <-done:
				t.Errorf("Save returned %v while the database was locked", err)
			case <-time.After(50 * time.Millisecond):
			}
			release()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// sqliteAdvice matches the part of an error that tells the user what to do.
var sqliteAdvice = regexp.MustCompile(`\b(use|choose|rename|create|make|remove|must be)\b`)

// sqliteRefused checks that opening a store fails soon, with a helpful error, and
// leaves the directory unchanged.
func sqliteRefused(t *testing.T, tree func() []string, want string, open func() (*SQLiteStore, error)) {
	t.Helper()
	before := tree()
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
	sqliteSame(t, "files", tree(), before)
}

func TestSQLiteRefusesTable(t *testing.T) {
	noRowid := strings.Replace(sqliteSpecSchema(t), "\n);", "\n) WITHOUT ROWID;", 1)
	for _, test := range []struct{ name, script, want string }{
		{"view", "CREATE TABLE x (id); CREATE VIEW tasks AS SELECT * FROM x", "a view called tasks"},
		{"WITHOUT ROWID", noRowid, "without a rowid"},
		{"other columns", "CREATE TABLE tasks (id TEXT PRIMARY KEY, title TEXT, done BOOL); INSERT INTO tasks VALUES ('a', 'milk', 0)",
			"no column name, state, progress, metadata, result, error, created_at, updated_at"},
	} {
		for _, journal := range []string{"DELETE", "WAL"} {
			for kind, open := range map[string]func(path string) (*SQLiteStore, error){
				"own": OpenSQLite,
				"application's": func(path string) (*SQLiteStore, error) {
					db := sqliteDB(t, path)
					defer db.Close()
					return NewSQLiteStore(db)
				},
			} {
				t.Run(test.name+"/"+journal+"/"+kind, func(t *testing.T) {
					dir := t.TempDir()
					path := sqliteMake(t, filepath.Join(dir, "app.db"), "CREATE TABLE users (id);"+test.script+"; PRAGMA journal_mode = "+journal)
					sqliteRefused(t, func() []string { return sqliteTree(t, dir) }, test.want,
						func() (*SQLiteStore, error) { return open(path) })
				})
			}
		}
	}
}

func TestSQLiteRefusesFile(t *testing.T) {
	sound, err := os.ReadFile(sqliteMake(t, filepath.Join(t.TempDir(), "sound.db"), sqliteSpecSchema(t)))
	if err != nil {
		t.Fatal(err)
	}
	var noise strings.Builder
	for i := range 8192 {
		noise.WriteByte(byte(i*i>>3 ^ i*151))
	}
	write := func(data string) func(path string) error {
		return func(path string) error { return os.WriteFile(path, []byte(data), 0o600) }
	}
	for _, test := range []struct {
		name, file string
		make       func(path string) error
		want       string
	}{
		{"text", "x.db", write(strings.Repeat("a shopping list\n", 100)), "not a database"},
		{"short text", "x.db", write("milk"), "not a database"},
		{"random bytes", "x.db", write(noise.String()), "not a database"},
		{"header only", "x.db", write(string(sound[:100])), "database"},
		{"truncated", "x.db", write(string(sound[:len(sound)/2])), "database"},
		{"header, then noise", "x.db", write(string(sound[:100]) + noise.String()), "database"},
		{"directory", "d", func(path string) error { return os.Mkdir(path, 0o700) }, "not a regular file"},
		{"named pipe", "pipe", testos.Mkfifo, "not a regular file"},
		{"no directory", "none/x.db", nil, "no directory"},
		{"dangling symbolic link", "link", func(path string) error { return os.Symlink(path+"gone", path) }, "link"},
		{"read-only file", "x.db", func(path string) error {
			return errors.Join(os.WriteFile(path, sound, 0o600), os.Chmod(path, 0o444))
		}, "read-only"},
		{"name too long", strings.Repeat("x", 250), nil, "too long"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, test.file)
			if test.make != nil {
				if err := test.make(path); errors.Is(err, errors.ErrUnsupported) {
					t.Skip("not on this system")
				} else if err != nil {
					t.Fatal(err)
				}
			}
			sqliteRefused(t, func() []string { return sqliteTree(t, dir) }, test.want, func() (*SQLiteStore, error) { return OpenSQLite(path) })
		})
	}
}

// OpenSQLite refuses what file modes forbid to users other than root.
func TestSQLiteRefusesByMode(t *testing.T) {
	complete := strings.Join(schema.Create, ";")
	for _, test := range []struct {
		name, journal   string
		dirMode, dbMode os.FileMode // dbMode 0: no file
		want            string
	}{
		{"read-only file", "DELETE", 0o777, 0o444, "read-only"},
		{"somebody else's file", "DELETE", 0o777, 0o644, "read"},
		{"somebody else's file in WAL mode", "WAL", 0o777, 0o644, "read"},
		{"somebody else's file with all it needs", "DELETE; " + complete, 0o777, 0o644, "read"},
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
				sqliteMake(t, path, "CREATE TABLE users (id); PRAGMA journal_mode = "+test.journal)
				mode := test.dbMode
				if os.Geteuid() != 0 && mode == 0o644 { // only root can create files of another user
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
			tree := func() []string { return sqliteModeTree(t, dir, test.journal == "WAL") }
			sqliteRefused(t, tree, test.want, func() (s *SQLiteStore, err error) {
				if !testos.Unprivileged(func() { s, err = OpenSQLite(path) }) {
					t.Skip("can't do without root's rights here")
				}
				return s, err
			})
		})
	}
}

// sqliteModeTree is sqliteTree for a directory that may be closed to the test. A user
// who may only read a database in WAL mode can't remove the files that SQLite then
// creates.
func sqliteModeTree(t testing.TB, dir string, wal bool) []string {
	t.Helper()
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, info.Mode().Perm())
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	switch {
	case wal:
		return nil
	case os.Geteuid() == 0:
		return sqliteTree(t, dir)
	default:
		return sqliteNames(t, dir)
	}
}

// The first operation reports a table that accepts no operations.
func TestSQLiteUnfitTable(t *testing.T) {
	path := sqliteMake(t, filepath.Join(t.TempDir(), "x.db"), strings.Replace(sqliteSpecSchema(t), "\n);", ", tenant TEXT NOT NULL\n);", 1))
	m := sqliteManager(t, sqliteOpen(t, path))
	if _, err := m.Submit("x", func(context.Context, func(int)) (any, error) { return nil, nil }); err == nil || !strings.Contains(err.Error(), "tenant") {
		t.Errorf("Submit: %v", err)
	}
}

// The stored form is the one that README promises to other programs.
func TestSQLiteStoredForm(t *testing.T) {
	for kind, open := range sqliteKinds {
		t.Run(kind, func(t *testing.T) {
			s := open(t)
			op := sqliteOp("a", StatePending)
			op.Owner = s.Owner()
			op.Name, op.Error = "a\x00b 'quoted' \U0001F4BE", "an error\x00too"
			op.Metadata = json.RawMessage(`{"a":[1,null]}`)
			check := func(write func(*Operation) error) {
				t.Helper()
				if err := write(op); err != nil {
					t.Fatal(err)
				}
				if got, err := s.Get("a"); err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", op) {
					t.Errorf("Get = %+v, %v\nwant  %+v", got, err, op)
				}
			}
			check(s.Save)
			op.State, op.Progress, op.Error = StateRunning, 37, ""
			op.StartedAt = op.CreatedAt.Add(time.Millisecond)
			op.UpdatedAt = op.StartedAt.Add(time.Microsecond)
			op.Metadata, op.Result = nil, json.RawMessage(`12345678901234567890`)
			op.Message, op.Cancelling = "a\x00b", true
			check(s.Update)
			want := []string{fmt.Sprintf("a|RUNNING|37|NULL|'12345678901234567890'|NULL|'%s'|'%s'|'%s'|610062|'%s'", formatTime(op.CreatedAt),
				formatTime(op.UpdatedAt), formatTime(op.StartedAt), formatTime(op.UpdatedAt))}
			sqliteSame(t, "stored form", sqliteTexts(t, s.db, `SELECT id || '|' || state || '|' || progress || '|' || quote(metadata) || '|' ||
				quote(result) || '|' || quote(error) || '|' || quote(created_at) || '|' || quote(updated_at) || '|' || quote(started_at) ||
				'|' || hex(message) || '|' || quote(cancel_requested_at) FROM tasks WHERE owner = '`+s.owner.ID+`'`), want)
			sqliteExecute(t, s.db, "DELETE FROM tasks")
			if err := s.Update(op); !errors.Is(err, ErrNotFound) {
				t.Errorf("Update of what is deleted: %v", err)
			}
		})
	}
}

// A batch of any size is stored in order, also after VACUUM.
func TestSQLiteBatchSizes(t *testing.T) {
	for kind, open := range sqliteKinds {
		t.Run(kind, func(t *testing.T) {
			s := open(t)
			total := 0
			for _, n := range []int{0, 1, 2, 15, 16, 17, 63, 64, 65, 150} {
				var saves, updates []*Operation
				for i := range n {
					op := sqliteOp(fmt.Sprintf("%05d", total+i), StatePending)
					op.Owner = s.Owner()
					done := *op
					done.State, done.Progress, done.Result = StateDone, i%100, json.RawMessage(fmt.Sprint(i))
					saves, updates = append(saves, op), append(updates, &done)
				}
				for i, err := range slices.Concat(s.WriteBatch(saves, updates[:n/2]), s.WriteBatch(nil, updates[n/2:])) {
					if err != nil {
						t.Fatalf("%d of %d: %v", i, n, err)
					}
				}
				got, err := s.List(n, 0)
				for i, op := range got {
					if want := updates[n-1-i]; fmt.Sprintf("%+v", op) != fmt.Sprintf("%+v", want) {
						t.Fatalf("%d of %d: %+v, want %+v", i, n, op, want)
					}
				}
				if total += n; err != nil || len(got) != n {
					t.Fatalf("List of %d: %d, %v", n, len(got), err)
				}
			}
			before := sqliteIDs(t, s, total, 0)
			sqliteExecute(t, s.db, "VACUUM")
			if got := sqliteIDs(t, s, total, 0); got != before || len(got) != 6*total-1 {
				t.Errorf("VACUUM has changed the order: %s", got)
			}
		})
	}
}

// Bad operations cost few transactions, however many others are in the batch. A failed
// COMMIT fails all of them.
func TestSQLiteBatchFaults(t *testing.T) {
	db, set := hookdriver.Open(t, filepath.Join(t.TempDir(), "app.db"))
	s := sqliteUse(t, db)
	sqliteExecute(t, db, `CREATE TRIGGER bad BEFORE INSERT ON tasks WHEN new.name = 'bad' BEGIN SELECT RAISE(ABORT, 'bad row'); END`)
	var begins atomic.Int32
	fail := "nothing"
	set(func(query string, run func() error) error {
		if query == "BEGIN IMMEDIATE" {
			begins.Add(1)
		}
		if query == fail {
			return errors.New("the disk is on fire")
		}
		return run()
	})
	const n = 1000
	ops := make([]*Operation, n)
	for i := range ops {
		ops[i] = sqliteOp(fmt.Sprint(i), StatePending)
		if i%100 == 0 || i == n-1 {
			ops[i].Name = "bad"
		}
	}
	for i, err := range s.WriteBatch(ops, nil) {
		if bad := ops[i].Name == "bad"; (err != nil) != bad || bad && !strings.Contains(err.Error(), "bad row") {
			t.Errorf("operation %d: %v", i, err)
		}
	}
	if got, err := s.List(2*n, 0); err != nil || len(got) != n-11 {
		t.Errorf("%d are stored, %v", len(got), err)
	}
	if n := begins.Load(); n > 2 {
		t.Errorf("%d transactions", n)
	}
	for _, fail = range []string{"BEGIN IMMEDIATE", "COMMIT"} {
		errs := s.WriteBatch([]*Operation{sqliteOp("a", StatePending), ops[1]}, []*Operation{sqliteOp("nobody", StateDone), sqliteOp("a", StateDone)})
		for i, err := range errs {
			if err == nil || err.Error() != "the disk is on fire" {
				t.Errorf("%s fails, member %d: %v", fail, i, err)
			}
		}
	}
	fail = "nothing"
	if err := s.Save(sqliteOp("a", StatePending)); err != nil {
		t.Error(err)
	}
}

// If COMMIT finds the disk too full for all rows of a batch, those that fit are stored.
func TestSQLiteBatchFull(t *testing.T) {
	for _, text := range []string{"database or disk is full", "disk I/O error"} {
		for _, room := range []int{0, 1, 3, 100} {
			t.Run(fmt.Sprint(text, ", room for ", room), func(t *testing.T) {
				db, set := hookdriver.Open(t, filepath.Join(t.TempDir(), "app.db"))
				s := sqliteUse(t, db)
				rows, begins := 0, 0 // rows in the transaction; number of transactions
				set(func(query string, run func() error) error {
					switch {
					case query == "BEGIN IMMEDIATE":
						rows, begins = 0, begins+1
					case query == "COMMIT" && rows > room:
						return errors.New(text)
					case strings.HasPrefix(query, "INSERT INTO tasks"):
						rows += strings.Count(query, "(?")
					}
					return run()
				})
				ops := make([]*Operation, 100)
				for i := range ops {
					ops[i] = sqliteOp(fmt.Sprint(i), StatePending)
				}
				stored := len(ops)
				if room == 0 {
					stored = 0
				}
				for i, err := range s.WriteBatch(ops, nil) {
					if (err == nil) != (stored > 0) || err != nil && err.Error() != text {
						t.Errorf("operation %d: %v", i, err)
					}
				}
				if got, err := s.List(200, 0); err != nil || len(got) != stored {
					t.Errorf("%d are stored, %v", len(got), err)
				}
				if begins > 2*len(ops) {
					t.Errorf("%d transactions", begins)
				}
			})
		}
	}
}

// sqliteHistory creates a database of 1,000 operations. It returns an application's
// store in it, and a function that returns the plans of the queries that f runs and
// that contain a text.
func sqliteHistory(t *testing.T, script string) (*SQLiteStore, func(text string, f func()) string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "app.db")
	sqliteOpen(t, path).Close()
	sqliteMake(t, path, script)
	db, set := hookdriver.Open(t, path)
	return sqliteUse(t, db), func(text string, f func()) string {
		t.Helper()
		var mu sync.Mutex
		plans := make(map[string]string)
		set(func(query string, run func() error) error {
			mu.Lock()
			defer mu.Unlock()
			if strings.Contains(query, text) {
				plans[query] = ""
			}
			return run()
		})
		f()
		set(hookdriver.Run)
		var all []string
		for query := range plans {
			args := make([]any, strings.Count(regexp.MustCompile(`'[^']*'`).ReplaceAllString(query, ""), "?"))
			rows, err := db.Query("EXPLAIN QUERY PLAN "+query, args...)
			if err != nil {
				t.Fatal(err)
			}
			defer rows.Close()
			for rows.Next() {
				var id, parent, unused int
				var detail string
				if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
					t.Fatal(err)
				}
				all = append(all, detail)
			}
		}
		return strings.Join(all, "; ")
	}
}

// Indexes serve recovery, lists by state in the order of the index, Before by rowid,
// and Prune, however long the history.
func TestSQLitePlan(t *testing.T) {
	for _, analyze := range []string{"", "; ANALYZE"} {
		t.Run("after "+analyze, func(t *testing.T) {
			s, plan := sqliteHistory(t, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
				INSERT INTO tasks (id, name, state, owner, updated_at) SELECT i, 'x', CASE WHEN i % 10 = 0 THEN 'FAILED' WHEN i % 100 = 99 THEN 'RUNNING' ELSE 'DONE' END,
				'11111111-2222-4333-8444-555555555555', '2024-01-01 00:00:00.000000' FROM n`+analyze)
			const byState, byID = "INDEX tasks_state_not_done (state=?", "INDEX sqlite_autoindex_tasks_1 (id=?)"
			for _, test := range []struct {
				f           Filter
				want, avoid string
			}{
				{Filter{States: []State{StateFailed}}, byState, "SCAN tasks"},
				{Filter{States: []State{StateFailed, StateCancelled}, Before: "500"}, byState + " AND rowid<?)", "SCAN tasks"},
				{Filter{States: []State{StateFailed}, Name: "x"}, byState, "SCAN tasks"},
				{Filter{States: []State{StateFailed}, Include: []string{"99", "199"}}, byID, "SCAN tasks"},
				{Filter{States: []State{StateRunning}, Exclude: []string{"99", "199"}}, byState, "SCAN tasks"},
				{Filter{States: []State{StateRunning, StateFailed}, Before: "500", Include: []string{"99"}, Exclude: []string{"199"}}, byID, "SCAN tasks"},
				{Filter{Before: "500"}, "INTEGER PRIMARY KEY (rowid<?)", "TEMP B-TREE"},
				{Filter{Before: "0190d8e0-0000-7000-8000-000000000000"}, "INDEX sqlite_autoindex_tasks_1 (id>?)", "SCAN tasks"},
				{Filter{Name: "x"}, "INTEGER PRIMARY KEY (rowid>? AND rowid<?)", "SCAN tasks"},
			} {
				got := plan("OFFSET", func() {
					if ops, err := s.ListFiltered(test.f, 5, 0); err != nil || len(ops) != 5 {
						t.Errorf("%+v: %d operations, %v", test.f, len(ops), err)
					}
				})
				if !strings.Contains(got, test.want) || strings.Contains(got, test.avoid) {
					t.Errorf("%+v: plan %q", test.f, got)
				}
			}
			got := plan("UNION ALL", func() {
				for n, err := range s.Prune(time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)) {
					if n != 0 || err != nil {
						t.Errorf("Prune: %d, %v", n, err)
					}
				}
			})
			if !strings.Contains(got, "INDEX tasks_finished (<expr>=? AND rowid>?)") ||
				!strings.Contains(got, "INDEX tasks_finished (<expr>>? AND <expr><?)") || strings.Contains(got, "SCAN tasks") {
				t.Errorf("Prune: plan %q", got)
			}
			got = plan("PENDING", func() {
				n := 0
				for _, err := range s.Recover("gone", nil) {
					if n++; err != nil {
						t.Fatal(err)
					}
				}
				if n != 10 {
					t.Errorf("recovered %d operations, want 10", n)
				}
			})
			if !strings.Contains(got, "INDEX tasks_unfinished (<expr>>?)") || !strings.Contains(got, "INDEX tasks_unfinished (<expr>=? AND rowid>?)") ||
				strings.Contains(got, "SCAN tasks") || strings.Contains(got, "TEMP B-TREE") {
				t.Errorf("Recover: plan %q", got)
			}
			got = plan("UPDATE", func() {
				s.WriteBatch(nil, slices.Repeat([]*Operation{sqliteOp("a", StateDone), sqliteOp("b", StateDone)}, 20))
			})
			if !strings.Contains(got, byID) || strings.Contains(got, "SCAN tasks") {
				t.Errorf("WriteBatch: plan %q", got)
			}
		})
	}
}

// A search in steps finds the same operations as a search of the whole history at once.
func TestSQLiteSearch(t *testing.T) {
	const rows = 2*maxStep + 1000
	path := filepath.Join(t.TempDir(), "x.db")
	s := sqliteOpen(t, path)
	sqliteExecute(t, s.db, fmt.Sprintf(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO tasks (rowid, id, name, state) SELECT iif(i < 1000, i, i * 1000000), i, CASE WHEN i %% 997 = 0 THEN 'rare' ELSE 'often' END,
		CASE i %% 7 WHEN 0 THEN 'FAILED' WHEN 1 THEN 'RUNNING' WHEN 2 THEN 'PENDING' ELSE 'DONE' END FROM n`, rows))
	all, err := s.List(rows, 0)
	if err != nil || len(all) != rows {
		t.Fatal(len(all), err)
	}
	for _, f := range []Filter{
		{Name: "rare"},
		{Name: "never"},
		{Name: "rare", Before: "9000"},
		{Name: "rare", Before: "997"},
		{Name: "often", Before: "3"},
		{States: []State{StateDone}},
		{States: []State{StateDone, StateFailed}, Before: "200"},
		{States: []State{StateDone, StateRunning}, Name: "rare"},
		{States: []State{StateFailed, StatePending}, Name: "rare"},
		{States: []State{StateRunning}, Name: "rare", Include: []string{"10967", "997"}},
		{States: []State{StateRunning, StateDone}, Exclude: []string{"1", "8"}, Before: "20"},
	} {
		for _, page := range [][2]int{{1, 0}, {3, 0}, {3, 2}, {2, 9}, {rows, 0}, {5, rows}, {10, rows / 2}, {rows, 50}} {
			limit, offset := page[0], page[1]
			want := []string{}
			for _, op := range all {
				if n, _ := strconv.Atoi(op.ID); f.Before != "" {
					if before, _ := strconv.Atoi(f.Before); n >= before {
						continue
					}
				}
				if f.matches(op) {
					want = append(want, op.ID)
				}
			}
			want = want[min(offset, len(want)):]
			want = want[:min(limit, len(want))]
			got, err := s.ListFiltered(f, limit, offset)
			if err != nil || !slices.EqualFunc(got, want, func(op *Operation, id string) bool { return op.ID == id }) {
				t.Errorf("ListFiltered(%+v, %d, %d): %d operations, %v, want %d", f, limit, offset, len(got), err, len(want))
			}
		}
	}
	if _, err := s.ListFiltered(Filter{Name: "rare", Before: "unknown"}, 1, 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("before an unknown ID: %v", err)
	}
}

// A search ends between two steps once its context is done. Between steps, others get
// the connection, even if there is only one.
func TestSQLiteSearchEnds(t *testing.T) {
	s, _ := sqliteHistory(t, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
		INSERT INTO tasks (id, name, state) SELECT i, 'x', 'DONE' FROM n`)
	s.db.SetMaxOpenConns(1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	searching := make(chan error)
	go func() {
		for {
			_, err := s.ListFiltered(Filter{Name: "rare", Context: ctx}, 1, 0)
			if err != nil {
				searching <- err
				return
			}
		}
	}()
	for i := range 20 {
		if err := s.Save(sqliteOp(fmt.Sprint("new ", i), StatePending)); err != nil {
			t.Error(err)
		}
	}
	cancel()
	if err := <-searching; err != context.Canceled {
		t.Errorf("ListFiltered: %v, want the context's error", err)
	}
}

// Each step reads a bounded number of rows, and none runs after the context is done.
func TestSQLiteSearchSteps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "app.db")
	sqliteOpen(t, path).Close()
	sqliteMake(t, path, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)
		INSERT INTO tasks (id, name, state) SELECT i, 'x', 'DONE' FROM n`)
	db, set := hookdriver.Open(t, path)
	s := sqliteUse(t, db)
	for _, cancelAt := range []int{1, 3, 1000} {
		ctx, cancel := context.WithCancel(t.Context())
		steps := 0
		set(func(query string, run func() error) error {
			if strings.Contains(query, "name = ?") {
				if steps++; steps == cancelAt {
					cancel()
				}
			}
			return run()
		})
		ops, err := s.ListFiltered(Filter{Name: "rare", Context: ctx}, 1, 0)
		set(hookdriver.Run)
		cancel()
		if want := 11; cancelAt == 1000 && (steps != want || err != nil) { // 6,300 rows in the first 6
			t.Errorf("%d steps, %v, want %d", steps, err, want)
		} else if cancelAt < 1000 && (steps != cancelAt || !errors.Is(err, context.Canceled) || ops != nil) {
			t.Errorf("cancelled at step %d: %d steps, %v", cancelAt, steps, err)
		}
	}
}

// A database of an earlier version gets the index that recovery needs.
func TestSQLiteOlder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	sqliteOpen(t, path).Close()
	sqliteMake(t, path, `DROP INDEX tasks_unfinished; INSERT INTO tasks (id, name, state) VALUES ('a', 'x', 'RUNNING')`)
	s := sqliteOpen(t, path)
	n := 0
	for op, err := range s.Recover("gone", nil) {
		if n++; err != nil || op.ID != "a" {
			t.Errorf("Recover: %v, %v", op, err)
		}
	}
	if n != 1 {
		t.Errorf("recovered %d operations, want 1", n)
	}
}

// Recovery of more orphans than fit into one transaction, of several owners.
func TestSQLiteRecoverMany(t *testing.T) {
	for name, open := range sqliteKinds {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			if err := s.Save(sqliteOp("mine", StateRunning)); err != nil {
				t.Fatal(err)
			}
			sqliteExecute(t, s.db, fmt.Sprintf(`
				WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
				INSERT INTO tasks (id, name, state, owner, updated_at, started_at)
				SELECT i, 'x', CASE i %% 2 WHEN 0 THEN 'RUNNING' ELSE 'PENDING' END,
					CASE i %% 4 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN '../../etc/passwd' ELSE '%s' END,
					CASE WHEN i %% 8 < 4 THEN '2100-01-01T00:00:00+01:00' END, CASE WHEN i %% 8 = 4 THEN '2100-01-01 00:00:00' END FROM n`,
				5*recoverChunk, uuid.NewString()))
			for range s.Recover("gone", nil) {
				break // a caller may stop early
			}
			seen := make(map[string]bool)
			for op, err := range s.Recover("gone", nil) {
				if err != nil {
					t.Fatal(err)
				}
				if seen[op.ID] || op.State != StateFailed || op.Error != "gone" || op.ID == "mine" || op.UpdatedAt.Before(op.StartedAt) {
					t.Fatalf("recovered %+v", op)
				}
				seen[op.ID] = true
			}
			if want := 4 * recoverChunk; len(seen) != want {
				t.Errorf("recovered %d, want %d after those of the first transaction", len(seen), want)
			}
			sqliteSame(t, "left", sqliteTexts(t, s.db, "SELECT id FROM tasks WHERE state <> 'FAILED'"), []string{"mine"})
			sqliteSame(t, "stored", sqliteTexts(t, s.db, `SELECT hour || ' ' || count(*) FROM (SELECT substr(updated_at, 1, 13) AS hour FROM tasks
				WHERE error = 'gone' AND updated_at || '' > '2090') GROUP BY hour`),
				[]string{fmt.Sprintf("2099-12-31 23 %d", 5*recoverChunk/2), fmt.Sprintf("2100-01-01 00 %d", 5*recoverChunk/8)})
		})
	}
}

// Recover ends even if a trigger keeps an orphan unchanged.
func TestSQLiteRecoverIgnored(t *testing.T) {
	s := sqliteOpen(t, ":memory:")
	sqliteExecute(t, s.db, fmt.Sprintf(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO tasks (id, name, state) SELECT i, 'x', 'RUNNING' FROM n;
		CREATE TRIGGER keep BEFORE UPDATE ON tasks BEGIN SELECT RAISE(IGNORE); END`, recoverChunk+1))
	for op, err := range s.Recover("gone", nil) {
		t.Errorf("recovered %+v, %v", op, err)
	}
}

// Each store reports once an owner whose file can't be examined.
func TestSQLiteRecoverUnknown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	s := sqliteOpen(t, path)
	if s.owner.Path() == "" {
		t.Skip("this system has no file locks")
	}
	id := uuid.NewString()
	if err := os.Mkdir(path+"-owner-"+id, 0o700); err != nil { // a directory can't be opened for writing
		t.Fatal(err)
	}
	sqliteExecute(t, s.db, fmt.Sprintf(`INSERT INTO tasks (id, name, state, owner) VALUES ('a', 'a', 'RUNNING', '%s'), ('b', 'b', 'PENDING', '%[1]s'),
		('orphan', 'orphan', 'RUNNING', NULL)`, id))
	for round, s := range []*SQLiteStore{s, s, sqliteOpen(t, path)} {
		reported := 0
		for op, err := range s.Recover("gone", nil) {
			switch {
			case op == nil:
				t.Fatal(err)
			case err == nil:
				if op.ID != "orphan" {
					t.Errorf("recovered %+v", op)
				}
			case op.ID != "a" && op.ID != "b" || op.State.Finished() || !strings.Contains(err.Error(), path+"-owner-"+id) || !sqliteAdvice.MatchString(err.Error()):
				t.Errorf("reported %+v, %v", op, err)
			default:
				reported++
			}
		}
		if want := []int{1, 0, 1}[round]; reported != want {
			t.Errorf("round %d: reported %d times, want %d", round, reported, want)
		}
	}
	sqliteManager(t, s) // New does not refuse the store
	sqliteSame(t, "live", sqliteTexts(t, s.db, `SELECT id FROM tasks WHERE state <> 'FAILED'`), []string{"a", "b"})
}

// If the database file is deleted while a store is open, the store reports it and
// creates no new file.
func TestSQLiteDeleted(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("this system keeps open files")
	}
	for name, remove := range map[string]func(path string) error{
		"file": os.Remove,
		"file and WAL": func(path string) error {
			return errors.Join(os.Remove(path), os.Remove(path+"-wal"), os.Remove(path+"-shm"))
		},
		"directory": func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
		"replaced":  func(path string) error { return errors.Join(os.Rename(path, path+"2"), os.WriteFile(path, nil, 0o600)) },
	} {
		for kind, open := range map[string]func(path string) *SQLiteStore{
			"own":           func(path string) *SQLiteStore { return sqliteOpen(t, path) },
			"application's": func(path string) *SQLiteStore { return sqliteUse(t, sqliteDB(t, path+"?_journal_mode=WAL")) },
		} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "d")
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(dir, "x.db")
				s := open(path)
				op := sqliteOp("a", StatePending)
				if err := s.Save(op); err != nil {
					t.Fatal(err)
				}
				if err := remove(path); err != nil {
					t.Fatal(err)
				}
				_, list := s.List(10, 0)
				_, get := s.Get("a")
				for what, err := range map[string]error{"Save": s.Save(sqliteOp("b", StatePending)), "Update": s.Update(op), "List": list, "Get": get} {
					if err == nil || !strings.Contains(err.Error(), "while it was open") {
						t.Errorf("%s without a database: %v", what, err)
					}
				}
				s.Close()
				if info, err := os.Lstat(path); err == nil && info.Size() > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("there is a new file: %v, %v", info, err)
				}
			})
		}
	}
}

// Many processes open a new file at the same time.
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
			for op, err := range s.Recover("gone", nil) {
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

// Without cgo the package builds, and its error says what is missing. If the tests have
// cgo, they run themselves again without it.
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

// Prune skips rows that it can't parse or identify, and rows that a trigger keeps. The
// number of its statements depends only on the number of rows.
func TestSQLitePrune(t *testing.T) {
	before := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	const many = 5 * pruneChunk
	for _, test := range []struct {
		name, at, set string // what set does to many rows that are DONE at that time
		want          int
	}{
		{"old", "2024-06-01 00:00:00.000000", "", many},
		{"old, negative rowids", "2024-06-01 00:00:00.000000", "rowid = -rowid", many},
		{"old in another layout", "2024-06-01T00:00:00Z", "", many},
		{"old by time zone", "2025-01-01T10:00:00+12:00", "", many},
		{"new by time zone", "2024-12-31T23:00:00-12:00", "", 0},
		{"now", "2025-01-01 00:00:00.000000", "", 0},
		{"a moment ago", "2024-12-31 23:59:59.999999", "", many},
		{"soon, in another layout", "2025-01-01T10:00:00Z", "", 0},
		{"unreadable", "2024 or so", "", 0},
		{"a number", "1700000000", "updated_at = 1700000000", 0},
		{"a bare date", "2024-06-01", "", 0},
		{"bytes", "", "updated_at = CAST('2024-06-01 00:00:00' AS BLOB)", 0},
		{"no time", "", "updated_at = NULL", 0},
		{"unfinished", "2024-06-01 00:00:00.000000", "state = CASE rowid % 3 WHEN 0 THEN 'PENDING' WHEN 1 THEN 'RUNNING' ELSE 'PAUSED' END", 0},
		{"kept by a trigger", "2024-06-01 00:00:00.000000", "name = 'keep'", 0},
		{"without an ID", "2024-06-01 00:00:00.000000", "id = NULL", many},
	} {
		t.Run(test.name, func(t *testing.T) {
			db, set := hookdriver.Open(t, filepath.Join(t.TempDir(), "x.db"))
			db.SetMaxOpenConns(1)
			s := sqliteUse(t, db)
			script := fmt.Sprintf(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
				INSERT INTO tasks (id, name, state, updated_at) SELECT 't' || i, 'x', 'DONE', '%s' FROM n;`, many, test.at)
			if test.set != "" {
				script += "UPDATE tasks SET " + test.set + ";"
			}
			sqliteExecute(t, db, script+`CREATE TRIGGER keep BEFORE DELETE ON tasks WHEN old.name = 'keep' BEGIN SELECT RAISE(IGNORE); END;
				INSERT INTO tasks (id, name, state, updated_at) VALUES ('old', 'x', 'FAILED', '2024-06-01 00:00:00.000001')`)
			queries := 0
			set(func(query string, run func() error) error {
				if strings.HasPrefix(query, "SELECT") {
					queries++
				}
				return run()
			})
			n := 0
			for some, err := range s.Prune(before) {
				if n += some; err != nil || some > pruneChunk {
					t.Fatal(some, err)
				}
			}
			if n != test.want+1 {
				t.Errorf("deleted %d rows, want %d", n, test.want+1)
			}
			if ops, err := s.List(2*many, 0); err != nil || len(ops) != many-test.want {
				t.Errorf("%d rows are left, %v, want %d", len(ops), err, many-test.want)
			}
			if queries > many/pruneChunk+3 {
				t.Errorf("%d queries", queries)
			}
		})
	}
}

// BenchmarkWriteBatch stores 64 new operations in one call and finishes them in the
// next. For comparison, it runs two handwritten transactions of 64 rows on the table of
// SPEC.md.
func BenchmarkWriteBatch(b *testing.B) {
	const rows = 64
	application := func(more string) func(path string) (*SQLiteStore, error) {
		return func(path string) (*SQLiteStore, error) {
			db, err := sql.Open("sqlite3", path+"?_journal_mode=WAL&_synchronous=FULL&_busy_timeout=5000"+more)
			if err != nil {
				return nil, err
			}
			b.Cleanup(func() { db.Close() })
			return NewSQLiteStore(db)
		}
	}
	for _, bm := range []struct {
		name string
		open func(path string) (*SQLiteStore, error)
	}{
		{"OpenSQLite", OpenSQLite},
		{"application", application("")},
		{"application with a cache", application("&_stmt_cache_size=32")},
	} {
		b.Run(bm.name, func(b *testing.B) {
			s, err := bm.open(filepath.Join(b.TempDir(), "tasks.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			hand := newByHand(b)
			var ours, bare time.Duration
			for b.Loop() { // alternate the two
				start := time.Now()
				storeBatch(b, s, rows)
				ours += time.Since(start)
				start = time.Now()
				hand.batch(b, rows)
				bare += time.Since(start)
			}
			b.ReportMetric(float64(ours.Microseconds())/float64(b.N), "µs/ours")
			b.ReportMetric(float64(bare.Microseconds())/float64(b.N), "µs/bare")
			b.ReportMetric(float64(bare)/float64(ours), "bare/ours")
		})
	}
}

func storeBatch(b *testing.B, s *SQLiteStore, rows int) {
	var ops []*Operation
	for range rows {
		now := time.Now().UTC()
		ops = append(ops, &Operation{ID: uuid.Must(uuid.NewV7()).String(), Name: "job", State: StatePending, CreatedAt: now, UpdatedAt: now})
	}
	check := func(errs []error) {
		for _, err := range errs {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	check(s.WriteBatch(ops, nil))
	for _, op := range ops {
		op.State, op.Progress, op.Result = StateDone, 100, json.RawMessage(nil)
		op.UpdatedAt = time.Now().UTC()
		op.StartedAt = op.UpdatedAt
	}
	check(s.WriteBatch(nil, ops))
}

type byHand struct {
	c              *sql.Conn
	insert, update *sql.Stmt
}

func newByHand(b *testing.B) *byHand {
	db, err := sql.Open("sqlite3", filepath.Join(b.TempDir(), "bare.db")+"?_journal_mode=WAL&_synchronous=FULL")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	h := &byHand{}
	ctx := context.Background()
	if h.c, err = db.Conn(ctx); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { h.c.Close() })
	if _, err := h.c.ExecContext(ctx, `CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL,
		progress INTEGER DEFAULT 0, metadata TEXT, result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME)`); err != nil {
		b.Fatal(err)
	}
	h.insert, err = h.c.PrepareContext(ctx, `INSERT INTO tasks (id, name, state, created_at, updated_at) VALUES (?, ?, ?, ?, ?)`)
	if err == nil {
		h.update, err = h.c.PrepareContext(ctx, `UPDATE tasks SET state = ?, progress = ?, updated_at = ? WHERE id = ?`)
	}
	if err != nil {
		b.Fatal(err)
	}
	return h
}

// batch inserts rows in one transaction and updates them in the next.
func (h *byHand) batch(b *testing.B, rows int) {
	ids := make([]string, rows)
	h.commit(b, rows, func(i int) error {
		ids[i] = uuid.Must(uuid.NewV7()).String()
		now := time.Now().UTC().Format(timeFormat)
		_, err := h.insert.Exec(ids[i], "job", "PENDING", now, now)
		return err
	})
	h.commit(b, rows, func(i int) error {
		_, err := h.update.Exec("DONE", 100, time.Now().UTC().Format(timeFormat), ids[i])
		return err
	})
}

func (h *byHand) commit(b *testing.B, rows int, write func(i int) error) {
	exec := func(query string) {
		if _, err := h.c.ExecContext(context.Background(), query); err != nil {
			b.Fatal(err)
		}
	}
	exec("BEGIN IMMEDIATE")
	for i := range rows {
		if err := write(i); err != nil {
			b.Fatal(fmt.Errorf("row %d: %w", i, err))
		}
	}
	exec("COMMIT")
}

// TestSQLiteBeginFails makes BEGIN number n and all later ones fail, in a batch with a
// missing row. Every operation whose error is nil is stored, whichever BEGIN fails.
func TestSQLiteBeginFails(t *testing.T) {
	for n := range 6 {
		db, set := hookdriver.Open(t, "file:"+filepath.Join(t.TempDir(), "a.db"))
		s, err := NewSQLiteStore(db)
		if err != nil {
			t.Fatal(err)
		}
		begins := 0
		set(func(query string, run func() error) error {
			if strings.HasPrefix(query, "BEGIN IMMEDIATE") {
				if begins++; begins > n {
					return errors.New("disk I/O error")
				}
			}
			return run()
		})
		now := time.Now()
		op := func(id string, state State) *Operation {
			return &Operation{ID: id, Name: "x", State: state, CreatedAt: now, UpdatedAt: now}
		}
		errs := s.WriteBatch([]*Operation{op("a", StatePending), op("b", StatePending)}, []*Operation{op("missing", StateDone)})
		set(hookdriver.Run)
		for i, id := range []string{"a", "b"} {
			if _, err := s.Get(id); (err == nil) != (errs[i] == nil) {
				t.Errorf("BEGIN %d fails: Save(%s) = %v, but Get = %v", n, id, errs[i], err)
			}
		}
		if errs[2] == nil {
			t.Errorf("BEGIN %d fails: Update of a missing operation = nil", n)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// ANALYZE does not change which index a query on a long history uses.
func TestSQLiteListPlan(t *testing.T) {
	at := func(minute int) time.Time { return time.Date(2024, 1, 1, 0, minute, 0, 0, time.UTC) }
	for _, analyze := range []string{"", "; ANALYZE"} {
		t.Run("after "+analyze, func(t *testing.T) {
			s, plan := sqliteHistory(t, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 25000)
				INSERT INTO tasks (id, name, state, updated_at, metadata)
				SELECT i, 'x', CASE WHEN i % 10 = 0 THEN 'FAILED' WHEN i % 100 = 99 THEN 'RUNNING' ELSE 'DONE' END,
					strftime('%F %T.000000', '2024-01-01', (i / 2) || ' minutes'), '{"pool":"tank"}' FROM n`+analyze)
			const (
				cursor   = "INDEX tasks_finished (<expr>=? AND rowid<?)"
				below    = "INDEX tasks_finished (<expr>>? AND <expr><?)"
				byFinish = "INDEX tasks_finished"
				byState  = "INDEX tasks_state_not_done (state=?"
				byRowid  = "INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
				few      = "COVERING INDEX tasks_state_not_done (state=?)"
				sorted   = "TEMP B-TREE"
			)
			failed := []State{StateFailed}
			for _, test := range []struct {
				f           Filter
				limit       int
				want, avoid []string
			}{
				{Filter{ByFinish: true}, 5, []string{"SCAN tasks USING " + byFinish}, []string{sorted}},
				{Filter{ByFinish: true, Before: "10001"}, 5, []string{cursor, "INDEX tasks_finished (<expr><?)", "(id=?)"}, []string{"SCAN tasks"}},
				{Filter{ByFinish: true, Containing: "X"}, 5, []string{cursor}, []string{byRowid}},
				{Filter{ByFinish: true, States: failed}, 200, []string{few, cursor}, []string{byRowid, "INDEX tasks_finished (<expr><?)"}},
				{Filter{ByFinish: true, FinishedBefore: at(100)}, 5, []string{cursor, "INDEX tasks_finished (<expr><?)"}, []string{byRowid}},
				{Filter{ByFinish: true, FinishedAfter: at(5000), FinishedBefore: at(5010)}, 5, []string{cursor, below}, []string{byRowid}},
				{Filter{FinishedAfter: at(5000), FinishedBefore: at(5010)}, 5, []string{below, byRowid}, []string{"SCAN tasks"}},
				{Filter{FinishedAfter: at(100)}, 200, []string{"INDEX tasks_finished (<expr>>?)", byRowid}, nil},
				{Filter{FinishedAfter: at(100), States: failed}, 200, []string{few}, []string{byFinish}},
				{Filter{Containing: "X"}, 5, []string{byRowid}, []string{byFinish}},
				{Filter{Metadata: map[string]string{"pool": "tank"}}, 5, []string{byRowid}, []string{byFinish}},
				{Filter{Metadata: map[string]string{"pool": "tank"}, States: failed}, 5, []string{byState}, []string{byFinish}},
			} {
				got := plan("tasks", func() {
					if ops, err := s.ListFiltered(test.f, test.limit, 0); err != nil || len(ops) != test.limit {
						t.Errorf("%+v: %d operations, %v", test.f, len(ops), err)
					}
				})
				missing := slices.ContainsFunc(test.want, func(part string) bool { return !strings.Contains(got, part) })
				if missing || slices.ContainsFunc(test.avoid, func(part string) bool { return strings.Contains(got, part) }) {
					t.Errorf("%+v:\nplan %q\nwant %q\navoid %q", test.f, got, test.want, test.avoid)
				}
			}
		})
	}
}

// Each step of a search reads a bounded number of rows, however many have the same
// time, and none runs after the context is done.
func TestSQLiteListSteps(t *testing.T) {
	for name, at := range map[string]string{"different": `strftime('%F %T.000000', '2024-01-01', i || ' seconds')`, "same": `'2024-01-01 00:00:00.000000'`} {
		path := filepath.Join(t.TempDir(), name+".db")
		sqliteOpen(t, path).Close()
		sqliteMake(t, path, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)
			INSERT INTO tasks (id, name, state, updated_at, metadata) SELECT i, 'x', 'DONE', `+at+`, '{"pool":"tank"}' FROM n`)
		db, set := hookdriver.Open(t, path)
		s := sqliteUse(t, db)
		for _, f := range []Filter{{ByFinish: true, Containing: "rare"}, {Metadata: map[string]string{"pool": "rare"}}, {Containing: "rare"},
			{FinishedAfter: time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC), Name: "rare"}} {
			for _, cancelAt := range []int{1, 3, 1000} {
				ctx, cancel := context.WithCancel(t.Context())
				f.Context = ctx
				steps := 0
				set(func(query string, run func() error) error {
					if strings.Contains(query, "message") { // the query that selects operations
						if steps++; steps == cancelAt {
							cancel()
						}
					}
					return run()
				})
				ops, err := s.ListFiltered(f, 1, 0)
				set(hookdriver.Run)
				cancel()
				if cancelAt == 1000 && (steps < 11 || steps > 24 || err != nil) {
					t.Errorf("%s times, %+v: %d steps, %v, want 11, or twice that and two", name, f, steps, err)
				} else if cancelAt < 1000 && (steps != cancelAt || !errors.Is(err, context.Canceled) || ops != nil) {
					t.Errorf("%s times, %+v: cancelled at step %d: %d steps, %v", name, f, cancelAt, steps, err)
				}
			}
		}
	}
}

// Operations that finished at the same time are listed page by page like others, even
// if there are more of them than one step reads.
func TestSQLiteListSameTime(t *testing.T) {
	const rows = 2*maxStep + 10
	s := sqliteOpen(t, filepath.Join(t.TempDir(), "x.db"))
	sqliteExecute(t, s.db, fmt.Sprintf(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO tasks (id, name, state, updated_at) SELECT i, iif(i IN (3, 5, 7000), 'rare', 'x'), 'DONE',
			iif(i BETWEEN 5 AND %d, '2024-01-02 00:00:00.000000', '2024-01-01 00:00:00.000000') FROM n`, rows, rows-5))
	var want []string // the middle finished after both ends
	for _, r := range [][2]int{{rows - 5, 5}, {rows, rows - 4}, {4, 1}} {
		for i := r[0]; i >= r[1]; i-- {
			want = append(want, fmt.Sprint(i))
		}
	}
	for _, f := range []Filter{{ByFinish: true}, {ByFinish: true, Containing: "X"}, {ByFinish: true, FinishedAfter: time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)}} {
		var got []string
		for {
			ops, err := s.ListFiltered(f, 3000, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, op := range ops {
				got = append(got, op.ID)
			}
			if len(ops) < 3000 {
				break
			}
			f.Before = got[len(got)-1]
		}
		want := want
		if f.Containing != "" {
			want = slices.DeleteFunc(slices.Clone(want), func(id string) bool { return id == "3" || id == "5" || id == "7000" })
		}
		if !slices.Equal(got, want) {
			t.Errorf("%+v: %d operations, want %d in order", f, len(got), len(want))
		}
	}
}

const foreignRows = `INSERT INTO tasks (id, name, state, updated_at, metadata) VALUES
		('ours', 'x', 'DONE', '2024-06-01 12:00:00.000000', '{"pool":"tank"}'),
		('current', 'x', 'DONE', '2024-06-01 12:00:00', '{bad json'),
		('rfc', 'x', 'DONE', '2024-06-01T12:00:00Z', '{"pool":"tank"'),
		('zone', 'x', 'DONE', '2024-06-02T02:00:00+14:00', CAST('{"pool":"tank"}' AS BLOB)),
		('west', 'x', 'DONE', '2024-06-01T00:00:00-12:00', x'00ff'),
		('string', 'x', 'DONE', '2024-06-01 14:00:00.000000000 +0200 CEST m=+1.5', 17),
		('later', 'x', 'DONE', '2024-06-01T12:00:01Z', '"tank"'),
		('nanosecond', 'x', 'DONE', '2024-06-01 12:00:00.000000001 +0000 UTC', '[{"pool":"tank"}]'),
		('odd', 'x', 'DONE', '2024 or so', '{"pool":{"pool":"tank"}}'),
		('shaped', 'x', 'DONE', '2024-06-01 12:00:70.000000', ''),
		('number', 'x', 'DONE', NULL, NULL), ('real', 'x', 'DONE', NULL, 1.5), ('bytes', 'x', 'DONE', NULL, '{}'),
		('null', 'x', 'DONE', NULL, 'null'), ('empty', 'x', 'DONE', '', '{"pool":1}'),
		('running', 'x', 'RUNNING', '2024-06-01 12:00:00.000000', NULL), ('paused', 'x', 'PAUSED', '2024-06-01 12:00:00.000000', NULL);
		UPDATE tasks SET updated_at = 1717243200 WHERE id = 'number';
		UPDATE tasks SET updated_at = 1717243200.5 WHERE id = 'real';
		UPDATE tasks SET updated_at = x'ff00' WHERE id = 'bytes'`

// Rows of other writers: no cell, whatever it contains, hides another row. Times in the
// known layouts are matched exactly by a range of time.
func TestSQLiteListForeign(t *testing.T) {
	s := sqliteOpen(t, filepath.Join(t.TempDir(), "x.db"))
	sqliteExecute(t, s.db, foreignRows)
	noon := time.Date(2024, 6, 1, 12, 0, 0, 0, time.UTC)
	list := func(f Filter) string {
		t.Helper()
		var ids []string
		for { // page by page of one row
			ops, err := s.ListFiltered(f, 1, 0)
			if err != nil {
				t.Fatalf("%+v: %v", f, err)
			}
			if len(ops) == 0 {
				slices.Sort(ids)
				return strings.Join(ids, " ")
			}
			f.Before = ops[0].ID
			ids = append(ids, f.Before)
		}
	}
	same := []string{"current", "ours", "rfc", "string", "west", "zone"}
	for _, byFinish := range []bool{false, true} {
		for _, test := range []struct {
			after, before time.Time
			want          string
		}{
			{noon, noon.Add(1), strings.Join(same, " ")},
			{noon, noon.Add(2), "current nanosecond ours rfc string west zone"},
			{noon.Add(1), noon.Add(time.Second), "nanosecond"},
			{noon.Add(-time.Microsecond), noon, ""},
			{noon.Add(time.Second), time.Time{}, "later"},
			{time.Time{}, noon, ""},
			{time.Time{}, time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC), "current later nanosecond ours rfc string west zone"},
			{time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC), time.Time{}, ""},
			{time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC), time.Unix(1<<62, 0), "current later nanosecond ours rfc string west zone"},
			{time.Unix(1<<62, 0), time.Unix(-1<<62, 0), ""},
		} {
			got := list(Filter{ByFinish: byFinish, FinishedAfter: test.after, FinishedBefore: test.before})
			if got != test.want {
				t.Errorf("by finish %t, from %v to %v: %q, want %q", byFinish, test.after, test.before, got, test.want)
			}
		}
		if got, want := list(Filter{ByFinish: byFinish, Metadata: map[string]string{"pool": "tank"}}), "ours zone"; got != want {
			t.Errorf("by finish %t, by metadata: %q, want %q", byFinish, got, want)
		}
	}
	all := "bytes current empty later nanosecond null number odd ours real rfc shaped string west zone"
	for _, f := range []Filter{{ByFinish: true}, {ByFinish: true, Containing: "X"}, {ByFinish: true, States: []State{StateDone, StatePending}}} {
		if got := list(f); got != all {
			t.Errorf("%+v: %q, want %q", f, got, all)
		}
	}
}
