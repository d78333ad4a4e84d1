package idtest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// never is a Func that must not be called.
func never(context.Context, func(int)) (any, error) { panic("the function was called") }

// wantExists checks that Submit has returned the existing operation.
func wantExists(t *testing.T, op *task.Operation, err error, id string, states ...task.State) {
	t.Helper()
	if !errors.Is(err, task.ErrExists) || op == nil || op.ID != id || len(states) > 0 && !slices.Contains(states, op.State) {
		t.Fatalf("Submit = %+v, %v, want %s, %v, and ErrExists", op, err, id, states)
	}
}

func TestWithIDInvalid(t *testing.T) {
	long := strings.Repeat("x", 200)
	for id, ok := range map[string]bool{
		"": false, ".": false, "..": false, "...": true, "events": false, "ui": false, "openapi.json": false, "Events": true,
		long: true, long + "x": false, strings.Repeat("x", 1<<20): false, "a": true, "auto-tank-2026-11-25": true,
		"a b": false, "a\x00": false, "\x00": false, "a\n": false, "a\x7f": false, "ü": false, "\xff": false,
		"a/b": false, `a\b`: false, "a?": false, "a#": false, "a%20": false,
		`!"$&'()*+,-.:;<=>@[]^_{|}~` + "`": true, "2024-02-29T12:00:00Z": true, "01890000-0000-7000-8000-000000000000": true,
	} {
		t.Run(fmt.Sprintf("%.40q", id), func(t *testing.T) {
			m := testkit.NewManager(t, testkit.OpenSQLite(t, ":memory:"))
			op, err := m.Submit("x", testkit.Nothing, task.WithID(id))
			if ok != (err == nil) || err == nil && op.ID != id || err != nil && (op != nil || len(err.Error()) > 300) {
				t.Fatalf("Submit = %+v, %v", op, err)
			}
			if ok {
				if got := testkit.Wait(t, m, id); got.State != task.StateDone {
					t.Errorf("Wait = %+v", got)
				}
			}
			if ops, err := m.List(10, 0); err != nil || (len(ops) == 1) != ok {
				t.Errorf("List = %v, %v", ops, err)
			}
		})
	}
}

func TestWithIDExists(t *testing.T) {
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		fn, started, release := testkit.Blocker(nil)
		defer release()
		first := testkit.Submit(t, m, fn, task.WithID("a"), task.WithMetadata("tank"))
		<-started
		op, err := m.Submit("second", never, task.WithID("a"))
		wantExists(t, op, err, "a", task.StateRunning)
		if op.Name != first.Name || op.Metadata != "tank" {
			t.Errorf("Submit has returned %+v", op)
		}
		other := testkit.Submit(t, m, testkit.Nothing, task.WithID("A"))
		release()
		testkit.Wait(t, m, "a")
		testkit.Wait(t, m, other.ID)
		op, err = m.Submit("third", never, task.WithID("a"))
		wantExists(t, op, err, "a", task.StateDone)

		testkit.Must(t, m.Close())
		if op, err := m.Submit("closed", never, task.WithID("a")); !errors.Is(err, task.ErrClosed) || op != nil {
			t.Errorf("after Close: %+v, %v", op, err)
		}
		m = testkit.NewManager(t, db)
		op, err = m.Submit("restarted", never, task.WithID("a"))
		wantExists(t, op, err, "a", task.StateDone)
		if _, err := m.Prune(time.Now().Add(time.Hour)); errors.Is(err, errors.ErrUnsupported) {
			return
		}
		if op := testkit.Submit(t, m, testkit.Nothing, task.WithID("a")); op.ID != "a" || testkit.Wait(t, m, "a").State != task.StateDone {
			t.Errorf("after Prune: %+v", op)
		}
	})
}

// TestWithIDInterrupted: an interrupted operation keeps its ID.
func TestWithIDInterrupted(t *testing.T) {
	path := testkit.Path(t)
	testkit.Must(t, testkit.OpenSQLite(t, path).Save(&task.Operation{ID: "auto", Name: "left", State: task.StateRunning}))
	testkit.Exec(t, path, `UPDATE tasks SET owner = NULL`)
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	op, err := m.Submit("again", never, task.WithID("auto"))
	wantExists(t, op, err, "auto", task.StateFailed)
	if !op.Interrupted() {
		t.Errorf("not interrupted: %+v", op)
	}
	if op := testkit.Submit(t, m, testkit.Nothing, task.WithID("auto.2")); op.Interrupted() || testkit.Wait(t, m, op.ID).Interrupted() {
		t.Errorf("interrupted: %+v", op)
	}
}

