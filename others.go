package task

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"
)

// This file follows the operations of other managers on the same database that somebody
// here waits for or watches, and their requests to cancel operations of this manager.

const (
	// lookPatience is how long Watch waits for the first look, in case the store
	// hangs.
	lookPatience = 5 * time.Second

	// maxSeen is how many IDs mark the place in the history up to which all rows
	// have been seen.
	maxSeen = 1000

	// maxLight is the length, in bytes, up to which looks read the values of each row.
	maxLight = 4 << 10

	// fewForeign is how many operations are read individually.
	fewForeign = 16
)

// A foreign is an unfinished operation of another manager that somebody here waits
// for or watches.
type foreign struct {
	*life   // op is nil until it has been read
	waiters int
	look    int // the last look that found it unfinished, or that began before it was added
}

// others is what a manager knows of other managers' operations. The manager's mutex
// guards it.
//
// One look runs at a time. It reads the newest rows, then the unfinished ones.
// While the manager is open, operations that watchers of all have seen are removed from
// foreign only by looks, and by release if they are resumed here, so that these watchers
// get their states in order and their end once. An operation that is added to foreign
// during a look waits for the next one.
type others struct {
	foreign map[string]*foreign // by ID; with watchers of all, every one found
	all     int                 // number of watchers of all operations
	seen    []string            // with watchers of all: IDs of the newest rows, newest first; nil before the first look
	seenAt  time.Time           // when they were read
	settled map[string]int      // with watchers of all: the last look before each own operation finished, by ID
	looks   int                 // number of looks begun
	endLook context.CancelFunc  // ends looker; nil unless it runs
}

// lookOut starts or ends the looker, as needed. The caller holds m.mu.
func (m *Manager) lookOut() {
	_, hears := m.db.(Canceller)
	needed := len(m.foreign) > 0 || !m.stopping && (m.all > 0 || hears && len(m.tasks) > 0)
	switch {
	case needed && m.endLook == nil:
		var ctx context.Context
		ctx, m.endLook = context.WithCancel(context.Background())
		db := m.db
		if m.stopping { // the store may be closed while Changes waits
			db = nil
		}
		go m.looker(ctx, db)
	case !needed && m.endLook != nil:
		m.endLook()
		m.endLook = nil
	}
}

// errNotAll is returned by look if it has left out the unfinished operations.
var errNotAll = errors.New("the unfinished operations are looked at later")

// looker looks for changes of others whenever db reports one, until ctx is done. It
// begins with a pause, because most operations end before that.
func (m *Manager) looker(ctx context.Context, db Persistence) {
	recovers := sync.OnceFunc(func() { go m.recoverOthers(ctx) })
	for sleep(ctx, pollInterval) {
		recovers()
		for err := range hints(ctx, db) {
			if err = errors.Join(err, m.look(false)); err == nil {
				continue
			}
			if errors.Is(err, ErrLost) {
				owner := m.owner()
				m.mu.Lock()
				m.lose(owner)
				m.mu.Unlock()
			} else if !errors.Is(err, errNotAll) {
				m.log.Debug("task: looking at the operations of others failed", "err", err)
			}
			break // look again without waiting for a change
		}
	}
}

// look looks once. It omits the unfinished operations, which may be many, while reading
// them would take more than a tenth of the time. If full is set, it always reads them.
func (m *Manager) look(full bool) error {
	m.looking <- struct{}{}
	defer func() { <-m.looking }()
	m.mu.Lock()
	m.looks++
	look, open := m.looks, !m.stopping // if not open, the store may be closed, and readRest tells the waiters
	all := open && m.all > 0
	many := open && len(m.foreign) > fewForeign
	runs := open && len(m.tasks) > 0
	m.mu.Unlock()
	var err error
	if runs {
		err = m.hear()
	}
	if err == nil && all {
		err = m.readNewest(look)
	}
	start := time.Now()
	switch {
	case err != nil:
	case !full && start.Before(m.nextFull):
		return errNotAll
	case all || many:
		err = m.readUnfinished(look)
	}
	if err == nil {
		err = m.readRest(look)
	}
	m.nextFull = time.Now().Add(9 * time.Since(start))
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.settled, func(_ string, before int) bool { return before < look })
	m.lookOut()
	return nil
}

// hear carries out requests to cancel own operations.
func (m *Manager) hear() error {
	requests, err := cancelRequests(m.db)
	for id, text := range requests {
		if !m.cancelLive(id, text) && m.liveRow(id) != nil { // its first row was stored just now
			m.cancelLive(id, text)
		}
	}
	return err
}

