package docstest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/tasktest"
)

// The recipes here are those of the documents, word for word.

func newManager(t *testing.T, db task.Persistence) *task.Manager {
	t.Helper()
	m, err := task.New(db, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func submit(t *testing.T, m *task.Manager, name string, fn task.Func) *task.Operation {
	t.Helper()
	op, err := m.Submit(name, fn)
	if err != nil {
		t.Fatal(err)
	}
	return op
}

func wait(t *testing.T, m *task.Manager, id string) *task.Operation {
	t.Helper()
	op, err := m.Wait(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return op
}

func nothing(context.Context, func(int)) (any, error) { return nil, nil }

func untilCancelled(ctx context.Context, _ func(int)) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func forward(ctx context.Context, m *task.Manager, publish func(topic string, message any)) error {
	for {
		changes := m.Watch(ctx)      // nothing is missed from here on
		publish("tasks.reload", nil) // what came before is in List
		var end error
		for op, err := range changes {
			if end = err; err == nil {
				publish("task."+op.ID, op)
			}
		}
		if !errors.Is(end, task.ErrLagged) {
			return end // ErrClosed, or nil if ctx is done
		}
	}
}

func TestForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		var topics []string
		stuck := make(chan struct{})
		end := make(chan error)
		go func() {
			end <- forward(t.Context(), m, func(topic string, message any) {
				topics = append(topics, topic)
				if len(topics) == 2 {
					<-stuck
				}
			})
		}()
		synctest.Wait()
		for range 10_100 {
			submit(t, m, "nothing", nothing)
		}
		synctest.Wait()
		close(stuck)
		synctest.Wait()
		last := submit(t, m, "nothing", nothing)
		wait(t, m, last.ID)
		m.Close()
		if err := <-end; !errors.Is(err, task.ErrClosed) {
			t.Errorf("forward returned %v, want ErrClosed", err)
		}
		reload := "tasks.reload"
		want := []string{reload, "task." + last.ID, "task." + last.ID, "task." + last.ID}
		if again := slices.Index(topics[1:], reload); again < 0 || !slices.Equal(topics[1+again:], want) {
			t.Errorf("published %q after it had lagged, want %q", topics[max(0, 1+again):], want)
		}
	})
}

func retry(n int, pause time.Duration, fn task.Func) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		for try := 1; ; try++ {
			result, err := fn(ctx, update)
			if err == nil || ctx.Err() != nil || try >= n {
				return result, err
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return result, err
			}
		}
	}
}

func within(d time.Duration, fn task.Func) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		ctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		return fn(ctx, update)
	}
}

func TestRetry(t *testing.T) {
	broken := errors.New("broken")
	tests := []struct {
		n, works int // the try that succeeds; 0 for none
		calls    int
		took     time.Duration
		err      error
	}{
		{n: 0, calls: 1, err: broken},
		{n: 1, calls: 1, err: broken},
		{n: 3, calls: 3, took: 2 * time.Second, err: broken},
		{n: 3, works: 2, calls: 2, took: time.Second},
		{n: 3, works: 1, calls: 1},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%d tries, number %d succeeds", tt.n, tt.works), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began, calls := time.Now(), 0
				fn := retry(tt.n, time.Second, func(context.Context, func(int)) (any, error) {
					if calls++; calls == tt.works {
						return nil, nil
					}
					return nil, broken
				})
				_, err := fn(t.Context(), nil)
				if calls != tt.calls || time.Since(began) != tt.took || err != tt.err {
					t.Errorf("%d calls, %v, %v; want %d, %v, %v", calls, time.Since(began), err, tt.calls, tt.took, tt.err)
				}
			})
		})
	}
}

func TestWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		op := submit(t, m, "retry", retry(3, time.Second, within(time.Minute, untilCancelled)))
		began := time.Now()
		op = wait(t, m, op.ID)
		if took := time.Since(began); op.State != task.StateFailed || op.Error != context.DeadlineExceeded.Error() || took != 3*time.Minute+2*time.Second {
			t.Errorf("%s %q after %v", op.State, op.Error, took)
		}
		op = submit(t, m, "retry", retry(3, time.Second, within(time.Minute, untilCancelled)))
		synctest.Wait()
		op.Cancel()
		if op = wait(t, m, op.ID); op.State != task.StateCancelled {
			t.Errorf("after a cancel the state is %s", op.State)
		}
	})
}

func each(m *task.Manager, visit func(*task.Operation) error, opts ...task.ListOption) error {
	for last := ""; ; {
		ops, err := m.List(50, 0, append(slices.Clone(opts), task.Before(last))...)
		if err != nil || len(ops) == 0 {
			return err
		}
		for _, op := range ops {
			if err := visit(op); err != nil {
				return err
			}
		}
		last = ops[len(ops)-1].ID
	}
}