func TestInterrupted(t *testing.T) {
	for _, tt := range []struct {
		state task.State
		err   string
		want  bool
	}{
		{task.StateFailed, testkit.RestartText, true},
		{task.StateFailed, testkit.ShutdownText, true},
		{task.StateFailed, testkit.ShutdownText + ": exit status 1", true},
		{task.StateFailed, "x: " + testkit.ShutdownText, false},
		{task.StateCancelled, testkit.ShutdownText, false},
		{task.StateDone, "", false},
	} {
		op := &task.Operation{State: tt.state, Error: tt.err}
		if got := op.Interrupted(); got != tt.want {
			t.Errorf("%+v: %v", op, got)
		}
	}
}

// A gate makes a store's Saves wait, and fail with an error.
type gate struct {
	db      *testkit.Fake
	entered chan string // the names of the operations to be saved
	answer  chan error
}

// newGate returns a gate in front of db, with only the four methods.
func newGate(db task.Persistence) *gate {
	g := &gate{testkit.NewFake(db), make(chan string, 100), make(chan error)}
	g.db.Before(func(c *testkit.Call) error {
		if c.Method != "Save" {
			return nil
		}
		g.entered <- c.Saves[0].Name
		return <-g.answer
	})
	return g
}

type answer struct {
	op  *task.Operation
	err error
}

func submitAsync(m *task.Manager, name string, fn task.Func, opts ...task.SubmitOption) chan answer {
	done := make(chan answer, 1)
	go func() {
		op, err := m.Submit(name, fn, opts...)
		done <- answer{op, err}
	}()
	return done
}

// TestSubmitTwiceAtOnce: the second Submit of an ID or a key waits for the commit of
// the first.
func TestSubmitTwiceAtOnce(t *testing.T) {
	for name, opt := range map[string]task.SubmitOption{"WithID": task.WithID("a"), "WithUnique": task.WithUnique("a")} {
		for _, failed := range []error{nil, testkit.ErrDisk} {
			t.Run(fmt.Sprint(name, " ", failed), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := newGate(nil)
					m := testkit.NewManager(t, testkit.Bare(g.db))
					first := submitAsync(m, "first", testkit.Nothing, opt)
					<-g.entered
					var others []chan answer
					for range 3 {
						others = append(others, submitAsync(m, "other", never, opt))
					}
					synctest.Wait()
					if len(others[0])+len(first) > 0 {
						t.Fatal("Submit has returned before the commit")
					}
					g.answer <- failed
					a := <-first
					if !errors.Is(a.err, failed) || (a.op == nil) != (failed != nil) {
						t.Fatalf("the first Submit = %+v, %v", a.op, a.err)
					}
					for _, c := range others {
						b := <-c
						if failed == nil {
							wantExists(t, b.op, b.err, a.op.ID)
						} else if b.op != nil || !errors.Is(b.err, failed) || errors.Is(b.err, task.ErrExists) {
							t.Errorf("another Submit = %+v, %v", b.op, b.err)
						}
					}
				})
			})
		}
	}
}

