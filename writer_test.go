package task_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

func TestSubmitFails(t *testing.T) {
	for name, test := range map[string]struct {
		before func(*testkit.Call) error
		after  func(*testkit.Call)
		stored bool
	}{
		"not stored": {before: func(c *testkit.Call) error {
			if c.Method == "Save" {
				return errDisk
			}
			return nil
		}},
		"stored after all": {stored: true, after: func(c *testkit.Call) {
			if c.Method == "Save" {
				c.Err = errDisk
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				m := newManager(t, testkit.Bare(db))
				db.Before(test.before)
				db.After(test.after)
				op, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
					t.Error("the function was called")
					return nil, nil
				})
				if op != nil || !errors.Is(err, errDisk) {
					t.Errorf("Submit: %v, %v", op, err)
				}
				db.Before(nil)
				db.After(nil)
				wait(t, m, submit(t, m, nothing).ID) // the next write that succeeds
				time.Sleep(time.Second)
				ops, err := m.List(10, 0)
				if err != nil || len(ops) == 2 != test.stored {
					t.Errorf("List: %v, %v", ops, err)
				}
				if test.stored && (ops[1].State != task.StateFailed || !strings.Contains(ops[1].Error, "Submit failed")) {
					t.Errorf("List: %+v", ops[1])
				}
				if err := m.Shutdown(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestFinalStateFails: while its final state can't be stored, an operation is shown
// RUNNING with the reason. Once the store works again, the final state is stored.
func TestFinalStateFails(t *testing.T) {
	for name, fault := range map[string]func(*testkit.Call) error{
		"all writes": testkit.FailWrites,
		"finals":     testkit.FailFinals,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { finalStateFails(t, fault, name == "all writes") })
		})
	}
}

func finalStateFails(t *testing.T, fault func(*testkit.Call) error, submitFails bool) {
	db := testkit.NewFake(nil)
	m := newManager(t, testkit.Bare(db))
	fn, started, release := blocker(nil)
	op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
		fn(ctx, update)
		return "precious", nil
	})
	<-started
	db.Before(fault)
	began := time.Now()
	release()
	for range 60 {
		time.Sleep(time.Second)
		got, ok := m.Get(op.ID)
		if !ok || got.State != task.StateRunning || !strings.Contains(got.Error, "DONE") || !strings.Contains(got.Error, errDisk.Error()) {
			t.Fatalf("while it can't be stored: %+v", got)
		}
		if err := m.Cancel(op.ID); err != nil {
			t.Fatalf("Cancel: %v", err)
		}
		if submitFails {
			if _, err := m.Submit("x", untilCancelled); !errors.Is(err, errDisk) {
				t.Fatalf("Submit: %v", err)
			}
		}
	}
	db.Before(nil)
	if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != "precious" || got.Error != "" {
		t.Errorf("afterwards: %+v", got)
	}
	if took := time.Since(began); took > 62*time.Second {
		t.Errorf("stored %v after the store works again", took-60*time.Second)
	}
}

func TestCloseReportsWhatIsNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, testkit.Bare(db))
		a, b := submit(t, m, untilCancelled), submit(t, m, untilCancelled)
		waiting := make(chan error)
		go func() {
			_, err := m.Wait(t.Context(), a.ID)
			waiting <- err
		}()
		synctest.Wait()
		db.Before(testkit.FailWrites)
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
		db.Before(nil)
		m = newManager(t, testkit.Bare(db)) // a store without further abilities is assumed to have one manager
		if got, _ := m.Get(a.ID); got.State != task.StateFailed || got.Error != testkit.RestartText {
			t.Errorf("after a restart: %+v", got)
		}
	})
}

// TestContradiction uses a store that refuses to update an operation that it returns as
// unfinished.
func TestContradiction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, testkit.Bare(db))
		db.Before(func(c *testkit.Call) error {
			if c.Method == "Update" {
				return task.ErrNotFound
			}
			return nil
		})
		op := submit(t, m, nothing)
		time.Sleep(time.Minute)
		if n := db.Count("Update"); n > 150 {
			t.Errorf("%d calls of Update in a minute", n)
		}
		if err := m.Close(); err == nil || !strings.Contains(err.Error(), op.ID) {
			t.Errorf("Close: %v", err)
		}
	})
}

