package otherstest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// Watch yields the final state of another manager's operation although its ID is
// submitted again here.
func TestWatchBesideSubmit(t *testing.T) {
	testos.Parallel(t)
	for _, named := range []bool{false, true} {
		for _, during := range []bool{false, true} {
			t.Run(fmt.Sprint("named=", named, " during=", during), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := &slowSave{MemoryStore: task.NewMemoryStore()}
					a, err := task.New(s)
					testkit.Must(t, err)
					b, err := task.New(s)
					testkit.Must(t, err)
					defer a.Close()
					defer b.Close()
					end := make(chan struct{})
					_, err = a.Submit("x", func(context.Context, func(int)) (any, error) { <-end; return nil, nil }, task.WithID("x"))
					testkit.Must(t, err)
					ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
					defer cancel()
					var ids []string
					if named {
						ids = []string{"x"}
					}
					finals := 0
					done := make(chan struct{})
					go func() {
						defer close(done)
						for op, err := range b.Watch(ctx, ids...) {
							if err == nil && op.ID == "x" && op.State.Finished() {
								finals++
							}
						}
					}()
					time.Sleep(time.Second)
					if during {
						s.mu.Lock()
						s.delay = time.Second
						s.mu.Unlock()
					}
					again := make(chan error, 1)
					go func() {
						_, err := b.Submit("x", testkit.Nothing, task.WithID("x"))
						again <- err
					}()
					if !during {
						if err := <-again; !errors.Is(err, task.ErrExists) {
							t.Error(err)
						}
					}
					time.Sleep(10 * time.Millisecond)
					close(end)
					if during {
						<-again
					}
					<-done
					if finals != 1 {
						t.Errorf("the final state was told %d times", finals)
					}
				})
			})
		}
	}
}

// A slowSave is a store whose Save is slow.
type slowSave struct {
	*task.MemoryStore
	mu    sync.Mutex
	delay time.Duration
}

func (s *slowSave) Save(op *task.Operation) error {
	s.mu.Lock()
	d := s.delay
	s.mu.Unlock()
	time.Sleep(d)
	return s.MemoryStore.Save(op)
}

// A fenceAfterFinal is fenced once it has stored a final state.
type fenceAfterFinal struct{ *leaseStore }

func (s fenceAfterFinal) Update(op *task.Operation) error {
	err := s.leaseStore.Update(op)
	if err == nil && op.State.Finished() && op.Owner == "owner 0" {
		s.fence() // right after the commit
	}
	return err
}

// A store is fenced right after it has stored a final state.
func TestLostAfterFinal(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		s := fenceAfterFinal{newLeaseStore()}
		s.quiet = true
		m, err := task.New(s)
		testkit.Must(t, err)
		end := make(chan struct{})
		var ids []string
		for range 2 {
			op, err := m.Submit("x", func(context.Context, func(int)) (any, error) { <-end; return nil, nil })
			testkit.Must(t, err)
			ids = append(ids, op.ID)
		}
		time.Sleep(time.Second)
		close(end)
		time.Sleep(time.Second)
		testkit.Must(t, m.Close())
		done := 0
		for _, id := range ids {
			op, err := s.Get(id)
			if err != nil || !op.State.Finished() {
				t.Errorf("stored: %+v, %v", op, err)
			} else if op.State == task.StateDone {
				done++
			}
			if shown, ok := m.Get(id); !ok || shown.State != op.State {
				t.Errorf("shown %+v, stored %+v", shown, op)
			}
		}
		if done == 0 {
			t.Error("the final state that was stored is gone")
		}
	})
}

// The first Recover of a failingRecover fails after one operation.
type failingRecover struct {
	*task.SQLiteStore
	fail bool
}

func (s *failingRecover) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		for op, err := range s.SQLiteStore.Recover(reason, resume) {
			if !yield(op, err) {
				return
			}
			if s.fail {
				s.fail = false
				yield(nil, errors.New("database is locked"))
				return
			}
		}
	}
}

// Operations that a failed New had taken over do not stay unfinished.
func TestNewAfterFailedNew(t *testing.T) {
	testos.Parallel(t)
	path := t.TempDir() + "/t.db"
	s, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	testkit.Must(t, s.Save(&task.Operation{ID: "x", Name: "x", State: task.StateRunning, CreatedAt: time.Now()}))
	testkit.Must(t, s.Close())
	s, err = task.OpenSQLite(path)
	testkit.Must(t, err)
	defer s.Close()
	f := &failingRecover{s, true}
	resume := task.WithResume(func(*task.Operation) (task.Func, []task.SubmitOption) { return testkit.Nothing, nil })
	if _, err = task.New(f, resume); err == nil {
		t.Fatal("no error")
	}
	m, err := task.New(f, resume)
	testkit.Must(t, err)
	defer m.Close()
	if op, err := m.Wait(t.Context(), "x"); err != nil || !op.State.Finished() {
		t.Errorf("%+v %v", op, err)
	}
}

