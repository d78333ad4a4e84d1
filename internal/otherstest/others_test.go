package otherstest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

func TestMain(m *testing.M) {
	testkit.Main(m, nil)
}

// pairs lists the ways in which two managers share a database.
var pairs = map[string]func(t *testing.T) (a, b task.Persistence){
	"two stores": func(t *testing.T) (a, b task.Persistence) {
		path := testkit.Path(t)
		return testkit.OpenSQLite(t, path), testkit.OpenSQLite(t, path)
	},
	"one store": func(t *testing.T) (a, b task.Persistence) {
		store := testkit.OpenSQLite(t, testkit.Path(t))
		return store, store
	},
	"one connection each": func(t *testing.T) (a, b task.Persistence) {
		path := testkit.Path(t)
		return inApp(t, path), inApp(t, path)
	},
	"memory": func(*testing.T) (a, b task.Persistence) {
		store := task.NewMemoryStore()
		return store, store
	},
}

// inApp returns a store in an application's database with one connection.
func inApp(t *testing.T, path string) task.Persistence {
	db, err := sql.Open("sqlite3", path+"?_journal_mode=WAL&_busy_timeout=5000")
	testkit.Must(t, err)
	t.Cleanup(func() { db.Close() })
	db.SetMaxOpenConns(1)
	store, err := task.NewSQLiteStore(db)
	testkit.Must(t, err)
	t.Cleanup(func() { store.Close() })
	return store
}

// eachPair runs a test with each pair of managers. The pairs run in parallel, because
// most of a test is waiting.
func eachPair(t *testing.T, test func(t *testing.T, a, b *task.Manager)) {
	testos.CheckLeaks(t) // after all have ended
	for name, open := range pairs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			one, two := open(t)
			test(t, testkit.NewManager(t, one, task.WithLimit(2)), testkit.NewManager(t, two))
		})
	}
}

// TestCancel cancels a running operation of the other manager.
func TestCancel(t *testing.T) {
	testos.Parallel(t)
	eachPair(t, func(t *testing.T, a, b *task.Manager) {
		cause := make(chan error, 1)
		fn := func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			cause <- context.Cause(ctx)
			return nil, ctx.Err()
		}
		running := testkit.Submit(t, a, fn)
		stubborn, started, release := testkit.Blocker(errors.New("too late"))
		insists := testkit.Submit(t, a, stubborn)
		<-started
		pending := testkit.Submit(t, a, testkit.Nothing)
		time.Sleep(150 * time.Millisecond) // at any time, not just at the start

		begin := time.Now()
		testkit.Must(t, b.CancelCause(running.ID, "by an administrator"))
		testkit.Must(t, b.CancelCause(running.ID, "by another one"))
		if err := <-cause; !errors.Is(err, task.ErrCancelled) || err.Error() != "operation cancelled: by an administrator" {
			t.Errorf("the cause is %v", err)
		}
		if took := time.Since(begin); took > 10*time.Second { // processtest measures the delay
			t.Errorf("it took %v", took)
		}
		if got := testkit.Wait(t, b, running.ID); got.State != task.StateCancelled || got.Error != "by an administrator" || got.Cancelling {
			t.Errorf("%+v", got)
		}
		testkit.Must(t, b.Cancel(insists.ID))
		for _, m := range []*task.Manager{a, b} {
			err := testkit.Until(func() bool { op, _ := m.Get(insists.ID); return op.Cancelling && op.State == task.StateRunning })
			testkit.Must(t, err)
			got, err := m.List(3, 0, task.ByState(task.StateRunning))
			if err != nil || !slices.ContainsFunc(got, func(op *task.Operation) bool { return op.ID == insists.ID && op.Cancelling }) {
				t.Errorf("List: %v, %v", got, err)
			}
		}
		// Its slot is taken, and the first operation's slot is free again.
		last := testkit.Submit(t, a, testkit.Nothing)
		testkit.Wait(t, b, pending.ID)
		testkit.Wait(t, b, last.ID)
		release()
		if got := testkit.Wait(t, b, insists.ID); got.State != task.StateCancelled || got.Error != "too late" || got.Cancelling {
			t.Errorf("%+v", got)
		}
		for _, id := range []string{running.ID, "unknown"} {
			if err := b.Cancel(id); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Cancel of %s: %v", id, err)
			}
		}
	})
}

