package modeltest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// FuzzModel executes scripts of API calls on one or two managers, and compares all
// results with a model that takes a few lines per call. Functions do only what the
// script orders, so that nothing depends on time.
func FuzzModel(f *testing.F) {
	s := func(actions ...[]byte) []byte { return slices.Concat(actions...) }
	blocked := []byte{playSubmit, 0, modelBlocked, 0, 1}
	quick := []byte{playSubmit, 0, modelQuick, 0, 1, 5, 0}
	seeds := [][]byte{
		nil,
		s(quick, quick, quick),
		s(blocked, []byte{playReport, 0, 42, playMetadata, 0, 3, playCancel, 0, 0, playEndOne, 0, endError, playCancel, 0, 0}),
		s(blocked, []byte{playCancel, 0, 0, playEndOne, 0, endValue, playLate, 0, playGet, 0, 0}),
		s(blocked, []byte{playEndOne, 0, endPanic}, blocked, []byte{playEndOne, 0, endGoexit}, blocked, []byte{playEndOne, 0, endBadValue}),
		s(blocked, []byte{playReopen, 0, 0, endError}, blocked, []byte{playReopen, 0, 1, endValue}),
		s(blocked, blocked, []byte{playCancel, 0, 0, playClose, 0, playReport, 0, 7, playCancel, 1, 0, playEndOne, 0, endError, playEndOne, 0, endError}, quick),
		s(blocked, []byte{playShutdown, 0}, quick, []byte{playEndOne, 0, endValue, playShutdown, 0, playReopen, 0, 0, 0}, quick),
		s([]byte{playReopen, 0, 1, 0}, blocked, quick, blocked, []byte{playReport, 1, 9, playCancel, 1, 0, playEndOne, 0, endError, playClose, 0, playEndOne, 0, 0}),
		s([]byte{playSubmit, 0, modelBlocked, 1, 1, playSubmit, 0, modelBlocked, 1, 1, playSubmit, 0, modelQuick, 2, 1, 0, 0, playCancel, 1, 0, playEndOne, 0, endValueError}),
		s([]byte{playReopen, 1, 2, 0}, blocked, []byte{playSubmit, 1, modelBlocked, 0, 2, playCancel, 0, 1, playWait, 0, 1, playReopen, 0, 0, endError, playGet, 1, 0, playEndOne, 0, endError}),
		s([]byte{playReopen, 0, 1, 0}, blocked, blocked, quick, blocked, blocked, []byte{playCancel, 3, 0, playEndOne, 0, 0, playEndOne, 0, 0}, blocked, []byte{playClose, 0, playEndOne, 0, endError}),
		s([]byte{playReopen, 0, 2, 0}, []byte{playSubmit, 0, modelBlocked, 1, 1, playSubmit, 0, modelBlocked, 1, 1, playSubmit, 0, modelBlocked, 2, 1, playSubmit, 0, modelBlocked, 1, 1, playSubmit, 0, modelBlocked, 0, 1},
			[]byte{playEndOne, 1, 0, playEndOne, 0, 0, playEndOne, 0, 0, playEndOne, 0, 0}),
		s([]byte{playSubmit, 0, modelUnique, 0, 0, 1}, []byte{playSubmit, 0, modelUnique + modelQuick, 0, 0, 1, 5, 0}, []byte{playEndOne, 0, endValue}, []byte{playSubmit, 0, modelUnique + modelQuick, 0, 0, 1, 5, 0}),
		s([]byte{playSubmit, 0, modelID, 0, 0, 1}, []byte{playReopen, 1, 0, 0}, []byte{playSubmit, 1, modelID + modelQuick, 0, 0, 1, 5, 0, playReopen, 0, 0, endError}, []byte{playSubmit, 0, modelID, 0, 0, 1}),
		s(blocked, blocked, []byte{playMessage, 0, 9, playMessage, 1, 255, playEndOne, 0, endError, playEndOne, 0, endValue}, quick, quick, []byte{playFind, 0, 6, 1, playFind, 0, 2, 1, playFind, 0, 4, 2}),
		s([]byte{playCrash, 0}, blocked, []byte{playSubmit, 0, modelUnique, 1, 0, 0, playMessage, 0, 3, playEndOne, 0, endValue, playFind, 0, 6, 0}),
		s(blocked, []byte{playCrash, 1, playCrash, 2, playFind, 0, 7, 1, playCrash, 0, playCancel, 3, 0, playEndOne, 0, endError}),
		s([]byte{playInvalid, 0, 0, playInvalid, 0, 1, playInvalid, 0, 2, playInvalid, 0, 3, playInvalid, 0, 4, playUnknown, 0, playList, 0, 0, 0, playList, 0, 1, 3}),
	}
	for _, script := range seeds {
		for kind := range byte(len(playStores)) {
			f.Add(kind, script)
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, script []byte) {
		p := newPlay(t, kind)
		r := &byteReader{script}
		for step := 0; len(r.data) > 0 && step < 60; step++ {
			playActions[int(r.byte())%len(playActions)](p, r)
			p.catchUp()
			if step%10 == 9 {
				p.checkAll()
			}
			if t.Failed() {
				t.Fatalf("after step %d", step)
			}
		}
		p.end()
	})
}

