package tasktest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mynt-nas/task"
)

// methodChecks are the rules for the four methods of every store.
var methodChecks = []check{
	{
		name: "empty",
		rule: "A store that is opened in an empty directory shows no operations.",
		test: func(s *session) { s.verify("after opening") },
	},
	{
		name: "save",
		rule: "Get and List return an operation as Save has stored it, whatever its state.",
		test: saves,
	},
	{
		name: "save-duplicate",
		rule: "Save of an ID that is already stored leaves that operation as it is and returns an error.",
		test: savesDuplicate,
	},
	{
		name: "ids",
		rule: "Every ID that task.WithID allows is kept, and two IDs that differ in any byte are of two operations.",
		test: ids,
	},
	{
		name: "update",
		rule: "Update stores everything but ID, Name and CreatedAt, including fields that have become empty.",
		test: updates,
	},
	{
		name: "update-keeps",
		rule: "Update keeps the Name and CreatedAt that were saved.",
		test: updatesKeep,
	},
	{
		name: "update-missing",
		rule: "Update of an operation that is not stored stores nothing and returns an error that wraps task.ErrNotFound: it is never an upsert.",
		test: updatesMissing,
	},
	{
		name: "update-finished",
		rule: "Update of a finished operation changes nothing and returns an error that wraps task.ErrNotFound: nothing is resurrected.",
		test: updatesFinished,
	},
	{
		name: "order",
		rule: "List returns operations in the order of their Save, the last one first, whatever their times and IDs are and however they are updated.",
		test: order,
	},
	{
		name: "pages",
		rule: "List skips offset operations and returns at most limit, fewer only where the history ends.",
		test: pages,
	},
	{
		name: "pages-moving",
		rule: "While operations are being saved, each page of List shows the history at one moment, without gaps or repeats.",
		test: pagesMoving,
	},
	{
		name: "get-unknown",
		rule: "Get of an ID that is not stored returns an error that wraps task.ErrNotFound, whatever the ID looks like.",
		test: getsUnknown,
	},
	{
		name: "returned",
		rule: "An operation that Get or List returns belongs to the caller: no later call changes it, and changing it changes nothing in the store.",
		test: returned,
	},
	{
		name: "passed",
		rule: "The store does not modify the bytes of a json.RawMessage that it is given.",
		test: passed,
	},
	{
		name: "texts",
		rule: "Name and Error are kept unchanged, whatever characters they contain and however long they are.",
		test: texts,
	},
	{
		name: "values",
		rule: "Metadata and Result are returned as values that encode to the same JSON.",
		test: values(
			`null`, `true`, `0`, `""`, `{}`, `[]`, `[null,{"a":null}]`, `{"":{"b":[{"c":[]}]}}`,
			`{"z":1,"a":2}`, `"null"`, `"a\u0000b"`, `"'; DROP TABLE tasks; --"`, `"🚀 \u2028 ü \u0001"`,
			strings.Repeat("[", 1000)+strings.Repeat("]", 1000),
			`"`+strings.Repeat("long ", 1<<16)+`"`,
		),
	},
	{
		name: "numbers",
		rule: "Numbers in Metadata and Result keep all their digits.",
		test: values(
			`9007199254740993`, `-9223372036854775809`, `18446744073709551616`, `1.0`, `0.1000000000000000055511151231257827`,
			`1e400`, `{"n":[12345678901234567890123456789012345678901234567890]}`,
		),
	},
	{
		name: "times",
		rule: "Times are kept to the microsecond and returned in UTC.",
		test: times,
	},
	{
		name: "reopen",
		rule: "What a store has confirmed is there after it is closed and opened again.",
		test: reopens,
	},
	{
		name: "concurrent",
		rule: "All methods may be called from any number of goroutines at once.",
		test: func(s *session) { s.crowd(s.save, s.update) },
	},
	{
		name: "one-winner",
		rule: "When several goroutines save the same ID or finish the same operation at once, exactly one succeeds.",
		test: oneWinner,
	},
	{
		name: "manager",
		rule: "A task.Manager on the store keeps its promises: what it has shown is stored, and operations that were left unfinished become FAILED.",
		test: manages,
	},
	{
		name: "manager-ids",
		rule: "A task.Manager on the store runs an operation whose ID the caller gave at most once, also after a restart and when many submit it at once.",
		test: managesIDs,
	},
}

