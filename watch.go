package task

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Watch returns what happens to the operations with those IDs, or, if none is
// named, to all live ones of this manager and all that are submitted from the
// call on.
//
// First comes the present state of each, the oldest first, and then every
// change of state, in order and exactly once. Progress and metadata are
// conflated: what comes is the latest. Every operation is a snapshot of the
// receiver's own. An operation of another manager on the same database, which
// has to be named, is looked at every 100 milliseconds, so that a state which
// passes more quickly may be missed.
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
// there is no such operation, or [ErrClosed] once the manager is closed and all
// is told, or [ErrLagged].
//
// The body of the loop may take its time, and may call any method: no
// operation ever waits for it. But once there is something to tell of more
// than 10,000 operations, the sequence ends with ErrLagged. Watch anew, and
// look for what was missed in List.
//
// Nothing is missed between the call of Watch and the loop. Whoever calls it
// has to range over the sequence, or to see to it that ctx is done some time.
// Ranging over it again watches anew.
func (m *Manager) Watch(ctx context.Context, ids ...string) iter.Seq2[*Operation, error] {
	ids = slices.Clone(ids)
	var unused atomic.Pointer[watcher]
	unused.Store(m.subscribe(ctx, ids))
	return func(yield func(*Operation, error) bool) {
		w := unused.Swap(nil)
		if w == nil {
			w = m.subscribe(ctx, ids)
		}
		defer w.stop()
		for ctx.Err() == nil && !w.complete() {
			op, err := w.next(ctx)
			switch {
			case err != nil:
				yield(nil, fmt.Errorf("task: watch: %w", err))
				return
			case op == nil: // ctx is done
				return
			case !yield(m.present(*op), nil):
				return
			}
		}
	}
}

const (
	// maxLag is how many operations there may be something to tell of.
	maxLag = 10_000

	// progressDelay is how long the watchers wait for progress, so that tasks
	// that report as fast as they can don't keep them busy all the time.
	progressDelay = 20 * time.Millisecond
)

// A piece of news is an operation as it is shown from some moment on.
type news struct {
	op      Operation
	version uint64 // of the operation, to tell older news from later
	foreign bool   // another manager runs it
	err     error  // if not nil: there will be no final state, and why
}

// A feed is a queue of news in which an operation has at most one place for
// each state. The zero feed is ready for use.
type feed struct {
	queue []news
	taken int            // how many news at the front of queue are gone
	last  map[string]int // where in queue the latest news of an operation are, by its ID
}

// operations returns how many operations there are news of.
func (f *feed) operations() int { return len(f.last) }

// put adds news, in place of those of the same operation in the same state.
func (f *feed) put(n news) {
	if i, ok := f.last[n.op.ID]; ok && f.queue[i].op.State == n.op.State && n.err == nil {
		f.queue[i] = n
		return
	}
	if f.last == nil {
		f.last = make(map[string]int)
	}
	if f.taken > len(f.queue)/2 {
		f.compact()
	}
	f.last[n.op.ID] = len(f.queue)
	f.queue = append(f.queue, n)
}

// compact reuses the room of what is gone.
func (f *feed) compact() {
	rest := copy(f.queue, f.queue[f.taken:])
	clear(f.queue[rest:])
	f.queue = f.queue[:rest]
	for id := range f.last {
		f.last[id] -= f.taken
	}
	f.taken = 0
}

// take removes the oldest news.
func (f *feed) take() (news, bool) {
	if f.taken == len(f.queue) {
		return news{}, false
	}
	n := f.queue[f.taken]
	f.queue[f.taken] = news{}
	if f.last[n.op.ID] == f.taken {
		delete(f.last, n.op.ID)
	}
	f.taken++
	if f.taken == len(f.queue) {
		f.queue, f.taken = f.queue[:0], 0
	}
	return n, true
}

