package listtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

var finishStart = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// listHistory stores n operations of all kinds: every third name has "Scrub" in
// some case, some have metadata, and in every ten some finish at the same time.
func listHistory(t *testing.T, db task.Persistence, n int) {
	t.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	names := []string{"scrub tank", "SCRUB Zoll", "replicate", "ßcrub Ä", "snapshot"}
	states := []task.State{task.StatePending, task.StateRunning, task.StateDone, task.StateDone, task.StateFailed, task.StateCancelled}
	metadata := []any{nil, json.RawMessage(`{"pool":"tank","user":"root"}`), json.RawMessage(`{"pool":"tank2"}`),
		json.RawMessage(`{"pool":["tank"]}`), json.RawMessage(`["tank"]`), json.RawMessage(`{"pool":"\u0074ank","n":1}`)}
	var ops []*task.Operation
	for i := range n {
		op := &task.Operation{
			ID: fmt.Sprintf("op-%d", i), Name: names[r.IntN(len(names))], State: states[r.IntN(len(states))], Metadata: metadata[r.IntN(len(metadata))],
			Result: json.RawMessage(fmt.Sprint(i)), CreatedAt: finishStart, UpdatedAt: finishStart.Add(time.Duration(r.IntN(n/3)) * time.Minute),
		}
		ops = append(ops, op)
	}
	if b, ok := db.(task.BatchWriter); ok { // in one transaction
		for _, err := range b.WriteBatch(ops, nil) {
			testkit.Must(t, err)
		}
		return
	}
	for _, op := range ops {
		testkit.Must(t, db.Save(op))
	}
}

// wanted returns what List should return for a filter, by filtering all operations.
func wanted(all []*task.Operation, f task.Filter, limit, offset int) (page []*task.Operation) {
	matching := slices.Clone(all)
	if f.ByFinish {
		matching = slices.DeleteFunc(matching, func(op *task.Operation) bool { return !op.State.Finished() })
		slices.SortStableFunc(matching, func(a, b *task.Operation) int { return b.UpdatedAt.Compare(a.UpdatedAt) })
	}
	if f.Before != "" {
		matching = matching[1+slices.IndexFunc(matching, func(op *task.Operation) bool { return op.ID == f.Before }):]
	}
	matching = slices.DeleteFunc(matching, func(op *task.Operation) bool {
		ranged := !f.FinishedAfter.IsZero() || !f.FinishedBefore.IsZero()
		return f.Name != "" && op.Name != f.Name ||
			!strings.Contains(strings.ToLower(op.Name), strings.ToLower(f.Containing)) ||
			len(f.States) > 0 && !slices.Contains(f.States, op.State) ||
			ranged && (!op.State.Finished() || op.UpdatedAt.IsZero()) ||
			op.UpdatedAt.Before(f.FinishedAfter) || !f.FinishedBefore.IsZero() && !op.UpdatedAt.Before(f.FinishedBefore) ||
			slices.ContainsFunc([]string{"pool", "user"}, func(key string) bool {
				members, _ := op.Metadata.(map[string]any)
				value, ok := f.Metadata[key]
				return ok && members[key] != any(value)
			})
	})
	matching = matching[min(offset, len(matching)):]
	return matching[:min(limit, len(matching))]
}

// options returns the options that make a filter.
func options(f task.Filter) []task.ListOption {
	opts := []task.ListOption{task.ByState(f.States...), task.ByName(f.Name), task.Containing(f.Containing), task.Before(f.Before),
		task.FinishedAfter(f.FinishedAfter), task.FinishedBefore(f.FinishedBefore)}
	for key, value := range f.Metadata {
		opts = append(opts, task.ByMetadata(key, value))
	}
	if f.ByFinish {
		opts = append(opts, task.ByFinish())
	}
	if f.WithoutResults {
		opts = append(opts, task.WithoutResults())
	}
	return opts
}

