package task_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
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
			must(t, err)
		}
		return
	}
	for _, op := range ops {
		must(t, db.Save(op))
	}
}

// wanted returns what List should return for a filter, by looking at all operations.
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

// options are those that make a filter.
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

// randomFilter combines options at random. It continues after one of the finished
// operations in all, half of the time.
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

// TestListCombined compares what every kind of store finds for many filters with
// what one look at all operations does. Some histories are longer than one step of
// a search.
func TestListCombined(t *testing.T) {
	for name, open := range testkit.Stores {
		t.Run(name, func(t *testing.T) {
			n, rounds := 400, 2000
			if name == "sqlite" {
				n, rounds = 12_000, 300
			}
			db := open(t)
			m := newManager(t, db)
			listHistory(t, db, n) // not before, which would be recovered
			checkCombined(t, m, n, rounds)
		})
	}
}

func checkCombined(t *testing.T, m *task.Manager, n, rounds int) {
	all, err := m.List(n, 0)
	must(t, err)
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