// TestCancelPending cancels a waiting operation of the other manager.
func TestCancelPending(t *testing.T) {
	testos.Parallel(t)
	eachPair(t, func(t *testing.T, a, b *task.Manager) {
		fn, started, release := testkit.Blocker(nil)
		defer release()
		testkit.Submit(t, a, fn, task.WithLock("pool"))
		<-started
		never := func(context.Context, func(int)) (any, error) {
			t.Error("its function runs")
			return nil, nil
		}
		op := testkit.Submit(t, a, never, task.WithLock("pool"))
		testkit.Must(t, b.Cancel(op.ID))
		if got := testkit.Wait(t, b, op.ID); got.State != task.StateCancelled || !got.StartedAt.IsZero() {
			t.Errorf("%+v", got)
		}
	})
}

// TestCancelUnsupported: Cancel returns ErrUnsupported if the store lacks the ability.
func TestCancelUnsupported(t *testing.T) {
	testos.Parallel(t)
	db := testkit.Bare(task.NewMemoryStore())
	m := testkit.NewManager(t, db)
	testkit.Must(t, db.Save(&task.Operation{ID: "other's", Name: "scrub", State: task.StateRunning}))
	testkit.Must(t, db.Save(&task.Operation{ID: "done", Name: "scrub", State: task.StateDone}))
	if err := m.Cancel("other's"); !errors.Is(err, errors.ErrUnsupported) || errors.Is(err, task.ErrNotFound) {
		t.Errorf("Cancel: %v", err)
	}
	for _, id := range []string{"done", "unknown"} {
		if err := m.Cancel(id); !errors.Is(err, task.ErrNotFound) || errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Cancel of %s: %v", id, err)
		}
	}
}

// TestCancelling: a manager's own Cancel is visible at once, and stored with the next
// changes, whatever they are.
func TestCancelling(t *testing.T) {
	testos.Parallel(t)
	for name, open := range pairs {
		t.Run(name, func(t *testing.T) {
			db, other := open(t)
			m := testkit.NewManager(t, db)
			next := make(chan int)
			op := testkit.Submit(t, m, func(_ context.Context, update func(int)) (any, error) {
				for progress := range next {
					update(progress)
				}
				return nil, nil
			})
			next <- 1
			changes := m.Watch(t.Context(), op.ID)
			testkit.Must(t, m.Cancel(op.ID))
			if got, _ := m.Get(op.ID); !got.Cancelling {
				t.Errorf("Get: %+v", got)
			}
			next <- 50
			testkit.Must(t, testkit.Until(func() bool {
				row, err := other.Get(op.ID)
				return err == nil && row.Cancelling && row.Progress == 50
			}))
			close(next)
			told := false
			for got, err := range changes {
				testkit.Must(t, err)
				if told = told || got.Cancelling; got.State.Finished() && got.Cancelling {
					t.Errorf("%+v", got)
				}
			}
			if row, err := other.Get(op.ID); !told || err != nil || row.Cancelling || row.State != task.StateDone {
				t.Errorf("told %t, stored %+v, %v", told, row, err)
			}
		})
	}
}

// A watch records what one call of Watch yields.
type watch struct {
	t     *testing.T
	mu    sync.Mutex
	last  map[string]*task.Operation
	ends  map[string]int
	order []string // IDs by first appearance
	done  chan struct{}
}

// watchAll begins a watch before it returns.
func watchAll(t *testing.T, ctx context.Context, m *task.Manager) *watch {
	w := &watch{t: t, last: make(map[string]*task.Operation), ends: make(map[string]int), done: make(chan struct{})}
	changes := m.Watch(ctx)
	go func() {
		defer close(w.done)
		for op, err := range changes {
			if err != nil {
				t.Errorf("Watch: %v", err)
				return
			}
			w.note(op)
		}
	}()
	return w
}

func (w *watch) note(op *task.Operation) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.last[op.ID]
	switch {
	case before == nil:
		w.order = append(w.order, op.ID)
	case before.State.Finished() || op.State == task.StatePending && before.State != op.State || op.UpdatedAt.Before(before.UpdatedAt):
		w.t.Errorf("%s %s after %s", op.ID, op.State, before.State)
	}
	if w.last[op.ID] = op; op.State.Finished() {
		w.ends[op.ID]++
	}
}

