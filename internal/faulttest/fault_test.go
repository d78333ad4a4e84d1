package faulttest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/sqlitefile"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

func TestMain(m *testing.M) {
	testkit.Main(m, nil)
}

// TestDatabaseFull limits the pages of an application's database. SQLite reports that
// like a full disk.
func TestDatabaseFull(t *testing.T) {
	db, err := sql.Open("sqlite3", filepath.Join(t.TempDir(), "app.db")+"?_journal_mode=WAL")
	testkit.Must(t, err)
	t.Cleanup(func() { db.Close() })
	db.SetMaxOpenConns(1) // otherwise the PRAGMA would reach only one of several
	store, err := task.NewSQLiteStore(db)
	testkit.Must(t, err)
	limit := func(pages int) {
		_, err := db.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", pages))
		testkit.Must(t, err)
	}
	fullDisk(t, store, func() { limit(100) }, func() { limit(1 << 30) })
	testkit.Must(t, store.Close())
}

// fullDisk fills the disk under a store while an operation runs, and then frees space
// again.
func fullDisk(t *testing.T, store task.Persistence, fill, clear func()) {
	m, err := task.New(store, testkit.Quiet)
	testkit.Must(t, err)
	defer m.Close()
	large := strings.Repeat("large ", 100_000)
	release := make(chan struct{})
	held := testkit.Submit(t, m, func(context.Context, func(int)) (any, error) { <-release; return large, nil })

	fill()
	submitted, called := untilFull(t, m, large[:10_000])
	acknowledged := append([]string{held.ID}, submitted...)
	close(release)
	testkit.Must(t, testkit.Until(func() bool {
		op, ok := m.Get(held.ID)
		return ok && op.Error != ""
	}))
	op, _ := m.Get(held.ID)
	if op.State != task.StateRunning || !strings.Contains(op.Error, "DONE, which can't be stored yet") {
		t.Errorf("while the disk is full: %s, %q", op.State, op.Error)
	}
	if err := m.Cancel(held.ID); err != nil {
		t.Errorf("Cancel: %v", err)
	}
	if ops, err := m.List(20_000, 0); err != nil || len(ops) < len(acknowledged) {
		t.Errorf("List: %d operations, %v", len(ops), err)
	}

	clear()
	if op := testkit.Wait(t, m, held.ID); op.State != task.StateDone || op.Result != large || op.Error != "" {
		t.Errorf("in the end it is %s, a result of %d bytes, %q", op.State, len(fmt.Sprint(op.Result)), op.Error)
	}
	acknowledged = append(acknowledged, testkit.Submit(t, m, testkit.Nothing).ID)
	testkit.Must(t, m.Shutdown(t.Context()))
	for _, id := range acknowledged {
		if op, err := store.Get(id); err != nil || op.State != task.StateDone {
			t.Errorf("%s: %+v, %v", id, op, err)
		}
	}
	if called.Load() != int64(len(acknowledged)-2) {
		t.Errorf("%d functions were called, %d acknowledged", called.Load(), len(acknowledged)-2)
	}
}

// untilFull submits operations until the disk is full. It returns the IDs of the
// acknowledged ones, and counts the calls of their functions.
func untilFull(t *testing.T, m *task.Manager, metadata string) (ids []string, called *atomic.Int64) {
	t.Helper()
	called = new(atomic.Int64)
	for len(ids) < 10_000 {
		op, err := m.Submit("one more", func(context.Context, func(int)) (any, error) {
			called.Add(1)
			return nil, nil
		}, task.WithMetadata(metadata))
		if err != nil {
			if !strings.Contains(err.Error(), "full") {
				t.Errorf("Submit: %v", err)
			}
			return ids, called
		}
		ids = append(ids, op.ID)
	}
	t.Fatal("the disk never gets full")
	return nil, nil
}

