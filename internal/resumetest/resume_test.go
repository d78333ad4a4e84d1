package resumetest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// resuming is a WithResume function that resumes every operation with fn.
func resuming(fn task.Func, opts ...task.SubmitOption) task.Option {
	return task.WithResume(func(*task.Operation) (task.Func, []task.SubmitOption) { return fn, opts })
}

// orphan returns a running operation of a dead process.
func orphan(id string) *task.Operation {
	at := time.Now().UTC().Add(-time.Hour).Truncate(time.Microsecond)
	return &task.Operation{ID: id, Name: "left " + id, State: task.StateRunning, Progress: 60, Message: "half done",
		Metadata: map[string]any{"place": id}, CreatedAt: at, StartedAt: at.Add(time.Second), UpdatedAt: at.Add(2 * time.Second)}
}

// leaveOrphans stores operations of a dead process in a database.
func leaveOrphans(t *testing.T, path string, ops ...*task.Operation) {
	t.Helper()
	dead := testkit.OpenSQLite(t, path)
	for _, op := range ops {
		testkit.Must(t, dead.Save(op))
	}
	testkit.Must(t, dead.Close())
}

// orphanStores lists functions that open stores with operations of a dead process.
var orphanStores = map[string]func(t *testing.T, ops ...*task.Operation) task.Persistence{
	"SQLite": func(t *testing.T, ops ...*task.Operation) task.Persistence {
		path := testkit.Path(t)
		leaveOrphans(t, path, ops...)
		return testkit.OpenSQLite(t, path)
	},
	"memory": func(t *testing.T, ops ...*task.Operation) task.Persistence {
		memory := task.NewMemoryStore()
		for _, op := range ops {
			testkit.Must(t, memory.Save(op))
		}
		return memory
	},
	"four methods": func(t *testing.T, ops ...*task.Operation) task.Persistence {
		memory := task.NewMemoryStore()
		for _, op := range ops {
			testkit.Must(t, memory.Save(op))
		}
		return testkit.Bare(memory)
	},
}

func eachOrphanStore(t *testing.T, test func(t *testing.T, open func(ops ...*task.Operation) task.Persistence)) {
	for name, open := range orphanStores {
		t.Run(name, func(t *testing.T) {
			test(t, func(ops ...*task.Operation) task.Persistence { return open(t, ops...) })
		})
	}
}

func TestResume(t *testing.T) {
	testos.Parallel(t)
	eachOrphanStore(t, func(t *testing.T, open func(ops ...*task.Operation) task.Persistence) {
		running, pending, cancelling, done := orphan("running"), orphan("pending"), orphan("cancelling"), orphan("done")
		pending.State, done.State, cancelling.Cancelling = task.StatePending, task.StateDone, true
		db := open(running, pending, cancelling, done)
		asked := make(map[string]*task.Operation)
		release := make(chan struct{})
		start := time.Now().Add(-time.Microsecond)
		m := testkit.NewManager(t, db, testkit.Quiet, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
			asked[op.ID] = op
			return func(ctx context.Context, update func(int)) (any, error) {
				now, _ := task.FromContext(ctx)
				<-release
				return now, nil
			}, nil
		}))
		if len(asked) != 2 || asked["running"] == nil || asked["pending"] == nil {
			t.Fatalf("asked for %v", asked)
		}
		if op := asked["running"]; op.State != task.StateRunning || op.Progress != 60 || op.Message != "half done" {
			t.Errorf("asked for %+v", op)
		}
		for _, id := range []string{"running", "pending"} {
			op, ok := m.Get(id)
			if !ok || op.State != task.StateRunning && op.State != task.StatePending || op.Progress != 0 || op.Message != "" ||
				op.UpdatedAt.Before(start) {
				t.Errorf("after New, %s is %+v", id, op)
			}
		}
		if op := testkit.Wait(t, m, "cancelling"); op.State != task.StateFailed || op.Error != testkit.RestartText {
			t.Errorf("cancelling is %+v", op)
		}
		close(release)
		for _, want := range []*task.Operation{running, pending} {
			op := testkit.Wait(t, m, want.ID)
			var at task.Operation
			testkit.Must(t, op.DecodeResult(&at))
			if op.State != task.StateDone || op.Name != want.Name || !op.CreatedAt.Equal(want.CreatedAt) ||
				fmt.Sprint(op.Metadata) != fmt.Sprint(want.Metadata) || op.StartedAt.Before(start) {
				t.Errorf("finished as %+v", op)
			}
			if at.ID != want.ID || at.Progress != 0 || at.Message != "" || fmt.Sprint(at.Metadata) != fmt.Sprint(want.Metadata) {
				t.Errorf("ran as %+v", at)
			}
			stored, err := db.Get(want.ID)
			testkit.Must(t, err)
			if stored.State != task.StateDone || stored.Owner != op.Owner {
				t.Errorf("stored as %+v", stored)
			}
		}
	})
}

