//go:build unix

package taskpg

import (
	"context"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// changes starts receiving hints, and returns a channel with their times.
func changes(t *testing.T, s *Store) <-chan time.Time {
	t.Helper()
	hints := make(chan time.Time, 10_000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for err := range s.Changes(ctx) {
			if err != nil {
				t.Error(err)
			}
			hints <- time.Now()
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return hints
}

// drain waits until no hint arrives for 300 ms.
func drain(hints <-chan time.Time) {
	for quiet := time.After(300 * time.Millisecond); ; {
		select {
		case <-hints:
			quiet = time.After(300 * time.Millisecond)
		case <-quiet:
			return
		}
	}
}

func within(t *testing.T, what string, hints <-chan time.Time, limit time.Duration) {
	t.Helper()
	start := time.Now()
	select {
	case <-hints:
		t.Logf("%s: a hint after %v", what, time.Since(start))
	case <-time.After(limit):
		t.Errorf("%s: no hint within %v", what, limit)
	}
}

func TestChanges(t *testing.T) {
	const lease = 10 * time.Minute // long enough that nothing else gives a hint
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	a := open(t, dsn, WithLease(lease))
	b := open(t, proxy.DSN(), WithLease(lease))
	until(t, "both hear", func() bool { return a.hints.hears.Load() && b.hints.hears.Load() })
	hints := changes(t, b)
	drain(hints)
	op := save(t, a, task.StateRunning)
	within(t, "Save", hints, 5*time.Second)
	drain(hints)
	testkit.Must(t, a.RequestCancel(op.ID, "by a test"))
	within(t, "RequestCancel", hints, 5*time.Second)
	drain(hints)
	testkit.Must(t, b.RequestCancel(op.ID, "the second one, which does not count"))
	within(t, "RequestCancel by the store itself", hints, 5*time.Second)
	if got, err := a.CancelRequests(); err != nil || len(got) != 1 || got[op.ID] != "by a test" {
		t.Errorf("CancelRequests = %v, %v", got, err)
	}
	if got, err := b.CancelRequests(); err != nil || len(got) > 0 {
		t.Errorf("CancelRequests of another store = %v, %v", got, err)
	}
	if n := pgtest.Value[int](t, dsn, `SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'
		AND (state <> 'idle' OR backend_xmin IS NOT NULL)`); n > 0 {
		t.Errorf("%d listening connections are in a transaction", n)
	}
	proxy.CutConnections()
	until(t, "hears nothing", func() bool { return !b.hints.hears.Load() })
	until(t, "hears again", b.hints.hears.Load)
	within(t, "listening again", hints, 5*time.Second)
	drain(hints)
	testkit.Must(t, a.Update(finished(op)))
	within(t, "Update", hints, 5*time.Second)
}

// TestChangesBlind tests Changes without notifications.
func TestChangesBlind(t *testing.T) {
	dsn := pgtest.Pooler(t, pgtest.Database(t), "transaction")
	s := open(t, dsn, WithLease(time.Minute))
	hints := changes(t, s)
	<-hints
	for range 2 {
		within(t, "nothing", hints, 3*time.Second)
	}
	if s.hints.hears.Load() {
		t.Error("notifications arrive through a pooler in transaction mode")
	}
}
