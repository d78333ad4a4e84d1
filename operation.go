package task

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"runtime/pprof"
	"runtime/trace"
	"strings"
	"sync"
	"time"
)

// An Operation is a snapshot of one long-running piece of work: a plain value
// that never changes behind its holder's back, and that its holder may change
// without anybody noticing.
//
// It may be handed from goroutine to goroutine like any other value.
type Operation struct {
	ID       string `json:"id"` // a UUID, version 7
	Name     string `json:"name"`
	State    State  `json:"state"`
	Progress int    `json:"progress"` // percent, 0..100; 100 once DONE

	// Metadata and Result are what a round trip through JSON gives: nil, bool,
	// string, json.Number, []any or map[string]any, the same just after the
	// finish as after a restart. DecodeMetadata and DecodeResult give typed
	// access.
	Metadata interface{} `json:"metadata,omitempty"`
	Result   interface{} `json:"result,omitempty"`

	// Error is the text of the error that the function returned, or says what
	// else went wrong. That of an unfinished operation is not empty only while
	// its final state can't be stored; it then says which state and why.
	Error string `json:"error,omitempty"`

	// The times are in UTC, to the microsecond. StartedAt and UpdatedAt are
	// CreatedAt plus the time that has passed on the monotonic clock, so that
	// no duration is negative when somebody sets the clock back.
	CreatedAt time.Time `json:"created_at"`
	StartedAt time.Time `json:"started_at,omitzero"` // zero if it never started
	UpdatedAt time.Time `json:"updated_at"`          // the finish time, once finished

	manager *Manager // nil if the operation did not come from one
}

// Cancel does what [Manager.Cancel] does with op.ID.
func (op *Operation) Cancel() error {
	if op == nil || op.manager == nil {
		return errors.New("task: cancel: the operation did not come from a Manager")
	}
	return op.manager.Cancel(op.ID)
}

// DecodeResult stores the result in the value that v points to, by the rules
// of [json.Unmarshal]. A missing result is decoded as JSON's null.
func (op *Operation) DecodeResult(v any) error {
	return convert(op.Result, v)
}

// DecodeMetadata does for the metadata what DecodeResult does for the result.
func (op *Operation) DecodeMetadata(v any) error {
	return convert(op.Metadata, v)
}

func convert(from, to any) error {
	raw, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, to)
}

func (op *Operation) setMetadata(v any) error {
	raw, err := encode(v)
	if err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	op.Metadata = rawOrNil(raw)
	return nil
}

// encode returns v as JSON, or nil for what JSON calls null. It returns an
// error for whatever can't make the round trip, a panicking MarshalJSON
// included.
func encode(v any) (raw json.RawMessage, err error) {
	if v == nil {
		return nil, nil
	}
	defer func() {
		if r := recover(); r != nil {
			raw, err = nil, fmt.Errorf("encoding %T as JSON: panic: %v", v, r)
		}
	}()
	raw, err = json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if !json.Valid(raw) { // Marshal nests deeper than Unmarshal reads
		return nil, fmt.Errorf("encoding %T as JSON: nested too deeply", v)
	}
	if string(raw) == "null" {
		return nil, nil
	}
	return raw, nil
}

// decode is the other half of the round trip. What is no JSON becomes nil:
// a bad cell in a database must not hide the rest of the row.
func decode(raw json.RawMessage) any {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if d.Decode(&v) != nil {
		return nil
	}
	if _, err := d.Token(); err != io.EOF {
		return nil
	}
	return v
}

// roundTrip gives the caller a copy of v of its own, as JSON makes it.
func roundTrip(v any) any {
	if v == nil {
		return nil
	}
	raw, _ := rawJSON(v)
	return decode(raw)
}

// rawJSON returns a value of an operation as JSON; what is encoded already, as
// it is.
func rawJSON(v any) (json.RawMessage, error) {
	if raw, ok := v.(json.RawMessage); ok {
		return raw, nil
	}
	return encode(v)
}

// encode makes Metadata and Result what stores are given.
func (op *Operation) encode() error {
	metadata, err := rawJSON(op.Metadata)
	if err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	result, err := rawJSON(op.Result)
	if err != nil {
		return fmt.Errorf("result: %w", err)
	}
	op.Metadata, op.Result = rawOrNil(metadata), rawOrNil(result)
	return nil
}