// TestResumeRefused: the function of WithResume, or an option, fails.
func TestResumeRefused(t *testing.T) {
	testos.Parallel(t)
	for name, f := range map[string]func() (task.Func, []task.SubmitOption){
		"nil":                         func() (task.Func, []task.SubmitOption) { return nil, []task.SubmitOption{task.WithLock("")} },
		"panic":                       func() (task.Func, []task.SubmitOption) { panic("oh") },
		"panic that can't be printed": func() (task.Func, []task.SubmitOption) { panic(unprintable{}) },
		"Goexit":                      func() (task.Func, []task.SubmitOption) { runtime.Goexit(); return testkit.Nothing, nil },
		"option": func() (task.Func, []task.SubmitOption) {
			return testkit.Nothing, []task.SubmitOption{task.WithLock("")}
		},
		"metadata": func() (task.Func, []task.SubmitOption) {
			return testkit.Nothing, []task.SubmitOption{task.WithMetadata(t.Run)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachOrphanStore(t, func(t *testing.T, open func(ops ...*task.Operation) task.Persistence) {
				log := new(testkit.Log)
				m := testkit.NewManager(t, open(orphan("good"), orphan("bad"), orphan("fine")), log.Option(),
					task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
						if op.ID == "bad" {
							return f()
						}
						return testkit.Nothing, []task.SubmitOption{nil, task.WithMetadata("ignored"), task.WithLock("x")}
					}))
				op := testkit.Wait(t, m, "bad")
				if op.State != task.StateFailed || op.Error != testkit.RestartText || op.Message != "half done" || !op.Interrupted() {
					t.Errorf("refused: %+v", op)
				}
				for _, id := range []string{"good", "fine"} {
					if op := testkit.Wait(t, m, id); op.State != task.StateDone || fmt.Sprint(op.Metadata) != fmt.Sprint(orphan(id).Metadata) {
						t.Errorf("resumed: %+v", op)
					}
				}
				testkit.Must(t, m.Close())
				want := 1
				if name == "nil" {
					want = 0
				}
				if n := log.Count("task: not resumed"); n != want {
					t.Errorf("logged %d times, want %d: %s", n, want, log)
				}
				log.WantRecovered(t, "bad")
			})
		})
	}
}

// Orphans of other code, with IDs that no query finds again, are not resumed: all are
// FAILED, and delay no others.
func TestResumeOddIDs(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	leaveOrphans(t, path, orphan("good"))
	testkit.Exec(t, path, `INSERT INTO tasks (id, name, state) VALUES (NULL, 'odd', 'RUNNING'), (NULL, 'odd', 'PENDING'),
		('', 'odd', 'RUNNING'), (x'ff', 'odd', 'RUNNING')`)
	m := make(chan *task.Manager)
	go func() { m <- testkit.NewManager(t, testkit.OpenSQLite(t, path), resuming(testkit.Nothing)) }()
	select {
	case m := <-m:
		if ops, err := m.List(10, 0, task.ByName("odd"), task.ByState(task.StateFailed)); err != nil || len(ops) != 4 {
			t.Errorf("%d odd ones are FAILED, %v; want 4", len(ops), err)
		}
		if op := testkit.Wait(t, m, "good"); op.State != task.StateDone {
			t.Errorf("good is %+v", op)
		}
	case <-time.After(time.Minute):
		t.Fatal("New does not return")
	}
}