// readNewest processes the rows that were saved since its last call. The first call
// determines the place in the history.
func (m *Manager) readNewest(look int) error {
	m.mu.Lock()
	seen, since := m.seen, m.seenAt.Add(-time.Minute)
	m.mu.Unlock()
	now := wall()
	rows, lost, err := m.rowsSince(seen, since)
	if err != nil {
		return err
	}
	for i, row := range slices.Backward(rows) {
		old := seen == nil || lost && row.CreatedAt.Before(since)
		if err = m.found(row, look, !old); err != nil {
			if seen == nil {
				return err
			}
			rows = rows[i+1:] // the older ones are done
			break
		}
	}
	ids := make([]string, 0, maxSeen)
	for _, row := range rows[:min(len(rows), maxSeen)] {
		ids = append(ids, row.ID)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all > 0 {
		m.seen, m.seenAt = append(ids, seen[:min(len(seen), maxSeen-len(ids))]...), now
	}
	return err
}

// rowsSince returns the rows that come before the first one in seen, newest first, or
// the newest maxSeen rows if seen is nil. The place is lost if none of seen is stored any
// longer, or if after ten times maxSeen rows one is older than since.
func (m *Manager) rowsSince(seen []string, since time.Time) (rows []*Operation, lost bool, err error) {
	known := make(map[string]bool, len(seen))
	for _, id := range seen {
		known[id] = true
	}
	f := Filter{MaxValue: maxLight}
	for n := 16; ; n = min(4*n, maxSeen) {
		page, err := listFiltered(m.db, f, n, 0)
		if err != nil || len(page) == 0 {
			return rows, len(seen) > 0, err
		}
		for _, row := range page {
			switch {
			case known[row.ID], seen == nil && len(rows) == maxSeen:
				return rows, false, nil
			case len(rows) > 10*maxSeen && row.CreatedAt.Before(since):
				return rows, true, nil
			}
			known[row.ID] = true // in case a store returns a page twice
			rows = append(rows, row)
			f.Before = row.ID
		}
	}
}

// readUnfinished processes all unfinished rows, if the store is a [FilteredLister].
func (m *Manager) readUnfinished(look int) error {
	l, ok := m.db.(FilteredLister)
	f := Filter{States: []State{StatePending, StateRunning}, MaxValue: maxLight}
	heard := time.Now()
	for ok {
		if time.Since(heard) > pollInterval { // cancel requests must not wait for the last page
			if err := m.hear(); err != nil {
				return err
			}
			heard = time.Now()
		}
		page, err := l.ListFiltered(f, maxSeen, 0)
		if errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, row := range page {
			if err := m.found(row, look, false); err != nil {
				return err
			}
		}
		if ok = len(page) == maxSeen && page[maxSeen-1].ID != f.Before; ok {
			f.Before = page[maxSeen-1].ID
		}
	}
	return nil
}

// readRest reads one by one the followed operations that this look has not found
// unfinished.
func (m *Manager) readRest(look int) error {
	var rest []string
	m.mu.Lock()
	for id, f := range m.foreign {
		if f.look < look {
			rest = append(rest, id)
		}
	}
	m.mu.Unlock()
	for _, id := range rest {
		row, err := m.load(id)
		if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrClosed) {
			return err
		}
		m.mu.Lock()
		m.take(id, row, err, false)
		m.mu.Unlock()
	}
	return nil
}

