package task

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
)

// The write path. Its invariants:
//
//  1. One goroutine writes, so the writes of an operation reach the store in
//     the order of its life: first row, changes, final state.
//  2. First rows and final states that arrive while a write is under way go
//     together into the next one. No timer delays them.
//  3. Nobody is told before the store has answered: Submit returns, and the
//     function starts, after the first row is stored; Wait returns, and the
//     operation leaves memory, after the final state is.
//  4. Changes (RUNNING, progress, metadata) are conflated: what is stored of
//     an operation is the latest. They ride along with those writes, or make
//     one of their own once the oldest has waited for changeDelay.
//  5. A final state that can't be stored is tried again until it can.
const (
	maxBatch    = 1024                   // first rows, and final states, in one write
	maxRiders   = 64                     // changes that ride along with one write
	changeDelay = 100 * time.Millisecond // how long a change may wait for a write to ride along with

	minBackoff = 100 * time.Millisecond
	maxBackoff = time.Second
	closeGrace = 5 * time.Second // how long close goes on trying

	// After so many rounds in which the final state of an operation could not
	// be stored, but another write of the same operation could both before and
	// after it, its result is given up.
	maxStrikes = 3
)

// A writer stores what its manager's tasks have to store.
type writer struct {
	manager *Manager
	wake    chan struct{} // holds a token when there may be something to write
	closing chan struct{}
	stopped chan struct{}

	mu          sync.Mutex // guards what follows; taken last
	saves       []*task    // first rows to store, in order of submission
	finals      []*task    // final states to store
	changes     []*task    // changes to store
	changeSince time.Time  // when the oldest of changes came

	// What follows belongs to the goroutine.
	unstored []*task // their final states could not be stored
	backoff  time.Duration
	retryAt  time.Time
	trouble  bool // that a write failed has been logged
}

func newWriter(m *Manager) *writer {
	return &writer{
		manager: m,
		wake:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
	}
}

// save has the first row of t stored. If that succeeds, t is admitted; in any
// case t.saved is told.
func (w *writer) save(t *task) {
	w.mu.Lock()
	w.saves = append(w.saves, t)
	w.mu.Unlock()
	w.signal()
}

// finish has the final state of t stored. Then t is settled.
func (w *writer) finish(t *task) {
	w.mu.Lock()
	w.finals = append(w.finals, t)
	w.mu.Unlock()
	w.signal()
}

// touch has the present state of t stored some time soon.
func (w *writer) touch(t *task) {
	w.mu.Lock()
	w.changes = append(w.changes, t)
	first := len(w.changes) == 1
	if first {
		w.changeSince = time.Now()
	}
	w.mu.Unlock()
	if first {
		w.signal()
	}
}

func (w *writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// close stores what there is to store, ends the goroutine, and returns an
// error that names what could not be stored. No function runs any more, and
// nothing is submitted.
func (w *writer) close() error {
	close(w.closing)
	<-w.stopped
	var errs []error
	for _, t := range w.unstored {
		if !t.doubtful { // else its Submit has returned the error
			errs = append(errs, fmt.Errorf("task: close: final state %s of %s (%.64q) not stored: %w",
				t.final.State, t.first.ID, t.first.Name, t.writeErr))
		}
	}
	return errors.Join(errs...)
}

func (w *writer) run() {
	defer close(w.stopped)
	timer := time.NewTimer(0)
	defer timer.Stop()
	closing := w.closing
	var deadline time.Time // once closing
	for {
		// Let those who are about to submit or to finish do so first: fewer
		// and larger writes.
		runtime.Gosched()
		runtime.Gosched()
		if w.write() || w.retry() {
			continue
		}
		if closing == nil && (len(w.unstored) == 0 || !time.Now().Before(deadline)) {
			w.abandon()
			return
		}
		if next, ok := w.next(); ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
		select {
		case <-w.wake:
		case <-timer.C:
		case <-closing:
			closing = nil
			deadline = time.Now().Add(closeGrace)
			w.backoff, w.retryAt = 0, time.Time{}
		}
	}
}

// next returns when there is something to write even if nothing new comes.
func (w *writer) next() (when time.Time, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.changes) > 0 {
		when, ok = w.changesDue(), true
	}
	if len(w.unstored) > 0 && (!ok || w.retryAt.Before(when)) {
		when, ok = w.retryAt, true
	}
	return when, ok
}

