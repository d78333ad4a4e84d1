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

	"github.com/mynt-nas/task/internal/eventlog"
	"github.com/mynt-nas/task/internal/queue"
)

// The path of an operation:
//
//	Submit     creates a task, puts it into the backlog and waits
//	next       hands the backlog to the writer (writer.go), which stores it
//	written    takes the results: Submit returns, the task joins the queue
//	startNext  removes the tasks that may run from the queue
//	run        calls the function (task.go) and puts its outcome into the backlog
//	next       hands the outcome to the writer
//	written    settles the task: Wait returns, and the task leaves memory
//
// Each change is appended to the event log for Watch (watch.go). The operations
// of other managers are in others.go.

// A Manager runs operations and keeps track of them. All its methods may be
// called concurrently.
//
// A Manager needs no maintenance: a finished operation leaves memory as soon as
// its final state is stored.
type Manager struct {
	// Immutable.
	options
	id       string // the Owner of its operations, if the store has none
	db       Persistence
	ctx      context.Context // the parent of every function's context
	cancel   context.CancelCauseFunc
	logs     *logQueue // of log
	writer   *writer
	events   *eventlog.Log[event]
	drained  chan struct{} // closed after Shutdown, Drain or Close, once nothing is left to run or store
	drain    func()        // closes drained; the caller holds mu
	closed   chan struct{} // closed when Close is done
	closeErr error         // set before closed is closed

	closeOnce sync.Once

	looking  chan struct{} // full during a look
	nextFull time.Time     // when a look may read all unfinished operations again; guarded by looking

	// functions counts the goroutines that run functions, recover and prune. Add
	// while New runs, or while holding mu and before closing is set.
	functions sync.WaitGroup

	// mu guards what follows, and the tasks. While holding it, call no method of
	// the store, and nothing else that takes time or calls back.
	mu sync.Mutex
	others
	tasks    map[string]*task // the live operations by ID
	unique   map[string]*task // tasks with unique keys, by key
	last     uint64           // number of the last task
	queue    *queue.Queue[*task]
	backlog  backlog
	progress *time.Timer     // publishes reports; nil if there are none
	draining bool            // Submit returns ErrClosed
	closing  bool            // Close or Drain was called, or Shutdown is done: no more functions start
	leaving  bool            // Drain leaves PENDING operations to the next manager that resumes
	left     map[string]bool // IDs of the operations it has left
	lost     map[*task]bool  // lost operations whose functions still run
	resuming bool            // recoverNow is recovering
	stopping bool            // all functions have returned: the writer stores the rest
	lastTry  bool            // the write under way is the last one
	deadline time.Time       // when Close stops retrying
}

// closeGrace is how long Close retries final writes without progress.
const closeGrace = 5 * time.Second

// openManagers holds the IDs of this process's managers that may still store
// operations.
var openManagers sync.Map

func isOpen(id string) bool {
	_, ok := openManagers.Load(id)
	return ok
}

// New returns a manager that stores its operations in db, or in a
// [NewMemoryStore] of its own if db is nil.
//
// Before it returns, New marks every PENDING or RUNNING operation in db whose
// process has died as FAILED with the error "Task failed due to system restart",
// or resumes it: see [WithResume]. If recovery fails, New returns its error.
func New(db Persistence, opts ...Option) (*Manager, error) {
	db, err := usable(db)
	if err != nil {
		return nil, fmt.Errorf("task: %w", err)
	}
	m := newManager(db, opts)
	resumed, err := m.recover()
	if err != nil {
		m.giveUp(resumed)
		m.Close()
		return nil, fmt.Errorf("task: recovery: %w", err)
	}
	m.start(resumed)
	m.functions.Go(m.pruneLoop)
	m.functions.Go(m.recoverDead)
	m.logs.flush()
	return m, nil
}

// NewManager is [New] for a store that is open but temporarily unreadable: it logs
// a failed recovery, and retries in the background until recovery succeeds or the
// manager is closed. [OpenSQLite] fails while the file can't be opened: a program
// that must start without its database calls OpenSQLite in a loop.
func NewManager(db Persistence, opts ...Option) *Manager {
	db, _ = usable(db) // the store's methods return the error
	m := newManager(db, opts)
	resumed, err := m.recover()
	m.start(resumed)
	if err != nil {
		m.log.Error("task: recovery failed, will be tried again", "err", err)
		m.functions.Go(m.recoverLoop)
	}
	m.functions.Go(m.pruneLoop)
	m.functions.Go(m.recoverDead)
	m.logs.flush()
	return m
}

