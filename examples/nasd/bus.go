package main

import (
	"errors"
	"iter"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/mynt-nas/task"
)

// A bus forwards events to its subscribers. The zero bus is ready to use.
type bus struct {
	mu     sync.Mutex // guards what follows
	subs   []*subscriber
	closed bool
}

// An event is a change of an operation.
type event struct {
	op     *task.Operation // shared by all subscribers, which must not modify it
	missed int             // number of events dropped for the subscriber before this one
}

type subscriber struct {
	events chan event
	missed int
}

// subscribe returns a channel that receives all later events. It is closed with the bus.
// Events that do not fit into its buffer are dropped.
func (b *bus) subscribe(buffer int) <-chan event {
	s := &subscriber{events: make(chan event, buffer)}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		close(s.events)
	} else {
		b.subs = append(b.subs, s)
	}
	return s.events
}

// publish sends an event to all subscribers. It never waits.
func (b *bus) publish(op *task.Operation) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.subs {
		select {
		case s.events <- event{op, s.missed}:
			s.missed = 0
		default:
			s.missed++
		}
	}
}

// markLoss makes the next event report that at least one event was dropped.
func (b *bus) markLoss() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.subs {
		s.missed++
	}
}

// close closes the bus. Subscribers still receive the events in their buffers.
func (b *bus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.subs {
		close(s.events)
	}
	b.subs, b.closed = nil, true
}

// feed publishes the events of Watch until the manager is closed, and then closes the bus.
func feed(b *bus, changes iter.Seq2[*task.Operation, error]) {
	defer b.close()
	for errors.Is(forward(b, changes), task.ErrLagged) { // happens if the whole process was stopped
		b.markLoss() // and watch again
	}
}

// forward publishes the events of one Watch.
func forward(b *bus, changes iter.Seq2[*task.Operation, error]) error {
	for op, err := range changes {
		if err != nil {
			return err
		}
		b.publish(op)
	}
	return nil
}

// logFinished is a subscriber that logs final states.
func logFinished(events <-chan event) {
	for e := range events {
		if e.missed > 0 {
			slog.Warn("events lost, operations may be missing from the log", "events", e.missed)
		}
		op := e.op
		switch {
		case !op.State.Finished():
		case op.State == task.StateFailed:
			slog.Error(op.Name, "state", op.State, "err", op.Error, "id", op.ID)
		default:
			slog.Info(op.Name, "state", op.State, "took", took(op), "id", op.ID)
		}
	}
}

// took returns how long an operation ran.
func took(op *task.Operation) time.Duration {
	if op.StartedAt.IsZero() {
		return 0
	}
	return op.UpdatedAt.Sub(op.StartedAt)
}

// A lastResults is a subscriber that records the last finished operation of each kind for
// each pool.
type lastResults struct {
	tasks *task.Manager

	mu   sync.Mutex                            // guards what follows
	pool map[string]map[string]*task.Operation // by pool and kind; operations must not be modified
}

// newLastResults starts with the history. Call Watch first, so that no event is missed.
func newLastResults(m *task.Manager) *lastResults {
	l := &lastResults{tasks: m, pool: make(map[string]map[string]*task.Operation)}
	l.load()
	return l
}

// load reads the whole history: the last operation of a kind may be far back.
func (l *lastResults) load() {
	finished := task.ByState(task.StateDone, task.StateFailed, task.StateCancelled)
	for before := ""; ; {
		ops, err := l.tasks.List(1000, 0, finished, task.Before(before))
		if err != nil && !errors.Is(err, task.ErrNotFound) { // ErrNotFound: retention has deleted the last operation read, and all older ones
			slog.Error("last results are incomplete", "err", err)
		}
		if len(ops) == 0 {
			return
		}
		for _, op := range ops {
			l.add(op)
		}
		before = ops[len(ops)-1].ID
	}
}

// follow updates the results until the bus is closed.
func (l *lastResults) follow(events <-chan event) {
	for e := range events {
		if e.missed > 0 {
			l.load()
		}
		l.add(e.op)
	}
}

// add records a finished operation unless a later one is recorded.
func (l *lastResults) add(op *task.Operation) {
	var a about
	if !op.State.Finished() || op.DecodeMetadata(&a) != nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	kinds := l.pool[a.Pool]
	if kinds == nil {
		kinds = make(map[string]*task.Operation)
		l.pool[a.Pool] = kinds
	}
	if last := kinds["delete"]; last != nil && last.State == task.StateDone && op.UpdatedAt.Before(last.UpdatedAt) {
		return // it belongs to an earlier pool with that name
	}
	if last := kinds[a.Kind]; last == nil || last.UpdatedAt.Before(op.UpdatedAt) {
		kinds[a.Kind] = op
	}
	if a.Kind == "delete" && op.State == task.StateDone {
		maps.DeleteFunc(kinds, func(_ string, other *task.Operation) bool { return other.UpdatedAt.Before(op.UpdatedAt) })
	}
}

// of returns the last finished operations on a pool, by kind.
func (l *lastResults) of(pool string) map[string]*task.Operation {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.pool[pool])
}