// randomFilter combines options at random. In half of the cases it continues after one
// of the finished operations in all.
func randomFilter(r *rand.Rand, all []*task.Operation) (f task.Filter) {
	maybe := func(one int) bool { return r.IntN(one) == 0 }
	at := func() time.Time { return finishStart.Add(time.Duration(r.IntN(len(all)/3)) * time.Minute) }
	if maybe(4) {
		f.Containing = []string{"scrub", "SCRUB T", "ß", "ap", "no such"}[r.IntN(5)]
	}
	if maybe(8) {
		f.Name = "replicate"
	}
	if maybe(3) {
		f.Metadata = map[string]string{"pool": []string{"tank", "tank2", "none"}[r.IntN(3)]}
		if maybe(3) {
			f.Metadata["user"] = "root"
		}
	}
	if maybe(3) {
		states := []task.State{task.StatePending, task.StateRunning, task.StateDone, task.StateFailed, task.StateCancelled}
		r.Shuffle(5, func(i, j int) { states[i], states[j] = states[j], states[i] })
		f.States = states[:1+r.IntN(3)]
	}
	if maybe(3) {
		f.FinishedAfter = at()
	}
	if maybe(3) {
		f.FinishedBefore = at()
	}
	f.ByFinish, f.WithoutResults = maybe(2), maybe(5)
	for maybe(2) {
		if op := all[r.IntN(len(all))]; op.State.Finished() {
			f.Before = op.ID
		}
	}
	return f
}

// TestListCombined compares, for many filters, what each kind of store finds with a
// filter over all operations. Some histories are longer than one step of a search.
func TestListCombined(t *testing.T) {
	for name, open := range testkit.Stores {
		t.Run(name, func(t *testing.T) {
			n, rounds := 400, testos.Size(300, 2000)
			if name == "sqlite" {
				n, rounds = 12_000, testos.Size(100, 300)
			}
			db := open(t)
			m := testkit.NewManager(t, db)
			listHistory(t, db, n) // not before New, which would recover them
			checkCombined(t, m, n, rounds)
		})
	}
}

func checkCombined(t *testing.T, m *task.Manager, n, rounds int) {
	all, err := m.List(n, 0)
	testkit.Must(t, err)
	r := rand.New(rand.NewPCG(3, 4))
	for range rounds {
		f := randomFilter(r, all)
		limit, offset := 1+r.IntN(20), 0
		if r.IntN(3) == 0 {
			offset = r.IntN(n / 4)
		}
		got, err := m.List(limit, offset, options(f)...)
		want := wanted(all, f, limit, offset)
		if err != nil || !slices.EqualFunc(got, want, func(a, b *task.Operation) bool { return a.ID == b.ID }) {
			t.Fatalf("List(%d, %d) of %+v = %q, %v, want %q", limit, offset, f, listedIDs(got), err, listedIDs(want))
		}
		for _, op := range got {
			if (op.Result == nil) != f.WithoutResults {
				t.Fatalf("List of %+v: result %v", f, op.Result)
			}
		}
	}
}

func listedIDs(ops []*task.Operation) (ids []string) {
	for _, op := range ops {
		ids = append(ids, op.ID)
	}
	return ids
}

// TestListMetadataKeys: keys and values are compared literally, whatever they mean in a
// JSON path, and cells of invalid JSON hide nothing.
func TestListMetadataKeys(t *testing.T) {
	keys := []string{"", ".", "a.b", "$", "$.a", "a\"b", "a'b", "a\\b", "[0]", "#", "a\x00b", "a", "ü", "\u2028", "<&>", "😀", "a%b", "?", "0"}
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for _, key := range keys {
			op := testkit.Submit(t, m, testkit.Nothing, task.WithMetadata(map[string]any{key: "value of " + key, "other": 1}))
			testkit.Wait(t, m, op.ID)
		}
		for _, other := range []any{[]string{"value of 0"}, "value of a", nil, map[string]any{"a": []string{"value of a"}}, map[string]any{"b": "value of a"}} {
			testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing, task.WithMetadata(other)).ID)
		}
		for _, key := range keys {
			for _, opts := range [][]task.ListOption{nil, {task.ByFinish()}, {task.ByFinish(), task.MaxValue(1)}, {task.ByState(task.StateDone)}} {
				ops, err := m.List(100, 0, append(opts, task.ByMetadata(key, "value of "+key))...)
				if err != nil || len(ops) != 1 {
					t.Errorf("key %q: %d operations, %v", key, len(ops), err)
				}
			}
			if ops, err := m.List(100, 0, task.ByMetadata(key, "value of "+key), task.ByMetadata("other", "1")); err != nil || len(ops) != 0 {
				t.Errorf("key %q and a number: %d operations, %v", key, len(ops), err)
			}
		}
	})
}