func newManager(db Persistence, opts []Option) *Manager {
	m := &Manager{
		options: options{log: slog.Default()},
		id:      uuid.NewString(),
		db:      db,
		events:  eventlog.New[event](maxLag, maxLagBytes),
		drained: make(chan struct{}),
		closed:  make(chan struct{}),
		looking: make(chan struct{}, 1),
		tasks:   make(map[string]*task),
		unique:  make(map[string]*task),
		others:  others{foreign: make(map[string]*foreign)},
		left:    make(map[string]bool),
		lost:    make(map[*task]bool),
	}
	for _, opt := range opts {
		if opt != nil {
			opt(&m.options)
		}
	}
	m.logs = newLogQueue(m.log.Handler())
	m.log = slog.New(m.logs)
	m.drain = sync.OnceFunc(func() { m.closing = true; close(m.drained) })
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	m.queue = queue.New[*task](m.limit)
	openManagers.Store(m.id, nil)
	m.writer = &writer{db: db, log: m.log, source: m, wake: make(chan struct{}, 1), stopped: make(chan struct{})}
	go m.writer.run()
	return m
}

// Submit stores a new operation, schedules fn to run in its own goroutine, and
// returns a snapshot of the operation: PENDING, or already further along.
//
// If Submit returns an error, fn is never called. Submit fails if name is empty,
// fn is nil, or the metadata can't be kept; after Close, Shutdown or Drain
// ([ErrClosed]); and if the operation can't be stored. With an SQLite store it
// fails after at most about 20 seconds: up to 10 for an earlier write to time out,
// and 10 for its own; with [WithID], 10 more to find out whether the ID exists.
// With a store that has only the four methods of [Persistence], Submit may wait
// for one store call per changed operation.
//
// With an error that wraps [ErrExists], Submit also returns the existing
// operation: see [WithID] and [WithUnique].
//
// Submissions that arrive during a commit share the next one.
func (m *Manager) Submit(name string, fn Func, opts ...SubmitOption) (*Operation, error) {
	var op *Operation
	t, err := m.newTask(name, fn, opts)
	if err == nil {
		op, err = m.insert(t)
	}
	return m.copyOut(op), wrap(err, "submit %.64q", name)
}

func (m *Manager) newTask(name string, fn Func, opts []SubmitOption) (*task, error) {
	if name == "" {
		return nil, errors.New("the name is empty")
	}
	if fn == nil {
		return nil, errors.New("the function is nil")
	}
	created := wall()
	op := &Operation{Name: validUTF8(name), State: StatePending, CreatedAt: created, UpdatedAt: created, Owner: m.owner()}
	t := taskOf(op)
	t.fn = fn
	return t, t.apply(opts)
}

// owner returns the Owner of operations submitted now.
func (m *Manager) owner() string {
	if s, ok := m.db.(interface{ Owner() string }); ok {
		return cmp.Or(s.Owner(), m.id)
	}
	return m.id
}

// insert stores the first row of a new task and returns its operation. With an
// error that wraps ErrExists, it returns the operation that holds the ID or a
// unique key.
func (m *Manager) insert(t *task) (*Operation, error) {
	for {
		holder, err := m.claim(t)
		if err != nil {
			return nil, err
		}
		op, err := m.inserted(holder)
		switch {
		case err == nil && holder != t:
			return op, fmt.Errorf("%s: %w", op.ID, ErrExists)
		case holder == t || holder.id == t.id || !errors.Is(err, ErrExists):
			return op, err
		}
		// The holder of the unique key was dropped, because its ID existed already.
	}
}

// claim gives a new task its ID and queues its first row for storage, unless
// another task holds the ID or a unique key. It returns the holder. UUIDs have the
// same order as rows.
func (m *Manager) claim(t *task) (holder *task, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.draining {
		return nil, ErrClosed
	}
	if !t.given {
		id, err := uuid.NewV7()
		if err != nil {
			return nil, err
		}
		t.id = id.String()
		t.op.ID = t.id
	}
	// The task is live before it is stored, so that a caller that finds the row also
	// finds the task.
	if holder = m.enter(t); holder == t {
		m.backlog.inserts = append(m.backlog.inserts, record{t: t, op: t.op})
		m.writer.signal()
	}
	return holder, nil
}

// enter makes a task live and returns it, or returns the live task that holds its
// ID or one of its unique keys. The caller holds m.mu, and calls leave later.
func (m *Manager) enter(t *task) (holder *task) {
	if holder = m.tasks[t.id]; holder != nil {
		return holder
	}
	for _, key := range t.unique {
		if holder = m.unique[key]; holder != nil {
			return holder
		}
	}
	m.last++
	t.number = m.last
	m.tasks[t.id] = t
	for _, key := range t.unique {
		m.unique[key] = t
	}
	m.lookOut()
	return t
}