func TestEach(t *testing.T) {
	m := newManager(t, nil)
	var want []string
	for i := range 240 {
		op := submit(t, m, []string{"even", "odd"}[i%2], nothing)
		if i%2 == 0 {
			want = append(want, op.ID)
		}
	}
	slices.Reverse(want)
	var got []string
	submitting := func(op *task.Operation) error {
		got = append(got, op.ID)
		submit(t, m, "even", nothing) // must not shift the pages
		return nil
	}
	if err := each(m, submitting, task.ByName("even")); err != nil || !slices.Equal(got, want) {
		t.Errorf("visited %d operations, %v; want %d, newest first", len(got), err, len(want))
	}
	stop := errors.New("stop")
	if err := each(m, func(*task.Operation) error { return stop }); err != stop {
		t.Errorf("got %v, want the error of visit", err)
	}
	if err := each(m, func(*task.Operation) error { return stop }, task.ByName("none")); err != nil {
		t.Errorf("got %v for no operations", err)
	}
}

func protect(f func() error) func() error {
	return func() (err error) {
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("panic: %v", r)
			}
		}()
		return f()
	}
}

func TestProtect(t *testing.T) {
	m := newManager(t, nil)
	for _, f := range []func() error{
		func() error { panic("disk gone") },
		func() error { return errors.New("panic: disk gone") },
	} {
		op := submit(t, m, "goroutine", func(context.Context, func(int)) (any, error) {
			done := make(chan error)
			go func() { done <- protect(f)() }()
			return nil, <-done
		})
		if op = wait(t, m, op.ID); op.State != task.StateFailed || op.Error != "panic: disk gone" {
			t.Errorf("%s %q", op.State, op.Error)
		}
	}
	if err := protect(func() error { return nil })(); err != nil {
		t.Error(err)
	}
}

func TestStore(t *testing.T) {
	tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
		return task.OpenSQLite(filepath.Join(dir, "tasks.db")) // your store instead
	})
}

func sendOnce(send func(context.Context) error) task.Func {
	return func(ctx context.Context, _ func(int)) (any, error) {
		if err := errors.Join(task.SetMetadata(ctx, "sending"), task.Checkpoint(ctx)); err != nil {
			return nil, err // nothing has been sent
		}
		if err := send(ctx); err != nil {
			return nil, err
		}
		return nil, errors.Join(task.SetMetadata(ctx, "sent"), task.Checkpoint(ctx))
	}
}

func TestSendOnce(t *testing.T) {
	db := task.NewMemoryStore()
	m := newManager(t, db)
	stored := func(ctx context.Context) any {
		op, _ := task.FromContext(ctx)
		row, err := db.Get(op.ID)
		if err != nil || row.State != task.StateRunning {
			t.Errorf("stored: %+v, %v", row, err)
			return nil
		}
		var text any
		if err := row.DecodeMetadata(&text); err != nil {
			t.Error(err)
		}
		return text
	}
	op := submit(t, m, "send", sendOnce(func(ctx context.Context) error {
		if got := stored(ctx); got != "sending" {
			t.Errorf("stored before it is sent: %v", got)
		}
		return nil
	}))
	if op := wait(t, m, op.ID); op.State != task.StateDone || op.Metadata != "sent" {
		t.Errorf("%+v", op)
	}
}

func dailyOnce(ctx context.Context, m *task.Manager, day string, fn task.Func) (*task.Operation, error) {
	for try := 1; ; try++ {
		op, err := m.Submit("daily", fn, task.WithID(fmt.Sprintf("daily-%s.%d", day, try)))
		if err != nil && !errors.Is(err, task.ErrExists) {
			return nil, err
		}
		if op, err = m.Wait(ctx, op.ID); err != nil || !op.Interrupted() {
			return op, err
		}
	}
}

func TestDailyOnce(t *testing.T) {
	db := task.NewMemoryStore()
	m := newManager(t, db)
	begun, ran := make(chan struct{}), 0
	go dailyOnce(t.Context(), m, "monday", func(ctx context.Context, _ func(int)) (any, error) {
		close(begun)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	<-begun
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	m = newManager(t, db)
	for range 3 {
		op, err := dailyOnce(t.Context(), m, "monday", func(context.Context, func(int)) (any, error) { ran++; return nil, nil })
		if err != nil || op.ID != "daily-monday.2" || op.State != task.StateDone || ran != 1 {
			t.Errorf("%+v, %v after %d runs", op, err, ran)
		}
	}
}

// A job is the metadata of an operation: enough to start its function again.
type job struct {
	Kind string `json:"kind"`
	Step int    `json:"step"` // the first one that is not complete
}

func resume(kinds map[string]func(job) task.Func) task.Option {
	return task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		var j job
		err := op.DecodeMetadata(&j)
		start := kinds[j.Kind]
		if err != nil || start == nil {
			return nil, nil // the operation is FAILED
		}
		return start(j), []task.SubmitOption{task.WithUnique(op.Name)}
	})
}