// TestListWhileChanging: live operations match by their present state, not by the
// stored one, and are never listed as finished, even while nothing can be stored.
func TestListWhileChanging(t *testing.T) {
	for name, open := range testkit.Stores {
		t.Run(name, func(t *testing.T) {
			fake := testkit.NewFake(open(t))
			var db task.Persistence = fake
			if name == "four methods" {
				db = testkit.Bare(fake)
			}
			m := testkit.NewManager(t, db)
			testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing, task.WithMetadata(map[string]string{"pool": "old"})).ID)
			started, end := make(chan context.Context), make(chan struct{})
			op := testkit.Submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
				started <- ctx
				<-end
				return nil, nil
			}, task.WithMetadata(map[string]string{"pool": "old"}))
			ctx := <-started
			fake.Before(func(c *testkit.Call) error {
				if len(c.Saves)+len(c.Updates) > 0 {
					return testkit.ErrDisk
				}
				return nil
			})
			testkit.Must(t, task.SetMetadata(ctx, map[string]string{"pool": "new"}))
			check := func(want int, opts ...task.ListOption) { t.Helper(); wantListed(t, m, want, opts...) }
			checkUnfinished(t, m, op)
			close(end)
			testkit.Must(t, testkit.Until(func() bool { op, _ := m.Get(op.ID); return op.Error != "" })) // its end can't be stored
			checkUnfinished(t, m, op)
			fake.Before(nil)
			testkit.Wait(t, m, op.ID)
			check(2, task.ByFinish())
			check(1, task.ByFinish(), task.Before(op.ID))
			check(1, task.ByFinish(), task.ByMetadata("pool", "new"))
			check(2, task.FinishedAfter(op.CreatedAt.Add(-time.Hour)))
		})
	}
}

func wantListed(t *testing.T, m *task.Manager, want int, opts ...task.ListOption) {
	t.Helper()
	if ops, err := m.List(10, 0, opts...); err != nil || len(ops) != want {
		t.Errorf("%d operations, %v, want %d", len(ops), err, want)
	}
}

// checkUnfinished lists a running operation, now in the pool "new", and a finished one
// in the pool "old".
func checkUnfinished(t *testing.T, m *task.Manager, op *task.Operation) {
	t.Helper()
	wantListed(t, m, 1, task.ByMetadata("pool", "new"))
	wantListed(t, m, 1, task.ByMetadata("pool", "old"))
	wantListed(t, m, 0, task.ByMetadata("pool", "old"), task.Before(op.ID), task.ByState(task.StateRunning))
	wantListed(t, m, 1, task.ByMetadata("pool", "new"), task.ByState(task.StateRunning))
	wantListed(t, m, 0, task.ByMetadata("pool", "old"), task.ByState(task.StateRunning))
	wantListed(t, m, 1, task.ByFinish())
	wantListed(t, m, 0, task.ByFinish(), task.ByMetadata("pool", "new"))
	wantListed(t, m, 1, task.FinishedAfter(op.CreatedAt.Add(-time.Hour)))
	wantListed(t, m, 0, task.FinishedBefore(time.Now().Add(time.Hour)), task.ByState(task.StateRunning))
	if ops, err := m.List(1, 1, task.ByMetadata("pool", "old")); err != nil || len(ops) != 0 {
		t.Errorf("behind an operation that has changed: %d, %v", len(ops), err)
	}
	if _, err := m.List(1, 0, task.ByFinish(), task.Before(op.ID)); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("by finish, before an unfinished operation: %v", err)
	}
}

