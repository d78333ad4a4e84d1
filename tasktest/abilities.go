package tasktest

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mynt-nas/task"
)

// The rules for the optional abilities of stores. A new ability needs a table like these,
// which TestPersistence runs, and a case in Inject.

var batchChecks = []check{
	{
		name: "batch",
		rule: "WriteBatch stores saves in their order, then updates, and they are durable on return.",
		has:  canBatch,
		test: batches,
	},
	{
		name: "batch-bad-member",
		rule: "In WriteBatch, an operation that can't be stored fails alone, and the others are stored; errors are in the order of the operations.",
		has:  canBatch,
		test: batchesWithBad,
	},
	{
		name: "batch-same",
		rule: "In one WriteBatch, an operation may be saved and updated, and an update that finishes it may follow one that does not.",
		has:  canBatch,
		test: batchesOfSame,
	},
	{
		name: "batch-empty",
		rule: "WriteBatch without operations changes nothing and returns no errors.",
		has:  canBatch,
		test: batchesOfNone,
	},
	{
		name: "batch-concurrent",
		rule: "WriteBatch may be called from any number of goroutines at once.",
		has:  canBatch,
		test: func(s *session) {
			s.crowd(func(op task.Operation) { s.batch([]task.Operation{op}, nil) },
				func(op task.Operation) { s.batch(nil, []task.Operation{op}) })
		},
	},
}

func batches(s *session) {
	var old []task.Operation
	for _, state := range states {
		old = append(old, in(state, s.saved("to become "+string(state))))
	}
	var saves []task.Operation
	for i := range 20 {
		saves = append(saves, s.new(fmt.Sprint("saved ", i)))
	}
	s.batch(saves, old)
	s.verify("after WriteBatch of saves and updates")
	s.batch([]task.Operation{s.new("alone")}, nil)
	s.verify("after WriteBatch of a save")
	s.batch(nil, []task.Operation{in(task.StateDone, saves[0])})
	s.verify("after WriteBatch of an update")
	if s.reopen() {
		s.verify("opened again")
	}
}

// batchesWithBad puts a bad member at every position, and several into one batch.
func batchesWithBad(s *session) {
	stored, finished := s.saved("stored"), in(task.StateDone, s.new("finished"))
	s.save(finished)
	again := func() task.Operation {
		op := stored
		op.Name = "saved again"
		return op
	}
	late := func() task.Operation { return in(task.StateFailed, finished) }
	unknown := func() task.Operation { return in(task.StateRunning, s.new("unknown")) }
	for place := range 3 {
		good := func(name string) task.Operation { return s.new(fmt.Sprint(name, " ", place)) }
		saves := []task.Operation{good("a"), good("b")}
		s.batch(slices.Insert(saves, place, again()), nil)
		s.verify("after WriteBatch with a save of a stored operation")
		for _, bad := range []task.Operation{late(), unknown()} {
			updates := []task.Operation{in(task.StateRunning, saves[0]), in(task.StateRunning, saves[1])}
			s.batch(nil, slices.Insert(updates, place, bad))
			s.verify("after WriteBatch with an update of an operation that is " + bad.Name)
		}
	}
	twice := s.new("twice")
	s.batch([]task.Operation{again(), twice, twice, again(), s.new("last")},
		[]task.Operation{late(), in(task.StateDone, stored), unknown(), in(task.StateDone, twice)})
	s.verify("after WriteBatch with several bad members")
	s.batch([]task.Operation{again()}, []task.Operation{unknown()})
	s.verify("after WriteBatch with bad members only")
}

func batchesOfSame(s *session) {
	old := s.saved("old")
	a, b := s.new("a"), s.new("b")
	s.batch([]task.Operation{a, b}, []task.Operation{
		in(task.StateRunning, a), in(task.StateDone, a),
		in(task.StateRunning, old), in(task.StateFailed, old),
		in(task.StateCancelled, b),
	})
	s.verify("after WriteBatch")
}

func batchesOfNone(s *session) {
	s.saved("a")
	s.batch(nil, nil)
	s.batch([]task.Operation{}, []task.Operation{})
	s.verify("after WriteBatch")
}

