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

// What other managers on the same database do: their operations that somebody here
// waits for or watches, and their requests to cancel operations of this manager.

const (
	// lookPatience is how long Watch waits for the first look, which a store that
	// hangs holds up.
	lookPatience = 5 * time.Second

	// maxSeen is how many IDs mark the place in the history up to which all is
	// seen. The place counts as lost after ten times as many rows.
	maxSeen = 1000

	// maxLight is how long values may be that a look reads of every row.
	maxLight = 4 << 10

	// fewForeign is how many operations are read one by one.
	fewForeign = 16
)

// A foreign is an unfinished operation of another manager that somebody here waits
// for or watches.
type foreign struct {
	*life   // op is nil until it has been read
	waiters int
	look    int // the last look that found it unfinished, or that it came too late for
}

// What a manager knows of others. Its mutex guards this.
//
// There is one look at a time. It reads the newest rows first, then the
// unfinished ones, and only a look takes an operation out of foreign that the
// watchers of all know of: so that each is told in order, and its end once. An
// operation that comes into foreign during a look has to wait for the next one.
type others struct {
	foreign map[string]*foreign // by ID; with watchers of all, every one that was found
	all     int                 // how many watchers of all there are
	seen    []string            // with those: the IDs of the newest rows, the newest first; nil before the first look
	seenAt  time.Time           // when they were read
	settled map[string]int      // with those: own operations that have finished, by ID, and the last look before that
	looks   int                 // how many have begun
	endLook context.CancelFunc  // ends looker; nil unless that runs
}

// lookOut starts or ends the looker. The caller holds m.mu.
func (m *Manager) lookOut() {
	_, hears := m.db.(Canceller)
	needed := len(m.foreign) > 0 || !m.stopping && (m.all > 0 || hears && len(m.tasks) > 0)
	switch {
	case needed && m.endLook == nil:
		var ctx context.Context
		ctx, m.endLook = context.WithCancel(context.Background())
		db := m.db
		if m.stopping { // it may be closed while Changes would wait
			db = nil
		}
		go m.looker(ctx, db)
	case !needed && m.endLook != nil:
		m.endLook()
		m.endLook = nil
	}
}

// errNotAll is returned by look when it left out what takes long.
var errNotAll = errors.New("the unfinished operations are looked at later")

// looker looks at what others have changed, until ctx is done; db tells when. Most
// operations end before the first look.
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
			break // to look again without waiting for a change
		}
	}
}

// look looks once. Unless full says otherwise, it leaves out the unfinished
// operations, which may be many, when those would take more than a tenth of the time.
func (m *Manager) look(full bool) error {
	m.looking <- struct{}{}
	defer func() { <-m.looking }()
	m.mu.Lock()
	m.looks++
	look, open := m.looks, !m.stopping // else the store may be closed, which readRest tells those who wait
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

// hear acts on requests to cancel own operations.
func (m *Manager) hear() error {
	requests, err := cancelRequests(m.db)
	for id, text := range requests {
		if !m.cancelLive(id, text) && m.liveRow(id) != nil { // its row was stored just now
			m.cancelLive(id, text)
		}
	}
	return err
}

// readNewest takes in the rows that were saved since the last call. The first call
// finds the place in the history.
func (m *Manager) readNewest(look int) error {
	m.mu.Lock()
	seen, since := m.seen, m.seenAt.Add(-time.Minute)
	m.mu.Unlock()
	now := wall()
	rows, lost, err := m.rowsBefore(seen, since)
	if err != nil {
		return err
	}
	for i, row := range slices.Backward(rows) {
		old := seen == nil || lost && row.CreatedAt.Before(since)
		if err = m.found(row, look, !old); err != nil {
			if seen == nil {
				return err
			}
			rows = rows[i+1:] // the others are not to be told again
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

// rowsBefore returns the newest rows up to the first one seen, the newest first, or
// maxSeen of them if seen is nil. The place is lost if none of seen is stored any
// more.
func (m *Manager) rowsBefore(seen []string, since time.Time) (rows []*Operation, lost bool, err error) {
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
			known[row.ID] = true // should a store return a page twice
			rows = append(rows, row)
			f.Before = row.ID
		}
	}
}

// readUnfinished takes in all unfinished rows, if the store has an index for them.
func (m *Manager) readUnfinished(look int) error {
	l, ok := m.db.(FilteredLister)
	f := Filter{States: []State{StatePending, StateRunning}, MaxValue: maxLight}
	heard := time.Now()
	for ok {
		if time.Since(heard) > pollInterval { // requests do not wait for the end
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

// readRest reads those operations one by one that have left the unfinished ones,
// or were not looked for among these.
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

// found takes in a row from a list, whole. With fresh, it was saved since the last
// look.
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
				return nil // which readRest will find, too
			}
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.take(row.ID, row, nil, fresh)
	return nil
}

// own reports whether this manager has told of an operation itself. The caller
// holds m.mu.
func (m *Manager) own(row *Operation, id string) bool {
	_, settled := m.settled[id]
	t := m.tasks[id]
	return settled || t != nil && (!t.hidden() || row != nil && t.op.saved(row))
}

// later reports whether a row is a later state of an operation than another one.
func later(row, known *Operation) bool {
	return row.UpdatedAt.After(known.UpdatedAt) || !row.State.live() || row.Cancelling && !known.Cancelling ||
		known.State == StatePending && row.State != known.State
}

// take takes in what an operation of another manager has become. The end of one of
// which watchers have not been told is told only if it is fresh: else a look has
// told it before, or will. The caller holds m.mu.
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

// lookFor has the looks look for an operation of another manager, as those do that
// begin from now on. The caller holds m.mu.
func (m *Manager) lookFor(id string) *foreign {
	f := m.foreign[id]
	if f == nil {
		f = &foreign{life: &life{done: make(chan struct{})}, look: m.looks}
		m.foreign[id] = f
	}
	return f
}

// follow begins to look at an operation of another manager. Call unfollow in the
// end.
func (m *Manager) follow(id string) *foreign {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.lookFor(id)
	f.waiters++
	m.lookOut()
	return f
}

// unfollow is the end of follow.
func (m *Manager) unfollow(id string, f *foreign) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.waiters--; f.waiters == 0 && m.foreign[id] == f && (m.all == 0 || f.op == nil) {
		delete(m.foreign, id)
	}
	m.lookOut()
}

// followAll begins to look at all operations of others. It returns after the first
// look; should that take too long, what it finds are events.
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

// unfollowAll is the end of followAll.
func (m *Manager) unfollowAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all--; m.all == 0 {
		m.seen, m.settled = nil, nil
		m.dropUnwaited()
	}
	m.lookOut()
}

// dropUnwaited forgets the operations of others for which nobody waits. The caller
// holds m.mu.
func (m *Manager) dropUnwaited() {
	maps.DeleteFunc(m.foreign, func(_ string, f *foreign) bool { return f.waiters == 0 })
}

// lose gives up the operations that were submitted under another Owner than the
// present one: see [Recoverer]. They are followed as those of other managers. The
// functions that run keep their slots and keys until they return. The caller holds
// m.mu.
func (m *Manager) lose(owner string) {
	for _, t := range m.sorted() {
		if t.op.Owner == owner || t.stored == "" {
			continue
		}
		m.log.Error("task: operation lost", "id", t.id, "name", t.name, "err", ErrLost)
		if t.cancel != nil && t.final == nil {
			go t.cancel(ErrLost) // which runs the function's own callbacks
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

// followLost has those who wait for a lost operation get what becomes of it. The
// caller holds m.mu.
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
	f.waiters++ // until its end: this manager recovers it, should those die that took it over
}