// TestHiddenUntilStored: while a Submit with the ID of a finished operation is under
// way, callers see the finished one.
func TestHiddenUntilStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := task.NewMemoryStore()
		m := testkit.NewManager(t, memory)
		old := testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing, task.WithID("a")).ID)
		testkit.Must(t, m.Close())
		g := newGate(memory)
		m = testkit.NewManager(t, testkit.Bare(g.db))
		var events []string
		ctx, stop := context.WithCancel(t.Context())
		all := m.Watch(ctx)
		done := submitAsync(m, "second", never, task.WithID("a"))
		<-g.entered
		if got, ok := m.Get("a"); !ok || !testkit.Same(*got, *old) {
			t.Errorf("Get = %+v, %v", got, ok)
		}
		if got := testkit.Wait(t, m, "a"); !testkit.Same(*got, *old) {
			t.Errorf("Wait = %+v", got)
		}
		if err := m.Cancel("a"); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Cancel = %v", err)
		}
		for _, opts := range [][]task.ListOption{nil, {task.ByState(task.StateDone)}} {
			if ops, err := m.List(10, 0, opts...); err != nil || len(ops) != 1 || !testkit.Same(*ops[0], *old) {
				t.Errorf("List = %+v, %v", ops, err)
			}
		}
		for op, err := range m.Watch(t.Context(), "a") {
			events = append(events, fmt.Sprint(op.State, err))
		}
		g.answer <- nil
		a := <-done
		wantExists(t, a.op, a.err, "a", task.StateDone)
		time.AfterFunc(time.Second, stop)
		for op, err := range all {
			events = append(events, fmt.Sprint("all: ", op, err))
		}
		if want := []string{"DONE<nil>"}; !slices.Equal(events, want) {
			t.Errorf("events %q, want %q", events, want)
		}
		if op, err := memory.Get("a"); err != nil || !testkit.Same(*op, *old) {
			t.Errorf("stored %+v, %v", op, err)
		}
	})
}

// TestForeignWatchedWhileRefused: a watcher of another manager's operation gets no
// events of a Submit with its ID.
func TestForeignWatchedWhileRefused(t *testing.T) {
	memory := task.NewMemoryStore()
	theirs, ours := testkit.NewManager(t, memory), testkit.NewManager(t, memory)
	fn, started, release := testkit.Blocker(nil)
	defer release()
	testkit.Submit(t, theirs, fn, task.WithID("a"))
	<-started
	changes := ours.Watch(t.Context(), "a")
	op, err := ours.Submit("second", never, task.WithID("a"))
	wantExists(t, op, err, "a")
	release()
	var last task.State
	for op, err := range changes {
		testkit.Must(t, err)
		last = op.State
	}
	if last != task.StateDone {
		t.Errorf("the last state is %s", last)
	}
}

// TestFoundBeforeAnswer: a caller that finds a row before Submit knows of its commit
// gets the live operation, once the store has answered.
func TestFoundBeforeAnswer(t *testing.T) {
	use := map[string]func(*task.Manager) (task.State, error){
		"Cancel": func(m *task.Manager) (task.State, error) { return task.StateCancelled, m.Cancel("a") },
		"Wait": func(m *task.Manager) (task.State, error) {
			go func() {
				time.Sleep(time.Minute)
				m.Cancel("a")
			}()
			op, err := m.Wait(context.Background(), "a")
			return op.State, err
		},
	}
	for name, call := range use {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				db := testkit.NewFake(memory)
				answer := make(chan struct{})
				db.After(func(c *testkit.Call) {
					if c.Method == "Save" {
						<-answer
					}
				})
				m := testkit.NewManager(t, testkit.Bare(db))
				submitted := submitAsync(m, "x", testkit.UntilCancelled, task.WithID("a"))
				synctest.Wait() // the row is stored
				called := make(chan error)
				var state task.State
				go func() {
					var err error
					state, err = call(m)
					called <- err
				}()
				synctest.Wait()
				close(answer)
				if err := <-called; err != nil {
					t.Fatal(err)
				}
				if a := <-submitted; a.err != nil {
					t.Error(a.err)
				}
				if got := testkit.Wait(t, m, "a"); got.State != task.StateCancelled || state != got.State {
					t.Errorf("%s, and then %+v", state, got)
				}
			})
		})
	}
}

