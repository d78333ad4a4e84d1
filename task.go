// Package task runs, tracks, persists and recovers long-running background
// operations inside one program.
//
// A [Manager] takes functions and runs each in a goroutine of its own, as an
// [Operation] with an ID, a state, a progress in percent, a result and an
// error. Operations are stored in a [Persistence], by default in memory, usually
// in an SQLite file ([OpenSQLite]) or in the application's own SQLite database
// ([NewSQLiteStore]). What the manager has acknowledged is stored: Submit
// returns once the operation's row is committed, and a final state is shown
// only once it is. Operations that a crash interrupted are marked as failed
// when the next manager starts.
//
//	store, err := task.OpenSQLite("tasks.db")
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer store.Close()
//	manager, err := task.New(store)
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer manager.Close()
//
//	op, err := manager.Submit("scrub tank", func(ctx context.Context, update func(int)) (any, error) {
//		update(50)
//		return "no errors found", nil
//	})
//
// # States
//
// An operation is PENDING until its function starts, RUNNING until its final
// state is stored, and then DONE, FAILED or CANCELLED for good.
//
// # What callers hold
//
// Every *Operation that the package returns is a snapshot: a value of its own
// that never changes. To see what has changed, ask again with [Manager.Get] or
// [Manager.List], wait with [Manager.Wait], or follow with [Manager.Watch].
//
// # Several managers
//
// Several managers, in one process or in several, may share one SQLite
// database. Each runs what was submitted to it, and sees and cancels the
// operations of all. When a process dies, the next manager to start marks what it
// left behind as failed, or resumes it (see [WithResume]), and leaves the
// operations of the living alone.
package task

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"runtime/pprof"
	"runtime/trace"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/mynt-nas/task/internal/queue"
)

// A State says where an operation is in its life.
type State string

// The states, as stored in the database and shown in JSON.
const (
	StatePending   State = "PENDING"   // accepted and stored, not started yet
	StateRunning   State = "RUNNING"   // its function runs, or its final state waits to be stored
	StateDone      State = "DONE"      // its function returned no error
	StateFailed    State = "FAILED"    // its function returned an error or panicked, or the program ended under it
	StateCancelled State = "CANCELLED" // a user cancelled it
)

// Finished reports whether s is final: DONE, FAILED or CANCELLED.
// A finished operation never changes again.
func (s State) Finished() bool {
	return s == StateDone || s == StateFailed || s == StateCancelled
}

// live is not the same as not Finished: other code may have stored other states.
func (s State) live() bool {
	return s == StatePending || s == StateRunning
}

// A Func is the work of one operation.
//
// It should return soon after ctx is done; [context.Cause] then says why: it
// wraps [ErrCancelled], [ErrClosed] or [ErrLost]. It reports progress in percent by calling
// update, from any goroutine and as often as it likes: a call takes some
// nanoseconds, never waits for the database and never fails. Values outside
// 0..100 are clamped, and calls after the function has returned do nothing.
//
// The returned value becomes [Operation.Result] by way of JSON. A value that
// JSON can't hold, or that takes more than 16 MiB as JSON, is dropped, and
// [Operation.Error] says why. A value returned with an error is stored with it.
// A panic fails the operation, not the program.
//
// A Func must not call [Manager.Close], [Manager.Shutdown] or [Manager.Drain] of
// its own manager: they wait for it to return. Nor must it wait for an operation
// that needs its own slot (see [WithLimit]) or key (see [WithLock]).
type Func func(ctx context.Context, update func(progress int)) (interface{}, error)

// Errors to test for with [errors.Is]. What the package returns wraps them.
var (
	// ErrNotFound is returned when no operation has the given ID, by Cancel
	// also when the operation has already finished, and by a Persistence as
	// its methods say.
	ErrNotFound = errors.New("operation not found")

	// ErrClosed is returned by Submit after Close, Shutdown or Drain was called. It
	// is also the cause of the contexts that Close cancels, what Wait returns for
	// an operation whose final state Close could not store, and the last thing
	// that Watch yields.
	ErrClosed = errors.New("manager closed")

	// ErrCancelled is the cause of a context that Cancel cancelled, or is wrapped
	// by it if CancelCause did.
	ErrCancelled = errors.New("operation cancelled")

	// ErrExists is returned by Submit, together with the operation that exists,
	// as [WithID] and [WithUnique] say, and by a Persistence when it is to save an
	// ID that it has.
	ErrExists = errors.New("operation exists already")

	// ErrLost is wrapped by what a store returns that was taken for dead, while it
	// could not be reached, and whose operations others have recovered: of Submit,
	// as the cause of the contexts of the functions that run, and of Checkpoint,
	// SetMessage and SetMetadata in these. See [Recoverer].
	ErrLost = errors.New("operation lost: its manager was taken for dead")

	// ErrLagged is the last thing that Watch yields to a receiver that is too
	// slow.
	ErrLagged = errors.New("watcher too slow: events were dropped")
)