// leave undoes enter. The caller holds m.mu.
func (m *Manager) leave(t *task) {
	if m.tasks[t.id] == t {
		delete(m.tasks, t.id)
	}
	for _, key := range t.unique {
		if m.unique[key] == t {
			delete(m.unique, key)
		}
	}
}

// inserted waits for the store's answer to the insert of a task, and returns the
// operation. With an error that wraps ErrExists, it returns the stored operation. After
// any other error for an ID that the caller gave, it reads the row: not every store can
// say that Save failed because the ID exists.
func (m *Manager) inserted(t *task) (*Operation, error) {
	<-t.inserted
	switch {
	case t.insertErr == nil:
		return m.snapshot(&t.life), nil
	case !t.given:
		return nil, t.insertErr
	}
	exists := errors.Is(t.insertErr, ErrExists)
	op, err := m.get(t.id)
	switch {
	case err != nil && exists:
		return nil, fmt.Errorf("the store says that %s exists, but does not return it: %w", t.id, err)
	case err != nil, !exists && t.op.saved(op):
		return nil, t.insertErr
	}
	return op, fmt.Errorf("%s: %w", t.id, ErrExists)
}

// next implements source.
func (m *Manager) next(now time.Time) (b batch, at time.Time, done bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lastTry && len(m.backlog.finals) == 0 { // final states of tasks that the last write has inserted still get a try
		return batch{}, at, true
	}
	m.lastTry = m.stopping && !now.Before(m.deadline)
	b = m.backlog.take(now, m.lastTry)
	for i := range b.updates {
		if w := &b.updates[i]; w.op == nil {
			m.publish(w.t)
			w.op = w.t.op
		}
	}
	at, more := m.backlog.next()
	if m.stopping && (!more || at.After(m.deadline)) {
		at = m.deadline
	}
	return b, at, m.stopping && !more
}

// written implements source.
func (m *Manager) written(b batch) (more bool) {
	owner := m.owner()
	defer func() { // after unlocking: the waiters take the mutex next
		for _, w := range b.inserts {
			close(w.t.inserted)
		}
	}()
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	m.backlog.writing = nil
	if slices.ContainsFunc(b.updates, func(w record) bool { return errors.Is(w.err, ErrLost) }) {
		m.lose(owner)
	}
	for _, w := range b.unknown {
		m.backlog.again(w, now)
	}
	for _, w := range b.inserts {
		m.afterInsert(w)
	}
	m.startNext()
	for _, w := range b.updates {
		more = more || retryable(w.err)
		switch {
		case errors.Is(w.err, ErrLost), w.t != nil && m.tasks[w.t.id] != w.t: // see lose
			answer(w.checkpoints, cmp.Or(w.err, ErrLost))
		case w.final:
			m.afterFinal(w, now)
		case retryable(w.err):
			m.backlog.again(w, now)
		default:
			if w.err == nil && w.t != nil {
				w.t.stored = w.op.State
			}
			answer(w.checkpoints, w.err)
		}
	}
	more = more || len(m.backlog.retry)+len(m.backlog.unknown) > 0
	if !more {
		m.backlog.backoff, m.backlog.retryAt = 0, time.Time{}
	}
	return more
}

// afterInsert wakes Submit. A task whose row is stored joins the queue.
func (m *Manager) afterInsert(w record) {
	t := w.t
	t.insertErr = w.err
	if w.err != nil {
		if !errors.Is(w.err, ErrExists) && !errors.Is(w.err, ErrLost) {
			m.backlog.remember(w)
		}
		m.settle(t, nil, w.err)
		return
	}
	m.enqueue(t)
}

// enqueue puts a task whose row is stored as PENDING into the queue. The caller
// holds m.mu.
func (m *Manager) enqueue(t *task) {
	t.stored = StatePending
	if t.given {
		m.backlog.forget(t.id)
	}
	if f := m.foreign[t.id]; f == nil || f.op == nil || later(t.op, f.op) { // otherwise a look has published the take-over
		m.emit(t, false)
	}
	switch {
	case t.final != nil: // cancelled by a caller that has read the row
		m.storeFinal(t)
	case m.closing:
		m.drop(t)
	default:
		m.queue.Add(&t.ticket)
	}
}

// errLeft is the reason why an operation that Drain leaves to the next start gets no
// final state.
var errLeft = fmt.Errorf("left for the next start to resume: %w", ErrClosed)