// The stores of FuzzModel: a function that returns another one, which opens the same
// store each time; and whether two managers may use the store at once.
var playStores = []func(t *testing.T) (open func() (task.Persistence, func() error), shared bool){
	func(*testing.T) (func() (task.Persistence, func() error), bool) {
		return kept(task.NewMemoryStore()), true
	},
	func(*testing.T) (func() (task.Persistence, func() error), bool) {
		return kept(testkit.Bare(task.NewMemoryStore())), false
	},
	func(t *testing.T) (func() (task.Persistence, func() error), bool) {
		return kept(testkit.OpenSQLite(t, ":memory:")), true
	},
	func(t *testing.T) (func() (task.Persistence, func() error), bool) {
		path := testkit.FastPath(t)
		return func() (task.Persistence, func() error) {
			s, err := task.OpenSQLite(path)
			testkit.Must(t, err)
			return s, s.Close
		}, true
	},
}

// kept returns the same store each time and never closes it, because closing would lose it.
func kept(db task.Persistence) func() (task.Persistence, func() error) {
	return func() (task.Persistence, func() error) { return db, func() error { return nil } }
}

// A play is the execution of a script, with the model of its effects.
type play struct {
	t        *testing.T
	open     func() (task.Persistence, func() error)
	shared   bool
	managers [2]*playManager // the second may be nil
	ops      []*playOp       // in order of submission
	resumes  *playOp         // the operation that a new manager resumes, or nil
	crashes  bool            // a row that is stored before a manager starts is an orphan
}

type playManager struct {
	*task.Manager
	db      task.Persistence
	closeDB func() error
	limit   int
	refuses bool
	closing chan error // receives the error of Close, if not nil
	closed  bool
}

// A playOp is the model of an operation.
type playOp struct {
	by      *playManager
	keys    []string
	unique  string           // of WithUnique; "" for none
	want    task.Operation   // what its manager should show
	history []task.Operation // all states shown so far
	cause   error            // why its context ended

	// Of a quick function: what it reports and how it ends.
	progress int
	ending   *playEnd

	// Between the script and the function.
	calls   atomic.Int32
	started chan playCall
	orders  chan func(playCall) *playEnd
	done    chan struct{} // receives a token after each order but the last
	call    playCall      // once started
	last    *task.Operation
}

// A playCall is the arguments of a function's call.
type playCall struct {
	ctx    context.Context
	update func(int)
}

// A playEnd is how a function ends.
type playEnd struct {
	kind  byte
	value any
}

// The ways in which a function ends.
const (
	endValue = iota
	endError
	endValueError
	endPanic
	endGoexit
	endBadValue
	endKinds
)

// The kinds of functions.
const (
	modelBlocked = iota // waits for orders
	modelQuick          // reports and ends without waiting
	modelKinds

	// To be added to a kind.
	modelUnique = 2 // with a unique key
	modelID     = 4 // with an ID of the script's choice
)

func newPlay(t *testing.T, kind byte) *play {
	kind %= byte(len(playStores))
	p := &play{t: t, crashes: kind != 2} // the rows of an SQLite store are not orphans before it is closed
	p.open, p.shared = playStores[kind](t)
	p.managers[0] = p.newManager(0)
	return p
}

func (p *play) newManager(limit int) *playManager {
	m := &playManager{limit: limit}
	m.db, m.closeDB = p.open()
	var err error
	m.Manager, err = task.New(m.db, testkit.Quiet, task.WithLimit(limit), task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
		if p.resumes == nil || p.resumes.want.ID != op.ID {
			return nil, nil
		}
		return p.resumes.function, []task.SubmitOption{task.WithLock("key 0"), task.WithUnique("unique 0")}
	}))
	testkit.Must(p.t, err)
	return m
}

