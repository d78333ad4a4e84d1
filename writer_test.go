package task_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

// A hookStore asks hook before every Save and Update, which can block it, and
// fail it by returning an error.
type hookStore struct {
	task.Persistence
	mu   sync.Mutex // guards hook
	hook func(save bool, op *task.Operation) error
}

func (s *hookStore) set(hook func(save bool, op *task.Operation) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hook = hook
}

func (s *hookStore) ask(save bool, op *task.Operation) error {
	s.mu.Lock()
	hook := s.hook
	s.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(save, op)
}

func (s *hookStore) Save(op *task.Operation) error {
	if err := s.ask(true, op); err != nil {
		return err
	}
	return s.Persistence.Save(op)
}

func (s *hookStore) Update(op *task.Operation) error {
	if err := s.ask(false, op); err != nil {
		return err
	}
	return s.Persistence.Update(op)
}

var errDisk = errors.New("disk full")

// failFinals fails every write of a final state.
func failFinals(save bool, op *task.Operation) error {
	if op.State.Finished() {
		return errDisk
	}
	return nil
}

// TestStoredBeforeTold: no function starts before its row is stored, and no
// Wait returns before its final state is.
func TestStoredBeforeTold(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) {
		db := openSQLite(t, filepath.Join(t.TempDir(), "tasks.db"))
		storedBeforeTold(t, db, 8, 50)
	})
	for seed := range uint64(50) { // each seed makes other interleavings
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := &randomStore{MemoryStore: task.NewMemoryStore(), rand: rand.New(rand.NewPCG(seed, 0))}
				storedBeforeTold(t, db, 8, 20)
			})
		})
	}
}

func storedBeforeTold(t *testing.T, db task.Persistence, submitters, each int) {
	m := newManager(t, db)
	state := func(id string) task.State {
		op, err := db.Get(id)
		if err != nil {
			return ""
		}
		return op.State
	}
	var all sync.WaitGroup
	for i := range submitters * each {
		all.Go(func() {
			time.Sleep(time.Duration(i%each) * time.Millisecond)
			var called atomic.Bool
			op, err := m.Submit("ordered", func(ctx context.Context, update func(int)) (any, error) {
				called.Store(true)
				self, _ := task.FromContext(ctx)
				if state(self.ID) == "" {
					t.Error("started before it was stored")
				}
				update(i % 100)
				time.Sleep(time.Duration(i%7) * time.Millisecond)
				if i%3 == 0 {
					return nil, errDisk
				}
				return i, ctx.Err()
			})
			if err != nil {
				if time.Sleep(10 * time.Millisecond); called.Load() {
					t.Error("called, though Submit has failed")
				}
				return
			}
			if state(op.ID) == "" {
				t.Error("Submit returned before it was stored")
			}
			if i%5 == 0 {
				op.Cancel()
			}
			told, err := m.Wait(context.Background(), op.ID)
			if err != nil {
				t.Error(err)
			} else if got := state(op.ID); got != told.State {
				t.Errorf("told %s while %s was stored", told.State, got)
			}
		})
	}
	all.Wait()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// A randomStore takes its time, stores batches in parts, and sometimes fails.
type randomStore struct {
	*task.MemoryStore
	rand *rand.Rand // used by the writer only
}

func (s *randomStore) WriteBatch(saves, updates []*task.Operation) (errs []error) {
	for i, op := range slices.Concat(saves, updates) {
		time.Sleep(time.Duration(s.rand.IntN(3)) * time.Millisecond)
		write := s.Update
		if i < len(saves) {
			write = s.Save
		}
		switch s.rand.IntN(10) {
		case 0:
			errs = append(errs, errDisk)
		case 1: // stored, but nobody learns of it
			write(op)
			errs = append(errs, errDisk)
		default:
			errs = append(errs, write(op))
		}
	}
	time.Sleep(time.Duration(s.rand.IntN(3)) * time.Millisecond)
	return errs
}

func TestSubmitFails(t *testing.T) {
	stored := errors.New("no answer, though it is stored")
	for name, answer := range map[string]error{"not stored": errDisk, "stored after all": stored} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				db := &hookStore{Persistence: memory}
				m := newManager(t, db)
				db.set(func(save bool, op *task.Operation) error {
					if save && answer == stored {
						memory.Save(op)
					}
					if save {
						return answer
					}
					return nil
				})
				op, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
					t.Error("the function was called")
					return nil, nil
				})
				if op != nil || !errors.Is(err, answer) {
					t.Errorf("Submit: %v, %v", op, err)
				}
				synctest.Wait()
				ops, err := m.List(10, 0)
				if err != nil || answer == errDisk && len(ops) > 0 {
					t.Errorf("List: %v, %v", ops, err)
				}
				if answer == stored && (len(ops) != 1 || ops[0].State != task.StateFailed || !strings.Contains(ops[0].Error, answer.Error())) {
					t.Errorf("List: %v", ops)
				}
				if err := m.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestFinalStateFails: while its final state can't be stored, an operation is