// TestLogMayAsk: a log handler may call the manager without blocking it.
func TestLogMayAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		asking := &askingHandler{}
		m := task.NewManager(testkit.Bare(db), task.WithLogger(slog.New(asking)))
		asking.set(m)
		db.Before(testkit.FailWrites)
		if _, err := m.Submit("x", nothing); !errors.Is(err, errDisk) {
			t.Errorf("Submit: %v", err)
		}
		db.Before(func(c *testkit.Call) error {
			if c.Method == "Update" && c.N < 3 {
				return errDisk
			}
			return nil
		})
		op := submit(t, m, func(context.Context, func(int)) (any, error) { return func() {}, nil })
		wait(t, m, op.ID)
		m.Close()
		if asking.asked == 0 {
			t.Error("nothing was logged")
		}
	})
}

// An askingHandler calls Get and List for each record.
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

// TestCloseIsBounded makes every write take 10 seconds and then fail.
func TestCloseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db)
		var all sync.WaitGroup
		for range 5000 {
			all.Go(func() { submit(t, m, untilCancelled) })
		}
		all.Wait()
		db.Before(func(c *testkit.Call) error {
			if c.Method != "WriteBatch" {
				return nil
			}
			time.Sleep(10 * time.Second)
			return errDisk
		})
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
			t.Error("Close returned no error")
		}
		if took := time.Since(started); took > 21*time.Second {
			t.Errorf("Close took %v", took)
		}
	})
}

// TestWriteBatchAnswers: WriteBatch may return no errors at all for a stored batch. A
// wrong number of errors causes an error, not a panic.
func TestWriteBatchAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		errs []error
		want string
	}{
		"no errors": {nil, ""},
		"too many":  {make([]error, 7), "7 errors for 1 operations"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				db.After(func(c *testkit.Call) {
					if c.Method == "WriteBatch" {
						c.Errs = test.errs
					}
				})
				m := newManager(t, db)
				op, err := m.Submit("x", nothing)
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

// TestRowTaken: if other code has finished or deleted an operation, or set a state of
// its own, the manager accepts what the database contains.
func TestRowTaken(t *testing.T) {
	for name, test := range map[string]struct {
		stmt  string
		state task.State // "" if the row was deleted
		text  string
	}{
		"finished":      {`UPDATE tasks SET state = 'FAILED', error = 'by hand'`, task.StateFailed, "by hand"},
		"unknown state": {`UPDATE tasks SET state = 'PAUSED'`, "PAUSED", ""},
		"deleted":       {`DELETE FROM tasks`, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := testkit.Path(t)
			m := newManager(t, openSQLite(t, path))
			fn, started, release := blocker(nil)
			op := submit(t, m, fn)
			<-started
			sqliteExec(t, path, test.stmt)
			release()
			for range 2 {
				got, err := m.Wait(t.Context(), op.ID)
				if test.state == "" {
					if !errors.Is(err, task.ErrNotFound) {
						t.Errorf("Wait: %+v, %v", got, err)
					}
				} else if err != nil || got.State != test.state || got.Error != test.text {
					t.Errorf("Wait: %+v, %v", got, err)
				}
			}
			if err := m.Cancel(op.ID); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Cancel: %v", err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if ops, err := m.List(10, 0); err != nil || (len(ops) == 0) != (test.state == "") {
				t.Errorf("List: %v, %v", ops, err)
			}
		})
	}
}

// TestCancelBeforeStored cancels an operation whose first row the store has not
// confirmed yet.
func TestCancelBeforeStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		ids, answer := make(chan string), make(chan error)
		db.Before(func(c *testkit.Call) error {
			if c.Method != "Save" {
				return nil
			}
			ids <- c.ID
			return <-answer
		})
		m := newManager(t, testkit.Bare(db))
		submitted := make(chan error)
		go func() {
			_, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
				t.Error("the function was called")
				return nil, nil
			})
			submitted <- err
		}()
		id := <-ids
		cancelled := make(chan error)
		go func() { cancelled <- m.Cancel(id) }()
		synctest.Wait()
		answer <- nil
		if err := <-submitted; err != nil {
			t.Error(err)
		}
		if err := <-cancelled; err != nil {
			t.Error(err)
		}
		if op := wait(t, m, id); op.State != task.StateCancelled || !op.StartedAt.IsZero() || op.Error != "" {
			t.Errorf("%+v", op)
		}
		m.Close()
	})
}

