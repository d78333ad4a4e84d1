//go:build unix

package taskpg

import (
	"strconv"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// TestPlans lets a table grow while a store writes. Even with plans made earlier, the
// statements must find rows by ID and read no other rows.
func TestPlans(t *testing.T) {
	const others = 20_000
	for _, setting := range []string{"", " default_query_exec_mode=exec"} {
		t.Run("as"+setting, func(t *testing.T) {
			dsn := pgtest.Database(t)
			s := open(t, dsn+setting)
			pgtest.Exec(t, dsn, `ALTER TABLE tasks SET (autovacuum_enabled = false)`)
			batches := 0
			write := func() {
				for range 10 { // after a few executions, the server keeps a plan
					batches++
					a, b := save(t, s, task.StateRunning), save(t, s, task.StateRunning)
					for _, err := range s.WriteBatch(nil, []*task.Operation{finished(a), finished(b)}) {
						testkit.Must(t, err)
					}
					testkit.Must(t, s.RequestCancel(save(t, s, task.StateRunning).ID, ""))
				}
			}
			write()
			pgtest.Exec(t, dsn, `VACUUM ANALYZE tasks`)
			write()
			pgtest.Exec(t, dsn, `INSERT INTO tasks (id, name, state, owner) SELECT 'id-' || i, 'other', 'PENDING', '' FROM generate_series(1, `+strconv.Itoa(others)+`) i`)
			write()
			testkit.Must(t, s.Close()) // closed connections report their statistics
			until(t, "statistics", func() bool {
				return pgtest.Value[int](t, dsn, `SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'tasks'`) >= 3*batches
			})
			read := pgtest.Value[int](t, dsn, `SELECT seq_tup_read + (SELECT sum(idx_tup_read)::int FROM pg_stat_user_indexes WHERE relname = 'tasks')
				FROM pg_stat_user_tables WHERE relname = 'tasks'`)
			if read >= others {
				t.Errorf("the statements have read %d rows of %d others", read, others)
			}
		})
	}
}