var states = []task.State{task.StatePending, task.StateRunning, task.StateDone, task.StateFailed, task.StateCancelled}

func saves(s *session) {
	for _, state := range states {
		op := in(state, s.new(string(state)))
		op.Metadata = json.RawMessage(`{"pool":"tank"}`)
		s.save(op)
	}
	s.verify("after Save")
}

func savesDuplicate(s *session) {
	for _, state := range states {
		op := in(state, s.saved("first"))
		if state != task.StatePending {
			s.update(op)
		}
		for _, other := range states {
			op = in(other, op)
			op.Name, op.Metadata, op.Error = "second", json.RawMessage(`2`), "second"
			s.save(op)
		}
		s.verify("after a Save with the ID of an operation that is " + string(state))
	}
}

func ids(s *session) {
	for _, id := range []string{
		"a", "A", "b", "-", "_", "~", "0", "00", "1e3", "null", "import-1", "auto-tank-2026-11-25T03:00:00+01:00",
		`!"$&'()*+,-.:;<=>@[]^_{|}~` + "`", "';DROP+TABLE+tasks;--", strings.Repeat("x", 199), strings.Repeat("x", 200), strings.Repeat("x", 199) + "X",
	} {
		op := s.new(id)
		op.ID = id
		s.save(op)
		s.update(in(task.StateRunning, op))
	}
	s.verify("after Save")
	if s.reopen() {
		s.verify("opened again")
	}
}

func updates(s *session) {
	op := s.saved("a")
	s.saved("neighbour")
	full := in(task.StateRunning, op)
	full.Metadata, full.Result, full.Error = json.RawMessage(`{"pool":"tank"}`), json.RawMessage(`[1]`), "the error"
	s.update(full)
	s.verify("after an Update of every field")
	op.State = task.StateRunning
	s.update(op)
	s.verify("after an Update that empties every field")
	for _, op.Progress = range []int{0, 1, 100, 99} {
		s.update(op)
		s.verify("after an Update of Progress")
	}
	for _, state := range states[2:] {
		op := s.saved("to be " + string(state))
		s.update(in(state, op))
	}
	s.verify("after Updates that finish")
}

func updatesKeep(s *session) {
	op := s.saved("a")
	op.Name, op.CreatedAt = "another name", noon.Add(time.Hour)
	for _, op.State = range []task.State{task.StateRunning, task.StateDone} {
		s.update(op)
		s.verify("after an Update with another Name and CreatedAt, to " + string(op.State))
	}
}

func updatesMissing(s *session) {
	s.saved("neighbour")
	for _, state := range states {
		s.update(in(state, s.new("not stored")))
	}
	s.verify("after an Update of an operation that is not stored")
}

func updatesFinished(s *session) {
	for _, final := range states[2:] {
		updated, saved := s.saved("finished by Update"), in(final, s.new("finished at Save"))
		s.update(in(final, updated))
		s.save(saved)
		for _, late := range states {
			for _, op := range []task.Operation{updated, saved} {
				op = in(late, op)
				op.Progress, op.Metadata, op.Error = 7, json.RawMessage(`"late"`), "late"
				s.update(op)
			}
		}
		s.verify("after an Update of an operation that is " + string(final))
	}
}

func order(s *session) {
	for i := range 8 {
		s.saved(fmt.Sprint("equal time ", i))
	}
	s.verify("after Save of operations with equal times")
	for i := range 4 {
		op := s.new(fmt.Sprint("clock set back ", i))
		op.CreatedAt = noon.Add(-time.Duration(i) * time.Hour)
		op.UpdatedAt = op.CreatedAt
		s.save(op)
	}
	s.verify("after Save of operations with earlier times")
	for i, op := range slices.Clone(s.want) {
		op = in(states[i%len(states)], op)
		op.UpdatedAt = noon.Add(time.Duration(i*5%11) * time.Minute)
		s.update(op)
	}
	s.verify("after Updates")
}

func pages(s *session) {
	const n = 120 // more than a common page size
	for i := range n {
		s.saved(fmt.Sprint(i))
	}
	edges := []int{0, 1, 2, 7, n - 1, n, n + 1, 1000, math.MaxInt}
	for _, limit := range edges {
		for _, offset := range edges {
			got, err := s.db.List(limit, offset)
			want := s.page(n, limit, offset)
			if err != nil || !samePage(got, want) {
				s.errorf("List(limit %d, offset %d) = %s, %v, want %s", limit, offset, names(got), err, names(want))
			}
		}
	}
}