// A manager carries out a cancel request that comes while the recovery asks about
// others.
func TestCancelDuringRecovery(t *testing.T) {
	testos.Parallel(t)
	path := t.TempDir() + "/t.db"
	dead, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	testkit.Must(t, dead.Save(&task.Operation{ID: "x1", Name: "x", State: task.StateRunning, CreatedAt: time.Now()}))
	other, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	testkit.Must(t, other.Save(&task.Operation{ID: "x2", Name: "x", State: task.StateRunning, CreatedAt: time.Now()}))
	s, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	defer s.Close()
	asked, gate := make(chan string, 10), make(chan bool)
	n := 0
	m, err := task.New(s, task.WithLimit(1), task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		asked <- op.ID
		if n++; n == 2 {
			<-gate
		}
		return testkit.Nothing, nil
	}))
	testkit.Must(t, err)
	defer m.Close()
	end := make(chan struct{})
	defer close(end)
	_, err = m.Submit("busy", func(context.Context, func(int)) (any, error) { <-end; return nil, nil })
	testkit.Must(t, err)
	go m.Wait(t.Context(), "x1")
	time.Sleep(300 * time.Millisecond)
	testkit.Must(t, dead.Close())
	testkit.Must(t, other.Close())
	first := <-asked
	<-asked // the recovery asks about the second: the first is ours by now
	b, err := task.AttachSQLite(path)
	testkit.Must(t, err)
	defer b.Close()
	mb, err := task.New(b)
	testkit.Must(t, err)
	defer mb.Close()
	testkit.Must(t, mb.Cancel(first))
	third, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	defer third.Close()
	for range third.Recover("restart", nil) {
	}
	time.Sleep(500 * time.Millisecond)
	close(gate)
	if op, err := mb.Wait(t.Context(), first); err != nil || op.State != task.StateCancelled {
		t.Errorf("%+v %v", op, err)
	}
}

// A failingGet can't read the operation b at first.
type failingGet struct {
	*task.MemoryStore
	mu   sync.Mutex
	fail int
}

func (s *failingGet) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	ops, err := s.MemoryStore.ListFiltered(f, limit, offset)
	for _, op := range ops {
		if op.ID == "b" && f.MaxValue > 0 {
			op.Metadata = task.Omitted(5000)
		}
	}
	return ops, err
}

func (s *failingGet) Get(id string) (*task.Operation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id == "b" && s.fail > 0 {
		s.fail--
		return nil, errors.New("database is locked")
	}
	return s.MemoryStore.Get(id)
}

// A read that fails in the middle of a look causes no duplicate events.
func TestWatchAfterFailedRead(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		s := &failingGet{MemoryStore: task.NewMemoryStore(), fail: 1}
		m, err := task.New(s)
		testkit.Must(t, err)
		defer m.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		told := map[string]int{}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for op, err := range m.Watch(ctx) {
				if err == nil && op.State.Finished() {
					told[op.ID]++
				}
			}
		}()
		time.Sleep(150 * time.Millisecond)
		for _, id := range []string{"a", "b"} {
			testkit.Must(t, s.Save(&task.Operation{ID: id, Name: id, State: task.StateDone, CreatedAt: time.Now(), UpdatedAt: time.Now()}))
		}
		<-done
		if told["a"] != 1 || told["b"] != 1 {
			t.Errorf("told %v", told)
		}
	})
}

// An operation that waits for a key behind a lost one, which has not started, starts.
func TestLostKeys(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		s := newLeaseStore()
		m, err := task.New(s)
		testkit.Must(t, err)
		end := make(chan struct{})
		_, err = m.Submit("running", func(context.Context, func(int)) (any, error) { <-end; return nil, nil }, task.WithLock("J"))
		testkit.Must(t, err)
		_, err = m.Submit("lost, first for K", testkit.Nothing, task.WithLock("J"), task.WithLock("K"))
		testkit.Must(t, err)
		time.Sleep(time.Second)
		s.fence()
		next, err := m.Submit("next for K", testkit.Nothing, task.WithLock("K"))
		testkit.Must(t, err)
		time.Sleep(2 * time.Second)
		if op, _ := m.Get(next.ID); op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
		close(end)
		testkit.Must(t, m.Close())
	})
}

// A hookGet lets a hook decide what Get returns.
type hookGet struct {
	*task.MemoryStore
	mu   sync.Mutex
	n    int
	hook func(n int, op *task.Operation, err error) (*task.Operation, error)
}

func (s *hookGet) Get(id string) (*task.Operation, error) {
	op, err := s.MemoryStore.Get(id)
	s.mu.Lock()
	hook := s.hook
	s.n++
	n := s.n
	s.mu.Unlock()
	if hook != nil {
		return hook(n, op, err)
	}
	return op, err
}

