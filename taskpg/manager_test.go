//go:build unix

package taskpg

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

var _ interface {
	task.BatchWriter
	task.Recoverer
	task.FilteredLister
	task.Pruner
	task.Canceller
	task.Notifier
} = (*Store)(nil)

// TestManagers makes one manager cancel, wait for and watch operations of another one.
func TestManagers(t *testing.T) {
	dsn := pgtest.Database(t)
	a, b := open(t, dsn, WithLease(30*time.Second)), open(t, dsn, WithLease(30*time.Second))
	until(t, "both hear", func() bool { return a.hints.hears.Load() && b.hints.hears.Load() })
	here, there := testkit.NewManager(t, a), testkit.NewManager(t, b)
	const rounds = 5
	var worst time.Duration
	for i := range rounds {
		op := testkit.Submit(t, there, testkit.UntilCancelled)
		seen := make(chan error, 1)
		go func() {
			last := task.State("")
			for got, err := range here.Watch(t.Context(), op.ID) {
				if err != nil {
					seen <- err
					return
				}
				last = got.State
			}
			if last != task.StateCancelled {
				seen <- fmt.Errorf("watched until %s", last)
			}
			close(seen)
		}()
		time.Sleep(300 * time.Millisecond) // until both managers look for cancel requests
		start := time.Now()
		testkit.Must(t, here.Cancel(op.ID))
		got := testkit.Wait(t, here, op.ID)
		worst = max(worst, time.Since(start))
		if got.State != task.StateCancelled {
			t.Errorf("round %d: the state is %s", i, got.State)
		}
		testkit.Must(t, <-seen)
	}
	t.Logf("cancelled and told within %v at the worst", worst)
	if worst > 5*time.Second { // much less than the polling interval, a third of a lease
		t.Errorf("it took %v", worst)
	}
}

// TestManagerDies makes a manager wait for an operation of a killed process.
func TestManagerDies(t *testing.T) {
	dsn := pgtest.Database(t)
	m := testkit.NewManager(t, open(t, dsn))
	p, r := startStore(t, dsn)
	ended := make(chan *task.Operation, 1)
	go func() {
		op, err := m.Wait(context.WithoutCancel(t.Context()), r.ID)
		if err != nil {
			t.Error(err)
		}
		ended <- op
	}()
	time.Sleep(lease)
	p.Kill()
	if op := <-ended; op == nil || op.State != task.StateFailed || op.Error != testkit.RestartText {
		t.Errorf("got %+v", op)
	}
}

// TestIdleManagers shows that managers with nothing to wait for recover the operations
// of a killed process.
func TestIdleManagers(t *testing.T) {
	dsn := pgtest.Database(t)
	for range 2 {
		testkit.NewManager(t, open(t, dsn))
	}
	p, r := startStore(t, dsn)
	p.Kill()
	died := time.Now()
	state := func() string {
		return pgtest.Value[string](t, dsn, `SELECT state FROM tasks WHERE id = $1`, r.ID)
	}
	until(t, "recovered", func() bool { return state() == string(task.StateFailed) })
	t.Logf("recovered after %v", time.Since(died))
	until(t, "forgotten", func() bool { return pgtest.Value[int](t, dsn, `SELECT count(*) FROM task_owners`) == 2 })
}

// TestIdleManagerResumes shows that an idle manager resumes an operation of a killed
// process.
func TestIdleManagerResumes(t *testing.T) {
	dsn := pgtest.Database(t)
	s := open(t, dsn)
	testkit.NewManager(t, s, task.WithResume(func(*task.Operation) (task.Func, []task.SubmitOption) { return testkit.Nothing, nil }))
	p, r := startStore(t, dsn)
	p.Kill()
	until(t, "resumed", func() bool {
		op, err := s.Get(r.ID)
		testkit.Must(t, err)
		return op.State == task.StateDone && op.Owner == s.Owner()
	})
}

// TestManagerLost cuts a manager off until its store is declared gone. The function's
// context must end with ErrLost, and the manager must continue to work.
func TestManagerLost(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	observer := testkit.NewManager(t, open(t, dsn))
	s := open(t, proxy.DSN())
	m := testkit.NewManager(t, s)
	cause := make(chan error, 1)
	op := testkit.Submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
		<-ctx.Done()
		cause <- context.Cause(ctx)
		return "too late", nil
	})
	proxy.Cut()
	if got := testkit.Wait(t, observer, op.ID); got.State != task.StateFailed {
		t.Errorf("the observer sees %+v", got)
	}
	proxy.Resume()
	if err := <-cause; !errors.Is(err, task.ErrLost) {
		t.Errorf("the function's context ends with %v", err)
	}
	if got := testkit.Wait(t, m, op.ID); got.State != task.StateFailed || got.Result != nil {
		t.Errorf("its manager shows %+v", got)
	}
	next := testkit.Submit(t, m, testkit.Nothing)
	if got := testkit.Wait(t, m, next.ID); got.State != task.StateDone || next.Owner == op.Owner {
		t.Errorf("the next operation: %+v", got)
	}
}

// BenchmarkSubmit measures operations from Submit to their stored final state, with
// many goroutines.
func BenchmarkSubmit(b *testing.B) {
	for _, n := range []int{2, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			server := pgtest.New(b, "fsync=on", "shared_buffers=256MB")
			s, err := Open(b.Context(), server.Database("tasks"))
			testkit.Must(b, err)
			defer s.Close()
			m := testkit.NewManager(b, s)
			b.SetParallelism(max(1, n/runtime.GOMAXPROCS(0)))
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					op, err := m.Submit("test", testkit.Nothing)
					if err == nil {
						_, err = m.Wait(context.Background(), op.ID)
					}
					if err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
		})
	}
}