func pagesMoving(s *session) {
	const before, total, limit = 20, 80, 7
	for i := range total {
		s.want = append(s.want, s.new(fmt.Sprint(i)))
	}
	var saved atomic.Int64
	save := func(op task.Operation) {
		s.answer("Save", s.db.Save(&op), nil)
		saved.Add(1)
	}
	for _, op := range s.want[:before] {
		save(op)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for _, op := range s.want[before:] {
			save(op)
		}
	})
	for range 2 {
		all.Go(func() {
			for offset, last := 0, false; !last; offset = (offset + limit) % total {
				from := int(saved.Load())
				last = from == total
				got, err := s.db.List(limit, offset)
				to := min(int(saved.Load())+1, total) // one more Save may be in progress
				if err != nil || !s.everWas(got, limit, offset, from, to) {
					s.errorf("List(limit %d, offset %d) = %s, %v, which was the page at no moment", limit, offset, names(got), err)
				}
			}
		})
	}
	all.Wait()
	s.verify("at the end")
}

// everWas reports whether page was right for a history of any length from from to to.
func (s *session) everWas(page []*task.Operation, limit, offset, from, to int) bool {
	for n := from; n <= to; n++ {
		if samePage(page, s.page(n, limit, offset)) {
			return true
		}
	}
	return false
}

func getsUnknown(s *session) {
	s.saved("neighbour")
	for _, id := range []string{
		s.new("").ID, "", "nobody", "neighbour", "0", "%", "*", "a\x00b", "' OR '1'='1", "../x", "\xff", strings.Repeat("x", 1<<16),
	} {
		op, err := s.db.Get(id)
		if !errors.Is(err, task.ErrNotFound) {
			s.errorf("Get(%s) = %s, %v, want an error that wraps task.ErrNotFound", short(id), show(op), err)
		}
	}
}

func returned(s *session) {
	op := s.saved("a")
	for i, method := range []string{"Get", "List"} {
		op = in(task.StateRunning, op)
		op.Metadata = json.RawMessage(`{"step":"one"}`)
		s.update(op)
		got := s.read(method, op.ID)
		if got == nil {
			return
		}
		was := *got
		was.Metadata = json.RawMessage(jsonText(got.Metadata))
		op.Metadata, op.Progress = json.RawMessage(`{"step":"two"}`), 10*i
		s.update(op)
		s.verify("after a later Update")
		if d := diff(got, &was); d != "" {
			s.errorf("later calls changed the operation that %s had returned: %s", method, d)
		}
		if got = s.read(method, op.ID); got != nil {
			*got = in(task.StateCancelled, s.new("scribble"))
			s.verify("after the caller has changed the operation that " + method + " had returned")
		}
	}
}

// read returns the newest operation, read with Get or List, or nil on failure.
func (s *session) read(method, id string) *task.Operation {
	var op *task.Operation
	ops, err := s.db.List(1, 0)
	if len(ops) == 1 {
		op, ops[0] = ops[0], nil
	}
	if method == "Get" {
		op, err = s.db.Get(id)
	}
	if err != nil || op == nil {
		s.errorf("%s = %s, %v, want an operation", method, show(op), err)
		return nil
	}
	return op
}

func passed(s *session) {
	op := s.saved("a")
	raws := make([]json.RawMessage, 5)
	text := func(i int) string { return fmt.Sprintf(`{"number":"%d"}`, i) }
	for i := range raws {
		raws[i] = json.RawMessage(text(i))
		op.State = task.StateRunning
		op.Metadata, op.Result = raws[i], raws[i]
		s.update(op)
		s.verify("after Update")
	}
	for i, raw := range raws {
		if string(raw) != text(i) {
			s.errorf("the store was given the bytes %s and changed them to %s", text(i), raw)
		}
	}
}