// TestConflation: a thousand functions report as fast as they can.
func TestConflation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
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
		before := db.Count("WriteBatch")
		time.Sleep(3 * time.Second)
		if n := db.Count("WriteBatch") - before; n < 25 || n > 31 {
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

// TestChangesAreStored: progress and metadata are stored soon after they become
// visible.
func TestChangesAreStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, testkit.Bare(db))
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
		// A change that can't be stored is stored later.
		db.Before(testkit.FailWrites)
		must(t, task.UpdateProgress(m, op.ID, 60))
		time.Sleep(time.Minute)
		if got, _ := m.Get(op.ID); got.State != task.StateRunning || got.Progress != 60 || got.Error != "" {
			t.Errorf("live: %+v", got)
		}
		db.Before(nil)
		time.Sleep(1100 * time.Millisecond)
		if got, err := db.Get(op.ID); err != nil || got.Progress != 60 {
			t.Errorf("stored: %+v, %v", got, err)
		}
		m.Close()
	})
}

// TestChangesGoAlong: a change joins the next write, but not one that is under way.
func TestChangesGoAlong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db)
		long := submit(t, m, testkit.UntilCancelled)
		synctest.Wait() // takes no time
		writes := db.Count("WriteBatch")
		submit(t, m, testkit.UntilCancelled)
		if got, err := db.Get(long.ID); err != nil || got.State != task.StateRunning {
			t.Errorf("stored: %+v, %v", got, err)
		}
		if n := db.Count("WriteBatch") - writes; n != 1 {
			t.Errorf("%d writes", n)
		}
		m.Close()
	})
}

// TestCheckpoint: what Checkpoint has confirmed is stored.
func TestCheckpoint(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
			id, _ := task.FromContext(ctx)
			for i := range 20 {
				update(i)
				if err := errors.Join(task.SetMetadata(ctx, i), task.Checkpoint(ctx)); err != nil {
					return nil, err
				}
				row, err := db.Get(id.ID)
				if err != nil || row.State != task.StateRunning || row.StartedAt.IsZero() || row.Progress != i || fmt.Sprintf("%s", row.Metadata) != fmt.Sprint(i) {
					return nil, fmt.Errorf("stored: %+v, %v", row, err)
				}
			}
			return nil, nil
		})
		if op := wait(t, m, op.ID); op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
	})
	if err := task.Checkpoint(t.Context()); err == nil {
		t.Error("a context of no operation: no error")
	}
}

// TestCheckpointAlone: Checkpoint waits only for its own operation, not for all others
// that have changed.
func TestCheckpointAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const others, along = 200, 64
		db := testkit.NewFake(nil)
		m := newManager(t, db)
		report, checkpoint := make(chan struct{}), make(chan struct{})
		for range others {
			submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
				<-report
				update(1)
				return untilCancelled(ctx, update)
			})
		}
		op := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
			<-checkpoint
			return nil, task.Checkpoint(ctx)
		})
		time.Sleep(time.Second) // until all are stored as RUNNING
		var updates []int
		db.Before(func(c *testkit.Call) error {
			if c.Method == "WriteBatch" {
				updates = append(updates, len(c.Updates))
			}
			return nil
		})
		close(report)
		synctest.Wait()
		close(checkpoint)
		if op := wait(t, m, op.ID); op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
		if len(updates) == 0 || updates[0] == 0 || updates[0] > along+1 {
			t.Errorf("updates in each write: %d", updates)
		}
		m.Close()
	})
}

// TestCheckpointFails: Checkpoint waits while the store fails, but only until its
// context is done or its function returns, and not for a deleted row.
func TestCheckpointFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db)
		got := make(chan error, 10)
		finish := make(chan error)
		op := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
			must(t, task.Checkpoint(ctx))
			db.Before(testkit.FailWrites)
			short, stop := context.WithTimeout(ctx, time.Second)
			defer stop()
			got <- task.Checkpoint(short)
			go func() { got <- task.Checkpoint(context.WithoutCancel(ctx)) }()
			time.Sleep(time.Minute)
			db.Before(nil)
			time.Sleep(2 * time.Second)
			db.Before(testkit.FailWrites)
			go func() { got <- task.Checkpoint(context.WithoutCancel(ctx)) }()
			<-finish
			go func() { time.Sleep(time.Second); got <- task.Checkpoint(context.WithoutCancel(ctx)) }()
			return nil, nil
		})
		if err := <-got; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the context's end: %v", err)
		}
		if err := <-got; err != nil {
			t.Errorf("the store works again: %v", err)
		}
		finish <- nil
		for range 2 {
			if err := <-got; err == nil || !strings.Contains(err.Error(), "has returned") {
				t.Errorf("the function has returned: %v", err)
			}
		}
		db.Before(nil)
		wait(t, m, op.ID)
		m.Close()
	})
}

