//go:build unix

package taskpg

import (
	"fmt"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// TestFailover promotes a synchronous standby after the primary was killed. Nothing
// that was confirmed is lost, and nobody living is declared gone.
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