// TestOpenLocked: OpenSQLite waits for a lock, but not forever, and may be called
// again.
func TestOpenLocked(t *testing.T) {
	timeout := time.Duration(testos.Size(1, 10)) * time.Second
	before := sqlitefile.DefaultTimeout
	t.Cleanup(func() { sqlitefile.DefaultTimeout = before })
	sqlitefile.DefaultTimeout = timeout
	for _, begin := range []string{"BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"} {
		t.Run(begin, func(t *testing.T) {
			testos.Parallel(t)
			path := testkit.Path(t)
			testkit.Must(t, testkit.OpenSQLite(t, path).Close())
			other, err := sql.Open("sqlite3", path+"?_journal_mode=DELETE")
			testkit.Must(t, err)
			defer other.Close()
			c, err := other.Conn(t.Context())
			testkit.Must(t, err)
			defer c.Close()
			_, err = c.ExecContext(t.Context(), begin)
			testkit.Must(t, err)
			start := time.Now()
			s, err := task.OpenSQLite(path)
			if err == nil || s != nil || !strings.Contains(err.Error(), "database is locked: make sure") {
				t.Errorf("OpenSQLite = %v, %v", s, err)
			}
			if took := time.Since(start).Round(time.Second); took < timeout || took > 2*timeout+10*time.Second {
				t.Errorf("it took %v", took)
			}
			time.AfterFunc(300*time.Millisecond, func() { c.ExecContext(context.Background(), "ROLLBACK") })
			testkit.OpenSQLite(t, path)
		})
	}
}

// TestDatabaseTakenAway: the file is deleted or replaced while an operation runs.
// Nothing is written to another file instead.
func TestDatabaseTakenAway(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("this system keeps open files")
	}
	for name, take := range map[string]func(path string) error{
		"deleted": os.Remove,
		"replaced": func(path string) error {
			other, err := task.OpenSQLite(path + "-other")
			return errors.Join(err, other.Close(), os.Remove(path+"-wal"), os.Remove(path+"-shm"), os.Rename(path+"-other", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := testkit.Path(t)
			synctest.Test(t, func(t *testing.T) { takeAway(t, path, take) })
		})
	}
}

// takeAway checks what happens when take deletes or replaces the database file.
func takeAway(t *testing.T, path string, take func(path string) error) {
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	fn, started, release := testkit.Blocker(nil)
	held := testkit.Submit(t, m, fn)
	<-started
	testkit.Must(t, take(path))
	release()
	if _, err := m.Submit("refused", testkit.Nothing); err == nil || !strings.Contains(err.Error(), "while it was open") {
		t.Errorf("Submit: %v", err)
	}
	if _, err := m.List(10, 0); err == nil {
		t.Error("List succeeded")
	}
	if err := m.Close(); err == nil || !strings.Contains(err.Error(), held.ID) {
		t.Errorf("Close: %v, want an error that names %s", err, held.ID)
	}
	if op, ok := m.Get(held.ID); !ok || op.State != task.StateRunning || op.Error == "" {
		t.Errorf("the operation is shown as %+v", op)
	}
	if _, err := os.Stat(path); err == nil {
		if ops, err := testkit.OpenSQLite(t, path).List(10, 0); err != nil || len(ops) > 0 {
			t.Errorf("in the other file: %v, %v", ops, err)
		}
	}
}

// TestHardLink: a database file with a second name can't be opened under either name,
// and a store that is open meanwhile loses nothing.
func TestHardLink(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("this system does not tell how many links a file has")
	}
	path := filepath.Join(t.TempDir(), "tasks.db")
	link := filepath.Join(t.TempDir(), "link.db")
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	first := testkit.Submit(t, m, testkit.Nothing)
	testkit.Must(t, os.Link(path, link))
	refusesName(t, link, "2 hard links", "remove the other links, or use a copy")
	refusesName(t, path, "2 hard links", "remove the other links, or use a copy")
	second := testkit.Submit(t, m, testkit.Nothing)
	testkit.Must(t, os.Remove(link))
	other := testkit.OpenSQLite(t, path)
	for _, op := range []*task.Operation{first, second} {
		testkit.Wait(t, m, op.ID)
		if got, err := other.Get(op.ID); err != nil || got.State != task.StateDone {
			t.Errorf("%s: %+v, %v", op.ID, got, err)
		}
	}
}