// manager returns the manager that a byte of the script selects.
func (p *play) manager(b byte) *playManager {
	if m := p.managers[b%2]; m != nil {
		return m
	}
	return p.managers[0]
}

// op returns the operation that a byte of the script selects, or nil if there is none.
func (p *play) op(b byte) *playOp {
	if len(p.ops) == 0 {
		return nil
	}
	return p.ops[int(b)%len(p.ops)]
}

// running is op for operations whose functions run.
func (p *play) running(b byte) *playOp {
	var ops []*playOp
	for _, op := range p.ops {
		if op.want.State == task.StateRunning {
			ops = append(ops, op)
		}
	}
	if len(ops) == 0 {
		return nil
	}
	return ops[int(b)%len(ops)]
}

// The actions of a script.
const (
	playSubmit = iota
	playReport
	playMetadata
	playEndOne
	playCancel
	playGet
	playList
	playWait
	playLate
	playClose
	playShutdown
	playReopen
	playInvalid
	playUnknown
	playMessage
	playFind
	playCrash
)

var playActions = []func(p *play, r *byteReader){
	playSubmit:   (*play).submit,
	playReport:   (*play).report,
	playMetadata: (*play).setMetadata,
	playEndOne:   (*play).endOne,
	playCancel:   (*play).cancel,
	playGet:      (*play).get,
	playList:     (*play).list,
	playWait:     (*play).wait,
	playLate:     (*play).late,
	playClose:    (*play).close,
	playShutdown: (*play).shutdown,
	playReopen:   (*play).reopen,
	playInvalid:  (*play).invalid,
	playUnknown:  (*play).unknown,
	playMessage:  (*play).setMessage,
	playFind:     (*play).find,
	playCrash:    (*play).crash,
}

// newOp returns the model of a new operation.
func (p *play) newOp(m *playManager) *playOp {
	return &playOp{
		by:      m,
		started: make(chan playCall, 1),
		orders:  make(chan func(playCall) *playEnd, 2),
		done:    make(chan struct{}, 2),
		want:    task.Operation{Name: fmt.Sprint("op ", len(p.ops)), State: task.StatePending},
	}
}

func (p *play) submit(r *byteReader) {
	m := p.manager(r.byte())
	op := p.newOp(m)
	kind, opts := r.byte(), []task.SubmitOption(nil)
	for key, keys := 0, r.byte()%8; keys > 0; key, keys = key+1, keys/2 {
		if keys%2 > 0 {
			op.keys = append(op.keys, fmt.Sprint("key ", key))
			opts = append(opts, task.WithLock(op.keys[len(op.keys)-1]))
		}
	}
	if v := r.byte(); v > 0 {
		op.want.Metadata = fmt.Sprint(v)
		opts = append(opts, task.WithMetadata(op.want.Metadata))
	}
	opts = append(opts, op.exclusive(kind, r)...)
	if kind%modelKinds == modelQuick {
		op.progress, op.ending = int(r.byte()%101), newPlayEnd(r.byte())
		op.orders <- func(call playCall) *playEnd { call.update(op.progress); return nil }
		op.orders <- func(playCall) *playEnd { return op.ending }
	}
	got, err := m.Submit(op.want.Name, op.function, opts...)
	if m.refuses {
		if !errors.Is(err, task.ErrClosed) {
			p.t.Errorf("Submit after Close: %v, %v", got, err)
		}
		return
	}
	if exist := p.existing(op); exist != nil {
		i := slices.IndexFunc(exist, func(e *playOp) bool { return got != nil && e.want.ID == got.ID })
		if i < 0 || !errors.Is(err, task.ErrExists) {
			p.t.Fatalf("Submit: %+v, %v, want %v", got, err, task.ErrExists)
		}
		p.check("Submit", m, exist[i], got)
		return
	}
	if err != nil || op.want.ID != "" && op.want.ID != got.ID {
		p.t.Fatalf("Submit: %+v, %v", got, err)
	}
	op.want.ID = got.ID
	op.show()
	if p.turn(op) {
		p.oneOf(got, op.future())
	} else {
		p.oneOf(got, op.history)
	}
	p.ops = append(p.ops, op)
}