// TestResumeOrder: operations are resumed in order of submission, whichever process has
// left them, and those of one key one at a time.
func TestResumeOrder(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	var want []string
	for i := range 20 {
		op := orphan(fmt.Sprintf("%02d", 19-i))
		op.CreatedAt = op.CreatedAt.Add(-time.Duration(i) * time.Minute)
		leaveOrphans(t, path, op) // each of a different owner
		want = append(want, op.ID)
	}
	slices.Sort(want)
	var mu sync.Mutex
	var got []string
	var running atomic.Int32
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path), testkit.Quiet, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		return func(context.Context, func(int)) (any, error) {
			if n := running.Add(1); n > 1 {
				t.Errorf("%d run at once", n)
			}
			defer running.Add(-1)
			mu.Lock()
			defer mu.Unlock()
			got = append(got, op.ID)
			return nil, nil
		}, []task.SubmitOption{task.WithLock("key")}
	}))
	for _, id := range want {
		testkit.Wait(t, m, id)
	}
	if !slices.Equal(got, want) {
		t.Errorf("ran in the order %q", got)
	}
}

// TestResumeHoldsKey: operations submitted later wait for a resumed operation with the
// same key.
func TestResumeHoldsKey(t *testing.T) {
	testos.Parallel(t)
	eachOrphanStore(t, func(t *testing.T, open func(ops ...*task.Operation) task.Persistence) {
		fn, started, release := testkit.Blocker(nil)
		defer release()
		m := testkit.NewManager(t, open(orphan("scrub")), testkit.Quiet, resuming(fn, task.WithLock("pool")))
		<-started
		op := testkit.Submit(t, m, testkit.Nothing, task.WithLock("pool"))
		if op.State != task.StatePending || op.WaitsFor != "scrub" {
			t.Errorf("submitted: %+v, want it to wait", op)
		}
		release()
		testkit.Wait(t, m, "scrub")
		if op := testkit.Wait(t, m, op.ID); op.State != task.StateDone || op.WaitsFor != "" {
			t.Errorf("finished: %+v", op)
		}
	})
}

// TestResumeRace: two stores recover the same file at the same time.
func TestResumeRace(t *testing.T) {
	testos.Parallel(t)
	const n = 20
	rounds := 40
	if testing.Short() {
		rounds = 5
	}
	for round := range rounds {
		path := testkit.FastPath(t)
		var ops []*task.Operation
		for i := range n {
			ops = append(ops, orphan(fmt.Sprint(i)))
		}
		leaveOrphans(t, path, ops...)
		var runs [n]atomic.Int32
		var all sync.WaitGroup
		for range 2 {
			store := testkit.OpenSQLite(t, path)
			all.Go(func() {
				m := testkit.NewManager(t, store, testkit.Quiet, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
					return func(context.Context, func(int)) (any, error) {
						var i int
						fmt.Sscan(op.ID, &i)
						runs[i].Add(1)
						return nil, nil
					}, nil
				}))
				for _, op := range ops {
					if op := testkit.Wait(t, m, op.ID); op.State != task.StateDone {
						t.Errorf("round %d: %+v", round, op)
					}
				}
			})
		}
		all.Wait()
		for i := range runs {
			if n := runs[i].Load(); n != 1 {
				t.Errorf("round %d: %d ran %d times", round, i, n)
			}
		}
	}
}