// TestLostAnswer: if a commit succeeds although Submit gets an error, the operation
// becomes FAILED and keeps its metadata, and a later Submit of the same ID never runs.
func TestLostAnswer(t *testing.T) {
	for name, open := range testkit.Stores {
		for i, id := range []string{"a", "", "a", ""} {
			metadata := strings.Repeat("tank", 1+i/2*5000) // too long to remember for some
			t.Run(fmt.Sprintf("%s %q %d", name, id, len(metadata)), func(t *testing.T) {
				db := testkit.NewFake(open(t))
				var m *task.Manager
				if name == "four methods" {
					m = testkit.NewManager(t, testkit.Bare(db))
				} else {
					m = testkit.NewManager(t, db)
				}
				var stored atomic.Value
				db.After(func(c *testkit.Call) {
					if len(c.Saves) == 0 || c.Saves[0].Name != "lost" {
						return
					}
					stored.Store(c.Saves[0].ID)
					if c.Err = testkit.ErrDisk; c.Method == "WriteBatch" {
						c.Err, c.Errs = nil, slices.Repeat([]error{testkit.ErrDisk}, len(c.Errs))
					}
				})
				opts := []task.SubmitOption{task.WithMetadata(metadata)}
				if id != "" {
					opts = append(opts, task.WithID(id))
				}
				if op, err := m.Submit("lost", never, opts...); !errors.Is(err, testkit.ErrDisk) || errors.Is(err, task.ErrExists) || op != nil {
					t.Fatalf("Submit = %+v, %v", op, err)
				}
				if id != "" {
					op, err := m.Submit("again", never, opts...)
					wantExists(t, op, err, id)
				}
				got := testkit.Wait(t, m, stored.Load().(string))
				if got.State != task.StateFailed || got.Metadata != metadata || !strings.Contains(got.Error, testkit.ErrDisk.Error()) {
					t.Errorf("stored %+v", got)
				}
			})
		}
	}
}

// TestSubmitAgainAfterFailure: the possible row of a failed Submit harms neither a
// later Submit with the same ID nor one of another manager.
func TestSubmitAgainAfterFailure(t *testing.T) {
	for name, bare := range map[string]bool{"all abilities": false, "four methods": true} {
		for _, other := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, by another manager: %v", name, other), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { // all have the same CreatedAt
					memory := task.NewMemoryStore()
					fake := testkit.NewFake(memory)
					db := task.Persistence(fake)
					if bare {
						db = testkit.Bare(fake)
					}
					m := testkit.NewManager(t, db)
					fake.Before(func(*testkit.Call) error { return testkit.ErrDisk })
					if _, err := m.Submit("first", never, task.WithID("a")); !errors.Is(err, testkit.ErrDisk) {
						t.Fatalf("Submit: %v", err)
					}
					fake.Before(nil)
					if other {
						m = testkit.NewManager(t, memory)
					}
					testkit.Submit(t, m, testkit.UntilCancelled, task.WithID("a"))
					time.Sleep(10 * time.Second)
					if op, err := memory.Get("a"); err != nil || op.State != task.StateRunning {
						t.Errorf("stored %+v, %v", op, err)
					}
					testkit.Must(t, m.Cancel("a"))
					if op := testkit.Wait(t, m, "a"); op.State != task.StateCancelled {
						t.Errorf("it is %+v", op)
					}
				})
			})
		}
	}
}

// An ownerless store does not keep the Owner.
type ownerless struct{ task.Persistence }

func (s ownerless) Save(op *task.Operation) error {
	op.Owner = ""
	return s.Persistence.Save(op)
}

// TestLostAnswerWithoutOwners: rows that may not be this manager's are left to the next
// manager.
func TestLostAnswerWithoutOwners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := task.NewMemoryStore()
		db := testkit.NewFake(memory)
		m := testkit.NewManager(t, ownerless{testkit.Bare(db)})
		db.After(func(c *testkit.Call) {
			if c.Method == "Save" {
				c.Err = testkit.ErrDisk
			}
		})
		op, err := m.Submit("lost", never, task.WithID("a"))
		if op != nil || !errors.Is(err, testkit.ErrDisk) || errors.Is(err, task.ErrExists) {
			t.Fatalf("Submit = %+v, %v", op, err)
		}
		time.Sleep(time.Second)
		op, err = m.Submit("again", never, task.WithID("a"))
		wantExists(t, op, err, "a", task.StatePending)
		testkit.Must(t, m.Close())
		m = testkit.NewManager(t, ownerless{testkit.Bare(memory)})
		op, err = m.Submit("again", never, task.WithID("a"))
		wantExists(t, op, err, "a", task.StateFailed)
	})
}

