package task

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"
)

const (
	// recoverInterval is how often a manager recovers while somebody waits for or
	// watches operations of others.
	recoverInterval = time.Second

	// maxOrphanLogs is how many recovered operations are logged individually.
	maxOrphanLogs = 100
)

// recover marks the unfinished operations of dead processes as FAILED, or takes
// them over: see start.
func (m *Manager) recover() (resumed []*task, err error) {
	return m.recoverFrom(func(id string) bool { return m.liveRow(id) != nil })
}

func (m *Manager) recoverFrom(live func(id string) bool) (resumed []*task, err error) {
	n := 0
	defer func() {
		if n > 0 {
			m.log.Warn("task: recovered interrupted operations", "count", n)
		}
		if len(resumed) > 0 {
			m.log.Info("task: resumed interrupted operations", "count", len(resumed))
		}
	}()
	asked := make(map[string]*task)
	for op, err := range recoverOrphans(m.db, errTextRestart, m.ask(asked), live) {
		switch {
		case err != nil && op == nil:
			return resumed, err
		case err != nil:
			m.log.Error("task: not known whether an operation's process is alive", "id", op.ID, "name", op.Name, "err", err)
		case op.State.live():
			t := asked[op.ID]
			if t == nil { // the manager is closing: see start
				t = taskOf(op)
				close(t.inserted)
			}
			t.id, t.name, t.op, t.given = op.ID, op.Name, op, false
			t.created, t.base = time.Now(), op.UpdatedAt
			resumed = append(resumed, t)
		default:
			if n++; n <= maxOrphanLogs {
				m.log.Warn("task: operation interrupted", "id", op.ID, "name", op.Name, "err", op.Error)
			}
		}
	}
	return resumed, nil
}

// ask returns the function with which recoverOrphans decides whether to take over an
// operation, or nil without WithResume. The function adds the task that will resume the
// operation to asked. A closing manager takes operations over without a task, and
// leaves them PENDING to the next manager.
func (m *Manager) ask(asked map[string]*task) func(op *Operation) bool {
	if m.resume == nil {
		return nil
	}
	return func(op *Operation) bool {
		live := m.liveRow(op.ID) != nil
		m.mu.Lock()
		closing := m.closing
		for t := range m.lost { // its function still runs here
			live = live || t.id == op.ID
		}
		m.mu.Unlock()
		if closing || live {
			return closing
		}
		t := taskOf(new(Operation))
		close(t.inserted)
		if err := m.callResume(op, t); err != nil {
			m.log.Error("task: not resumed", "id", op.ID, "name", op.Name, "err", err)
			return false
		}
		op.Owner = m.owner()
		if t.fn != nil {
			asked[op.ID] = t
		}
		return t.fn != nil
	}
}

// callResume calls WithResume's function, in a goroutine of its own because it may
// call runtime.Goexit.
func (m *Manager) callResume(op *Operation, t *task) (err error) {
	err = errors.New("the function of WithResume, or an option, called runtime.Goexit")
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				err = fmt.Errorf("the function of WithResume, or an option, panicked: %s\n%s", printed(r), debug.Stack())
			}
		}()
		var opts []SubmitOption
		t.fn, opts = m.resume(m.copyOut(op))
		if err = nil; t.fn != nil {
			err = t.apply(opts)
		}
	}()
	<-done
	return err
}

// start queues the tasks of operations that were taken over, in order of
// submission. A closing manager leaves them to the next one.
func (m *Manager) start(resumed []*task) {
	slices.SortStableFunc(resumed, func(a, b *task) int {
		return cmp.Or(a.op.CreatedAt.Compare(b.op.CreatedAt), cmp.Compare(a.id, b.id))
	})
	for _, t := range resumed {
		owner := m.owner()
		for m.mu.Lock(); m.tasks[t.id] != nil && !m.closing; m.mu.Lock() {
			m.mu.Unlock()
			m.liveRow(t.id) // waits until a Submit with the same ID has failed
		}
		switch {
		case m.closing:
			m.left[t.id], t.err = true, errLeft
			m.release(t)
		case owner != m.id && owner != t.op.Owner: // fenced since the take-over: another manager may have it now
			m.log.Error("task: operation lost", "id", t.id, "name", t.name, "err", ErrLost)
			m.followLost(t)
			m.lookOut()
		default:
			m.admit(t)
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(resumed) > 0 && m.endLook != nil { // look again: cancel requests may have come before the tasks were live
		m.endLook()
		m.endLook = nil
		m.lookOut()
	}
}

// giveUp marks operations that were taken over as FAILED if the store is their
// owner: while it is open, no other manager recovers them.
func (m *Manager) giveUp(resumed []*task) {
	if m.owner() == m.id {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, t := range resumed {
		m.enter(t)
		m.finish(t, outcome{state: StateFailed, err: errTextRestart})
		m.enqueue(t)
	}
}

// admit makes the task of a resumed operation live. If another task holds one of
// its unique keys, the operation becomes FAILED. The caller holds m.mu.
func (m *Manager) admit(t *task) {
	if m.enter(t) != t {
		t.unique = nil
		m.enter(t)
		m.finish(t, outcome{state: StateFailed, err: errTextRestart})
	}
	m.enqueue(t)
	m.startNext()
}

// recoverOthers recovers the operations of dead processes every recoverInterval
// while somebody follows operations of others, until ctx is done.
func (m *Manager) recoverOthers(ctx context.Context) {
	for ok := true; ok; ok = sleep(ctx, recoverInterval) {
		m.mu.Lock()
		followed := len(m.foreign) > 0
		m.mu.Unlock()
		if followed {
			m.recoverNow()
		}
	}
}

// recoverDead recovers the operations of dead processes whenever the store reports
// one, until the manager is closed.
func (m *Manager) recoverDead() {
	s, ok := m.db.(interface{ Deaths() <-chan struct{} })
	for ok {
		select {
		case <-s.Deaths():
			m.recoverNow()
		case <-m.ctx.Done():
			return
		}
	}
}

// recoverNow recovers the operations of dead processes, unless a recovery is under way.
// Close waits for it, because WithResume's function may be slow.
func (m *Manager) recoverNow() {
	m.mu.Lock()
	begin := !m.closing && !m.resuming
	if begin {
		m.resuming = true
		m.functions.Add(1)
	}
	m.mu.Unlock()
	if !begin {
		return
	}
	resumed, err := m.recoverFrom(nil)
	if err != nil {
		m.log.Debug("task: recovery failed", "err", err)
	}
	m.start(resumed)
	m.mu.Lock()
	m.resuming = false
	m.mu.Unlock()
	m.functions.Done()
}

// recoverLoop calls recover until it succeeds or the manager is closed.
func (m *Manager) recoverLoop() {
	for backoff := minBackoff; sleep(m.ctx, backoff); backoff = min(2*backoff, 10*time.Second) {
		resumed, err := m.recover()
		m.start(resumed)
		if err == nil {
			m.log.Info("task: recovery succeeded")
			return
		}
		m.log.Error("task: recovery failed, will be tried again", "err", err)
	}
}

// sleep waits for d, or until ctx is done, and reports whether d has passed.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