// changesDue returns when changes make a write of their own. The caller holds
// w.mu.
func (w *writer) changesDue() time.Time {
	due := w.changeSince.Add(changeDelay)
	if w.trouble && due.Before(w.retryAt) {
		return w.retryAt
	}
	return due
}

// write makes one write of what is due, and reports whether anything was.
func (w *writer) write() bool {
	saves, finals, changes := w.take()
	if len(saves)+len(finals)+len(changes) == 0 {
		return false
	}
	rows := make([]*Operation, len(saves))
	for i, t := range saves {
		op := t.first
		rows[i] = &op
	}
	updates := make([]*Operation, 0, len(finals)+len(changes))
	for _, t := range finals {
		op := *t.final
		updates = append(updates, &op)
	}
	changed := changes[:0]
	for _, t := range changes {
		if op := t.takeChange(); op != nil {
			changed = append(changed, t)
			updates = append(updates, op)
		}
	}

	errs := writeBatch(w.manager.db, rows, updates)
	w.note(errs)
	for i, t := range saves {
		w.saveDone(t, errs[i])
	}
	errs = errs[len(saves):]
	for i, t := range finals {
		w.finalDone(t, errs[i])
	}
	errs = errs[len(finals):]
	for i, t := range changed {
		if errs[i] != nil && !errors.Is(errs[i], ErrNotFound) {
			t.again()
		}
	}
	return true
}

// take returns what is due to be written now.
func (w *writer) take() (saves, finals, changes []*task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	saves, w.saves = cut(w.saves, maxBatch)
	finals, w.finals = cut(w.finals, maxBatch)
	switch {
	case len(w.changes) == 0:
	case !time.Now().Before(w.changesDue()):
		changes, w.changes = w.changes, nil
	case len(saves)+len(finals) > 0:
		changes, w.changes = cut(w.changes, maxRiders)
	}
	return saves, finals, changes
}

func cut(s []*task, n int) (head, tail []*task) {
	if len(s) <= n {
		return s, nil
	}
	return s[:n:n], s[n:]
}

// takeChange returns what to store of a change, or nil if the final state has
// overtaken it.
func (t *task) takeChange() *Operation {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirty = false
	if t.final != nil {
		return nil
	}
	op := t.op
	return &op
}

// again has a change stored that could not be.
func (t *task) again() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.final == nil && !t.dirty {
		t.dirty = true
		t.manager.writer.touch(t)
	}
}

// note logs when trouble with the store begins and when it ends, and sets the
// time to try again.
func (w *writer) note(errs []error) {
	var failed error
	for _, err := range errs {
		if err != nil && !errors.Is(err, ErrNotFound) {
			failed = err
			break
		}
	}
	switch {
	case failed != nil:
		if !w.trouble {
			w.manager.log.Error("task: storing failed, will be tried again", "err", failed)
		}
		w.trouble = true
		if now := time.Now(); !now.Before(w.retryAt) {
			w.backoff = min(max(2*w.backoff, minBackoff), maxBackoff)
			w.retryAt = now.Add(w.backoff)
		}
	case w.trouble && len(w.unstored) == 0:
		w.manager.log.Info("task: storing works again")
		w.trouble = false
		w.backoff = 0
	}
}

func (w *writer) saveDone(t *task, err error) {
	if err == nil {
		w.manager.admit(t)
	} else {
		// Should the row be there after all, then as one that has FAILED.
		t.doubtful = true
		t.finish(outcome{state: StateFailed, err: "not started, because Submit failed: " + err.Error()})
		w.manager.forget(t)
	}
	t.saved <- err
}

func (w *writer) finalDone(t *task, err error) {
	switch {
	case err == nil:
		w.settle(t, t.final, nil)
	case errors.Is(err, ErrNotFound):
		w.adopt(t)
	default:
		w.keep(t, err)
	}
}

