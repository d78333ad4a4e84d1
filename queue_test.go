package task_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

// A crew is a set of operations whose functions say when they start, and end
// when they are told to.
type crew struct {
	t    *testing.T
	m    *task.Manager
	ids  map[string]string
	ends map[string]chan struct{}

	mu      sync.Mutex // guards what follows
	started []string
}

func newCrew(t *testing.T, opts ...task.Option) *crew {
	t.Helper()
	c := &crew{t: t, m: newManager(t, nil, opts...), ids: make(map[string]string), ends: make(map[string]chan struct{})}
	t.Cleanup(func() { c.m.Close() })
	return c
}

// submit submits an operation, with a lock for each key in a list of them.
func (c *crew) submit(name, keys string) {
	c.t.Helper()
	var opts []task.SubmitOption
	for key := range strings.FieldsSeq(keys) {
		opts = append(opts, task.WithLock(key))
	}
	end := make(chan struct{})
	c.ends[name] = end
	op, err := c.m.Submit(name, func(ctx context.Context, _ func(int)) (any, error) {
		c.mu.Lock()
		c.started = append(c.started, name)
		c.mu.Unlock()
		select {
		case <-end:
			return nil, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}, opts...)
	if err != nil {
		c.t.Fatal(err)
	}
	c.ids[name] = op.ID
}

// started checks who has started so far, in which order.
func (c *crew) wantStarted(names string) {
	c.t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if got := strings.Join(c.started, " "); got != names {
		c.t.Fatalf("started %q, want %q", got, names)
	}
}

func (c *crew) wantState(name string, want task.State) {
	c.t.Helper()
	synctest.Wait()
	if op, ok := c.m.Get(c.ids[name]); !ok || op.State != want {
		c.t.Fatalf("%s is %+v, want %s", name, op, want)
	}
}

func (c *crew) end(name string) { close(c.ends[name]) }

func (c *crew) cancel(name string) {
	c.t.Helper()
	if err := c.m.Cancel(c.ids[name]); err != nil {
		c.t.Fatalf("cancel %s: %v", name, err)
	}
}

func TestLimit(t *testing.T) {
	for _, tt := range []struct {
		limit   int
		started []string // at once, and after each end
	}{
		{1, []string{"a", "a b", "a b c", "a b c d"}},
		{3, []string{"a b c", "a b c d", "a b c d", "a b c d"}},
	} {
		t.Run(fmt.Sprint(tt.limit), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrew(t, task.WithLimit(tt.limit))
				for _, name := range []string{"a", "b", "c", "d"} {
					c.submit(name, "")
					synctest.Wait() // or else those that start together do so in any order
				}
				for i, end := range []string{"a", "b", "c", "d"} {
					c.wantStarted(tt.started[i])
					c.end(end)
				}
			})
		})
	}
}

func TestNoLimit(t *testing.T) {
	for _, limit := range []int{0, -1} {
		synctest.Test(t, func(t *testing.T) {
			c := newCrew(t, task.WithLimit(limit))
			for i := range 100 {
				c.submit(fmt.Sprint(i), "")
			}
			synctest.Wait()
			if len(c.started) != 100 {
				t.Errorf("limit %d: %d of 100 started", limit, len(c.started))
			}
		})
	}
}

func TestLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t)
		for _, s := range []struct{ name, key, started string }{
			{"a1", "a", "a1"},
			{"a2", "a", "a1"},
			{"b1", "b", "a1 b1"},
			{"free", "", "a1 b1 free"},
			{"b2", "b", "a1 b1 free"},
			{"a3", "a", "a1 b1 free"},
		} {
			c.submit(s.name, s.key)
			c.wantStarted(s.started)
		}
		c.wantState("a2", task.StatePending)
		for _, s := range []struct{ end, started string }{
			{"b1", "a1 b1 free b2"},
			{"free", "a1 b1 free b2"},
			{"a1", "a1 b1 free b2 a2"},
			{"a2", "a1 b1 free b2 a2 a3"},
		} {
			c.end(s.end)
			c.wantStarted(s.started)
		}
	})
}

