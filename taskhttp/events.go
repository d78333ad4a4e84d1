package taskhttp

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/eventlog"
)

const (
	heartbeat = 15 * time.Second       // between heartbeats of an idle stream
	pause     = 100 * time.Millisecond // between batches; progress is conflated meanwhile
	retry     = 2 * time.Second        // before a browser reconnects
	idle      = time.Minute            // how long a recorder lives without streams

	// The bounds of a recorder's history. A client that falls further behind gets a
	// "reload" event.
	maxRecent = 10_000
	maxBytes  = 8 << 20

	// The bounds of a batch, a snapshot, and a single write.
	maxBatch      = 256
	maxBatchBytes = 256 << 10
	maxSnapshot   = 1000
	maxPiece      = 64 << 10 // the client has to receive this much before the deadline
)

// A recorder follows the changes of operations and keeps the recent ones in memory for any
// number of streams. It never waits for a stream.
type recorder struct {
	epoch string // distinguishes its event IDs from those of other recorders
	stop  context.CancelFunc
	log   *eventlog.Log[entry]

	mu    sync.Mutex       // guards what follows
	live  map[string]light // live operations as of the last event in log
	ended bool             // log is closed

	// Guarded by the handler's mu.
	streams int
	expiry  *time.Timer
}

// An entry is an event of an operation.
type entry struct {
	name  string // of the event
	state task.State
	data  []byte // JSON
}

// errFinished ends the log of a recorder when all its operations have finished.
var errFinished = errors.New("finished")

// record starts a recorder of the changes that follow the given live operations.
func record(live []*task.Operation, changes iter.Seq2[*task.Operation, error], stop context.CancelFunc) *recorder {
	rec := newRecorder(stop)
	for _, op := range live {
		rec.live[op.ID] = lighten(op)
	}
	go rec.run(changes)
	return rec
}

func newRecorder(stop context.CancelFunc) *recorder {
	rec := &recorder{
		epoch: rand.Text()[:10],
		stop:  stop,
		log:   eventlog.New[entry](maxRecent, maxBytes),
		live:  make(map[string]light),
	}
	rec.log.Read() // never read, so the log keeps as many events as its bounds allow
	return rec
}

func (rec *recorder) run(changes iter.Seq2[*task.Operation, error]) {
	end := errFinished
	for op, err := range changes {
		switch {
		case err == nil:
			rec.put(lighten(op))
			continue
		case op != nil:
			rec.drop(op.ID)
			continue
		}
		end = err
		break
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.ended = true
	rec.log.Close(end)
}

// put records the new state of an operation.
func (rec *recorder) put(op light) {
	data := op.encode()
	rec.mu.Lock()
	defer rec.mu.Unlock()
	before, ok := rec.live[op.ID]
	rec.log.Append(op.ID, entry{"operation", op.State, data}, len(data), ok && before.State == op.State)
	if rec.live[op.ID] = op; op.State.Finished() {
		delete(rec.live, op.ID)
	}
}

// drop records that an unfinished operation was deleted.
func (rec *recorder) drop(id string) {
	data, _ := json.Marshal(map[string]string{"id": id})
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.log.Append(id, entry{"deleted", "", data}, len(data), false)
	delete(rec.live, id)
}

func (rec *recorder) over() bool {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return rec.ended
}

// errExpired means that a stream has fallen too far behind.
var errExpired = errors.New("event history expired")

// snapshot returns the live operations, running ones first, and a reader of the events that
// follow. more reports that there are further live operations.
func (rec *recorder) snapshot() (ops []light, more bool, r *eventlog.Reader[entry]) {
	rec.mu.Lock()
	ops = slices.AppendSeq(make([]light, 0, len(rec.live)), maps.Values(rec.live))
	r = rec.log.Read()
	rec.mu.Unlock()
	slices.SortFunc(ops, func(a, b light) int {
		// "RUNNING" sorts after "PENDING", and IDs sort by submission.
		return cmp.Or(cmp.Compare(b.State, a.State), cmp.Compare(a.ID, b.ID))
	})
	return ops[:min(len(ops), maxSnapshot)], len(ops) > maxSnapshot, r
}

// eventID returns the ID of the event with the given sequence number.
func (rec *recorder) eventID(seq uint64) string {
	return rec.epoch + "-" + strconv.FormatUint(seq, 10)
}

// resume returns a reader of the events after the one with the given ID. It reports false
// if this recorder no longer has all of them.
func (rec *recorder) resume(eventID string) (r *eventlog.Reader[entry], ok bool) {
	digits, ok := strings.CutPrefix(eventID, rec.epoch+"-")
	if !ok {
		return nil, false
	}
	seq, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return nil, false
	}
	return rec.log.ReadFrom(seq)
}