// A row that was read before the end of an operation is not yielded after it.
func TestWatchStaleRow(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		s := &hookGet{MemoryStore: task.NewMemoryStore()}
		a, err := task.New(s)
		testkit.Must(t, err)
		defer a.Close()
		b, err := task.New(s)
		testkit.Must(t, err)
		defer b.Close()
		end := make(chan struct{})
		op, err := a.Submit("x", func(context.Context, func(int)) (any, error) { <-end; return nil, nil })
		testkit.Must(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var states []task.State
		done := make(chan struct{})
		go func() {
			defer close(done)
			for op, err := range b.Watch(ctx) {
				if err == nil {
					states = append(states, op.State)
				}
			}
		}()
		time.Sleep(time.Second)
		s.mu.Lock()
		s.n, s.hook = 0, func(n int, op *task.Operation, err error) (*task.Operation, error) {
			if n == 2 {
				time.Sleep(time.Second)
			}
			return op, err
		}
		s.mu.Unlock()
		go b.Wait(ctx, op.ID)
		time.Sleep(10 * time.Millisecond)
		close(end)
		<-done
		finals := 0
		for _, s := range states {
			if s.Finished() {
				finals++
			}
		}
		if finals != 1 {
			t.Errorf("told %v", states)
		}
	})
}

// An operation is deleted between two reads of Watch.
func TestWatchDeletedMeanwhile(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		s := &hookGet{MemoryStore: task.NewMemoryStore()}
		b, err := task.New(s)
		testkit.Must(t, err)
		defer b.Close()
		testkit.Must(t, s.Save(&task.Operation{ID: "x", Name: "x", State: task.StateRunning}))
		s.mu.Lock()
		s.n, s.hook = 0, func(n int, op *task.Operation, err error) (*task.Operation, error) {
			if n == 1 {
				return op, err
			}
			if n == 2 {
				time.Sleep(time.Second)
			}
			return nil, task.ErrNotFound
		}
		s.mu.Unlock()
		var last error
		for _, err := range b.Watch(t.Context(), "x") {
			last = err
		}
		if !errors.Is(last, task.ErrNotFound) {
			t.Errorf("Watch ends with %v", last)
		}
	})
}

// Wait returns for an operation that is taken over while the manager closes.
func TestDrainDuringRecovery(t *testing.T) {
	testos.Parallel(t)
	path := t.TempDir() + "/t.db"
	dead, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	for _, id := range []string{"x1", "x2"} {
		testkit.Must(t, dead.Save(&task.Operation{ID: id, Name: "x", State: task.StateRunning, CreatedAt: time.Now()}))
	}
	s, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	defer s.Close()
	asked, gate := make(chan string, 10), make(chan bool)
	m, err := task.New(s, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		asked <- op.ID
		<-gate
		return testkit.Nothing, nil
	}))
	testkit.Must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	results := make(chan error, 3)
	for _, id := range []string{"x1", "x2"} {
		go func() { _, err := m.Wait(ctx, id); results <- err }()
	}
	time.Sleep(200 * time.Millisecond)
	testkit.Must(t, dead.Close())
	<-asked
	go func() { time.Sleep(200 * time.Millisecond); close(gate) }()
	testkit.Must(t, m.Drain(ctx))
	for range 2 {
		if err := <-results; err == nil || err == context.DeadlineExceeded {
			t.Error("waits for ever:", err)
		}
	}
}

// Watch yields a take-over once.
func TestWatchTakeOver(t *testing.T) {
	testos.Parallel(t)
	path := t.TempDir() + "/t.db"
	var dead []*task.SQLiteStore
	for _, id := range []string{"x1", "x2"} {
		s, err := task.OpenSQLite(path)
		testkit.Must(t, err)
		testkit.Must(t, s.Save(&task.Operation{ID: id, Name: id, State: task.StateRunning, CreatedAt: time.Now()}))
		dead = append(dead, s)
	}
	s, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	defer s.Close()
	n := 0
	m, err := task.New(s, task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		if n++; n == 2 {
			time.Sleep(400 * time.Millisecond)
		}
		return testkit.Nothing, nil
	}))
	testkit.Must(t, err)
	defer m.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		time.Sleep(200 * time.Millisecond)
		for _, s := range dead {
			s.Close()
		}
	}()
	states, finished := map[string][]task.State{}, 0
	for op, err := range m.Watch(ctx) {
		testkit.Must(t, err)
		if states[op.ID] = append(states[op.ID], op.State); op.State.Finished() {
			finished++
		}
		if finished == len(dead) {
			time.AfterFunc(300*time.Millisecond, cancel) // nothing may be yielded again
		}
	}
	if len(states) != len(dead) {
		t.Errorf("told of %d operations, want %d", len(states), len(dead))
	}
	for id, told := range states {
		if last := told[len(told)-1]; last != task.StateDone || len(slices.Compact(slices.Clone(told))) != len(told) {
			t.Errorf("%s: %v", id, told)
		}
	}
}