// drop ends a task that must no longer start. The caller holds m.mu.
func (m *Manager) drop(t *task) {
	if m.leaving {
		m.left[t.id] = true
		m.settle(t, nil, errLeft)
	} else {
		m.finish(t, outcome{state: StateFailed, err: errTextShutdown})
	}
}

// afterFinal settles a task whose final state is stored. If storing failed, it
// shows the error and retries.
func (m *Manager) afterFinal(w record, now time.Time) {
	t := w.t
	switch {
	case w.err == nil:
		m.settle(t, w.op, nil)
	case !retryable(w.err):
		m.settle(t, nil, ErrNotFound)
	default:
		m.backlog.again(w, now)
		t.refused = w.err
		text := validUTF8(fmt.Sprintf("%s, which can't be stored yet: %v", t.final.State, w.err))
		if text != t.op.Error {
			op := *t.op
			op.Error = text
			t.op = &op
			m.emit(t, true)
		}
	}
}

// settle ends a task: op is its stored final state, or err says why there is none.
// The caller holds m.mu.
func (m *Manager) settle(t *task, op *Operation, err error) {
	t.op, t.err = cmp.Or(op, t.op), err
	m.emit(t, false)
	m.leave(t)
	if m.all > 0 && t.insertErr == nil {
		m.settled[t.id] = m.looks
	}
	m.release(t)
	m.lookOut()
	if m.stopping {
		m.deadline = time.Now().Add(closeGrace)
	}
	if m.draining && len(m.tasks) == 0 {
		m.drain()
	}
}

// release wakes the waiters for a task. The caller holds m.mu.
func (m *Manager) release(t *task) {
	close(t.done)
	if f := m.foreign[t.id]; f != nil && t.insertErr == nil { // followed before it was resumed here
		f.op, f.err = t.op, t.err
		close(f.done)
		delete(m.foreign, t.id)
	}
}

// startNext starts every task that may run. The caller holds m.mu.
func (m *Manager) startNext() {
	for t, ok := m.queue.Next(); ok; t, ok = m.queue.Next() {
		var ctx context.Context
		ctx, t.cancel = context.WithCancelCause(context.WithValue(m.ctx, contextKey{}, running{m, t}))
		t.change(func(op *Operation) {
			op.State = StateRunning
			op.StartedAt = op.UpdatedAt
		})
		m.emit(t, false)
		m.changed(t)
		m.functions.Go(func() { m.run(ctx, t) })
	}
}

// run is the goroutine of a function.
func (m *Manager) run(ctx context.Context, t *task) {
	var end outcome
	defer func() { // also if the function calls runtime.Goexit
		m.mu.Lock()
		m.finish(t, end)
		if m.lost[t] {
			delete(m.lost, t)
			m.leave(t)
		}
		m.queue.Done(&t.ticket)
		m.startNext()
		m.mu.Unlock()
		t.cancel(nil)
	}()
	t.run(ctx, func(progress int) { m.report(t, progress) }, m.log, &end)
}

// finish fixes the outcome of an operation and queues it for storage; later calls
// do nothing. The caller holds m.mu.
func (m *Manager) finish(t *task, end outcome) {
	m.publish(t)
	if !t.finish(end) {
		return
	}
	answer(t.checkpoints, errReturned)
	t.checkpoints = nil
	if t.stored != "" {
		m.storeFinal(t)
	}
}

// storeFinal queues the final state of a task whose first row is stored. The caller
// holds m.mu.
func (m *Manager) storeFinal(t *task) {
	m.backlog.finals = append(m.backlog.finals, record{t: t, op: t.final, final: true})
	m.writer.signal()
}

// report is the update function of a Func.
func (m *Manager) report(t *task, progress int) {
	if !t.report(progress) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changed(t)
	if m.progress == nil && m.events.Readers() > 0 {
		m.progress = time.AfterFunc(progressDelay, m.publishProgress)
	}
}

// changed marks a task whose present state is to be stored soon. The caller holds
// m.mu.
func (m *Manager) changed(t *task) {
	if m.backlog.change(t) {
		m.writer.signal()
	}
}

// running is the value in a function's context: see operation.go.
type running struct {
	m *Manager
	t *task
}

func (r running) snapshot() *Operation { return r.m.copyOut(r.m.snapshot(&r.t.life)) }

// ended returns why a task's function can no longer change its operation, or nil
// if it can. The caller holds m.mu.
func (m *Manager) ended(t *task) error {
	switch {
	case m.lost[t]:
		return ErrLost
	case t.word.Load()&wordReturned != 0:
		return errReturned
	}
	return nil
}

