// Soak puts the load of a busy daemon on a manager. Every few seconds it prints
// what must not grow: memory, goroutines, file descriptors, the write-ahead log,
// and the latency of Submit and of the final state.
//
//	go run ./soak -for 10m
//
// The load is a mix of quick operations, enough to fill the history with -rows
// rows, and of long ones that report progress all the time. Some are cancelled,
// fail, or panic. Several readers page through the history, and one holds read
// transactions open for seconds, as a backup does.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mynt-nas/task"
)

func main() {
	log.SetFlags(0)
	length := flag.Duration("for", time.Minute, "run for this time")
	every := flag.Duration("every", 5*time.Second, "print a line at this interval")
	rows := flag.Int("rows", 1_000_000, "fill the history with this many operations")
	dir := flag.String("dir", "", "create the database in this `directory` (default: a new temporary one)")
	flag.Parse()
	if err := soak(*length, *every, *rows, *dir); err != nil {
		log.Fatal(err)
	}
}

const (
	submitters = 32 // of quick operations
	long       = 50 // long operations at any time
	readers    = 4
)

// A load is the state that the goroutines of a soak share.
type load struct {
	manager *task.Manager
	path    string
	submits latencies // from Submit's call to its return
	finals  latencies // from the function's return to the return of Wait
	jobs    atomic.Int64
}

func soak(length, every time.Duration, rows int, dir string) error {
	if dir == "" {
		var err error
		if dir, err = os.MkdirTemp("", "soak"); err != nil {
			return err
		}
		defer os.RemoveAll(dir)
	}
	path := filepath.Join(dir, "soak.db")
	store, err := task.OpenSQLite(path)
	if err != nil {
		return err
	}
	defer store.Close()
	m, err := task.New(store, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	l := &load{manager: m, path: path}
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()

	var all sync.WaitGroup
	pause := time.Duration(int64(length) / int64(rows) * submitters)
	for range submitters {
		all.Go(func() { l.quick(ctx, pause) })
	}
	for range long {
		all.Go(func() { l.long(ctx) })
	}
	for range readers {
		all.Go(func() { l.read(ctx) })
	}
	all.Go(func() { l.hold(ctx) })

	l.report(ctx, every)
	all.Wait()
	began := time.Now()
	if err := m.Close(); err != nil {
		return err
	}
	fmt.Printf("closed in %v\n", time.Since(began).Round(time.Millisecond))
	return nil
}

// quick submits short operations at a steady rate.
func (l *load) quick(ctx context.Context, pause time.Duration) {
	next := time.Now().Add(rand.N(pause + 1))
	for sleep(ctx, time.Until(next)) {
		next = next.Add(pause)
		l.run(func(ctx context.Context, update func(int)) (any, error) {
			update(50)
			switch n := rand.IntN(100); {
			case n < 1:
				panic("one in a hundred panics")
			case n < 5:
				return nil, errors.New("one in twenty-five fails")
			}
			return map[string]int{"files": 1000, "bytes": 123_456_789}, nil
		}, 0)
	}
}

// long runs operations that take seconds, and cancels one in three.
func (l *load) long(ctx context.Context) {
	for ctx.Err() == nil {
		takes := time.Second + rand.N(10*time.Second)
		l.run(func(inner context.Context, update func(int)) (any, error) {
			began := time.Now()
			for i := 0; time.Since(began) < takes; i++ {
				update(int(100 * time.Since(began) / takes))
				if i%100 == 0 {
					task.SetMetadata(inner, map[string]int{"step": i})
				}
				if !sleep(inner, time.Millisecond) {
					return nil, context.Cause(inner)
				}
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
			}
			return strings.Repeat("result ", 500), nil
		}, rand.N(3*takes))
	}
}

// run submits one operation and waits for it. It cancels it after cancelAfter,
// unless that is 0.
func (l *load) run(fn task.Func, cancelAfter time.Duration) {
	began := time.Now()
	var ended time.Time
	op, err := l.manager.Submit("soak", func(ctx context.Context, update func(int)) (any, error) {
		defer func() { ended = time.Now() }()
		return fn(ctx, update)
	}, task.WithMetadata(map[string]string{"pool": "tank"}))
	if err != nil {
		log.Fatal(err)
	}
	l.submits.add(time.Since(began))
	if cancelAfter > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), cancelAfter)
		if _, err := l.manager.Wait(ctx, op.ID); err != nil {
			op.Cancel()
		}
		cancel()
	}
	if _, err := l.manager.Wait(context.Background(), op.ID); err != nil {
		log.Fatal(err)
	}
	if !ended.IsZero() { // otherwise it was cancelled before it started
		l.finals.add(time.Since(ended))
	}
	l.jobs.Add(1)
}