// refusesName checks that no store opens the file at a path, and that OpenSQLite leaves
// no other file beside it.
func refusesName(t *testing.T, path string, want ...string) {
	t.Helper()
	before, err := os.ReadDir(filepath.Dir(path))
	testkit.Must(t, err)
	_, err = task.OpenSQLite(path)
	after, _ := os.ReadDir(filepath.Dir(path))
	if len(after) != len(before) {
		t.Errorf("OpenSQLite has left %v, there was %v", after, before)
	}
	db, openErr := sql.Open("sqlite3", path)
	testkit.Must(t, openErr)
	defer db.Close()
	_, appErr := task.NewSQLiteStore(db)
	for _, want := range append(want, path) {
		for name, err := range map[string]error{"OpenSQLite": err, "NewSQLiteStore": appErr} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s(%s) = %v, want %q", name, path, err, want)
			}
		}
	}
}

// again names the environment variable that makes a test do its work when it is run
// again in its own process.
const again = "TASK_TEST_AGAIN"

// anew returns a command that runs the calling test again.
func anew(t *testing.T, dir string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), again+"="+dir)
	cmd.Stderr = os.Stderr
	return cmd
}

// TestSIGTERM: a daemon that closes its manager on SIGTERM leaves nothing to recover.
func TestSIGTERM(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("this system has no such signal")
	}
	if dir := os.Getenv(again); dir != "" {
		daemon(t, filepath.Join(dir, "tasks.db"))
		return
	}
	dir := t.TempDir()
	cmd := anew(t, dir)
	out, err := cmd.StdoutPipe()
	testkit.Must(t, err)
	testkit.Must(t, cmd.Start())
	var said strings.Builder
	for buf := make([]byte, 1); !strings.HasSuffix(said.String(), "ready\n"); {
		if _, err := out.Read(buf); err != nil {
			t.Fatalf("%v, after %s", err, &said)
		}
		said.Write(buf)
	}
	testkit.Must(t, cmd.Process.Signal(syscall.SIGTERM))
	rest, err := io.ReadAll(out)
	testkit.Must(t, err)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s%s", err, &said, rest)
	}
	if n := testkit.OwnerFiles(t, filepath.Join(dir, "tasks.db")); n > 0 {
		t.Errorf("%d owner files are left", n)
	}
	ops, err := testkit.OpenSQLite(t, filepath.Join(dir, "tasks.db")).List(10, 0)
	if err != nil || len(ops) != 3 {
		t.Fatal(ops, err)
	}
	for i, want := range []struct {
		state    task.State
		progress int
		err      string
	}{
		{task.StateFailed, 0, "Task failed due to system shutdown"}, // it never started
		{task.StateFailed, 70, "Task failed due to system shutdown"},
		{task.StateDone, 100, ""},
	} {
		if ops[i].State != want.state || ops[i].Progress != want.progress || ops[i].Error != want.err {
			t.Errorf("operation %d is %+v, want %+v", i, ops[i], want)
		}
	}
}

// daemon runs operations until SIGTERM.
func daemon(t *testing.T, path string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	store, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	m, err := task.New(store, testkit.Quiet, task.WithLimit(1))
	testkit.Must(t, err)
	testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing).ID)
	reported := make(chan struct{})
	testkit.Submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
		update(70)
		close(reported)
		return testkit.UntilCancelled(ctx, update)
	})
	<-reported
	testkit.Submit(t, m, testkit.UntilCancelled) // waits for its turn
	fmt.Println("ready")
	<-ctx.Done()
	testkit.Must(t, errors.Join(m.Close(), store.Close()))
}

// TestClockSetBack: a history from the future affects neither the order nor live
// operations.
func TestClockSetBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks.db")
	store := testkit.OpenSQLite(t, path)
	testkit.Exec(t, path, `INSERT INTO tasks (id, name, state, created_at, updated_at) VALUES
		('ffffffff-ffff-7fff-bfff-ffffffffffff', 'from the future', 'DONE', '2126-01-01 00:00:00.000000', '2126-01-01 00:00:00.000000')`)
	m := testkit.NewManager(t, store)
	op := testkit.Submit(t, m, testkit.Nothing)
	done := testkit.Wait(t, m, op.ID)
	ops, err := m.List(10, 0)
	if err != nil || len(ops) != 2 || ops[0].ID != op.ID || done.UpdatedAt.Before(done.CreatedAt) {
		t.Errorf("List: %+v, %v", ops, err)
	}
}