// TestCheckpointDeleted: Checkpoint returns an error for a deleted operation.
func TestCheckpointDeleted(t *testing.T) {
	db := testkit.NewFake(nil)
	m := newManager(t, db)
	db.Before(func(c *testkit.Call) error {
		if c.Method == "Update" {
			return task.ErrNotFound
		}
		return nil
	})
	op := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
		if err := task.Checkpoint(ctx); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Checkpoint: %v", err)
		}
		db.Before(nil)
		return nil, nil
	})
	wait(t, m, op.ID)
}

// TestLogHandlers: a log handler that blocks or panics delays only logging, and New and
// Close for at most a second.
func TestLogHandlers(t *testing.T) {
	for name, handle := range map[string]func(block chan struct{}){
		"blocks": func(block chan struct{}) { <-block },
		"panics": func(chan struct{}) { panic("no log") },
		"exits":  func(chan struct{}) { runtime.Goexit() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				block := make(chan struct{})
				handler := &funcHandler{handle: func() { handle(block) }}
				db := testkit.NewFake(nil)
				db.Before(testkit.FailFinals)
				m := task.NewManager(db, task.WithLogger(slog.New(handler)))
				panics := func(context.Context, func(int)) (any, error) { panic("oh") }
				bad := submit(t, m, panics)
				time.Sleep(time.Minute)
				db.Before(nil)
				if got := wait(t, m, bad.ID); got.State != task.StateFailed {
					t.Errorf("%+v", got)
				}
				for range 2000 { // more records than the queue holds
					wait(t, m, submit(t, m, panics).ID)
				}
				start := time.Now()
				must(t, m.Close())
				if d := time.Since(start); d > 2*time.Second {
					t.Errorf("Close took %v", d)
				}
				close(block)
				synctest.Wait()
				if name != "exits" && handler.calls.Load() < 1000 {
					t.Errorf("%d records", handler.calls.Load())
				}
			})
		})
	}
}

type funcHandler struct {
	slog.Handler
	handle func()
	calls  atomic.Int64
}

func (h *funcHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *funcHandler) Handle(context.Context, slog.Record) error {
	h.calls.Add(1)
	h.handle()
	return nil
}

// TestUnchangedProgress: a report of an unchanged value causes no event and no write,
// and does not change UpdatedAt.
func TestUnchangedProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db)
		op := newPuppet(t, m, "op")
		op.update(10)
		v := view(t, m)
		v.want(t, "op RUNNING 10")
		before, _ := m.Get(op.ID)
		writes := db.Count("WriteBatch")
		op.update(10)
		v.want(t)
		if after, _ := m.Get(op.ID); !after.UpdatedAt.Equal(before.UpdatedAt) {
			t.Errorf("UpdatedAt was %v and is %v", before.UpdatedAt, after.UpdatedAt)
		}
		if n := db.Count("WriteBatch") - writes; n != 0 {
			t.Errorf("%d writes", n)
		}
		op.update(11)
		v.want(t, "op RUNNING 11")
		m.Close()
	})
}

// TestUpdateCost: update allocates nothing, with and without watchers.
func TestUpdateCost(t *testing.T) {
	for name, watched := range map[string]bool{"not watched": false, "watched": true} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, nil)
			if watched {
				v := view(t, m)
				defer v.stop()
			}
			op := submit(t, m, func(_ context.Context, update func(int)) (any, error) {
				p := 0
				return testing.AllocsPerRun(100_000, func() { p++; update(p % 100) }), nil
			})
			var allocs float64
			if err := wait(t, m, op.ID).DecodeResult(&allocs); err != nil || allocs > 0 {
				t.Errorf("%v allocations, %v", allocs, err)
			}
		})
	}
}