// TestOthersRowAfterFailure: if a Submit fails while another one stores a row with the
// same ID, it does not change that row, and reports it.
func TestOthersRowAfterFailure(t *testing.T) {
	for name, wrap := range map[string]func(task.Persistence) task.Persistence{
		"with owners":    testkit.Bare,
		"without owners": func(db task.Persistence) task.Persistence { return ownerless{testkit.Bare(db)} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				db := testkit.NewFake(memory)
				db.Before(func(c *testkit.Call) error {
					if c.Method != "Save" {
						return nil
					}
					other := *c.Saves[0]
					other.State, other.CreatedAt = task.StateRunning, other.CreatedAt.Add(time.Microsecond)
					if other.Owner != "" { // the Owner tells them apart
						other.Owner, other.CreatedAt = "another manager", c.Saves[0].CreatedAt
					}
					testkit.Must(t, memory.Save(&other))
					return testkit.ErrDisk
				})
				m := testkit.NewManager(t, wrap(db))
				op, err := m.Submit("x", never, task.WithID("a"))
				wantExists(t, op, err, "a", task.StateRunning)
				time.Sleep(10 * time.Second)
				if got, err := memory.Get("a"); err != nil || got.State != task.StateRunning {
					t.Errorf("stored %+v, %v", got, err)
				}
				testkit.Must(t, m.Close())
			})
		})
	}
}

// TestUnknownInsertRefused: one row that can't be marked as FAILED does not keep others
// from being marked.
func TestUnknownInsertRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := task.NewMemoryStore()
		db := testkit.NewFake(memory)
		db.Before(func(c *testkit.Call) error {
			if c.Method == "Update" && (c.ID == "0" || c.ID == "2") {
				return testkit.ErrDisk
			}
			return nil
		})
		db.After(func(c *testkit.Call) {
			if c.Method == "Save" {
				c.Err = testkit.ErrDisk
			}
		})
		m := testkit.NewManager(t, testkit.Bare(db))
		for i := range 5 {
			m.Submit("lost", never, task.WithID(fmt.Sprint(i)))
		}
		time.Sleep(10 * time.Second)
		ops, err := memory.List(10, 0)
		for _, op := range ops {
			if refused := op.ID == "0" || op.ID == "2"; refused == op.State.Finished() {
				t.Errorf("%s is %s", op.ID, op.State)
			}
		}
		if err != nil || len(ops) != 5 {
			t.Errorf("List = %v, %v", ops, err)
		}
		db.Before(nil)
		time.Sleep(10 * time.Second)
		if left := testkit.Stored(t, memory).Unfinished(); len(left) > 0 {
			t.Errorf("unfinished: %v", left)
		}
	})
}

// TestExistsNotLogged: an ID that exists is not logged as trouble with the store.
func TestExistsNotLogged(t *testing.T) {
	for name, open := range testkit.Stores {
		t.Run(name, func(t *testing.T) {
			db := open(t)
			m := testkit.NewManager(t, db)
			testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing, task.WithID("a")).ID)
			m, l := testkit.NewLogged(t, db)
			for range 3 {
				op, err := m.Submit("again", never, task.WithID("a"))
				wantExists(t, op, err, "a", task.StateDone)
			}
			testkit.Must(t, m.Close())
			if text := l.String(); text != "" {
				t.Errorf("logged: %s", text)
			}
		})
	}
}

func TestWithUnique(t *testing.T) {
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		if op, err := m.Submit("x", never, task.WithUnique("")); err == nil || op != nil {
			t.Errorf("empty key: %+v, %v", op, err)
		}
		fn, started, release := testkit.Blocker(nil)
		defer release()
		first := testkit.Submit(t, m, fn, task.WithUnique("scrub"), task.WithUnique("tank"), task.WithUnique("tank"))
		<-started
		for _, key := range []string{"scrub", "tank"} {
			op, err := m.Submit("second", never, task.WithUnique("other"), task.WithUnique(key))
			wantExists(t, op, err, first.ID, task.StateRunning)
		}
		op, err := m.Submit("second", never, task.WithUnique("tank"), task.WithID("b"))
		wantExists(t, op, err, first.ID)
		other := testkit.NewManager(t, db)
		if db, ok := db.(*task.SQLiteStore); ok { // the only kind here that several managers share
			testkit.Wait(t, other, testkit.Submit(t, testkit.NewManager(t, db), testkit.Nothing, task.WithUnique("tank")).ID)
		}
		testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing, task.WithUnique("other")).ID) // it was not taken
		release()
		testkit.Wait(t, m, first.ID)
		for range 3 {
			op := testkit.Submit(t, m, testkit.UntilCancelled, task.WithUnique("tank"), task.WithUnique("scrub"))
			testkit.Must(t, m.Cancel(op.ID))
			testkit.Wait(t, m, op.ID)
		}
	})
}