func texts(s *session) {
	for _, text := range []string{
		"a", " ", " leading and trailing ", "tab\tand\nnewline\r\n", "a\x00b", "\x00", "\x7f\x1b[31m",
		"'", `"`, "`", `\`, `\x00`, "'; DROP TABLE tasks; --", "%s %d", "?", ":name", "$1", "NULL", "null", "0", "1e3",
		"ünïcödé", "日本語", "🚀👩‍👩‍👧", "e\u0301", "\u202egnal", "\uFFFD", "\uFEFFmark", "<script>&amp;",
		strings.Repeat("long ", 1<<14),
	} {
		op := s.new(text)
		op.Error = text
		s.save(op)
		op = s.saved(text)
		op.State, op.Error = task.StateFailed, text
		s.update(op)
	}
	s.verify("as stored")
	if s.reopen() {
		s.verify("opened again")
	}
}

// values returns a test that stores each JSON text as Metadata and as Result.
func values(texts ...string) func(*session) {
	return func(s *session) {
		for i, text := range texts {
			raw := json.RawMessage(text)
			op := s.new(fmt.Sprint("saved ", i))
			op.Metadata, op.Result = raw, raw
			s.save(op)
			op = s.saved(fmt.Sprint("updated ", i))
			op.State, op.Metadata, op.Result = task.StateDone, raw, raw
			s.update(op)
		}
		s.verify("as stored")
		if s.reopen() {
			s.verify("opened again")
		}
	}
}

func times(s *session) {
	for _, at := range []time.Time{
		noon.Add(time.Microsecond),
		noon.Add(123456 * time.Microsecond),
		noon.Add(999999 * time.Microsecond),
		noon.Add(100 * time.Millisecond),
		time.Unix(0, 0).UTC(),
		time.Date(2038, 1, 19, 3, 14, 8, 1000, time.UTC),
		time.Date(9999, 12, 31, 23, 59, 59, 999999000, time.UTC),
		{},
	} {
		op := s.new("saved at " + timeText(at))
		op.CreatedAt, op.StartedAt, op.UpdatedAt = at, at, at
		s.save(op)
		op = s.saved("updated at " + timeText(at))
		op.State, op.StartedAt, op.UpdatedAt = task.StateRunning, at, at
		s.update(op)
	}
	s.verify("as stored")
	if s.reopen() {
		s.verify("opened again")
	}
}

func reopens(s *session) {
	for round := range 3 {
		for _, state := range states {
			op := s.saved(fmt.Sprint("round ", round, ", ", state))
			s.update(in(state, op))
		}
		if !s.reopen() {
			return
		}
		s.verify("opened again")
		for _, op := range slices.Clone(s.want) { // finished operations must stay unchanged
			op.Metadata = json.RawMessage(fmt.Sprint(round))
			s.update(op)
		}
		s.verify("updated after opening again")
	}
}

// crowd makes many goroutines store and read operations.
func (s *session) crowd(save, update func(task.Operation)) {
	const workers, each = 8, 10
	var all sync.WaitGroup
	for w := range workers {
		ops := make([]task.Operation, each)
		for i := range ops {
			ops[i] = s.new(fmt.Sprint("worker ", w, ", ", i))
		}
		all.Go(func() {
			for i, op := range ops {
				save(op)
				update(in(task.StateRunning, op))
				if got, err := s.db.Get(op.ID); err != nil || got == nil || got.State != task.StateRunning {
					s.errorf("Get(%s) = %s, %v, want it RUNNING", short(op.Name), show(got), err)
				}
				if got, err := s.db.List(i+1, 0); err != nil || len(got) != i+1 {
					s.errorf("List(limit %d) = %s, %v, want a full page", i+1, names(got), err)
				}
				update(in(task.StateDone, op))
			}
		})
	}
	all.Wait()
	rows, err := s.db.List(2*workers*each, 0)
	if err != nil {
		s.errorf("List = %v", err)
	}
	// Concurrent saves may be in any order: adopt the store's.
	place := make(map[string]int)
	for i, row := range rows {
		if row != nil {
			place[row.ID] = -i
		}
	}
	slices.SortFunc(s.want, func(a, b task.Operation) int { return place[a.ID] - place[b.ID] })
	s.verify("at the end")
}

func oneWinner(s *session) {
	for i := range 5 {
		op := s.new(fmt.Sprint("contested ", i))
		if won := s.compete("Save", s.db.Save, func(who string) task.Operation {
			op := op
			op.Error = who
			return op
		}); won != nil {
			s.want = append(s.want, *won)
		}
		s.verify("after concurrent Saves")
		if won := s.compete("Update", s.db.Update, func(who string) task.Operation {
			op := in(task.StateFailed, op)
			op.Error = who
			return op
		}); won != nil {
			s.want[len(s.want)-1] = *won
		}
		s.verify("after concurrent Updates")
	}
}

// compete makes several goroutines write an operation at the same time. It returns the
// version that was stored.
func (s *session) compete(method string, write func(*task.Operation) error, of func(who string) task.Operation) *task.Operation {
	ops, errs := make([]task.Operation, 8), make([]error, 8)
	start := make(chan struct{})
	var all sync.WaitGroup
	for i := range ops {
		ops[i] = of(fmt.Sprint("goroutine ", i))
		op := ops[i]
		all.Go(func() {
			<-start
			errs[i] = write(&op)
		})
	}
	close(start)
	all.Wait()
	var won *task.Operation
	n := 0
	for i, err := range errs {
		switch {
		case err == nil:
			won = &ops[i]
			n++
		case method == "Update":
			s.answer("Update of an operation that another call has finished", err, task.ErrNotFound)
		}
	}
	if n != 1 {
		s.errorf("%d of %d calls of %s for the same ID succeeded, want 1: %v", n, len(ops), method, errs)
	}
	return won
}

// patience bounds manager calls that should return at once.
const patience = 10 * time.Second

// quiet makes a manager log nothing.
var quiet = task.WithLogger(slog.New(slog.DiscardHandler))

func manages(s *session) {
	left := in(task.StateRunning, s.new("left by a dead process"))
	s.save(left)
	if !s.reopen() {
		return
	}
	if got, err := s.db.List(1, 1); err != nil || len(got) > 0 { // otherwise New would never end
		s.errorf("List(limit 1, offset 1) of one operation = %s, %v, want none", names(got), err)
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
	s.want = nil
	s.wait(ctx, m, &left, task.StateFailed)
	for _, state := range states[2:] {
		op, err := m.Submit("to be "+string(state), func(ctx context.Context, update func(int)) (any, error) {
			update(40)
			switch state {
			case task.StateFailed:
				return "partial", errors.New("the error")
			case task.StateCancelled:
				<-ctx.Done()
			}
			return map[string]any{"n": 1}, ctx.Err()
		}, task.WithMetadata("tank"))
		if err != nil {
			s.errorf("Submit = %v", err)
			return
		}
		if state == task.StateCancelled {
			s.answer("Cancel", m.Cancel(op.ID), nil)
		}
		s.wait(ctx, m, op, state)
	}
	s.answer("Manager.Close", m.Close(), nil)
	s.verify("after the manager was closed")
	if s.reopen() {
		s.verify("opened again")
	}
}

func managesIDs(s *session) {
	for round := range 2 {
		m, err := task.New(s.db, quiet)
		if err != nil {
			s.errorf("task.New = %v", err)
			return
		}
		s.submitID(m, "kept", int32(1-round))
		s.submitID(m, fmt.Sprint("new-", round), 1)
		s.answer("Manager.Close", m.Close(), nil)
		if !s.reopen() {
			return
		}
	}
}

// submitID makes many goroutines submit the same ID at once. want is how many of the
// functions should run.
func (s *session) submitID(m *task.Manager, id string, want int32) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var submitted, ran atomic.Int32
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			op, err := m.Submit(id, func(context.Context, func(int)) (any, error) {
				ran.Add(1)
				return nil, nil
			}, task.WithID(id))
			switch {
			case err == nil:
				submitted.Add(1)
			case !errors.Is(err, task.ErrExists):
				s.errorf("Manager.Submit = %s, %v, want an error that wraps task.ErrExists", show(op), err)
			}
		})
	}
	all.Wait()
	if got, err := m.Wait(ctx, id); err != nil || got.State != task.StateDone {
		s.errorf("Manager.Wait(%s) = %s, %v, want it DONE", short(id), show(got), err)
	}
	if submitted.Load() != want || ran.Load() != want {
		s.errorf("%d of 8 Submits of one ID have succeeded, and %d functions have run, want %d", submitted.Load(), ran.Load(), want)
	}
}

// wait waits for an operation that should end in the given state, and adds what the manager
// shows to s.want.
func (s *session) wait(ctx context.Context, m *task.Manager, op *task.Operation, state task.State) {
	got, err := m.Wait(ctx, op.ID)
	if err != nil || got.State != state {
		s.errorf("Manager.Wait(%s) = %s, %v, want it %s", short(op.Name), show(got), err, state)
		return
	}
	s.want = append(s.want, *got)
}