// TestRetryUnderLoad: constant submissions do not keep a failed final state from being
// stored.
func TestRetryUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		failed := false // only the writer's goroutine calls the hook
		db.Before(func(c *testkit.Call) error {
			if c.Method != "Save" && c.Method != "Update" {
				return nil
			}
			time.Sleep(time.Millisecond) // otherwise time would stand still
			if c.Finished() && c.Updates[0].Name == "test" && !failed {
				failed = true
				return errDisk
			}
			return nil
		})
		m := newManager(t, testkit.Bare(db))
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

// TestLargeResults: however many large results wait to be stored, one write contains
// only a few of them, and all get their turn.
func TestLargeResults(t *testing.T) {
	const n, size, most = 16, 3 << 20, 16 << 20
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(task.NewMemoryStore())
		m := newManager(t, db)
		var tried sync.Map
		db.Before(func(c *testkit.Call) error {
			bytes := 0
			for _, op := range c.Updates {
				if op.State.Finished() {
					bytes += len(op.Result.(json.RawMessage))
					tried.Store(op.ID, true)
				}
			}
			if bytes > most {
				t.Errorf("a write has %d bytes", bytes)
			}
			return testkit.FailFinals(c)
		})
		var ops []*task.Operation
		result := strings.Repeat("x", size)
		for range n {
			ops = append(ops, submit(t, m, func(context.Context, func(int)) (any, error) { return result, nil }))
		}
		time.Sleep(100 * time.Millisecond) // until all have been tried once
		tried.Clear()
		time.Sleep(n * size / (most - size) * time.Second)
		for _, op := range ops {
			if _, ok := tried.Load(op.ID); !ok {
				t.Errorf("%s is not tried again", op.ID)
			}
		}
		db.Before(nil)
		for _, op := range ops {
			if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != result {
				t.Errorf("%s is %s, %q", op.ID, got.State, got.Error)
			}
		}
	})
}

// TestSubmitWhileStoreFails: rows that were stored although Submit returned an error
// become FAILED. However many Submits fail, the next is tried.
func TestSubmitWhileStoreFails(t *testing.T) {
	never := func(context.Context, func(int)) (any, error) { panic("the function was called") }
	for name, n := range map[string]int{"some": 300, "more than are remembered": 20_100} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				m := newManager(t, testkit.Bare(db))
				db.Before(func(c *testkit.Call) error {
					if c.Method == "Update" {
						return errDisk
					}
					return nil
				})
				db.After(func(c *testkit.Call) {
					if c.Method == "Save" { // the row is stored
						c.Err = errDisk
					}
				})
				for range n {
					if _, err := m.Submit("never", never); !errors.Is(err, errDisk) {
						t.Fatalf("Submit: %v, want %v", err, errDisk)
					}
				}
				db.Before(nil)
				db.After(nil)
				if op := wait(t, m, submit(t, m, nothing).ID); op.State != task.StateDone {
					t.Errorf("once the store works again: %+v", op)
				}
				time.Sleep(10 * time.Second)
				failed, err := m.List(n+1, 0, task.ByState(task.StateFailed))
				if err != nil || n == 300 && len(failed) != n || len(failed) < 300 {
					t.Errorf("%d of %d operations have failed, %v", len(failed), n, err)
				}
				must(t, m.Close())
				_, l := testkit.NewLogged(t, testkit.Bare(db)) // recovers the others
				if _, recovered := l.Recovered(); len(failed)+recovered != n {
					t.Errorf("%d have failed and %d were recovered, want %d in all", len(failed), recovered, n)
				}
			})
		})
	}
}

// TestCloseInsertInFlight closes a manager while one insert takes longer than Close
// waits, and another one is queued: neither is left unfinished.
func TestCloseInsertInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := task.NewMemoryStore()
		db := testkit.NewFake(memory)
		db.Before(func(c *testkit.Call) error {
			if c.Method == "WriteBatch" || c.Method == "Save" {
				time.Sleep(6 * time.Second)
			}
			return nil
		})
		m := newManager(t, db)
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() { m.Submit("x", nothing) })
			time.Sleep(100 * time.Millisecond)
		}
		if err := m.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		all.Wait()
		ops, err := memory.List(10, 0)
		for _, op := range ops {
			if !op.State.Finished() {
				t.Errorf("left %s: %s", op.State, op.Error)
			}
		}
		if err != nil || len(ops) == 0 {
			t.Errorf("List: %d operations, %v", len(ops), err)
		}
	})
}