// TestWithUniqueUntilStored: a key stays taken until the final state is stored.
func TestWithUniqueUntilStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := testkit.NewManager(t, testkit.Bare(db))
		db.Before(testkit.FailFinals)
		first := testkit.Submit(t, m, testkit.Nothing, task.WithUnique("k"))
		time.Sleep(10 * time.Second)
		op, err := m.Submit("second", never, task.WithUnique("k"))
		wantExists(t, op, err, first.ID, task.StateRunning)
		db.Before(nil)
		testkit.Wait(t, m, first.ID)
		testkit.Submit(t, m, testkit.Nothing, task.WithUnique("k"))
	})
}

// TestWithUniqueAndID: a Submit that waits for another one with the same key succeeds
// if the other one fails because its ID exists.
func TestWithUniqueAndID(t *testing.T) {
	for name, bare := range map[string]bool{"all abilities": false, "four methods": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				testkit.Must(t, memory.Save(&task.Operation{ID: "a", Name: "old", State: task.StateDone, CreatedAt: time.Now()}))
				g := newGate(memory)
				db := task.Persistence(g.db)
				if bare {
					db = testkit.Bare(db)
				}
				m := testkit.NewManager(t, db)
				first := submitAsync(m, "first", never, task.WithID("a"), task.WithUnique("k"))
				<-g.entered
				second := submitAsync(m, "second", testkit.Nothing, task.WithUnique("k"))
				third := submitAsync(m, "third", never, task.WithID("a"), task.WithUnique("k"))
				synctest.Wait()
				g.answer <- nil
				a, c := <-first, <-third
				wantExists(t, a.op, a.err, "a", task.StateDone)
				wantExists(t, c.op, c.err, "a", task.StateDone)
				g.answer <- nil
				if b := <-second; b.err != nil || b.op.Name != "second" {
					t.Errorf("the second Submit = %+v, %v", b.op, b.err)
				}
			})
		})
	}
}

// TestSameIDAtOnce: many goroutines submit the same IDs to two managers. Each ID runs
// once.
func TestSameIDAtOnce(t *testing.T) {
	for name, open := range testkit.Stores {
		t.Run(name, func(t *testing.T) {
			db := open(t)
			managers := []*task.Manager{testkit.NewManager(t, db)}
			if name != "four methods" {
				managers = append(managers, testkit.NewManager(t, db))
			}
			const ids, each = 50, 4
			var runs [ids]atomic.Int32
			var all sync.WaitGroup
			for _, m := range managers {
				for range each {
					all.Go(func() {
						for i := range ids {
							id := fmt.Sprint("id-", i)
							op, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
								runs[i].Add(1)
								return nil, nil
							}, task.WithID(id))
							if op == nil || op.ID != id || err != nil && !errors.Is(err, task.ErrExists) {
								t.Errorf("Submit = %+v, %v", op, err)
							}
						}
					})
				}
			}
			all.Wait()
			for i := range ids {
				if op := testkit.Wait(t, managers[0], fmt.Sprint("id-", i)); op.State != task.StateDone || runs[i].Load() != 1 {
					t.Errorf("%s is %s after %d runs", op.ID, op.State, runs[i].Load())
				}
			}
		})
	}
}