// settle ends the life of a task: op is stored, or err says why nothing is.
func (w *writer) settle(t *task, op *Operation, err error) {
	t.mu.Lock()
	if op != nil {
		t.op = *op
	}
	t.err = err
	t.mu.Unlock()
	w.manager.forget(t)
	close(t.done)
}

// adopt settles a task whose row is gone or final already: what the database
// says holds.
func (w *writer) adopt(t *task) {
	op, err := w.manager.db.Get(t.first.ID)
	switch {
	case err == nil && op != nil && op.State.Finished():
		w.manager.log.Error("task: finished by somebody else", "id", t.first.ID, "name", t.first.Name,
			"state", t.final.State, "stored", op.State)
		w.settle(t, op, nil)
	case err == nil && op == nil, errors.Is(err, ErrNotFound):
		if !t.doubtful {
			w.manager.log.Error("task: deleted before its final state could be stored", "id", t.first.ID,
				"name", t.first.Name, "state", t.final.State)
		}
		w.settle(t, nil, ErrNotFound)
	case err == nil:
		w.keep(t, fmt.Errorf("the store shows it %s, but will not update it: %w", op.State, ErrNotFound))
	default:
		w.keep(t, err)
	}
}

// keep keeps a task whose final state could not be stored, and shows why.
func (w *writer) keep(t *task, err error) {
	t.writeErr = err
	w.unstored = append(w.unstored, t)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.op.Error = validUTF8(fmt.Sprintf("%s, which can't be stored yet: %v", t.final.State, err))
	if t.failed != nil {
		close(t.failed)
		t.failed = nil
	}
}

// retry tries again to store what could not be stored, and reports whether it
// was time to.
//
// If a final state fails alone, its result is at fault: retrying won't help.
// To be sure of that, the operation as it is shown is stored along with it:
// just before, and once more after.
func (w *writer) retry() bool {
	if len(w.unstored) == 0 || time.Now().Before(w.retryAt) {
		return false
	}
	tasks := w.unstored
	w.unstored = nil
	updates := make([]*Operation, 0, 2*len(tasks))
	for _, t := range tasks {
		op := *t.final
		updates = append(updates, t.shown(), &op)
	}
	errs := writeBatch(w.manager.db, nil, updates)
	var suspects []*task
	for i, t := range tasks {
		before, err := errs[2*i], errs[2*i+1]
		if before == nil && err != nil && !errors.Is(err, ErrNotFound) {
			suspects = append(suspects, t)
		} else {
			t.strikes = 0
		}
		w.finalDone(t, err)
	}
	w.note(errs)
	if len(suspects) == 0 {
		return true
	}
	updates = updates[:0]
	for _, t := range suspects {
		updates = append(updates, t.shown())
	}
	for i, err := range writeBatch(w.manager.db, nil, updates) {
		t := suspects[i]
		if err != nil {
			t.strikes = 0
		} else if t.strikes++; t.strikes >= maxStrikes {
			t.dropResult()
		}
	}
	return true
}

// shown returns the operation as it is shown, without what may be too large.
func (t *task) shown() *Operation {
	t.mu.Lock()
	defer t.mu.Unlock()
	op := t.op
	op.Metadata = t.first.Metadata
	return &op
}

// dropResult replaces a final state that the store won't take by one that it
// should.
func (t *task) dropResult() {
	t.mu.Lock()
	defer t.mu.Unlock()
	final := *t.final
	final.Result = nil
	final.Metadata = t.first.Metadata
	final.Error = validUTF8(joinText(fmt.Sprintf("%.1000s", final.Error), fmt.Sprintf("result not kept: %v", t.writeErr)))
	t.final = &final
	t.strikes = 0
	t.manager.log.Error("task: result not kept", "id", t.first.ID, "name", t.first.Name, "err", t.writeErr)
}

// abandon lets go of what could not be stored, for close.
func (w *writer) abandon() {
	for _, t := range w.unstored {
		t.mu.Lock()
		t.err = fmt.Errorf("final state not stored: %w: %w", ErrClosed, t.writeErr)
		t.mu.Unlock()
		close(t.done)
	}
}
