//go:build unix

package taskpg

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// TestUnknownOutcome breaks the connection before or after a commit. The store must
// determine whether the commit succeeded.
func TestUnknownOutcome(t *testing.T) {
	for _, c := range []struct {
		name, mode string
		rule       pgtest.Rule
	}{
		{"the request is lost", "", pgtest.Rule{}},
		{"the reply is lost", "", pgtest.Rule{Text: "COMMIT\x00", FromServer: true}},
		{"the request is late", "", pgtest.Rule{Late: lease / 2}},
		{"the pooler's reply is lost", "transaction", pgtest.Rule{Text: "COMMIT\x00", FromServer: true}},
		{"the request to the pooler is late", "transaction", pgtest.Rule{Late: lease / 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dsn, rule := pgtest.Database(t), c.rule
			if c.mode != "" {
				dsn = pgtest.Pooler(t, dsn, c.mode)
			}
			proxy := pgtest.NewProxy(t, dsn)
			s := open(t, proxy.DSN(), WithLease(10*time.Second)) // long enough that it writes nothing else
			op := newOp(s, task.StateRunning)
			if !rule.FromServer {
				rule.Text = op.ID // sent together with COMMIT
			}
			met := proxy.Once(rule)
			testkit.Must(t, s.Save(op))
			<-met
			if err := s.Save(op); err == nil {
				t.Error("another Save of the same operation = nil")
			}
			met = proxy.Once(rule)
			progress := *op
			progress.Progress = 10
			testkit.Must(t, s.Update(&progress))
			progress.Progress = 20
			testkit.Must(t, s.Update(&progress))
			<-met
			time.Sleep(100 * time.Millisecond)
			if got, err := s.Get(op.ID); err != nil || got.Progress != 20 {
				t.Errorf("Get = %+v, %v, want the last update", got, err)
			}
			met = proxy.Once(rule)
			testkit.Must(t, s.Update(finished(op)))
			<-met
			wantState(t, s, op.ID, task.StateDone)
			if err := s.Update(finished(op)); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("another Update of the same operation = %v", err)
			}
			if s.Owner() != op.Owner {
				t.Error("the owner has changed")
			}
		})
	}
}

// TestRecoverUnknownOutcome breaks the connection in the same way during Recover,
// which must yield each operation once.
func TestRecoverUnknownOutcome(t *testing.T) {
	dsn := pgtest.Database(t)
	proxy := pgtest.NewProxy(t, dsn)
	s := open(t, proxy.DSN(), WithLease(10*time.Second))
	pgtest.Exec(t, dsn, `INSERT INTO tasks (id, name, state, owner) SELECT 'id-' || i, 'left', 'PENDING', 'nobody' FROM generate_series(1, 10) i`)
	met := proxy.Once(pgtest.Rule{Text: "COMMIT\x00", FromServer: true})
	if got := recovered(t, s); len(got) != 10 {
		t.Errorf("recovered %d operations, want 10", len(got))
	}
	<-met
}

// TestBadMember writes a batch with a row that a trigger rejects.
func TestBadMember(t *testing.T) {
	dsn := pgtest.Database(t)
	s := open(t, dsn)
	pgtest.Exec(t, dsn, `ALTER TABLE tasks ADD CHECK (name <> 'bad' AND coalesce(error, '') <> 'bad')`)
	var saves, updates []*task.Operation
	for i := range 50 {
		op, old := newOp(s, task.StatePending), save(t, s, task.StateRunning)
		old = finished(old)
		if i == 20 {
			op.Name, old.Error = "bad", "bad"
		}
		saves, updates = append(saves, op), append(updates, old)
	}
	for i, err := range s.WriteBatch(saves, updates) {
		if bad := i%50 == 20; (err != nil) != bad {
			t.Errorf("member %d: %v", i, err)
		}
	}
	if n := pgtest.Value[int](t, dsn, `SELECT count(*) FROM tasks WHERE state <> 'RUNNING'`); n != 98 {
		t.Errorf("%d members are stored, want 98", n)
	}
}

// TestLarge writes more than fits in one transaction.
func TestLarge(t *testing.T) {
	s := open(t, pgtest.Database(t), WithLease(30*time.Second))
	var saves []*task.Operation
	for range 2500 {
		saves = append(saves, newOp(s, task.StatePending))
	}
	for i := range 3 {
		saves[i].Metadata = strings.Repeat("x", 12<<20)
	}
	for i, err := range s.WriteBatch(saves, nil) {
		if err != nil {
			t.Fatalf("member %d: %v", i, err)
		}
	}
	got, err := s.List(1, 0)
	if err != nil || got[0].ID != saves[2499].ID {
		t.Errorf("List = %v, %v, want the last one", got, err)
	}
}

// TestHungCommit makes COMMIT wait for a missing standby. Save must return an error
// within 10 seconds, and nothing may cancel the wait.
func TestHungCommit(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes 10 seconds")
	}
	t.Parallel()
	server := pgtest.New(t)
	dsn := server.Database("tasks")
	s := open(t, dsn, WithLease(3*time.Second))
	op := save(t, s, task.StateRunning)
	pgtest.Exec(t, server.DSN("template1"), `ALTER SYSTEM SET synchronous_standby_names = 'nobody'`, `SELECT pg_reload_conf()`)
	time.Sleep(200 * time.Millisecond)
	start := time.Now()
	err := s.Update(finished(op))
	if took := time.Since(start); err == nil || took > callLimit+5*time.Second {
		t.Errorf("Update = %v after %v, want an error after about 10s", err, took)
	}
	wantState(t, s, op.ID, task.StateRunning)
	pgtest.Exec(t, server.DSN("template1"), `ALTER SYSTEM RESET synchronous_standby_names`, `SELECT pg_reload_conf()`)
	until(t, "stored", func() bool { got, err := s.Get(op.ID); return err == nil && got.State == task.StateDone })
	if s.Owner() != op.Owner {
		t.Error("the owner has changed")
	}
	save(t, s, task.StateRunning)
}

func TestUnique(t *testing.T) {
	const a = "a"
	w := func(update bool, state task.State) *write {
		return &write{Operation: &task.Operation{ID: a, State: state}, id: a, update: update}
	}
	all := []*write{w(false, ""), w(false, ""), w(true, task.StateRunning), w(true, task.StateDone), w(true, task.StateRunning)}
	send, resolve := unique(all)
	if len(send) != 2 || send[0] != all[0] || send[1] != all[3] {
		t.Fatalf("sent are %v", send)
	}
	send[1].err = testkit.ErrDisk
	resolve()
	got := fmt.Sprint(all[0].err, all[1].err, all[2].err, all[3].err, all[4].err)
	if want := fmt.Sprint(error(nil), task.ErrExists, testkit.ErrDisk, testkit.ErrDisk, task.ErrNotFound); got != want {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}
