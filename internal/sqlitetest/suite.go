// Package sqlitetest tests the SQLite store in an application's database, with
// any driver. Each driver has a test that calls Test; those that the root
// module does not depend on have it in a module of their own.
package sqlitetest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
	"github.com/mynt-nas/task/tasktest"
)

// An Opener opens a database file, or a URI of SQLite's, with pragmas of the
// form "name(value)" on each connection. It closes the database with the test.
type Opener func(t testing.TB, path string, pragmas ...string) *sql.DB

// WithParams returns the URI of a path, which may have parameters already, with
// more of them.
func WithParams(path, params string) string {
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	return "file:" + filepath.ToSlash(path) + sep + params
}

// Test runs all tests with a driver.
func Test(t *testing.T, open Opener) {
	testos.CheckLeaks(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, Opener)
	}{
		{"Persistence", testPersistence},
		{"Life", testLife},
		{"TwoStores", testTwoStores},
		{"Locked", testLocked},
		{"RealErrors", testRealErrors},
		{"Full", testFull},
		{"Recovery", testRecovery},
		{"Refused", testRefused},
		{"Batch", testBatch},
		{"Prune", testPrune},
		{"Filter", testFilter},
		{"ByFinish", testByFinish},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open) })
	}
}

// App is what an application has in its database.
const App = `
CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, at DATETIME DEFAULT CURRENT_TIMESTAMP);
CREATE INDEX tasks_by_user ON users (name);
CREATE VIEW recent AS SELECT * FROM users WHERE at > '2024';
CREATE TABLE log (line TEXT);
CREATE TRIGGER logging AFTER INSERT ON users BEGIN INSERT INTO log VALUES ('new user ' || NEW.name); END;
INSERT INTO users (name) VALUES ('ann'), ('bob');
PRAGMA user_version = 7;
PRAGMA application_id = 77;
`

// Schema is the table of the specification.
const Schema = `
CREATE TABLE tasks (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    progress INTEGER DEFAULT 0,
    metadata TEXT,
    result TEXT,
    error TEXT,
    created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP
);
`

// soon is how long a call may take that waits for nothing.
const soon = 3 * time.Second

// Execute executes statements.
func Execute(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatalf("%v: %s", err, query)
	}
}

// Use returns a manager on a store in the database. Both are closed with the
// test.
func Use(t testing.TB, db *sql.DB) (*task.Manager, *task.SQLiteStore) {
	t.Helper()
	s, err := task.NewSQLiteStore(db)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	m, err := task.New(s, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m, s
}

// Dump returns all of an application's database but the table tasks.
func Dump(t testing.TB, db *sql.DB) string {
	t.Helper()
	var all string
	err := db.QueryRow(`SELECT (SELECT group_concat(type || name || coalesce(sql, '')) FROM sqlite_master WHERE tbl_name <> 'tasks')
		|| (SELECT group_concat(id || name || at) FROM users) || (SELECT group_concat(line) FROM log)
		|| (SELECT user_version FROM pragma_user_version) || (SELECT application_id FROM pragma_application_id)
		|| (SELECT journal_mode FROM pragma_journal_mode) || (SELECT synchronous FROM pragma_synchronous)
		|| (SELECT foreign_keys FROM pragma_foreign_keys) || (SELECT timeout FROM pragma_busy_timeout)
		|| (SELECT locking_mode FROM pragma_locking_mode)`).Scan(&all)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// show returns an operation without its manager.
func show(op *task.Operation) string {
	if op == nil {
		return "none"
	}
	return fmt.Sprintf("%+v", task.Operation{ID: op.ID, Name: op.Name, State: op.State, Progress: op.Progress, Metadata: op.Metadata,
		Result: op.Result, Error: op.Error, CreatedAt: op.CreatedAt, StartedAt: op.StartedAt, UpdatedAt: op.UpdatedAt})
}

func newOp(id string, state task.State) *task.Operation {
	now := time.Now().UTC().Truncate(time.Microsecond)
	return &task.Operation{ID: id, Name: id, State: state, CreatedAt: now, UpdatedAt: now}
}

func ids(ops []*task.Operation) string {
	var all []string
	for _, op := range ops {
		all = append(all, op.ID)
	}
	return strings.Join(all, " ")
}

// An appStore is a store in an application's database, which it closes too.
type appStore struct {
	*task.SQLiteStore
	db *sql.DB
}

func (s appStore) Close() error { return errors.Join(s.SQLiteStore.Close(), s.db.Close()) }

func testPersistence(t *testing.T, open Opener) {
	for _, test := range []struct {
		name    string
		conns   int
		pragmas []string
	}{
		{"as the driver opens it", 0, nil},
		{"one connection, WAL", 1, []string{"journal_mode(WAL)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
				db := open(t, filepath.Join(dir, "app.db"), test.pragmas...)
				db.SetMaxOpenConns(test.conns)
				s, err := task.NewSQLiteStore(db)
				return appStore{s, db}, err
			})
		})
	}
}

