package task_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// A viewer collects what Watch yields.
type viewer struct {
	stop context.CancelFunc
	done chan struct{}

	mu   sync.Mutex // guards what follows
	seen []string
	err  error
}

// view watches until the test ends. It records the name, state and progress of each
// operation, and the error of an unfinished one.
func view(t *testing.T, m *task.Manager, ids ...string) *viewer {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	v := &viewer{stop: stop, done: make(chan struct{})}
	events := m.Watch(ctx, ids...)
	go func() {
		defer close(v.done)
		for op, err := range events {
			v.mu.Lock()
			switch {
			case err != nil:
				v.err = err
			case op.State.Finished():
				v.seen = append(v.seen, fmt.Sprintf("%s %s %d", op.Name, op.State, op.Progress))
			default:
				v.seen = append(v.seen, strings.TrimSpace(fmt.Sprintf("%s %s %d %s", op.Name, op.State, op.Progress, op.Error)))
			}
			v.mu.Unlock()
		}
	}()
	t.Cleanup(func() { stop(); <-v.done })
	return v
}

// want checks what the viewer has seen since the last call.
func (v *viewer) want(t *testing.T, want ...string) {
	t.Helper()
	time.Sleep(time.Second) // in a bubble of synctest
	v.mu.Lock()
	defer v.mu.Unlock()
	if !slices.Equal(v.seen, want) {
		t.Errorf("seen %q, want %q", v.seen, want)
	}
	v.seen = nil
}

// wantEnd checks that the sequence has ended with an error, or without one.
func (v *viewer) wantEnd(t *testing.T, want error) {
	t.Helper()
	<-v.done
	if !errors.Is(v.err, want) || (want == nil) != (v.err == nil) {
		t.Errorf("it ended with %v, want %v", v.err, want)
	}
}

// A puppet is an operation whose function follows the test's orders.
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
			v.want(t, "c PENDING 0", "b RUNNING 5", "c CANCELLED 0", "b FAILED 5", "a DONE 100") // c is Cancelling first
		}
		v.stop()
		v.wantEnd(t, nil)
		m.Close()
		late.want(t)
		late.wantEnd(t, task.ErrClosed)
		view(t, m).wantEnd(t, task.ErrClosed)
	})
}

// TestWatchNone: an empty list of IDs does not mean all operations.
func TestWatchNone(t *testing.T) {
	m := newManager(t, nil)
	submit(t, m, untilCancelled)
	for op, err := range m.Watch(t.Context(), []string{}...) {
		t.Errorf("%v, %v", op, err)
	}
	present, changes, err := m.Raw().Subscribe(t.Context(), []string{}...)
	if len(present) > 0 || err != nil {
		t.Errorf("Subscribe: %v, %v", present, err)
	}
	for op, err := range changes {
		t.Errorf("%v, %v", op, err)
	}
	for op := range m.Watch(t.Context(), []string(nil)...) {
		must(t, op.Cancel()) // all
		break
	}
}

// TestWatchOrder: present states come in order of submission, also those of named
// operations.
func TestWatchOrder(t *testing.T) {
	m := newManager(t, nil)
	want := []string{"c", "b", "a"}
	for _, id := range want {
		submit(t, m, untilCancelled, task.WithID(id))
		time.Sleep(time.Millisecond) // their CreatedAt differ
	}
	for _, ids := range [][]string{nil, {"a", "b", "c"}} {
		present, _, err := m.Raw().Subscribe(t.Context(), ids...)
		must(t, err)
		var got []string
		for _, op := range present {
			got = append(got, op.ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("present states of %q: %q, want %q", ids, got, want)
		}
	}
}

func TestWatchNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		old, a, b := newPuppet(t, m, "old"), newPuppet(t, m, "a"), newPuppet(t, m, "b")
		old.end(nil, nil)
		wait(t, m, old.ID)
		v := view(t, m, b.ID, old.ID, b.ID)
		v.want(t, "old DONE 100", "b RUNNING 0")
		a.update(1)
		b.update(2)
		v.want(t, "b RUNNING 2")
		a.end(nil, nil)
		b.Cancel()
		v.want(t, "b RUNNING 2", "b CANCELLED 2") // Cancelling first
		v.wantEnd(t, nil)
	})
}

const unstored = "op RUNNING 0 DONE, which can't be stored yet: disk full"