func inSteps(steps ...func(context.Context) error) func(job) task.Func {
	return func(j job) task.Func {
		return func(ctx context.Context, update func(int)) (any, error) {
			for ; j.Step < len(steps); j.Step++ {
				if err := errors.Join(task.SetMetadata(ctx, j), task.Checkpoint(ctx)); err != nil {
					return nil, err
				}
				step := steps[j.Step]
				if err := step(ctx); err != nil {
					return nil, err
				}
				update(100 * (j.Step + 1) / len(steps))
			}
			return nil, nil
		}
	}
}

// TestResume ends a manager in the second of three steps, in a way that its store takes
// for a kill.
func TestResume(t *testing.T) {
	store := task.NewMemoryStore()
	ran := make(map[int]int)
	step := func(i int) func(context.Context) error {
		return func(context.Context) error { ran[i]++; return nil }
	}
	move := inSteps(step(0), step(1), step(2))
	now := time.Now()
	for id, metadata := range map[string]any{"x": job{"move", 1}, "gone": job{"other", 0}, "foreign": 1} {
		data, err := json.Marshal(metadata)
		if err == nil {
			err = store.Save(&task.Operation{ID: id, Name: id, State: task.StateRunning, Metadata: json.RawMessage(data), CreatedAt: now, UpdatedAt: now})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	m, err := task.New(store, resume(map[string]func(job) task.Func{"move": move}))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for id, want := range map[string]task.State{"x": task.StateDone, "gone": task.StateFailed, "foreign": task.StateFailed} {
		if op := wait(t, m, id); op.State != want {
			t.Errorf("%+v, want %s", op, want)
		}
	}
	if ran[0] != 0 || ran[1] != 1 || ran[2] != 1 {
		t.Errorf("the steps ran %v times", ran)
	}
	var j job
	if err := wait(t, m, "x").DecodeMetadata(&j); err != nil || j != (job{"move", 2}) {
		t.Errorf("the metadata is %+v, %v", j, err)
	}
}

func stop(m *task.Manager, finish, cancel time.Duration) error {
	ctx, done := context.WithTimeout(context.Background(), finish)
	defer done()
	if err := m.Drain(ctx); err == nil {
		return nil
	}
	ctx, done = context.WithTimeout(context.Background(), cancel)
	defer done()
	return m.CloseContext(ctx) // names the functions that do not return
}

func TestStop(t *testing.T) {
	for name, test := range map[string]struct {
		fn    task.Func
		state task.State
		err   bool
	}{
		"short":  {nothing, task.StateDone, false},
		"long":   {func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return nil, ctx.Err() }, task.StateFailed, false},
		"deaf":   {func(context.Context, func(int)) (any, error) { time.Sleep(time.Hour); return nil, nil }, task.StateRunning, true},
		"almost": {func(context.Context, func(int)) (any, error) { time.Sleep(9 * time.Second); return nil, nil }, task.StateDone, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, nil)
				op := submit(t, m, name, test.fn)
				time.Sleep(time.Second)
				if err := stop(m, 10*time.Second, time.Second); (err != nil) != test.err {
					t.Errorf("stop: %v", err)
				}
				if op, _ := m.Get(op.ID); op.State != test.state {
					t.Errorf("%+v", op)
				}
				m.Close()
			})
		})
	}
}

func openStore(ctx context.Context, path string) (*task.SQLiteStore, error) {
	for {
		store, err := task.OpenSQLite(path) // waits up to 10 s while the file is locked
		if err == nil {
			return store, nil
		}
		slog.Error("the database can't be opened, will be tried again", "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// The database is opened once its directory exists, and not after ctx has ended.
func TestOpenStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "d")
		path := filepath.Join(dir, "tasks.db")
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		if _, err := openStore(ctx, path); err == nil || !strings.Contains(err.Error(), "no directory") || time.Since(start) != 3*time.Second {
			t.Errorf("without a directory: %v after %v", err, time.Since(start))
		}
		time.AfterFunc(1500*time.Millisecond, func() {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Error(err)
			}
		})
		store, err := openStore(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
}
