// Package testkit contains what the tests of this module share: stores and managers
// that are closed and checked for leaks at the end of a test, functions to submit and
// compare operations, a fake store, a readable log, and child processes.
package testkit

import (
	"context"
	"database/sql"
	"errors"
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
)

// The texts in Operation.Error of operations whose manager or process ended.
const (
	RestartText  = "Task failed due to system restart"
	ShutdownText = "Task failed due to system shutdown"
)

// ErrDisk is an error for stores to return in tests.
var ErrDisk = errors.New("disk full")

// Quiet discards the log of a manager.
var Quiet = task.WithLogger(slog.New(slog.DiscardHandler))

// Must stops the test if err is not nil.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Until polls cond until it is true. It returns an error after a minute.
func Until(cond func() bool) error {
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("the condition does not hold after a minute")
		}
	}
	return nil
}

// Path returns the path of a database that does not exist yet, in a directory of the
// test.
func Path(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "tasks.db")
}

// FastPath is Path in a directory in memory, if the system has one: for tests that open
// hundreds of databases and do not test durability.
func FastPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "task-test-")
	if err != nil {
		return Path(t)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "tasks.db")
}

// OpenSQLite opens a store, and closes it at the end of the test.
func OpenSQLite(t testing.TB, path string) *task.SQLiteStore {
	t.Helper()
	testos.CheckLeaks(t)
	store, err := task.OpenSQLite(path)
	Must(t, err)
	t.Cleanup(func() { store.Close() })
	return store
}

// Exec runs a statement on a database, on its own connection.
func Exec(t testing.TB, path, stmt string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite3", path)
	Must(t, err)
	defer db.Close()
	_, err = db.Exec(stmt, args...)
	Must(t, err)
}

// Traces returns everything that a read-only program must not change in a database: its
// schema, its settings, and the files in its directory. It omits those of the WAL,
// which SQLite itself removes when the last process closes the database.
func Traces(t testing.TB, path string) (all []string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
	Must(t, err)
	files = slices.DeleteFunc(files, func(f string) bool { return f == path+"-wal" || f == path+"-shm" })
	db, err := sql.Open("sqlite3", path)
	Must(t, err)
	defer db.Close()
	rows, err := db.Query(`SELECT coalesce(sql, name) FROM sqlite_master UNION ALL SELECT user_version FROM pragma_user_version
		UNION ALL SELECT schema_version FROM pragma_schema_version UNION ALL SELECT journal_mode FROM pragma_journal_mode`)
	Must(t, err)
	defer rows.Close()
	for rows.Next() {
		var s string
		Must(t, rows.Scan(&s))
		all = append(all, s)
	}
	Must(t, rows.Err())
	return append(all, files...)
}

// Bare returns db with only the four methods, without its abilities.
func Bare(db task.Persistence) task.Persistence { return bare{db} }

type bare struct{ task.Persistence }

// Stores lists the kinds of store, all of which must behave the same.
var Stores = map[string]func(t testing.TB) task.Persistence{
	"memory":       func(testing.TB) task.Persistence { return task.NewMemoryStore() },
	"four methods": func(testing.TB) task.Persistence { return Bare(task.NewMemoryStore()) },
	"sqlite":       func(t testing.TB) task.Persistence { return OpenSQLite(t, Path(t)) },
}

// EachStore runs a test with a manager on each kind of store.
func EachStore(t *testing.T, test func(t *testing.T, m *task.Manager, db task.Persistence)) {
	for name, open := range Stores {
		t.Run(name, func(t *testing.T) {
			db := open(t)
			test(t, NewManager(t, db), db)
		})
	}
}

// NewManager returns a manager that logs nothing, unless an option says otherwise. It
// is closed at the end of the test.
func NewManager(t testing.TB, db task.Persistence, opts ...task.Option) *task.Manager {
	t.Helper()
	testos.CheckLeaks(t)
	m, err := task.New(db, append([]task.Option{Quiet}, opts...)...)
	Must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// NewLogged returns a manager and its log. Closing the manager must return no error.
func NewLogged(t testing.TB, db task.Persistence) (*task.Manager, *Log) {
	t.Helper()
	l := new(Log)
	m := NewManager(t, db, l.Option())
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, l
}

// Submit submits an operation called "test".
func Submit(t testing.TB, m *task.Manager, fn task.Func, opts ...task.SubmitOption) *task.Operation {
	t.Helper()
	op, err := m.Submit("test", fn, opts...)
	Must(t, err)
	return op
}

// Wait waits until an operation has finished.
func Wait(t testing.TB, m *task.Manager, id string) *task.Operation {
	t.Helper()
	op, err := m.Wait(t.Context(), id)
	Must(t, err)
	return op
}

// Nothing is a Func that returns at once.
func Nothing(context.Context, func(int)) (any, error) { return nil, nil }

// UntilCancelled is a Func that returns the cause of its cancellation.
func UntilCancelled(ctx context.Context, _ func(int)) (any, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// History submits operations with those names, one after the other. The first letter of
// a name is that of the state in which the operation stays.
func History(t testing.TB, m *task.Manager, names ...string) {
	t.Helper()
	for _, name := range names {
		op, err := m.Submit(name, func(ctx context.Context, _ func(int)) (any, error) {
			switch name[0] {
			case 'D':
				return nil, nil
			case 'F':
				return nil, errors.New("broken")
			case 'C':
				op, _ := task.FromContext(ctx)
				op.Cancel()
			}
			<-ctx.Done()
			return nil, ctx.Err()
		})
		Must(t, err)
		if strings.ContainsAny(name[:1], "DFC") {
			Wait(t, m, op.ID)
		}
	}
}

// Names returns the names of operations, separated by spaces.
func Names(ops []*task.Operation) string {
	var names []string
	for _, op := range ops {
		names = append(names, op.Name)
	}
	return strings.Join(names, " ")
}

// Blocker returns a Func that returns err once it is released, and a channel that is
// closed when the Func has started.
func Blocker(err error) (fn task.Func, started chan struct{}, release func()) {
	started = make(chan struct{})
	released := make(chan struct{})
	fn = func(context.Context, func(int)) (any, error) {
		close(started)
		<-released
		return nil, err
	}
	return fn, started, sync.OnceFunc(func() { close(released) })
}