// A hub passes news on from tasks to watchers, in a goroutine of its own: what
// it costs a task to be watched does not depend on the number of watchers, nor
// on what they do.
type hub struct {
	watched atomic.Int64  // the number of watchers
	wake    chan struct{} // holds a token when there may be news
	closing chan struct{} // closed by close
	stopped chan struct{} // closed when the goroutine has ended

	mu     sync.Mutex // guards what follows; taken last
	feed   feed       // what the watchers are yet to be told
	lagged bool       // some of it was lost
	timer  *time.Timer

	listeners sync.Mutex // guards what follows; no task holds it
	all       map[*watcher]bool
	named     map[string]map[*watcher]bool // by the IDs of operations
	closed    bool
}

func newHub() *hub {
	h := &hub{
		wake:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
		all:     make(map[*watcher]bool),
		named:   make(map[string]map[*watcher]bool),
	}
	h.timer = time.AfterFunc(time.Hour, h.signal)
	h.timer.Stop()
	return h
}

func (h *hub) signal() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// tell tells the watchers news of an operation, those of a new state at once
// and others soon. It neither waits nor, on the average, allocates.
func (h *hub) tell(n news, now bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.feed.operations() >= maxLag {
		if _, ok := h.feed.last[n.op.ID]; !ok {
			h.lagged = true
			return
		}
	}
	first := h.feed.operations() == 0
	h.feed.put(n)
	switch {
	case now:
		h.signal()
	case first:
		h.timer.Reset(progressDelay)
	}
}

// run passes on news until close is called.
func (h *hub) run() {
	defer close(h.stopped)
	var spare feed // what was passed on before; its memory is used again
	for {
		closing := false
		select {
		case <-h.wake:
		case <-h.closing:
			closing = true
		}
		h.mu.Lock()
		h.feed, spare = spare, h.feed
		lagged := h.lagged
		h.lagged = false
		h.mu.Unlock()
		h.pass(&spare)
		if lagged {
			h.fail(ErrLagged)
		}
		if closing {
			h.fail(ErrClosed)
			return
		}
	}
}

// pass passes on all news in f.
func (h *hub) pass(f *feed) {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	for n, ok := f.take(); ok; n, ok = f.take() {
		if !n.foreign && n.err == nil {
			for w := range h.all {
				w.put(n)
			}
		}
		for w := range h.named[n.op.ID] {
			w.put(n)
		}
	}
}

// fail has every watcher end with err.
func (h *hub) fail(err error) {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	h.closed = err == ErrClosed
	for w := range h.all {
		w.fail(err)
	}
	for _, ws := range h.named {
		for w := range ws {
			w.fail(err)
		}
	}
}

// close ends the goroutine and, once they have been told all, the watchers.
func (h *hub) close() {
	close(h.closing)
	<-h.stopped
	h.timer.Stop()
}

// join has w told all news from now on.
func (h *hub) join(w *watcher) {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	h.watched.Add(1)
	if h.closed {
		w.fail(ErrClosed)
		return
	}
	if w.ids == nil {
		h.all[w] = true
	}
	for id := range w.ids {
		if h.named[id] == nil {
			h.named[id] = make(map[*watcher]bool)
		}
		h.named[id][w] = true
	}
}

func (h *hub) leave(w *watcher) {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	h.watched.Add(-1)
	delete(h.all, w)
	for id := range w.ids {
		if delete(h.named[id], w); len(h.named[id]) == 0 {
			delete(h.named, id)
		}
	}
}

// A watcher is one call of Watch.
type watcher struct {
	// These belong to the caller of Watch.
	manager  *Manager
	ids      map[string]bool       // those named; nil for all
	open     map[string]bool       // those of them whose final state is yet to be told
	present  []func() (news, bool) // return the present states that are yet to be told
	followed map[string]*followed  // those that other managers run
	wake     chan struct{}         // holds a token when there may be news
	unhook   func() bool           // from the context
	left     sync.Once

	mu   sync.Mutex // guards what follows; taken last
	feed feed
	told map[string]uint64 // the versions that were told as present, or untold; nothing older is news
	err  error             // why there will be no more news
}

// untold is the version of an operation whose present state is yet to be told:
// that will be newer than all news until then.
const untold = math.MaxUint64

