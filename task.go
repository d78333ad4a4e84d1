// Package task runs, tracks, persists and recovers long-running background
// operations inside one program.
//
// A [Manager] takes functions and runs each in a goroutine of its own, as an
// [Operation] with an ID, a state, a progress in percent, a result and an
// error. Operations are kept in a [Persistence], by default in memory, usually
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
// state is stored, and then DONE, FAILED or CANCELLED for ever.
//
// # What callers hold
//
// Every *Operation that the package hands out is a snapshot: a value of its
// own that never changes. To see news, ask again with [Manager.Get] or
// [Manager.List], wait with [Manager.Wait], or follow with [Manager.Watch].
//
// # Several managers
//
// Several managers, in one process or in several, may share one SQLite
// database. Each sees the operations of all and cancels only its own. When a
// process dies, the next manager to start marks what it left behind as failed,
// and leaves the operations of the living alone.
package task

import (
	"context"
	"errors"
	"log/slog"
	"time"
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
// It should return soon after ctx is done; [context.Cause] then says why,
// [ErrCancelled] or [ErrClosed]. It reports progress in percent by calling
// update, from any goroutine and as often as it likes: a call costs about a
// hundred nanoseconds, never waits for the database and never fails. Values
// outside 0..100 are clamped, and calls after the function's return do nothing.
//
// The returned value becomes [Operation.Result] by way of JSON; one that JSON
// can't hold is dropped, and [Operation.Error] says why. A value returned with
// an error is kept beside it. A panic fails the operation, not the program.
//
// A Func must not call [Manager.Close] or [Manager.Shutdown] of its own
// manager: both wait for it to return. Nor must it wait for an operation that
// needs its own place (see [WithLimit]) or key (see [WithLock]).
type Func func(ctx context.Context, update func(progress int)) (interface{}, error)

// Errors to test for with [errors.Is]. What the package returns wraps them.
var (
	// ErrNotFound is returned when no operation has the given ID, by Cancel
	// also when the operation has already finished, and by a Persistence as
	// its methods say.
	ErrNotFound = errors.New("operation not found")

	// ErrClosed is returned by Submit after Close or Shutdown was called. It is
	// also the cause of the contexts that Close cancels, what Wait returns for
	// an operation whose final state Close could not store, and the last thing
	// that Watch says.
	ErrClosed = errors.New("manager closed")

	// ErrCancelled is the cause of a context that Cancel cancelled.
	ErrCancelled = errors.New("operation cancelled")

	// ErrLagged is the last thing that Watch says to a receiver that is too
	// slow.
	ErrLagged = errors.New("too slow: news of operations was lost")
)

// The texts in Operation.Error of operations that ended with their process.
const (
	errTextRestart  = "Task failed due to system restart"
	errTextShutdown = "Task failed due to system shutdown"
)

// An Option configures a [Manager].
type Option func(*Manager)

// WithLogger makes the manager log to l instead of [slog.Default]. It logs
// what nobody else is told: recovered operations, panics with their stacks,
// results that could not be kept, and the beginning and end of trouble with
// the database.
func WithLogger(l *slog.Logger) Option {
	return func(m *Manager) {
		if l != nil {
			m.log = l
		}
	}
}

// WithRetention makes the manager delete operations from the history when they
// finished longer ago than age: at the start, and then again and again, every
// tenth of age, but not more often than every second nor less than every hour.
// An age of 0 or less keeps them for ever, as is the default. See
// [Manager.Prune].
func WithRetention(age time.Duration) Option {
	return func(m *Manager) { m.retention = max(age, 0) }
}

// A SubmitOption configures one operation.
type SubmitOption func(*task) error

// WithMetadata gives the operation metadata, which is anything that JSON can
// hold: the name of a pool, the user who asked. Submit returns an error if
// JSON can't hold v. A Func can replace it with [SetMetadata].
func WithMetadata(v any) SubmitOption {
	return func(t *task) error { return t.op.setMetadata(v) }
}
