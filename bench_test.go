package task_test

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// BenchmarkSubmit measures operations that do nothing, from Submit to their stored
// final state.
func BenchmarkSubmit(b *testing.B) {
	for _, submitters := range []int{1, 64} {
		b.Run(fmt.Sprintf("submitters=%d", submitters), func(b *testing.B) {
			m := newManager(b, openSQLite(b, testkit.Path(b)))
			b.ReportAllocs()
			each(b, submitters, func() {
				submit(b, m, nothing)
			})
			if err := m.Shutdown(b.Context()); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "jobs/s")
		})
	}
}

// each calls f b.N times from n goroutines.
func each(b *testing.B, n int, f func()) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			for range (b.N + n - 1 - i) / n {
				f()
			}
		})
	}
	all.Wait()
}

// BenchmarkSubmitWatched is BenchmarkSubmit with watchers of all operations. It
// measures the time until all operations have finished, not until all watchers have
// seen that.
func BenchmarkSubmitWatched(b *testing.B) {
	const jobs = 6400 // few enough that no watcher lags
	for _, watchers := range []int{0, 1, 1000} {
		b.Run(fmt.Sprintf("watchers=%d", watchers), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				m := newManager(b, openSQLite(b, testkit.Path(b)))
				ctx, stop := context.WithCancel(b.Context())
				var done sync.WaitGroup
				for range watchers {
					changes := m.Watch(ctx)
					done.Go(func() {
						for range changes {
						}
					})
				}
				b.StartTimer()
				var all sync.WaitGroup
				for range 64 {
					all.Go(func() {
						for range jobs / 64 {
							wait(b, m, submit(b, m, nothing).ID)
						}
					})
				}
				all.Wait()
				b.StopTimer()
				stop()
				done.Wait()
				b.StartTimer()
			}
			b.ReportMetric(float64(jobs*b.N)/b.Elapsed().Seconds(), "jobs/s")
		})
	}
}

// BenchmarkUpdate reports a new value each time.
func BenchmarkUpdate(b *testing.B) {
	m := newManager(b, openSQLite(b, testkit.Path(b)))
	b.ReportAllocs()
	op := submit(b, m, func(_ context.Context, update func(int)) (any, error) {
		for i := range b.N {
			update(i % 100)
		}
		return nil, nil
	})
	wait(b, m, op.ID)
}

// BenchmarkWatched reports progress while nobody watches, while a receiver is stuck,
// while one is slow, and while a thousand read.
func BenchmarkWatched(b *testing.B) {
	for _, bm := range []struct {
		name     string
		watchers int
		body     func(end <-chan struct{})
	}{
		{"nobody", 0, nil},
		{"stuck", 1, func(end <-chan struct{}) { <-end }},
		{"slow", 1, func(<-chan struct{}) { time.Sleep(100 * time.Millisecond) }},
		{"thousand", 1000, func(<-chan struct{}) {}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			m := newManager(b, nil)
			ctx, stop := context.WithCancel(b.Context())
			defer stop()
			for range bm.watchers {
				events := m.Watch(ctx)
				go func() {
					for range events {
						bm.body(ctx.Done())
					}
				}()
			}
			b.ReportAllocs()
			op := submit(b, m, func(_ context.Context, update func(int)) (any, error) {
				for i := range b.N {
					update(i % 100)
				}
				return nil, nil
			})
			wait(b, m, op.ID)
		})
	}
}

// BenchmarkUpdateCrowd: a thousand operations report as fast as they can. It counts the
// resulting commits.
func BenchmarkUpdateCrowd(b *testing.B) {
	store := testkit.NewFake(openSQLite(b, testkit.Path(b)))
	m := newManager(b, store)
	var running, done sync.WaitGroup
	start := make(chan struct{})
	running.Add(1000)
	for range 1000 {
		done.Add(1)
		submit(b, m, func(_ context.Context, update func(int)) (any, error) {
			defer done.Done()
			running.Done()
			<-start
			for i := range b.N {
				update(i % 100)
			}
			return nil, nil
		})
	}
	running.Wait()
	before := store.Count("WriteBatch")
	b.ResetTimer()
	close(start)
	done.Wait()
	b.StopTimer()
	b.ReportMetric(float64(store.Count("WriteBatch")-before)/b.Elapsed().Seconds(), "commits/s")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(1000*b.N), "ns/update")
}

