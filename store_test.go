package task_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestMemoryStoreForgets: the store keeps the 10,000 operations that finished last, and
// all unfinished ones.
func TestMemoryStoreForgets(t *testing.T) {
	const n, kept, live = 25_000, 10_000, 5
	store := task.NewMemoryStore()
	id := func(i int) string { return fmt.Sprint("id", i) }
	for i := range n + live {
		if err := store.Save(&task.Operation{ID: id(i), State: task.StateRunning}); err != nil {
			t.Fatal(err)
		}
		if i >= live { // the first ones keep running
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
	if _, err := m.List(1, 0); !errors.Is(err, errDisk) {
		t.Errorf("List: %v", err)
	}
	if _, err := m.Wait(t.Context(), op.ID); !errors.Is(err, errDisk) {
		t.Errorf("Wait: %v", err)
	}
	if err := m.Cancel(op.ID); !errors.Is(err, errDisk) || errors.Is(err, task.ErrNotFound) {
		t.Errorf("Cancel: %v", err)
	}
	m.Close() // then everything has been logged
	if !strings.Contains(log.String(), errDisk.Error()) {
		t.Errorf("logged: %s", log)
	}
}

// TestBrokenContract uses a four-method store that returns nil operations, and the same
// page for every offset. Nothing panics, and nothing runs forever.
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
		if n := db.Count("List"); n > 1000 {
			t.Error("List was called a thousand times")
		}
	})
}

func TestList(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		const n = 25
		for i := range n {
			fn := func(context.Context, func(int)) (any, error) { return i, nil }
			if i%5 == 0 {
				fn = untilCancelled // some live ones in between
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
			{task.Before("unknown"), task.ByFinish()},
		} {
			if got, err := m.List(10, 0, opts...); !errors.Is(err, task.ErrNotFound) || !strings.Contains(err.Error(), "unknown") {
				t.Errorf("Before an unknown operation: %v, %v, want ErrNotFound with its ID", got, err)
			}
		}
	})
}

// TestListBeforeDeleted pages through the history. Before each next page, it deletes
// the last operation of the page, alone or with all newer ones.
func TestListBeforeDeleted(t *testing.T) {
	for name, open := range testkit.Stores {
		for _, alone := range []bool{true, false} {
			for filter, opts := range map[string][]task.ListOption{
				"all": nil, "by name": {task.ByName("x")}, "by state": {task.ByState(task.StateFailed)}, "by states": {task.ByState(task.StateFailed, task.StateDone)},
			} {
				t.Run(fmt.Sprintf("%s, alone=%t, %s", name, alone, filter), func(t *testing.T) {
					db := open(t)
					inner := db
					if name == "four methods" {
						inner = task.NewMemoryStore()
						db = testkit.Bare(inner)
					}
					pageWhilePruning(t, newManager(t, db), inner, alone, opts)
				})
			}
		}
	}
}

func pageWhilePruning(t *testing.T, m *task.Manager, db task.Persistence, alone bool, opts []task.ListOption) {
	const n, limit = 60, 7
	finish := make(map[string]time.Time)
	for i := range n {
		op := &task.Operation{ID: uuid.Must(uuid.NewV7()).String(), Name: "x", State: task.StateFailed}
		op.UpdatedAt = time.Now().Add(-time.Hour - time.Duration(i)*time.Second) // the newest finished first
		if last := (n-i)%limit == 0; alone && !last {
			op.UpdatedAt = time.Now()
		}
		finish[op.ID] = op.UpdatedAt
		must(t, db.Save(op))
	}
	var seen []string
	for last := ""; ; {
		ops, err := m.List(limit, 0, append(slices.Clone(opts), task.Before(last))...)
		must(t, err)
		if len(ops) == 0 {
			break
		}
		for _, op := range ops {
			seen = append(seen, op.ID)
		}
		last = ops[len(ops)-1].ID
		for _, err := range db.(task.Pruner).Prune(finish[last].Add(time.Millisecond)) {
			must(t, err)
		}
		if _, ok := m.Get(last); ok && len(ops) == limit {
			t.Fatal("the last operation of the page is still there")
		}
	}
	if !slices.IsSortedFunc(seen, func(a, b string) int { return strings.Compare(b, a) }) || len(seen) != n {
		t.Errorf("%d operations, want %d, the newest first", len(seen), n)
	}
}

