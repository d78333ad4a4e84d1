package task

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
)

// A Manager runs operations and answers for them. All its methods may be
// called from any number of goroutines.
//
// It needs no care while it lives: a finished operation leaves its memory as
// soon as the final state is stored.
type Manager struct {
	// Immutable.
	db        Persistence
	log       *slog.Logger
	ctx       context.Context // the parent of every function's context
	cancel    context.CancelCauseFunc
	writer    *writer
	follower  *follower
	hub       *hub
	retention time.Duration // how long to keep the history; 0 for ever
	drained   chan struct{} // closed once nothing is submitted any more and all is stored, or Close gave up
	ended     chan struct{} // closed once Close has done its work
	closeErr  error         // set before ended is closed

	// functions counts the goroutines that run functions, and those that retry
	// recovery and prune. Add only while holding mu and not closed.
	functions sync.WaitGroup

	mu      sync.Mutex       // guards what follows; taken before any task.mu
	tasks   map[string]*task // the live operations by ID
	queue   queue            // those that wait for their turn
	refuses bool             // Submit returns ErrClosed
	closing bool             // Close was called
	closed  bool             // no function is started any more
}

// New returns a manager that keeps its operations in db, or in a
// [NewMemoryStore] of its own if db is nil.
//
// Before it returns, every PENDING or RUNNING operation in db whose process is
// gone is marked as FAILED with the error "Task failed due to system restart".
// If that fails, so does New.
func New(db Persistence, opts ...Option) (*Manager, error) {
	m := newManager(db, opts)
	if err := m.recover(); err != nil {
		m.Close()
		return nil, fmt.Errorf("task: recovery: %w", err)
	}
	m.startPruning()
	return m, nil
}

// NewManager is [New] for a program that starts even when its database can't
// be read just now: a failed recovery is logged and tried again in the
// background until it succeeds or the manager is closed.
func NewManager(db Persistence, opts ...Option) *Manager {
	m := newManager(db, opts)
	if err := m.recover(); err != nil {
		m.log.Error("task: recovery failed, will be tried again", "err", err)
		m.functions.Go(m.keepRecovering)
	}
	m.startPruning()
	return m
}

func (m *Manager) startPruning() {
	if m.retention > 0 {
		m.functions.Go(m.keepPruning)
	}
}

func newManager(db Persistence, opts []Option) *Manager {
	if db == nil {
		db = NewMemoryStore()
	}
	m := &Manager{
		db:      db,
		log:     slog.Default(),
		tasks:   make(map[string]*task),
		drained: make(chan struct{}),
		ended:   make(chan struct{}),
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	for _, opt := range opts {
		if opt != nil {
			opt(m)
		}
	}
	m.follower = newFollower(m)
	m.hub = newHub()
	go m.hub.run()
	m.writer = newWriter(m)
	go m.writer.run()
	return m
}

// Submit stores a new operation, has fn called in a goroutine of its own, and
// returns the operation as it then is: PENDING, or further if it is quick.
//
// When Submit returns an error, fn is never called. It does so if name is
// empty, fn is nil or the metadata is not JSON, after Close or Shutdown
// ([ErrClosed]), and if the operation can't be stored. With an SQLite store
// that is told within about 20 seconds: up to 10 in which an earlier write
// gives up, and 10 for this one. With a store that has the four methods only,
// it may have to wait for as many calls as there are operations that change.
//
// Submissions that arrive while a commit is under way share the next one.
func (m *Manager) Submit(name string, fn Func, opts ...SubmitOption) (*Operation, error) {
	t, err := m.newTask(name, fn, opts)
	if err != nil {
		return nil, fmt.Errorf("task: submit %.64q: %w", name, err)
	}
	if err := m.enqueue(t); err != nil {
		return nil, fmt.Errorf("task: submit %.64q: %w", name, err)
	}
	return t.snapshot(), nil
}

func (m *Manager) newTask(name string, fn Func, opts []SubmitOption) (*task, error) {
	if name == "" {
		return nil, errors.New("the name is empty")
	}
	if fn == nil {
		return nil, errors.New("the function is nil")
	}
	id, err := uuid.NewV7()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	created := now.UTC().Truncate(time.Microsecond)
	t := &task{
		manager: m,
		fn:      fn,
		began:   now,
		saved:   make(chan error, 1),
		done:    make(chan struct{}),
		op: Operation{
			ID:        id.String(),
			Name:      validUTF8(name),
			State:     StatePending,
			CreatedAt: created,
			UpdatedAt: created,
			manager:   m,
		},
	}
	for _, opt := range opts {
		if opt == nil {
			continue
		}
		if err := opt(t); err != nil {
			return nil, err
		}
	}
	t.first = t.op
	return t, nil
}

// enqueue has the row of a new task committed. The writer then has it admitted.
func (m *Manager) enqueue(t *task) error {
	if m.writer.doubtful.Load() >= maxDoubtful {
		return fmt.Errorf("the store has failed %d times, and has yet to tell what became of that", maxDoubtful)
	}
	m.mu.Lock()
	if m.refuses {
		m.mu.Unlock()
		return ErrClosed
	}
	// It is live before it is stored: whoever finds its row finds the task.
	m.tasks[t.first.ID] = t
	m.writer.save(t)
	m.mu.Unlock()
	return <-t.saved
}

// admit has a task whose row is committed run when it is its turn.
func (m *Manager) admit(t *task) {
	m.mu.Lock()
	defer m.mu.Unlock()
	t.announce()
	switch {
	case m.closed:
		t.finish(outcome{state: StateFailed, err: errTextShutdown})
	case !t.finishing(): // by Cancel
		m.queue.add(t)
		m.startNext()
	}
}

// startNext starts every task whose turn it is. The caller holds m.mu.
func (m *Manager) startNext() {
	for t := m.queue.next(); t != nil; t = m.queue.next() {
		m.functions.Go(func() {
			defer m.release(t)
			t.run(m.ctx)
		})
	}
}

// release lets others run in the place of a task whose function has returned.
func (m *Manager) release(t *task) {
	if m.queue.limit == 0 && len(t.locks) == 0 { // nobody waits for it
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.queue.done(t)
	m.startNext()
}

// withdraw takes a cancelled task out of the queue.
func (m *Manager) withdraw(t *task) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.queue.remove(t)
	m.startNext()
}

// forget drops a task that has nothing left to store.
func (m *Manager) forget(t *task) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.tasks, t.first.ID)
	if m.refuses && len(m.tasks) == 0 {
		m.drain()
	}
}

