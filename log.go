package task

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	// maxLogQueue is how many records may wait for a slow handler. Further ones are dropped.
	maxLogQueue = 1000

	// logGrace is how long New and Close wait for the handler.
	logGrace = time.Second
)

// A logQueue is a [slog.Handler] that passes records to the application's handler in a
// goroutine of its own: a handler that blocks delays no operation, and one that panics
// does not end the process. Without records there is no goroutine.
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

// start starts the goroutine if there are records and it does not run.
func (q *logQueue) start() {
	if len(q.records) > 0 && q.busy.CompareAndSwap(false, true) {
		go q.run()
	}
}

// run passes on all records.
func (q *logQueue) run() {
	defer func() { // even if the handler calls runtime.Goexit
		q.busy.Store(false)
		q.start() // for records that came just now
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

// pass passes on one record. A panic can't be reported anywhere.
func (q *logQueue) pass(r slog.Record) {
	defer func() { recover() }()
	if ctx := context.Background(); q.Handler.Enabled(ctx, r.Level) {
		q.Handler.Handle(ctx, r)
	}
}

// flush waits until all records have been passed on, at most for logGrace.
func (q *logQueue) flush() {
	for end := time.Now().Add(logGrace); (q.busy.Load() || len(q.records) > 0) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}