// wrap says in an error, if it is one, what failed.
func wrap(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("task: "+format+": %w", append(args, err)...)
}

// The texts in Operation.Error of operations that ended with their process or
// their manager.
const (
	errTextRestart  = "Task failed due to system restart"
	errTextShutdown = "Task failed due to system shutdown"
)

// An Option configures a [Manager].
type Option func(*options)

type options struct {
	log       *slog.Logger
	limit     int           // how many functions may run at once; 0 for any number
	retention time.Duration // how long to keep the history; 0 for ever
	resume    func(*Operation) (Func, []SubmitOption)
}

// WithLogger makes the manager log to l instead of [slog.Default]. It logs
// events that no method reports: recovered operations, panics with their stacks,
// results that could not be kept, and the beginning and end of trouble with
// the database. The handler of l is called from a goroutine of its own, one
// record at a time. If it blocks or panics, only records are lost: beyond 1,000
// that wait for it. [New] and [Manager.Close] wait up to a second for it.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l != nil {
			o.log = l
		}
	}
}

// WithLimit makes the manager run at most n functions at once. The operations
// beyond that are PENDING, without a goroutine of their own, and start in the
// order of their submission. A limit of 0 or less is none, as is the default.
func WithLimit(n int) Option {
	return func(o *options) { o.limit = max(n, 0) }
}

// WithRetention makes the manager delete operations from the history once they
// finished longer ago than age: at the start, and then every tenth of age, but
// at most once a second and at least once an hour. An age of 0 or less keeps
// them for good, as is the default. See [Manager.Prune].
func WithRetention(age time.Duration) Option {
	return func(o *options) { o.retention = max(age, 0) }
}

// WithResume has f called for each operation that the manager finds interrupted,
// with a snapshot of it, metadata included: by [New] before it returns, and later
// whenever the manager notices that another process on the database has died. If
// f returns a Func, the operation is this manager's from then on. It keeps its
// ID, CreatedAt and metadata, is PENDING again with neither progress nor message,
// and runs the Func when its turn comes, after what was submitted before it. If f
// returns nil, the operation is FAILED, as all are without WithResume. Of several
// managers that recover at the same time, one gets it, although the functions of
// all may have been asked: if that one is without WithResume, it is FAILED.
//
// Of the options, [WithLock] and those like it count, since keys are not stored;
// [WithMetadata] and others that set what is stored already are ignored. If an
// option fails, or f panics, that is logged and the operation is FAILED. An
// operation that somebody had asked to cancel is FAILED without asking f. With
// WithResume, [Manager.Drain] leaves what is PENDING for the next start to resume.
//
// The calls come one at a time. f should return soon: until then New does not
// return, nor does Close, and this manager recovers and resumes nothing else.
func WithResume(f func(op *Operation) (Func, []SubmitOption)) Option {
	return func(o *options) { o.resume = f }
}

// A SubmitOption configures one operation.
type SubmitOption func(*task) error

// apply applies the options of a new task.
func (t *task) apply(opts []SubmitOption) error {
	for _, opt := range opts {
		if opt == nil {
			continue
		}
		if err := opt(t); err != nil {
			return err
		}
	}
	return nil
}

// WithMetadata gives the operation metadata: any value that JSON can hold in
// 16 MiB, such as the name of a pool, or of the user who asked. Submit returns
// an error for any other value. A Func can replace it with [SetMetadata].
func WithMetadata(v any) SubmitOption {
	return func(t *task) error {
		metadata, err := encode(v)
		if err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
		t.op.Metadata = metadata
		return nil
	}
}

