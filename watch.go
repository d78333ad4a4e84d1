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
	if ctx.Err() != nil {
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
	seq     uint64 // of the hub, to tell older news from later
	foreign bool   // another manager runs it
	err     error  // if not nil: there will be no final state, and why
}

// A feed is a queue of news in which an operation has at most one place for
// each state. The zero feed is ready for use.
type feed struct {
	queue []*news
	taken int            // how many news at the front of queue are gone
	last  map[string]int // where in queue the latest news of an operation are, by its ID
}

// operations returns how many operations there are news of.
func (f *feed) operations() int { return len(f.last) }

// put adds news, in place of those of the same operation in the same state.
func (f *feed) put(n *news) {
	if old := f.same(n); old != nil {
		*old = n
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

// same returns the place of news of the same operation in the same state, or nil.
func (f *feed) same(n *news) **news {
	if i, ok := f.last[n.op.ID]; ok && f.queue[i].op.State == n.op.State && n.err == nil {
		return &f.queue[i]
	}
	return nil
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
func (f *feed) take() *news {
	if f.taken == len(f.queue) {
		return nil
	}
	n := f.queue[f.taken]
	f.queue[f.taken] = nil
	if f.last[n.op.ID] == f.taken {
		delete(f.last, n.op.ID)
	}
	f.taken++
	switch {
	case f.taken < len(f.queue):
	case f.taken > 100: // what a burst has needed is not kept
		*f = feed{}
	default:
		f.queue, f.taken = f.queue[:0], 0
	}
	return n
}

// A hub passes news on from tasks to watchers, in a goroutine of its own: what
// it costs a task to be watched does not depend on the number of watchers, nor
// on what they do.
type hub struct {
	watched atomic.Int64  // the number of watchers
	wake    chan struct{} // holds a token when there may be news
	closing chan struct{} // closed by close
	stopped chan struct{} // closed when the goroutine has ended

	mu     sync.Mutex     // guards what follows; taken last
	feed   feed           // what the watchers are yet to be told
	lagged bool           // some of it was lost, of operations that nobody has named
	seq    uint64         // of the last news
	wanted map[string]int // how many watchers have named an operation, by its ID
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
		wanted:  make(map[string]int),
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
	if h.watched.Load() == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seq++
	n.seq = h.seq
	if h.feed.operations() >= maxLag && h.wanted[n.op.ID] == 0 {
		if _, ok := h.feed.last[n.op.ID]; !ok {
			h.lagged = true
			return
		}
	}
	first := h.feed.operations() == 0
	if old := h.feed.same(&n); old != nil {
		**old = n // nobody else has it yet
	} else {
		c := n
		h.feed.put(&c)
	}
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
			h.lag()
		}
		if closing {
			h.end()
			return
		}
	}
}

// pass passes on all news in f.
func (h *hub) pass(f *feed) {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	var all []*news
	for n := f.take(); n != nil; n = f.take() {
		if !n.foreign && n.err == nil {
			all = append(all, n)
		}
		for w := range h.named[n.op.ID] {
			w.put(n)
		}
	}
	for w := range h.all {
		w.put(all...)
	}
}

// lag has every watcher of all operations end.
func (h *hub) lag() {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	for w := range h.all {
		w.fail(ErrLagged)
	}
}

// end has every watcher end.
func (h *hub) end() {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	h.closed = true
	for w := range h.all {
		w.fail(ErrClosed)
	}
	for _, ws := range h.named {
		for w := range ws {
			w.fail(ErrClosed)
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
	h.mu.Lock()
	w.since = h.seq
	for id := range w.ids {
		h.wanted[id]++
	}
	h.mu.Unlock()
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

// now returns the number of the last news.
func (h *hub) now() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seq
}

func (h *hub) leave(w *watcher) {
	h.listeners.Lock()
	defer h.listeners.Unlock()
	h.watched.Add(-1)
	delete(h.all, w)
	h.mu.Lock()
	for id := range w.ids {
		if h.wanted[id]--; h.wanted[id] <= 0 {
			delete(h.wanted, id)
		}
	}
	h.mu.Unlock()
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
	ids      map[string]bool      // those named; nil for all
	open     map[string]bool      // those of them whose final state is yet to be told
	since    uint64               // the last news before it joined
	present  []func() *news       // return the present states that are yet to be told
	followed map[string]*followed // those that other managers run
	wake     chan struct{}        // holds a token when there may be news
	unhook   func() bool          // from the context
	left     sync.Once

	mu   sync.Mutex // guards what follows; only hub.mu may be taken while holding it
	feed feed
	told map[string]uint64 // the last news before the present state was told, or untold; nothing older is news
	err  error             // why there will be no more news
}

// untold stands for an operation whose present state is yet to be told: that
// will be newer than all news until then.
const untold = math.MaxUint64

// subscribe returns a watcher that is told all from now on. Call stop in the
// end, or have ctx done.
func (m *Manager) subscribe(ctx context.Context, ids []string) *watcher {
	w := newWatcher(m, ids)
	m.hub.join(w)
	if err := w.start(); err != nil {
		w.present = []func() *news{func() *news { return &news{err: err} }}
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
			w.introduce(t.first.ID, func() *news { return w.presentTask(t) })
		}
		return nil
	}
	for _, id := range slices.Sorted(maps.Keys(w.ids)) {
		if t := w.manager.live(id); t != nil {
			w.introduce(id, func() *news { return w.presentTask(t) })
			continue
		}
		op, err := w.manager.stored(id)
		if err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		if !op.State.live() {
			w.introduce(id, func() *news { return &news{op: *op} })
			continue
		}
		f := w.manager.follower.join(op)
		w.followed[id] = f
		w.introduce(id, func() *news { return w.presentFollowed(id, f) })
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
func (w *watcher) introduce(id string, present func() *news) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told[id] = untold
	w.present = append(w.present, present)
}

// presentTask returns the present state of a task, unless its row has yet to be
// stored, which will be news, or nobody will ever store how it ended, which is
// an error only to whoever has named it.
func (w *watcher) presentTask(t *task) *news {
	t.mu.Lock()
	defer t.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !t.announced || t.err != nil && w.ids == nil {
		delete(w.told, t.first.ID)
		return nil
	}
	w.told[t.first.ID] = w.manager.hub.now()
	n := t.news()
	return &n
}

// presentFollowed returns the present state of another manager's operation.
func (w *watcher) presentFollowed(id string, f *followed) *news {
	follower := w.manager.follower
	follower.mu.Lock()
	defer follower.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told[id] = w.manager.hub.now()
	return &news{op: *f.op, err: f.err}
}

// complete reports whether the final states of all operations named are told.
func (w *watcher) complete() bool { return w.ids != nil && len(w.open) == 0 }

// next waits for what there is to tell next: an operation, or why there is
// none, or neither when ctx is done.
func (w *watcher) next(ctx context.Context) (*Operation, error) {
	for {
		n, err := w.take()
		if err != nil {
			return nil, err
		}
		if n != nil {
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
func (w *watcher) take() (*news, error) {
	for len(w.present) > 0 {
		n := w.present[0]()
		w.present[0] = nil // or the operation would be kept for as long as the watcher
		if w.present = w.present[1:]; len(w.present) == 0 {
			w.present = nil
		}
		if n != nil {
			return n, n.err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := w.feed.take(); n != nil; n = w.feed.take() {
		told := w.told[n.op.ID]
		if !n.op.State.live() {
			delete(w.told, n.op.ID)
		}
		if n.seq > told {
			return n, n.err
		}
	}
	return nil, w.err
}

// put adds news, unless they come too late or are too many.
func (w *watcher) put(some ...*news) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range some {
		if w.err != nil || n.seq <= w.since || n.seq <= w.told[n.op.ID] {
			continue
		}
		w.feed.put(n)
		if w.feed.operations() > maxLag {
			w.feed = feed{}
			w.err = ErrLagged
		}
		w.signal()
	}
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