// shown RUNNING with the reason; it is stored when the trouble is over.
func TestFinalStateFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore(), hook: failFinals}
		m := newManager(t, db)
		started := time.Now()
		op := submit(t, m, func(context.Context, func(int)) (any, error) { return "precious", nil })
		synctest.Wait()
		// Nobody knows yet that the result is not at fault, so the other
		// writes of this operation must fail as well.
		db.set(func(bool, *task.Operation) error { return errDisk })
		for range 60 {
			time.Sleep(time.Second)
			got, ok := m.Get(op.ID)
			if !ok || got.State != task.StateRunning || !strings.Contains(got.Error, "DONE") || !strings.Contains(got.Error, errDisk.Error()) {
				t.Fatalf("while it can't be stored: %+v", got)
			}
			if err := m.Cancel(op.ID); err != nil {
				t.Fatalf("Cancel: %v", err)
			}
			if _, err := m.Submit("x", untilCancelled); !errors.Is(err, errDisk) {
				t.Fatalf("Submit: %v", err)
			}
		}
		db.set(nil)
		if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != "precious" || got.Error != "" {
			t.Errorf("afterwards: %+v", got)
		}
		if took := time.Since(started); took > 62*time.Second {
			t.Errorf("stored %v after the trouble was over", took-60*time.Second)
		}
	})
}

func TestCloseReportsWhatIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore()}
		m := newManager(t, db)
		a, b := submit(t, m, untilCancelled), submit(t, m, untilCancelled)
		waiting := make(chan error)
		go func() {
			_, err := m.Wait(t.Context(), a.ID)
			waiting <- err
		}()
		synctest.Wait()
		db.set(func(bool, *task.Operation) error { return errDisk })
		started := time.Now()
		err := m.Close()
		if took := time.Since(started); took < 5*time.Second || took > 7*time.Second {
			t.Errorf("Close took %v", took)
		}
		if !errors.Is(err, errDisk) || !strings.Contains(err.Error(), a.ID) || !strings.Contains(err.Error(), b.ID) {
			t.Errorf("Close: %v", err)
		}
		if again := m.Close(); again != err {
			t.Errorf("Close again: %v", again)
		}
		if err := <-waiting; !errors.Is(err, task.ErrClosed) || !errors.Is(err, errDisk) {
			t.Errorf("Wait: %v", err)
		}
		if err := m.Shutdown(t.Context()); !errors.Is(err, errDisk) {
			t.Errorf("Shutdown: %v", err)
		}
		if got, ok := m.Get(a.ID); !ok || got.State != task.StateRunning || got.Error == "" {
			t.Errorf("Get: %+v", got)
		}
		db.set(nil)
		m = newManager(t, db) // as a store without further abilities it has one manager
		if got, _ := m.Get(a.ID); got.State != task.StateFailed || got.Error != "Task failed due to system restart" {
			t.Errorf("after a restart: %+v", got)
		}
	})
}