// TestListBeforeDeletedClocks: if the clock was set back, the page after a deleted
// operation may repeat operations, but leaves none out.
func TestListBeforeDeletedClocks(t *testing.T) {
	var ids []string // in order of submission
	for i := range 20 {
		second := 100 + i
		if i >= 10 {
			second -= 15
		}
		ids = append(ids, fmt.Sprintf("0190%04x-0000-7000-8000-%012d", second, i))
	}
	for name, open := range testkit.Stores {
		for i, deleted := range ids {
			db := open(t)
			for _, id := range ids {
				if id != deleted {
					must(t, db.Save(&task.Operation{ID: id, Name: "x", State: task.StateDone}))
				}
			}
			ops, err := newManager(t, db).List(100, 0, task.Before(deleted))
			must(t, err)
			for _, id := range ids[:i] {
				if !slices.ContainsFunc(ops, func(op *task.Operation) bool { return op.ID == id }) {
					t.Errorf("%s: %s is missing after number %d, which was deleted", name, id, i)
				}
			}
		}
	}
}

// TestListOrder: operations submitted at the same time are listed in the order of their
// IDs.
func TestListOrder(t *testing.T) {
	m := newManager(t, openSQLite(t, testkit.FastPath(t)))
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for range 50 {
				submit(t, m, nothing)
			}
		})
	}
	all.Wait()
	ops, err := m.List(10_000, 0)
	must(t, err)
	if len(ops) != 64*50 || !slices.IsSortedFunc(ops, func(a, b *task.Operation) int { return strings.Compare(b.ID, a.ID) }) {
		t.Errorf("%d operations, not in the order of their IDs", len(ops))
	}
}

// TestListContext: List returns the error of its caller's context with every store.
func TestListContext(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		historyOf(t, m, "D1", "R1")
		ctx, cancel := context.WithCancel(t.Context())
		for _, opts := range [][]task.ListOption{{}, {task.ByName("D1")}, {task.ByState(task.StateDone)}} {
			if ops, err := m.List(1, 0, append(opts, task.WithContext(ctx))...); err != nil || len(ops) != 1 {
				t.Errorf("%v, %v", ops, err)
			}
		}
		cancel()
		for _, opts := range [][]task.ListOption{{}, {task.ByName("D1")}} {
			if ops, err := m.List(1, 0, append(opts, task.WithContext(ctx))...); !errors.Is(err, context.Canceled) {
				t.Errorf("%v, %v, want the context's error", ops, err)
			}
		}
	})
	t.Run("during a search in pages", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		fake := testkit.NewFake(nil)
		for i := range 3000 {
			must(t, fake.Save(&task.Operation{ID: fmt.Sprint(i), Name: "x"}))
		}
		fake.After(func(c *testkit.Call) {
			if c.Method == "List" {
				cancel()
			}
		})
		m := newManager(t, testkit.Bare(fake))
		calls := fake.Count("List")
		if ops, err := m.List(1, 0, task.ByName("rare"), task.WithContext(ctx)); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, %v, want the context's error", ops, err)
		}
		if n := fake.Count("List") - calls; n > 1 {
			t.Errorf("%d pages, want 1", n)
		}
	})
}

// TestSubmitBesideSearches submits while many clients search a long history. Some of
// them give up.
func TestSubmitBesideSearches(t *testing.T) {
	const soon = 500 * time.Millisecond
	// A busy machine may exceed the bound in one round, but a fault exceeds it in every
	// round.
	var r besideResult
	for range 5 {
		r = besideSearches(t, 100_000, 100, 400*time.Millisecond)
		t.Log(r)
		if r.submits == 0 || r.failed != nil {
			t.Fatalf("%v, want none failed", r)
		}
		if r.worstSubmit <= soon && r.worstEnd <= soon {
			return
		}
	}
	t.Errorf("%v: in every round a Submit took longer than %v, or a search went on after its context", r, soon)
}

// TestListByStateNow: List finds an operation by its new state as soon as the state has
// changed, and no longer by its old one.
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

// TestListBeforeGrowing: operations saved while List reads page by page move others to
// the next page. Each is listed once.
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
	ops, err := m.List(3, 0, task.Before("1001")) // the last operation of the first page of a thousand
	var ids []string
	for _, op := range ops {
		ids = append(ids, op.ID)
	}
	if want := []string{"1000", "999", "998"}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("listed %q, %v, want %q", ids, err, want)
	}
}

// TestListOddRows: rows that only other code could write neither repeat in a list nor
// keep other rows from being pruned.
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

// A repository is a store such as an application may have already: the four methods on
// a table with the nine columns of SPEC.md. Its Get returns sql.ErrNoRows for an
// unknown ID, and its Update does not check that the row exists.
type repository struct{ db *sql.DB }