// A free place goes to the oldest operation whose key is free.
func TestLimitAndLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, task.WithLimit(2))
		for _, s := range [][2]string{{"a1", "a"}, {"a2", "a"}, {"a3", "a"}, {"b1", "b"}, {"x", ""}, {"b2", "b"}, {"c1", "c"}} {
			c.submit(s[0], s[1])
			synctest.Wait()
		}
		c.wantStarted("a1 b1")
		for _, s := range []struct{ end, started string }{
			{"b1", "a1 b1 x"},             // a2 is older, but a is taken; x is older than b2
			{"a1", "a1 b1 x a2"},          // older than b2
			{"x", "a1 b1 x a2 b2"},        // a3 waits for a2
			{"b2", "a1 b1 x a2 b2 c1"},    // a3 still does
			{"c1", "a1 b1 x a2 b2 c1"},    // a place is free, but no key
			{"a2", "a1 b1 x a2 b2 c1 a3"}, // now it is
		} {
			c.end(s.end)
			c.wantStarted(s.started)
		}
	})
}

func TestCancelWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, task.WithLimit(1))
		for _, s := range [][2]string{{"first", "a"}, {"second", "a"}, {"third", "a"}, {"fourth", "b"}, {"fifth", "b"}, {"sixth", ""}} {
			c.submit(s[0], s[1])
		}
		c.cancel("second") // waits for its key
		c.cancel("fourth") // is ready, and hands its key on
		c.wantState("second", task.StateCancelled)
		c.wantState("fourth", task.StateCancelled)
		if err := c.m.Cancel(c.ids["second"]); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("the second Cancel returned %v, want ErrNotFound", err)
		}
		c.wantStarted("first")
		c.cancel("first") // runs
		c.wantStarted("first third")
		c.end("third")
		c.wantStarted("first third fifth")
		c.end("fifth")
		c.wantStarted("first third fifth sixth")
	})
}

// Once a function has returned, others may start, whatever keeps its final
// state from being stored.
func TestPlaceFreeBeforeStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &hookStore{Persistence: task.NewMemoryStore()}
		db.set(failFinals)
		m := newManager(t, db, task.WithLimit(1))
		first := submit(t, m, nothing, task.WithLock("key"))
		second := submit(t, m, untilCancelled, task.WithLock("key"))
		time.Sleep(time.Second)
		for _, op := range []*task.Operation{first, second} {
			now, _ := m.Get(op.ID)
			if now.State != task.StateRunning || (now.Error == "") != (op == second) {
				t.Errorf("%+v", now)
			}
		}
		db.set(nil)
	})
}

func TestCloseWithWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, task.WithLimit(1))
		c.submit("running", "a")
		c.submit("ready", "")
		c.submit("locked", "a")
		c.wantStarted("running") // or Close may be quicker
		if err := c.m.Close(); err != nil {
			t.Fatal(err)
		}
		c.wantStarted("running")
		for _, name := range []string{"ready", "locked"} {
			op, _ := c.m.Get(c.ids[name])
			if op.State != task.StateFailed || op.Error != "Task failed due to system shutdown" || !op.StartedAt.IsZero() {
				t.Errorf("%s is %+v", name, op)
			}
			if err := c.m.Cancel(c.ids[name]); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Cancel of %s after Close: %v", name, err)
			}
		}
	})
}

// TestCancelWhileClosing: Close has decided what becomes of those that wait,
// and Cancel does not claim to have.
func TestCancelWhileClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &sluggishStore{MemoryStore: task.NewMemoryStore()}
		m := newManager(t, db, task.WithLimit(1))
		submit(t, m, untilCancelled)
		op := submit(t, m, untilCancelled)
		db.delay = time.Second
		go m.Close()
		synctest.Wait()
		if err := m.Cancel(op.ID); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Cancel: %v, want ErrNotFound", err)
		}
		if got, _ := m.Get(op.ID); got.State != task.StateFailed {
			t.Errorf("it is %s", got.State)
		}
	})
}

// TestCloseWithManyWaiting: Close does not give up while it gets on.
func TestCloseWithManyWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &sluggishStore{MemoryStore: task.NewMemoryStore()}
		m := newManager(t, db, task.WithLimit(1))
		const n = 10_000 // which are ten writes
		var all sync.WaitGroup
		for range n {
			all.Go(func() { submit(t, m, untilCancelled) })
		}
		all.Wait()
		db.delay = 2 * time.Second
		if err := m.Close(); err != nil {
			t.Errorf("Close: %.200v", err)
		}
	})
}

