//go:build unix

package taskpg

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// TestFailover kills the primary and promotes a synchronous standby. No confirmed
// write may be lost, and no live owner declared gone.
func TestFailover(t *testing.T) {
	primary := pgtest.New(t, "max_connections=50")
	primary.Database("tasks")
	standby := primary.Standby("second", "max_connections=50")
	pgtest.Exec(t, primary.DSN("template1"), `ALTER SYSTEM SET synchronous_standby_names = 'second'`, `SELECT pg_reload_conf()`)
	until(t, "replicates", func() bool {
		return pgtest.Value[int](t, primary.DSN("template1"), `SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'`) == 1
	})
	dsn := fmt.Sprintf("host=%s,%s port=5432,5432 user=postgres dbname=tasks sslmode=disable target_session_attrs=read-write", primary.Dir(), standby.Dir())
	a, b := open(t, dsn), open(t, dsn)
	var ops []*task.Operation
	for _, s := range []*Store{a, b} {
		for range 20 {
			ops = append(ops, save(t, s, task.StateRunning))
		}
	}
	primary.Stop("QUIT")
	time.Sleep(2 * lease)
	pgtest.Exec(t, standby.DSN("tasks"), `SELECT 1`)
	standby.Promote()
	pgtest.Exec(t, standby.DSN("template1"), `ALTER SYSTEM RESET synchronous_standby_names`, `SELECT pg_reload_conf()`)
	time.Sleep(2 * lease)
	for i, op := range ops {
		if err := []*Store{a, b}[i/20].Update(finished(op)); err != nil {
			t.Errorf("Update after the fail-over = %v", err)
		}
	}
	if got := recovered(t, a); len(got) > 0 {
		t.Errorf("recovered %v", got)
	}
	if n := pgtest.Value[int](t, standby.DSN("tasks"), `SELECT count(*) FROM tasks WHERE state = 'DONE'`); n != len(ops) {
		t.Errorf("%d operations are DONE, want %d", n, len(ops))
	}
	testkit.Must(t, a.Close())
	testkit.Must(t, b.Close())
}

// A load submits operations until it is stopped. The result of each operation is its
// name.
type load struct {
	mu   sync.Mutex        // guards the fields below
	ops  []*task.Operation // returned by Submit
	ends []*task.Operation // returned by Wait as DONE
	runs map[string]int    // calls of each function, by operation name
}

// submit submits one operation after the other. It ignores errors, which are expected
// while no server is running.
func (l *load) submit(m *task.Manager, who int, stop <-chan struct{}) {
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		name := fmt.Sprintf("%d.%d", who, n)
		op, err := m.Submit(name, func(context.Context, func(int)) (any, error) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.runs[name]++
			return name, nil
		})
		if err != nil {
			time.Sleep(lease / 100)
			continue
		}
		end, err := m.Wait(context.Background(), op.ID)
		l.mu.Lock()
		l.ops = append(l.ops, op)
		if err == nil && end.State == task.StateDone {
			l.ends = append(l.ends, end)
		}
		l.mu.Unlock()
	}
}

func (l *load) ended() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ends)
}

// losses returns how many submitted operations are missing in a store, and how many
// that were DONE are unfinished there. Any other deviation is an error.
func (l *load) losses(t *testing.T, s *Store) (rows, ends int) {
	done := make(map[string]bool)
	for _, op := range l.ends {
		done[op.ID] = true
	}
	for _, op := range l.ops {
		got, err := s.Get(op.ID)
		switch {
		case errors.Is(err, task.ErrNotFound):
			rows++
		case err != nil:
			t.Fatal(err)
		case !got.State.Finished() && done[op.ID]:
			ends++
		case got.State == task.StateDone:
			var result string
			if err := got.DecodeResult(&result); err != nil || result != op.Name || got.Name != op.Name {
				t.Errorf("%s is %+v, %v", op.Name, got, err)
			}
		case done[op.ID] || got.State == task.StateCancelled:
			t.Errorf("%s (DONE %v) is %+v", op.Name, done[op.ID], got)
		}
	}
	for name, n := range l.runs {
		if n > 1 {
			t.Errorf("%s ran %d times", name, n)
		}
	}
	return rows, ends
}

// TestAsyncFailover kills the primary under load and promotes an asynchronous standby
// that lags behind. Operations that were not replicated are missing or unfinished. No
// result may be wrong, and no function may run twice.
func TestAsyncFailover(t *testing.T) {
	primary := pgtest.New(t, "max_connections=50")
	primary.Database("tasks")
	standby := primary.Standby("second", "max_connections=50")
	dsn := fmt.Sprintf("host=%s,%s port=5432,5432 user=postgres dbname=tasks sslmode=disable target_session_attrs=read-write", primary.Dir(), standby.Dir())
	s := open(t, dsn)
	m := testkit.NewManager(t, s)
	l, stop := &load{runs: make(map[string]int)}, make(chan struct{})
	var all sync.WaitGroup
	for who := range 8 {
		all.Go(func() { l.submit(m, who, stop) })
	}
	const some = 200
	more := func() bool {
		n := l.ended()
		return testkit.Until(func() bool { return l.ended() >= n+some }) == nil
	}
	if !more() {
		t.Error("no load")
	}
	until(t, "replicates", func() bool {
		return pgtest.Value[int](t, standby.DSN("tasks"), `SELECT count(*) FROM tasks`) > 0
	})
	pgtest.Exec(t, standby.DSN("template1"), `ALTER SYSTEM SET primary_conninfo = ''`, `SELECT pg_reload_conf()`) // the link is down
	if !more() {
		t.Error("the load has stopped")
	}
	primary.Stop("QUIT")
	standby.Promote()
	if !more() {
		t.Error("nothing is submitted after the fail-over")
	}
	close(stop)
	all.Wait()
	testkit.Must(t, m.Close())
	testkit.Must(t, s.Close())
	reader := open(t, dsn)
	rows, ends := l.losses(t, reader)
	t.Logf("of %d operations submitted, %d are lost; of %d known as DONE, %d more are unfinished", len(l.ops), rows, len(l.ends), ends)
	if rows == 0 {
		t.Error("nothing was lost: the standby was not behind")
	}
	recovered(t, reader) // gives unfinished operations their final state
	if n := pgtest.Value[int](t, dsn, `SELECT count(*) FROM tasks WHERE state IN ('PENDING', 'RUNNING')`); n > 0 {
		t.Errorf("%d operations have no final state", n)
	}
}
