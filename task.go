// Package task runs, tracks, persists and recovers long-running background
// operations inside one program.
//
// A [Manager] runs each function that it is given in its own goroutine, as an
// [Operation] with an ID, a state, a progress in percent, a result and an error.
// Operations are stored in a [Persistence]: by default in memory, usually in an
// SQLite file ([OpenSQLite]) or in the application's own SQLite database
// ([NewSQLiteStore]). Acknowledged means stored: Submit returns after the
// operation's row is committed, and a final state is shown only after it is
// committed. The next manager to start marks operations that a crash has
// interrupted as failed.
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
// Every *Operation that the package returns is a snapshot, which the package never
// changes again. To see changes, call [Manager.Get] or [Manager.List] again, wait with
// [Manager.Wait], or follow with [Manager.Watch].
//
// # Several managers
//
// Several managers, in one process or in many, may share one SQLite database. Each
// runs the operations submitted to it, and sees and cancels those of all. When a
// process dies, the next manager to start marks its unfinished operations as failed,
// or resumes them (see [WithResume]). Operations of live processes are left alone.
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
	StateRunning   State = "RUNNING"   // its function runs, or its final state is not stored yet
	StateDone      State = "DONE"      // its function returned no error
	StateFailed    State = "FAILED"    // its function returned an error or panicked, or its manager or process ended
	StateCancelled State = "CANCELLED" // it was cancelled
)

// Finished reports whether s is final: DONE, FAILED or CANCELLED.
// A finished operation never changes again.
func (s State) Finished() bool {
	return s == StateDone || s == StateFailed || s == StateCancelled
}

// live is not the opposite of Finished: other code may have stored other states.
func (s State) live() bool {
	return s == StatePending || s == StateRunning
}

// A Func is the work of one operation.
//
// A Func should return soon after ctx is done; [context.Cause] then returns an error
// that wraps [ErrCancelled], [ErrClosed] or [ErrLost]. It reports progress in percent
// by calling update, from any goroutine and as often as it likes: a call takes some ten
// nanoseconds, never waits for the database and never fails. Values are clamped to
// 0..100, and calls after the function has returned do nothing.
//
// The returned value becomes [Operation.Result], encoded as JSON. A value that JSON
// can't hold, or that takes more than 16 MiB as JSON, is dropped, and
// [Operation.Error] says why. A value returned together with an error is kept. A panic
// fails the operation, not the program.
//
// A Func must not call [Manager.Close], [Manager.Shutdown] or [Manager.Drain] of its
// own manager, which wait for it to return. Nor must it wait for an operation that
// needs the Func's slot (see [WithLimit]) or key (see [WithLock]).
type Func func(ctx context.Context, update func(progress int)) (interface{}, error)

// Errors to test for with [errors.Is]. Errors that the package returns wrap them.
var (
	// ErrNotFound is returned if no operation has the given ID, by Cancel also if
	// the operation has already finished, and by a Persistence as its methods say.
	ErrNotFound = errors.New("operation not found")

	// ErrClosed is returned by Submit after a call of Close, Shutdown or Drain. It is
	// also the cause of the contexts that Close cancels, the error of Wait for an
	// operation whose final state Close could not store, and the last error that
	// Watch yields.
	ErrClosed = errors.New("manager closed")

	// ErrCancelled is the cause of a context that Cancel has cancelled. After
	// CancelCause, the cause wraps it.
	ErrCancelled = errors.New("operation cancelled")

	// ErrExists is returned by Submit, together with the existing operation, as
	// [WithID] and [WithUnique] say, and by a Persistence that is to save an ID that
	// it already has.
	ErrExists = errors.New("operation already exists")

	// ErrLost says that others have taken the store for dead, because it was out of
	// reach, and have recovered its operations. Submit, Checkpoint, SetMessage and
	// SetMetadata return it, and it is the cause of the contexts of the functions
	// that still run. See [Recoverer].
	ErrLost = errors.New("operation lost: its manager was taken for dead")

	// ErrLagged is the last error that Watch yields to a receiver that is too slow.
	ErrLagged = errors.New("watcher too slow: events were dropped")
)

// wrap adds to an error, if it is not nil, what failed.
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
	retention time.Duration // how long to keep the history; 0 forever
	resume    func(*Operation) (Func, []SubmitOption)
}