// WithLock makes the operation wait, PENDING, for all operations that were
// submitted before it to the same manager with the same key: of one key, one
// runs at a time, in the order of submission. It holds back no other: with
// [WithLimit], a free slot goes to the oldest operation whose key is free. The
// key is free again when the function has returned.
//
// Given several times, it takes several keys, all at once: no two operations
// ever wait for each other. While an operation waits for one of its keys, later
// ones that need another of them wait behind it.
//
// Submit returns an error if the key is empty.
func WithLock(key string) SubmitOption {
	return func(t *task) error {
		if key == "" {
			return errors.New("the lock's key is empty")
		}
		t.ticket.Require(key)
		return nil
	}
}

// WithID gives the operation an ID of the caller's choice. While there is an
// operation with that ID, live or in the history, whichever manager runs it or
// has run it, Submit returns that operation and an error that wraps
// [ErrExists], and the function is never called. So a request that is sent
// again, or a job that a scheduler submits again after a restart, is done at
// most once for as long as the history keeps it. To do again what was
// interrupted (see [Operation.Interrupted]), submit it with another ID.
//
// Of several Submits of one ID at the same time, in whatever process, one
// succeeds. In one manager the others wait until it has, and if it fails, they
// return the same error.
//
// An ID is 1 to 200 bytes of printable ASCII without spaces, slashes,
// backslashes and the characters ?, # and %. It is not ".", "..", "events", "ui"
// or "openapi.json", which are paths of package taskhttp. Submit returns an error
// for anything else.
func WithID(id string) SubmitOption {
	return func(t *task) error {
		ok := len(id) > 0 && len(id) <= 200 && !slices.Contains([]string{".", "..", "events", "ui", "openapi.json"}, id)
		for _, c := range []byte(id) {
			ok = ok && c > ' ' && c < 0x7f && !strings.ContainsRune(`/\?#%`, rune(c))
		}
		if !ok {
			return fmt.Errorf("the ID %.40q is not 1 to 200 bytes of printable ASCII without space, /, \\, ?, # and %%, or is reserved", id)
		}
		t.id, t.op.ID, t.given = id, id, true
		return nil
	}
}

// WithUnique gives the operation a key that no other unfinished operation of the
// same manager has. While there is one that has it, Submit returns that operation
// and an error that wraps [ErrExists], and the function is never called: two
// clicks on a button start one operation. The key is free again when the
// operation has finished.
//
// Given several times, all those keys are unique. Of several Submits of one key
// at the same time, one succeeds; the others wait until it has, and if it fails,
// they return the same error.
//
// Submit returns an error if the key is empty.
func WithUnique(key string) SubmitOption {
	return func(t *task) error {
		if key == "" {
			return errors.New("the unique key is empty")
		}
		t.unique = append(t.unique, key)
		return nil
	}
}

// A ListOption says which operations [Manager.List] returns. Of several that
// say the same, the last one counts.
type ListOption func(*Filter)

// ByState lets List return only operations in one of those states, or in any
// if none is given.
func ByState(states ...State) ListOption {
	return func(f *Filter) { f.States = slices.Compact(slices.Sorted(slices.Values(states))) }
}

// MaxValue lets List leave out metadata and results that take more than that many
// bytes as JSON: an [Omitted] is in their place, and [Manager.Get] returns them.
// SQLite does not read them, so that a list needs little memory. With 0 nothing
// is left out.
func MaxValue(bytes int) ListOption {
	return func(f *Filter) { f.MaxValue = max(bytes, 0) }
}

// ByName lets List return only operations with exactly that name, or with any
// if it is empty. No index helps with that: in a long history a rare name
// takes a while; see [WithContext].
func ByName(name string) ListOption {
	return func(f *Filter) { f.Name = validUTF8(name) }
}

// Containing lets List return only operations with that text in their name, or
// any if it is empty. ASCII letters match in either case. No index helps with that:
// see [ByName].
func Containing(text string) ListOption {
	return func(f *Filter) { f.Containing = validUTF8(text) }
}

// ByMetadata lets List return only operations whose metadata is a JSON object in
// which the member with that key is that very string. Of several keys, all have to
// match. No index helps with that: see [ByName].
func ByMetadata(key, value string) ListOption {
	return func(f *Filter) {
		if f.Metadata == nil {
			f.Metadata = make(map[string]string)
		}
		f.Metadata[validUTF8(key)] = validUTF8(value)
	}
}

// FinishedAfter lets List return only operations that finished at t or later, or
// any if t is zero. Together, FinishedAfter and [FinishedBefore] say when the range
// of time begins and ends: what finished when it ends is not in it.
func FinishedAfter(t time.Time) ListOption {
	return func(f *Filter) { f.FinishedAfter = t }
}

