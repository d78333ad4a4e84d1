package taskhttp

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mynt-nas/task"
)

const (
	heartbeat = 15 * time.Second       // between signs of life
	pause     = 100 * time.Millisecond // between events: progress is conflated meanwhile
	retry     = 2 * time.Second        // before a browser connects again
	idle      = time.Minute            // for which a recorder goes on without listeners

	// The bounds of what a recorder remembers. A client that is further behind
	// is told to load anew.
	maxRecent = 10_000
	maxBytes  = 8 << 20

	// The bounds of what is sent at once.
	maxBatch      = 256
	maxBatchBytes = 256 << 10
	maxSnapshot   = 1000
	maxPiece      = 64 << 10 // that a client has to take before the deadline
)

// A recorder watches operations and remembers what happened to them recently,
// for any number of listeners. It waits for none of them.
type recorder struct {
	epoch string        // tells its event IDs from those of other recorders
	ready chan struct{} // closed once the present states are recorded
	stop  context.CancelFunc

	mu        sync.Mutex // guards what follows
	recent    []entry    // by seq
	bytes     int        // of data in recent
	dead      int        // how many in recent are superseded
	seq       uint64     // of the last entry
	forgotten uint64     // the seq of the last entry that had to be dropped
	latest    map[string]uint64
	live      map[string]*task.Operation
	changed   chan struct{} // closed, and replaced, when something happens
	ended     bool
	err       error // why it has ended; immutable then

	// These belong to the handler, and are guarded by its mu.
	listeners int
	expiry    *time.Timer
}

// An entry is what became of an operation. One that says the same state anew,
// with other progress, supersedes the one before: then that has no data.
type entry struct {
	seq   uint64
	id    string
	state task.State
	data  []byte // the operation as JSON
}

// record starts a recorder of the operations with those IDs, or of all.
func record(m *task.Manager, ids ...string) *recorder {
	ctx, stop := context.WithCancel(context.Background())
	rec := &recorder{
		epoch:   rand.Text()[:10],
		ready:   make(chan struct{}),
		stop:    stop,
		latest:  make(map[string]uint64),
		live:    make(map[string]*task.Operation),
		changed: make(chan struct{}),
	}
	go rec.run(m, ctx, ids)
	return rec
}

func (rec *recorder) run(m *task.Manager, ctx context.Context, ids []string) {
	ready := sync.OnceFunc(func() { close(rec.ready) })
	defer ready()
	watching := &idleContext{Context: ctx, idle: func() {}}
	changes := m.Watch(watching, ids...)
	watching.idle = ready
	for op, err := range changes {
		if err != nil {
			rec.end(err)
			return
		}
		rec.put(op)
	}
	rec.end(nil)
}

// An idleContext notices when the loop over Watch begins to wait, which it does
// when it has told all present states: looking at Done is how it waits. Watch
// itself looks at Done too, when it is called and when the loop has ended.
type idleContext struct {
	context.Context
	idle func()
}

func (c *idleContext) Done() <-chan struct{} {
	c.idle()
	return c.Context.Done()
}

// put records what an operation has become.
func (rec *recorder) put(op *task.Operation) {
	data, err := json.Marshal(op)
	if err != nil { // it was JSON before
		rec.end(err)
		rec.stop()
		return
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if i, ok := rec.find(rec.latest[op.ID]); ok && rec.recent[i].state == op.State {
		rec.bytes -= len(rec.recent[i].data)
		rec.recent[i].data = nil
		rec.dead++
	}
	rec.seq++
	rec.recent = append(rec.recent, entry{rec.seq, op.ID, op.State, data})
	rec.bytes += len(data)
	rec.latest[op.ID] = rec.seq
	if op.State.Finished() {
		delete(rec.live, op.ID)
	} else {
		rec.live[op.ID] = op
	}
	rec.tidy()
	rec.signal()
}

// find returns where in recent the entry with that seq is.
func (rec *recorder) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(rec.recent, seq, func(e entry, seq uint64) int { return cmp.Compare(e.seq, seq) })
}

// tidy drops what is superseded, now and then, and what is too much, except
// the last entry. The caller holds rec.mu.
func (rec *recorder) tidy() {
	if rec.dead > 64 && rec.dead > len(rec.recent)/2 {
		rec.recent = slices.DeleteFunc(rec.recent, func(e entry) bool { return e.data == nil })
		rec.dead = 0
	}
	for len(rec.recent) > 1 && (len(rec.recent)-rec.dead > maxRecent || rec.bytes > maxBytes) {
		first := rec.recent[0]
		rec.recent[0] = entry{}
		rec.recent = rec.recent[1:]
		if first.data == nil {
			rec.dead--
			continue
		}
		rec.bytes -= len(first.data)
		rec.forgotten = first.seq
		if rec.latest[first.id] == first.seq {
			delete(rec.latest, first.id)
		}
	}
}