// change applies f to the operation, unless f reports that nothing changed.
func (r running) change(f func(op *Operation) (changed bool)) error {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if err := r.m.ended(r.t); err != nil {
		return err
	}
	if op := *r.t.op; !f(&op) {
		return nil
	}
	r.t.change(func(op *Operation) { f(op) })
	r.m.emit(r.t, true)
	r.m.changed(r.t)
	return nil
}

// checkpoint stores the task with the next commit, and returns the channel that
// receives the outcome.
func (r running) checkpoint() <-chan error {
	done := make(chan error, 1)
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if err := r.m.ended(r.t); err != nil {
		done <- err
		return done
	}
	r.t.checkpoints = append(r.t.checkpoints, done)
	r.m.changed(r.t)
	r.m.backlog.urgent = true
	r.m.writer.signal()
	return done
}

// snapshot returns the present state of an operation, which is immutable: callers
// get a copy from copyOut or raw.
func (m *Manager) snapshot(l *life) *Operation {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.present(l)
}

// present is snapshot for a caller that holds m.mu.
func (m *Manager) present(l *life) *Operation {
	t := m.tasks[l.op.ID]
	if t == nil {
		return l.op
	}
	m.publish(t)
	holder, ok := m.queue.Holder(&t.ticket)
	if !ok {
		return l.op
	}
	op := *l.op
	op.WaitsFor = holder.id
	return &op
}

// copyOut returns a copy of op for a caller, nil for nil.
func (m *Manager) copyOut(op *Operation) *Operation { return m.copied(op, roundTrip) }

// raw is copyOut for callers of [Raw].
func (m *Manager) raw(op *Operation) *Operation { return m.copied(op, rawValue) }

func (m *Manager) copied(op *Operation, value func(any) any) *Operation {
	if op == nil {
		return nil
	}
	c := *op
	c.Metadata, c.Result, c.manager = value(c.Metadata), value(c.Result), m
	return &c
}

// live returns the live operation with that ID, or nil.
func (m *Manager) live(id string) *task {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.tasks[id]; t != nil && !t.hidden() {
		return t
	}
	return nil
}

// liveRow is live for the ID of an unfinished row. If a hidden task with that ID is
// being stored, the row may be its own: liveRow waits for the store's answer.
func (m *Manager) liveRow(id string) *task {
	m.mu.Lock()
	t := m.tasks[id]
	m.mu.Unlock()
	if t != nil && t.given {
		<-t.inserted
	}
	return m.live(id)
}

// Get returns the operation with that ID and reports whether there is one. Live
// operations come from memory, finished ones from the store, whose errors are
// logged.
func (m *Manager) Get(id string) (*Operation, bool) {
	op, err := m.get(id)
	if err != nil && !errors.Is(err, ErrNotFound) {
		m.log.Error("task: get", "id", id, "err", err)
	}
	if err != nil {
		return nil, false
	}
	return m.copyOut(op), true
}

// get returns the operation with that ID, as snapshot does.
func (m *Manager) get(id string) (*Operation, error) {
	if t := m.live(id); t != nil {
		return m.snapshot(&t.life), nil
	}
	return get(m.db, id)
}

// List returns up to limit operations after skipping offset, newest submission
// first: this manager's as they are now, others as stored. Past the end of the
// history, or with limit 0, the page is empty, not nil. A negative limit or offset
// is an error; so is [Before] with an unknown ID that is not a UUIDv7, which wraps
// [ErrNotFound].
func (m *Manager) List(limit, offset int, opts ...ListOption) ([]*Operation, error) {
	return m.list(limit, offset, opts, m.copyOut)
}

// list is List, with the copies that copied makes.
func (m *Manager) list(limit, offset int, opts []ListOption, copied func(*Operation) *Operation) ([]*Operation, error) {
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
	ops, err := m.filtered(f, limit, offset)
	if err != nil {
		return nil, fmt.Errorf("task: list: %w", err)
	}
	for i, op := range ops {
		ops[i] = copied(op)
	}
	return ops, nil
}

func (m *Manager) filtered(f Filter, limit, offset int) ([]*Operation, error) {
	ops := []*Operation{}
	asked := f
	for more := false; ; more = true {
		m.correct(&f)
		want := limit - len(ops)
		rows, err := listFiltered(m.db, f, want, offset)
		if more && errors.Is(err, ErrNotFound) { // the row Before has been deleted meanwhile
			return ops, nil
		}
		if err != nil {
			return nil, err
		}
		for _, row := range rows {
			if op := m.refresh(row); op != nil && asked.matches(op) {
				light := *op
				if light.bound(f.MaxValue); f.WithoutResults {
					light.Result = nil
				}
				ops = append(ops, &light)
			}
		}
		if len(rows) < want || len(ops) == limit || rows[want-1] == nil || rows[want-1].ID == "" {
			return ops, nil
		}
		// Some no longer match: there may be more.
		f.Before, offset = rows[want-1].ID, 0
	}
}