// watchEnds lists the ways in which the sequence of one named operation ends.
var watchEnds = []struct {
	name  string
	named func(op *puppet) []string                          // the IDs to watch; nil for op's ID
	early func(m *task.Manager, op *puppet)                  // called before Watch
	then  func(m *task.Manager, op *puppet, f *testkit.Fake) // called after Watch
	seen  []string
	err   error
}{
	{name: "finished before", early: func(m *task.Manager, op *puppet) { op.end(nil, nil); m.Wait(context.Background(), op.ID) },
		seen: []string{"op DONE 100"}},
	{name: "finishes", then: func(_ *task.Manager, op *puppet, _ *testkit.Fake) { op.end(nil, nil) },
		seen: []string{"op RUNNING 0", "op DONE 100"}},
	{name: "unknown", named: func(op *puppet) []string { return []string{op.ID, "unknown"} },
		err: task.ErrNotFound},
	{name: "closed", then: func(m *task.Manager, _ *puppet, _ *testkit.Fake) { m.Close() },
		seen: []string{"op RUNNING 0", "op FAILED 0"}},
	{name: "closed before", early: func(m *task.Manager, _ *puppet) { m.Close() },
		seen: []string{"op FAILED 0"}},
	{name: "stored late", then: func(_ *task.Manager, op *puppet, f *testkit.Fake) {
		f.Before(testkit.FailFinals)
		op.end(nil, nil)
		time.Sleep(time.Second)
		f.Before(nil)
	}, seen: []string{"op RUNNING 0", unstored, "op DONE 100"}},
	{name: "never stored", then: func(m *task.Manager, op *puppet, f *testkit.Fake) {
		f.Before(testkit.FailWrites)
		op.end(nil, nil)
		m.Close()
	}, seen: []string{"op RUNNING 0", unstored}, err: task.ErrClosed},
	{name: "deleted", then: func(_ *task.Manager, op *puppet, f *testkit.Fake) {
		f.Before(func(c *testkit.Call) error {
			if c.ID == op.ID {
				return task.ErrNotFound
			}
			return nil
		})
		op.end(nil, nil)
	}, seen: []string{"op RUNNING 0"}, err: task.ErrNotFound},
}

func TestWatchEnds(t *testing.T) {
	for _, tt := range watchEnds {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := testkit.NewFake(nil)
				m := newManager(t, testkit.Bare(f))
				op := newPuppet(t, m, "op")
				ids := []string{op.ID}
				if tt.named != nil {
					ids = tt.named(op)
				}
				if tt.early != nil {
					tt.early(m, op)
				}
				v := view(t, m, ids...)
				synctest.Wait()
				if tt.then != nil {
					tt.then(m, op, f)
				}
				v.want(t, tt.seen...)
				v.wantEnd(t, tt.err)
				f.Before(nil)
			})
		})
	}
}

// TestWatchFromTheCall: the subscription begins with the call of Watch, not with the
// loop.
func TestWatchFromTheCall(t *testing.T) {
	m := newManager(t, nil)
	events := m.Watch(t.Context())
	op := submit(t, m, nothing)
	wait(t, m, op.ID)
	var seen []string
	for got, err := range events {
		must(t, err)
		if seen = append(seen, string(got.State)); got.State.Finished() {
			break
		}
	}
	if want := []string{"PENDING", "RUNNING", "DONE"}; !slices.Equal(seen, want) {
		t.Errorf("seen %q, want %q", seen, want)
	}
}

// TestWatchTwice ranges twice over the sequence of two operations, one of them of
// another manager.
func TestWatchTwice(t *testing.T) {
	path := testkit.Path(t)
	m, other := newManager(t, openSQLite(t, path)), newManager(t, openSQLite(t, path))
	own, foreign := submit(t, m, untilCancelled), submit(t, other, untilCancelled)
	ids := []string{own.ID, foreign.ID, own.ID}
	events := m.Watch(t.Context(), ids...)
	ids[0] = "another"
	own.Cancel()
	wait(t, m, own.ID)
	foreign.Cancel()
	for range 2 {
		var seen []string
		for got, err := range events {
			must(t, err)
			if got.State.Finished() {
				seen = append(seen, got.ID)
			}
		}
		if want := []string{own.ID, foreign.ID}; !slices.Equal(seen, want) {
			t.Errorf("seen %q, want %q", seen, want)
		}
	}
}

// TestWatchEachNamed: thousands of subscribers that each name an operation of their own get
// its final state, soon after all operations have ended at once.
func TestWatchEachNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		free := make(chan struct{})
		var all sync.WaitGroup
		for range 3000 {
			op := submit(t, m, func(context.Context, func(int)) (any, error) { <-free; return nil, nil })
			events := m.Watch(t.Context(), op.ID)
			all.Go(func() {
				var last *task.Operation
				for got, err := range events {
					if err != nil {
						t.Error(err)
					}
					last = got
				}
				if last == nil || last.State != task.StateDone {
					t.Errorf("ended with %+v", last)
				}
			})
		}
		start := time.Now()
		close(free)
		all.Wait()
		if took := time.Since(start); took > 300*time.Millisecond {
			t.Errorf("it took %v", took)
		}
	})
}