// drain closes drained. The caller holds m.mu.
func (m *Manager) drain() {
	select {
	case <-m.drained:
	default:
		close(m.drained)
	}
}

// live returns the live operation with that ID, or nil.
func (m *Manager) live(id string) *task {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.tasks[id]
}

// liveTasks returns all live operations, by order of submission.
func (m *Manager) liveTasks() []*task {
	m.mu.Lock()
	tasks := slices.Collect(maps.Values(m.tasks))
	m.mu.Unlock()
	slices.SortFunc(tasks, func(a, b *task) int { return cmp.Compare(a.first.ID, b.first.ID) })
	return tasks
}

// present makes what callers get of op, a copy of their own.
func (m *Manager) present(op Operation) *Operation {
	op.Metadata = roundTrip(op.Metadata)
	op.Result = roundTrip(op.Result)
	op.manager = m
	return &op
}

// Get returns the operation with that ID, live from memory and finished from
// the database, and whether there is one. An error of the database is logged.
func (m *Manager) Get(id string) (*Operation, bool) {
	op, err := m.get(id)
	if err != nil {
		if !errors.Is(err, ErrNotFound) {
			m.log.Error("task: get", "id", id, "err", err)
		}
		return nil, false
	}
	return op, true
}

func (m *Manager) get(id string) (*Operation, error) {
	if t := m.live(id); t != nil {
		return t.snapshot(), nil
	}
	return m.stored(id)
}

// stored returns the operation as it is in the database.
func (m *Manager) stored(id string) (*Operation, error) {
	op, err := m.db.Get(id)
	if err != nil {
		return nil, err
	}
	if op == nil {
		return nil, ErrNotFound
	}
	return m.present(*op), nil
}

// A ListOption says which operations [Manager.List] is to return. Of several
// that say the same, the last one counts.
type ListOption func(*Filter)

// ByState lets List return only operations in one of those states, or in any
// if none is given.
func ByState(states ...State) ListOption {
	return func(f *Filter) { f.States = slices.Compact(slices.Sorted(slices.Values(states))) }
}

// ByName lets List return only operations with exactly that name, or with any
// if it is empty. No index helps with that: in a long history a rare name
// takes a while.
func ByName(name string) ListOption {
	return func(f *Filter) { f.Name = validUTF8(name) }
}

// Before lets List return only operations that were submitted before the one
// with that ID, or all if it is empty: the last operation of a page leads to
// the next one, whatever has been submitted meanwhile, and with SQLite that as
// fast as to the first.
func Before(id string) ListOption {
	return func(f *Filter) { f.Before = id }
}

