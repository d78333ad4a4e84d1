package otherstest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// A leaseStore is a store that others may take for dead: see fence.
type leaseStore struct {
	*task.MemoryStore
	mu    sync.Mutex
	n     int             // of the present owner
	gone  map[string]bool // the earlier owners
	quiet bool            // Changes does not notice
}

func newLeaseStore() *leaseStore {
	return &leaseStore{MemoryStore: task.NewMemoryStore(), gone: make(map[string]bool)}
}

func (s *leaseStore) Owner() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprint("owner ", s.n)
}

// fence marks the present owner as dead, and recovers its operations.
func (s *leaseStore) fence() {
	old := s.Owner()
	s.mu.Lock()
	s.gone[old] = true
	s.n++
	s.mu.Unlock()
	for range s.Recover("taken for dead", nil) {
	}
}

func (s *leaseStore) fenced(op *task.Operation) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gone[op.Owner]
}

func (s *leaseStore) Save(op *task.Operation) error {
	if s.fenced(op) {
		return fmt.Errorf("save: %w", task.ErrLost)
	}
	return s.MemoryStore.Save(op)
}

func (s *leaseStore) Update(op *task.Operation) error {
	if s.fenced(op) {
		return fmt.Errorf("update: %w", task.ErrLost)
	}
	return s.MemoryStore.Update(op)
}

func (s *leaseStore) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		ops, err := s.MemoryStore.ListFiltered(task.Filter{States: []task.State{task.StatePending, task.StateRunning}}, 1000, 0)
		if err != nil {
			yield(nil, err)
			return
		}
		for _, op := range ops {
			if !s.fenced(op) {
				continue
			}
			op.State, op.Error, op.UpdatedAt = task.StateFailed, reason, time.Now()
			if err := s.MemoryStore.Update(op); err == nil && !yield(op, nil) {
				return
			}
		}
	}
}

// Changes yields ErrLost after each fence.
func (s *leaseStore) Changes(ctx context.Context) iter.Seq[error] {
	return func(yield func(error) bool) {
		for owner := s.Owner(); ctx.Err() == nil && yield(nil); {
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			if !s.quiet && s.Owner() != owner {
				yield(fmt.Errorf("changes: %w", task.ErrLost))
				return
			}
		}
	}
}

// A mortalStore is a leaseStore that reports deaths.
type mortalStore struct {
	*leaseStore
	deaths chan struct{}
}

func (s mortalStore) Deaths() <-chan struct{} { return s.deaths }

// A manager without waiters recovers orphans when its store reports a death, until the
// manager is closed.
func TestDeaths(t *testing.T) {
	testos.Parallel(t)
	synctest.Test(t, func(t *testing.T) {
		s := mortalStore{newLeaseStore(), make(chan struct{}, 1)}
		m, err := task.New(s)
		testkit.Must(t, err)
		save := func(id string) {
			testkit.Must(t, s.Save(&task.Operation{ID: id, Name: id, State: task.StateRunning, Owner: "another"}))
		}
		die := func() {
			s.mu.Lock()
			s.gone["another"] = true
			s.mu.Unlock()
			s.deaths <- struct{}{}
			synctest.Wait()
			s.mu.Lock()
			delete(s.gone, "another")
			s.mu.Unlock()
		}
		for _, id := range []string{"first", "second"} {
			save(id)
			synctest.Wait()
			if op, _ := s.Get(id); op.State != task.StateRunning {
				t.Errorf("%s is %s before its process has died", id, op.State)
			}
			die()
			if op, _ := s.Get(id); op.State != task.StateFailed || op.Error != testkit.RestartText {
				t.Errorf("%s is %s with the error %q, want FAILED", id, op.State, op.Error)
			}
		}
		testkit.Must(t, m.Close())
		save("third")
		die()
		if op, _ := s.Get("third"); op.State != task.StateRunning {
			t.Errorf("a closed manager has recovered: %s", op.State)
		}
	})
}

// A manager whose store was fenced gives up its operations, and continues.
func TestLost(t *testing.T) {
	testos.Parallel(t)
	for name, report := range map[string]bool{"noticed by a write": true, "noticed by Changes": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newLeaseStore()
				s.quiet = report
				m, err := task.New(s, task.WithLimit(1))
				testkit.Must(t, err)
				causes, end := make(chan error, 1), make(chan struct{})
				running, err := m.Submit("running", func(ctx context.Context, update func(int)) (any, error) {
					for i := 0; ctx.Err() == nil; i++ {
						if report {
							update(i % 100)
						}
						time.Sleep(time.Millisecond)
					}
					causes <- context.Cause(ctx)
					<-end
					return "too late", nil
				}, task.WithUnique("pool"))
				testkit.Must(t, err)
				waiting, err := m.Submit("waiting", func(context.Context, func(int)) (any, error) {
					t.Error("a lost operation has started")
					return nil, nil
				})
				testkit.Must(t, err)
				results := make(chan *task.Operation, 2)
				for _, op := range []*task.Operation{running, waiting} {
					go func() {
						op, err := m.Wait(t.Context(), op.ID)
						if err != nil {
							t.Error(err)
						}
						results <- op
					}()
				}
				time.Sleep(time.Second)

				s.fence()
				if err := <-causes; !errors.Is(err, task.ErrLost) {
					t.Errorf("cause %v", err)
				}
				for range 2 {
					if op := <-results; op.State != task.StateFailed || op.Error != "taken for dead" {
						t.Errorf("Wait: %+v", op)
					}
				}
				if op, err := m.Submit("same key", testkit.Nothing, task.WithUnique("pool")); !errors.Is(err, task.ErrExists) || op.ID != running.ID {
					t.Errorf("a lost operation that still runs has no key: %v, %v", op, err)
				}
				next, err := m.Submit("next", testkit.Nothing)
				testkit.Must(t, err)
				synctest.Wait()
				if op, _ := m.Get(next.ID); op.State != task.StatePending || op.Owner != "owner 1" {
					t.Errorf("while a lost function runs: %+v", op)
				}
				close(end)
				if op, err := m.Wait(t.Context(), next.ID); err != nil || op.State != task.StateDone {
					t.Errorf("after it has returned: %+v, %v", op, err)
				}
				if _, err := m.Submit("same key", testkit.Nothing, task.WithUnique("pool")); err != nil {
					t.Error(err)
				}
				testkit.Must(t, m.Close())
				if op, _ := m.Get(running.ID); op.State != task.StateFailed || op.Result != nil {
					t.Errorf("in the end: %+v", op)
				}
			})
		})
	}
}

