package task_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

// The functions here are those in the README.

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
			submit(t, m, nothing)
		}
		synctest.Wait()
		close(stuck)
		synctest.Wait()
		last := submit(t, m, nothing)
		wait(t, m, last.ID)
		m.Close()
		if err := <-end; !errors.Is(err, task.ErrClosed) {
			t.Errorf("it ended with %v", err)
		}
		reload := "tasks.reload"
		want := []string{reload, "task." + last.ID, "task." + last.ID, "task." + last.ID}
		if again := slices.Index(topics[1:], reload); again < 0 || !slices.Equal(topics[1+again:], want) {
			t.Errorf("published %q after it was too slow, want %q", topics[max(0, 1+again):], want)
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
		n, works int // the try that works; 0 for none
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
		t.Run(fmt.Sprintf("%d, works at %d", tt.n, tt.works), func(t *testing.T) {
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
		op := submit(t, m, retry(3, time.Second, within(time.Minute, untilCancelled)))
		began := time.Now()
		op = wait(t, m, op.ID)
		if took := time.Since(began); op.State != task.StateFailed || op.Error != context.DeadlineExceeded.Error() || took != 3*time.Minute+2*time.Second {
			t.Errorf("%s %q after %v", op.State, op.Error, took)
		}
		op = submit(t, m, retry(3, time.Second, within(time.Minute, untilCancelled)))
		synctest.Wait()
		op.Cancel()
		if op = wait(t, m, op.ID); op.State != task.StateCancelled {
			t.Errorf("cancelled, it is %s", op.State)
		}
	})
}