// FinishedBefore lets List return only operations that finished before t, or any if
// t is zero.
func FinishedBefore(t time.Time) ListOption {
	return func(f *Filter) { f.FinishedBefore = t }
}

// ByFinish lets List return only finished operations, the one that finished last
// first. Those that finished in the same microsecond are in the order without
// ByFinish. [Before] and the offset count in that order.
//
// Before an operation that is not finished, or that has been deleted, is
// [ErrNotFound].
func ByFinish() ListOption {
	return func(f *Filter) { f.ByFinish = true }
}

// WithoutResults lets List leave out all results: Result is nil. SQLite does not
// read them.
func WithoutResults() ListOption {
	return func(f *Filter) { f.WithoutResults = true }
}

// Before restricts List to operations submitted before the one with that ID,
// or not at all if it is empty. With the last operation of a page it leads to the
// next page, whatever has been submitted meanwhile, and with SQLite as fast as
// to the first one.
//
// If that operation has been deleted, List continues from where it was, by the
// time in its ID. An unknown ID that is no UUIDv7 is [ErrNotFound].
func Before(id string) ListOption {
	return func(f *Filter) { f.Before = id }
}

// WithContext makes List return ctx's error once ctx is done, so that a search of a
// long history ends when its caller no longer needs it. An SQLite store notices that
// after some thousand rows, other stores at the latest when they have answered.
func WithContext(ctx context.Context) ListOption {
	return func(f *Filter) { f.Context = ctx }
}

// A life is what Wait and Watch see of an operation. The manager's mutex guards
// it until done is closed; then it never changes.
type life struct {
	op     *Operation    // what it points to never changes
	stored State         // as the database has it; "" until the first row is stored
	err    error         // why there will be no final state
	done   chan struct{} // closed once the final state is stored, or err is set
}

// endedLife returns the life of an operation that will not change any more, and of
// which a row is stored.
func endedLife(row *Operation, err error) *life {
	l := &life{op: row, stored: row.State, err: err, done: make(chan struct{})}
	close(l.done)
	return l
}

// visible reports whether others may see it.
func (l *life) visible() bool { return l.stored != "" || l.err != nil }

// A task is an operation that this manager runs: from Submit until its final
// state is stored. Its manager's mutex guards what is not marked otherwise.
type task struct {
	// Immutable once claimed.
	id, name string
	given    bool   // the caller gave the ID: until the first row is stored, it may be another's
	number   uint64 // by order of submission
	fn       Func
	created  time.Time // of the task, with its monotonic reading
	base     time.Time // of the operation, at that moment
	unique   []string  // keys

	inserted  chan struct{} // closed once the store has answered to the first row
	insertErr error         // its answer; set before that

	word atomic.Uint64 // see report

	life
	final  *Operation // how it ended, once that is decided; what it points to never changes
	cancel context.CancelCauseFunc
	ticket queue.Ticket[*task]

	listed  bool  // in backlog.changed
	refused error // why the store did not take final

	checkpoints []chan error // of calls of Checkpoint that wait for a commit
}

// taskOf returns a task that begins with an operation.
func taskOf(op *Operation) *task {
	t := &task{
		id:       op.ID,
		name:     op.Name,
		created:  time.Now(),
		base:     op.UpdatedAt,
		inserted: make(chan struct{}),
		life:     life{op: op, done: make(chan struct{})},
	}
	t.ticket.Item = t
	return t
}

// hidden reports whether nobody may find the task by its ID yet.
func (t *task) hidden() bool { return t.given && t.stored == "" }

// The word of a task holds what a function changes without the mutex: its
// progress and two flags.
const (
	progressBits = 1<<7 - 1
	wordReported = 1 << 7 // the manager knows of a report that it has yet to take over
	wordReturned = 1 << 8 // the function has returned, or will never be called
)

// report is what update does. It returns true if the manager has to know: once,
// until takeOver.
func (t *task) report(progress int) (first bool) {
	progress = min(max(progress, 0), 100)
	for {
		word := t.word.Load()
		if word&wordReturned != 0 || int(word&progressBits) == progress {
			return false
		}
		next := word&^progressBits | uint64(progress) | wordReported
		if t.word.CompareAndSwap(word, next) {
			return word&wordReported == 0
		}
	}
}