// listen returns the recorder of all operations. The caller must call leave.
func (h *handler) listen() (rec *recorder, leave func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.recorder == nil || h.recorder.over() {
		ctx, stop := context.WithCancel(context.Background())
		live, changes, err := h.manager.Raw().Subscribe(ctx)
		if err != nil {
			stop()
			return nil, nil, err
		}
		h.recorder = record(live, changes, stop)
	}
	rec = h.recorder
	if rec.streams++; rec.expiry != nil {
		rec.expiry.Stop()
	}
	return rec, func() { h.leave(rec) }, nil
}

// leave ends a stream's use of a recorder. A recorder that is idle for a minute (the
// constant idle) ends.
func (h *handler) leave(rec *recorder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if rec.streams--; rec.streams > 0 {
		return
	}
	rec.expiry = time.AfterFunc(idle, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if rec.streams > 0 {
			return
		}
		rec.stop()
		if h.recorder == rec {
			h.recorder = nil
		}
	})
}

// events streams the changes of all operations of the manager.
func (h *handler) events(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	ctx, cancel := h.context(r)
	defer cancel()
	rec, leave, err := h.listen()
	if err != nil {
		return err
	}
	defer leave()
	if r.Method == http.MethodHead {
		streamHeader(w)
		return nil
	}
	s, err := newStream(ctx, w)
	if err != nil {
		return err
	}
	defer s.unblock()()
	last := r.Header.Get("Last-Event-ID")
	reader, known := rec.resume(last)
	if known {
		s.heartbeat() // shows that the stream works, although there is no snapshot
	} else {
		if last != "" {
			s.reload(errExpired)
		}
		var ops []light
		var more bool
		ops, more, reader = rec.snapshot()
		s.snapshot(rec.eventID(reader.Start), ops, more)
	}
	s.follow(reader, func(e eventlog.Event[entry]) string { return rec.eventID(e.Seq) })
	return nil
}

// eventsOf streams the changes of one operation until it has finished. The first event is
// the present state, so that a client misses nothing. The event IDs are states: a client
// that reconnects with a final state gets a response that makes it stop.
func (h *handler) eventsOf(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	id := r.PathValue("id")
	watching, stop := context.WithCancel(context.Background())
	defer stop()
	present, changes, err := h.manager.Raw().Subscribe(watching, id)
	if errors.Is(err, task.ErrNotFound) {
		return fmt.Errorf("%.64s: %w", id, task.ErrNotFound)
	}
	if err != nil {
		return err
	}
	if task.State(r.Header.Get("Last-Event-ID")).Finished() {
		w.WriteHeader(http.StatusNoContent) // EventSource does not reconnect after 204
		return nil
	}
	if r.Method == http.MethodHead {
		streamHeader(w)
		return nil
	}
	ctx, cancel := h.context(r)
	defer cancel()
	s, err := newStream(ctx, w)
	if err != nil {
		return err
	}
	defer s.unblock()()
	rec := newRecorder(stop)
	reader := rec.log.Read()
	for _, op := range present {
		rec.put(lighten(op))
	}
	go rec.run(changes)
	s.follow(reader, func(e eventlog.Event[entry]) string { return string(e.Value.state) })
	return nil
}

// A stream is a response that is written in pieces, usually server-sent events.
type stream struct {
	ctx context.Context // done when the stream must end
	w   http.ResponseWriter
	c   *http.ResponseController
	buf []byte // data not yet sent, at most maxPiece
	err error  // the first send error
}

func streamHeader(w http.ResponseWriter) {
	header := w.Header()
	header.Set("Content-Type", "text/event-stream")
	header.Set("X-Accel-Buffering", "no") // stops nginx from buffering
}

// newStream begins a response. If w cannot flush, it returns an error and writes nothing.
func newStream(ctx context.Context, w http.ResponseWriter) (*stream, error) {
	streamHeader(w)
	s := &stream{ctx: ctx, w: w, c: http.NewResponseController(w)}
	s.setDeadline()
	if err := s.c.Flush(); err != nil {
		return nil, fmt.Errorf("flush: %v", err)
	}
	s.write(fmt.Appendf(nil, "retry: %d\n\n", retry.Milliseconds()))
	return s, nil
}

// event writes an event.
func (s *stream) event(name, id string, data []byte) {
	s.write(fmt.Appendf(nil, "event: %s\nid: %s\ndata: ", name, id))
	s.write(data)
	s.write([]byte("\n\n"))
}

// heartbeat writes a "heartbeat" event. It has no ID, so that the client keeps its last
// event ID. It has data, because browsers ignore an event without data.
func (s *stream) heartbeat() { s.write([]byte("event: heartbeat\ndata: {}\n\n")) }