// found processes a row of a list. It first reads the values that the list has left
// out. fresh says that the row was saved since the last look.
func (m *Manager) found(row *Operation, look int, fresh bool) error {
	m.mu.Lock()
	f := m.foreign[row.ID]
	matters := f != nil || m.all > 0 && !m.own(row, row.ID) && (fresh || row.State.live())
	if f != nil && row.State.live() {
		f.look = look
		matters = f.op == nil || later(row, f.op)
	}
	m.mu.Unlock()
	if !matters {
		return nil
	}
	_, light := row.Metadata.(Omitted)
	if _, omitted := row.Result.(Omitted); light || omitted {
		var err error
		if row, err = get(m.db, row.ID); err != nil {
			if errors.Is(err, ErrNotFound) {
				return nil // readRest finds that, too
			}
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.take(row.ID, row, nil, fresh)
	return nil
}

// own reports whether this manager publishes an operation itself. The caller holds
// m.mu.
func (m *Manager) own(row *Operation, id string) bool {
	_, settled := m.settled[id]
	t := m.tasks[id]
	return settled || t != nil && (!t.hidden() || row != nil && t.op.saved(row))
}

// later reports whether row is a later state of an operation than known.
func later(row, known *Operation) bool {
	return row.UpdatedAt.After(known.UpdatedAt) || !row.State.live() || row.Cancelling && !known.Cancelling ||
		known.State == StatePending && row.State != known.State
}

// take records the new state of another manager's operation and publishes it. If
// watchers have not seen the operation, it publishes the end only of a fresh one:
// otherwise a look has published it, or will. The caller holds m.mu.
func (m *Manager) take(id string, row *Operation, err error, fresh bool) {
	f, own := m.foreign[id], m.own(row, id)
	told := f != nil && f.op != nil
	switch {
	case f == nil && (m.all == 0 || m.stopping || own), err == nil && told && !later(row, f.op):
		return
	}
	f = m.lookFor(id)
	soft := false
	if f.err = err; err == nil {
		soft = told && f.op.State == row.State
		f.op, f.stored = row, row.State
	}
	ended := err != nil || !row.State.live()
	if !own && (told || fresh || !ended) {
		m.appendEvent(event{op: f.op, err: err}, soft)
	}
	if ended {
		close(f.done)
		delete(m.foreign, id)
	}
}

// lookFor makes every look that begins after it look for an operation of another
// manager. The caller holds m.mu.
func (m *Manager) lookFor(id string) *foreign {
	f := m.foreign[id]
	if f == nil {
		f = &foreign{life: &life{done: make(chan struct{})}, look: m.looks}
		m.foreign[id] = f
	}
	return f
}

// follow starts following an operation of another manager, until unfollow.
func (m *Manager) follow(id string) *foreign {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.lookFor(id)
	f.waiters++
	m.lookOut()
	return f
}

// unfollow undoes follow.
func (m *Manager) unfollow(id string, f *foreign) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.waiters--; f.waiters == 0 && m.foreign[id] == f && (m.all == 0 || f.op == nil) {
		delete(m.foreign, id)
	}
	m.lookOut()
}

// followAll starts following all operations of others, and returns after the first
// look. If that takes longer than lookPatience, what the look finds becomes events.
func (m *Manager) followAll(ctx context.Context) {
	m.mu.Lock()
	if m.all++; m.all == 1 {
		m.settled = make(map[string]int)
	}
	m.lookOut()
	stopping := m.stopping
	m.mu.Unlock()
	if stopping {
		return
	}
	looked := make(chan error, 1)
	go func() { looked <- m.look(true) }()
	select {
	case <-looked: // if that has failed, the looker tries again
	case <-ctx.Done():
	case <-time.After(lookPatience):
	}
}

// unfollowAll undoes followAll.
func (m *Manager) unfollowAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all--; m.all == 0 {
		m.seen, m.settled = nil, nil
		m.dropUnwaited()
	}
	m.lookOut()
}

// dropUnwaited forgets the operations of others that nobody waits for. The caller
// holds m.mu.
func (m *Manager) dropUnwaited() {
	maps.DeleteFunc(m.foreign, func(_ string, f *foreign) bool { return f.waiters == 0 })
}

// lose gives up the operations that were submitted under an Owner other than the
// present one, and follows them like those of other managers: see [Recoverer]. Running
// functions keep their slots and keys until they return. The caller holds m.mu.
func (m *Manager) lose(owner string) {
	for _, t := range m.sorted() {
		if t.op.Owner == owner || t.stored == "" {
			continue
		}
		m.log.Error("task: operation lost", "id", t.id, "name", t.name, "err", ErrLost)
		if t.cancel != nil && t.final == nil {
			go t.cancel(ErrLost) // a goroutine, because it runs the function's callbacks
			m.lost[t] = true
			delete(m.tasks, t.id)
		} else {
			m.queue.Remove(&t.ticket)
			m.leave(t)
		}
		t.word.Or(wordReturned)
		t.final = t.op
		answer(t.checkpoints, ErrLost)
		t.checkpoints = nil
		m.followLost(t)
	}
	m.startNext()
	m.lookOut()
	if m.draining && len(m.tasks) == 0 {
		m.drain()
	}
}

// followLost makes the waiters for a lost operation wait for its outcome under its new
// owner. The caller holds m.mu.
func (m *Manager) followLost(t *task) {
	f := m.foreign[t.id]
	if f == nil {
		f = &foreign{life: &t.life, look: m.looks}
		m.foreign[t.id] = f
	} else { // followed before it was resumed here
		go func() {
			<-f.done
			m.mu.Lock()
			defer m.mu.Unlock()
			t.op, t.err = cmp.Or(f.op, t.op), f.err
			close(t.done)
		}()
	}
	f.waiters++ // kept until the end: this manager recovers it if those that took it over die
}