func BenchmarkGet(b *testing.B) {
	m := newManager(b, openSQLite(b, testkit.Path(b)))
	live := submit(b, m, untilCancelled)
	finished := submit(b, m, nothing)
	wait(b, m, finished.ID)
	for name, id := range map[string]string{"live": live.ID, "history": finished.ID} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := m.Get(id); !ok {
					b.Fatal("not found")
				}
			}
		})
	}
}

// BenchmarkHistory reads a history of 1,000,000 operations, and compares the same
// handwritten query.
func BenchmarkHistory(b *testing.B) {
	path := history(b, 1_000_000)
	m := newManager(b, openSQLite(b, path))
	db, err := sql.Open("sqlite3", path+"?_stmt_cache_size=16")
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	for _, offset := range []int{0, 900_000} {
		b.Run(fmt.Sprintf("offset=%d", offset), func(b *testing.B) {
			var ours, bare time.Duration
			for b.Loop() { // alternate the two
				start := time.Now()
				ops, err := m.List(50, offset)
				ours += time.Since(start)
				if err != nil || len(ops) != 50 {
					b.Fatal(len(ops), err)
				}
				start = time.Now()
				byHand(b, db, 50, offset)
				bare += time.Since(start)
			}
			b.ReportMetric(float64(ours.Nanoseconds())/float64(b.N), "ns/List")
			b.ReportMetric(float64(bare.Nanoseconds())/float64(b.N), "ns/query")
			b.ReportMetric(float64(ours)/float64(bare), "List/query")
		})
	}
}

// BenchmarkSubmitBesideSearches measures Submit beside 100 clients that search 2,700,000
// rows for a name that does not occur.
func BenchmarkSubmitBesideSearches(b *testing.B) {
	for b.Loop() {
		r := besideSearches(b, 2_700_000, 100, 20*time.Second)
		if r.failed != nil {
			b.Error(r.failed)
		}
		b.ReportMetric(float64(r.submits), "submits")
		b.ReportMetric(float64(r.worstSubmit.Microseconds())/1000, "ms/worst-submit")
		b.ReportMetric(float64(r.worstEnd.Microseconds())/1000, "ms/worst-end")
		b.ReportMetric(float64(r.searches), "searches")
	}
}

// A besideResult is the result of besideSearches.
type besideResult struct {
	submits, searches     int
	worstSubmit, worstEnd time.Duration // the longest Submit, and the longest search after its context was done
	failed                error
}

// besideSearches submits every 10 ms for a while, beside clients that search the
// history. Every other client gives up after 0.1 seconds and searches again.
func besideSearches(tb testing.TB, rows, clients int, during time.Duration) (r besideResult) {
	m := newManager(tb, openSQLite(tb, history(tb, rows)))
	ctx, cancel := context.WithTimeout(tb.Context(), during)
	defer cancel()
	var mu sync.Mutex // guards r
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for ctx.Err() == nil {
				mine, cancel := ctx, func() {}
				if i%2 == 0 {
					mine, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				}
				_, err := m.List(50, 0, task.ByName("rare"), task.WithContext(mine))
				end, ended := mine.Deadline()
				cancel()
				mu.Lock()
				r.searches++
				if took := time.Since(end); ended && took > r.worstEnd {
					r.worstEnd = took
				}
				if err != nil && !errors.Is(err, context.DeadlineExceeded) {
					r.failed = err
				}
				mu.Unlock()
			}
		})
	}
	for ctx.Err() == nil {
		start := time.Now()
		_, err := m.Submit("work", nothing)
		took := time.Since(start)
		mu.Lock()
		r.submits++
		r.worstSubmit = max(r.worstSubmit, took)
		r.failed = cmp.Or(r.failed, err)
		mu.Unlock()
		time.Sleep(10 * time.Millisecond)
	}
	all.Wait()
	return r
}

// byHand is what an application would write without this package.
func byHand(b *testing.B, db *sql.DB, limit, offset int) {
	byHandOrdered(b, db, `ORDER BY rowid DESC`, limit, offset)
}

