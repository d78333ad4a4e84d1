package task_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestMemoryStoreForgets: the store keeps the 10,000 operations that finished
// last, and all that are not finished.
func TestMemoryStoreForgets(t *testing.T) {
	const n, kept, live = 25_000, 10_000, 5
	store := task.NewMemoryStore()
	id := func(i int) string { return fmt.Sprint("id", i) }
	for i := range n + live {
		if err := store.Save(&task.Operation{ID: id(i), State: task.StateRunning}); err != nil {
			t.Fatal(err)
		}
		if i >= live { // the first ones run all the time
			if err := store.Update(&task.Operation{ID: id(i), State: task.StateDone}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := store.Save(&task.Operation{ID: id(0)}); err == nil {
		t.Error("Save of an existing ID succeeded")
	}
	if err := store.Save(&task.Operation{ID: "x", Result: make(chan int)}); err == nil {
		t.Error("Save of a value that JSON can't hold succeeded")
	}
	all, err := store.List(n, 0)
	if err != nil || len(all) != kept+live {
		t.Fatalf("%d operations, %v, want %d", len(all), err, kept+live)
	}
	for i, op := range all {
		want := id(n + live - 1 - i)
		if i >= kept {
			want = id(kept + live - 1 - i)
		}
		if op.ID != want {
			t.Fatalf("number %d is %s, want %s", i, op.ID, want)
		}
	}
	page, err := store.List(10, kept)
	if err != nil || len(page) != live || page[0].ID != id(live-1) {
		t.Errorf("last page: %v, %v", page, err)
	}
	for i, want := range map[int]error{0: nil, live: task.ErrNotFound, n + live - 1: nil} {
		if _, err := store.Get(id(i)); !errors.Is(err, want) {
			t.Errorf("Get(%s): %v, want %v", id(i), err, want)
		}
	}
	if err := store.Update(&task.Operation{ID: id(live)}); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Update of a dropped operation: %v", err)
	}
}

// TestReadsFail: errors of the store are returned, or logged by Get, which
// can't return them.
func TestReadsFail(t *testing.T) {
	log := new(testkit.Log)
	db := testkit.NewFake(nil)
	m := newManager(t, db, log.Option())
	op := submit(t, m, nothing)
	wait(t, m, op.ID)
	db.Before(func(*testkit.Call) error { return errDisk })
	if op, ok := m.Get(op.ID); ok || op != nil {
		t.Errorf("Get: %v", op)
	}
	if !strings.Contains(log.String(), errDisk.Error()) {
		t.Errorf("logged: %s", log)
	}
	if _, err := m.List(1, 0); !errors.Is(err, errDisk) {
		t.Errorf("List: %v", err)
	}
	if _, err := m.Wait(t.Context(), op.ID); !errors.Is(err, errDisk) {
		t.Errorf("Wait: %v", err)
	}
	if err := m.Cancel(op.ID); !errors.Is(err, errDisk) || errors.Is(err, task.ErrNotFound) {
		t.Errorf("Cancel: %v", err)
	}
}

// TestBrokenContract has a four-method store return nil operations, and the
// same page for every offset. Nothing panics, and nothing runs for ever.
func TestBrokenContract(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, testkit.Bare(db))
		submit(t, m, nothing)
		synctest.Wait()
		db.After(func(c *testkit.Call) {
			switch {
			case c.Method == "Get":
				c.Ops, c.Err = nil, nil
			case c.Method == "List" && c.N > 1000:
				c.Ops, c.Err = nil, errors.New("asked a thousand times")
			case c.Method == "List":
				c.Ops = []*task.Operation{nil, {ID: "again", State: task.StateDone}}
			}
		})
		if op, ok := m.Get("missing"); ok || op != nil {
			t.Errorf("Get: %+v, %v", op, ok)
		}
		if err := m.Cancel("missing"); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Cancel: %v", err)
		}
		if op, err := m.Wait(t.Context(), "missing"); op != nil || !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Wait: %+v, %v", op, err)
		}
		m.List(10, 0)
		m.List(10, 0, task.ByState(task.StateFailed))
		if m, err := task.New(testkit.Bare(db), quiet); err == nil {
			m.Close()
		}
		if n := db.Count("List"); testkit.NewCore && n > 1000 {
			t.Error("List was called a thousand times")
		}
	})
}