// TestListFinal: an operation that is stored as finished is not listed as finished
// while its manager still waits for the store's answer.
func TestListFinal(t *testing.T) {
	fake := testkit.NewFake(testkit.OpenSQLite(t, testkit.Path(t)))
	m := testkit.NewManager(t, fake)
	testkit.Wait(t, m, testkit.Submit(t, m, testkit.Nothing).ID)
	stored, answer := make(chan struct{}), make(chan struct{})
	fake.After(func(c *testkit.Call) {
		if c.Finished() {
			close(stored)
			<-answer
		}
	})
	op := testkit.Submit(t, m, testkit.Nothing)
	<-stored
	for _, opts := range [][]task.ListOption{{task.ByFinish()}, {task.FinishedAfter(finishStart.AddDate(-10, 0, 0))}} {
		if ops, err := m.List(1, 0, opts...); err != nil || len(ops) != 1 || ops[0].ID == op.ID {
			t.Errorf("%q, %v, want the other operation", listedIDs(ops), err)
		}
	}
	fake.After(nil)
	close(answer)
	testkit.Wait(t, m, op.ID)
	if ops, err := m.List(1, 0, task.ByFinish()); err != nil || len(ops) != 1 || ops[0].ID != op.ID {
		t.Errorf("%q, %v", listedIDs(ops), err)
	}
}

// TestListByFinishBefore: a cursor must be a finished operation.
func TestListByFinishBefore(t *testing.T) {
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		testkit.History(t, m, "D1", "R1", "F1")
		running, err := m.List(1, 0, task.ByState(task.StateRunning))
		testkit.Must(t, err)
		for _, id := range []string{running[0].ID, "unknown", "0190d8e0-0000-7000-8000-000000000000"} {
			for _, opts := range [][]task.ListOption{nil, {task.Containing("1")}, {task.ByState(task.StateFailed)}} {
				if ops, err := m.List(10, 0, append(opts, task.ByFinish(), task.Before(id))...); !errors.Is(err, task.ErrNotFound) {
					t.Errorf("before %s: %q, %v", id, testkit.Names(ops), err)
				}
			}
		}
	})
}

// TestListByFinishOrder lists, page by page, operations that finish in another order
// than they were submitted.
func TestListByFinishOrder(t *testing.T) {
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		ends := make(map[string]chan struct{})
		ids := make(map[string]string)
		for _, name := range []string{"A", "B", "C", "D", "E"} {
			end := make(chan struct{})
			op, err := m.Submit(name, func(context.Context, func(int)) (any, error) { <-end; return nil, nil })
			testkit.Must(t, err)
			ends[name], ids[name] = end, op.ID
		}
		for _, name := range []string{"C", "A", "E", "B"} {
			close(ends[name])
			testkit.Wait(t, m, ids[name])
			time.Sleep(time.Millisecond)
		}
		var got []string
		for before := ""; ; {
			ops, err := m.List(2, 0, task.ByFinish(), task.Before(before))
			testkit.Must(t, err)
			if len(ops) == 0 {
				break
			}
			got, before = append(got, testkit.Names(ops)), ops[len(ops)-1].ID
		}
		if want := []string{"B E", "A C"}; !slices.Equal(got, want) {
			t.Errorf("pages %q, want %q", got, want)
		}
		close(ends["D"])
	})
}

// TestListContaining: ASCII letters match in either case, other letters do not.
func TestListContaining(t *testing.T) {
	testkit.EachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for _, name := range []string{"Scrub TANK", "100% of_it", "ÄRGER", "a\x00b", "x\xffy"} {
			op, err := m.Submit(name, testkit.Nothing)
			testkit.Must(t, err)
			testkit.Wait(t, m, op.ID)
		}
		for text, want := range map[string]int{
			"": 5, "scrub tank": 1, "B T": 1, "k": 1, "%": 1, "_": 1, "__": 0, "Är": 1, "ärg": 0, "RGER": 1, "a\x00B": 1, "\x00": 1,
			"\xff": 1, "\ufffdY": 1, "*": 0, "' OR 1": 0,
		} {
			for _, opts := range [][]task.ListOption{nil, {task.ByFinish()}} {
				if ops, err := m.List(10, 0, append(opts, task.Containing(text))...); err != nil || len(ops) != want {
					t.Errorf("containing %q: %q, %v, want %d", text, testkit.Names(ops), err, want)
				}
			}
		}
	})
}