// TestResumeMany resumes more operations than one transaction takes over.
func TestResumeMany(t *testing.T) {
	testos.Parallel(t)
	const n = 5000
	path := testkit.FastPath(t)
	store := testkit.OpenSQLite(t, path)
	testkit.Fill(t, path, n, uuid.NewString(), "-1 hour")
	var asked, ran atomic.Int32
	m := testkit.NewManager(t, store, testkit.Quiet, task.WithLimit(10), task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		if asked.Add(1)%5 == 0 {
			return nil, nil
		}
		return func(context.Context, func(int)) (any, error) { ran.Add(1); return nil, nil }, nil
	}))
	testkit.Must(t, m.Shutdown(t.Context()))
	if asked.Load() != n || ran.Load() != n*4/5 {
		t.Errorf("asked for %d and ran %d of %d", asked.Load(), ran.Load(), n)
	}
	states := make(map[task.State]int)
	for _, op := range testkit.Stored(t, store) {
		states[op.State]++
	}
	if states[task.StateDone] != n*4/5 || states[task.StateFailed] != n/5 {
		t.Errorf("stored: %v", states)
	}
}

// TestResumeAfterCrash ends a process between its take-over and its start.
func TestResumeAfterCrash(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	leaveOrphans(t, path, orphan("a"), orphan("b"))
	crashed := testkit.OpenSQLite(t, path)
	for op, err := range crashed.Recover("gone", func(*task.Operation) bool { return true }) {
		testkit.Must(t, err)
		if op.State != task.StatePending || op.Owner != crashed.Owner() {
			t.Errorf("taken over: %+v", op)
		}
		break
	}
	testkit.Must(t, crashed.Close())
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path), resuming(testkit.Nothing))
	for _, id := range []string{"a", "b"} {
		if op := testkit.Wait(t, m, id); op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
	}
	if n := testkit.OwnerFiles(t, path); n != 1 {
		t.Errorf("%d owner files, want one", n)
	}
}

// TestResumeOvertaken: the operation changes while the function of WithResume is
// running.
func TestResumeOvertaken(t *testing.T) {
	testos.Parallel(t)
	for name, tt := range map[string]struct {
		stmt string
		want task.State
	}{
		"cancel requested": {`UPDATE tasks SET cancel_requested_at = '2026-01-01 00:00:00.000000'`, task.StateFailed},
		"finished":         {`UPDATE tasks SET state = 'DONE'`, task.StateDone},
		"taken over":       {`UPDATE tasks SET owner = 'another'`, task.StateRunning},
		"deleted":          {`DELETE FROM tasks`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := testkit.Path(t)
			leaveOrphans(t, path, orphan("a"))
			store := testkit.OpenSQLite(t, path)
			m := testkit.NewManager(t, store, testkit.Quiet, task.WithResume(func(*task.Operation) (task.Func, []task.SubmitOption) {
				testkit.Exec(t, path, tt.stmt)
				return func(context.Context, func(int)) (any, error) { t.Error("it has run"); return nil, nil }, nil
			}))
			op, ok := m.Get("a")
			if ok != (tt.want != "") || ok && op.State != tt.want {
				t.Errorf("%+v, want it %s", op, tt.want)
			}
		})
	}
}