func newRepository(t testing.TB) repository {
	t.Helper()
	db, err := sql.Open("sqlite3", testkit.FastPath(t))
	must(t, err)
	t.Cleanup(func() { db.Close() })
	_, err = db.Exec(`CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, progress INTEGER DEFAULT 0,
		metadata TEXT, result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME)`)
	must(t, err)
	return repository{db}
}

// text returns metadata or a result as a cell.
func text(v any) any {
	if v == nil {
		return nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return string(raw)
}

func (r repository) Save(op *task.Operation) error {
	_, err := r.db.Exec(`INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`, op.ID, op.Name, op.State, op.Progress,
		text(op.Metadata), text(op.Result), op.Error, op.CreatedAt, op.UpdatedAt)
	return err
}

func (r repository) Update(op *task.Operation) error {
	_, err := r.db.Exec(`UPDATE tasks SET state = ?, progress = ?, metadata = ?, result = ?, error = ?, updated_at = ? WHERE id = ?`,
		op.State, op.Progress, text(op.Metadata), text(op.Result), op.Error, op.UpdatedAt, op.ID)
	return err
}

const repositoryColumns = `SELECT id, name, state, progress, metadata, result, error, created_at, updated_at FROM tasks `

func scan(row interface{ Scan(...any) error }) (*task.Operation, error) {
	var op task.Operation
	var metadata, result sql.Null[jsonText]
	err := row.Scan(&op.ID, &op.Name, &op.State, &op.Progress, &metadata, &result, &op.Error, &op.CreatedAt, &op.UpdatedAt)
	if err != nil {
		return nil, fmt.Errorf("read operation: %w", err)
	}
	if metadata.Valid {
		op.Metadata = metadata.V
	}
	if result.Valid {
		op.Result = result.V
	}
	return &op, nil
}

// A jsonText is a cell that holds JSON and encodes as that JSON.
type jsonText string

func (j jsonText) MarshalJSON() ([]byte, error) { return []byte(j), nil }

func (r repository) Get(id string) (*task.Operation, error) {
	return scan(r.db.QueryRow(repositoryColumns+`WHERE id = ?`, id))
}

func (r repository) List(limit, offset int) (ops []*task.Operation, err error) {
	rows, err := r.db.Query(repositoryColumns+`ORDER BY rowid DESC LIMIT ? OFFSET ?`, limit, offset)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		op, err := scan(rows)
		if err != nil {
			return nil, err
		}
		ops = append(ops, op)
	}
	return ops, rows.Err()
}

// TestRepository: a manager works on a repository, and every method returns ErrNotFound
// for an unknown ID.
func TestRepository(t *testing.T) {
	db := newRepository(t)
	must(t, db.Save(&task.Operation{ID: "left", Name: "left", State: task.StateRunning, CreatedAt: time.Now(), UpdatedAt: time.Now()}))
	m, l := testkit.NewLogged(t, db)
	l.WantRecovered(t, "left")
	op := submit(t, m, func(context.Context, func(int)) (any, error) { return "result", nil }, task.WithMetadata("metadata"))
	if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != "result" || got.Metadata != "metadata" {
		t.Errorf("%+v", got)
	}
	for name, err := range map[string]error{
		"Cancel":                         m.Cancel("unknown"),
		"Wait":                           second(m.Wait(t.Context(), "unknown")),
		"Watch":                          lastError(m.Watch(t.Context(), op.ID, "unknown")),
		"Before":                         second(m.List(10, 0, task.Before("unknown"))),
		"Cancel of a finished operation": m.Cancel(op.ID),
	} {
		if !errors.Is(err, task.ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", name, err)
		}
	}
	if got, ok := m.Get("unknown"); ok || got != nil {
		t.Errorf("Get: %+v, %v", got, ok)
	}
}

func second[T any](_ T, err error) error { return err }

func lastError(events iter.Seq2[*task.Operation, error]) (err error) {
	for _, err = range events {
	}
	return err
}

