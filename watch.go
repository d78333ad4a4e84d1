package task

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mynt-nas/task/internal/eventlog"
)

// Watch returns the changes of the operations with those IDs. If ids is nil, as in
// Watch(ctx), it returns those of all live operations in the database, whichever
// manager runs them, and of all operations submitted after the call. If ids is empty
// but not nil, the sequence ends at once.
//
// The sequence begins with the present state of each operation, oldest first. Then
// it yields every change of state, in order and exactly once. Progress, message and
// metadata are conflated: it yields the latest. Every operation is a snapshot that
// belongs to the receiver.
//
// The changes of another manager's operations come about 100 milliseconds late. States
// between the first and the final one may be skipped; the final state comes exactly
// once. If reading the operations of others fails or takes the store longer than 5
// seconds, their present states come later, among the changes. With a store that is not
// a [FilteredLister], operations that others have submitted before the last 1,000 are
// left out.
//
//	for op, err := range manager.Watch(ctx) {
//		if err != nil {
//			return err
//		}
//		bus.Publish("task."+op.ID, op)
//	}
//
// The sequence ends when all named operations have finished or ctx is done.
// Otherwise its last pair is nil and an error: one that wraps [ErrNotFound] if
// there is no such operation, or [ErrClosed] once the manager is closed and
// nothing is left to yield, or [ErrLagged].
//
// The body of the loop may take its time and call any method: no operation ever
// waits for it. But when unread events of more than 10,000 operations, or of more
// than 64 MiB, have piled up, the sequence ends with ErrLagged. Watch again, and find
// what was missed with List. Events of operations that any watcher has named are
// dropped last, and only their loss ends the sequence of a watcher that has named
// them.
//
// No change between the call of Watch and the loop is missed. The caller must range
// over the sequence, or cancel ctx. Ranging over it again watches again.
func (m *Manager) Watch(ctx context.Context, ids ...string) iter.Seq2[*Operation, error] {
	if ctx.Err() != nil || ids != nil && len(ids) == 0 {
		return func(func(*Operation, error) bool) {}
	}
	ids = slices.Clone(ids)
	var unused atomic.Pointer[watcher]
	unused.Store(m.subscribe(ctx, ids))
	return func(yield func(*Operation, error) bool) {
		w := unused.Swap(nil)
		if w == nil {
			w = m.subscribe(ctx, ids)
		}
		w.run(ctx, func(op *Operation, err error) bool {
			if op != nil && err != nil { // deleted
				return true
			}
			return yield(m.copyOut(op), err)
		})
	}
}

// Raw is a view of a manager for servers, without decoded values: Metadata and Result
// of its operations are nil, valid JSON as a [json.RawMessage], or an [Omitted] (see
// [MaxValue]). The bytes are shared: do not modify them.
type Raw struct{ m *Manager }

// Raw returns a view of the manager without decoded values.
func (m *Manager) Raw() Raw { return Raw{m} }

// List is [Manager.List].
func (r Raw) List(limit, offset int, opts ...ListOption) ([]*Operation, error) {
	return r.m.list(limit, offset, opts, r.m.raw)
}

// Wait is [Manager.Wait].
func (r Raw) Wait(ctx context.Context, id string) (*Operation, error) {
	op, err := r.m.wait(ctx, id)
	return r.m.raw(op), err
}

// Subscribe is [Manager.Watch] in two parts, so that a subscriber knows when it has
// seen all present states: the states at the moment of the call, oldest first, and
// the changes from that moment on. Range over changes once, or cancel ctx. Subscribe
// returns [ErrNotFound] for an unknown ID, and, without IDs, [ErrClosed] once the
// manager is closed.
//
// Without IDs, changes yields an operation together with an error that wraps
// ErrNotFound if the operation was deleted while it was live: it will have no final
// state. The sequence continues.
func (r Raw) Subscribe(ctx context.Context, ids ...string) (present []*Operation, changes iter.Seq2[*Operation, error], err error) {
	m := r.m
	if ids != nil && len(ids) == 0 {
		return nil, func(func(*Operation, error) bool) {}, nil
	}
	if len(ids) == 0 && !isOpen(m.id) {
		return nil, nil, fmt.Errorf("task: subscribe: %w", ErrClosed)
	}
	w := m.subscribe(ctx, ids)
	if w.err != nil {
		w.stop()
		w.leave()
		return nil, nil, fmt.Errorf("task: subscribe: %w", w.err)
	}
	for len(w.present) > 0 && w.present[0].err == nil {
		e, _ := w.next(ctx)
		w.seen(e.op)
		present = append(present, m.raw(e.op))
	}
	return present, func(yield func(*Operation, error) bool) {
		w.run(ctx, func(op *Operation, err error) bool {
			return yield(m.raw(op), err)
		})
	}, nil
}

const (
	maxLag      = 10_000   // operations with unread events
	maxLagBytes = 64 << 20 // bytes of unread events

	// progressDelay is how long reports are conflated before watchers see them, so
	// that tasks that report at full speed don't keep watchers busy.
	progressDelay = 20 * time.Millisecond
)

// An event is the new visible state of an operation.
type event struct {
	op  *Operation
	err error // why there will be no final state, or nil
}