// A sluggishStore takes its time for each write.
type sluggishStore struct {
	*task.MemoryStore
	delay time.Duration
}

func (s *sluggishStore) WriteBatch(saves, updates []*task.Operation) []error {
	time.Sleep(s.delay)
	return (&batchCounter{Persistence: s.MemoryStore}).WriteBatch(saves, updates)
}

func TestShutdownRunsWaiting(t *testing.T) {
	m := newManager(t, nil, task.WithLimit(2))
	var mu sync.Mutex
	var order []int
	for i := range 100 {
		_, err := m.Submit("op", func(context.Context, func(int)) (any, error) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, i)
			return nil, nil
		}, task.WithLock("key"))
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(order) != 100 || !slices.IsSorted(order) {
		t.Errorf("ran %v, want 0 to 99 in order", order)
	}
}

// TestLocks: whoever needs several keys waits for all, and holds up those that
// come later and need one of them, but nobody else.
func TestLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, task.WithLimit(3))
		for _, s := range []struct{ name, keys, started string }{
			{"a", "a", "a"},
			{"b", "b", "a b"},
			{"ab", "a b a", "a b"}, // the same twice is once
			{"ba", "b a", "a b"},
			{"bc", "c b", "a b"},
			{"c", "c", "a b"},
			{"d", "d", "a b d"},
			{"cd", "c d", "a b d"},
			{"free", "", "a b d"}, // for want of a place
		} {
			c.submit(s.name, s.keys)
			c.wantStarted(s.started)
		}
		for _, s := range []struct{ end, started string }{
			{"a", "a b d free"},
			{"free", "a b d free"},
			{"b", "a b d free ab"},
			{"ab", "a b d free ab ba"},
		} {
			c.end(s.end)
			c.wantStarted(s.started)
		}
		c.cancel("bc") // which had one key and waited for the other
		c.wantStarted("a b d free ab ba c")
		c.end("c")
		c.wantStarted("a b d free ab ba c")
		c.end("d")
		c.wantStarted("a b d free ab ba c cd")
		c.submit("ad", "a d")
		c.submit("da", "d a")
		c.m.Close()
		for _, name := range []string{"ba", "cd", "ad", "da"} {
			c.wantState(name, task.StateFailed)
		}
	})
}

func TestLockArguments(t *testing.T) {
	m := newManager(t, nil)
	for _, tt := range []struct {
		opts []task.SubmitOption
		want string
	}{
		{[]task.SubmitOption{task.WithLock("")}, "key is empty"},
		{[]task.SubmitOption{task.WithLock("a"), task.WithLock("")}, "key is empty"},
	} {
		_, err := m.Submit("op", nothing, tt.opts...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Submit returned %v, want an error with %q", err, tt.want)
		}
	}
	if ops, err := m.List(10, 0); err != nil || len(ops) > 0 {
		t.Errorf("stored %v, %v", ops, err)
	}
}

// Whoever waits costs no goroutine, and to be cancelled no time.
func TestManyWaiting(t *testing.T) {
	c := newCrew(t, task.WithLimit(1))
	c.submit("running", "")
	before := runtime.NumGoroutine()
	const n = 10_000
	for i := range n {
		c.submit(fmt.Sprint(i), fmt.Sprint("key", i%3))
	}
	if after := runtime.NumGoroutine(); after > before+10 {
		t.Errorf("%d goroutines, %d before", after, before)
	}
	var all sync.WaitGroup
	for g := range 10 {
		all.Go(func() {
			for i := g; i < n; i += 10 {
				if err := c.m.Cancel(c.ids[fmt.Sprint(i)]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	c.submit("last", "key1")
	c.cancel("running")
	if _, err := c.m.Wait(t.Context(), c.ids["running"]); err != nil {
		t.Fatal(err)
	}
	c.end("last")
	if op, err := c.m.Wait(t.Context(), c.ids["last"]); err != nil || op.State != task.StateDone {
		t.Errorf("the last one is %+v, %v", op, err)
	}
	if got := strings.Join(c.started, " "); got != "running last" {
		t.Errorf("started %s", got)
	}
}

func nothing(context.Context, func(int)) (any, error) { return nil, nil }