// TestRepositoryOvertaken deletes an operation of a repository during its recovery, and
// another one while it runs.
func TestRepositoryOvertaken(t *testing.T) {
	db := newRepository(t)
	fake := testkit.NewFake(db)
	for _, id := range []string{"before", "deleted", "after"} {
		left(t, db, id, task.StateRunning)
	}
	remove := func(id string) {
		_, err := db.db.Exec(`DELETE FROM tasks WHERE id = ?`, id)
		must(t, err)
	}
	fake.Before(func(c *testkit.Call) error {
		if c.Method == "Get" && c.ID == "deleted" {
			remove(c.ID)
		}
		return nil
	})
	m, l := testkit.NewLogged(t, testkit.Bare(fake))
	l.WantRecovered(t, "before", "after")
	fn, started, release := blocker(nil)
	op := submit(t, m, fn)
	<-started
	remove(op.ID)
	release()
	m.Wait(t.Context(), op.ID) // the store does not report that the row is gone
	if got, ok := m.Get(op.ID); ok {
		t.Errorf("Get: %+v", got)
	}
	if _, err := m.Wait(t.Context(), op.ID); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Wait: %v", err)
	}
}

// TestUnsupported: if a method of a store returns errors.ErrUnsupported, the store
// counts as one without that ability.
func TestUnsupported(t *testing.T) {
	abilities := []string{"WriteBatch", "Recover", "ListFiltered", "Prune"}
	tests := [][]string{abilities}
	for _, method := range abilities {
		tests = append(tests, []string{method})
	}
	for _, methods := range tests {
		t.Run(fmt.Sprint(methods), func(t *testing.T) {
			memory := task.NewMemoryStore()
			left(t, memory, "left", task.StateRunning)
			db := testkit.NewFake(memory)
			db.Before(func(c *testkit.Call) error {
				if slices.Contains(methods, c.Method) {
					return fmt.Errorf("the store behind this one: %w", errors.ErrUnsupported)
				}
				return nil
			})
			m, l := testkit.NewLogged(t, db)
			l.WantRecovered(t, "left")
			historyOf(t, m, "D1", "F1", "R1", "D2")
			if ops, err := m.List(10, 0, task.ByState(task.StateDone, task.StateRunning)); err != nil || names(ops) != "D2 R1 D1" {
				t.Errorf("List: %s, %v", names(ops), err)
			}
			n, err := m.Prune(time.Now().Add(time.Minute))
			if !slices.Contains(methods, "Prune") {
				if err != nil || n != 4 {
					t.Errorf("Prune: %d, %v", n, err)
				}
			} else if !errors.Is(err, errors.ErrUnsupported) || n != 0 {
				t.Errorf("Prune: %d, %v, want ErrUnsupported", n, err)
			}
			for _, method := range abilities {
				if db.Count(method) == 0 {
					t.Errorf("%s was not called", method)
				}
			}
		})
	}
}

// TestListByStateWhileStoreFails: List finds this manager's operations by the states
// that are shown, even while these can't be stored, and waits for no write.
func TestListByStateWhileStoreFails(t *testing.T) {
	for _, fault := range []string{"writes fail", "writes hang"} {
		for name, open := range testkit.Stores {
			t.Run(fault+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					hang := make(chan struct{})
					release := sync.OnceFunc(func() { close(hang) })
					defer release()
					listByState(t, testkit.NewFake(open(t)), name != "four methods", func() error {
						if fault == "writes fail" {
							return errDisk
						}
						<-hang
						return nil
					}, release)
				})
			})
		}
	}
}

func listByState(t *testing.T, fake *testkit.Fake, abilities bool, fault func() error, release func()) {
	var db task.Persistence = fake
	if !abilities {
		db = testkit.Bare(fake)
	}
	m := newManager(t, db, task.WithLimit(2))
	c := &crew{t: t, m: m, ids: make(map[string]string), ends: make(map[string]chan struct{})}
	for _, step := range []string{"+D1", "-D1", "+R1", "+R2", "+P1", "+P2", "+P3"} {
		c.do(step)
	}
	time.Sleep(time.Second) // R1 and R2 are stored as RUNNING
	fake.Before(func(c *testkit.Call) error {
		if len(c.Saves)+len(c.Updates) > 0 {
			return fault()
		}
		return nil
	})
	c.do("-R2") // its final state can't be stored, so it stays RUNNING; P1 starts
	c.do("!P2") // it stays PENDING
	checkStates(t, c)
	fake.Before(nil)
	release()
	time.Sleep(2 * time.Second)
	c.do("?R2 DONE")
	c.do("?P2 CANCELLED")
	if ops, err := m.List(10, 0, task.ByState(task.StateRunning)); err != nil || names(ops) != "P1 R1" {
		t.Errorf("once the store works again, List = %q, %v", names(ops), err)
	}
	must(t, m.Close())
}