var recoverChecks = []check{
	{
		name: "recover",
		rule: "Recover marks each operation that a closed store has left PENDING or RUNNING as FAILED with the reason, yields each once, and changes nothing that is finished.",
		has:  canRecover,
		test: recovers,
	},
	{
		name: "recover-break",
		rule: "What Recover yields is stored; when its caller breaks out of the loop, the next Recover continues with the rest.",
		has:  canRecover,
		test: recoversInParts,
	},
	{
		name: "recover-living",
		rule: "Recover leaves alone what a manager on the open store runs.",
		has:  canRecover,
		test: recoversNoLiving,
	},
	{
		name: "recover-resume",
		rule: "Recover asks resume, with a copy, for each orphan whose cancellation nobody has asked for, and where it returns true takes the orphan over: PENDING, with an Owner, without Progress, Message and StartedAt.",
		has:  canRecover,
		test: resumes,
	},
	{
		name: "recover-race",
		rule: "Recover holds no lock while it calls resume, and neither changes nor yields what another Recover has finished meanwhile.",
		has:  canRecover,
		test: resumesTooLate,
	},
}

// left stores operations in all states and then reopens the store, so that the unfinished
// ones are orphans. It reports whether reopening succeeded.
func (s *session) left(rounds int) bool {
	for i := range rounds {
		for _, state := range states {
			op := s.saved(fmt.Sprint(state, " ", i))
			op = in(state, op)
			op.Metadata = json.RawMessage(`{"pool":"tank"}`)
			s.update(op)
		}
	}
	return s.reopen()
}

func recovers(s *session) {
	if !s.left(2) {
		return
	}
	const reason = "it's the reason"
	if n := s.recover(reason, -1); n != 4 {
		s.errorf("Recover yielded %d operations, want 4", n)
	}
	s.expectFailed(reason)
	s.verify("after Recover")
	if n := s.recover("another reason", -1); n != 0 {
		s.errorf("a second Recover yielded %d operations, want none", n)
	}
	s.verify("after a second Recover")
	if s.reopen() {
		if n := s.recover("another reason", -1); n != 0 {
			s.errorf("opened again, Recover yielded %d operations, want none", n)
		}
		s.verify("opened again")
	}
}

// recover calls Recover and checks what it yields. It breaks out of the loop after most
// operations, unless most is negative, and returns their number.
func (s *session) recover(reason string, most int) (n int) {
	never := func(*task.Operation) bool { return false } // equivalent to nil: see recover-living
	for op, err := range s.db.(task.Recoverer).Recover(reason, never) {
		if err != nil || op == nil {
			s.errorf("Recover yielded %s, %v, want an operation", show(op), err)
			return n
		}
		n++
		if at := s.find(op.ID); at == nil || at.State.Finished() {
			s.errorf("Recover yielded %s, which is not an orphan", short(op.Name))
		} else {
			at.State, at.Error, at.UpdatedAt = task.StateFailed, reason, later(at, op)
			s.same("yielded by Recover", op, at)
		}
		if n == most {
			break
		}
	}
	return n
}

// later returns the later UpdatedAt of two operations.
func later(before, now *task.Operation) time.Time {
	if now.UpdatedAt.Before(before.UpdatedAt) {
		return before.UpdatedAt
	}
	return now.UpdatedAt
}

// expectFailed marks all unfinished operations of s.want as FAILED. If a break kept an
// operation from being yielded, only the store knows its UpdatedAt.
func (s *session) expectFailed(reason string) {
	for i := range s.want {
		at := &s.want[i]
		if at.State.Finished() {
			continue
		}
		at.State, at.Error = task.StateFailed, reason
		if got, err := s.db.Get(at.ID); err == nil && got != nil {
			at.UpdatedAt = later(at, got)
		}
	}
}