// The function of a lost operation gets ErrLost, whatever it does with its context.
func TestLostContext(t *testing.T) {
	testos.Parallel(t)
	s := newLeaseStore()
	m, err := task.New(s)
	testkit.Must(t, err)
	errs := make(map[string]error)
	op, err := m.Submit("work", func(ctx context.Context, _ func(int)) (any, error) {
		s.fence()
		<-ctx.Done()
		ctx = context.WithoutCancel(ctx)
		errs["SetMessage"] = task.SetMessage(ctx, "here")
		errs["SetMetadata"] = task.SetMetadata(ctx, 1)
		errs["Checkpoint"] = task.Checkpoint(ctx)
		return nil, nil
	})
	testkit.Must(t, err)
	_, err = m.Wait(t.Context(), op.ID)
	testkit.Must(t, err)
	testkit.Must(t, m.Close())
	for _, what := range []string{"SetMessage", "SetMetadata", "Checkpoint"} {
		if !errors.Is(errs[what], task.ErrLost) {
			t.Errorf("%s: %v", what, errs[what])
		}
	}
}

// A Submit whose commit is fenced fails, and its function never runs.
func TestLostSubmit(t *testing.T) {
	testos.Parallel(t)
	s := newLeaseStore()
	s.gone["owner 0"] = true
	m, err := task.New(s)
	testkit.Must(t, err)
	_, err = m.Submit("work", func(context.Context, func(int)) (any, error) {
		t.Error("it has run")
		return nil, nil
	})
	if !errors.Is(err, task.ErrLost) {
		t.Errorf("Submit: %v", err)
	}
	s.fence()
	op, err := m.Submit("work", testkit.Nothing)
	testkit.Must(t, err)
	if op, err = m.Wait(t.Context(), op.ID); err != nil || op.State != task.StateDone {
		t.Errorf("after it: %+v, %v", op, err)
	}
	testkit.Must(t, m.Close())
}

// A fencedStore has one operation, of a dead owner. It is fenced once, after Recover
// has taken the operation over and before the manager knows that.
type fencedStore struct {
	*leaseStore
	owner string // of the operation
	again bool   // the operation is left for this manager to take over; otherwise another one fails it
}

func (s *fencedStore) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		op, err := s.Get("left")
		if err != nil {
			yield(nil, err)
			return
		}
		if op.State.Finished() || s.owner == s.Owner() {
			return
		}
		first := s.owner == "dead"
		if op.State = task.StatePending; !resume(op) {
			op.State, op.Error = task.StateFailed, reason
		}
		op.UpdatedAt, s.owner = time.Now(), s.Owner()
		op.Owner = s.owner
		if err := s.MemoryStore.Update(op); err != nil || !yield(op, nil) || !first {
			return
		}
		s.mu.Lock()
		s.gone[s.owner] = true
		s.n++
		s.mu.Unlock()
		if !s.again {
			other := *op
			other.State, other.Error = task.StateFailed, "taken for dead"
			s.MemoryStore.Update(&other)
		}
	}
}

// If a store is fenced between the take-over of an operation and its start, its manager
// does not run the operation. The next one to take it over does.
func TestLostBeforeResumed(t *testing.T) {
	testos.Parallel(t)
	for name, again := range map[string]bool{"recovered by another": false, "recovered again": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &fencedStore{leaseStore: newLeaseStore(), owner: "dead", again: again}
				testkit.Must(t, s.MemoryStore.Save(&task.Operation{ID: "left", Name: "left", State: task.StateRunning, CreatedAt: time.Now()}))
				runs := 0
				m, err := task.New(s, task.WithResume(func(*task.Operation) (task.Func, []task.SubmitOption) {
					return func(context.Context, func(int)) (any, error) {
						runs++
						time.Sleep(time.Second)
						return nil, nil
					}, nil
				}))
				testkit.Must(t, err)
				op, err := m.Wait(t.Context(), "left")
				testkit.Must(t, err)
				want, wantRuns := task.StateFailed, 0
				if again {
					want, wantRuns = task.StateDone, 1
				}
				if op.State != want || runs != wantRuns {
					t.Errorf("ran %d times and is %+v, want %s and %d", runs, op, want, wantRuns)
				}
				time.Sleep(time.Minute) // nothing more may happen
				testkit.Must(t, m.Close())
				if stored, err := s.Get("left"); err != nil || stored.State != want || runs != wantRuns {
					t.Errorf("ran %d times, stored is %+v, %v", runs, stored, err)
				}
			})
		})
	}
}