// TestResumeBlocked: a function of WithResume that blocks in the background delays only
// Close, after which nothing is resumed.
func TestResumeBlocked(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	store, other, dying := testkit.OpenSQLite(t, path), testkit.OpenSQLite(t, path), testkit.OpenSQLite(t, path)
	asked, release := make(chan struct{}), make(chan struct{})
	m := testkit.NewManager(t, store, testkit.Quiet, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		if op.ID == "a" {
			close(asked)
			<-release
		}
		return func(context.Context, func(int)) (any, error) { t.Error(op.ID + " runs after Close"); return nil, nil }, nil
	}))
	a, b := orphan("a"), orphan("b")
	testkit.Must(t, dying.Save(a))
	testkit.Must(t, dying.Save(b))
	living := testkit.NewManager(t, other, testkit.Quiet)
	testkit.Must(t, dying.Close())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waited := make(chan error, 1)
	go func() { _, err := m.Wait(ctx, "a"); waited <- err }()
	<-asked

	op := testkit.Submit(t, living, testkit.Nothing)
	if op := testkit.Wait(t, m, op.ID); op.State != task.StateDone {
		t.Errorf("another's: %+v", op)
	}
	testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing).ID)
	closing, end := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer end()
	if err := m.CloseContext(closing); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close does not wait: %v", err)
	}
	close(release)
	testkit.Must(t, m.Close())
	cancel()
	if err := <-waited; !errors.Is(err, task.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	if left := testkit.Stored(t, store).Unfinished(); len(left) != 2 {
		t.Errorf("%q are left, want both", left)
	}
	testkit.Must(t, store.Close())
	next := testkit.NewManager(t, other, testkit.Quiet, resuming(testkit.Nothing))
	for _, id := range []string{"a", "b"} {
		if op := testkit.Wait(t, next, id); op.State != task.StateDone {
			t.Errorf("resumed: %+v", op)
		}
	}
}

// TestResumeByWaiting: a manager that waits for an operation when its process dies
// resumes it. Each final state is shown once.
func TestResumeByWaiting(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	store, dying := testkit.OpenSQLite(t, path), testkit.OpenSQLite(t, path)
	testkit.Must(t, dying.Save(orphan("a")))
	fn, started, release := testkit.Blocker(nil)
	defer release()
	m := testkit.NewManager(t, store, testkit.Quiet, resuming(fn))
	events := m.Watch(t.Context(), "a", testkit.Submit(t, m, testkit.UntilCancelled).ID)
	waited := make(chan *task.Operation, 1)
	go func() { waited <- testkit.Wait(t, m, "a") }()
	testkit.Must(t, dying.Close())
	<-started
	release()
	if op := <-waited; op.State != task.StateDone || op.ID != "a" {
		t.Errorf("Wait: %+v", op)
	}
	time.AfterFunc(300*time.Millisecond, func() { m.Close() })
	var states []task.State
	for op, err := range events {
		testkit.Must(t, err)
		if op.ID == "a" && (len(states) == 0 || states[len(states)-1] != op.State || op.State.Finished()) {
			states = append(states, op.State)
		}
	}
	if want := []task.State{task.StateRunning, task.StatePending, task.StateRunning, task.StateDone}; !slices.Equal(states, want) {
		t.Errorf("Watch: %v, want %v", states, want)
	}
}

// TestResumeLater resumes once a store can be read again.
func TestResumeLater(t *testing.T) {
	testos.Parallel(t)
	for _, method := range []string{"Recover", "List"} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				testkit.Must(t, memory.Save(orphan("a")))
				fake := testkit.NewFake(memory)
				fake.Before(func(c *testkit.Call) error {
					if c.Method == method && c.N < 3 {
						return testkit.ErrDisk
					}
					return nil
				})
				var db task.Persistence = fake
				if method == "List" {
					db = testkit.Bare(fake)
				}
				m := task.NewManager(db, testkit.Quiet, resuming(testkit.Nothing))
				defer m.Close()
				time.Sleep(time.Minute)
				if op := testkit.Wait(t, m, "a"); op.State != task.StateDone {
					t.Errorf("%+v", op)
				}
			})
		})
	}
}

// TestResumeFails: New fails halfway. Operations that it has taken over are left to the
// next start.
func TestResumeFails(t *testing.T) {
	testos.Parallel(t)
	memory := task.NewMemoryStore()
	for _, id := range []string{"a", "b", "c"} {
		testkit.Must(t, memory.Save(orphan(id)))
	}
	fake := testkit.NewFake(memory)
	fake.After(func(c *testkit.Call) {
		if c.Method == "Recover" && c.Ops[0].ID == "b" {
			c.Ops[0], c.Err = nil, testkit.ErrDisk
		}
	})
	ran := func(context.Context, func(int)) (any, error) { t.Error("it has run"); return nil, nil }
	if m, err := task.New(fake, testkit.Quiet, resuming(ran)); m != nil || !errors.Is(err, testkit.ErrDisk) {
		t.Errorf("New: %v, %v", m, err)
	}
	m := testkit.NewManager(t, memory, testkit.Quiet, resuming(testkit.Nothing))
	for _, id := range []string{"a", "b", "c"} {
		if op := testkit.Wait(t, m, id); op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
	}
}