// signal wakes the listeners. The caller holds rec.mu.
func (rec *recorder) signal() {
	close(rec.changed)
	rec.changed = make(chan struct{})
}

// end records that there will be no more.
func (rec *recorder) end(err error) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if rec.ended {
		return
	}
	rec.ended, rec.err = true, err
	rec.signal()
}

func (rec *recorder) over() bool {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return rec.ended
}

// errForgotten says that a listener is too far behind.
var errForgotten = errors.New("what happened meanwhile is forgotten")

// after returns entries that come after the one with that seq, or, if there are
// none now, a channel that is closed when there may be. ended says that there
// will never be any, and err why.
func (rec *recorder) after(seq uint64) (batch []entry, changed <-chan struct{}, ended bool, err error) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if seq < rec.forgotten {
		return nil, nil, true, errForgotten
	}
	size := 0
	start := sort.Search(len(rec.recent), func(i int) bool { return rec.recent[i].seq > seq })
	for _, e := range rec.recent[start:] {
		if len(batch) == maxBatch || size > maxBatchBytes {
			break
		}
		if e.data != nil {
			batch = append(batch, e)
			size += len(e.data)
		}
	}
	if len(batch) > 0 {
		return batch, nil, false, nil
	}
	return nil, rec.changed, rec.ended, rec.err
}

// present returns the live operations, those that run first, and the seq at
// which they were so. There may be more than it returns.
func (rec *recorder) present() (ops []*task.Operation, more bool, at uint64) {
	rec.mu.Lock()
	ops = slices.AppendSeq(make([]*task.Operation, 0, len(rec.live)), maps.Values(rec.live))
	at = rec.seq
	rec.mu.Unlock()
	slices.SortFunc(ops, func(a, b *task.Operation) int {
		// "RUNNING" comes after "PENDING", IDs by order of submission.
		return cmp.Or(cmp.Compare(b.State, a.State), cmp.Compare(a.ID, b.ID))
	})
	return ops[:min(len(ops), maxSnapshot)], len(ops) > maxSnapshot, at
}

// eventID returns the ID of the event that tells of the entry with that seq.
func (rec *recorder) eventID(seq uint64) string {
	return rec.epoch + "-" + strconv.FormatUint(seq, 10)
}

// resume returns the seq that an event ID stands for, if this recorder knows
// all that came after it.
func (rec *recorder) resume(eventID string) (seq uint64, ok bool) {
	digits, ok := strings.CutPrefix(eventID, rec.epoch+"-")
	if !ok {
		return 0, false
	}
	seq, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return 0, false
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	return seq, rec.forgotten <= seq && seq <= rec.seq
}

// listen returns the recorder of all operations. Call leave in the end.
func (h *handler) listen() (rec *recorder, leave func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.recorder == nil || h.recorder.over() {
		h.recorder = record(h.manager)
	}
	rec = h.recorder
	if rec.listeners++; rec.expiry != nil {
		rec.expiry.Stop()
	}
	return rec, func() { h.leave(rec) }
}

// leave has a recorder end after some time without listeners.
func (h *handler) leave(rec *recorder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if rec.listeners--; rec.listeners > 0 {
		return
	}
	rec.expiry = time.AfterFunc(idle, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if rec.listeners > 0 {
			return
		}
		rec.stop()
		if h.recorder == rec {
			h.recorder = nil
		}
	})
}

// events tells of all operations of the manager.
func (h *handler) events(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	ctx, cancel := h.context(r)
	defer cancel()
	rec, leave := h.listen()
	defer leave()
	select {
	case <-rec.ready:
	case <-ctx.Done():
		return nil
	}
	if rec.over() { // as long as the manager is closed
		return cmp.Or(rec.err, task.ErrClosed)
	}
	if r.Method == http.MethodHead {
		streamHeader(w)
		return nil
	}
	s, err := newStream(ctx, w, rec)
	if err != nil {
		return err
	}
	defer s.unblock()()
	at, known := rec.resume(r.Header.Get("Last-Event-ID"))
	if !known {
		if r.Header.Get("Last-Event-ID") != "" {
			s.reload(errForgotten)
		}
		at = s.snapshot()
	}
	s.tell(at, func(e entry) string { return rec.eventID(e.seq) })
	return nil
}