// takeOver makes reported progress part of what is shown. The manager has
// to know of the next report.
func (t *task) takeOver() {
	word := t.word.And(^uint64(wordReported))
	if progress := int(word & progressBits); progress != t.op.Progress && t.final == nil {
		t.change(func(op *Operation) { op.Progress = progress })
	}
}

// change changes what is shown.
func (t *task) change(f func(op *Operation)) {
	op := *t.op
	op.UpdatedAt = t.now()
	f(&op)
	t.op = &op
}

// now returns the time for StartedAt and UpdatedAt: the wall clock's, or a
// later one if that has been set back since the operation was submitted or
// resumed.
func (t *task) now() time.Time {
	return latest(
		wall(),
		t.base.Add(time.Since(t.created)).Truncate(time.Microsecond),
		t.op.StartedAt,
		t.op.UpdatedAt,
	)
}

// wall returns the time of the wall clock in the form in which it is stored.
func wall() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }

func latest(times ...time.Time) time.Time {
	return slices.MaxFunc(times, time.Time.Compare)
}

// An outcome is how a function ended.
type outcome struct {
	state  State
	result any // nil or a json.RawMessage
	err    string
}

// finish decides how the operation ends, and reports whether that was still
// open. Every terminal transition comes through here.
func (t *task) finish(end outcome) bool {
	if t.final != nil {
		return false
	}
	t.word.Or(wordReturned)
	t.takeOver()
	final := *t.op
	final.State, final.Cancelling = end.state, false
	if end.state == StateDone {
		final.Progress, final.Message = 100, ""
	}
	final.Result = end.result
	final.Error = validUTF8(end.err)
	final.UpdatedAt = t.now()
	t.final = &final
	return true
}

// run calls the function and sets end, also if runtime.Goexit ends the
// goroutine. All the code that the user supplies runs in here: the function,
// its error's Error, its value's MarshalJSON.
func (t *task) run(ctx context.Context, update func(int), log *slog.Logger, end *outcome) {
	*end = outcome{state: StateFailed, err: "the function called runtime.Goexit"}
	defer func() {
		if r := recover(); r != nil {
			*end = outcome{state: StateFailed, err: fmt.Sprint("panic: ", r)}
			log.Error("task: function panicked", "id", t.id, "name", t.name,
				"panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		}
	}()
	ctx, region := trace.NewTask(ctx, t.name)
	defer region.End()
	ctx = pprof.WithLabels(ctx, pprof.Labels("task", t.name, "task_id", t.id))
	pprof.SetGoroutineLabels(ctx) // for good: the goroutine ends soon after
	value, err := t.fn(ctx, update)
	t.word.Or(wordReturned)
	*end = ending(context.Cause(ctx), err)
	if err := end.setResult(value); err != nil {
		log.Error("task: result not kept", "id", t.id, "name", t.name, "err", err)
	}
}

// ending returns how a function ended that has returned err after its context
// was cancelled for cause, or without that if cause is nil.
func ending(cause, err error) outcome {
	if err == nil {
		return outcome{state: StateDone}
	}
	end := outcome{state: StateFailed, err: err.Error()}
	var why cancelled
	switch {
	case errors.Is(cause, ErrCancelled):
		end.state = StateCancelled
		errors.As(cause, &why)
	case errors.Is(cause, ErrClosed):
		why = errTextShutdown
	case end.err == "":
		end.err = fmt.Sprintf("the function returned an error without a text (%T)", err)
	}
	own := err == cause || err == context.Canceled
	switch {
	case why != "" && (own || end.err == ""):
		end.err = string(why)
	case why != "":
		end.err = string(why) + ": " + end.err
	}
	return end
}

// A cancelled is the cause of a context that was cancelled with that text.
type cancelled string

func (c cancelled) Error() string { return ErrCancelled.Error() + ": " + string(c) }

func (c cancelled) Unwrap() error { return ErrCancelled }

// setResult encodes the value that the function returned. If it can't be kept, the
// outcome says why.
func (o *outcome) setResult(value any) error {
	text := o.err
	o.err = joinText(text, "result not kept: encoding it did not return") // should it call runtime.Goexit
	result, err := encode(value)
	o.result, o.err = result, text
	if err != nil {
		o.err = joinText(text, "result not kept: "+err.Error())
	}
	return err
}

func joinText(a, b string) string {
	if a == "" {
		return b
	}
	return a + " (" + b + ")"
}
