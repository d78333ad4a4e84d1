package moderntest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"github.com/mynt-nas/task"
)

const app = `
CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE, at DATETIME DEFAULT CURRENT_TIMESTAMP);
CREATE VIEW recent AS SELECT * FROM users WHERE at > '2024';
INSERT INTO users (name) VALUES ('ann'), ('bob');
PRAGMA user_version = 7;
`

const schema = `
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

func openDB(t *testing.T, path string, pragmas ...string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.ToSlash(path)+"?"+url.Values{"_pragma": pragmas}.Encode())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func execute(t *testing.T, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatalf("%v: %s", err, query)
	}
}

func open(t *testing.T, db *sql.DB) (*task.Manager, *task.SQLiteStore) {
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

func dump(t *testing.T, db *sql.DB) string {
	t.Helper()
	var all string
	err := db.QueryRow(`SELECT (SELECT group_concat(type || name || coalesce(sql, '')) FROM sqlite_master WHERE tbl_name <> 'tasks')
		|| (SELECT group_concat(id || name || at) FROM users)
		|| (SELECT user_version FROM pragma_user_version) || (SELECT journal_mode FROM pragma_journal_mode)
		|| (SELECT timeout FROM pragma_busy_timeout)`).Scan(&all)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// show returns an operation without its manager.
func show(op *task.Operation) string {
	return fmt.Sprintf("%+v", task.Operation{ID: op.ID, Name: op.Name, State: op.State, Progress: op.Progress, Metadata: op.Metadata,
		Result: op.Result, Error: op.Error, CreatedAt: op.CreatedAt, StartedAt: op.StartedAt, UpdatedAt: op.UpdatedAt})
}

func work(context.Context, func(int)) (any, error) { return nil, nil }

func TestLife(t *testing.T) {
	for _, test := range []struct {
		name    string
		conns   int
		pragmas []string
	}{
		{"as modernc opens it", 0, nil},
		{"WAL", 0, []string{"journal_mode(WAL)", "busy_timeout(5000)"}},
		{"no busy timeout", 0, []string{"busy_timeout(0)"}},
		{"one connection", 1, nil},
		{"one connection, WAL, foreign keys", 1, []string{"journal_mode(WAL)", "foreign_keys(1)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			db := openDB(t, filepath.Join(dir, "app.db"), test.pragmas...)
			db.SetMaxOpenConns(test.conns)
			execute(t, db, app)
			before := dump(t, db)
			m, s := open(t, db)
			ops := life(t, m)
			if err := errors.Join(m.Close(), s.Close()); err != nil {
				t.Fatal(err)
			}
			m, s = open(t, db) // as after a restart
			for _, op := range ops {
				if got, ok := m.Get(op.ID); !ok {
					t.Errorf("Get doesn't find %s", show(op))
				} else if show(got) != show(op) {
					t.Errorf("Get = %s\nwant  %s", show(got), show(op))
				}
			}
			if err := errors.Join(m.Close(), s.Close()); err != nil {
				t.Fatal(err)
			}
			if after := dump(t, db); after != before {
				t.Errorf("the application's own is %s\nand was %s", after, before)
			}
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
func TestTwoStores(t *testing.T) {
	path := filepath.Join(t.TempDir(), "app.db")
	a, _ := open(t, openDB(t, path))
	release := make(chan struct{})
	block := func(ctx context.Context, _ func(int)) (any, error) { <-release; return "done", nil }
	op, err := a.Submit("of a", block)
	if err != nil {
		t.Fatal(err)
	}
	dbB := openDB(t, path)
	b, storeB := open(t, dbB)
	if got, ok := b.Get(op.ID); !ok || got.State.Finished() {
		t.Errorf("b shows %+v, want it live", got)
	}
	if err := b.Cancel(op.ID); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("b cancels it: %v", err)
	}
	left := &task.Operation{ID: "left", Name: "left by b", State: task.StateRunning, CreatedAt: time.Now(), UpdatedAt: time.Now()}
	if err := storeB.Save(left); err != nil {
		t.Fatal(err)
	}
	c, _ := open(t, openDB(t, path))
	if got, ok := c.Get("left"); !ok || got.State != task.StateRunning {
		t.Errorf("b lives, but c shows %+v", got)
	}
	if err := errors.Join(b.Close(), storeB.Close(), dbB.Close()); err != nil {
		t.Fatal(err)
	}
	d, _ := open(t, openDB(t, path))
	if got, ok := d.Get("left"); !ok || got.State != task.StateFailed || got.Error != "Task failed due to system restart" {
		t.Errorf("b is gone, but d shows %+v", got)
	}
	close(release)
	for _, m := range []*task.Manager{a, c, d} {
		if got, err := m.Wait(t.Context(), op.ID); err != nil || got.State != task.StateDone {
			t.Errorf("Wait = %+v, %v", got, err)
		}
	}
}

// With no busy timeout the store itself waits for the lock.
func TestLocked(t *testing.T) {
	for _, journal := range []string{"DELETE", "WAL"} {
		t.Run(journal, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "app.db")
			execute(t, openDB(t, path), app+"PRAGMA journal_mode = "+journal)
			m, _ := open(t, openDB(t, path, "busy_timeout(0)"))
			other, err := openDB(t, path, "busy_timeout(10000)").Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			for _, lock := range []string{"BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"} {
				if _, err := other.ExecContext(t.Context(), lock+"; INSERT INTO users (name) VALUES ('"+lock+"')"); err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 2)
				go func() {
					_, err := m.Submit("late", work)
					done <- err
				}()
				select {
				case err := <-done:
					t.Errorf("Submit returned %v while the database was locked", err)
				case <-time.After(50 * time.Millisecond):
				}
				go func() {
					_, err := m.List(10, 0)
					done <- err
				}()
				if _, err := other.ExecContext(t.Context(), "COMMIT"); err != nil {
					t.Fatal(err)
				}
				for range cap(done) {
					select {
					case err := <-done:
						if err != nil {
							t.Error(err)
						}
					case <-time.After(30 * time.Second):
						t.Fatal("still waiting after 30 s")
					}
				}
			}
		})
	}
}

// The times that this driver writes, in each of its formats, are read.
func TestTimes(t *testing.T) {
	at := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.FixedZone("CEST", 2*60*60))
	for _, format := range []string{"", "sqlite", "datetime"} {
		for name, at := range map[string]time.Time{"past": at, "in UTC": at.UTC(), "now, with its monotonic part": time.Now()} {
			t.Run(format+" "+name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "app.db")
				dsn := "file:" + filepath.ToSlash(path)
				if format != "" {
					dsn += "?_time_format=" + format
				}
				db, err := sql.Open("sqlite", dsn)
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				execute(t, db, schema)
				execute(t, db, `INSERT INTO tasks (id, name, state, created_at, updated_at) VALUES ('a', 'a', 'DONE', ?, ?)`, at, at.Format(time.RFC3339Nano))
				m, _ := open(t, db)
				op, ok := m.Get("a")
				if !ok {
					t.Fatal("not found")
				}
				want := at
				if format == "datetime" { // which forgets the zone
					want = time.Date(at.Year(), at.Month(), at.Day(), at.Hour(), at.Minute(), at.Second(), 0, time.UTC)
				}
				if !op.CreatedAt.Equal(want) || !op.UpdatedAt.Equal(at) {
					t.Errorf("created %v, updated %v, want %v", op.CreatedAt, op.UpdatedAt, at)
				}
			})
		}
	}
}

func TestRecovery(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "app.db"))
	db.SetMaxOpenConns(1)
	execute(t, db, app+schema)
	execute(t, db, `INSERT INTO tasks (id, name, state, metadata, result, created_at, updated_at) VALUES
		('a', 'a', 'DONE', '', 'null', CURRENT_TIMESTAMP, 'garbage'), ('b', 'b', 'RUNNING', 'no json', NULL, x'00', NULL),
		('c', 'c', 'PENDING', '{"k":1}', '[1]', '2024-05-06T07:08:09Z', '2024-05-06 07:08:09.5 +0200 CEST m=+0.1'), (x'64', x'64', 'paused', x'ff', 1.5, 1.5, 0)`)
	m, _ := open(t, db)
	ops, err := m.List(10, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, op := range ops {
		got = append(got, fmt.Sprint(op.ID, " ", op.State, " ", op.Error, " ", op.Metadata, " ", op.Result))
	}
	want := []string{"d paused  <nil> 1.5", "c FAILED Task failed due to system restart map[k:1] [1]",
		"b FAILED Task failed due to system restart <nil> <nil>", "a DONE  <nil> <nil>"}
	if !slices.Equal(got, want) {
		t.Errorf("List = %q\nwant  %q", got, want)
	}
}

// One bad row fails alone with this driver too, and what is refused is told soon.
func TestRefused(t *testing.T) {
	for name, script := range map[string]string{
		"view":          "CREATE VIEW tasks AS SELECT 1",
		"WITHOUT ROWID": strings.Replace(schema, "\n);", "\n) WITHOUT ROWID;", 1),
		"columns":       "CREATE TABLE tasks (id)",
		"trigger":       schema + "CREATE TRIGGER no BEFORE INSERT ON tasks BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
	} {
		t.Run(name, func(t *testing.T) {
			db := openDB(t, filepath.Join(t.TempDir(), "app.db"))
			execute(t, db, app+script)
			before := dump(t, db)
			start := time.Now()
			if s, err := task.NewSQLiteStore(db); err == nil {
				s.Close()
				t.Error("it succeeded")
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
			if after := dump(t, db); after != before {
				t.Errorf("the database is %s\nand was %s", after, before)
			}
		})
	}
}

func TestBatch(t *testing.T) {
	for _, kind := range []string{"ABORT", "FAIL", "ROLLBACK"} {
		t.Run(kind, func(t *testing.T) {
			db := openDB(t, filepath.Join(t.TempDir(), "app.db"))
			_, s := open(t, db)
			execute(t, db, "CREATE TRIGGER no BEFORE INSERT ON tasks WHEN NEW.name = 'bad' BEGIN SELECT RAISE("+kind+", 'no'); END")
			var ops []*task.Operation
			for _, name := range []string{"a", "bad", "c"} {
				ops = append(ops, &task.Operation{ID: name, Name: name, State: task.StatePending, CreatedAt: time.Now(), UpdatedAt: time.Now()})
			}
			errs := s.WriteBatch(ops, nil)
			if errs[0] != nil || errs[1] == nil || errs[2] != nil {
				t.Errorf("errors %v, want the second alone", errs)
			}
			list, err := s.List(10, 0)
			if err != nil || len(list) != 2 || list[0].ID != "c" || list[1].ID != "a" {
				t.Errorf("List = %v, %v", list, err)
			}
		})
	}
}
