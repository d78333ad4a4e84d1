package task_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

// A viewer collects what a Watch tells.
type viewer struct {
	stop context.CancelFunc
	done chan struct{}

	mu   sync.Mutex // guards what follows
	seen []string
	err  error
}

// view watches until the test ends. Each operation is seen as its name, state
// and progress.
func view(t *testing.T, m *task.Manager, ids ...string) *viewer {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	v := &viewer{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(v.done)
		for op, err := range m.Watch(ctx, ids...) {
			v.mu.Lock()
			if err != nil {
				v.err = err
			} else {
				v.seen = append(v.seen, fmt.Sprintf("%s %s %d", op.Name, op.State, op.Progress))
			}
			v.mu.Unlock()
		}
	}()
	t.Cleanup(func() { stop(); <-v.done })
	return v
}

// want checks what was seen since it was called last.
func (v *viewer) want(t *testing.T, want ...string) {
	t.Helper()
	time.Sleep(time.Second) // of the test's own time
	v.mu.Lock()
	defer v.mu.Unlock()
	if !slices.Equal(v.seen, want) {
		t.Errorf("seen %q, want %q", v.seen, want)
	}
	v.seen = nil
}

// wantEnd checks that the sequence has ended, and how.
func (v *viewer) wantEnd(t *testing.T, want error) {
	t.Helper()
	<-v.done
	if !errors.Is(v.err, want) || (want == nil) != (v.err == nil) {
		t.Errorf("it ended with %v, want %v", v.err, want)
	}
}

// A puppet is an operation whose function does what it is told.
type puppet struct {
	*task.Operation
	do chan func(ctx context.Context, update func(int)) (any, error, bool)
}

func newPuppet(t *testing.T, m *task.Manager, name string) *puppet {
	t.Helper()
	p := &puppet{do: make(chan func(context.Context, func(int)) (any, error, bool))}
	op, err := m.Submit(name, func(ctx context.Context, update func(int)) (any, error) {
		for {
			select {
			case f := <-p.do:
				if result, err, end := f(ctx, update); end {
					return result, err
				}
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	p.Operation = op
	synctest.Wait()
	return p
}

func (p *puppet) update(progress int) {
	p.do <- func(_ context.Context, update func(int)) (any, error, bool) { update(progress); return nil, nil, false }
	synctest.Wait()
}

func (p *puppet) end(result any, err error) {
	p.do <- func(context.Context, func(int)) (any, error, bool) { return result, err, true }
}

func TestWatchAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil, task.WithLimit(2))
		old := newPuppet(t, m, "old")
		old.end(nil, nil)
		wait(t, m, old.ID)
		a := newPuppet(t, m, "a")
		a.update(10)
		v := view(t, m)
		v.want(t, "a RUNNING 10")
		for i := range 90 {
			a.update(10 + i)
		}
		v.want(t, "a RUNNING 99")
		a.update(99)
		v.want(t)
		b, c := newPuppet(t, m, "b"), newPuppet(t, m, "c")
		v.want(t, "b PENDING 0", "b RUNNING 0", "c PENDING 0")
		late := view(t, m)
		late.want(t, "a RUNNING 99", "b RUNNING 0", "c PENDING 0")
		b.update(5)
		c.Cancel()
		b.end(nil, errors.New("broken"))
		synctest.Wait()
		a.end(nil, nil)
		for _, v := range []*viewer{v, late} {
			v.want(t, "b RUNNING 5", "c CANCELLED 0", "b FAILED 5", "a DONE 100")
		}
		v.stop()
		v.wantEnd(t, nil)
		m.Close()
		late.want(t)
		late.wantEnd(t, task.ErrClosed)
		view(t, m).wantEnd(t, task.ErrClosed)
	})
}

func TestWatchNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		old, a, b := newPuppet(t, m, "old"), newPuppet(t, m, "a"), newPuppet(t, m, "b")
		old.end(nil, nil)
		wait(t, m, old.ID)
		finished := view(t, m, old.ID)
		finished.want(t, "old DONE 100")
		finished.wantEnd(t, nil)

		unknown := view(t, m, a.ID, "unknown")
		unknown.want(t)
		unknown.wantEnd(t, task.ErrNotFound)

		v := view(t, m, b.ID, old.ID, b.ID)
		v.want(t, "old DONE 100", "b RUNNING 0")
		a.update(1)
		b.update(2)
		v.want(t, "b RUNNING 2")
		a.end(nil, nil)
		b.Cancel()
		v.want(t, "b CANCELLED 2")
		v.wantEnd(t, nil)

		open := newPuppet(t, m, "open")
		closed := view(t, m, open.ID)
		closed.want(t, "open RUNNING 0")
		m.Close()
		closed.want(t, "open FAILED 0")
		closed.wantEnd(t, nil)
		closed = view(t, m, open.ID)
		closed.want(t, "open FAILED 0")
		closed.wantEnd(t, nil)
	})
}

// TestWatchFromTheCall: what happens between the call and the loop is not
// missed, and what is called and never used goes with its context.
func TestWatchFromTheCall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks.db")
	m, other := newManager(t, openSQLite(t, path)), newManager(t, openSQLite(t, path))
	running, foreign := submit(t, m, untilCancelled), submit(t, other, untilCancelled)
	ctx, cancel := context.WithCancel(t.Context())
	all := m.Watch(ctx)
	ids := []string{running.ID, foreign.ID}
	named := m.Watch(ctx, ids...)
	ids[0] = "another"
	fn, started, release := blocker(nil)
	deleted := submit(t, m, fn)
	<-started
	late := m.Watch(ctx)
	sqliteExec(t, path, "DELETE FROM tasks WHERE id = '"+deleted.ID+"'")
	release()
	m.Wait(ctx, deleted.ID)
	op := submit(t, m, nothing)
	wait(t, m, op.ID)
	running.Cancel()
	wait(t, m, running.ID)

	var seen []string
	for got, err := range all {
		if err != nil {
			t.Fatal(err)
		}
		if got.ID == op.ID {
			seen = append(seen, string(got.State))
			if got.State.Finished() {
				break
			}
		}
	}
	if want := []string{"PENDING", "RUNNING", "DONE"}; !slices.Equal(seen, want) {
		t.Errorf("seen %q, want %q", seen, want)
	}
	foreign.Cancel()
	for range 2 {
		seen = nil
		for got, err := range named {
			if err != nil {
				t.Fatal(err)
			}
			if got.State.Finished() {
				seen = append(seen, got.ID)
			}
		}
		if want := []string{running.ID, foreign.ID}; !slices.Equal(seen, want) {
			t.Errorf("seen %q, want %q", seen, want)
		}
	}
	for got, err := range late { // which has not named what was deleted
		if err != nil {
			t.Fatal(err)
		}
		if got.ID == op.ID {
			break
		}
	}
	m.Watch(ctx)
	m.Watch(ctx, op.ID)
	if n := task.Watchers(m); n != 2 {
		t.Errorf("%d watchers, want 2", n)
	}
	cancel()
	for task.Watchers(m) > 0 {
		time.Sleep(time.Millisecond)
	}
}

// TestWatchUnstored: a final state is told when it is stored, and until then why
// it is not. What never will be stored is an error to whoever has named it.
func TestWatchUnstored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore()}
		m := newManager(t, db)
		a := newPuppet(t, m, "a")
		var shown []string
		done := make(chan error)
		go func() {
			for op, err := range m.Watch(t.Context(), a.ID) {
				if err != nil {
					done <- err
					return
				}
				shown = append(shown, fmt.Sprint(op.State, " ", op.Error))
			}
			done <- nil
		}()
		synctest.Wait()
		db.set(failFinals)
		a.end(nil, nil)
		time.Sleep(time.Second)
		db.set(nil)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if want := []string{"RUNNING ", "RUNNING DONE, which can't be stored yet: disk full", "DONE "}; !slices.Equal(shown, want) {
			t.Errorf("shown %q, want %q", shown, want)
		}

		b := newPuppet(t, m, "b")
		v, all := view(t, m, b.ID), view(t, m)
		v.want(t, "b RUNNING 0")
		all.want(t, "b RUNNING 0")
		db.set(failFinals)
		m.Close()
		v.want(t, "b RUNNING 0")
		v.wantEnd(t, task.ErrClosed)
		all.want(t, "b RUNNING 0")
		all.wantEnd(t, task.ErrClosed)
	})
}