// List returns up to limit operations after skipping offset, the newest
// submission first: those of this manager as they are now, the others as they
// are stored. The page is empty, not nil, past the end of the history and if
// limit is 0. A negative limit or offset is an error, and so is [Before] an
// unknown operation, which wraps [ErrNotFound].
func (m *Manager) List(limit, offset int, opts ...ListOption) ([]*Operation, error) {
	if limit < 0 {
		return nil, fmt.Errorf("task: list: negative limit %d", limit)
	}
	if offset < 0 {
		return nil, fmt.Errorf("task: list: negative offset %d", offset)
	}
	var f Filter
	for _, opt := range opts {
		if opt != nil {
			opt(&f)
		}
	}
	if limit == 0 {
		return []*Operation{}, nil
	}
	ops, err := m.list(f, limit, offset)
	if err != nil {
		return nil, fmt.Errorf("task: list: %w", err)
	}
	return ops, nil
}

func (m *Manager) list(f Filter, limit, offset int) ([]*Operation, error) {
	if len(f.States) == 0 && f.Name == "" && f.Before == "" {
		rows, err := m.db.List(limit, offset)
		return m.appendCurrent(make([]*Operation, 0, len(rows)), f, rows), err
	}
	if len(f.States) > 0 {
		m.writer.flush() // or the database would say PENDING of what is RUNNING
	}
	ops := []*Operation{}
	more := false
	for {
		want := limit - len(ops)
		rows, err := listFiltered(m.db, f, want, offset)
		if more && errors.Is(err, ErrNotFound) { // the last one has been deleted meanwhile
			return ops, nil
		}
		if err != nil {
			return nil, err
		}
		ops = m.appendCurrent(ops, f, rows)
		if len(rows) < want || len(ops) == limit {
			return ops, nil
		}
		last := rows[len(rows)-1]
		if last == nil || last.ID == "" { // other code's
			return ops, nil
		}
		// Some have changed since they were found: there may be more.
		f.Before, offset, more = last.ID, 0, true
	}
}

// appendCurrent appends the operations of stored rows as they are now, if the
// filter still matches.
func (m *Manager) appendCurrent(ops []*Operation, f Filter, rows []*Operation) []*Operation {
	for _, row := range rows {
		if row == nil {
			continue
		}
		if op := m.current(row); op != nil && f.matches(op) {
			ops = append(ops, op)
		}
	}
	return ops
}

// current returns the operation of a stored row as it is now, or nil if it has
// been deleted meanwhile.
func (m *Manager) current(row *Operation) *Operation {
	if t := m.live(row.ID); t != nil {
		return t.snapshot()
	}
	if row.State.live() {
		// It is another manager's, or it has finished since the row was read:
		// then that is in the database by now.
		op, err := m.stored(row.ID)
		if err == nil || errors.Is(err, ErrNotFound) {
			return op
		}
	}
	return m.present(*row)
}

// Cancel cancels the operation with that ID. A RUNNING one has its context
// cancelled with the cause [ErrCancelled], and Cancel returns at once; the
// operation becomes CANCELLED when its function returns an error, and DONE if
// it returns none. A PENDING one becomes CANCELLED without its function ever
// being called, and Cancel returns once that is stored, or with an error when
// storing it fails; that is then tried again for as long as the manager lives.
//
// Cancel returns [ErrNotFound] if there is no such operation or it has already
// finished, and an error that wraps [errors.ErrUnsupported] if another manager
// runs it.
func (m *Manager) Cancel(id string) error {
	t := m.live(id)
	if t == nil {
		return fmt.Errorf("task: cancel %s: %w", id, m.whyNotLive(id))
	}
	failed := t.stop()
	if failed == nil {
		return nil
	}
	m.withdraw(t)
	select {
	case <-t.done:
		if t.err != nil {
			return fmt.Errorf("task: cancel %s: %w", id, t.err)
		}
		if state := t.snapshot().State; state != StateCancelled { // Close was quicker
			return fmt.Errorf("task: cancel %s: already %s: %w", id, state, ErrNotFound)
		}
		return nil
	case <-failed:
		return fmt.Errorf("task: cancel %s: %s", id, t.snapshot().Error)
	}
}

// whyNotLive tells why this manager can't cancel an operation.
func (m *Manager) whyNotLive(id string) error {
	op, err := m.stored(id)
	switch {
	case err != nil:
		return err
	case !op.State.live():
		return fmt.Errorf("already %s: %w", op.State, ErrNotFound)
	default:
		return fmt.Errorf("another manager runs it, and only that one can cancel it: %w", errors.ErrUnsupported)
	}
}