// WithLogger makes the manager log to l instead of [slog.Default]. It logs events
// that no method reports: recovered operations, panics with their stacks, results
// that could not be kept, and when writes to the store start and stop failing. A
// separate goroutine calls l's handler, one record at a time. A handler that blocks or
// panics loses only records: those beyond the 1,000 that wait for it. [New] and
// [Manager.Close] wait for it for up to a second.
func WithLogger(l *slog.Logger) Option {
	return func(o *options) {
		if l != nil {
			o.log = l
		}
	}
}

// WithLimit makes the manager run at most n functions at once. Further operations are
// PENDING, need no goroutine, and start in order of submission. 0 or less means no
// limit, which is the default.
func WithLimit(n int) Option {
	return func(o *options) { o.limit = max(n, 0) }
}

// WithRetention makes the manager delete operations that finished longer ago than
// age: at the start, and then every tenth of age, but at most once a second and at
// least once an hour. 0 or less keeps the history forever, which is the default. See
// [Manager.Prune].
func WithRetention(age time.Duration) Option {
	return func(o *options) { o.retention = max(age, 0) }
}

// WithResume makes the manager call f for each interrupted operation that it finds,
// with a snapshot that includes the metadata: in [New] before it returns, and later
// whenever the manager notices that another process on the database has died.
//
// If f returns a Func, the operation belongs to this manager from then on. It keeps
// its ID, CreatedAt and metadata, is PENDING again without progress and message, and
// runs the Func after the operations submitted before it. If f returns a nil Func, the
// operation becomes FAILED, as all do without WithResume. If several managers recover
// at the same time, one of them gets the operation, although all may have called their
// f; if that one has no WithResume, the operation becomes FAILED.
//
// Of the options, only [WithLock] and [WithUnique] count, because keys are not stored.
// If an option fails or f panics, the manager logs that and the operation becomes
// FAILED. An operation with a cancel request becomes FAILED without a call of f. With
// WithResume, [Manager.Drain] leaves PENDING operations for the next start to resume.
//
// The manager calls f for one operation at a time. f should return soon: until then,
// New and Close do not return, and this manager recovers nothing else.
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

// WithMetadata gives the operation metadata: any value that JSON can hold in 16 MiB,
// such as the name of a pool or of a user. Submit returns an error for any other
// value. A Func can replace the metadata with [SetMetadata].
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

// WithLock makes the operation wait, PENDING, for all operations with the same key
// that were submitted before it to the same manager: the operations of one key run one
// at a time, in order of submission. They hold back no others: with [WithLimit], a
// free slot goes to the oldest operation whose keys are free. The key is free again
// when the function has returned.
//
// Given several times, WithLock takes all keys at once: no two operations ever wait for
// each other. While an operation waits for one of its keys, later operations that need
// another of them wait behind it.
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

// WithID gives the operation an ID of the caller's choice. If that ID already belongs
// to an operation of any manager, live or in the history, Submit returns that operation
// and an error that wraps [ErrExists], and never calls the function. So a request that
// is sent again, or a job that a scheduler submits again after a restart, runs at most
// once for as long as the history keeps it. To repeat an interrupted operation (see
// [Operation.Interrupted]), submit it with another ID.
//
// If one ID is submitted several times at once, in one process or in many, one Submit
// succeeds. Within one manager the others wait for it; if it fails, they return its
// error.
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

// WithUnique gives the operation a key that no other unfinished operation of the same
// manager may have. While another one has it, Submit returns that operation and an
// error that wraps [ErrExists], and never calls the function: two clicks on a button
// start one operation. The key is free again when the operation has finished.
//
// Given several times, WithUnique sets several keys. If one key is submitted several
// times at once, one Submit succeeds; the others wait for it, and if it fails, they
// return its error.
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

// A ListOption says which operations [Manager.List] returns. If two options set the
// same condition, the last one counts.
type ListOption func(*Filter)

// ByState restricts List to operations in one of those states. Without states, it
// restricts nothing.
func ByState(states ...State) ListOption {
	return func(f *Filter) { f.States = slices.Compact(slices.Sorted(slices.Values(states))) }
}