// state returns the last state of an operation that was yielded, or "".
func (w *watch) state(id string) task.State {
	w.mu.Lock()
	defer w.mu.Unlock()
	if op := w.last[id]; op != nil {
		return op.State
	}
	return ""
}

// wantEnds waits until the final state of each operation has been yielded.
func (w *watch) wantEnds(ids ...string) {
	w.t.Helper()
	for _, id := range ids {
		if err := testkit.Until(func() bool { return w.state(id).Finished() }); err != nil {
			w.t.Fatalf("the end of %s: %v", id, err)
		}
	}
}

// TestWatch: a watcher gets all live operations, and each new one.
func TestWatch(t *testing.T) {
	testos.Parallel(t)
	eachPair(t, func(t *testing.T, a, b *task.Manager) {
		fn, started, release := testkit.Blocker(nil)
		live := testkit.Submit(t, a, fn, task.WithMetadata("tank"))
		<-started
		own := testkit.Submit(t, b, testkit.UntilCancelled)
		old := testkit.Submit(t, a, testkit.Nothing)
		testkit.Wait(t, a, old.ID)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		present, _, err := b.Raw().Subscribe(ctx)
		testkit.Must(t, err)
		if len(present) != 2 || present[0].ID != live.ID || present[1].ID != own.ID {
			t.Errorf("present: %v", present)
		}
		w := watchAll(t, ctx, b)
		var ids []string
		for range 200 { // most of them begin and end between two looks
			ids = append(ids, testkit.Submit(t, a, testkit.Nothing).ID, testkit.Submit(t, b, testkit.Nothing).ID)
		}
		w.wantEnds(ids...)
		release()
		w.wantEnds(live.ID)
		testkit.Must(t, a.Cancel(own.ID))
		w.wantEnds(own.ID)
		time.Sleep(300 * time.Millisecond) // nothing may be yielded again
		stop()
		<-w.done
		if w.state(old.ID) != "" || len(w.last) != len(ids)+2 {
			t.Errorf("%d operations, want %d", len(w.last), len(ids)+2)
		}
		if got := w.last[live.ID]; got.Metadata != "tank" || got.Progress != 100 {
			t.Errorf("%+v", got)
		}
		for id, n := range w.ends {
			if n != 1 {
				t.Errorf("the end of %s was told %d times", id, n)
			}
		}
	})
}

// TestWatchAtAnyTime starts watchers while operations come and go. Some of these also
// have waiters.
func TestWatchAtAnyTime(t *testing.T) {
	testos.Parallel(t)
	eachPair(t, func(t *testing.T, a, b *task.Manager) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var all []string
		var watches []*watch
		since := make(map[*watch]int) // number of operations submitted before
		var waiters sync.WaitGroup
		for i := range 160 {
			m := []*task.Manager{a, b}[i%2]
			op := testkit.Submit(t, m, func(context.Context, func(int)) (any, error) {
				time.Sleep(time.Duration(i%7) * 4 * time.Millisecond)
				return nil, nil
			})
			all = append(all, op.ID)
			if i%3 == 0 {
				waiters.Go(func() { testkit.Wait(t, b, op.ID) })
			}
			if i%20 == 0 {
				w := watchAll(t, ctx, b)
				since[w] = len(all)
				watches = append(watches, w)
			}
		}
		waiters.Wait()
		for _, w := range watches {
			w.wantEnds(all[since[w]:]...)
		}
		time.Sleep(300 * time.Millisecond)
		stop()
		for _, w := range watches {
			<-w.done
			for id, op := range w.last { // including those that were live when it began
				if w.ends[id] != 1 {
					t.Errorf("the end of %+v was told %d times", op, w.ends[id])
				}
			}
		}
	})
}

// TestWatchLargeValues: values that a look does not read at once are yielded, too.
func TestWatchLargeValues(t *testing.T) {
	testos.Parallel(t)
	eachPair(t, func(t *testing.T, a, b *task.Manager) {
		large := string(make([]byte, 10_000))
		fn, started, release := testkit.Blocker(nil)
		live := testkit.Submit(t, a, fn, task.WithMetadata(large))
		<-started
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		w := watchAll(t, ctx, b)
		quick := testkit.Submit(t, a, func(context.Context, func(int)) (any, error) { return large, nil })
		w.wantEnds(quick.ID)
		release()
		w.wantEnds(live.ID)
		if w.last[live.ID].Metadata != large || w.last[quick.ID].Result != large {
			t.Error("the values are missing")
		}
	})
}