// Wait waits until the operation with that ID has finished and returns it,
// with a nil error whatever its final state. If ctx is done first, it returns
// the operation as it is and ctx's error. It returns [ErrNotFound] if there is
// no such operation, and [ErrClosed] if its final state could not be stored
// before the manager was closed.
//
// An operation of another manager on the same database is looked at every 100
// milliseconds, and marked as FAILED if that manager's process has died.
//
// A Func that waits for an operation which can't start before it ends waits
// for ever; that is not detected.
func (m *Manager) Wait(ctx context.Context, id string) (*Operation, error) {
	t := m.live(id)
	if t == nil {
		op, err := m.stored(id)
		if err != nil {
			return nil, fmt.Errorf("task: wait for %s: %w", id, err)
		}
		if !op.State.live() {
			return op, nil
		}
		return m.follower.wait(ctx, op)
	}
	select {
	case <-t.done:
	default:
		select {
		case <-t.done:
		case <-ctx.Done():
			return t.snapshot(), ctx.Err()
		}
	}
	if t.err != nil {
		return t.snapshot(), fmt.Errorf("task: wait for %s: %w", id, t.err)
	}
	return t.snapshot(), nil
}

// Prune deletes the operations that finished before that time from the history,
// a few at a time, so that Submit is not held up, and returns how many it has
// deleted. It looks at the whole history. With a store that can't delete, that is an error which wraps
// [errors.ErrUnsupported]; see [Pruner].
func (m *Manager) Prune(before time.Time) (int, error) {
	n, err := m.prune(context.Background(), before)
	if err != nil {
		return n, fmt.Errorf("task: prune: %w", err)
	}
	return n, nil
}

func (m *Manager) prune(ctx context.Context, before time.Time) (n int, err error) {
	for some, err := range prune(m.db, before) {
		n += some
		if err != nil || ctx.Err() != nil {
			return n, err
		}
	}
	return n, nil
}

// keepPruning deletes operations from the history once they are old enough,
// until the manager is closed.
func (m *Manager) keepPruning() {
	every := min(max(m.retention/10, time.Second), time.Hour)
	for {
		n, err := m.prune(m.ctx, time.Now().Add(-m.retention))
		if errors.Is(err, errors.ErrUnsupported) {
			m.log.Error("task: the history is kept for ever", "err", err)
			return
		}
		if err != nil {
			m.log.Error("task: pruning failed, will be tried again", "err", err)
		}
		m.log.Debug("task: pruned", "count", n)
		select {
		case <-m.ctx.Done():
			return
		case <-time.After(every):
		}
	}
}

// updateProgress reports progress from outside an operation's function.
func (m *Manager) updateProgress(id string, progress int) error {
	t := m.live(id)
	if t == nil {
		return fmt.Errorf("task: update progress of %s: %w", id, ErrNotFound)
	}
	t.report(progress)
	return nil
}

// refuse makes Submit return ErrClosed from now on.
func (m *Manager) refuse() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refuses = true
	if len(m.tasks) == 0 {
		m.drain()
	}
}

// Shutdown lets the manager run dry: Submit returns [ErrClosed] from now on,
// and Shutdown returns nil once every operation has finished, with the manager
// closed. If ctx is done first it returns ctx's error, and the operations go
// on; call Close to end them.
func (m *Manager) Shutdown(ctx context.Context) error {
	m.refuse()
	select {
	case <-m.drained:
		return m.Close()
	default:
	}
	select {
	case <-m.drained:
		return m.Close()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the manager: Submit returns [ErrClosed] from now on, the context
// of every function is cancelled with that cause, and Close returns once all
// functions have returned and all final states are stored. Operations whose
// function then returns an error, and those that never started, are FAILED
// with the error "Task failed due to system shutdown", followed by that error.
//
// Close waits for functions without a limit. Then it stores what is not stored
// yet, until that has not got on for 5 seconds, and returns an error that names
// each operation it had to leave. A write that is under way is waited for, so
// that this can take 20 seconds with a locked SQLite database. Once the store
// is closed too, the next manager to start marks those as interrupted.
//
// Get, List and Wait go on working, and the store stays open. Calling Close
// again does nothing and returns the same.
func (m *Manager) Close() error {
	m.mu.Lock()
	first := !m.closing
	m.closing = true
	m.mu.Unlock()
	if first {
		m.closeErr = m.close()
		close(m.ended)
	}
	<-m.ended
	return m.closeErr
}

func (m *Manager) close() error {
	m.refuse()
	m.endQueue()
	m.cancel(ErrClosed)
	m.functions.Wait()
	err := m.writer.close()
	m.hub.close()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.drain()
	return err
}

// endQueue has no function started any more.
func (m *Manager) endQueue() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	for _, t := range m.queue.clear() {
		t.finish(outcome{state: StateFailed, err: errTextShutdown})
	}
}

// alive reports whether m may still run and store operations.
func (m *Manager) alive() bool {
	if m == nil {
		return false
	}
	select {
	case <-m.writer.stopped:
		return false
	default:
		return true
	}
}