// checkStates lists the operations of listByState by state.
func checkStates(t *testing.T, c *crew) {
	t.Helper()
	before := func(name string) task.ListOption { return task.Before(c.ids[name]) }
	states := func(states ...task.State) task.ListOption { return task.ByState(states...) }
	for _, tt := range []struct {
		want          string
		limit, offset int
		opts          []task.ListOption
	}{
		{"P1 R2 R1", 10, 0, []task.ListOption{states(task.StateRunning)}},
		{"R2", 1, 1, []task.ListOption{states(task.StateRunning)}},
		{"R2 R1", 10, 0, []task.ListOption{states(task.StateRunning), before("P1")}},
		{"R1", 10, 1, []task.ListOption{states(task.StateRunning), before("P1")}},
		{"R2", 10, 0, []task.ListOption{states(task.StateRunning), task.ByName("R2")}},
		{"P3 P2", 10, 0, []task.ListOption{states(task.StatePending)}},
		{"P2", 10, 0, []task.ListOption{states(task.StatePending), before("P3")}},
		{"", 10, 0, []task.ListOption{states(task.StatePending), task.ByName("P1")}},
		{"D1", 10, 0, []task.ListOption{states(task.StateDone)}},
		{"", 10, 0, []task.ListOption{states(task.StateCancelled, task.StateFailed)}},
		{"P1 R2 R1 D1", 10, 0, []task.ListOption{states(task.StateRunning, task.StateDone)}},
		{"P3 P2 P1 R2 R1 D1", 10, 0, nil},
	} {
		began := time.Now()
		ops, err := c.m.List(tt.limit, tt.offset, tt.opts...)
		if took := time.Since(began); err != nil || names(ops) != tt.want || took > 0 {
			t.Errorf("List(%d, %d, ...) = %q, %v after %v, want %q at once", tt.limit, tt.offset, names(ops), err, took, tt.want)
		}
		for _, op := range ops {
			if shown, _ := c.m.Get(op.ID); shown.State != op.State {
				t.Errorf("%s is listed as %s and is %s", op.Name, op.State, shown.State)
			}
		}
	}
}

// TestPruneFar deletes all finished operations, however far in the future the given
// time is.
func TestPruneFar(t *testing.T) {
	for _, before := range []time.Time{
		time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		m := newManager(t, openSQLite(t, testkit.FastPath(t)))
		wait(t, m, submit(t, m, nothing).ID)
		if n, err := m.Prune(before); n != 1 || err != nil {
			t.Errorf("Prune(%v) = %d, %v, want 1", before, n, err)
		}
	}
}

// TestListBesideWriter lists by state while operations are written.
func TestListBesideWriter(t *testing.T) {
	m := newManager(t, openSQLite(t, testkit.FastPath(t)))
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 100 {
				wait(t, m, submit(t, m, nothing).ID)
			}
		})
	}
	for range 200 {
		if _, err := m.List(10, 0, task.ByState(task.StateRunning)); err != nil {
			t.Fatal(err)
		}
	}
	all.Wait()
}

// TestListMaxValue: List replaces longer values by their length in bytes.
func TestListMaxValue(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		const most = 100
		text := func(bytes int) string { return strings.Repeat("ä", bytes/2-1) } // that many bytes as JSON, with the quotes
		fits := submit(t, m, func(context.Context, func(int)) (any, error) { return text(most), nil }, task.WithMetadata(text(most+2)))
		wait(t, m, fits.ID)
		long := submit(t, m, func(context.Context, func(int)) (any, error) { return text(most + 2), nil })
		wait(t, m, long.ID)
		fn, started, release := blocker(nil)
		defer release()
		live := submit(t, m, fn, task.WithMetadata(text(1000)))
		<-started

		for _, opts := range [][]task.ListOption{
			{task.MaxValue(most)},
			{task.MaxValue(most), task.ByState(task.StateDone, task.StateRunning)},
		} {
			ops, err := m.List(10, 0, opts...)
			must(t, err)
			want := []task.Operation{
				{ID: live.ID, Metadata: task.Omitted(1000)},
				{ID: long.ID, Result: task.Omitted(most + 2)},
				{ID: fits.ID, Metadata: task.Omitted(most + 2), Result: text(most)},
			}
			for i, op := range ops {
				if got := (task.Operation{ID: op.ID, Metadata: op.Metadata, Result: op.Result}); got != want[i] {
					t.Errorf("got %.200v, want %.200v", got, want[i])
				}
			}
			if len(ops) != len(want) {
				t.Fatalf("%d operations", len(ops))
			}
			if err := ops[1].DecodeResult(new(any)); err == nil || !strings.Contains(err.Error(), "102 bytes was left out") {
				t.Errorf("decoding what was left out: %v", err)
			}
			copied := *ops[1]
			copied.ID = "copy"
			if err := db.Save(&copied); err == nil {
				t.Error("what was left out can be stored")
			}
		}
		for _, max := range []int{0, -1, 1000} {
			ops, err := m.List(10, 0, task.MaxValue(max))
			must(t, err)
			if ops[0].Metadata != text(1000) || ops[1].Result != text(most+2) {
				t.Errorf("MaxValue(%d) leaves out %.200v", max, ops)
			}
		}
		if op, _ := m.Get(long.ID); op.Result != text(most+2) {
			t.Errorf("Get has the result %v", op.Result)
		}
	})
}