// TestResultAtFault: a final state that alone can't be stored loses its result
// but nothing else.
func TestResultAtFault(t *testing.T) {
	huge := strings.Repeat("x", 1000)
	limited := func(db task.Persistence) task.Persistence {
		return &hookStore{Persistence: db, hook: func(_ bool, op *task.Operation) error {
			if op.Result != nil && len(fmt.Sprintf("%s", op.Result)) > 500 {
				return errors.New("too large")
			}
			return nil
		}}
	}
	check := func(t *testing.T, m *task.Manager) {
		ops := make([]*task.Operation, 5)
		for i := range ops {
			ops[i] = submit(t, m, func(context.Context, func(int)) (any, error) { return huge[:999*(i%2)], nil }, task.WithMetadata(i))
		}
		failing := submit(t, m, func(context.Context, func(int)) (any, error) { return huge, errDisk })
		for i, op := range ops {
			got := wait(t, m, op.ID)
			kept := got.Result != nil && got.Error == ""
			lost := got.Result == nil && strings.Contains(got.Error, "result not kept: too large")
			if got.State != task.StateDone || i%2 == 0 && !kept || i%2 == 1 && !lost {
				t.Errorf("%d: %+v", i, got)
			}
		}
		if got := wait(t, m, failing.ID); got.State != task.StateFailed || got.Error != "disk full (result not kept: too large)" {
			t.Errorf("%+v", got)
		}
	}
	t.Run("four methods", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m := newManager(t, limited(task.NewMemoryStore()))
			check(t, m)
			m.Close()
		})
	})
	t.Run("sqlite", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "tasks.db")
		m := newManager(t, openSQLite(t, path))
		sqliteExec(t, path, `CREATE TRIGGER small BEFORE UPDATE ON tasks WHEN length(NEW.result) > 500
			BEGIN SELECT RAISE(ABORT, 'too large'); END`)
		check(t, m)
	})
}

// TestMetadataAtFault: a result is not given up for what SetMetadata did, and
// what can't be stored of one operation does not hold up others.
func TestMetadataAtFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore(), hook: func(_ bool, op *task.Operation) error {
			if strings.Contains(fmt.Sprintf("%s", op.Metadata), "bad") {
				return errors.New("bad metadata")
			}
			return nil
		}}
		m := newManager(t, db)
		op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
			task.SetMetadata(ctx, "bad")
			for p := range 50 {
				update(p)
				time.Sleep(100 * time.Millisecond)
			}
			return "good", errDisk
		}, task.WithMetadata("first"))
		for range 10 {
			time.Sleep(500 * time.Millisecond)
			wait(t, m, submit(t, m, func(context.Context, func(int)) (any, error) { return nil, nil }).ID)
		}
		got := wait(t, m, op.ID)
		if got.State != task.StateFailed || got.Result != "good" || got.Metadata != "first" || got.Error != "disk full (metadata not kept: bad metadata)" {
			t.Errorf("%+v", got)
		}
		m.Close()
	})
}

// TestContradiction has a store that will not update what it shows unfinished.
func TestContradiction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tries atomic.Int64
		db := &hookStore{Persistence: task.NewMemoryStore(), hook: func(save bool, op *task.Operation) error {
			if save {
				return nil
			}
			tries.Add(1)
			return task.ErrNotFound
		}}
		m := newManager(t, db)
		op := submit(t, m, func(context.Context, func(int)) (any, error) { return nil, nil })
		time.Sleep(time.Minute)
		if n := tries.Load(); n > 150 {
			t.Errorf("%d tries in a minute", n)
		}
		if err := m.Close(); err == nil || !strings.Contains(err.Error(), op.ID) {
			t.Errorf("Close: %v", err)
		}
	})
}