// eventsOf tells of one operation, first what it is, which is all that somebody
// can have missed, and ends when it has finished. The IDs of its events are
// states, so that somebody who comes back knowing a final one can be told to
// stop asking.
func (h *handler) eventsOf(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	id := r.PathValue("id")
	if _, err := h.look(id); err != nil {
		return err
	}
	if task.State(r.Header.Get("Last-Event-ID")).Finished() {
		w.WriteHeader(http.StatusNoContent) // EventSource gives up on that
		return nil
	}
	if r.Method == http.MethodHead {
		streamHeader(w)
		return nil
	}
	ctx, cancel := h.context(r)
	defer cancel()
	rec := record(h.manager, id)
	defer rec.stop()
	s, err := newStream(ctx, w, rec)
	if err != nil {
		return err
	}
	defer s.unblock()()
	s.tell(0, func(e entry) string { return string(e.state) })
	return nil
}

// A stream is an answer made of server-sent events.
type stream struct {
	ctx context.Context // done when it is to end
	w   http.ResponseWriter
	c   *http.ResponseController
	rec *recorder
	err error // why nothing can be sent any more
}

func streamHeader(w http.ResponseWriter) {
	header := w.Header()
	header.Set("Content-Type", "text/event-stream")
	header.Set("X-Accel-Buffering", "no") // nginx would wait for more
}

// newStream begins an answer. It returns an error, and nothing is sent, if w
// can't send what is written before all of it is.
func newStream(ctx context.Context, w http.ResponseWriter, rec *recorder) (*stream, error) {
	streamHeader(w)
	s := &stream{ctx: ctx, w: w, c: http.NewResponseController(w), rec: rec}
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

// reload writes the event that tells to load anew. It makes the receiver forget
// its last event ID.
func (s *stream) reload(why error) {
	data, _ := json.Marshal(map[string]string{"detail": why.Error()})
	s.event("reload", "", data)
}

// A snapshot is the first that is told of all operations.
type snapshot struct {
	Tasks     []*task.Operation `json:"tasks"`               // those that are not finished
	Truncated bool              `json:"truncated,omitempty"` // there are more
}

// snapshot writes the event that tells which operations are live, and returns
// the seq at which they are.
func (s *stream) snapshot() uint64 {
	ops, more, at := s.rec.present()
	data, err := json.Marshal(snapshot{ops, more})
	if err != nil {
		s.err = err
	}
	s.event("snapshot", s.rec.eventID(at), data)
	return at
}

// write writes p, piece by piece: a client has to take each in time. The deadline
// is that of the next heartbeat, as one that passes while nothing is sent would
// end a HTTP/2 stream.
func (s *stream) write(p []byte) {
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

// shortenDeadline allows little time for what is being sent: the server is shut
// down.
func (s *stream) shortenDeadline() { s.c.SetWriteDeadline(time.Now().Add(farewell)) }

// unblock shortens the deadline of a write that is blocked when s.ctx is done.
// The handler calls stop before it returns: stop waits for shortenDeadline, since
// a ResponseWriter that is used after its handler has returned crashes the
// process over HTTP/2, and spoils the next response over HTTP/1.1.
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

// flush sends what was written.
func (s *stream) flush() {
	s.setDeadline()
	s.err = cmp.Or(s.err, s.c.Flush())
}

// tell sends what comes after the entry with that seq, until there is no more
// to come, s.ctx is done, or the client doesn't take it any more.
func (s *stream) tell(at uint64, eventID func(entry) string) {
	timer := time.NewTimer(heartbeat)
	defer timer.Stop()
	s.flush()
	for s.err == nil && s.ctx.Err() == nil {
		batch, changed, ended, err := s.rec.after(at)
		if ended {
			s.end(err)
			return
		}
		for _, e := range batch {
			s.event("operation", eventID(e), e.data)
			at = e.seq
		}
		if len(batch) > 0 {
			s.flush()
			timer.Reset(heartbeat)
			sleep(s.ctx, pause)
			continue
		}
		select {
		case <-changed:
		case <-timer.C:
			s.write([]byte(": still here\n\n"))
			s.flush()
			timer.Reset(heartbeat)
		case <-s.ctx.Done():
		}
	}
}

// end sends why there will be no more events.
func (s *stream) end(err error) {
	switch {
	case err == nil: // the operation has finished
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