// TestResumeNotOwn: a manager whose store counts as dead does not resume its own
// running operations.
func TestResumeNotOwn(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	living, dead := testkit.OpenSQLite(t, path), testkit.OpenSQLite(t, path)
	moving := testkit.NewFake(dead)
	m := testkit.NewManager(t, moving, testkit.Quiet, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		t.Errorf("asked for %+v", op)
		return nil, nil
	}))
	fn, started, release := testkit.Blocker(nil)
	defer release()
	op := testkit.Submit(t, m, fn)
	<-started
	other, another := testkit.OpenSQLite(t, path), orphan("another's")
	testkit.Must(t, other.Save(another))
	moving.Swap(living)
	testkit.Must(t, dead.Close())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	m.Wait(ctx, another.ID) // makes the manager look for dead owners
	testkit.Must(t, testkit.Until(func() bool { got, err := living.Get(op.ID); return err == nil && got.State == task.StateFailed }))
}

// TestDrainWithResume: operations that have not started are left to the next start.
func TestDrainWithResume(t *testing.T) {
	testos.Parallel(t)
	for _, drain := range []bool{true, false} {
		t.Run(fmt.Sprint(drain), func(t *testing.T) {
			path := testkit.Path(t)
			store := testkit.OpenSQLite(t, path)
			fn, started, release := testkit.Blocker(nil)
			defer release()
			m := testkit.NewManager(t, store, testkit.Quiet, task.WithLimit(1), resuming(testkit.Nothing))
			running := testkit.Submit(t, m, fn)
			waiting := testkit.Submit(t, m, testkit.Nothing, task.WithMetadata("tank"))
			<-started
			end := m.Close
			if drain {
				end = func() error { return m.Drain(t.Context()) }
			}
			ended, waited := make(chan error, 1), make(chan error, 1)
			go func() { _, err := m.Wait(t.Context(), waiting.ID); waited <- err }()
			go func() { ended <- end() }()
			err := <-waited
			release()
			testkit.Must(t, <-ended)
			if errors.Is(err, task.ErrClosed) != drain || (err == nil) == drain {
				t.Errorf("Wait: %v", err)
			}
			if op, err := store.Get(running.ID); err != nil || op.State != task.StateDone {
				t.Errorf("running: %+v, %v", op, err)
			}
			testkit.Must(t, store.Close())
			next := testkit.NewManager(t, testkit.OpenSQLite(t, path), resuming(testkit.Nothing))
			op := testkit.Wait(t, next, waiting.ID)
			if drain != (op.State == task.StateDone) || op.Metadata != "tank" || op.Interrupted() == drain {
				t.Errorf("after the next start: %+v", op)
			}
		})
	}
}