func recoversInParts(s *session) {
	if !s.left(3) {
		return
	}
	const reason = "it's the reason"
	if n := s.recover(reason, 1); n != 1 {
		s.errorf("Recover yielded %d operations before the break, want 1", n)
	}
	for _, want := range s.want {
		got, err := s.db.Get(want.ID)
		switch {
		case err != nil:
			s.errorf("after a break: Get(%s) = %v", short(want.Name), err)
		case want.State.Finished(): // including the one that was yielded
			s.same("after a break: Get", got, &want)
		}
	}
	s.recover(reason, -1) // yields the rest, or what is still unfinished
	s.expectFailed(reason)
	s.verify("after a second Recover")
}

func recoversNoLiving(s *session) {
	if !s.left(1) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := task.New(s.db, quiet)
	if err != nil {
		s.errorf("task.New = %v", err)
		return
	}
	defer m.Close()
	started, release := make(chan struct{}), make(chan struct{})
	op, err := m.Submit("living", func(context.Context, func(int)) (any, error) {
		close(started)
		<-release
		return "finished", nil
	})
	if err != nil {
		s.errorf("Submit = %v", err)
		return
	}
	<-started
	for op, err := range s.db.(task.Recoverer).Recover("mistaken for dead", nil) {
		s.errorf("Recover yielded %s, %v, want nothing, since its manager is alive", show(op), err)
	}
	close(release)
	if got, err := m.Wait(ctx, op.ID); err != nil || got.State != task.StateDone || got.Result != "finished" {
		s.errorf("after Recover, Manager.Wait = %s, %v, want it DONE", show(got), err)
	}
	s.answer("Manager.Close", m.Close(), nil)
}

func resumes(s *session) {
	cancelling := in(task.StateRunning, s.saved("cancelling"))
	cancelling.Cancelling = true
	s.update(cancelling)
	if !s.left(2) {
		return
	}
	const reason = "it's the reason"
	taken := make(map[string]bool) // what resume returned, by ID
	resume := func(op *task.Operation) bool {
		if at := s.find(op.ID); at == nil || at.State.Finished() || at.Cancelling {
			s.errorf("resume was called with %s, which is not to be resumed", show(op))
		} else {
			s.same("resume's operation", op, at)
		}
		if _, again := taken[op.ID]; again {
			s.errorf("resume was called twice with %s", show(op))
		}
		taken[op.ID] = strings.HasSuffix(op.Name, "0")
		op.Name, op.Owner = "changed by resume", "the resumer"
		return taken[op.ID]
	}
	owners := make(map[string]string)
	for op, err := range s.db.(task.Recoverer).Recover(reason, resume) {
		if err != nil || op == nil {
			s.errorf("Recover yielded %s, %v, want an operation", show(op), err)
			return
		}
		at := s.find(op.ID)
		if at == nil || owners[op.ID] != "" || at.State.Finished() {
			s.errorf("Recover yielded %s, which is not an orphan", show(op))
			continue
		}
		owners[op.ID] = "none"
		if taken[op.ID] {
			at.State, at.Progress, at.Message, at.StartedAt = task.StatePending, 0, "", time.Time{}
			owners[op.ID] = op.Owner
		} else {
			at.State, at.Error = task.StateFailed, reason
		}
		at.UpdatedAt = later(at, op)
		s.same("yielded by Recover", op, at)
	}
	if len(taken) != 4 || len(owners) != 5 {
		s.errorf("Recover asked resume for %d operations and yielded %d, want 4 and 5", len(taken), len(owners))
	}
	s.verify("after Recover with resume")
	s.resumedBy(taken, owners)
}

// resumedBy checks that the operations that were taken over have the Owner with which they
// were yielded.
func (s *session) resumedBy(taken map[string]bool, owners map[string]string) {
	for id, yes := range taken {
		if got, err := s.db.Get(id); err == nil && yes && (got.Owner == "" || got.Owner != owners[id]) {
			s.errorf("the Owner of a resumed operation is %q, yielded as %q", got.Owner, owners[id])
		}
	}
}