// TestSQLiteMaxValue: SQLite itself omits values that are too long.
func TestSQLiteMaxValue(t *testing.T) {
	store := openSQLite(t, testkit.Path(t))
	must(t, store.Save(&task.Operation{ID: "1", Name: "n", State: task.StateDone, Metadata: json.RawMessage(`"ä"`), Result: json.RawMessage(`5`)}))
	must(t, store.Save(&task.Operation{ID: "2", Name: "newer", State: task.StateFailed}))
	for _, f := range []task.Filter{{}, {States: []task.State{task.StateDone}}, {States: []task.State{task.StateDone, task.StateRunning}}, {Name: "n"}, {Before: "2"}} {
		for max, want := range map[int]any{3: task.Omitted(4), 4: json.RawMessage(`"ä"`)} {
			f.MaxValue = max
			ops, err := store.ListFiltered(f, 10, 0)
			must(t, err)
			op := ops[len(ops)-1]
			if !reflect.DeepEqual(op.Metadata, want) || !reflect.DeepEqual(op.Result, json.RawMessage(`5`)) {
				t.Errorf("%+v: metadata %v, result %v", f, op.Metadata, op.Result)
			}
		}
	}
}

// TestListMaxValueBare: with MaxValue alone, List reads only the page from a store with
// four methods.
func TestListMaxValueBare(t *testing.T) {
	fake := testkit.NewFake(nil)
	m := newManager(t, testkit.Bare(fake))
	wait(t, m, submit(t, m, nothing).ID)
	fake.Before(func(c *testkit.Call) error {
		if c.Method == "List" && c.Limit != 10 {
			t.Errorf("List(%d, %d)", c.Limit, c.Offset)
		}
		return nil
	})
	if ops, err := m.List(10, 0, task.MaxValue(1)); err != nil || len(ops) != 1 {
		t.Errorf("%v, %v", ops, err)
	}
}

// TestLockedForLong: another process locks the database for longer than a write waits,
// while one operation finishes and another is submitted.
func TestLockedForLong(t *testing.T) {
	path := testkit.Path(t)
	store := openSQLite(t, path)
	task.SetTimeout(store, 50*time.Millisecond)
	m := newManager(t, store)
	fn, started, release := blocker(nil)
	held := submit(t, m, fn)
	<-started
	waiting := submit(t, m, untilCancelled)

	other, err := sql.Open("sqlite3", path)
	testkit.Must(t, err)
	defer other.Close()
	c, err := other.Conn(t.Context())
	testkit.Must(t, err)
	defer c.Close()
	_, err = c.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	testkit.Must(t, err)

	release()
	if _, err := m.Submit("refused", func(context.Context, func(int)) (any, error) {
		t.Error("called, though Submit has failed")
		return nil, nil
	}); err == nil || !strings.Contains(err.Error(), "locked") {
		t.Errorf("Submit: %v", err)
	}
	testkit.Must(t, testkit.Until(func() bool {
		op, _ := m.Get(held.ID)
		return strings.Contains(op.Error, "DONE, which can't be stored yet")
	}))
	if err := waiting.Cancel(); err != nil { // needs no database
		t.Error(err)
	}
	_, err = c.ExecContext(t.Context(), "ROLLBACK")
	testkit.Must(t, err)
	if op := wait(t, m, held.ID); op.State != task.StateDone || op.Error != "" {
		t.Errorf("in the end it is %+v", op)
	}
	if op := wait(t, m, waiting.ID); op.State != task.StateCancelled {
		t.Errorf("the cancelled one is %+v", op)
	}
	if ops, err := m.List(10, 0); err != nil || len(ops) != 2 {
		t.Errorf("List: %v, %v", ops, err)
	}
}