// read pages through the history.
func (l *load) read(ctx context.Context) {
	for sleep(ctx, rand.N(100*time.Millisecond)) {
		ops, err := l.manager.List(50, rand.IntN(1000))
		if err != nil {
			log.Fatal(err)
		}
		for _, op := range ops {
			if _, ok := l.manager.Get(op.ID); !ok {
				log.Fatalf("operation %s is missing", op.ID)
			}
		}
	}
}

// hold opens read transactions for seconds, one after the other.
func (l *load) hold(ctx context.Context) {
	db, err := sql.Open("sqlite3", l.path)
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	for sleep(ctx, rand.N(time.Second)) {
		tx, err := db.Begin()
		if err != nil {
			log.Fatal(err)
		}
		var n int
		if err := tx.QueryRow(`SELECT count(*) FROM tasks WHERE rowid > (SELECT max(rowid) FROM tasks) - 1000`).Scan(&n); err != nil {
			log.Fatal(err)
		}
		sleep(ctx, rand.N(3*time.Second))
		tx.Rollback()
	}
}

// sleep pauses for d, or until ctx is done. It reports whether ctx is not done.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// report prints a line at each interval until ctx is done.
func (l *load) report(ctx context.Context, every time.Duration) {
	fmt.Println("   time      rows  jobs/s  RSS MB  heap MB  goroutines  fds  WAL MB  submit p50/p99 ms  final p50/p99 ms")
	began, last := time.Now(), int64(0)
	for sleep(ctx, every) {
		var mem runtime.MemStats
		runtime.ReadMemStats(&mem)
		jobs := l.jobs.Load()
		fmt.Printf("%7s  %8d  %6.0f  %6.1f  %7.1f  %10d  %3d  %6.1f  %s  %s\n",
			time.Since(began).Round(time.Second), jobs, float64(jobs-last)/every.Seconds(),
			rss(), mb(int64(mem.HeapAlloc)), runtime.NumGoroutine(), descriptors(), mb(fileSize(l.path+"-wal")),
			l.submits.take(), l.finals.take())
		last = jobs
	}
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// rss returns the resident memory in MB, or 0 without /proc.
func rss() float64 {
	status, _ := os.ReadFile("/proc/self/statm")
	var size, resident int64
	fmt.Sscan(string(status), &size, &resident)
	return mb(resident * int64(os.Getpagesize()))
}

// descriptors returns the number of open files, or 0 without /proc.
func descriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}

// latencies collects durations.
type latencies struct {
	mu  sync.Mutex // guards all
	all []time.Duration
}

func (l *latencies) add(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, d)
}

// take returns the median and the 99th percentile, and drops all durations.
func (l *latencies) take() string {
	l.mu.Lock()
	all := l.all
	l.all = make([]time.Duration, 0, len(all))
	l.mu.Unlock()
	if len(all) == 0 {
		return "          -      "
	}
	slices.Sort(all)
	ms := func(i int) float64 { return float64(all[i].Microseconds()) / 1000 }
	return fmt.Sprintf("%8.2f/%8.2f", ms(len(all)/2), ms(len(all)*99/100))
}