// TestDrainDuringSubmit: an operation that is being stored when Drain is called is
// left, too.
func TestDrainDuringSubmit(t *testing.T) {
	testos.Parallel(t)
	db := testkit.NewFake(nil)
	entered, release := make(chan struct{}), make(chan struct{})
	db.Before(func(c *testkit.Call) error {
		if c.Method == "Save" {
			close(entered)
			<-release
		}
		return nil
	})
	m := testkit.NewManager(t, testkit.Bare(db), testkit.Quiet, resuming(testkit.Nothing))
	submitted := make(chan *task.Operation, 1)
	go func() { op, _ := m.Submit("x", testkit.Nothing); submitted <- op }()
	<-entered
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Drain(over); !errors.Is(err, context.Canceled) {
		t.Errorf("Drain during Submit: %v", err)
	}
	close(release)
	op := <-submitted
	testkit.Must(t, m.Drain(t.Context()))
	if got, err := db.Get(op.ID); err != nil || got.State != task.StatePending {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSetMessage(t *testing.T) {
	testos.Parallel(t)
	for name, tt := range map[string]struct{ text, want string }{
		"short":       {"reading /tank/ä", "reading /tank/ä"},
		"long":        {strings.Repeat("ä", 1001), strings.Repeat("ä", 1000)},
		"just fits":   {strings.Repeat("ä", 1000), strings.Repeat("ä", 1000)},
		"not UTF-8":   {"a\xffb", "a\uFFFDb"},
		"long binary": {strings.Repeat("\xffa", 1001), strings.Repeat("\uFFFDa", 500)},
		"empty":       {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
				for _, state := range []task.State{task.StateDone, task.StateFailed, task.StateCancelled} {
					op := testkit.Submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
						testkit.Must(t, task.SetMessage(ctx, "before"))
						testkit.Must(t, task.SetMessage(ctx, tt.text))
						now, _ := task.FromContext(ctx)
						testkit.Must(t, task.Checkpoint(ctx))
						stored, err := db.Get(now.ID)
						if err != nil || stored.Message != tt.want || now.Message != tt.want {
							t.Errorf("shown %q, stored %q, %v", now.Message, stored.Message, err)
						}
						switch state {
						case task.StateFailed:
							return nil, testkit.ErrDisk
						case task.StateCancelled:
							now.Cancel()
							return nil, context.Canceled
						}
						return nil, nil
					})
					want := tt.want
					if state == task.StateDone {
						want = ""
					}
					if op := testkit.Wait(t, m, op.ID); op.State != state || op.Message != want {
						t.Errorf("finished: %+v, want the message %q", op, want)
					}
					if op, err := db.Get(op.ID); err != nil || op.Message != want {
						t.Errorf("stored: %+v, %v", op, err)
					}
				}
			})
		})
	}
}

// TestSetMessageUnchanged: an unchanged text does nothing.
func TestSetMessageUnchanged(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := task.NewManager(db, testkit.Quiet)
		defer m.Close()
		testkit.Submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
			testkit.Must(t, task.SetMessage(ctx, "same"))
			time.Sleep(time.Second)
			before, _ := task.FromContext(ctx)
			writes := db.Count("WriteBatch")
			testkit.Must(t, task.SetMessage(ctx, "same"))
			time.Sleep(time.Second)
			if after, _ := task.FromContext(ctx); !after.UpdatedAt.Equal(before.UpdatedAt) || db.Count("WriteBatch") != writes {
				t.Errorf("%d writes, then %d; %+v", writes, db.Count("WriteBatch"), after)
			}
			return nil, nil
		})
	})
}

// TestSetMessageHanging: a store that hangs does not delay SetMessage.
func TestSetMessageHanging(t *testing.T) {
	testos.Parallel(t)
	db := testkit.NewFake(nil)
	release := make(chan struct{})
	m := testkit.NewManager(t, db, testkit.Quiet)
	var kept context.Context
	op := testkit.Submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
		kept = ctx
		db.Before(func(c *testkit.Call) error { <-release; return nil })
		defer close(release)
		for i := range 1000 {
			testkit.Must(t, task.SetMessage(ctx, fmt.Sprint(i)))
		}
		if now, _ := task.FromContext(ctx); now.Message != "999" {
			t.Errorf("Get: %+v", now)
		}
		return nil, testkit.ErrDisk
	})
	if op := testkit.Wait(t, m, op.ID); op.Message != "999" {
		t.Errorf("finished: %+v", op)
	}
	if err := task.SetMessage(kept, "late"); err == nil || !strings.Contains(err.Error(), op.ID) {
		t.Errorf("after the end: %v", err)
	}
	if err := task.SetMessage(t.Context(), "x"); err == nil {
		t.Error("no error outside of a Func")
	}
}