// appendEvent appends an event to the log. A soft event may replace the operation's
// last one. The caller holds m.mu.
func (m *Manager) appendEvent(e event, soft bool) {
	const rest = 300 // bytes, about
	m.events.Append(e.op.ID, e, rest+len(e.op.Name)+len(e.op.Message)+len(e.op.Error)+e.op.valueBytes(), soft)
}

// emit appends the present state of a task, if it is visible. The caller holds m.mu.
func (m *Manager) emit(t *task, soft bool) {
	if t.visible() && !t.hidden() {
		m.appendEvent(event{op: t.op, err: t.err}, soft)
	}
}

// publish takes over the progress that a function has reported, and appends an event
// if it has changed. The caller holds m.mu.
func (m *Manager) publish(t *task) {
	before := t.op
	if t.takeOver(); t.op != before {
		m.emit(t, true)
	}
}

// publishProgress publishes all progress reported since its last run.
func (m *Manager) publishProgress() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.progress = nil
	for _, t := range m.backlog.changed {
		m.publish(t)
	}
}

// A watcher is one call of Watch.
type watcher struct {
	events  *eventlog.Log[event]
	reader  *eventlog.Reader[event]
	read    int             // number of events read
	present []event         // present states not yielded yet
	open    map[string]bool // given IDs whose final states are not yielded yet; nil for all operations
	err     error           // why nothing can be watched
	stop    func() bool     // prevents the call of leave when the context is done
	leave   func()
}

// subscribe returns a watcher of all events from now on. Cancel ctx, or call run.
func (m *Manager) subscribe(ctx context.Context, ids []string) *watcher {
	w := new(watcher)
	ids = slices.Compact(slices.Sorted(slices.Values(ids))) // the caller may range again
	var lives []*life
	var leaves []func()
	if len(ids) == 0 {
		m.followAll(ctx)
		leaves = append(leaves, m.unfollowAll)
	}
	for _, id := range ids {
		l, leave, err := m.find(id)
		if err != nil {
			w.err = fmt.Errorf("%s: %w", id, err)
			break
		}
		lives, leaves = append(lives, l), append(leaves, leave)
	}
	m.join(w, ids, lives)
	w.leave = sync.OnceFunc(func() {
		w.reader.Close()
		for _, leave := range leaves {
			leave()
		}
	})
	w.stop = context.AfterFunc(ctx, w.leave)
	return w
}

// join collects the present states and creates the reader of the event log at the
// same moment.
func (m *Manager) join(w *watcher, ids []string, lives []*life) {
	m.mu.Lock()
	w.events = m.events
	if len(ids) > 0 {
		w.open = make(map[string]bool, len(ids))
	} else {
		for _, t := range m.sorted() {
			if t.err == nil {
				lives = append(lives, &t.life)
			}
		}
		for id, f := range m.foreign {
			if t := m.tasks[id]; t == nil || t.hidden() {
				lives = append(lives, f.life)
			}
		}
	}
	for _, id := range ids {
		w.open[id] = true
	}
	for _, l := range lives {
		if l.visible() {
			w.present = append(w.present, event{op: m.present(l), err: l.err})
		}
	}
	w.reader = m.events.Read(ids...)
	m.mu.Unlock()
	slices.SortStableFunc(w.present, func(a, b event) int { return a.op.CreatedAt.Compare(b.op.CreatedAt) })
}

// run yields present states, then events, with operations as snapshot returns them.
// A watcher of all operations gets a deleted one with an error.
func (w *watcher) run(ctx context.Context, yield func(*Operation, error) bool) {
	defer w.leave()
	defer w.stop()
	for w.open == nil || len(w.open) > 0 {
		e, err := w.next(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			yield(nil, fmt.Errorf("task: watch: %w", err))
			return
		case !yield(e.op, e.err):
			return
		}
		w.seen(e.op)
	}
}

// seen removes a finished operation from the open ones.
func (w *watcher) seen(op *Operation) {
	if !op.State.live() {
		delete(w.open, op.ID)
	}
}

// next waits for the next event, or until ctx is done.
func (w *watcher) next(ctx context.Context) (event, error) {
	if w.err != nil {
		return event{}, w.err
	}
	if len(w.present) > 0 {
		e := w.present[0]
		w.present[0] = event{} // release the operation
		w.present = w.present[1:]
		return e, e.err
	}
	w.present = nil
	for ctx.Err() == nil {
		if w.read++; w.read%64 == 0 {
			w.pause(ctx)
		}
		e, ok, err := w.reader.Next()
		switch {
		case errors.Is(err, eventlog.ErrLagged):
			return event{}, ErrLagged
		case err != nil:
			return event{}, err
		case ok && w.open != nil:
			return e.Value, e.Value.err
		case ok && (e.Value.err == nil || errors.Is(e.Value.err, ErrNotFound)):
			return e.Value, nil
		case ok:
			continue
		}
		select {
		case <-w.reader.Ready():
			w.pause(ctx)
		case <-ctx.Done():
		}
	}
	return event{}, nil
}

// pause leaves time for functions and Submit. A few watchers don't slow them down, but
// a thousand do; each of those gets about 640 events a second. Watchers of named operations
// get few events, and pause less.
func (w *watcher) pause(ctx context.Context) {
	const few = 10
	limit := 200 * time.Millisecond
	if w.open != nil {
		limit = 20 * time.Millisecond
	}
	if n := w.events.Readers(); n > few {
		sleep(ctx, min(time.Duration(n*n)*100*time.Nanosecond, limit))
	}
}