func resumesTooLate(s *session) {
	if !s.left(1) {
		return
	}
	first := make(chan struct{}) // closed when another Recover has returned
	meanwhile := sync.OnceFunc(func() {
		go func() {
			defer close(first)
			s.recover("in time", -1)
		}()
		select {
		case <-first:
		case <-time.After(patience):
			s.errorf("another Recover does not return while resume is called, want that no lock is held")
		}
	})
	for op, err := range s.db.(task.Recoverer).Recover("too late", func(*task.Operation) bool {
		meanwhile()
		return true
	}) {
		s.errorf("Recover yielded %s, %v, want nothing, since another Recover was first", show(op), err)
	}
	meanwhile()
	<-first
	s.verify("after two Recovers")
}

var filterChecks = []check{
	{
		name: "max-value",
		rule: "ListFiltered leaves values as they are, or, those of more bytes than the filter's MaxValue, as a task.Omitted with their length.",
		has:  canFilter,
		test: omits,
	},
	{
		name: "filtered",
		rule: "ListFiltered does what List does, with the operations that match the filter, Include and Exclude included; Before an unknown ID that is not a UUIDv7 is an error that wraps task.ErrNotFound.",
		has:  canFilter,
		test: filters,
	},
	{
		name: "filtered-deleted",
		rule: "ListFiltered before a UUIDv7 that is not stored returns the operations that would follow it, by the order of the IDs.",
		has:  canFilter,
		test: filtersBeforeDeleted,
	},
	{
		name: "filtered-containing",
		rule: "ListFiltered finds the operations with the filter's Containing in their names, ASCII letters in either case.",
		has:  canFilter,
		test: containing,
	},
	{
		name: "filtered-metadata",
		rule: "ListFiltered finds the operations with all strings of the filter's Metadata as members of theirs, Include and Exclude included.",
		has:  canFilter,
		test: metadata,
	},
	{
		name: "filtered-finished",
		rule: "ListFiltered finds the operations that finished at FinishedAfter or later, and before FinishedBefore.",
		has:  canFilter,
		test: finishedWithin,
	},
	{
		name: "filtered-by-finish",
		rule: "ListFiltered with ByFinish lists the finished operations by UpdatedAt, the latest first, and those with the same by order of Save, the last one first; Before any but a finished operation is an error that wraps task.ErrNotFound.",
		has:  canFilter,
		test: listsByFinish,
	},
	{
		name: "filtered-without-results",
		rule: "ListFiltered with WithoutResults returns operations without their results.",
		has:  canFilter,
		test: withoutResults,
	},
}

func filters(s *session) {
	for i := range 3 {
		for _, state := range states {
			s.update(in(state, s.saved([]string{"scrub", "replicate"}[i%2])))
		}
	}
	middle := s.want[len(s.want)/2].ID
	var include, exclude []string // every other operation, regardless of state
	for i, op := range s.want {
		if i%2 == 0 {
			include = append(include, op.ID)
		} else {
			exclude = append(exclude, op.ID)
		}
	}
	slices.Sort(include)
	slices.Sort(exclude)
	s.lists([][2]int{{100, 0}, {2, 0}, {2, 1}, {0, 0}, {5, 100}},
		task.Filter{},
		task.Filter{States: []task.State{task.StateFailed}},
		task.Filter{States: []task.State{task.StateRunning, task.StateDone}},
		task.Filter{States: []task.State{"PAUSED"}},
		task.Filter{Name: "scrub"},
		task.Filter{Name: "scru"},
		task.Filter{Before: middle},
		task.Filter{Before: s.want[0].ID},
		task.Filter{States: []task.State{task.StatePending, task.StateCancelled}, Name: "replicate", Before: middle},
		task.Filter{States: []task.State{task.StateRunning}, Include: include},
		task.Filter{States: []task.State{task.StateDone, task.StatePending, task.StateRunning}, Exclude: exclude},
		task.Filter{States: []task.State{task.StatePending}, Include: include, Exclude: exclude, Before: middle},
		task.Filter{Include: include, Exclude: exclude},
	)
	got, err := s.db.(task.FilteredLister).ListFiltered(task.Filter{Before: "unknown"}, 10, 0)
	if len(got) > 0 {
		s.errorf("ListFiltered before an unknown ID = %s", names(got))
	}
	s.answer("ListFiltered before an unknown ID", err, task.ErrNotFound)
}

