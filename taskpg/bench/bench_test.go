//go:build unix

package bench

import (
	"context"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// nothing is a job.
func nothing(context.Context, func(int)) (any, error) { return nil, nil }

// A session is a running system. submit stores n jobs in one call; wait returns
// when the final states of n jobs are stored. Both end the benchmark on an error.
type session struct {
	submit func(n int)
	wait   func(n int)
}

// BenchmarkJobs measures jobs that do nothing, from submission to a stored final
// state.
func BenchmarkJobs(b *testing.B) {
	server := pgtest.New(b, "fsync=on", "max_connections=200", "shared_buffers=128MB")
	databases := 0
	for _, s := range []struct {
		name       string
		submitters int
		batch      int
		open       func(b *testing.B, dsn string) session
	}{
		{"taskpg/submitters=1", 1, 1, openTask},
		{"taskpg/submitters=64", 64, 1, openTask},
		{"taskpg/submitters=1000", 1000, 1, openTask}, // as many jobs at once as River's batches have
		{"River_Insert/submitters=1", 1, 1, openRiver(100 * time.Millisecond)},
		{"River_Insert/submitters=64", 64, 1, openRiver(100 * time.Millisecond)},
		{"River_InsertManyFast_1000/submitters=1", 1, 1000, openRiver(10 * time.Millisecond)},
		{"River_InsertManyFast_1000/submitters=64", 64, 1000, openRiver(10 * time.Millisecond)},
		{"River_JobCompleteTx/submitters=64", 64, 1, openRiverTx},
		{"by_hand/submitters=1", 1, 1, openByHand},
		{"by_hand/submitters=64", 64, 1, openByHand},
	} {
		b.Run(s.name, func(b *testing.B) {
			databases++
			run := s.open(b, server.Database("jobs"+strconv.Itoa(databases)))
			b.ResetTimer()
			submitAll(b.N, s.submitters, s.batch, run)
			b.StopTimer()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
		})
	}
}

// submitAll has several goroutines submit n jobs, and waits for these. None waits
// for another one to be given its next call.
func submitAll(n, submitters, batch int, run session) {
	var taken atomic.Int64
	var all sync.WaitGroup
	for range submitters {
		all.Go(func() {
			for {
				end := int(taken.Add(int64(batch)))
				if end-batch >= n {
					return
				}
				run.submit(min(batch, n-end+batch))
			}
		})
	}
	all.Wait()
	run.wait(n)
}

func openManager(b *testing.B, dsn string, opts ...taskpg.Option) (*taskpg.Store, *task.Manager) {
	s, err := taskpg.Open(b.Context(), dsn, opts...)
	testkit.Must(b, err)
	m, err := task.New(s, testkit.Quiet)
	testkit.Must(b, err)
	b.Cleanup(func() {
		if err := m.Close(); err != nil {
			b.Error(err)
		}
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	return s, m
}

func openTask(b *testing.B, dsn string) session {
	_, m := openManager(b, dsn)
	return session{
		submit: func(int) {
			if _, err := m.Submit("job", nothing); err != nil {
				b.Error(err)
			}
		},
		// Shutdown waits for all. A Wait for each would read those from the database
		// that have finished, one by one.
		wait: func(n int) {
			testkit.Must(b, m.Shutdown(b.Context()))
			ops, err := m.List(2, n-1, task.ByState(task.StateDone))
			if testkit.Must(b, err); len(ops) != 1 {
				b.Errorf("not exactly %d operations are DONE", n)
			}
		},
	}
}

// BenchmarkSubmit measures how long Submit takes, one at a time.
func BenchmarkSubmit(b *testing.B) {
	server := pgtest.New(b, "fsync=on")
	databases := 0
	b.Run("taskpg", func(b *testing.B) {
		databases++
		_, m := openManager(b, server.Database("submit"+strconv.Itoa(databases)))
		times := make([]time.Duration, b.N)
		b.ResetTimer()
		for i := range times {
			began := time.Now()
			op, err := m.Submit("job", nothing)
			times[i] = time.Since(began)
			testkit.Must(b, err)
			if _, err := m.Wait(b.Context(), op.ID); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)/2].Microseconds()), "µs-median")
		b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "µs-p99")
	})
}