// correct sets Include and Exclude of a filter by state or metadata, for the operations
// whose present values are not stored yet.
func (m *Manager) correct(f *Filter) {
	f.Include, f.Exclude = nil, nil
	if len(f.States)+len(f.Metadata) == 0 {
		return
	}
	var unstored []*Operation
	m.mu.Lock()
	for t := range m.backlog.unstored {
		if t.op.State != t.stored || len(f.Metadata) > 0 {
			unstored = append(unstored, t.op)
		}
	}
	m.mu.Unlock()
	stored := *f
	for _, op := range unstored {
		if stored.matchesNow(op) {
			f.Include = append(f.Include, op.ID)
		} else {
			f.Exclude = append(f.Exclude, op.ID)
		}
	}
	slices.Sort(f.Include)
	slices.Sort(f.Exclude)
}

// refresh returns the present state of a stored row's operation, as snapshot does,
// or nil if the operation has been deleted meanwhile.
func (m *Manager) refresh(row *Operation) *Operation {
	if row == nil {
		return nil
	}
	if row.State.live() || m.live(row.ID) != nil {
		// If it is no longer live, its final state is stored.
		if op, err := m.get(row.ID); err == nil || errors.Is(err, ErrNotFound) {
			return op
		}
	}
	return row
}

// Cancel cancels the operation with that ID. A PENDING operation becomes CANCELLED
// and its function is never called. For a RUNNING one, Cancel cancels the
// function's context with the cause [ErrCancelled]; the operation becomes CANCELLED
// if the function then returns an error, and DONE if it returns nil. Until then it
// is Cancelling.
//
// Cancel returns at once. If the process dies before the next commit, the request
// is lost: call Wait to be certain.
//
// If another manager runs the operation, Cancel returns once the request is stored, and
// that manager acts on it as on its own Cancel: within 200 milliseconds with an SQLite
// store. If that manager's process dies first, the operation becomes FAILED, as all of
// its operations do. With a store that is not a [Canceller], Cancel returns an error
// that wraps [errors.ErrUnsupported].
//
// Cancel returns [ErrNotFound] if there is no such operation or it has already
// finished.
func (m *Manager) Cancel(id string) error { return m.CancelCause(id, "") }

// CancelCause is [Manager.Cancel] with a text that says who cancels the operation,
// and why. The text is in the cause of the function's context, which wraps
// [ErrCancelled]. A CANCELLED operation has it in its Error, followed by the
// function's error unless that is the context's own. Only the first cancel of an
// operation counts.
func (m *Manager) CancelCause(id, text string) error {
	if m.cancelLive(id, text) {
		return nil
	}
	err := requestCancel(m.db, id, text)
	if errors.Is(err, errors.ErrUnsupported) && m.liveRow(id) != nil { // its first row was stored here just now
		return m.CancelCause(id, text)
	}
	return wrap(err, "cancel %s", id)
}

// cancelLive cancels a live operation of this manager. It reports false if there is
// none with that ID.
func (m *Manager) cancelLive(id, text string) bool {
	m.mu.Lock()
	t := m.tasks[id]
	if t == nil || t.hidden() {
		m.mu.Unlock()
		return false
	}
	if t.op.Cancelling || t.word.Load()&wordReturned != 0 {
		m.mu.Unlock()
		return true
	}
	t.change(func(op *Operation) { op.Cancelling = true })
	m.emit(t, true)
	cancel := t.cancel
	if t.op.State == StatePending {
		cancel = func(error) {}
		m.queue.Remove(&t.ticket)
		m.finish(t, outcome{state: StateCancelled, err: text})
		m.startNext()
	}
	m.changed(t)
	m.mu.Unlock()
	if text == "" {
		cancel(ErrCancelled)
	} else {
		cancel(cancelled(text))
	}
	return true
}