// TestWatchDeleted: a subscriber of all operations gets no separate error when an
// operation of another manager is deleted.
func TestWatchDeleted(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	a, b := testkit.NewManager(t, testkit.OpenSQLite(t, path)), testkit.NewManager(t, testkit.OpenSQLite(t, path))
	op := testkit.Submit(t, a, testkit.UntilCancelled)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	present, changes, err := b.Raw().Subscribe(ctx)
	testkit.Must(t, err)
	if len(present) != 1 {
		t.Fatalf("present: %v", present)
	}
	testkit.Exec(t, path, "DELETE FROM tasks")
	for got, err := range changes {
		if errors.Is(err, task.ErrNotFound) && got.ID == op.ID {
			break
		}
		testkit.Must(t, err)
	}
}

// TestStoreHangs: a store that hangs delays Watch by a few seconds, and no operation of
// this manager. One that fails delays nothing.
func TestStoreHangs(t *testing.T) {
	testos.Parallel(t)
	for _, hangs := range []bool{true, false} {
		t.Run(fmt.Sprintf("hangs=%t", hangs), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				db, repaired := testkit.NewFake(memory), make(chan struct{})
				a, b := testkit.NewManager(t, memory), testkit.NewManager(t, db)
				db.Before(func(c *testkit.Call) error {
					if c.Method != "ListFiltered" {
						return nil
					}
					if hangs {
						<-repaired
						return nil
					}
					return testkit.ErrDisk
				})
				others := testkit.Submit(t, a, testkit.UntilCancelled)
				ctx, stop := context.WithCancel(t.Context())
				begin := time.Now()
				w := watchAll(t, ctx, b)
				if took := time.Since(begin); took > 10*time.Second || !hangs && took > 0 {
					t.Errorf("Watch took %v", took)
				}
				own := testkit.Submit(t, b, testkit.Nothing)
				time.Sleep(time.Second)
				if w.state(own.ID) != task.StateDone || w.state(others.ID) != "" {
					t.Errorf("told: own %q, other's %q", w.state(own.ID), w.state(others.ID))
				}
				close(repaired)
				db.Before(nil)
				time.Sleep(time.Second)
				if got := w.state(others.ID); got != task.StateRunning {
					t.Errorf("told: other's %q", got)
				}
				stop()
				<-w.done
			})
		})
	}
}