func TestWatchDeleted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks.db")
	m := newManager(t, openSQLite(t, path))
	fn, started, release := blocker(nil)
	op := submit(t, m, fn)
	<-started
	for got, err := range m.Watch(t.Context(), op.ID) {
		if err != nil {
			if !errors.Is(err, task.ErrNotFound) {
				t.Error(err)
			}
			return
		}
		if got.State != task.StateRunning {
			t.Errorf("%+v", got)
		}
		sqliteExec(t, path, "DELETE FROM tasks")
		release()
	}
	t.Error("it ended without an error")
}

// TestWatchForeign watches what another manager on the same database runs.
func TestWatchForeign(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks.db")
	m, other := newManager(t, openSQLite(t, path)), newManager(t, openSQLite(t, path))
	next := make(chan int)
	op := submit(t, other, func(_ context.Context, update func(int)) (any, error) {
		for progress := range next {
			update(progress)
		}
		return "result", nil
	})
	all, stop := context.WithCancel(t.Context())
	defer stop()
	go func() {
		for op, err := range m.Watch(all) {
			t.Errorf("whoever watches all of one manager is told %+v, %v of another", op, err)
		}
	}()
	steps := []int{10, 20, 30}
	var last *task.Operation
	for got, err := range m.Watch(t.Context(), op.ID) {
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case got.State.Finished():
		case len(steps) == 0:
			if next != nil && got.Progress == 30 {
				close(next)
				next = nil
			}
		case got.State == task.StateRunning && (last == nil || last.State == task.StatePending || got.Progress > last.Progress):
			next <- steps[0]
			steps = steps[1:]
		}
		last = got
	}
	if last.State != task.StateDone || last.Result != "result" {
		t.Errorf("the last is %+v", last)
	}
}

// TestWatchCrowd has many watchers begin at any time while operations come and
// go. Each sees of each operation a run of states without a gap, to the end.
func TestWatchCrowd(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		var watchers, submitters sync.WaitGroup
		for i := range 50 {
			watchers.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				watchCrowd(t, m)
			})
		}
		for range 8 {
			submitters.Go(func() {
				for i := range 50 {
					op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
						for i := range rand.IntN(20) {
							update(i)
						}
						return nil, context.Cause(ctx)
					})
					if i%5 == 0 {
						op.Cancel()
					}
				}
			})
		}
		submitters.Wait()
		m.Close()
		watchers.Wait()
	})
}

var ranks = map[task.State]int{task.StatePending: 1, task.StateRunning: 2, task.StateDone: 3, task.StateFailed: 3, task.StateCancelled: 3}

func watchCrowd(t *testing.T, m *task.Manager) {
	last := make(map[string]*task.Operation)
	var end error
	for op, err := range m.Watch(t.Context()) {
		if err != nil {
			end = err
			break
		}
		before := last[op.ID]
		last[op.ID] = op
		if before == nil {
			continue
		}
		switch from, to := ranks[before.State], ranks[op.State]; {
		case from == 3:
			t.Errorf("%s after %s", op.State, before.State)
		case to == from+1, to == from && to == 2:
		case from == 1 && to == 3 && op.State != task.StateDone: // never started
		default:
			t.Errorf("%s after %s", op.State, before.State)
		}
	}
	if !errors.Is(end, task.ErrClosed) {
		t.Errorf("it ended with %v", end)
	}
	for id, op := range last {
		if !op.State.Finished() {
			t.Errorf("the last seen of %s is %s", id, op.State)
		}
	}
}

// TestWatchNeverReads: a receiver that is stuck costs a bounded amount of
// memory, holds up nobody, and is told in the end.
func TestWatchNeverReads(t *testing.T) {
	m := newManager(t, nil)
	stuck := make(chan struct{})
	got := make(chan error)
	first := submit(t, m, nothing)
	wait(t, m, first.ID)
	running := submit(t, m, untilCancelled)
	for _, ids := range [][]string{nil, {running.ID}} {
		go func() {
			var last error
			for _, err := range m.Watch(t.Context(), ids...) {
				<-stuck
				last = err
			}
			got <- last
		}()
	}
	for task.Watchers(m) < 2 {
		time.Sleep(time.Millisecond)
	}
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for range 400 {
				submit(t, m, nothing)
			}
		})
	}
	all.Wait()
	if n := task.News(m); n > 3*10_001 {
		t.Errorf("%d news are kept", n)
	}
	running.Cancel()
	close(stuck)
	results := []error{<-got, <-got}
	slices.SortFunc(results, func(a, b error) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	if results[0] != nil || !errors.Is(results[1], task.ErrLagged) {
		t.Errorf("they ended with %v, want one with nothing, one with ErrLagged", results)
	}
	if n := task.Watchers(m); n > 0 {
		t.Errorf("%d watchers are left", n)
	}
}