// rawOrNil keeps an empty json.RawMessage from becoming a non-nil interface.
func rawOrNil(raw json.RawMessage) any {
	if len(raw) == 0 {
		return nil
	}
	return raw
}

// validUTF8 makes s something that both a database and JSON give back as it is.
func validUTF8(s string) string {
	return strings.ToValidUTF8(s, "\uFFFD")
}

// A task is an operation that this manager answers for: from Submit until its
// final state is stored.
type task struct {
	// Immutable.
	manager *Manager
	fn      Func
	began   time.Time  // CreatedAt, with its monotonic reading
	first   Operation  // as submitted
	saved   chan error // gets the outcome of storing first

	// done is closed once the final state is stored, or is known never to be.
	done chan struct{}

	turn // guarded by manager.mu

	mu     sync.Mutex // guards what follows; manager.mu may be held when taking it
	op     Operation  // as shown; Metadata and Result are json.RawMessage or nil
	cancel context.CancelCauseFunc
	over   bool          // fn has returned, or never will be called
	final  *Operation    // how it ended, waiting to be stored; immutable once set
	failed chan struct{} // if not nil: closed when storing final fails
	err    error         // set before done is closed: why no final state is stored
	dirty  bool          // the writer knows that op has changed

	announced bool // the row is stored: watchers may know

	// What follows belongs to the writer's goroutine.
	doubtful bool  // Save returned an error: there should be no row
	refused  bool  // a change could not be stored
	writeErr error // why final could not be stored
	strikes  int   // see maxStrikes
}

// now returns the time on the task's own clock, which is never set back.
func (t *task) now() time.Time {
	return t.first.CreatedAt.Add(time.Since(t.began)).Truncate(time.Microsecond)
}

// snapshot returns the operation as it is shown to callers.
func (t *task) snapshot() *Operation {
	t.mu.Lock()
	op := t.op
	t.mu.Unlock()
	return t.manager.present(op)
}

// report is the update function of a Func.
func (t *task) report(progress int) {
	progress = min(max(progress, 0), 100)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over || t.op.Progress == progress {
		return
	}
	t.op.Progress = progress
	t.changed(false)
}

// changed has the writer store the operation some time soon, and the watchers
// told. The caller holds t.mu.
func (t *task) changed(state bool) {
	t.op.UpdatedAt = t.now()
	t.tell(state)
	if !t.dirty {
		t.dirty = true
		t.manager.writer.touch(t)
	}
}

// tell tells the watchers what the operation is now, at once if that is another
// state. The caller holds t.mu.
func (t *task) tell(state bool) {
	if t.announced && t.manager.hub.watched.Load() > 0 {
		t.manager.hub.tell(t.news(), state)
	}
}

// news returns what there is to tell. The caller holds t.mu.
func (t *task) news() news {
	return news{op: t.op, err: t.err}
}

// announce tells the watchers that there is such an operation.
func (t *task) announce() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.announced = true
	t.tell(true)
}

// start makes the task RUNNING, unless it has been cancelled meanwhile.
func (t *task) start(cancel context.CancelCauseFunc) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return false
	}
	t.cancel = cancel
	t.op.State = StateRunning
	t.op.StartedAt = t.now()
	t.changed(true)
	return true
}

// returned notes that fn has returned: what Cancel or Close do from here on
// changes nothing any more. It returns why the context was cancelled by then.
func (t *task) returned(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	return context.Cause(ctx)
}

// An outcome is how an operation ended.
type outcome struct {
	state  State
	result json.RawMessage
	err    string
}

// run is the goroutine of one operation.
func (t *task) run(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(context.WithValue(ctx, contextKey{}, t))
	defer cancel(nil)
	if ctx.Err() != nil { // closed before it could start
		t.finish(outcome{state: StateFailed, err: errTextShutdown})
		return
	}
	if !t.start(cancel) {
		return
	}
	// What stands in end if runtime.Goexit ends this goroutine.
	end := outcome{state: StateFailed, err: "the function called runtime.Goexit"}
	defer func() { t.finish(end) }()

	ctx, region := trace.NewTask(ctx, t.first.Name)
	defer region.End()
	labels := pprof.Labels("task", t.first.Name, "task_id", t.first.ID)
	pprof.Do(ctx, labels, func(ctx context.Context) { t.call(ctx, &end) })
}