// exclusive gives the operation a unique key, an ID, or both.
func (op *playOp) exclusive(kind byte, r *byteReader) (opts []task.SubmitOption) {
	if kind&modelUnique != 0 {
		op.unique = fmt.Sprint("unique ", r.byte()%2)
		opts = append(opts, task.WithUnique(op.unique))
	}
	if kind&modelID != 0 {
		op.want.ID = fmt.Sprint("id-", r.byte()%4)
		opts = append(opts, task.WithID(op.want.ID))
	}
	return opts
}

// existing returns the operations that keep a new one from being submitted.
func (p *play) existing(op *playOp) (exist []*playOp) {
	for _, other := range p.ops {
		if other.want.ID == op.want.ID ||
			op.unique != "" && other.unique == op.unique && other.by == op.by && !other.want.State.Finished() {
			exist = append(exist, other)
		}
	}
	return exist
}

// future returns the states that the operation may still reach by itself.
func (op *playOp) future() []task.Operation {
	want := op.want
	future := []task.Operation{want}
	want.State = task.StateRunning
	future = append(future, want)
	if op.ending != nil {
		want.Progress = op.progress
		future = append(future, want, ended(want, op.ending, nil))
	}
	return future
}

func newPlayEnd(b byte) *playEnd {
	end := &playEnd{kind: b % endKinds}
	if end.kind == endValue || end.kind == endValueError {
		end.value = fmt.Sprint("value ", b/endKinds)
	}
	return end
}

var errPlay = errors.New("oh no")

// function is the Func of the operation.
func (op *playOp) function(ctx context.Context, update func(int)) (any, error) {
	op.calls.Add(1)
	call := playCall{ctx, update}
	op.started <- call
	for order := range op.orders {
		end := order(call)
		if end == nil {
			op.done <- struct{}{}
			continue
		}
		switch end.kind {
		case endError:
			return nil, errPlay
		case endValueError:
			return end.value, errPlay
		case endPanic:
			panic(errPlay)
		case endGoexit:
			runtime.Goexit()
		case endBadValue:
			return op.done, nil
		}
		return end.value, nil
	}
	return nil, nil
}

// ended returns the operation after its function has ended.
func ended(op task.Operation, end *playEnd, cause error) task.Operation {
	op.Result = end.value
	op.State, op.Cancelling = task.StateFailed, false
	switch end.kind {
	case endValue:
		op.State, op.Progress, op.Message = task.StateDone, 100, ""
	case endBadValue:
		op.State, op.Progress, op.Message = task.StateDone, 100, ""
		op.Error = "result not kept: json: unsupported type: chan struct {}"
	case endPanic:
		op.Error = "panic: oh no"
	case endGoexit:
		op.Error = "the function called runtime.Goexit"
	default:
		op.Error = "oh no"
		switch cause {
		case task.ErrCancelled:
			op.State = task.StateCancelled
		case task.ErrClosed:
			op.Error = testkit.ShutdownText + ": oh no"
		}
	}
	return op
}

func (op *playOp) finish(end *playEnd) {
	op.want = ended(op.want, end, op.cause)
	op.show()
}

// show records that the operation has changed.
func (op *playOp) show() { op.history = append(op.history, op.want) }

// catchUp starts, in the model, the operations that should have started, and checks
// that they have.
func (p *play) catchUp() {
	for again := true; again; {
		again = false
		for _, op := range p.ops {
			if op.want.State == task.StatePending && op.by.closing == nil && !op.by.closed && p.turn(op) {
				p.start(op)
				again = true
				break
			}
		}
	}
	for _, op := range p.ops {
		if op.want.State == task.StatePending && op.calls.Load() > 0 {
			p.t.Fatalf("%s was started before its turn", op.want.Name)
		}
	}
}

// turn reports whether the limit and the keys let an operation run.
func (p *play) turn(op *playOp) bool {
	n, earlier := 0, true
	for _, other := range p.ops {
		running := other.want.State == task.StateRunning
		if other.by != op.by || !running && other.want.State != task.StatePending {
			continue
		}
		if running {
			n++
		}
		earlier = earlier && other != op
		if (running || earlier) && slices.ContainsFunc(other.keys, func(key string) bool { return slices.Contains(op.keys, key) }) {
			return false
		}
	}
	return op.by.limit == 0 || n < op.by.limit
}