// TestWatchAllDeleted: a subscriber of all operations gets no error when other code
// deletes one.
func TestWatchAllDeleted(t *testing.T) {
	path := testkit.Path(t)
	m := newManager(t, openSQLite(t, path))
	fn, started, release := blocker(nil)
	deleted := submit(t, m, fn)
	<-started
	events := m.Watch(t.Context())
	sqliteExec(t, path, "DELETE FROM tasks")
	release()
	m.Wait(t.Context(), deleted.ID)
	op := submit(t, m, nothing)
	seen := 0
	for got, err := range events {
		must(t, err)
		if got.ID == op.ID {
			break
		}
		seen++
	}
	if seen != 1 {
		t.Errorf("%d events of the deleted operation, want its present state only", seen)
	}
}

// TestWatchUnused: a subscription ends with its context even if nobody ranges over it.
func TestWatchUnused(t *testing.T) {
	m := newManager(t, nil)
	op := submit(t, m, nothing)
	ctx, cancel := context.WithCancel(t.Context())
	m.Watch(ctx)
	m.Watch(ctx, op.ID)
	if n := task.Subscribers(m); n != 2 {
		t.Errorf("%d subscribers, want 2", n)
	}
	cancel()
	must(t, testkit.Until(func() bool { return task.Subscribers(m) == 0 }))
}

// TestWatchAllUnstored: a subscriber of all operations gets no separate error for one
// that Close could not store.
func TestWatchAllUnstored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := testkit.NewFake(nil)
		m := newManager(t, testkit.Bare(f))
		newPuppet(t, m, "op")
		all := view(t, m)
		all.want(t, "op RUNNING 0")
		f.Before(testkit.FailFinals)
		m.Close()
		all.want(t, "op RUNNING 0 FAILED, which can't be stored yet: disk full")
		all.wantEnd(t, task.ErrClosed)
	})
}

// TestWatchForeign watches an operation of another manager on the same database.
func TestWatchForeign(t *testing.T) {
	path := testkit.Path(t)
	m, other := newManager(t, openSQLite(t, path)), newManager(t, openSQLite(t, path))
	next := make(chan int)
	op := submit(t, other, func(_ context.Context, update func(int)) (any, error) {
		for progress := range next {
			update(progress)
		}
		return "result", nil
	})
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

// TestWatchCrowd starts many subscribers at any time while operations come and go. Each
// sees every operation's states in order, without a gap, to the end.
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

// TestWatchNeverReads: a subscriber that never reads costs a bounded amount of memory,
// delays nothing, and finally gets ErrLagged.
func TestWatchNeverReads(t *testing.T) {
	m := newManager(t, nil)
	stuck := make(chan struct{})
	got := make(chan error)
	first := submit(t, m, nothing)
	wait(t, m, first.ID)
	running := submit(t, m, untilCancelled)
	for _, ids := range [][]string{nil, {running.ID}} {
		events := m.Watch(t.Context(), ids...)
		go func() {
			var last error
			for _, err := range events {
				<-stuck
				last = err
			}
			got <- last
		}()
	}
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for range 180 {
				submit(t, m, nothing)
			}
		})
	}
	all.Wait()
	running.Cancel()
	close(stuck)
	results := []error{<-got, <-got}
	slices.SortFunc(results, func(a, b error) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	if results[0] != nil || !errors.Is(results[1], task.ErrLagged) {
		t.Errorf("they ended with %v, want one with nothing, one with ErrLagged", results)
	}
	if n := task.Subscribers(m); n > 0 {
		t.Errorf("%d subscribers are left", n)
	}
}

// TestWatchNamedInBurst: events of other operations do not make a subscriber of a quiet
// operation lag, even if it does not read for a while.
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
		stuck := make(chan struct{})
		watch := func(ids ...string) (end chan error) {
			events := m.Watch(t.Context(), ids...)
			end = make(chan error)
			go func() {
				var last error
				for op, err := range events {
					<-stuck
					if last = err; err == nil && op.State.Finished() {
						last = errors.New(string(op.State))
					}
				}
				end <- last
			}()
			return end
		}
		named, all := watch(quiet.ID), watch()
		synctest.Wait() // both have received their first event
		for i := range 2 {
			for _, update := range updates {
				update(1 + i)
			}
			time.Sleep(time.Second) // until these have become events
		}
		quiet.end(nil, nil)
		time.Sleep(time.Second)
		close(stuck)
		if err := <-all; !errors.Is(err, task.ErrLagged) {
			t.Errorf("the subscriber of all ended with %v", err)
		}
		if err := <-named; err == nil || err.Error() != "DONE" {
			t.Errorf("the subscriber of one ended with %v, want it DONE", err)
		}
		m.Close()
	})
}

