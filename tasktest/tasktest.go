// Package tasktest helps to test stores and programs that use package task.
// [TestPersistence] checks a store against the contract of [task.Persistence]. [Inject]
// makes a store fail on purpose, to test how a program copes.
package tasktest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// TestPersistence checks a store against the contract of [task.Persistence] and of each
// optional ability that it has: [task.BatchWriter], [task.Recoverer],
// [task.FilteredLister], [task.Pruner], [task.Canceller] and [task.Notifier]. It runs one
// subtest per rule. A failing subtest reports the rule, what it expected and what it found.
//
// The function open opens the store whose data is in the directory dir, which is new and
// empty the first time. When open is called again for the same directory, the store must
// show the same operations. A store that is an [io.Closer] is closed before it is reopened
// and at the end. For a store without files, open can keep a map from dir to store.
//
// The operations resemble those of a manager: IDs are UUIDs, texts are valid UTF-8, and
// times are in UTC with microsecond precision. Run the tests with the race detector,
// because many goroutines call the store concurrently.
func TestPersistence(t *testing.T, open func(dir string) (task.Persistence, error)) {
	for _, c := range slices.Concat(methodChecks, batchChecks, recoverChecks, filterChecks, pruneChecks, otherChecks) {
		t.Run(c.name, func(t *testing.T) {
			if err := c.run(t.TempDir(), open); errors.Is(err, errUnable) {
				t.Skip(err)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// A check tests one rule of the contract.
type check struct {
	name string
	rule string
	has  func(task.Persistence) bool // reports whether a store has the ability; nil if every store does
	test func(*session)
}

// can returns a function that reports whether a store has an ability. The store must have
// the method, and a call that changes nothing must not return errors.ErrUnsupported.
func can[I task.Persistence](try func(I) error) func(task.Persistence) bool {
	return func(db task.Persistence) bool {
		i, ok := db.(I)
		return ok && !errors.Is(try(i), errors.ErrUnsupported)
	}
}

var (
	canBatch = can(func(db task.BatchWriter) error {
		return errors.Join(db.WriteBatch(nil, []*task.Operation{{ID: "unknown", State: task.StateRunning}})...)
	})
	canRecover = can(func(db task.Recoverer) error {
		for _, err := range db.Recover("", nil) {
			return err
		}
		return nil
	})
	canFilter = can(func(db task.FilteredLister) error {
		_, err := db.ListFiltered(task.Filter{Name: "unknown"}, 1, 0)
		return err
	})
	canPrune = can(func(db task.Pruner) error {
		for _, err := range db.Prune(time.Time{}) {
			return err
		}
		return nil
	})
)

var errUnable = errors.New("the store does not have this ability")

// run checks the store in a new directory. The error states the rule and each violation.
func (c check) run(dir string, open func(dir string) (task.Persistence, error)) error {
	s := &session{
		open: func() (task.Persistence, error) { return open(dir) },
		rand: rand.New(rand.NewPCG(0, 0)),
	}
	if s.reopen() {
		if c.has != nil && !c.has(s.db) {
			s.errs = []error{errUnable}
		} else {
			c.test(s)
		}
	}
	s.close()
	if len(s.errs) == 0 {
		return nil
	}
	const most = 5
	if n := len(s.errs); n > most {
		s.errs = append(s.errs[:most], fmt.Errorf("and %d more", n-most))
	}
	return fmt.Errorf("%s\n%w", c.rule, errors.Join(s.errs...))
}

// A session is a store under test, its expected content, and the violations found so far.
type session struct {
	open func() (task.Persistence, error)
	db   task.Persistence
	rand *rand.Rand

	mu   sync.Mutex       // guards what follows
	want []task.Operation // the expected content, in order of Save
	errs []error
}

func (s *session) errorf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.errs = append(s.errs, fmt.Errorf(format, args...))
}

// reopen closes the store and opens it again. It reports whether that succeeded.
func (s *session) reopen() bool {
	s.close()
	db, err := s.open()
	if err != nil || db == nil {
		s.errorf("open = %v, %v, want a store", db, err)
		return false
	}
	s.db = db
	return true
}

func (s *session) close() {
	if c, ok := s.db.(io.Closer); ok {
		if err := c.Close(); err != nil {
			s.errorf("Close = %v, want nil", err)
		}
	}
	s.db = nil
}

// noon is the time of the operations in most checks. Operations differ only where the rule
// requires it, so that a wrong store fails only the check of the rule that it breaks.
var noon = time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC)

// new returns a new operation. IDs are random, so their order is not the order of creation.
func (s *session) new(name string) task.Operation {
	r := s.rand
	return task.Operation{
		ID: fmt.Sprintf("%08x-%04x-7%03x-8%03x-%012x",
			r.Uint32(), r.Uint32N(1<<16), r.Uint32N(1<<12), r.Uint32N(1<<12), r.Uint64N(1<<48)),
		Name:      name,
		State:     task.StatePending,
		CreatedAt: noon,
		UpdatedAt: noon,
	}
}

// saved returns a new operation that the store has saved.
func (s *session) saved(name string) task.Operation {
	op := s.new(name)
	s.save(op)
	return op
}

// in returns op in another state, with its other fields set to match.
func in(state task.State, op task.Operation) task.Operation {
	op.State = state
	op.UpdatedAt = op.CreatedAt.Add(2 * time.Second)
	if state != task.StatePending {
		op.StartedAt = op.CreatedAt.Add(time.Second)
		op.Progress = 40
		op.Message = "the message"
	}
	if state == task.StateDone {
		op.Progress = 100
		op.Result = json.RawMessage(`"the result"`)
	}
	if state == task.StateFailed {
		op.Error = "the error"
	}
	return op
}

// save calls Save and checks its result. As in all calls, the store gets its own copy of
// the operation.
func (s *session) save(op task.Operation) {
	want := s.expectSave(op)
	s.answer(fmt.Sprintf("Save(%s)", short(op.Name)), s.db.Save(&op), want)
}

// update calls Update and checks its result.
func (s *session) update(op task.Operation) {
	want := s.expectUpdate(op)
	s.answer(fmt.Sprintf("Update(%s to %s)", short(op.Name), op.State), s.db.Update(&op), want)
}

// batch calls WriteBatch and checks its results.
func (s *session) batch(saves, updates []task.Operation) {
	var want []error
	for _, op := range saves {
		want = append(want, s.expectSave(op))
	}
	for _, op := range updates {
		want = append(want, s.expectUpdate(op))
	}
	errs := s.db.(task.BatchWriter).WriteBatch(copies(saves), copies(updates))
	if len(errs) == 0 && !slices.ContainsFunc(want, func(err error) bool { return err != nil }) {
		return
	}
	if len(errs) != len(want) {
		s.errorf("WriteBatch(%d saves, %d updates) returned %d errors, want one for each operation, or none if all are stored",
			len(saves), len(updates), len(errs))
		return
	}
	for i, op := range slices.Concat(saves, updates) {
		s.answer(fmt.Sprintf("WriteBatch(%d saves, %d updates), error %d, of %s in state %s",
			len(saves), len(updates), i, short(op.Name), op.State), errs[i], want[i])
	}
}

func copies(ops []task.Operation) (pointers []*task.Operation) {
	for _, op := range ops {
		pointers = append(pointers, &op)
	}
	return pointers
}

var errDuplicate = errors.New("the ID is already stored")

// expectSave applies a Save to s.want and returns the expected result.
func (s *session) expectSave(op task.Operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.find(op.ID) != nil {
		return errDuplicate
	}
	s.want = append(s.want, op)
	return nil
}

func (s *session) expectUpdate(op task.Operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.find(op.ID)
	if at == nil || at.State.Finished() {
		return task.ErrNotFound
	}
	op.Name, op.CreatedAt = at.Name, at.CreatedAt
	op.Cancelling = (at.Cancelling || op.Cancelling) && !op.State.Finished()
	*at = op
	return nil
}

// find returns the operation that should be stored under an ID, or nil. The caller must
// hold s.mu.
func (s *session) find(id string) *task.Operation {
	if i := slices.IndexFunc(s.want, func(op task.Operation) bool { return op.ID == id }); i >= 0 {
		return &s.want[i]
	}
	return nil
}

func (s *session) answer(call string, err, want error) {
	switch {
	case want == nil && err != nil:
		s.errorf("%s = %v, want nil", call, err)
	case want == errDuplicate && err == nil:
		s.errorf("%s = nil, want an error, since %v", call, want)
	case want == task.ErrNotFound && !errors.Is(err, want):
		s.errorf("%s = %v, want an error that wraps task.ErrNotFound", call, err)
	}
}

// verify checks that the store shows exactly the expected content. The session must not be
// in use by other goroutines.
func (s *session) verify(when string) {
	rows, err := s.db.List(len(s.want)+1, 0)
	if want := s.page(len(s.want), len(s.want)+1, 0); err != nil {
		s.errorf("%s: List = %v, want %d operations", when, err, len(want))
	} else if !samePage(rows, want) {
		s.errorf("%s: List shows %s, want %s", when, names(rows), names(want))
	} else {
		for i, row := range rows {
			s.same(when+": List", row, want[i])
		}
	}
	for i := range s.want {
		got, err := s.db.Get(s.want[i].ID)
		if err != nil {
			s.errorf("%s: Get(%s) = %v, want the operation", when, short(s.want[i].Name), err)
			continue
		}
		s.same(when+": Get", got, &s.want[i])
	}
}

// page returns the expected result of List once the first n operations of s.want are saved.
func (s *session) page(n, limit, offset int) (page []*task.Operation) {
	for i := n - 1; i >= 0 && len(page) < limit; i-- {
		if offset > 0 {
			offset--
		} else {
			page = append(page, &s.want[i])
		}
	}
	return page
}

func samePage(got, want []*task.Operation) bool {
	return slices.EqualFunc(got, want, func(a, b *task.Operation) bool { return a != nil && a.ID == b.ID })
}

func names(ops []*task.Operation) string {
	const most = 10
	var b strings.Builder
	fmt.Fprintf(&b, "%d operations [", len(ops))
	for i, op := range ops[:min(most, len(ops))] {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(show(op))
	}
	if len(ops) > most {
		b.WriteString(", ...")
	}
	b.WriteByte(']')
	return b.String()
}

func show(op *task.Operation) string {
	if op == nil {
		return "nil"
	}
	return fmt.Sprintf("%s %s", short(op.Name), op.State)
}

// same checks that two operations are equal.
func (s *session) same(what string, got, want *task.Operation) {
	if d := diff(got, want); d != "" {
		s.errorf("%s(%s): %s", what, short(want.Name), d)
	}
}

// diff lists the fields in which two operations differ. It returns "" if they are equal.
func diff(got, want *task.Operation) string {
	if got == nil {
		return "no operation"
	}
	var all []string
	field := func(name, got, want string) {
		if got != want {
			all = append(all, fmt.Sprintf("%s is %s, want %s", name, short(got), short(want)))
		}
	}
	value := func(name string, got, want any) {
		g, _ := got.(json.RawMessage)
		w, _ := want.(json.RawMessage)
		if len(g) == 0 || !bytes.Equal(g, w) { // if the bytes are equal, skip slow decoding
			field(name, jsonText(got), jsonText(want))
		}
	}
	field("ID", got.ID, want.ID)
	field("Name", got.Name, want.Name)
	field("State", string(got.State), string(want.State))
	field("Progress", fmt.Sprint(got.Progress), fmt.Sprint(want.Progress))
	field("Message", got.Message, want.Message)
	value("Metadata", got.Metadata, want.Metadata)
	value("Result", got.Result, want.Result)
	field("Error", got.Error, want.Error)
	field("CreatedAt", timeText(got.CreatedAt), timeText(want.CreatedAt))
	field("StartedAt", timeText(got.StartedAt), timeText(want.StartedAt))
	field("UpdatedAt", timeText(got.UpdatedAt), timeText(want.UpdatedAt))
	return strings.Join(all, "; ")
}

// jsonText encodes v as canonical JSON: keys are sorted, and numbers keep their digits.
func jsonText(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprintf("invalid JSON (%v)", err)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return fmt.Sprintf("invalid JSON (%v)", err)
	}
	raw, _ = json.Marshal(v)
	return string(raw)
}

func timeText(t time.Time) string { return t.Format(time.RFC3339Nano) }

// short quotes a text. It abbreviates a long text to both ends.
func short(text string) string {
	const most = 100
	if len(text) <= most {
		return fmt.Sprintf("%q", text)
	}
	return fmt.Sprintf("%q...%q (%d bytes)", text[:most/2], text[len(text)-most/2:], len(text))
}
