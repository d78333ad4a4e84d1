//go:build unix

package taskpg

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

const lease = time.Second // of most stores in tests

// open opens a store with a lease of a second, and closes it when the test ends.
func open(t testing.TB, dsn string, opts ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), dsn, append([]Option{WithLease(lease)}, opts...)...)
	testkit.Must(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

// save saves an operation as a manager on the store would.
func save(t testing.TB, s *Store, state task.State) *task.Operation {
	t.Helper()
	op := newOp(s, state)
	testkit.Must(t, s.Save(op))
	return op
}

// finished returns a copy of the operation in state DONE.
func finished(op *task.Operation) *task.Operation {
	done := *op
	done.State, done.Progress, done.UpdatedAt = task.StateDone, 100, op.UpdatedAt.Add(time.Second)
	return &done
}

// until waits for a condition.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if err := testkit.Until(cond); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// gone reports whether the owner with that ID is gone, or has no row any more.
func gone(t testing.TB, dsn, id string) bool {
	t.Helper()
	return pgtest.Value[bool](t, dsn, `SELECT coalesce(bool_and(gone), true) FROM task_owners WHERE id = $1`, id)
}

// recovered calls Recover and returns the IDs of the recovered operations.
func recovered(t testing.TB, s *Store) (ids []string) {
	t.Helper()
	for op, err := range s.Recover(testkit.RestartText, nil) {
		if err != nil {
			t.Errorf("Recover: %v", err)
			return ids
		}
		if op.State != task.StateFailed || op.Error != testkit.RestartText {
			t.Errorf("Recover yielded %+v", op)
		}
		ids = append(ids, op.ID)
	}
	return ids
}

func wantState(t testing.TB, s *Store, id string, want task.State) {
	t.Helper()
	op, err := s.Get(id)
	testkit.Must(t, err)
	if op.State != want {
		t.Errorf("%s is %s, want %s", id, op.State, want)
	}
}

// startStore starts a child process that opens a store and saves an operation.
func startStore(t *testing.T, dsn string) (*testkit.Process, Reply) {
	t.Helper()
	p := testkit.StartProcess(t, "store")
	var r Reply
	p.Call("Open", dsn, &r)
	return p, r
}

func TestKilled(t *testing.T) {
	dsn := pgtest.Database(t)
	s := open(t, dsn)
	p, r := startStore(t, dsn)
	if got := recovered(t, s); len(got) > 0 {
		t.Errorf("recovered %v from a living owner", got)
	}
	p.Kill()
	died := time.Now()
	until(t, "declared gone", func() bool { return gone(t, dsn, r.Owner) })
	t.Logf("declared gone after %v", time.Since(died))
	if took := time.Since(died); took < lease/2 { // its last beat was up to a third of a lease earlier
		t.Errorf("declared gone after %v", took)
	}
	if got := recovered(t, s); !slices.Equal(got, []string{r.ID}) {
		t.Errorf("recovered %v, want %v", got, r.ID)
	}
	if n := pgtest.Value[int](t, dsn, `SELECT count(*) FROM task_owners`); n != 1 {
		t.Errorf("%d owners are left, want 1", n)
	}
}

// TestStopped stops a process for several leases and continues it.
func TestStopped(t *testing.T) {
	dsn := pgtest.Database(t)
	s := open(t, dsn)
	p, was := startStore(t, dsn)
	p.Signal(syscall.SIGSTOP)
	until(t, "declared gone", func() bool { return gone(t, dsn, was.Owner) })
	if got := recovered(t, s); !slices.Equal(got, []string{was.ID}) {
		t.Errorf("recovered %v, want %v", got, was.ID)
	}
	time.Sleep(2 * lease)
	p.Signal(syscall.SIGCONT)
	var late, next Reply
	p.Call("Finish", was, &late)
	if !late.Lost || late.Owner == was.Owner {
		t.Errorf("a late write: %+v, want that it is lost and that the owner is another", late)
	}
	wantState(t, s, was.ID, task.StateFailed)
	p.Call("Save", 0, &next)
	if next.Err != "" {
		t.Errorf("Save as a new owner = %v", next.Err)
	}
	wantState(t, s, next.ID, task.StateRunning)
	if got := recovered(t, s); len(got) > 0 {
		t.Errorf("recovered %v from a living owner", got)
	}
	next.ID, next.Owner = was.ID, was.Owner
	p.Call("Finish", was, &late) // the earlier write once more
	if !late.Lost {
		t.Errorf("a later write: %+v, want that it is lost", late)
	}
}

// TestCloseHandsOver shows that the operations of a closed store can be recovered at
// once, before its lease ends.
func TestCloseHandsOver(t *testing.T) {
	dsn := pgtest.Database(t)
	s, other := open(t, dsn), open(t, dsn, WithLease(time.Hour))
	op := save(t, other, task.StatePending)
	testkit.Must(t, other.Close())
	if err := other.Save(newOp(other, task.StatePending)); err == nil {
		t.Error("Save after Close = nil")
	}
	if got := recovered(t, s); !slices.Equal(got, []string{op.ID}) {
		t.Errorf("recovered %v, want %v", got, op.ID)
	}
}

// TestNetwork cuts a store off, or stalls its connections, while another store
// observes it.
func TestNetwork(t *testing.T) {
	const lease = 2 * time.Second
	for _, how := range []string{"cut", "stall"} {
		for _, c := range []struct {
			leases float64
			dies   bool
		}{{0.5, false}, {0.9, false}, {1.5, true}, {10, true}} {
			t.Run(fmt.Sprintf("%s for %v leases", how, c.leases), func(t *testing.T) {
				if c.leases == 10 && testing.Short() {
					t.Skip("it takes 20 seconds")
				}
				if c.dies { // the others depend on timely commits
					t.Parallel()
				}
				dsn := pgtest.Database(t)
				proxy := pgtest.NewProxy(t, dsn)
				observer := open(t, dsn, WithLease(lease))
				s := open(t, proxy.DSN(), WithLease(lease))
				op := save(t, s, task.StateRunning)
				if how == "cut" {
					proxy.Cut()
				} else {
					proxy.Stall()
				}
				time.Sleep(time.Duration(c.leases * float64(lease)))
				if got := gone(t, dsn, op.Owner); got && !c.dies {
					t.Errorf("declared gone: %v, want %v", got, c.dies)
				}
				if c.dies {
					until(t, "declared gone", func() bool { return gone(t, dsn, op.Owner) })
					if got := recovered(t, observer); !slices.Equal(got, []string{op.ID}) {
						t.Errorf("recovered %v, want %v", got, op.ID)
					}
				}
				proxy.Resume()
				want, state := error(nil), task.StateDone
				if c.dies {
					want, state = task.ErrLost, task.StateFailed
				}
				if err := s.Update(finished(op)); !errors.Is(err, want) {
					t.Errorf("Update = %v, want %v", err, want)
				}
				wantState(t, observer, op.ID, state)
				save(t, s, task.StateRunning)
			})
		}
	}
}

// TestServerAway restarts the server under many owners. None may be declared gone.
func TestServerAway(t *testing.T) {
	for _, c := range []struct {
		name, signal string
		away         time.Duration
	}{{"restarted", "INT", 0}, {"killed", "QUIT", 0}, {"away for 3 leases", "QUIT", 3 * lease}} {
		t.Run(c.name, func(t *testing.T) {
			server := pgtest.New(t, "max_connections=150")
			dsn := server.Database("tasks")
			stores, ops := make([]*Store, 20), make([]*task.Operation, 20)
			for i := range stores {
				stores[i] = open(t, dsn)
				ops[i] = save(t, stores[i], task.StateRunning)
			}
			server.Stop(c.signal)
			time.Sleep(c.away)
			server.Start("max_connections=150")
			time.Sleep(2 * lease)
			for i, s := range stores {
				if err := s.Update(finished(ops[i])); err != nil || s.Owner() != ops[i].Owner {
					t.Errorf("Update = %v", err)
				}
				testkit.Must(t, s.Close())
			}
			if n := pgtest.Value[int](t, dsn, `SELECT count(*) FROM tasks WHERE state = 'DONE'`); n != len(ops) {
				t.Errorf("%d operations are DONE, want %d", n, len(ops))
			}
		})
	}
}

// TestHalfSent stops a connection in the middle of a transaction that has locked
// rows. The owner must be declared gone and its operations recovered.
func TestHalfSent(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	observer := open(t, dsn)
	s := open(t, proxy.DSN())
	op, second := save(t, s, task.StateRunning), save(t, s, task.StateRunning)
	large := *op
	large.Metadata = strings.Repeat("long ", 1<<18)
	met := proxy.Once(pgtest.Rule{Text: second.ID, Hold: true}) // it occurs first in the statement that locks both rows
	failed := make(chan error, 1)
	go func() { failed <- s.WriteBatch(nil, []*task.Operation{&large, finished(second)})[0] }()
	<-met
	proxy.Stall()
	until(t, "declared gone", func() bool { return gone(t, dsn, op.Owner) })
	start := time.Now()
	var got []string
	until(t, "recovered", func() bool {
		got = append(got, recovered(t, observer)...)
		return len(got) >= 2
	})
	if !slices.Equal(got, []string{op.ID, second.ID}) {
		t.Errorf("recovered %v, want %v and %v", got, op.ID, second.ID)
	}
	if took := time.Since(start); took > lease {
		t.Errorf("recovered after %v, want it within a lease", took)
	}
	proxy.CutConnections()
	if err := <-failed; !errors.Is(err, task.ErrLost) {
		t.Errorf("Update = %v, want that it is lost", err)
	}
	wantState(t, observer, op.ID, task.StateFailed)
}

var manyOrphans = flag.Int("orphans", 20_000, "how many operations the dead owner of TestManyOrphans leaves")

// TestManyOrphans makes two stores recover the operations of a dead owner, more than
// one transaction changes. Each must be recovered once.
func TestManyOrphans(t *testing.T) {
	dsn := pgtest.Database(t)
	a, b := open(t, dsn), open(t, dsn)
	p, r := startStore(t, dsn)
	n := *manyOrphans
	pgtest.Exec(t, dsn, fmt.Sprintf(`INSERT INTO tasks (id, name, state, owner) SELECT 'id-' || i, 'left', 'PENDING', '%s' FROM generate_series(2, %d) i`, r.Owner, n))
	p.Kill()
	began := time.Now()
	until(t, "declared gone", func() bool { return gone(t, dsn, r.Owner) })
	found, declared := make(chan []string, 2), time.Now()
	for _, s := range []*Store{a, b} {
		go func() { found <- recovered(t, s) }()
	}
	all := append(<-found, <-found...)
	t.Logf("%d operations: declared gone after %v, recovered in %v", n, declared.Sub(began), time.Since(declared))
	slices.Sort(all)
	if len(slices.Compact(all)) != n || len(all) != n {
		t.Errorf("recovered %d operations, want each of %d once", len(all), n)
	}
	if left := pgtest.Value[int](t, dsn, `SELECT count(*) FROM tasks WHERE state <> 'FAILED'`); left != 0 {
		t.Errorf("%d operations are not FAILED", left)
	}
}

// TestResume takes operations over, except those with a cancel request.
func TestResume(t *testing.T) {
	dsn := pgtest.Database(t)
	s, other := open(t, dsn), open(t, dsn)
	first, cancelled, late := save(t, other, task.StateRunning), save(t, other, task.StateRunning), save(t, other, task.StateRunning)
	testkit.Must(t, s.RequestCancel(cancelled.ID, ""))
	testkit.Must(t, other.Close())
	asked := 0
	resume := func(op *task.Operation) bool {
		asked++
		if op.ID == late.ID { // meanwhile
			testkit.Must(t, s.RequestCancel(late.ID, ""))
		}
		return true
	}
	states := make(map[string]task.State)
	for op, err := range s.Recover(testkit.RestartText, resume) {
		testkit.Must(t, err)
		states[op.ID] = op.State
		if op.State == task.StatePending && (op.Owner != s.Owner() || !op.StartedAt.IsZero()) {
			t.Errorf("taken over is %+v", op)
		}
	}
	if asked != 2 || len(states) != 3 || states[first.ID] != task.StatePending || states[cancelled.ID] != task.StateFailed || states[late.ID] != task.StateFailed {
		t.Errorf("asked %d times, recovered %v", asked, states)
	}
	op, err := s.Get(first.ID)
	testkit.Must(t, err)
	testkit.Must(t, s.Update(finished(op)))
}