// Wait waits until the operation with that ID has finished, and returns it with a
// nil error, whatever its final state. If ctx is done first, Wait returns the
// operation as it is, and ctx's error. It returns [ErrNotFound] if there is no such
// operation, and [ErrClosed] if the final state could not be stored before the
// manager was closed, or if Drain has left the operation to the next start.
//
// For an operation of another manager on the same database, Wait may return up to
// 100 milliseconds after its end, or a little later if very many operations are
// unfinished. About a second after that manager's process has died, the operation
// is marked as FAILED, or resumed.
//
// A Func that waits for an operation which can't start before the Func returns
// waits forever; this is not detected.
func (m *Manager) Wait(ctx context.Context, id string) (*Operation, error) {
	op, err := m.wait(ctx, id)
	return m.copyOut(op), err
}

// wait is Wait, but returns the operation as snapshot does.
func (m *Manager) wait(ctx context.Context, id string) (*Operation, error) {
	l, leave, err := m.find(id)
	if err != nil {
		return nil, wrap(err, "wait for %s", id)
	}
	defer leave()
	if err := await(ctx, l.done); err != nil {
		op, getErr := m.get(id)
		if getErr != nil {
			op = m.snapshot(l)
		}
		return op, err
	}
	op := l.op
	if errors.Is(l.err, ErrNotFound) {
		op = nil
	}
	return op, wrap(l.err, "wait for %s", id)
}

// await waits until done is closed and returns nil, or until ctx is done and
// returns ctx's error. If both are true, it returns nil.
func await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-done:
		return nil
	default:
		return ctx.Err()
	}
}

// find returns the life of an operation, and a function to call when done with it.
func (m *Manager) find(id string) (l *life, leave func(), err error) {
	if t := m.live(id); t != nil {
		return &t.life, func() {}, nil
	}
	row, err := m.load(id)
	if err == nil && row.State.live() {
		if t := m.liveRow(id); t != nil { // its first row was stored just now
			return &t.life, func() {}, nil
		}
		m.mu.Lock()
		left := m.left[id]
		m.mu.Unlock()
		if left {
			return endedLife(row, errLeft), func() {}, nil
		}
		f := m.follow(id)
		leave = func() { m.unfollow(id, f) }
		row, err = m.load(id) // again: looks see only changes from now on
		m.mu.Lock()
		if err == nil && row.State.live() && m.foreign[id] == f { // otherwise this row is outdated
			m.take(id, row, nil, false)
		}
		known := f.op != nil
		if !known && f.err != nil {
			err = f.err
		}
		m.mu.Unlock()
		if known {
			return f.life, leave, nil
		}
		leave()
	}
	if err != nil {
		return nil, nil, err
	}
	return endedLife(row, nil), func() {}, nil
}

// load reads an operation from the store. Once the manager is closed, the store may
// be closed too: any error but ErrNotFound then wraps ErrClosed.
func (m *Manager) load(id string) (*Operation, error) {
	op, err := get(m.db, id)
	if err != nil && !errors.Is(err, ErrNotFound) && m.ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return op, err
}