// MaxValue makes List replace metadata and results of more than that many bytes of
// JSON by an [Omitted]; [Manager.Get] returns them. SQLite does not read them, so that
// a list needs little memory. 0 or less means no limit.
func MaxValue(bytes int) ListOption {
	return func(f *Filter) { f.MaxValue = max(bytes, 0) }
}

// ByName restricts List to operations with exactly that name; an empty name restricts
// nothing. There is no index for it: finding a rare name in a long history takes a
// while; see [WithContext].
func ByName(name string) ListOption {
	return func(f *Filter) { f.Name = validUTF8(name) }
}

// Containing restricts List to operations with that text in their name; an empty text
// restricts nothing. ASCII letters match in either case. There is no index for it: see
// [ByName].
func Containing(text string) ListOption {
	return func(f *Filter) { f.Containing = validUTF8(text) }
}

// ByMetadata restricts List to operations whose metadata is a JSON object in which the
// member called key is exactly the string value. Given with several keys, all must
// match. There is no index for it: see [ByName].
func ByMetadata(key, value string) ListOption {
	return func(f *Filter) {
		if f.Metadata == nil {
			f.Metadata = make(map[string]string)
		}
		f.Metadata[validUTF8(key)] = validUTF8(value)
	}
}

// FinishedAfter restricts List to operations that finished at t or later; a zero t
// restricts nothing. With [FinishedBefore] it gives a range of time that excludes its
// end.
func FinishedAfter(t time.Time) ListOption {
	return func(f *Filter) { f.FinishedAfter = t }
}

// FinishedBefore restricts List to operations that finished before t; a zero t
// restricts nothing.
func FinishedBefore(t time.Time) ListOption {
	return func(f *Filter) { f.FinishedBefore = t }
}

// ByFinish restricts List to finished operations, and sorts them by finish time, latest
// first. Operations that finished in the same microsecond keep their usual order.
// [Before] and the offset count in this order.
//
// With ByFinish, [Before] with the ID of an operation that is unfinished or has been
// deleted is [ErrNotFound].
func ByFinish() ListOption {
	return func(f *Filter) { f.ByFinish = true }
}

// WithoutResults makes List leave out all results: Result is nil. SQLite does not read
// them.
func WithoutResults() ListOption {
	return func(f *Filter) { f.WithoutResults = true }
}

// Before restricts List to operations submitted before the one with that ID; an empty
// ID restricts nothing. Use the ID of a page's last operation as the cursor for the
// next page: operations submitted meanwhile don't matter, and with SQLite every page
// is as fast as the first.
//
// If that operation has been deleted, List continues from its place, by the time in
// its ID. An unknown ID that is not a UUIDv7 is [ErrNotFound].
func Before(id string) ListOption {
	return func(f *Filter) { f.Before = id }
}

// WithContext makes List return ctx's error once ctx is done, so that the search of a
// long history ends when its caller is gone. An SQLite store checks ctx every few
// thousand rows. With a store that doesn't, List still returns the error, but only
// after the store has answered.
func WithContext(ctx context.Context) ListOption {
	return func(f *Filter) { f.Context = ctx }
}

// A life is what Wait and Watch see of an operation. The manager's mutex guards it
// until done is closed; after that it is immutable.
type life struct {
	op     *Operation    // points to an immutable value
	stored State         // in the database; "" until the first row is stored
	err    error         // why there will be no final state
	done   chan struct{} // closed once the final state is stored, or err is set
}

// endedLife returns the life of an operation that will not change again and whose row
// is stored.
func endedLife(row *Operation, err error) *life {
	l := &life{op: row, stored: row.State, err: err, done: make(chan struct{})}
	close(l.done)
	return l
}

// visible reports whether callers may see the operation.
func (l *life) visible() bool { return l.stored != "" || l.err != nil }

// A task is an operation of this manager, from Submit until its final state is
// stored. The manager's mutex guards its fields, unless they say otherwise.
type task struct {
	// Immutable once claimed.
	id, name string
	given    bool   // the caller gave the ID: until the first row is stored, it may belong to another operation
	number   uint64 // in order of submission
	fn       Func
	created  time.Time // of the task, with its monotonic reading
	base     time.Time // of the operation, at that moment
	unique   []string  // keys

	inserted  chan struct{} // closed when the store has answered the insert of the first row
	insertErr error         // the answer; set before inserted is closed

	word atomic.Uint64 // see report

	life
	final  *Operation // the final state, once decided; points to an immutable value
	cancel context.CancelCauseFunc
	ticket queue.Ticket[*task]

	listed  bool  // in backlog.changed
	refused error // why the store did not take final

	checkpoints []chan error // of Checkpoint calls that wait for a commit
}