// TestWaitsFor checks operations that wait for a key, and for a slot.
func TestWaitsFor(t *testing.T) {
	testos.Parallel(t)
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		fn, started, release := testkit.Blocker(nil)
		defer release()
		holder := testkit.Submit(t, m, fn, task.WithLock("tank"))
		<-started
		second := testkit.Submit(t, m, testkit.Nothing, task.WithLock("free"), task.WithLock("tank"))
		third := testkit.Submit(t, m, testkit.Nothing, task.WithLock("free"))
		want := map[string]string{holder.ID: "", second.ID: holder.ID, third.ID: second.ID}
		seen := func(from string, op *task.Operation) {
			t.Helper()
			if op.WaitsFor != want[op.ID] {
				t.Errorf("%s: %+v waits for %q, want %q", from, op, op.WaitsFor, want[op.ID])
			}
		}
		seen("Submit", second)
		ops, err := m.List(10, 0)
		testkit.Must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		for _, op := range ops {
			seen("List", op)
			got, _ := m.Get(op.ID)
			seen("Get", got)
			waiting, err := m.Wait(ctx, op.ID)
			if err == nil {
				t.Error("Wait returned")
			}
			seen("Wait", waiting)
			if stored, err := db.Get(op.ID); err != nil || stored.WaitsFor != "" {
				t.Errorf("stored: %+v, %v", stored, err)
			}
		}
		present, _, err := m.Raw().Subscribe(ctx)
		testkit.Must(t, err)
		if len(present) != 3 {
			t.Errorf("%d present states", len(present))
		}
		for _, op := range present {
			seen("Watch", op)
		}
		release()
		for id := range want {
			if op := testkit.Wait(t, m, id); op.WaitsFor != "" {
				t.Errorf("finished: %+v", op)
			}
		}
	})
}

func TestWaitsForSlot(t *testing.T) {
	testos.Parallel(t)
	m := testkit.NewManager(t, nil, testkit.Quiet, task.WithLimit(1))
	fn, started, release := testkit.Blocker(nil)
	defer release()
	testkit.Submit(t, m, fn)
	<-started
	if op := testkit.Submit(t, m, testkit.Nothing, task.WithLock("free")); op.State != task.StatePending || op.WaitsFor != "" {
		t.Errorf("%+v", op)
	}
}

// TestResumeUnique: unique keys of resumed operations are enforced.
func TestResumeUnique(t *testing.T) {
	testos.Parallel(t)
	eachOrphanStore(t, func(t *testing.T, open func(ops ...*task.Operation) task.Persistence) {
		fn, started, release := testkit.Blocker(nil)
		defer release()
		first, second := orphan("first"), orphan("second")
		second.CreatedAt = first.CreatedAt.Add(time.Second)
		m := testkit.NewManager(t, open(first, second), testkit.Quiet, resuming(fn, task.WithUnique("scrub"), task.WithID("ignored")))
		<-started
		op, err := m.Submit("scrub", testkit.Nothing, task.WithUnique("scrub"))
		if !errors.Is(err, task.ErrExists) || op == nil || op.ID != "first" {
			t.Errorf("Submit = %+v, %v", op, err)
		}
		if op := testkit.Wait(t, m, "second"); op.State != task.StateFailed || !op.Interrupted() {
			t.Errorf("another with the key: %+v", op)
		}
		release()
		if op := testkit.Wait(t, m, "first"); op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
		op, err = m.Submit("scrub", testkit.Nothing, task.WithUnique("scrub"))
		testkit.Must(t, err)
		testkit.Wait(t, m, op.ID)
		if op, ok := m.Get("ignored"); ok {
			t.Errorf("resumed as %+v", op)
		}
	})
}

// An unprintable panics when it is printed, with a value that does so, too.
type unprintable struct{}

func (u unprintable) Error() string { panic(u) }
