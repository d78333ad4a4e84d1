package task

import (
	"context"
	"log/slog"
	"sync/atomic"
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
	records chan *slog.Record
	dropped atomic.Int64
	busy    atomic.Bool // the goroutine runs
}

func newLogQueue(h slog.Handler) *logQueue {
	return &logQueue{Handler: h, records: make(chan *slog.Record, maxLogQueue)}
}

// Enabled implements [slog.Handler]: the application's handler is asked later.
func (q *logQueue) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements [slog.Handler].
func (q *logQueue) Handle(_ context.Context, r slog.Record) error {
	select {
	case q.records <- &r:
	default:
		q.dropped.Add(1)
	}
	q.start()
	return nil
}

// start has the goroutine run if there is something to pass on.
func (q *logQueue) start() {
	if len(q.records) > 0 && q.busy.CompareAndSwap(false, true) {
		go q.run()
	}
}

// run passes on what there is.
func (q *logQueue) run() {
	defer func() { // also if the handler calls runtime.Goexit
		q.busy.Store(false)
		q.start() // what has come just now
	}()
	for {
		select {
		case r := <-q.records:
			q.pass(*r)
		default:
			return
		}
		if n := q.dropped.Swap(0); n > 0 {
			r := slog.NewRecord(time.Now(), slog.LevelWarn, "task: log records dropped, because the handler is too slow", 0)
			r.AddAttrs(slog.Int64("count", n))
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

// flush waits until all has been passed on, or for logGrace.
func (q *logQueue) flush() {
	for end := time.Now().Add(logGrace); (q.busy.Load() || len(q.records) > 0) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}