// TestStrangeState: what other code makes of an operation holds.
func TestStrangeState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks.db")
	m := newManager(t, openSQLite(t, path))
	fn, started, release := blocker(nil)
	op := submit(t, m, fn)
	<-started
	sqliteExec(t, path, `UPDATE tasks SET state = 'PAUSED'`)
	release()
	for range 2 {
		if got := wait(t, m, op.ID); got.State != "PAUSED" {
			t.Errorf("%+v", got)
		}
	}
	if err := m.Cancel(op.ID); !errors.Is(err, task.ErrNotFound) {
		t.Error(err)
	}
}

// TestLogMayAsk: a log handler that asks the manager does not block it.
func TestLogMayAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore(), hook: func(_ bool, op *task.Operation) error {
			if op.Result != nil {
				return errDisk
			}
			return nil
		}}
		asking := &askingHandler{}
		m := task.NewManager(db, task.WithLogger(slog.New(asking)))
		asking.set(m)
		op := submit(t, m, func(context.Context, func(int)) (any, error) { return 1, nil })
		wait(t, m, op.ID)
		m.Close()
		if asking.asked == 0 {
			t.Error("nothing was logged")
		}
	})
}

// An askingHandler calls Get and List whenever something is logged.
type askingHandler struct {
	slog.Handler
	mu    sync.Mutex // guards what follows
	m     *task.Manager
	asked int
}

func (h *askingHandler) set(m *task.Manager) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.m = m
}

func (h *askingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *askingHandler) Handle(context.Context, slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.m != nil {
		h.asked++
		ops, err := h.m.List(10, 0)
		for _, op := range ops {
			h.m.Get(op.ID)
		}
		return err
	}
	return nil
}

// TestCloseIsBounded has a store take 10 seconds to fail, for every write.
func TestCloseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &slowStore{MemoryStore: task.NewMemoryStore()}
		m := newManager(t, db)
		var all sync.WaitGroup
		for range 5000 {
			all.Go(func() { submit(t, m, untilCancelled) })
		}
		all.Wait()
		db.broken.Store(true)
		started := time.Now()
		var submits sync.WaitGroup
		for range 5000 {
			submits.Go(func() {
				if _, err := m.Submit("x", untilCancelled); err == nil {
					t.Error("Submit succeeded")
				}
				if took := time.Since(started); took > 21*time.Second {
					t.Errorf("Submit took %v", took)
				}
			})
		}
		submits.Wait()
		started = time.Now()
		if err := m.Close(); err == nil {
			t.Error("Close has nothing to report")
		}
		if took := time.Since(started); took > 21*time.Second {
			t.Errorf("Close took %v", took)
		}
	})
}

type slowStore struct {
	*task.MemoryStore
	broken atomic.Bool
}

func (s *slowStore) WriteBatch(saves, updates []*task.Operation) (errs []error) {
	if !s.broken.Load() {
		return (&batchCounter{Persistence: s.MemoryStore}).WriteBatch(saves, updates)
	}
	time.Sleep(10 * time.Second)
	return slices.Repeat([]error{errDisk}, len(saves)+len(updates))
}

// TestWriteBatchAnswers: a store may answer a batch that it has stored with
// nothing, and one that can't count does not crash the program.
func TestWriteBatchAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		errs []error
		want string
	}{
		"nothing":  {nil, ""},
		"too many": {make([]error, 7), "7 errors for 1 operations"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := &answerStore{MemoryStore: task.NewMemoryStore(), errs: test.errs}
				m := newManager(t, db)
				op, err := m.Submit("x", func(context.Context, func(int)) (any, error) { return nil, nil })
				if test.want == "" {
					if err != nil || wait(t, m, op.ID).State != task.StateDone {
						t.Errorf("%v, %v", op, err)
					}
				} else if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("Submit: %v", err)
				}
				m.Close()
			})
		})
	}
}

type answerStore struct {
	*task.MemoryStore
	errs []error
}

func (s *answerStore) WriteBatch(saves, updates []*task.Operation) []error {
	(&batchCounter{Persistence: s.MemoryStore}).WriteBatch(saves, updates)
	return s.errs
}