func (p *play) start(op *playOp) {
	op.call = receive(p.t, "the start of "+op.want.Name, op.started)
	op.want.State = task.StateRunning
	op.show()
	if op.ending != nil {
		receive(p.t, "the report of "+op.want.Name, op.done)
		op.want.Progress = op.progress
		op.show()
		op.finish(op.ending)
		p.finished(op)
	}
}

// receive receives from a channel. It fails the test after 30 seconds.
func receive[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(30 * time.Second):
		t.Fatalf("no %s within 30 seconds", what)
	}
	return v
}

// finished waits until an operation has finished.
func (p *play) finished(op *playOp) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	got, err := op.by.Wait(ctx, op.want.ID)
	if err != nil {
		p.t.Fatalf("Wait for %s: %v", op.want.Name, err)
	}
	p.exactly("Wait", op, got)
	stored, err := op.by.db.Get(op.want.ID)
	if err != nil || stored.State != op.want.State {
		p.t.Errorf("shown %s, stored: %+v, %v", op.want.State, stored, err)
	}
}

// exactly checks that a snapshot equals the model.
func (p *play) exactly(how string, op *playOp, got *task.Operation) {
	p.t.Helper()
	if !testkit.Same(op.want, *got) {
		p.t.Errorf("%s: got %+v\nwant %+v", how, got, op.want)
	}
	if got.UpdatedAt.Before(got.CreatedAt) || !got.StartedAt.IsZero() && (got.StartedAt.Before(got.CreatedAt) || got.UpdatedAt.Before(got.StartedAt)) ||
		got.StartedAt.IsZero() != (op.call.ctx == nil) {
		p.t.Errorf("%s: times %+v", how, got)
	}
	if !got.State.Finished() {
		return
	}
	if op.last == nil {
		op.last = got
	}
	if testkit.JSON(op.last) != testkit.JSON(got) {
		p.t.Errorf("%s: finished as %+v, and now is %+v", how, op.last, got)
	}
}

// oneOf checks that a snapshot is one of several.
func (p *play) oneOf(got *task.Operation, want []task.Operation) {
	p.t.Helper()
	for _, want := range want {
		if testkit.Same(want, *got) {
			return
		}
	}
	p.t.Errorf("got %+v\nwant one of %+v", got, want)
}

// check checks a manager's snapshot of an operation. For an operation of another
// manager, the snapshot is what is stored: a state that the other manager has shown
// before, with or without a later cancel request.
func (p *play) check(how string, m *playManager, op *playOp, got *task.Operation) {
	p.t.Helper()
	if m == op.by || op.want.State.Finished() {
		p.exactly(how, op, got)
	} else {
		var want []task.Operation
		for _, op := range op.history {
			op.Cancelling = got.Cancelling
			want = append(want, op)
		}
		p.oneOf(got, want)
	}
}

// order makes the function of an operation do something.
func (p *play) order(op *playOp, f func(playCall)) {
	op.orders <- func(call playCall) *playEnd { f(call); return nil }
	receive(p.t, "an order's end", op.done)
}

func (p *play) report(r *byteReader) {
	op, progress := p.running(r.byte()), int(r.byte())-50
	if op == nil {
		return
	}
	p.order(op, func(call playCall) { call.update(progress) })
	op.want.Progress = min(max(progress, 0), 100)
	op.show()
	p.look(op.by, op)
}

func (p *play) setMetadata(r *byteReader) {
	op, v := p.running(r.byte()), r.byte()
	if op == nil {
		return
	}
	p.order(op, func(call playCall) {
		if err := task.SetMetadata(call.ctx, make(chan int)); err == nil {
			p.t.Error("SetMetadata took a channel")
		}
		if err := task.SetMetadata(call.ctx, fmt.Sprint(v)); err != nil {
			p.t.Error(err)
		}
	})
	op.want.Metadata = fmt.Sprint(v)
	op.show()
	p.look(op.by, op)
}

func (p *play) setMessage(r *byteReader) {
	op, text := p.running(r.byte()), strings.Repeat("x", int(r.byte())*5)
	if op == nil {
		return
	}
	p.order(op, func(call playCall) {
		if err := task.SetMessage(call.ctx, text); err != nil {
			p.t.Error(err)
		}
	})
	op.want.Message = text[:min(len(text), 1000)]
	op.show()
	p.look(op.by, op)
}

// look checks what Get returns.
func (p *play) look(m *playManager, op *playOp) {
	p.t.Helper()
	got, ok := m.Get(op.want.ID)
	if !ok {
		p.t.Fatalf("%s is not found", op.want.Name)
	}
	p.check("Get", m, op, got)
}