// BenchmarkProgress stores b.N changes of progress of 1,000 operations, and
// measures what these leave in the table.
func BenchmarkProgress(b *testing.B) {
	dsn := pgtest.New(b, "fsync=on").Database("progress")
	s, err := taskpg.Open(b.Context(), dsn)
	testkit.Must(b, err)
	defer s.Close()
	now := time.Now()
	ops := make([]*task.Operation, 1000)
	for i := range ops {
		ops[i] = &task.Operation{ID: strconv.Itoa(i), Name: "scrub", State: task.StateRunning, Owner: s.Owner(), CreatedAt: now, UpdatedAt: now}
	}
	mustAll(b, s.WriteBatch(ops, nil))
	before := sizes(b, dsn)
	b.ResetTimer()
	for n := 0; n < b.N; n += len(ops) {
		for _, op := range ops {
			op.Progress = (op.Progress + 1) % 100
			op.UpdatedAt = time.Now()
		}
		mustAll(b, s.WriteBatch(nil, ops))
	}
	b.StopTimer()
	after := sizes(b, dsn)
	testkit.Must(b, s.Close()) // its connections tell the server their statistics
	for deadline := time.Now().Add(time.Minute); pgtest.Value[int64](b, dsn, `SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'tasks'`) < int64(b.N); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatal("the server does not tell its statistics")
		}
	}
	for i, name := range []string{"table-KiB", "index-KiB"} {
		b.ReportMetric(before[i], name+"-before")
		b.ReportMetric(after[i], name+"-after")
	}
	b.ReportMetric(pgtest.Value[float64](b, dsn, `SELECT 100.0 * n_tup_hot_upd / n_tup_upd FROM pg_stat_user_tables WHERE relname = 'tasks'`), "%-HOT")
}

// sizes returns the KiB of the table and of its indexes.
func sizes(b *testing.B, dsn string) []float64 {
	return pgtest.Value[[]float64](b, dsn, `SELECT ARRAY[pg_table_size('tasks') / 1024.0, pg_indexes_size('tasks') / 1024.0]::float8[]`)
}

func mustAll(b *testing.B, errs []error) {
	b.Helper()
	for _, err := range errs {
		testkit.Must(b, err)
	}
}

// BenchmarkPage lists the newest 50 of TASKPG_ROWS finished operations, 10,000 by
// default.
func BenchmarkPage(b *testing.B) {
	rows := 10000
	if text := os.Getenv("TASKPG_ROWS"); text != "" {
		var err error
		rows, err = strconv.Atoi(text)
		testkit.Must(b, err)
	}
	dsn := pgtest.New(b, "shared_buffers=128MB").Database("page")
	_, m := openManager(b, dsn)
	pgtest.Exec(b, dsn, `INSERT INTO tasks (id, name, state, progress, created_at, updated_at, finished_at)
		SELECT 'id' || n, 'scrub', 'DONE', 100, t, t + interval '1 second', t + interval '1 second'
		FROM generate_series(1, `+strconv.Itoa(rows)+`) AS n, LATERAL (SELECT now() - interval '1 second' * n AS t) AS u`,
		`VACUUM ANALYZE tasks`)
	for name, opts := range map[string][]task.ListOption{"by_submission": nil, "by_finish": {task.ByFinish()}} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				page, err := m.List(50, 0, opts...)
				if err != nil || len(page) != 50 {
					b.Fatalf("%d operations, %v", len(page), err)
				}
			}
		})
	}
}

// BenchmarkIdle watches an idle manager for several leases, once.
func BenchmarkIdle(b *testing.B) {
	const lease, leases = 3 * time.Second, 4
	dsn := pgtest.New(b, "fsync=on").Database("idle")
	openManager(b, dsn, taskpg.WithLease(lease))
	for b.Loop() {
		before := pgtest.Value[int64](b, dsn, `SELECT sum(beat)::bigint FROM task_owners`)
		time.Sleep(leases * lease)
		commits := pgtest.Value[int64](b, dsn, `SELECT sum(beat)::bigint FROM task_owners`) - before
		b.ReportMetric(float64(commits)/leases, "commits/lease")
		b.ReportMetric(pgtest.Value[float64](b, dsn, `SELECT count(*)::float8 FROM pg_stat_activity
			WHERE datname = 'idle' AND pid <> pg_backend_pid()`), "connections")
	}
}