// TestWatchNamedInBurst: who has named a quiet operation is not too slow because
// of what happens to others.
func TestWatchNamedInBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		quiet := newPuppet(t, m, "quiet")
		var updates []func(int)
		started := make(chan func(int), 1)
		for range 10_100 {
			submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
				started <- update
				return untilCancelled(ctx, update)
			})
			updates = append(updates, <-started)
		}
		named, all := view(t, m, quiet.ID), view(t, m)
		named.want(t, "quiet RUNNING 0")
		for _, update := range updates { // the hub waits for the clock, and that for this
			update(1)
		}
		all.wantEnd(t, task.ErrLagged)
		quiet.end(nil, nil)
		named.want(t, "quiet DONE 100")
		named.wantEnd(t, nil)
		m.Close()
	})
}

// TestWatchNothingOld: what had finished before the call is no news.
func TestWatchNothingOld(t *testing.T) {
	m := newManager(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for range 100 { // they keep the hub busy
		go func() {
			for range m.Watch(ctx) {
			}
		}()
	}
	for task.Watchers(m) < 100 {
		time.Sleep(time.Millisecond)
	}
	for range 300 {
		old := submit(t, m, nothing)
		wait(t, m, old.ID)
		changes := m.Watch(ctx)
		next := submit(t, m, nothing)
		for op, err := range changes {
			if err != nil {
				t.Fatal(err)
			}
			if op.ID == old.ID {
				t.Fatalf("told %s of what had finished before", op.State)
			}
			if op.ID == next.ID && op.State.Finished() {
				break
			}
		}
	}
}

// TestWatchSlowly: a receiver that takes its time misses no state as long as
// it is not too far behind, and gets the latest progress.
func TestWatchSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		var seen []string
		done := make(chan struct{})
		ctx, stop := context.WithCancel(t.Context())
		go func() {
			defer close(done)
			for op := range m.Watch(ctx) {
				seen = append(seen, fmt.Sprintf("%s %s %d", op.Name, op.State, op.Progress))
				time.Sleep(time.Minute)
			}
		}()
		synctest.Wait()
		a := newPuppet(t, m, "a")
		b := newPuppet(t, m, "b")
		for i := range 100 {
			a.update(i)
			time.Sleep(100 * time.Millisecond)
		}
		a.end(nil, nil)
		wait(t, m, a.ID)
		b.end(nil, nil)
		wait(t, m, b.ID)
		time.Sleep(time.Hour)
		stop()
		<-done
		want := []string{"a PENDING 0", "a RUNNING 99", "b PENDING 0", "b RUNNING 0", "a DONE 100", "b DONE 100"}
		if !slices.Equal(seen, want) {
			t.Errorf("seen %q, want %q", seen, want)
		}
	})
}

// TestWatchBody: the body of the loop may call what it likes.
func TestWatchBody(t *testing.T) {
	m := newManager(t, nil)
	n := 0
	for op, err := range m.Watch(t.Context(), submit(t, m, untilCancelled).ID) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		op.Cancel()
		m.Get(op.ID)
		m.List(10, 0)
		wait(t, m, submit(t, m, nothing).ID)
		for range m.Watch(t.Context(), op.ID) {
			break
		}
	}
	if n < 2 {
		t.Errorf("%d news", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for op, err := range m.Watch(ctx) {
		t.Errorf("after the end: %v, %v", op, err)
	}
}

// TestWatchCost: to be watched costs an update no memory.
func TestWatchCost(t *testing.T) {
	m := newManager(t, nil)
	v := view(t, m)
	allocs := make(chan float64)
	op := submit(t, m, func(_ context.Context, update func(int)) (any, error) {
		i := 0
		allocs <- testing.AllocsPerRun(100_000, func() { i++; update(i % 100) })
		return nil, nil
	})
	if n := <-allocs; n != 0 {
		t.Errorf("%v allocations an update", n)
	}
	wait(t, m, op.ID)
	v.stop()
}