func (p *play) endOne(r *byteReader) {
	op, end := p.running(r.byte()), newPlayEnd(r.byte())
	if op != nil {
		p.endOp(op, end)
	}
}

func (p *play) endOp(op *playOp, end *playEnd) {
	op.orders <- func(playCall) *playEnd { return end }
	op.finish(end)
	p.finished(op)
	p.closeReturns(op.by)
}

// closeReturns waits for Close if Close has nothing left to wait for.
func (p *play) closeReturns(m *playManager) {
	if m.closing == nil {
		return
	}
	for _, op := range p.ops {
		if op.by == m && !op.want.State.Finished() {
			return
		}
	}
	if err := receive(p.t, "Close", m.closing); err != nil {
		p.t.Errorf("Close: %v", err)
	}
	m.closing, m.closed = nil, true
}

func (p *play) cancel(r *byteReader) {
	op, m := p.op(r.byte()), p.manager(r.byte())
	if op == nil {
		return
	}
	err := m.Cancel(op.want.ID)
	switch {
	case op.want.State.Finished():
		if !errors.Is(err, task.ErrNotFound) {
			p.t.Errorf("Cancel of a finished operation: %v", err)
		}
	case err != nil:
		p.t.Errorf("Cancel: %v", err)
	case op.want.State == task.StatePending:
		op.want.State = task.StateCancelled
		op.show()
		p.finished(op)
	default:
		op.want.Cancelling = true // soon, if another manager runs it
		op.show()
		testkit.Must(p.t, testkit.Until(func() bool { got, _ := op.by.Get(op.want.ID); return got.Cancelling }))
		if op.cause == nil {
			op.cause = task.ErrCancelled
			receive(p.t, "the end of the context", op.call.ctx.Done())
		}
	}
	if op.cause != nil && context.Cause(op.call.ctx) != op.cause {
		p.t.Errorf("cause %v, want %v", context.Cause(op.call.ctx), op.cause)
	}
}

func (p *play) get(r *byteReader) {
	if op, m := p.op(r.byte()), p.manager(r.byte()); op != nil {
		p.look(m, op)
	}
}

func (p *play) list(r *byteReader) {
	p.listPage(p.manager(r.byte()), int(r.byte()), int(r.byte()))
}

func (p *play) listPage(m *playManager, limit, offset int) {
	p.t.Helper()
	got, err := m.List(limit, offset)
	var want []*playOp
	for i := len(p.ops) - 1 - offset; i >= 0 && len(want) < limit; i-- {
		want = append(want, p.ops[i])
	}
	if err != nil || got == nil || len(got) != len(want) {
		p.t.Fatalf("List(%d, %d): %d operations, %v, want %d", limit, offset, len(got), err, len(want))
	}
	for i, op := range want {
		if got[i].ID != op.want.ID {
			p.t.Fatalf("List(%d, %d)[%d] is %s, want %s", limit, offset, i, got[i].Name, op.want.Name)
		}
		p.check("List", m, op, got[i])
	}
}

// find lists finished operations, sorted by finish or not. The other states of another
// manager's operations are uncertain.
func (p *play) find(r *byteReader) {
	m, b, digit := p.manager(r.byte()), r.byte(), fmt.Sprint(r.byte()%10)
	states := []task.State{task.StateDone, task.StateFailed, task.StateCancelled}[:1+b%3]
	opts := []task.ListOption{task.ByState(states...), task.Containing("OP"), task.Containing(digit)}
	var want []*playOp
	for _, op := range slices.Backward(p.ops) {
		if slices.Contains(states, op.want.State) && strings.Contains(op.want.Name, digit) {
			want = append(want, op)
		}
	}
	if b&4 != 0 {
		opts = append(opts, task.ByFinish())
		slices.SortStableFunc(want, func(a, b *playOp) int { return b.last.UpdatedAt.Compare(a.last.UpdatedAt) })
	}
	for before := ""; ; { // in pages of two
		got, err := m.List(2, 0, append(opts, task.Before(before))...)
		if err != nil || len(got) != min(len(want), 2) {
			p.t.Fatalf("List: %+v, %v, want %d", got, err, len(want))
		}
		for i, op := range got {
			if op.ID != want[i].want.ID {
				p.t.Fatalf("List[%d] is %s, want %s", i, op.Name, want[i].want.Name)
			}
			p.exactly("List", want[i], op)
			before = op.ID
		}
		if want = want[len(got):]; len(want) == 0 {
			return
		}
	}
}