// historyOf submits operations with those names, one after the other. The first
// letter of a name is that of the state in which the operation stays.
func historyOf(t *testing.T, m *task.Manager, names ...string) {
	t.Helper()
	for _, name := range names {
		op, err := m.Submit(name, func(ctx context.Context, update func(int)) (any, error) {
			switch name[0] {
			case 'D':
				return nil, nil
			case 'F':
				return nil, errors.New("broken")
			case 'C':
				cancelSelf(ctx)
			}
			<-ctx.Done()
			return nil, ctx.Err()
		})
		if err != nil {
			t.Fatal(err)
		}
		if strings.ContainsAny(name[:1], "DFC") {
			wait(t, m, op.ID)
		}
	}
}

func names(ops []*task.Operation) string {
	var names []string
	for _, op := range ops {
		names = append(names, op.Name)
	}
	return strings.Join(names, " ")
}

func TestList(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		const n = 25
		for i := range n {
			fn := func(context.Context, func(int)) (any, error) { return i, nil }
			if i%5 == 0 {
				fn = untilCancelled // live ones in between
			}
			op, err := m.Submit(fmt.Sprint(i), fn)
			if err != nil {
				t.Fatal(err)
			}
			if i%5 != 0 {
				wait(t, m, op.ID)
			}
		}
		for _, page := range []struct{ limit, offset, first, len int }{
			{0, 0, 0, 0}, {1, 0, 24, 1}, {10, 0, 24, 10}, {10, 10, 14, 10}, {10, 20, 4, 5}, {10, 25, 0, 0},
			{1000, 0, 24, 25}, {math.MaxInt, 0, 24, 25}, {10, math.MaxInt, 0, 0},
		} {
			ops, err := m.List(page.limit, page.offset)
			if err != nil || len(ops) != page.len || ops == nil {
				t.Errorf("List(%d, %d): %d operations (%v), want %d", page.limit, page.offset, len(ops), err, page.len)
			}
			for i, op := range ops {
				if op.Name != fmt.Sprint(page.first-i) {
					t.Errorf("List(%d, %d)[%d] is %s, want %d", page.limit, page.offset, i, op.Name, page.first-i)
				}
			}
		}
		for _, bad := range [][2]int{{-1, 0}, {0, -1}, {math.MinInt, math.MinInt}} {
			if ops, err := m.List(bad[0], bad[1]); err == nil || ops != nil {
				t.Errorf("List%v: %v, %v", bad, ops, err)
			}
		}
	})
}