func byHandOrdered(b *testing.B, db *sql.DB, order string, limit, offset int) {
	rows, err := db.Query(`SELECT id, name, state, progress, metadata, result, error, created_at, updated_at, started_at
		FROM tasks `+order+` LIMIT ? OFFSET ?`, limit, offset)
	if err != nil {
		b.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var id, name, state string
		var progress int
		var metadata, result, text sql.NullString
		var created, updated, started sql.NullTime
		if err := rows.Scan(&id, &name, &state, &progress, &metadata, &result, &text, &created, &updated, &started); err != nil {
			b.Fatal(err)
		}
	}
	if err := rows.Err(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkNew starts a manager on a history with 1,000 orphans, which are its newest
// operations or are spread all over it. For comparison, it starts one on as many
// orphans alone.
func BenchmarkNew(b *testing.B) {
	alone, long := history(b, 1000), history(b, 1_000_000)
	for _, bm := range []struct{ name, orphans string }{
		{"newest", "rowid > 999000"},
		{"scattered", "rowid % 1000 = 0"},
	} {
		b.Run(bm.name, func(b *testing.B) {
			var ours, beside time.Duration
			for b.Loop() { // alternate the two
				beside += timeNew(b, alone, "true")
				ours += timeNew(b, long, bm.orphans)
			}
			b.ReportMetric(float64(beside.Microseconds())/1000/float64(b.N), "ms/1000-rows")
			b.ReportMetric(float64(ours.Microseconds())/1000/float64(b.N), "ms/1000000-rows")
		})
		sqliteExec(b, long, `UPDATE tasks SET state = 'DONE'`)
	}
}

// BenchmarkRecoverBesideLiving recovers orphans, or finds that there are none, beside
// 300,000 unfinished operations of another open store.
func BenchmarkRecoverBesideLiving(b *testing.B) {
	for _, orphans := range []int{0, 20_000} {
		b.Run(fmt.Sprintf("orphans=%d", orphans), func(b *testing.B) {
			path := testkit.Path(b)
			living, dead := livingAndDead(b, path)
			testkit.Fill(b, path, 300_000, living, "-1 hour")
			store := openSQLite(b, path)
			for b.Loop() {
				b.StopTimer()
				testkit.Exec(b, path, `DELETE FROM tasks WHERE owner = ?`, dead)
				testkit.Fill(b, path, orphans, dead, "-1 hour")
				b.StartTimer()
				n := 0
				for _, err := range store.Recover("gone", nil) {
					if n++; err != nil {
						b.Fatal(err)
					}
				}
				if n != orphans {
					b.Fatalf("recovered %d operations, want %d", n, orphans)
				}
			}
		})
	}
}

// livingAndDead returns the ID of an owner that lives until the end of the test, and
// the ID of a dead one. The first ID sorts before the second.
func livingAndDead(tb testing.TB, path string) (living, dead string) {
	tb.Helper()
	store := openSQLite(tb, path)
	if err := store.Save(&task.Operation{ID: "first", Name: "x", State: task.StateRunning}); err != nil {
		tb.Fatal(err)
	}
	db, err := sql.Open("sqlite3", path)
	if err != nil {
		tb.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRow(`SELECT owner FROM tasks`).Scan(&living); err != nil {
		tb.Fatal(err)
	}
	return living, "ffffffff-ffff-4fff-bfff-ffffffffffff"
}

// timeNew returns the time that New takes on a database whose program died while those
// operations were running.
func timeNew(b *testing.B, path, orphans string) time.Duration {
	sqliteExec(b, path, `UPDATE tasks SET state = 'RUNNING' WHERE `+orphans)
	sqliteExec(b, path, `PRAGMA wal_checkpoint(TRUNCATE)`)
	store := openSQLite(b, path)
	defer store.Close()
	start := time.Now()
	m, err := task.New(store, quiet)
	took := time.Since(start)
	if err != nil {
		b.Fatal(err)
	}
	if err := m.Close(); err != nil {
		b.Fatal(err)
	}
	return took
}

// history creates a database of n finished operations.
func history(b testing.TB, n int) (path string) {
	b.Helper()
	path = testkit.Path(b)
	openSQLite(b, path).Close()
	sqliteExec(b, path, fmt.Sprintf(`INSERT INTO tasks (id, name, state, progress, metadata, result, error, created_at, updated_at, started_at, owner)
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < %d)
		SELECT printf('01a20000-%%04x-7000-8000-%%012x', i %% 65536, i), 'scrub', 'DONE',
			100, NULL, '{"files":1000,"bytes":123456789}', NULL,
			'2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000', NULL FROM n`, n))
	return path
}

// BenchmarkMemory measures the memory of an operation while it is live and afterwards.
func BenchmarkMemory(b *testing.B) {
	const n = 10_000
	for b.Loop() {
		m := newManager(b, openSQLite(b, testkit.Path(b)))
		goroutines := runtime.NumGoroutine()
		before := heap()
		var all sync.WaitGroup
		stop := make(chan struct{})
		for range 64 {
			all.Go(func() {
				for range n / 64 {
					submit(b, m, func(context.Context, func(int)) (any, error) { <-stop; return nil, nil })
				}
			})
		}
		all.Wait()
		count := n / 64 * 64
		b.ReportMetric(float64(heap()-before)/float64(count), "B/live")
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/float64(count), "goroutines/live")
		close(stop)
		if err := m.Shutdown(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(heap()-before)/float64(count), "B/finished")
		runtime.KeepAlive(m)
	}
}

// BenchmarkPrune deletes 1,000,000 operations while others are submitted one after the
// other, and measures Submit meanwhile and without it.
func BenchmarkPrune(b *testing.B) {
	path := history(b, 1_000_000)
	m := newManager(b, openSQLite(b, path))
	submits := func(until func() bool) (p50, p99 time.Duration) {
		var all []time.Duration
		for !until() {
			start := time.Now()
			submit(b, m, nothing)
			all = append(all, time.Since(start))
			time.Sleep(time.Millisecond)
		}
		slices.Sort(all)
		return all[len(all)/2], all[len(all)*99/100]
	}
	for b.Loop() {
		end := time.Now().Add(10 * time.Second)
		p50, p99 := submits(func() bool { return time.Now().After(end) })
		b.ReportMetric(float64(p50.Microseconds()), "µs-p50-before")
		b.ReportMetric(float64(p99.Microseconds()), "µs-p99-before")
		pruned := make(chan int, 1)
		start := time.Now()
		go func() {
			n, err := m.Prune(start)
			if err != nil {
				b.Error(err)
			}
			pruned <- n
		}()
		p50, p99 = submits(func() bool { return len(pruned) > 0 })
		b.ReportMetric(float64(p50.Microseconds()), "µs-p50-pruning")
		b.ReportMetric(float64(p99.Microseconds()), "µs-p99-pruning")
		b.ReportMetric(float64(<-pruned)/time.Since(start).Seconds(), "pruned/s")
	}
}

// BenchmarkPending queues 1,000,000 operations behind a limit, cancels some and closes
// the manager.
func BenchmarkPending(b *testing.B) {
	const n = 1_000_000
	for b.Loop() {
		m := newManager(b, openSQLite(b, testkit.Path(b)), task.WithLimit(1))
		submit(b, m, untilCancelled)
		goroutines, before := runtime.NumGoroutine(), heap()
		cancelled := make(chan string, n/1000)
		var all sync.WaitGroup
		for i := range 64 {
			all.Go(func() {
				for i := i; i < n; i += 64 {
					op := submit(b, m, untilCancelled, task.WithLock(fmt.Sprint(i%1000)))
					if i%1000 == 0 {
						cancelled <- op.ID
					}
				}
			})
		}
		all.Wait()
		close(cancelled)
		b.ReportMetric(float64(heap()-before)/n, "B/pending")
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/n, "goroutines/pending")
		start := time.Now()
		for id := range cancelled {
			if err := m.Cancel(id); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/(n/1000), "µs/Cancel")
		start = time.Now()
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(start).Seconds(), "s/Close")
	}
}

// heap returns the bytes of heap and stacks in use.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapInuse + s.StackInuse)
}

// longHistory creates a database of n operations. One finished every ten seconds until
// the start of 2026. Every 1,000th is FAILED. Three in the oldest tenth are called
// "Needle" and are the only ones with the pool "spare".
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

// BenchmarkList lists operations of a history of 3,000,000. It also runs a handwritten
// query for the newest page by finish.
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

// listBenchmarks returns lists of that history, which lasts from start to end; middle
// is the ID of one of its operations.
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
