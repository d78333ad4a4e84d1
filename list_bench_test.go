package task_test

import (
	"database/sql"
	"fmt"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// longHistory makes a database of n operations, of which one finished every ten
// seconds until the start of 2026. Every 1,000th is FAILED. Three are called
// "Needle", are the only ones with the pool "spare", and are in the oldest tenth.
func longHistory(b *testing.B, n int) (path string) {
	b.Helper()
	path = testkit.Path(b)
	openSQLite(b, path).Close()
	sqliteExec(b, path, fmt.Sprintf(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < %[1]d)
		INSERT INTO tasks (id, name, state, progress, metadata, result, created_at, updated_at, started_at)
		SELECT printf('01a20000-%%04x-7000-8000-%%012x', i %% 65536, i), iif(i * 40 %% %[1]d = 0 AND i * 10 < %[1]d, 'Needle', 'scrub'),
			iif(i %% 1000 = 0, 'FAILED', 'DONE'), 100, iif(i * 40 %% %[1]d = 0 AND i * 10 < %[1]d, '{"pool":"spare"}', '{"pool":"tank"}'),
			'{"files":1000,"bytes":123456789}', at, at, at
		FROM (SELECT i, strftime('%%F %%T.000000', '2026-01-01', printf('-%%d seconds', 10 * (%[1]d - i))) AS at FROM n)`, n))
	return path
}

// BenchmarkList lists what is in a history of 3,000,000 operations. The newest page
// by finish is also read by hand.
func BenchmarkList(b *testing.B) {
	const n = 3_000_000
	path := longHistory(b, n)
	m := newManager(b, openSQLite(b, path))
	end := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	start := end.Add(-n * 10 * time.Second)
	middle, err := m.List(1, n/2)
	must(b, err)
	for _, bm := range listBenchmarks(start, end, middle[0].ID) {
		b.Run(bm.name, func(b *testing.B) {
			for b.Loop() {
				if ops, err := m.List(50, 0, bm.opts...); err != nil || len(ops) != bm.want {
					b.Fatal(len(ops), err)
				}
			}
		})
	}
	db, err := sql.Open("sqlite3", path+"?_stmt_cache_size=16")
	must(b, err)
	defer db.Close()
	b.Run("beside a query", func(b *testing.B) {
		var ours, bare time.Duration
		for b.Loop() {
			start := time.Now()
			if ops, err := m.List(50, 0, task.ByFinish()); err != nil || len(ops) != 50 {
				b.Fatal(len(ops), err)
			}
			ours += time.Since(start)
			start = time.Now()
			byHandOrdered(b, db, `WHERE (state = 'DONE' OR state = 'FAILED' OR state = 'CANCELLED')
				ORDER BY ifnull(updated_at, '') DESC, rowid DESC`, 50, 0)
			bare += time.Since(start)
		}
		b.ReportMetric(float64(ours)/float64(bare), "List/query")
	})
	b.Run("prune nothing", func(b *testing.B) {
		for b.Loop() {
			if pruned, err := m.Prune(start); err != nil || pruned != 0 {
				b.Fatal(pruned, err)
			}
		}
	})
}

type listBenchmark struct {
	name string
	want int
	opts []task.ListOption
}

// listBenchmarks are lists of that history, which ends at a time and of which one
// operation in the middle is given.
func listBenchmarks(start, end time.Time, middle string) []listBenchmark {
	firstMonth := task.FinishedBefore(start.Add(30 * 24 * time.Hour))
	return []listBenchmark{
		{"newest", 50, nil},
		{"newest by finish", 50, []task.ListOption{task.ByFinish()}},
		{"next page by finish", 50, []task.ListOption{task.ByFinish(), task.Before(middle)}},
		{"failed", 50, []task.ListOption{task.ByState(task.StateFailed)}},
		{"failed by finish", 50, []task.ListOption{task.ByState(task.StateFailed), task.ByFinish()}},
		{"failed and done by finish", 50, []task.ListOption{task.ByState(task.StateFailed, task.StateDone), task.ByFinish()}},
		{"frequent text", 50, []task.ListOption{task.Containing("SCR")}},
		{"frequent text by finish", 50, []task.ListOption{task.Containing("SCR"), task.ByFinish()}},
		{"rare text", 3, []task.ListOption{task.Containing("needle")}},
		{"rare text by finish", 3, []task.ListOption{task.Containing("needle"), task.ByFinish()}},
		{"frequent metadata", 50, []task.ListOption{task.ByMetadata("pool", "tank")}},
		{"rare metadata", 3, []task.ListOption{task.ByMetadata("pool", "spare")}},
		{"rare metadata by finish", 3, []task.ListOption{task.ByMetadata("pool", "spare"), task.ByFinish()}},
		{"last hour", 50, []task.ListOption{task.FinishedAfter(end.Add(-time.Hour))}},
		{"last hour by finish", 50, []task.ListOption{task.FinishedAfter(end.Add(-time.Hour)), task.ByFinish()}},
		{"first hour", 50, []task.ListOption{task.FinishedBefore(start.Add(time.Hour))}},
		{"first hour by finish", 50, []task.ListOption{task.FinishedBefore(start.Add(time.Hour)), task.ByFinish()}},
		{"first month", 50, []task.ListOption{firstMonth}},
		{"first month by finish", 50, []task.ListOption{firstMonth, task.ByFinish()}},
		{"failed in the first month by finish", 50, []task.ListOption{task.ByState(task.StateFailed), firstMonth, task.ByFinish()}},
		{"failed in the first month", 50, []task.ListOption{task.ByState(task.StateFailed), firstMonth}},
		{"rare text in the first month", 3, []task.ListOption{task.Containing("needle"), firstMonth, task.ByFinish()}},
	}
}