// TestWithIDRaces submits one ID again and again, while others cancel it and close the
// manager.
func TestWithIDRaces(t *testing.T) {
	path := testkit.FastPath(t)
	for round := range 20 {
		store := testkit.OpenSQLite(t, path)
		m := testkit.NewManager(t, store)
		var runs atomic.Int32
		var all sync.WaitGroup
		id := fmt.Sprint("id-", round)
		for i := range 3 {
			all.Go(func() {
				op, err := m.Submit("x", func(ctx context.Context, _ func(int)) (any, error) {
					runs.Add(1)
					<-ctx.Done()
					return nil, ctx.Err()
				}, task.WithID(id), task.WithUnique("k"))
				if err != nil && !errors.Is(err, task.ErrClosed) && (op == nil || !errors.Is(err, task.ErrExists)) {
					t.Errorf("Submit %d = %+v, %v", i, op, err)
				}
			})
			all.Go(func() {
				if err := m.Cancel(id); err != nil && !errors.Is(err, task.ErrNotFound) {
					t.Errorf("Cancel: %v", err)
				}
			})
		}
		all.Go(func() {
			time.Sleep(time.Duration(round) * 50 * time.Microsecond)
			testkit.Must(t, m.Close())
		})
		all.Wait()
		if n := runs.Load(); n > 1 {
			t.Errorf("%d runs", n)
		}
		if op, err := store.Get(id); err == nil && !op.State.Finished() {
			t.Errorf("left %+v", op)
		}
		testkit.Must(t, store.Close())
	}
}

// TestSQLiteExists: SQLiteStore distinguishes a row that exists from one that a trigger
// ignores, even in a batch and with any conflict clause of the table.
func TestSQLiteExists(t *testing.T) {
	for _, conflict := range []string{"", "ON CONFLICT REPLACE", "ON CONFLICT ROLLBACK", "ON CONFLICT IGNORE"} {
		t.Run("table "+conflict, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "tasks.db")
			testkit.Exec(t, path, `CREATE TABLE tasks (id TEXT PRIMARY KEY `+conflict+`, name TEXT NOT NULL, state TEXT NOT NULL,
				progress INTEGER DEFAULT 0, metadata TEXT, result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME)`)
			testkit.Exec(t, path, `CREATE TRIGGER ignore BEFORE INSERT ON tasks WHEN new.name = 'ignored' BEGIN SELECT RAISE(IGNORE); END`)
			testkit.Exec(t, path, `CREATE UNIQUE INDEX names ON tasks (name)`)
			store := testkit.OpenSQLite(t, path)
			testkit.Must(t, store.Save(&task.Operation{ID: "a", Name: "first", State: task.StateRunning}))
			op := func(id, name string) *task.Operation {
				return &task.Operation{ID: id, Name: name, State: task.StatePending}
			}
			errs := store.WriteBatch([]*task.Operation{op("b", "b"), op("a", "second"), op("c", "ignored"), op("a", "ignored"),
				op("d", "first"), op("e", "e"), op("b", "b2")}, []*task.Operation{{ID: "a", State: task.StateDone}, {ID: "x"}})
			for i, want := range []string{"", "exists", "a trigger", "exists", "UNIQUE", "", "exists", "", "not found"} {
				err := fmt.Sprint(errs[i])
				if want == "" && errs[i] != nil || !strings.Contains(err, want) || (want == "exists") != errors.Is(errs[i], task.ErrExists) {
					t.Errorf("error %d is %v, want %q", i, errs[i], want)
				}
			}
			if op, err := store.Get("a"); err != nil || op.Name != "first" || op.State != task.StateDone {
				t.Errorf("a is %+v, %v", op, err)
			}
			if rows := testkit.Stored(t, store); len(rows) != 3 {
				t.Errorf("%d rows: %v", len(rows), rows)
			}
		})
	}
}

// TestOrderOfGivenIDs: the first states that Watch yields are in order of submission,
// whatever the IDs are.
func TestOrderOfGivenIDs(t *testing.T) {
	m := testkit.NewManager(t, nil, task.WithLimit(1))
	ids := []string{"z", "m", "a", "y"}
	for _, id := range ids {
		testkit.Submit(t, m, testkit.UntilCancelled, task.WithID(id))
	}
	present, _, err := m.Raw().Subscribe(t.Context())
	testkit.Must(t, err)
	var got []string
	for _, op := range present {
		got = append(got, op.ID)
	}
	if !slices.Equal(got, ids) {
		t.Errorf("told in the order %v, want %v", got, ids)
	}
	page, err := m.List(2, 0, task.Before("a"))
	if err != nil || len(page) != 2 || page[0].ID != "m" || page[1].ID != "z" {
		t.Errorf("List before a = %v, %v", page, err)
	}
}