// TestHistoryIsNotRead counts the rows that looks read, also after the place in the
// history was lost.
func TestHistoryIsNotRead(t *testing.T) {
	testos.Parallel(t)
	const rows = 60_000
	path := testkit.FastPath(t)
	store := testkit.OpenSQLite(t, path)
	testkit.Exec(t, path, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
		INSERT INTO tasks (id, name, state, created_at, updated_at) SELECT printf('%06d', i), 'old', 'DONE',
		'2020-01-01 00:00:00.000000', '2020-01-01 00:00:00.000000' FROM n`, rows)
	db := testkit.NewFake(store)
	var mu sync.Mutex
	read := 0
	db.After(func(c *testkit.Call) {
		mu.Lock()
		defer mu.Unlock()
		read += len(c.Ops)
	})
	take := func() (n int) {
		mu.Lock()
		defer mu.Unlock()
		n, read = read, 0
		return n
	}
	a, b := testkit.NewManager(t, testkit.OpenSQLite(t, path)), testkit.NewManager(t, db)
	take()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	w := watchAll(t, ctx, b)
	if n := take(); n > 2000 {
		t.Errorf("Watch has read %d rows", n)
	}
	for _, tt := range []struct {
		name, change string
		most         int
	}{
		{"new rows", "", 20_000}, // several pages for each look
		{"place lost", `DELETE FROM tasks WHERE rowid > 58500`, 30_000},
		{"renumbered", `VACUUM`, 20_000},
	} {
		if tt.change != "" {
			testkit.Exec(t, path, tt.change)
		}
		var ids []string
		for range 50 {
			ids = append(ids, testkit.Submit(t, a, testkit.Nothing).ID)
		}
		w.wantEnds(ids...)
		if n := take(); n > tt.most {
			t.Errorf("%s: looks have read %d rows", tt.name, n)
		}
	}
	if len(w.last) != 150 {
		t.Errorf("told of %d operations", len(w.last))
	}
}

// TestManyWaiters: looks read little, however many callers wait for one operation or
// for many.
func TestManyWaiters(t *testing.T) {
	testos.Parallel(t)
	path := testkit.FastPath(t)
	a := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	db := testkit.NewFake(testkit.OpenSQLite(t, path))
	b := testkit.NewManager(t, db)
	const waiters = 1000
	var wg sync.WaitGroup
	release := make(chan struct{})
	for range waiters {
		op := testkit.Submit(t, a, func(context.Context, func(int)) (any, error) { <-release; return nil, nil })
		wg.Go(func() { testkit.Wait(t, b, op.ID) })
	}
	testkit.Must(t, testkit.Until(func() bool { return db.Count("Get") >= 2*waiters })) // all have begun to wait
	time.Sleep(300 * time.Millisecond)
	gets, lists := db.Count("Get"), db.Count("ListFiltered")
	time.Sleep(time.Second)
	if gets, lists = db.Count("Get")-gets, db.Count("ListFiltered")-lists; gets > 0 || lists > 2 {
		t.Errorf("while nothing changes: %d calls of Get, %d of ListFiltered", gets, lists)
	}
	close(release)
	wg.Wait()
}

// TestIdle: looks end when nothing needs them.
func TestIdle(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		memory := task.NewMemoryStore()
		db := testkit.NewFake(memory)
		a, b := testkit.NewManager(t, memory), testkit.NewManager(t, db)
		idle := func(when string) {
			t.Helper()
			synctest.Wait()
			before := calls(db)
			time.Sleep(time.Hour)
			if n := calls(db) - before; n > 0 {
				t.Errorf("%s: %d calls in an hour", when, n)
			}
		}
		idle("at the start")
		op := testkit.Submit(t, b, testkit.UntilCancelled)
		time.Sleep(time.Second)
		if n := db.Count("CancelRequests"); n < 5 || n > 11 {
			t.Errorf("%d looks for requests in a second", n)
		}
		b.Cancel(op.ID)
		testkit.Wait(t, b, op.ID)
		idle("after an own operation")

		others := testkit.Submit(t, a, testkit.UntilCancelled)
		ctx, stop := context.WithCancel(t.Context())
		b.Watch(ctx)
		go b.Wait(ctx, others.ID)
		time.Sleep(time.Second)
		stop()
		idle("after a watcher and a waiter")
		b.Watch(t.Context())
		b.Close()
		idle("after Close")
	})
}

func calls(db *testkit.Fake) (n int) {
	for _, method := range []string{"Get", "List", "ListFiltered", "CancelRequests", "Changes", "Recover", "WriteBatch"} {
		n += db.Count(method)
	}
	return n
}

// TestWaitEnds: waiters for an operation of another manager get ErrClosed after manager
// and store were closed, and Close leaves no connection open.
func TestWaitEnds(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	other := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	op := testkit.Submit(t, other, testkit.UntilCancelled)
	store := testkit.OpenSQLite(t, path)
	m := testkit.NewManager(t, store)
	waited := make(chan error)
	go func() {
		_, err := m.Wait(t.Context(), op.ID)
		waited <- err
	}()
	time.Sleep(500 * time.Millisecond) // until it looks for changes
	testkit.Must(t, m.Close())
	testkit.Must(t, store.Close())
	select {
	case err := <-waited:
		if !errors.Is(err, task.ErrClosed) {
			t.Errorf("Wait: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("Wait hangs")
	}
}

// TestManyManagers: the looks of several managers on one store leave connections for
// everything else.
func TestManyManagers(t *testing.T) {
	testos.Parallel(t)
	db := testkit.OpenSQLite(t, testkit.Path(t))
	var managers []*task.Manager
	var ops []*task.Operation
	for range 8 {
		m := testkit.NewManager(t, db)
		managers = append(managers, m)
		ops = append(ops, testkit.Submit(t, m, testkit.UntilCancelled))
	}
	time.Sleep(300 * time.Millisecond) // until all look
	start := time.Now()
	for i, m := range managers {
		if got, err := m.List(10, 0); err != nil || len(got) != len(ops) {
			t.Errorf("List: %d operations, %v", len(got), err)
		}
		testkit.Must(t, m.Cancel(ops[(i+1)%len(ops)].ID))
	}
	for i, m := range managers {
		if op := testkit.Wait(t, m, ops[i].ID); op.State != task.StateCancelled {
			t.Errorf("%+v", op)
		}
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}