// TestWatchNothingOld: an operation that finished before the call causes no event.
func TestWatchNothingOld(t *testing.T) {
	m := newManager(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for range 100 { // the more there are, the longer an event takes
		events := m.Watch(ctx)
		go func() {
			for range events {
			}
		}()
	}
	for range 100 {
		old := submit(t, m, nothing)
		wait(t, m, old.ID)
		changes := m.Watch(ctx)
		next := submit(t, m, nothing)
		for op, err := range changes {
			if err != nil {
				t.Fatal(err)
			}
			if op.ID == old.ID {
				t.Fatalf("got %s of an operation that had finished before", op.State)
			}
			if op.ID == next.ID && op.State.Finished() {
				break
			}
		}
	}
}

// TestWatchSlowly: a slow subscriber misses no state until it falls too far behind, and
// gets the latest progress.
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
		time.Sleep(10 * time.Minute)
		stop()
		<-done
		want := []string{"a PENDING 0", "a RUNNING 99", "b PENDING 0", "b RUNNING 0", "a DONE 100", "b DONE 100"}
		if !slices.Equal(seen, want) {
			t.Errorf("seen %q, want %q", seen, want)
		}
	})
}

// TestWatchBody: the body of the loop may call any method.
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
		t.Errorf("%d events", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for op, err := range m.Watch(ctx) {
		t.Errorf("after the end: %v, %v", op, err)
	}
}

// If an operation's first row can't be stored, the sequences of the watchers that have
// named it end.
func TestWatchFailedSubmit(t *testing.T) {
	ids, fail := make(chan string), make(chan struct{})
	db := testkit.NewFake(nil)
	db.Before(func(c *testkit.Call) error {
		if c.Method != "Save" {
			return nil
		}
		ids <- c.ID
		<-fail
		return errDisk
	})
	m := newManager(t, db)
	go m.Submit("x", nothing)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	changes := m.Watch(ctx, <-ids)
	close(fail)
	var last error
	for _, err := range changes {
		last = err
	}
	if last == nil || !strings.Contains(last.Error(), "disk full") {
		t.Errorf("the sequence ended with %v, want the error of Save", last)
	}
}

// TestSubscribe: the present states come first, and the changes end as Watch does.
func TestSubscribe(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		done := submit(t, m, nothing, task.WithMetadata("tank"))
		wait(t, m, done.ID)
		fn, started, release := blocker(nil)
		live := submit(t, m, fn)
		<-started
		if _, _, err := m.Raw().Subscribe(t.Context(), done.ID, "unknown"); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("an unknown ID: %v", err)
		}

		present, changes, err := m.Raw().Subscribe(t.Context(), done.ID)
		must(t, err)
		if metadata, _ := present[0].Metadata.(json.RawMessage); len(present) != 1 || string(metadata) != `"tank"` {
			t.Errorf("present: %v", present)
		}
		for op, err := range changes {
			t.Errorf("changes of a finished operation: %v, %v", op, err)
		}

		present, changes, err = m.Raw().Subscribe(t.Context(), live.ID, done.ID)
		must(t, err)
		if len(present) != 2 {
			t.Errorf("present: %v", present)
		}
		release()
		var states []task.State
		for op, err := range changes {
			must(t, err)
			states = append(states, op.State)
		}
		if !slices.Equal(states, []task.State{task.StateDone}) {
			t.Errorf("changes: %v", states)
		}

		must(t, m.Close())
		if _, _, err := m.Raw().Subscribe(t.Context()); !errors.Is(err, task.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
		if present, _, err := m.Raw().Subscribe(t.Context(), done.ID); err != nil || len(present) != 1 {
			t.Errorf("after Close, of a finished operation: %v, %v", present, err)
		}
	})
}

// TestSubscribeDeleted: a subscriber of all operations gets an error for a live
// operation that is deleted, and the changes continue.
func TestSubscribeDeleted(t *testing.T) {
	path := testkit.Path(t)
	m := newManager(t, openSQLite(t, path))
	fn, started, release := blocker(nil)
	deleted := submit(t, m, fn)
	<-started
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, changes, err := m.Raw().Subscribe(ctx)
	must(t, err)
	sqliteExec(t, path, "DELETE FROM tasks")
	release()
	m.Wait(t.Context(), deleted.ID)
	op := submit(t, m, nothing)
	told := false
	for got, err := range changes {
		if got.ID == op.ID {
			break
		}
		told = told || got.ID == deleted.ID && errors.Is(err, task.ErrNotFound)
	}
	if !told {
		t.Error("the subscriber is not told of the deletion")
	}
}