// call calls fn and writes to end what comes of it. All the code that the user
// supplies runs in here: fn, its error's Error, its value's MarshalJSON. Each
// may panic, and each may call runtime.Goexit, upon which end holds what was
// known until then.
func (t *task) call(ctx context.Context, end *outcome) {
	defer func() {
		if r := recover(); r != nil {
			*end = outcome{state: StateFailed, err: fmt.Sprint("panic: ", r)}
			t.manager.log.Error("task: function panicked", "id", t.first.ID, "name", t.first.Name,
				"panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		}
	}()
	value, err := t.fn(ctx, t.report)
	cause := t.returned(ctx)
	if err == nil {
		*end = outcome{state: StateDone, err: "result not kept: MarshalJSON called runtime.Goexit"}
	} else {
		*end = outcome{state: StateFailed, err: err.Error()}
		switch {
		case errors.Is(cause, ErrCancelled):
			end.state = StateCancelled
		case errors.Is(cause, ErrClosed):
			end.err = errTextShutdown + ": " + end.err
		}
	}
	result, encodeErr := encode(value)
	end.result = result
	if err == nil {
		end.err = ""
	}
	if encodeErr != nil {
		end.err = joinText(end.err, "result not kept: "+encodeErr.Error())
		t.manager.log.Error("task: result not kept", "id", t.first.ID, "name", t.first.Name, "err", encodeErr)
	}
}

func joinText(a, b string) string {
	if a == "" {
		return b
	}
	return a + " (" + b + ")"
}

// finish decides how the operation ends and has that stored. Every terminal
// transition comes through here; only the first one of a task counts.
func (t *task) finish(end outcome) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.finishLocked(end)
}

// finishLocked is finish for a caller that holds t.mu.
func (t *task) finishLocked(end outcome) {
	if t.final != nil {
		return
	}
	t.over = true
	final := t.op
	final.State = end.state
	if end.state == StateDone {
		final.Progress = 100
	}
	final.Result = rawOrNil(end.result)
	final.Error = validUTF8(end.err)
	final.UpdatedAt = t.now()
	t.final = &final
	t.manager.writer.finish(t)
}

// finishing reports whether it is decided how the operation ends.
func (t *task) finishing() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.final != nil
}

// stop is Cancel: of a PENDING operation at once, of a RUNNING one by way of
// its context, and without any effect once its function has returned. For one
// that was PENDING it returns a channel that is closed if storing that fails.
func (t *task) stop() (failed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.op.State == StatePending {
		if t.failed == nil {
			t.failed = make(chan struct{})
		}
		t.finishLocked(outcome{state: StateCancelled})
		return t.failed
	}
	if !t.over {
		t.cancel(ErrCancelled)
	}
	return nil
}

type contextKey struct{}

// FromContext returns a snapshot of the operation whose [Func] was given ctx,
// or a context derived from it. It reports false for any other context.
func FromContext(ctx context.Context) (*Operation, bool) {
	t, ok := ctx.Value(contextKey{}).(*task)
	if !ok {
		return nil, false
	}
	return t.snapshot(), true
}

// SetMetadata replaces the metadata of the operation whose [Func] was given
// ctx. Like progress it is seen at once and stored soon after. It returns an
// error if ctx is no such context, if JSON can't hold v, or if the function
// has returned.
func SetMetadata(ctx context.Context, v any) error {
	t, ok := ctx.Value(contextKey{}).(*task)
	if !ok {
		return errors.New("task: set metadata: the context is not that of an operation")
	}
	var with Operation
	if err := with.setMetadata(v); err != nil {
		return fmt.Errorf("task: set metadata of %s: %w", t.first.ID, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return fmt.Errorf("task: set metadata of %s: its function has returned", t.first.ID)
	}
	t.op.Metadata = with.Metadata
	t.changed(false)
	return nil
}