// wait calls Wait with a context that is done.
func (p *play) wait(r *byteReader) {
	op, m := p.op(r.byte()), p.manager(r.byte())
	if op == nil {
		return
	}
	got, err := m.Wait(done(), op.want.ID)
	if got == nil || op.want.State.Finished() != (err == nil) || err != nil && err != context.Canceled {
		p.t.Fatalf("Wait: %+v, %v", got, err)
	}
	p.check("Wait", m, op, got)
}

// done returns a context that is done.
func done() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// late does what a goroutine may do that outlives its function.
func (p *play) late(r *byteReader) {
	op := p.op(r.byte())
	if op == nil || !op.want.State.Finished() || op.call.ctx == nil {
		return
	}
	op.call.update(33)
	if err := task.SetMessage(op.call.ctx, "late"); err == nil {
		p.t.Error("SetMessage after the function's return: no error")
	}
	if err := task.SetMetadata(op.call.ctx, "late"); err == nil {
		p.t.Error("SetMetadata after the function's return: no error")
	}
	p.look(p.manager(0), op)
}

// close makes a manager begin to close. Close returns when the functions have ended.
func (p *play) close(r *byteReader) {
	m := p.manager(r.byte())
	p.beginClose(m)
	p.closeReturns(m)
}

func (p *play) beginClose(m *playManager) {
	if m.closing != nil {
		return
	}
	if m.closed {
		if err := m.Close(); err != nil {
			p.t.Errorf("Close again: %v", err)
		}
		return
	}
	if p.onlyCancelled(m) {
		// Otherwise nothing would show that Close has begun.
		if err := m.Shutdown(done()); err != context.Canceled {
			p.t.Errorf("Shutdown: %v", err)
		}
	}
	m.refuses = true
	closing := make(chan error, 1)
	m.closing = closing
	go func() { closing <- m.Close() }()
	for _, op := range p.ops {
		if op.by == m && op.want.State == task.StatePending {
			op.want.State, op.want.Error = task.StateFailed, testkit.ShutdownText
			op.show()
			p.finished(op)
		}
	}
	for _, op := range p.ops {
		if op.by == m && op.want.State == task.StateRunning && op.cause == nil {
			op.cause = task.ErrClosed
			receive(p.t, "the end of the context", op.call.ctx.Done())
		}
	}
}

// onlyCancelled reports whether a manager has operations, but none whose context
// Close will cancel.
func (p *play) onlyCancelled(m *playManager) bool {
	n := 0
	for _, op := range p.ops {
		if op.by != m || op.want.State.Finished() {
			continue
		}
		if n++; op.cause == nil {
			return false
		}
	}
	return n > 0
}

func (p *play) shutdown(r *byteReader) {
	m := p.manager(r.byte())
	if m.closing != nil {
		return
	}
	idle := !slices.ContainsFunc(p.ops, func(op *playOp) bool { return op.by == m && !op.want.State.Finished() })
	err := m.Shutdown(done())
	if idle && err != nil || !idle && err != context.Canceled {
		p.t.Errorf("Shutdown: %v", err)
	}
	m.refuses = true
	m.closed = m.closed || idle
}

// reopen replaces a manager by another one, or creates the second.
func (p *play) reopen(r *byteReader) {
	i, limit, end := r.byte()%2, int(r.byte()%4), r.byte()
	if i == 1 && !p.shared {
		return
	}
	if p.managers[i] != nil {
		p.leave(p.managers[i], end)
	}
	p.managers[i] = p.newManager(limit)
}

// crash replaces the only manager by another one, which finds an operation of a dead
// process. It resumes the operation, or not, or a cancel was requested.
func (p *play) crash(r *byteReader) {
	how := r.byte() % 3
	if p.managers[1] != nil || !p.crashes {
		return
	}
	p.leave(p.managers[0], endError)
	op, now := p.newOp(nil), time.Now().UTC()
	op.want.ID = fmt.Sprint("crashed-", len(p.ops))
	row := op.want
	row.State, row.Progress, row.Message, row.Cancelling = task.StateRunning, 40, "left", how == 2
	row.CreatedAt, row.UpdatedAt = now, now
	db, closeDB := p.open()
	testkit.Must(p.t, errors.Join(db.Save(&row), closeDB()))
	p.ops = append(p.ops, op)
	if p.resumes = nil; how != 1 {
		p.resumes = op
	}
	op.by = p.newManager(0)
	p.managers[0] = op.by
	if how == 0 {
		op.keys, op.unique = []string{"key 0"}, "unique 0"
		op.show()
		return
	}
	op.want.State, op.want.Progress, op.want.Message, op.want.Error = task.StateFailed, 40, "left", testkit.RestartText
	op.show()
	p.finished(op)
}

