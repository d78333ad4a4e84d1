//go:build cgo && !task_nosqlite3

package sqlitetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// attach attaches to a database until the end of the test.
func attach(t *testing.T, path string) *task.SQLiteStore {
	t.Helper()
	testos.CheckLeaks(t)
	store, err := task.AttachSQLite(path)
	testkit.Must(t, err)
	t.Cleanup(func() { store.Close() })
	return store
}

// A manager on an attached store sees the operations of another one and leaves no trace
// of its own, neither in the directory, the schema and the rows, nor in operations
// whose process is dead.
func TestAttachSQLite(t *testing.T) {
	path := testkit.Path(t)
	own := testkit.OpenSQLite(t, path)
	m := testkit.NewManager(t, own)
	testkit.Exec(t, path, `PRAGMA user_version = 7`)
	fn, started, release := testkit.Blocker(nil)
	defer release()
	op := testkit.Submit(t, m, fn, task.WithMetadata("tank"))
	<-started
	testkit.Fill(t, path, 3, "dead", "-1 hour")
	testkit.Must(t, testkit.Until(func() bool {
		row, err := own.Get(op.ID)
		return err == nil && row.State == task.StateRunning
	}))
	files, rows := testkit.Traces(t, path), testkit.Stored(t, own)

	store := attach(t, path)
	if store.Owner() != "" {
		t.Errorf("Owner() = %q", store.Owner())
	}
	beside, log := testkit.NewLogged(t, store)
	if got, ok := beside.Get(op.ID); !ok || got.Metadata != "tank" || got.State != task.StateRunning || got.Owner != own.Owner() {
		t.Errorf("Get: %+v, %v", got, ok)
	}
	if page, err := beside.List(10, 0); err != nil || len(page) != 4 {
		t.Errorf("List: %d operations, %v", len(page), err)
	}
	if _, err := beside.Submit("own", testkit.Nothing); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Submit: %v", err)
	}
	if err := store.Save(&task.Operation{ID: "x", Name: "x"}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Save: %v", err)
	}
	if got := testkit.Traces(t, path); !reflect.DeepEqual(got, files) {
		t.Errorf("the database has changed:\n got %q\nwant %q", got, files)
	}
	if got := testkit.Stored(t, own); !reflect.DeepEqual(got, rows) {
		t.Errorf("rows have changed:\n got %+v\nwant %+v", got, rows)
	}
	endBeside(t, beside, op.ID, release)
	testkit.Must(t, errors.Join(beside.Close(), store.Close(), store.Close()))
	if text := log.String(); text != "" {
		t.Errorf("logged: %s", text)
	}
	if n := testkit.OwnerFiles(t, path); n != 1 {
		t.Errorf("%d owner files, want that of the first store", n)
	}
}

// endBeside cancels, awaits and prunes an operation of another manager.
func endBeside(t *testing.T, beside *task.Manager, id string, release func()) {
	t.Helper()
	if err := beside.CancelCause(id, "by hand"); err != nil {
		t.Errorf("Cancel: %v", err)
	}
	if got, ok := beside.Get(id); !ok || !got.Cancelling {
		t.Errorf("Get after Cancel: %+v, %v", got, ok)
	}
	time.AfterFunc(50*time.Millisecond, release)
	if got := testkit.Wait(t, beside, id); got.State != task.StateDone {
		t.Errorf("Wait: %+v", got)
	}
	if n, err := beside.Prune(time.Now().Add(time.Hour)); n != 1 || err != nil {
		t.Errorf("Prune: %d, %v", n, err)
	}
}

// Wait for an operation of a dead process continues, because an attached store recovers
// nothing.
func TestAttachSQLiteNeverRecovers(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	own := testkit.OpenSQLite(t, path)
	testkit.Fill(t, path, 1, "dead", "-1 hour")
	m := testkit.NewManager(t, attach(t, path))
	rows := testkit.Stored(t, own)
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond) // long enough to examine owners twice
	defer cancel()
	if op, err := m.Wait(ctx, "dead-00001"); err != ctx.Err() || op.State.Finished() {
		t.Errorf("Wait: %+v, %v", op, err)
	}
	if got := testkit.Stored(t, own); !reflect.DeepEqual(got, rows) {
		t.Errorf("rows have changed:\n got %+v\nwant %+v", got, rows)
	}
}

// An attachMaker creates what is at a path.
type attachMaker func(t *testing.T, path string)

func attachCurrent(stmt string) attachMaker {
	return func(t *testing.T, path string) {
		testkit.Must(t, testkit.OpenSQLite(t, path).Close())
		testkit.Exec(t, path, stmt)
	}
}

func attachMade(stmt string) attachMaker {
	return func(t *testing.T, path string) { testkit.Exec(t, path, stmt) }
}

func attachFile(text string) attachMaker {
	return func(t *testing.T, path string) { testkit.Must(t, os.WriteFile(path, []byte(text), 0o600)) }
}

// AttachSQLite leaves an unsuitable path unchanged, and the error says what to do.
func TestAttachSQLiteRefuses(t *testing.T) {
	const spec = `CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, progress INTEGER DEFAULT 0,
		metadata TEXT, result TEXT, error TEXT, created_at DATETIME DEFAULT CURRENT_TIMESTAMP, updated_at DATETIME DEFAULT CURRENT_TIMESTAMP)`
	for name, tt := range map[string]struct {
		make attachMaker
		want string
	}{
		"missing":          {func(*testing.T, string) {}, "name the file of an existing database"},
		"not SQLite":       {attachFile(strings.Repeat("not a database\n", 100)), "make sure that it is one"},
		"empty":            {attachFile(""), "no table tasks in it"},
		"directory":        {func(t *testing.T, path string) { testkit.Must(t, os.Mkdir(path, 0o700)) }, "choose another path"},
		"other table":      {attachMade(`CREATE TABLE tasks (id TEXT PRIMARY KEY, title TEXT)`), "has no column name, state"},
		"view":             {attachMade(`CREATE VIEW tasks AS SELECT 1 AS id`), "where a table should be"},
		"oldest":           {attachMade(spec), "made by an older version and lacks started_at"},
		"without a column": {attachCurrent(`ALTER TABLE tasks DROP COLUMN message`), "lacks message: start its program once with this version"},
		"without an index": {attachCurrent(`DROP INDEX tasks_finished`), "lacks tasks_finished"},
	} {
		t.Run(name, func(t *testing.T) {
			path := testkit.Path(t)
			tt.make(t, path)
			before, _ := os.ReadFile(path)
			store, err := task.AttachSQLite(path)
			if err == nil {
				store.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), fmt.Sprintf("%q", path)) {
				t.Errorf("error %q, want %q and the path in it", err, tt.want)
			}
			if after, _ := os.ReadFile(path); string(after) != string(before) {
				t.Error("the file has changed")
			}
			if entries, _ := filepath.Glob(path + "-*"); len(entries) > 0 {
				t.Errorf("there are new files %q", entries)
			}
		})
	}
	if _, err := task.AttachSQLite(":memory:"); err == nil {
		t.Error("attached to a new database in memory")
	}
}

// Columns of a newer version do no harm.
func TestAttachSQLiteNewer(t *testing.T) {
	path := testkit.Path(t)
	op := testkit.Submit(t, testkit.NewManager(t, testkit.OpenSQLite(t, path)), testkit.Nothing)
	testkit.Exec(t, path, `ALTER TABLE tasks ADD COLUMN priority INTEGER`)
	if got, err := attach(t, path).Get(op.ID); err != nil || got.Name != "test" {
		t.Errorf("Get: %+v, %v", got, err)
	}
}