func TestListFiltered(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		historyOf(t, m, "D1", "F1", "R1", "C1", "D2", "F2", "D1", "R2", "F1", "D3")
		all, err := m.List(100, 0)
		must(t, err)
		cursor := func(name string) task.ListOption {
			i := slices.IndexFunc(all, func(op *task.Operation) bool { return op.Name == name })
			return task.Before(all[i].ID)
		}
		const done, failed, cancelled, running, pending = task.StateDone, task.StateFailed, task.StateCancelled, task.StateRunning, task.StatePending
		for _, tt := range []struct {
			want          string
			limit, offset int
			opts          []task.ListOption
		}{
			{"D3 F1 R2 D1 F2 D2 C1 R1 F1 D1", 100, 0, []task.ListOption{nil, task.ByState(), task.ByName(""), task.Before("")}},
			{"D3 D1 D2 D1", 100, 0, []task.ListOption{task.ByState(done)}},
			{"R2 R1", 100, 0, []task.ListOption{task.ByState(running)}},
			{"R2", 1, 0, []task.ListOption{task.ByState(running)}},
			{"R1", 1, 1, []task.ListOption{task.ByState(running, running)}},
			{"", 100, 0, []task.ListOption{task.ByState(pending)}},
			{"", 100, 0, []task.ListOption{task.ByState("NONSENSE' OR 1=1 --")}},
			{"R2 C1 R1", 100, 0, []task.ListOption{task.ByState(running, cancelled)}},
			{"F1 D1 F2", 3, 1, []task.ListOption{task.ByState(failed, done)}},
			{"C1", 100, 0, []task.ListOption{task.ByState(failed), task.ByState(cancelled)}},
			{"D1 D1", 100, 0, []task.ListOption{task.ByName("D1")}},
			{"", 100, 0, []task.ListOption{task.ByName("D")}},
			{"", 100, 0, []task.ListOption{task.ByName("D1"), task.ByState(failed)}},
			{"F1", 100, 0, []task.ListOption{task.ByName("F1"), task.ByState(failed, done), cursor("F2")}},
			{"F2 D2", 2, 0, []task.ListOption{cursor("D1")}},
			{"D2 C1", 2, 1, []task.ListOption{cursor("D1")}},
			{"", 100, 0, []task.ListOption{task.Before(all[9].ID)}},
			{"", 0, 0, []task.ListOption{cursor("D1")}},
			{"", 100, math.MaxInt, []task.ListOption{task.ByState(done)}},
			{"D3 D1 D2 D1", math.MaxInt, 0, []task.ListOption{task.ByState(done)}},
		} {
			got, err := m.List(tt.limit, tt.offset, tt.opts...)
			if err != nil || got == nil || names(got) != tt.want {
				t.Errorf("List(%d, %d, ...) = %q, %v, want %q", tt.limit, tt.offset, names(got), err, tt.want)
			}
		}
	})
}

func TestListBeforeUnknown(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		historyOf(t, m, "D1")
		for _, opts := range [][]task.ListOption{
			{task.Before("unknown")},
			{task.Before("unknown"), task.ByState(task.StateDone), task.ByName("D1")},
		} {
			if got, err := m.List(10, 0, opts...); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Before an unknown operation: %v, %v, want ErrNotFound", got, err)
			}
		}
	})
}

// TestListByStateNow: List finds an operation by its new state as soon as that
// has changed, and no longer by its old one.
func TestListByStateNow(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for range 20 {
			started := make(chan struct{})
			op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
				close(started)
				return untilCancelled(ctx, update)
			})
			<-started
			running, err := m.List(100, 0, task.ByState(task.StateRunning))
			if err != nil || len(running) != 1 || running[0].ID != op.ID {
				t.Fatalf("running: %v, %v", running, err)
			}
			if waiting, err := m.List(100, 0, task.ByState(task.StatePending)); err != nil || len(waiting) > 0 {
				t.Fatalf("pending: %v, %v", waiting, err)
			}
			op.Cancel()
			wait(t, m, op.ID)
		}
		m.Close()
		if running, err := m.List(100, 0, task.ByState(task.StateRunning)); err != nil || len(running) > 0 {
			t.Errorf("after Close: %v, %v", running, err)
		}
	})
}