// TestRowTaken: what the database says holds, when somebody else has finished
// or deleted an operation meanwhile.
func TestRowTaken(t *testing.T) {
	for name, stmt := range map[string]string{
		"finished": `UPDATE tasks SET state = 'FAILED', error = 'by hand'`,
		"deleted":  `DELETE FROM tasks`,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "tasks.db")
			m := newManager(t, openSQLite(t, path))
			fn, started, release := blocker(nil)
			op := submit(t, m, fn)
			<-started
			sqliteExec(t, path, stmt)
			release()
			got, err := m.Wait(t.Context(), op.ID)
			if name == "finished" && (err != nil || got.State != task.StateFailed || got.Error != "by hand") {
				t.Errorf("Wait: %+v, %v", got, err)
			}
			if name == "deleted" && !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Wait: %+v, %v", got, err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if ops, err := m.List(10, 0); err != nil || name == "deleted" && len(ops) > 0 {
				t.Errorf("List: %v, %v", ops, err)
			}
		})
	}
}

// TestCancelPending cancels an operation whose row is stored but which has not
// been started, because the store has not answered yet.
func TestCancelPending(t *testing.T) {
	for name, failing := range map[string]bool{"stored": false, "not stored": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				memory := task.NewMemoryStore()
				answer := make(chan error)
				db := &hookStore{Persistence: memory, hook: func(save bool, op *task.Operation) error {
					if save {
						return <-answer
					}
					return nil
				}}
				m := newManager(t, db)
				submitted := make(chan *task.Operation)
				started := false
				go func() {
					op, err := m.Submit("x", func(context.Context, func(int)) (any, error) { started = true; return nil, nil })
					if err != nil {
						t.Error(err)
					}
					submitted <- op
				}()
				synctest.Wait()
				id := task.OnlyLive(m)
				cancelled := make(chan error)
				go func() { cancelled <- m.Cancel(id) }()
				synctest.Wait()
				if failing {
					db.set(failFinals)
				}
				answer <- nil
				op := <-submitted
				err := <-cancelled
				if failing {
					if err == nil || !strings.Contains(err.Error(), errDisk.Error()) {
						t.Errorf("Cancel: %v", err)
					}
					db.set(nil)
				} else if err != nil {
					t.Error(err)
				}
				if op := wait(t, m, op.ID); op.State != task.StateCancelled || !op.StartedAt.IsZero() || op.Error != "" {
					t.Errorf("%+v", op)
				}
				if started {
					t.Error("the function was called")
				}
				m.Close()
			})
		})
	}
}

// TestConflation has a thousand functions report as fast as they can.
func TestConflation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &batchCounter{Persistence: task.NewMemoryStore()}
		m := newManager(t, db)
		stop := make(chan struct{})
		var ids []string
		for range 1000 {
			op := submit(t, m, func(_ context.Context, update func(int)) (any, error) {
				for p := 0; ; p++ {
					select {
					case <-stop:
						update(77)
						return nil, errDisk
					case <-time.After(20 * time.Millisecond):
						update(p % 100)
					}
				}
			})
			ids = append(ids, op.ID)
		}
		synctest.Wait()
		before := db.count()
		time.Sleep(3 * time.Second)
		if n := db.count() - before; n < 25 || n > 31 {
			t.Errorf("%d writes in 3 s", n)
		}
		close(stop)
		for _, id := range ids {
			if op := wait(t, m, id); op.Progress != 77 {
				t.Errorf("%+v", op)
			}
		}
		m.Close()
	})
}

// A batchCounter counts the batches that a store is given.
type batchCounter struct {
	task.Persistence
	mu sync.Mutex // guards n
	n  int
}

func (s *batchCounter) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *batchCounter) WriteBatch(saves, updates []*task.Operation) (errs []error) {
	s.mu.Lock()
	s.n++
	s.mu.Unlock()
	if db, ok := s.Persistence.(task.BatchWriter); ok {
		return db.WriteBatch(saves, updates)
	}
	for _, op := range saves {
		errs = append(errs, s.Save(op))
	}
	for _, op := range updates {
		errs = append(errs, s.Update(op))
	}
	return errs
}