// taskOf returns a new task for an operation.
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

// hidden reports whether a lookup by ID must not find the task yet.
func (t *task) hidden() bool { return t.given && t.stored == "" }

// The word of a task holds what functions change without the mutex: the progress and
// two flags.
const (
	progressBits = 1<<7 - 1
	wordReported = 1 << 7 // the manager knows that there is a report to take over
	wordReturned = 1 << 8 // the function has returned or will never be called, or the operation is lost
)

// report implements a Func's update. It returns true if the manager must be told: for
// the first change after takeOver.
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

// takeOver copies the reported progress into the operation. The next report tells the
// manager again.
func (t *task) takeOver() {
	word := t.word.And(^uint64(wordReported))
	if progress := int(word & progressBits); progress != t.op.Progress && t.final == nil {
		t.change(func(op *Operation) { op.Progress = progress })
	}
}

// change replaces the operation by a changed copy.
func (t *task) change(f func(op *Operation)) {
	op := *t.op
	op.UpdatedAt = t.now()
	f(&op)
	t.op = &op
}

// now returns the time for StartedAt and UpdatedAt: that of the wall clock, or a later
// one if the clock has been set back since the operation was submitted or resumed.
func (t *task) now() time.Time {
	return latest(
		wall(),
		t.base.Add(time.Since(t.created)).Truncate(time.Microsecond),
		t.op.StartedAt,
		t.op.UpdatedAt,
	)
}

// wall returns the time of the wall clock, in the precision that is stored.
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

// finish fixes the final state and reports true. If it is fixed already, finish does
// nothing and reports false. Every terminal transition happens here;
// lose gives operations up without one.
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

// run calls the function and sets end, even if runtime.Goexit ends the goroutine. All
// user code runs in here: the function, its error's Error method, its value's
// MarshalJSON method.
func (t *task) run(ctx context.Context, update func(int), log *slog.Logger, end *outcome) {
	*end = outcome{state: StateFailed, err: "the function called runtime.Goexit"}
	defer func() {
		if r := recover(); r != nil {
			text := printed(r)
			*end = outcome{state: StateFailed, err: "panic: " + text}
			log.Error("task: function panicked", "id", t.id, "name", t.name, "panic", text, "stack", string(debug.Stack()))
		}
	}()
	ctx, region := trace.NewTask(ctx, t.name)
	defer region.End()
	ctx = pprof.WithLabels(ctx, pprof.Labels("task", t.name, "task_id", t.id))
	pprof.SetGoroutineLabels(ctx) // never reset: the goroutine ends soon after
	value, err := t.fn(ctx, update)
	t.word.Or(wordReturned)
	*end = ending(context.Cause(ctx), err)
	if err := end.setResult(value); err != nil {
		log.Error("task: result not kept", "id", t.id, "name", t.name, "err", err)
	}
}

// ending returns the outcome of a function that returned err. cause is why its context
// was cancelled, or nil.
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

// A cancelled is the cause of a context that CancelCause has cancelled, with its text.
type cancelled string

func (c cancelled) Error() string { return ErrCancelled.Error() + ": " + string(c) }

func (c cancelled) Unwrap() error { return ErrCancelled }

// setResult encodes the function's result. If it can't be kept, the outcome's err says
// why.
func (o *outcome) setResult(value any) error {
	text := o.err
	o.err = joinText(text, "result not kept: encoding it did not return") // in case it calls runtime.Goexit
	result, err := encode(value)
	o.result, o.err = result, text
	if err != nil {
		o.err = joinText(text, "result not kept: "+err.Error())
	}
	return err
}

// printed returns a value of user code as text. Its Error or String method may panic in ways
// that package fmt passes on.
func printed(v any) (text string) {
	defer func() {
		if recover() != nil {
			text = fmt.Sprintf("a %T that can't be printed", v)
		}
	}()
	return fmt.Sprint(v)
}

func joinText(a, b string) string {
	if a == "" {
		return b
	}
	return a + " (" + b + ")"
}
