package task

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// maxLogQueue is how many records wait for a slow handler. More are dropped.
	maxLogQueue = 1000

	// logGrace is how long New and Close wait for the handler.
	logGrace = time.Second
)

// A logQueue is a [slog.Handler] that passes records to the application's
// handler in a goroutine of its own: one that blocks holds up no operation, and
// one that panics ends no process. Without records there is no goroutine.
type logQueue struct {
	slog.Handler

	mu      sync.Mutex // guards what follows
	records []slog.Record
	dropped int
	idle    chan struct{} // closed when the goroutine ends; nil while there is none
}

// Enabled implements [slog.Handler]: the application's handler is asked later.
func (q *logQueue) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements [slog.Handler].
func (q *logQueue) Handle(_ context.Context, r slog.Record) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.records) >= maxLogQueue {
		q.dropped++
		return nil
	}
	q.records = append(q.records, r)
	if q.idle == nil {
		q.idle = make(chan struct{})
		go q.run(q.idle)
	}
	return nil
}

// run passes on what there is.
func (q *logQueue) run(idle chan struct{}) {
	defer func() { // also if the handler calls runtime.Goexit
		q.mu.Lock()
		if q.idle == idle {
			q.idle = nil
		}
		q.mu.Unlock()
		close(idle)
	}()
	for {
		q.mu.Lock()
		records, dropped := q.records, q.dropped
		q.records, q.dropped = nil, 0
		if len(records) == 0 {
			q.idle = nil // the next record starts another goroutine
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		if dropped > 0 {
			r := slog.NewRecord(time.Now(), slog.LevelWarn, "task: log records dropped, because the handler is too slow", 0)
			r.AddAttrs(slog.Int("count", dropped))
			records = append(records, r)
		}
		for _, r := range records {
			q.pass(r)
		}
	}
}

// pass passes on one record. There is nowhere to report a panic to.
func (q *logQueue) pass(r slog.Record) {
	defer func() { recover() }()
	if ctx := context.Background(); q.Handler.Enabled(ctx, r.Level) {
		q.Handler.Handle(ctx, r)
	}
}

// flush waits until the queue is empty, or for logGrace.
func (q *logQueue) flush() {
	q.mu.Lock()
	idle := q.idle
	q.mu.Unlock()
	if idle == nil {
		return
	}
	select {
	case <-idle:
	case <-time.After(logGrace):
	}
}