// TestChangesAreStored: what is seen at once is stored soon after.
func TestChangesAreStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore()}
		m := newManager(t, db)
		op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
			update(50)
			task.SetMetadata(ctx, "new")
			<-ctx.Done()
			return nil, ctx.Err()
		})
		time.Sleep(101 * time.Millisecond)
		if got, err := db.Get(op.ID); err != nil || got.State != task.StateRunning || got.Progress != 50 || fmt.Sprintf("%s", got.Metadata) != `"new"` {
			t.Errorf("stored: %+v, %v", got, err)
		}
		// A change that can't be stored is tried again.
		db.set(func(bool, *task.Operation) error { return errDisk })
		if err := task.UpdateProgress(m, op.ID, 60); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		if got, _ := m.Get(op.ID); got.State != task.StateRunning || got.Progress != 60 || got.Error != "" {
			t.Errorf("live: %+v", got)
		}
		db.set(nil)
		time.Sleep(1100 * time.Millisecond)
		if got, err := db.Get(op.ID); err != nil || got.Progress != 60 {
			t.Errorf("stored: %+v, %v", got, err)
		}
		m.Close()
		if err := task.UpdateProgress(m, op.ID, 70); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("updateProgress of a finished one: %v", err)
		}
	})
}

// TestUpdateCost: reporting progress allocates nothing.
func TestUpdateCost(t *testing.T) {
	m := newManager(t, nil)
	op := submit(t, m, func(_ context.Context, update func(int)) (any, error) {
		p := 0
		return testing.AllocsPerRun(1000, func() { p++; update(p % 100) }), nil
	})
	var allocs float64
	if err := wait(t, m, op.ID).DecodeResult(&allocs); err != nil || allocs > 0 {
		t.Errorf("%v allocations, %v", allocs, err)
	}
}

// sqliteExec runs a statement on a database from outside.
func sqliteExec(t testing.TB, path, stmt string) {
	t.Helper()
	db, err := sql.Open("sqlite3", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(stmt); err != nil {
		t.Fatal(err)
	}
}

// TestRetryUnderLoad: those who submit without a pause do not keep a final
// state that failed once from being tried again.
func TestRetryUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore()}
		failed := false // only the writer's goroutine calls the hook
		db.set(func(save bool, op *task.Operation) error {
			time.Sleep(time.Millisecond) // or time would stand still
			if op.Name == "test" && op.State.Finished() && !failed {
				failed = true
				return errDisk
			}
			return nil
		})
		m := newManager(t, db)
		ctx, stop := context.WithCancel(t.Context())
		var load sync.WaitGroup
		for range 64 {
			load.Go(func() {
				for ctx.Err() == nil {
					if _, err := m.Submit("load", nothing); err != nil {
						t.Error(err)
					}
				}
			})
		}
		op := submit(t, m, nothing)
		start := time.Now()
		if got := wait(t, m, op.ID); got.State != task.StateDone || time.Since(start) > 5*time.Second {
			t.Errorf("%s after %v", got.State, time.Since(start))
		}
		stop()
		load.Wait()
	})
}

// TestSubmitWhileDown: what is kept of failed Submits, in case they succeeded
// after all, is bounded.
func TestSubmitWhileDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore()}
		db.set(func(bool, *task.Operation) error { return errDisk })
		m := newManager(t, db)
		var last error
		for range 10_100 {
			if _, last = m.Submit("never", func(context.Context, func(int)) (any, error) { panic("it runs") }); last == nil {
				t.Fatal("Submit succeeded")
			}
		}
		if !strings.Contains(last.Error(), "failed 10000 times") {
			t.Errorf("the last Submit: %v", last)
		}
		db.set(nil)
		time.Sleep(10 * time.Second)
		wait(t, m, submit(t, m, nothing).ID)
	})
}