// A manager works with all settings that an application may have, and leaves
// the application's part of the database as it is.
func testLife(t *testing.T, open Opener) {
	for _, test := range []struct {
		name    string
		conns   int
		pragmas []string
	}{
		{"as the driver opens it", 0, nil},
		{"WAL", 0, []string{"journal_mode(WAL)", "busy_timeout(5000)"}},
		{"no busy timeout", 0, []string{"busy_timeout(0)"}},
		{"one connection", 1, nil},
		{"one connection, WAL, foreign keys", 1, []string{"journal_mode(WAL)", "foreign_keys(1)"}},
		{"foreign keys, TRUNCATE", 0, []string{"foreign_keys(1)", "journal_mode(TRUNCATE)"}},
		{"exclusive locking", 1, []string{"locking_mode(EXCLUSIVE)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			db := open(t, filepath.Join(dir, "app.db"), test.pragmas...)
			db.SetMaxOpenConns(test.conns)
			TestDB(t, db)
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if strings.Contains(e.Name(), "owner") {
					t.Errorf("there is still %s", e.Name())
				}
			}
		})
	}
}

// TestDB tests a manager, and another one after it, in an empty database.
func TestDB(t *testing.T, db *sql.DB) {
	Execute(t, db, App)
	before := Dump(t, db)
	m, s := Use(t, db)
	ops := life(t, m)
	if err := errors.Join(m.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	m, s = Use(t, db) // as after a restart
	for _, op := range ops {
		if got, _ := m.Get(op.ID); show(got) != show(op) {
			t.Errorf("Get = %s\nwant  %s", show(got), show(op))
		}
	}
	if err := errors.Join(m.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if after := Dump(t, db); after != before {
		t.Errorf("the application's part of the database is %s\nand was %s", after, before)
	}
}

// life lets operations end in each way and returns them.
func life(t *testing.T, m *task.Manager) []*task.Operation {
	t.Helper()
	fns := map[task.State]task.Func{
		task.StateDone: func(ctx context.Context, update func(int)) (any, error) {
			update(40)
			return map[string]any{"n": 12345678901234567}, task.SetMetadata(ctx, []string{"changed"})
		},
		task.StateFailed:    func(context.Context, func(int)) (any, error) { return "kept", errors.New("no") },
		task.StateCancelled: func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return nil, ctx.Err() },
	}
	var mu sync.Mutex
	var ops []*task.Operation
	var all sync.WaitGroup
	for state, fn := range fns {
		for i := range 5 {
			all.Go(func() {
				op, err := m.Submit(string(state), fn, task.WithMetadata(i))
				if err != nil {
					t.Error(err)
					return
				}
				if state == task.StateCancelled {
					if err := op.Cancel(); err != nil {
						t.Error(err)
					}
				}
				op, err = m.Wait(t.Context(), op.ID)
				if err != nil {
					t.Error(err)
					return
				}
				if op.State != state {
					t.Errorf("%s, want %s", show(op), state)
				}
				mu.Lock()
				defer mu.Unlock()
				ops = append(ops, op)
			})
		}
	}
	all.Wait()
	list, err := m.List(100, 0)
	if err != nil || len(list) != 15 {
		t.Errorf("List = %d operations, %v", len(list), err)
	}
	return ops
}

// Two stores with a database handle each: neither recovers the other's live
// operations, and what one leaves behind, the other recovers.
func testTwoStores(t *testing.T, open Opener) {
	path := filepath.Join(t.TempDir(), "app.db")
	a, _ := Use(t, open(t, path))
	release := make(chan struct{})
	block := func(context.Context, func(int)) (any, error) { <-release; return "done", nil }
	op, err := a.Submit("of a", block)
	if err != nil {
		t.Fatal(err)
	}
	dbB := open(t, path)
	b, storeB := Use(t, dbB)
	if got, ok := b.Get(op.ID); !ok || got.State.Finished() {
		t.Errorf("b shows %s, want it live", show(got))
	}
	if err := storeB.Save(newOp("left", task.StateRunning)); err != nil {
		t.Fatal(err)
	}
	c, _ := Use(t, open(t, path))
	if got, ok := c.Get("left"); !ok || got.State != task.StateRunning {
		t.Errorf("b lives, but c shows %s", show(got))
	}
	if err := errors.Join(b.Close(), storeB.Close(), dbB.Close()); err != nil {
		t.Fatal(err)
	}
	d, _ := Use(t, open(t, path))
	if got, ok := d.Get("left"); !ok || got.State != task.StateFailed || got.Error != "Task failed due to system restart" {
		t.Errorf("b is gone, but d shows %s", show(got))
	}
	close(release)
	for _, m := range []*task.Manager{a, c, d} {
		if got, err := m.Wait(t.Context(), op.ID); err != nil || got.State != task.StateDone {
			t.Errorf("Wait = %s, %v", show(got), err)
		}
	}
}

// Rows that other code has written are read, and recovered.
func testRecovery(t *testing.T, open Opener) {
	db := open(t, filepath.Join(t.TempDir(), "app.db"))
	db.SetMaxOpenConns(1)
	Execute(t, db, App+Schema)
	Execute(t, db, `INSERT INTO tasks (id, name, state, metadata, result, created_at, updated_at) VALUES
		('a', 'a', 'DONE', '', 'null', CURRENT_TIMESTAMP, 'garbage'), ('b', 'b', 'RUNNING', 'no json', NULL, x'00', NULL),
		('c', 'c', 'PENDING', '{"k":1}', '[1]', '2024-05-06T07:08:09Z', '2024-05-06 07:08:09.5 +0200 CEST m=+0.1'),
		('d', x'64', 'paused', x'ff', 1.5, 1.5, 0), (NULL, 'e', 'RUNNING', NULL, NULL, NULL, NULL)`)
	m, _ := Use(t, db)
	ops, err := m.List(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, op := range ops {
		got = append(got, fmt.Sprint(op.ID, " ", op.State, " ", op.Error, " ", op.Metadata, " ", op.Result))
	}
	want := []string{" FAILED Task failed due to system restart <nil> <nil>", "d paused  <nil> 1.5",
		"c FAILED Task failed due to system restart map[k:1] [1]",
		"b FAILED Task failed due to system restart <nil> <nil>", "a DONE  <nil> <nil>"}
	if !slices.Equal(got, want) {
		t.Errorf("List = %q\nwant  %q", got, want)
	}
}

// What can't be used is refused at once, and nothing is written.
func testRefused(t *testing.T, open Opener) {
	for _, test := range []struct {
		name, script, want string
		pragmas            []string
	}{
		{"view", "CREATE VIEW tasks AS SELECT 1", "a view called tasks", nil},
		{"WITHOUT ROWID", strings.Replace(Schema, "\n);", "\n) WITHOUT ROWID;", 1), "without a rowid", nil},
		{"columns", "CREATE TABLE tasks (id)", "no column name", nil},
		{"journal_mode=OFF", "", "use another journal_mode", []string{"journal_mode(OFF)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "app.db")
			db := open(t, path, test.pragmas...)
			Execute(t, db, App+test.script)
			before := Dump(t, db)
			refused(t, db, test.want)
			if after := Dump(t, db); after != before {
				t.Errorf("the database is %s\nand was %s", after, before)
			}
			var tables int
			if err := db.QueryRow(`SELECT count(*) FROM sqlite_master WHERE name = 'tasks' AND sql LIKE '%started_at%'`).Scan(&tables); err != nil || tables > 0 {
				t.Errorf("%d tables, %v", tables, err)
			}
		})
	}
	t.Run("in memory with several connections", func(t *testing.T) {
		refused(t, open(t, ":memory:"), "SetMaxOpenConns(1)")
	})
	t.Run("in memory with one connection", func(t *testing.T) {
		db := open(t, ":memory:")
		db.SetMaxOpenConns(1)
		TestDB(t, db)
	})
	t.Run("not a database", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "noise")
		if err := os.WriteFile(path, []byte(strings.Repeat("no database ", 100)), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, open(t, path), "make sure that it is one")
	})
}

func refused(t *testing.T, db *sql.DB, want string) {
	t.Helper()
	start := time.Now()
	s, err := task.NewSQLiteStore(db)
	if err == nil {
		s.Close()
		t.Fatal("it succeeded")
	}
	if !strings.Contains(err.Error(), want) || s != nil {
		t.Errorf("error %q, want it to say %q; store %v", err, want, s)
	}
	if took := time.Since(start); took > soon {
		t.Errorf("it took %v", took)
	}
}
