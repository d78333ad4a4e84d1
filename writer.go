package task

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
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
	maxOverdue = 10 * time.Second // how long slow writes may hold up trying again
	closeGrace = 5 * time.Second  // how long close goes on trying in vain

	maxDoubtful = 10_000 // first rows that may or may not be stored; more are not tried

	// After so many tries in a row in which the final state of an operation
	// could not be stored, but another write of the same operation just before
	// it could, a value is given up that must be at fault.
	maxStrikes = 5
)

// A writer stores what its manager's tasks have to store.
//
// The way of a task through it: save, saveDone, which has it admitted; touch,
// as often as it changes; finish, finalDone, and then settle if the final state
// is stored, adopt if the row is gone or final already, or keep, which has it
// tried again.
type writer struct {
	manager *Manager
	wake    chan struct{} // holds a token when there may be something to write
	closing chan struct{} // closed by close
	stopped chan struct{} // closed when the goroutine has ended

	doubtful atomic.Int64 // tasks whose Save failed, and that are not settled

	deadline time.Time // when to give up; set before closing is closed, and from then on by the goroutine

	mu          sync.Mutex      // guards what follows; taken last
	saves       []*task         // first rows to store, in order of submission
	finals      []*task         // final states to store
	changes     []*task         // changes to store
	changeSince time.Time       // when the oldest of changes came
	flushes     []chan struct{} // closed when all changes until now are stored

	// What follows belongs to the goroutine.
	refused  []*task // their changes could not be stored
	unstored []*task // their final states could not be stored
	backoff  time.Duration
	retryAt  time.Time // when to try again to store those
	trouble  bool      // that a write failed has been logged
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

// flush has all changes stored now, as far as they can be.
func (w *writer) flush() {
	done := make(chan struct{})
	w.mu.Lock()
	w.flushes = append(w.flushes, done)
	w.mu.Unlock()
	w.signal()
	select {
	case <-done:
	case <-w.stopped:
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
	w.deadline = time.Now().Add(closeGrace)
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
	for {
		// Let those who are about to submit or to finish do so first: fewer
		// and larger writes.
		runtime.Gosched()
		runtime.Gosched()
		closing := w.isClosing()
		if closing && !time.Now().Before(w.deadline) {
			w.trouble = true // so that all goes into this last write
			w.write()
			w.abandon()
			return
		}
		began := time.Now()
		wrote := w.write()
		// Those who submit without a pause must not keep what failed from being
		// tried again; but nobody is to wait for two slow writes before his own.
		if wrote && time.Since(began) > time.Second && time.Since(w.retryAt) < maxOverdue {
			continue
		}
		if w.retry() || wrote {
			continue
		}
		if closing && len(w.unstored) == 0 {
			return
		}
		if next, ok := w.next(); ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
		stop := w.closing
		if closing {
			stop = nil
		}
		select {
		case <-w.wake:
		case <-timer.C:
		case <-stop:
			w.backoff, w.retryAt = 0, time.Time{}
		}
	}
}

func (w *writer) isClosing() bool {
	select {
	case <-w.closing:
		return true
	default:
		return false
	}
}

// next returns when there is something to write even if nothing new comes.
func (w *writer) next() (when time.Time, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.changes) > 0 {
		when, ok = w.changeSince.Add(changeDelay), true
		if w.retryAt.After(when) { // while there is trouble they wait for that
			when = w.retryAt
		}
	}
	if len(w.refused)+len(w.unstored) > 0 && (!ok || w.retryAt.Before(when)) {
		when, ok = w.retryAt, true
	}
	return when, ok
}

// write makes one write of what is due, and reports whether anything was.
func (w *writer) write() bool {
	saves, finals, changes, flushes := w.take()
	defer func() {
		for _, done := range flushes {
			close(done)
		}
	}()
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
	var changed []*task
	for _, t := range changes {
		if op := t.takeChange(); op != nil {
			changed = append(changed, t)
			updates = append(updates, op)
		}
	}

	if len(rows)+len(updates) == 0 {
		return true // all changes have been overtaken by final states
	}

	errs := writeBatch(w.manager.db, rows, updates)
	for i, t := range saves {
		w.saveDone(t, errs[i])
	}
	errs = errs[len(saves):]
	w.note(errs)
	for i, t := range finals {
		w.finalDone(t, errs[i])
	}
	errs = errs[len(finals):]
	for i, t := range changed {
		if t.refused = failed(errs[i]); t.refused {
			w.refuse(t, errs[i])
		}
	}
	return true
}

// failed reports whether err says that a write should be tried again.
func failed(err error) bool {
	return err != nil && !errors.Is(err, ErrNotFound)
}

// take returns what is due to be written now.
func (w *writer) take() (saves, finals, changes []*task, flushes []chan struct{}) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.trouble { // nobody is to wait for one failing write after the other
		saves, w.saves = w.saves, nil
		finals, w.finals = w.finals, nil
	} else {
		saves, w.saves = cut(w.saves, maxBatch)
		finals, w.finals = cut(w.finals, maxBatch)
	}
	flushes, w.flushes = w.flushes, nil
	retry := !now.Before(w.retryAt)
	switch {
	case retry && (now.Sub(w.changeSince) >= changeDelay || len(flushes) > 0):
		changes, w.changes = w.changes, nil
	case len(saves)+len(finals) > 0:
		changes, w.changes = cut(w.changes, maxRiders)
	}
	if retry {
		changes = append(changes, w.refused...)
		w.refused = nil
		return saves, finals, changes, flushes
	}
	// What may spoil the write does not ride along.
	changes = slices.DeleteFunc(changes, func(t *task) bool {
		if t.refused {
			w.refused = append(w.refused, t)
		}
		return t.refused
	})
	return saves, finals, changes, flushes
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

// refuse has a change stored later that could not be.
func (w *writer) refuse(t *task, err error) {
	w.postpone(err)
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.dirty { // else it is among the changes again
		t.dirty = true
		w.refused = append(w.refused, t)
	}
}

// note logs when trouble with the store ends.
func (w *writer) note(errs []error) {
	if w.trouble && len(errs) > 0 && len(w.unstored)+len(w.refused) == 0 && !slices.ContainsFunc(errs, failed) {
		w.manager.log.Info("task: storing works again")
		w.trouble = false
		w.backoff = 0
	}
}

// postpone sets the time to try again what could not be stored, and logs when
// trouble begins.
func (w *writer) postpone(err error) {
	if !w.trouble {
		w.manager.log.Error("task: storing failed, will be tried again", "err", err)
		w.trouble = true
	}
	if now := time.Now(); !now.Before(w.retryAt) {
		w.backoff = min(max(2*w.backoff, minBackoff), maxBackoff)
		w.retryAt = now.Add(w.backoff)
	}
}

func (w *writer) saveDone(t *task, err error) {
	if err == nil {
		w.manager.admit(t)
	} else {
		// Should the row be there after all, then as one that has FAILED.
		t.doubtful = true
		w.doubtful.Add(1)
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
	t.tell(true)
	if t.doubtful { // watched by nobody but those who have found its row
		w.manager.hub.tell(news{op: t.op, err: t.err, foreign: true}, true)
	}
	t.mu.Unlock()
	if t.doubtful {
		w.doubtful.Add(-1)
	}
	w.manager.forget(t)
	close(t.done)
	if w.isClosing() {
		w.deadline = time.Now().Add(closeGrace)
	}
}

// adopt settles a task whose row is gone or final already: what the database
// says holds.
func (w *writer) adopt(t *task) {
	op, err := w.manager.db.Get(t.first.ID)
	switch {
	case err == nil && op != nil && !op.State.live():
		if op.State != t.final.State || !op.UpdatedAt.Equal(t.final.UpdatedAt) { // else it is ours, in spite of an error
			w.manager.log.Error("task: finished by somebody else", "id", t.first.ID, "name", t.first.Name,
				"state", t.final.State, "stored", op.State)
		}
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
	w.postpone(err)
	t.mu.Lock()
	defer t.mu.Unlock()
	if text := validUTF8(fmt.Sprintf("%s, which can't be stored yet: %v", t.final.State, err)); text != t.op.Error {
		t.op.Error = text
		t.tell(false)
	}
	if t.failed != nil {
		close(t.failed)
		t.failed = nil
	}
}

// retry tries again to store what could not be stored, and reports whether it
// was time to.
//
// If a final state fails alone, a value in it is at fault: trying again won't
// help. To tell, the operation as it is shown is stored just before it.
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
	for i, t := range tasks {
		before, err := errs[2*i], errs[2*i+1]
		w.finalDone(t, err)
		if before != nil || !failed(err) {
			t.strikes = 0
		} else if t.strikes++; t.strikes >= maxStrikes {
			t.giveUp()
		}
	}
	w.note(errs)
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

// giveUp takes the value out of a final state that keeps it from being stored:
// metadata that came after Submit if there is any, or else the result.
func (t *task) giveUp() {
	final := *t.final
	what := "metadata"
	if same(final.Metadata, t.first.Metadata) {
		what = "result"
		final.Result = nil
	}
	final.Metadata = t.first.Metadata
	final.Error = validUTF8(joinText(final.Error, fmt.Sprintf("%s not kept: %v", what, t.writeErr)))
	t.mu.Lock()
	t.final = &final
	t.mu.Unlock()
	t.strikes = 0
	t.manager.log.Error("task: value not kept", "id", t.first.ID, "name", t.first.Name, "value", what, "err", t.writeErr)
}

// same compares two values, each nil or a json.RawMessage.
func same(a, b any) bool {
	x, _ := rawJSON(a)
	y, _ := rawJSON(b)
	return bytes.Equal(x, y)
}

// abandon lets go of all that is not stored, for close.
func (w *writer) abandon() {
	w.mu.Lock()
	saves, finals := w.saves, w.finals
	w.mu.Unlock()
	for _, t := range saves {
		w.manager.forget(t)
		t.saved <- ErrClosed
	}
	for _, t := range finals {
		t.writeErr = errors.New("the store took too long")
		w.unstored = append(w.unstored, t)
	}
	for _, t := range w.unstored {
		t.mu.Lock()
		t.err = fmt.Errorf("final state not stored: %w: %w", ErrClosed, t.writeErr)
		t.mu.Unlock()
		close(t.done)
	}
}