// subscribe returns a watcher that is told all from now on. Call stop in the
// end, or have ctx done.
func (m *Manager) subscribe(ctx context.Context, ids []string) *watcher {
	w := newWatcher(m, ids)
	m.hub.join(w)
	if err := w.start(); err != nil {
		w.present = []func() (news, bool){func() (news, bool) { return news{err: err}, true }}
	}
	w.unhook = context.AfterFunc(ctx, w.leave)
	return w
}

func newWatcher(m *Manager, ids []string) *watcher {
	w := &watcher{
		manager:  m,
		open:     make(map[string]bool),
		followed: make(map[string]*followed),
		wake:     make(chan struct{}, 1),
		told:     make(map[string]uint64),
	}
	for _, id := range ids {
		w.open[id] = true
	}
	if len(ids) > 0 {
		w.ids = maps.Clone(w.open)
	}
	return w
}

// start finds whose present state is to be told.
func (w *watcher) start() error {
	if w.ids == nil {
		for _, t := range w.manager.liveTasks() {
			w.introduce(t.first.ID, func() (news, bool) { return w.presentTask(t) })
		}
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(w.ids)) {
		if t := w.manager.live(id); t != nil {
			w.introduce(id, func() (news, bool) { return w.presentTask(t) })
			continue
		}
		op, err := w.manager.stored(id)
		if err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		if !op.State.live() {
			w.introduce(id, func() (news, bool) { return news{op: *op}, true })
			continue
		}
		f := w.manager.follower.join(op)
		w.followed[id] = f
		w.introduce(id, func() (news, bool) { return w.presentFollowed(id, f), true })
	}
	return nil
}

func (w *watcher) stop() {
	w.unhook()
	w.leave()
}

func (w *watcher) leave() {
	w.left.Do(func() {
		w.manager.hub.leave(w)
		for id, f := range w.followed {
			w.manager.follower.leave(id, f)
		}
	})
}

// introduce has the present state of an operation told before any news of it.
func (w *watcher) introduce(id string, present func() (news, bool)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told[id] = untold
	w.present = append(w.present, present)
}

// presentTask returns the present state of a task, unless its row has yet to be
// stored, which will be news, or nobody will ever store how it ended, which is
// an error only to whoever has named it.
func (w *watcher) presentTask(t *task) (news, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !t.announced || t.err != nil && w.ids == nil {
		delete(w.told, t.first.ID)
		return news{}, false
	}
	w.told[t.first.ID] = t.version
	return t.news(), true
}

// presentFollowed returns the present state of another manager's operation.
func (w *watcher) presentFollowed(id string, f *followed) news {
	follower := w.manager.follower
	follower.mu.Lock()
	defer follower.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told[id] = f.version
	return news{op: *f.op, version: f.version, err: f.err}
}

// complete reports whether the final states of all operations named are told.
func (w *watcher) complete() bool { return w.ids != nil && len(w.open) == 0 }

// next waits for what there is to tell next: an operation, or why there is
// none, or neither when ctx is done.
func (w *watcher) next(ctx context.Context) (*Operation, error) {
	for {
		n, ok, err := w.take()
		if err != nil {
			return nil, err
		}
		if ok {
			if !n.op.State.live() {
				delete(w.open, n.op.ID)
			}
			return &n.op, nil
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// take returns what there is to tell now, if there is anything.
func (w *watcher) take() (n news, ok bool, err error) {
	for !ok && len(w.present) > 0 {
		present := w.present[0]
		w.present = w.present[1:]
		if n, ok = present(); ok {
			return n, true, n.err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for n, ok = w.feed.take(); ok; n, ok = w.feed.take() {
		told, skip := w.told[n.op.ID]
		if !n.op.State.live() {
			delete(w.told, n.op.ID)
		}
		if !skip || n.version > told {
			return n, true, n.err
		}
	}
	return news{}, false, w.err
}

// put adds news, unless they come too late or are too many.
func (w *watcher) put(n news) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil || n.version <= w.told[n.op.ID] {
		return
	}
	w.feed.put(n)
	if w.feed.operations() > maxLag {
		w.feed = feed{}
		w.err = ErrLagged
	}
	w.signal()
}

// fail has the watcher end with err, after what it has yet to tell.
func (w *watcher) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = cmp.Or(w.err, err)
	w.signal()
}

func (w *watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}