func filtersBeforeDeleted(s *session) {
	id := func(i int) string { return fmt.Sprintf("0190%04x-0000-7000-8000-000000000000", i) }
	for i := range 10 {
		op := s.new("scrub")
		if op.ID = id(i); i%3 == 2 {
			op.ID = fmt.Sprintf("import-%d", i) // its ID contains no time
		}
		if i%3 != 0 {
			s.save(op)
		}
	}
	for i := range 4 { // 0, 3, 6 and 9 are not stored
		for _, f := range []task.Filter{{}, {Name: "scrub"}, {States: []task.State{task.StatePending}}, {States: states}} {
			f.Before = id(3 * i)
			want := s.page(2*i, 5, 0)
			got, err := s.db.(task.FilteredLister).ListFiltered(f, 5, 0)
			if err != nil || !samePage(got, want) {
				s.errorf("ListFiltered(%+v, 5, 0) = %s, %v, want %s", f, names(got), err, names(want))
			}
		}
	}
}

// omits lists a value that fits and one that does not, each in either field.
func omits(s *session) {
	const most = 1000
	fits, long := json.RawMessage(`"fits"`), json.RawMessage(`"`+strings.Repeat("ä", most)+`"`)
	for _, values := range [][2]json.RawMessage{{fits, long}, {long, fits}} {
		op := s.new("values")
		op.Metadata, op.Result = values[0], values[1]
		s.save(op)
	}
	for _, max := range []int{0, most, 10 * most} {
		got, err := s.db.(task.FilteredLister).ListFiltered(task.Filter{MaxValue: max}, 10, 0)
		if err != nil || len(got) != 2 {
			s.errorf("ListFiltered with MaxValue %d = %s, %v, want 2 operations", max, names(got), err)
			continue
		}
		for i, op := range got {
			want := s.want[1-i]
			for got, want := range map[*any]any{&op.Metadata: want.Metadata, &op.Result: want.Result} {
				if o, ok := (*got).(task.Omitted); ok && max == most && int(o) > most && len(want.(json.RawMessage)) > most {
					*got = want
				}
			}
			s.same(fmt.Sprintf("ListFiltered with MaxValue %d", max), op, &want)
		}
	}
}

var pruneChecks = []check{
	{
		name: "prune",
		rule: "Prune deletes the operations that finished before the given time and no others, and yields how many.",
		has:  canPrune,
		test: prunes,
	},
}

func prunes(s *session) {
	const each = 150 // enough for several steps
	for i := range each {
		for _, state := range states {
			op := in(state, s.saved(fmt.Sprint(state, " ", i)))
			switch i % 3 {
			case 1:
				op.UpdatedAt = noon.Add(time.Hour)
			case 2:
				op.UpdatedAt = time.Time{}
			}
			s.update(op)
		}
	}
	cut := noon.Add(time.Minute)
	old := func(op task.Operation) bool {
		return op.State.Finished() && !op.UpdatedAt.IsZero() && op.UpdatedAt.Before(cut)
	}
	gone := slices.Collect(func(yield func(task.Operation) bool) {
		for _, op := range s.want {
			if old(op) && !yield(op) {
				return
			}
		}
	})
	s.prune(noon, 0)
	s.verify("after Prune with a time before all operations")
	s.prune(cut, len(gone))
	s.want = slices.DeleteFunc(s.want, old)
	s.verify("after Prune")
	for _, op := range gone[:3] {
		_, err := s.db.Get(op.ID)
		s.answer("Get of a pruned operation", err, task.ErrNotFound)
		s.update(op)
	}
	s.prune(cut, 0)
	if s.reopen() {
		s.verify("opened again")
	}
}

func (s *session) prune(before time.Time, want int) {
	n := 0
	for some, err := range s.db.(task.Pruner).Prune(before) {
		n += some
		if err != nil {
			s.errorf("Prune yielded %v", err)
			return
		}
	}
	if n != want {
		s.errorf("Prune yielded a total of %d, want %d", n, want)
	}
}