// TestListBeforeGrowing: operations that are saved while List reads page by
// page move others to the next page. Each is listed once.
func TestListBeforeGrowing(t *testing.T) {
	memory, n := task.NewMemoryStore(), 0
	save := func() {
		n++
		err := memory.Save(&task.Operation{ID: fmt.Sprint(n), Name: "x", State: task.StateDone, CreatedAt: time.Now(), UpdatedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2000 {
		save()
	}
	db := testkit.NewFake(memory)
	m := newManager(t, testkit.Bare(db))
	db.After(func(*testkit.Call) {
		for range 600 {
			save()
		}
	})
	ops, err := m.List(3, 0, task.Before("1001")) // the last of the first page of a thousand
	var ids []string
	for _, op := range ops {
		ids = append(ids, op.ID)
	}
	if want := []string{"1000", "999", "998"}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("listed %q, %v, want %q", ids, err, want)
	}
}

// TestListOddRows: rows that only other code could write neither repeat in a
// list nor keep other rows from being pruned.
func TestListOddRows(t *testing.T) {
	path := testkit.Path(t)
	sqliteExec(t, path, `CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT, state TEXT, progress INTEGER, metadata TEXT,
			result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME);
		INSERT INTO tasks (id, name, state, updated_at) VALUES
			('', 'x', 'DONE', '2020-01-01 00:00:00'), (NULL, 'x', 'DONE', '2020-01-01 00:00:00'), ('a', 'x', 'DONE', '2020-01-01 00:00:00'),
			('b', 'x', 'DONE', '2020-01-01 00:00:00'), ('c', 'x', NULL, '2020-01-01 00:00:00')`)
	m := newManager(t, openSQLite(t, path))
	for _, tt := range []struct {
		opts []task.ListOption
		want []string
	}{
		{[]task.ListOption{task.ByState(task.StateDone)}, []string{"b", "a", "", ""}},
		{[]task.ListOption{task.ByName("x")}, []string{"c", "b", "a", "", ""}},
		{[]task.ListOption{task.Before("b")}, []string{"a", "", ""}},
	} {
		ops, err := m.List(1000, 0, tt.opts...)
		var ids []string
		for _, op := range ops {
			ids = append(ids, op.ID)
		}
		if err != nil || !slices.Equal(ids, tt.want) {
			t.Errorf("listed %q, %v, want %q", ids, err, tt.want)
		}
	}
	if n, err := m.Prune(time.Now()); err != nil || n == 0 {
		t.Errorf("Prune: %d, %v", n, err)
	}
	if op, ok := m.Get("c"); !ok {
		t.Errorf("the row without a state is gone: %+v", op)
	}
}

func TestPrune(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		historyOf(t, m, "D1", "F1", "R1", "C1")
		time.Sleep(time.Millisecond)
		cut := time.Now()
		time.Sleep(time.Millisecond)
		historyOf(t, m, "D2", "R2")
		want := "R2 D2 R1"
		n, err := m.Prune(cut)
		if _, ok := db.(task.Pruner); !ok {
			if !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("Prune: %v, want ErrUnsupported", err)
			}
			return
		}
		if n != 3 || err != nil {
			t.Errorf("Prune = %d, %v, want 3", n, err)
		}
		if ops, err := m.List(10, 0); err != nil || names(ops) != want {
			t.Errorf("%q is left, %v, want %q", names(ops), err, want)
		}
		if n, err := m.Prune(time.Time{}); n != 0 || err != nil {
			t.Errorf("Prune of nothing = %d, %v", n, err)
		}
		m.Close()
		if n, err := m.Prune(time.Now().Add(time.Hour)); n != 3 || err != nil {
			t.Errorf("Prune of all = %d, %v, want 3", n, err)
		}
	})
}

func TestRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil, task.WithRetention(time.Hour))
		historyOf(t, m, "D1", "R1")
		time.Sleep(30 * time.Minute)
		historyOf(t, m, "D2")
		time.Sleep(29 * time.Minute)
		if ops, _ := m.List(10, 0); names(ops) != "D2 R1 D1" {
			t.Errorf("before: %s", names(ops))
		}
		time.Sleep(8 * time.Minute)
		if ops, _ := m.List(10, 0); names(ops) != "D2 R1" {
			t.Errorf("after: %s", names(ops))
		}
		m.Close()
		newManager(t, testkit.Bare(task.NewMemoryStore()), task.WithRetention(time.Hour)).Close()
	})
}