// Prune deletes all operations that finished before that time, and returns their
// number. It deletes a few at a time, so that Submit does not wait for it. With a store
// that is not a [Pruner], it returns an error that wraps [errors.ErrUnsupported].
func (m *Manager) Prune(before time.Time) (int, error) {
	n, err := m.prune(context.Background(), before)
	return n, wrap(err, "prune")
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

// pruneLoop deletes operations older than the retention, until the manager is
// closed.
func (m *Manager) pruneLoop() {
	every := min(max(m.retention/10, time.Second), time.Hour)
	for ok := m.retention > 0; ok; ok = sleep(m.ctx, every) {
		n, err := m.prune(m.ctx, time.Now().Add(-m.retention))
		if errors.Is(err, errors.ErrUnsupported) {
			m.log.Error("task: the history is kept for good", "err", err)
			return
		}
		if err != nil {
			m.log.Error("task: pruning failed, will be tried again", "err", err)
		}
		m.log.Debug("task: pruned", "count", n)
	}
}

// updateProgress reports progress from outside an operation's function.
func (m *Manager) updateProgress(id string, progress int) error {
	t := m.live(id)
	if t == nil {
		return fmt.Errorf("task: update progress of %s: %w", id, ErrNotFound)
	}
	m.report(t, progress)
	return nil
}

// Shutdown stops accepting operations and waits for those submitted: Submit returns
// [ErrClosed] from now on, and once every operation has finished, Shutdown closes
// the manager and returns the error of Close. If ctx is done first, it returns ctx's error and the
// operations go on; call Close to end them. If ctx is done before the call, Shutdown
// closes the manager only if nothing is left to finish.
func (m *Manager) Shutdown(ctx context.Context) error { return m.shutdown(ctx, false) }

// Drain is [Manager.Shutdown] for a program that should end soon, for example after
// SIGTERM: running functions go on, but no others start. PENDING operations become
// FAILED with the error "Task failed due to system shutdown". With [WithResume] they
// stay PENDING in the database, for the next start to resume once the store is
// closed, and Wait returns [ErrClosed] for them.
func (m *Manager) Drain(ctx context.Context) error { return m.shutdown(ctx, true) }

func (m *Manager) shutdown(ctx context.Context, drop bool) error {
	m.mu.Lock()
	m.draining = true
	if drop {
		m.leaving = m.resume != nil
		m.dropWaiting()
	}
	if len(m.tasks) == 0 {
		m.drain()
	}
	m.mu.Unlock()
	if err := await(ctx, m.drained); err != nil {
		return err
	}
	if ctx.Err() != nil { // nothing was left to wait for
		return m.Close()
	}
	m.closeOnce.Do(func() { go m.close() })
	if err := await(ctx, m.closed); err != nil {
		return err
	}
	return m.closeErr
}

// Close ends the manager: Submit returns [ErrClosed] from now on, and the context
// of every function is cancelled with that cause. Close returns once all functions
// have returned and all final states are stored. Operations whose function then
// returns an error, and those that never started, become FAILED with the error
// "Task failed due to system shutdown", followed by the function's error unless
// that is the context's own.
//
// Close waits for functions without a limit. It then retries failed writes until 5
// seconds pass without progress, and returns an error that names each operation
// whose final state it could not store. It also waits for a write under way, which
// can take 20 seconds with a locked SQLite database. Once the store is closed too,
// the next manager to start marks those operations as interrupted.
//
// Get, List and Wait continue to work, and the store stays open. Calling Close
// again does nothing and returns the same error.
func (m *Manager) Close() error { return m.CloseContext(context.Background()) }

// CloseContext is [Manager.Close] with a limit: when ctx is done, it returns an
// error that wraps ctx's and names the operations whose functions still run, while
// Close goes on in the background. If the process ends before they return, the next
// manager to start marks them as interrupted.
func (m *Manager) CloseContext(ctx context.Context) error {
	m.mu.Lock()
	m.draining = true
	m.dropWaiting()
	m.mu.Unlock()
	m.closeOnce.Do(func() { go m.close() })
	if await(ctx, m.closed) == nil {
		return m.closeErr
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	errs := []error{fmt.Errorf("task: close: %w", ctx.Err())}
	for _, t := range m.sorted() {
		if t.final == nil && t.op.State == StateRunning {
			errs = append(errs, fmt.Errorf("task: close: the function of %s (%.64q) still runs", t.id, t.name))
		}
	}
	return errors.Join(errs...)
}

// dropWaiting drops all waiting tasks, so that no more functions start. The caller
// holds m.mu.
func (m *Manager) dropWaiting() {
	m.closing = true
	for _, t := range m.queue.Clear() {
		m.drop(t)
	}
}

// close is the work of Close.
func (m *Manager) close() {
	m.cancel(ErrClosed)
	m.functions.Wait()
	m.mu.Lock()
	m.stopping, m.deadline = true, time.Now().Add(closeGrace)
	m.dropUnwaited()
	if m.endLook != nil {
		m.endLook() // lookOut starts another one if there are waiters
		m.endLook = nil
	}
	m.lookOut()
	m.backlog.retryAt = time.Time{}
	m.backlog.changed = nil // all have a final state now
	m.mu.Unlock()
	m.writer.signal()
	<-m.writer.stopped
	openManagers.Delete(m.id)
	m.mu.Lock()
	m.events.Close(ErrClosed)
	m.closeErr = m.abandon()
	m.mu.Unlock()
	m.logs.flush()
	close(m.closed)
}

// abandon gives up the final states that could not be stored, and returns an error
// that names their operations. The caller holds m.mu.
func (m *Manager) abandon() error {
	var errs []error
	for _, t := range m.sorted() {
		t.refused = cmp.Or(t.refused, errors.New("the store took too long"))
		errs = append(errs, fmt.Errorf("task: close: final state %s of %s (%.64q) not stored: %w",
			t.final.State, t.id, t.name, t.refused))
		t.err = fmt.Errorf("final state not stored: %w: %w", ErrClosed, t.refused)
		m.release(t)
	}
	m.drain()
	return errors.Join(errs...)
}

// sorted returns the live tasks in order of submission. The caller holds m.mu.
func (m *Manager) sorted() []*task {
	return slices.SortedFunc(maps.Values(m.tasks), func(a, b *task) int { return cmp.Compare(a.number, b.number) })
}