// reload writes a "reload" event. Its empty ID resets the client's last event ID.
func (s *stream) reload(why error) {
	data, _ := json.Marshal(map[string]string{"detail": why.Error()})
	s.event("reload", "", data)
}

// snapshot writes a "snapshot" event with the given live operations, as far as they fit.
func (s *stream) snapshot(id string, ops []light, more bool) {
	s.write(fmt.Appendf(nil, "event: snapshot\nid: %s\ndata: {\"tasks\":[", id))
	a := array{s: s}
	for _, op := range ops {
		if !a.add(op) {
			more = true
			break
		}
	}
	s.write([]byte("]"))
	if more {
		s.write([]byte(`,"truncated":true`))
	}
	s.write([]byte("}\n\n"))
}

// write buffers or sends p. The next flush sends all buffered data.
func (s *stream) write(p []byte) {
	if len(s.buf)+len(p) > maxPiece {
		s.send(s.buf)
		s.buf = s.buf[:0]
	}
	if len(p) > maxPiece {
		s.send(p)
		return
	}
	s.buf = append(s.buf, p...)
}

// send sends p in pieces, each with its own deadline. The deadline is later than the next
// heartbeat, because a deadline that passes while the stream is idle would end an HTTP/2
// stream.
func (s *stream) send(p []byte) {
	for len(p) > 0 && s.err == nil {
		n := min(len(p), maxPiece)
		s.setDeadline()
		_, s.err = s.w.Write(p[:n])
		p = p[n:]
	}
}

func (s *stream) setDeadline() {
	s.c.SetWriteDeadline(time.Now().Add(heartbeat + grace))
	if s.ctx.Err() != nil {
		s.shortenDeadline()
	}
}

// shortenDeadline limits the time of a write during the server's shutdown.
func (s *stream) shortenDeadline() { s.c.SetWriteDeadline(time.Now().Add(shutdownGrace)) }

// unblock shortens the deadline of a blocked write when s.ctx is done. The handler must
// call stop before it returns. stop waits for shortenDeadline, because using a
// ResponseWriter after its handler has returned crashes the process over HTTP/2 and
// corrupts the next response over HTTP/1.1.
func (s *stream) unblock() (stop func()) {
	shortened := make(chan struct{})
	stopFunc := context.AfterFunc(s.ctx, func() {
		defer close(shortened)
		s.shortenDeadline()
	})
	return func() {
		if !stopFunc() {
			<-shortened
		}
	}
}

// flush sends the buffered data.
func (s *stream) flush() {
	s.send(s.buf)
	s.buf = nil // an idle stream needs no buffer
	s.setDeadline()
	s.err = cmp.Or(s.err, s.c.Flush())
}

// follow sends the events of a reader until the log is closed, s.ctx is done, or a write
// fails.
func (s *stream) follow(r *eventlog.Reader[entry], eventID func(eventlog.Event[entry]) string) {
	defer r.Close()
	timer := time.NewTimer(heartbeat)
	defer timer.Stop()
	s.flush()
	for s.err == nil && s.ctx.Err() == nil {
		sent, err := s.batch(r, eventID)
		if err != nil {
			s.end(err)
			return
		}
		if sent {
			s.flush()
			timer.Reset(heartbeat)
			sleep(s.ctx, pause)
			continue
		}
		select {
		case <-r.Ready():
		case <-timer.C:
			s.heartbeat()
			s.flush()
			timer.Reset(heartbeat)
		case <-s.ctx.Done():
		}
	}
}

// batch writes the next events and reports whether there were any.
func (s *stream) batch(r *eventlog.Reader[entry], eventID func(eventlog.Event[entry]) string) (sent bool, err error) {
	for n, size := 0, 0; n < maxBatch && size < maxBatchBytes && s.err == nil; n++ {
		e, ok, err := r.Next()
		if err != nil && !sent {
			return false, err
		}
		if !ok {
			break
		}
		s.event(e.Value.name, eventID(e), e.Value.data)
		size += len(e.Value.data)
		sent = true
	}
	return sent, nil
}

// end writes the reason why the events ended, if the client must know it.
func (s *stream) end(err error) {
	switch {
	case errors.Is(err, errFinished):
	case errors.Is(err, eventlog.ErrLagged):
		s.reload(errExpired)
	case errors.Is(err, task.ErrClosed):
		data, _ := json.Marshal(map[string]string{"detail": err.Error()})
		s.write(fmt.Appendf(nil, "event: closed\ndata: %s\n\n", data))
	default:
		s.reload(err)
	}
	s.flush()
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