// leave closes a manager and its store.
func (p *play) leave(m *playManager, end byte) {
	p.beginClose(m)
	for _, op := range p.ops {
		if op.by == m && op.want.State == task.StateRunning {
			p.endOp(op, newPlayEnd(end))
		}
	}
	p.closeReturns(m)
	p.listPage(m, len(p.ops), 0)
	if err := m.closeDB(); err != nil {
		p.t.Error(err)
	}
	for _, op := range p.ops {
		if op.by == m {
			op.by = &playManager{Manager: m.Manager, closed: true} // no longer used
		}
	}
}

// invalid calls Submit and List with bad arguments.
func (p *play) invalid(r *byteReader) {
	m := p.manager(r.byte())
	name, fn, opts, want := "x", task.Func(testkit.UntilCancelled), []task.SubmitOption(nil), ""
	switch r.byte() % 5 {
	case 0:
		name, want = "", "name is empty"
	case 1:
		fn, want = nil, "function is nil"
	case 2:
		opts, want = []task.SubmitOption{task.WithMetadata(make(chan int))}, "metadata"
	case 3:
		opts, want = []task.SubmitOption{task.WithLock("")}, "key is empty"
	case 4:
		opts, want = []task.SubmitOption{task.WithLock("a"), task.WithLock("")}, "key is empty"
	}
	if op, err := m.Submit(name, fn, opts...); op != nil || err == nil || !strings.Contains(err.Error(), want) {
		p.t.Errorf("Submit: %v, %v, want an error with %q", op, err, want)
	}
	if _, err := m.List(-1, 0); err == nil || !strings.Contains(err.Error(), "negative limit") {
		p.t.Errorf("List: %v", err)
	}
	if _, err := m.List(0, -1); err == nil || !strings.Contains(err.Error(), "negative offset") {
		p.t.Errorf("List: %v", err)
	}
}

// unknown makes calls for an operation that does not exist.
func (p *play) unknown(r *byteReader) {
	m := p.manager(r.byte())
	id := string(r.bytes())
	if op, ok := m.Get(id); ok {
		p.t.Errorf("Get: %+v", op)
	}
	if err := m.Cancel(id); !errors.Is(err, task.ErrNotFound) || errors.Is(err, errors.ErrUnsupported) {
		p.t.Errorf("Cancel: %v", err)
	}
	if op, err := m.Wait(done(), id); op != nil || !errors.Is(err, task.ErrNotFound) {
		p.t.Errorf("Wait: %v, %v", op, err)
	}
}

// checkAll checks every manager's snapshot of every operation.
func (p *play) checkAll() {
	p.t.Helper()
	for _, m := range p.managers {
		if m == nil {
			continue
		}
		p.listPage(m, len(p.ops)+1, 0)
		for _, op := range p.ops {
			p.look(m, op)
		}
	}
}

// end closes everything, and checks what a new manager finds.
func (p *play) end() {
	p.checkAll()
	for _, m := range p.managers {
		if m != nil {
			p.leave(m, endError)
		}
	}
	p.managers = [2]*playManager{p.newManager(0)}
	p.checkAll()
	for _, op := range p.ops {
		want := int32(0)
		if op.call.ctx != nil {
			want = 1
		}
		if n := op.calls.Load(); n != want || !op.want.State.Finished() {
			p.t.Errorf("%s is %s, and was called %d times, want %d", op.want.Name, op.want.State, n, want)
		}
	}
	p.leave(p.managers[0], endError)
}

// A byteReader reads a script. At the end it returns zeros.
type byteReader struct{ data []byte }

func (r *byteReader) byte() byte {
	if len(r.data) == 0 {
		return 0
	}
	b := r.data[0]
	r.data = r.data[1:]
	return b
}

// bytes reads a length from the next byte, and returns that many bytes.
func (r *byteReader) bytes() []byte {
	n := min(int(r.byte()), len(r.data))
	b := r.data[:n]
	r.data = r.data[n:]
	return b
}
