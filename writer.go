package task

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"time"
)

// The write path. Its invariants:
//
//  1. One goroutine writes, so the writes of an operation reach the store in
//     the order of its states: first row, changes, final state.
//  2. First rows and final states that arrive during a write go together into
//     the next one. No timer delays them.
//  3. No new operation and no final state is shown before it is stored: Submit
//     returns and the function starts after the first row is stored; Wait returns
//     and the operation leaves memory after the final state is stored.
//  4. Changes (RUNNING, progress, message, metadata) are conflated: only the
//     latest is stored. They are part of a write of first rows and final states,
//     but not of the very next one, because the operation's end often makes them
//     unnecessary; or they get a write of their own once the oldest has waited
//     for changeDelay. Changes that Checkpoint waits for are not delayed.
//  5. A failed insert fails its Submit. Other failed writes are retried until they
//     succeed, the row turns out to be gone or finished, the owner is lost, or Close
//     gives up.
const (
	maxBatch    = 1024                   // final states in one write
	maxBytes    = 16 << 20               // of their values, unless a single one has more
	maxChanges  = 64                     // changes that join another write
	changeDelay = 100 * time.Millisecond // how long a change may wait for another write

	minBackoff = 100 * time.Millisecond
	maxBackoff = time.Second

	maxUnknown      = 10_000  // inserts of unknown outcome to remember
	maxUnknownValue = 4 << 10 // bytes of metadata to remember of each
)

// A record is one row to store, and the outcome.
type record struct {
	t     *task      // nil for an insert of unknown outcome, which becomes FAILED
	op    *Operation // the row; immutable
	final bool       // op is the final state of t
	given bool       // the caller gave the ID of an insert of unknown outcome: the row may belong to another operation
	err   error

	checkpoints []chan error // receive the outcome
}

func answer(checkpoints []chan error, err error) {
	for _, c := range checkpoints {
		c <- err
	}
}

// A batch is the content of one write.
type batch struct {
	inserts, updates []record
	unknown          []record // inserts of unknown outcome to read first
}

func (b *batch) empty() bool { return len(b.inserts)+len(b.updates)+len(b.unknown) == 0 }

// A backlog holds what waits to be written. The manager's mutex guards it.
type backlog struct {
	inserts   []record // in order of submission
	finals    []record // final states not tried yet
	changed   []*task
	changedAt time.Time // when the first of changed was added
	before    int       // length of changed after the last take
	urgent    bool      // Checkpoint waits for some of changed: do not delay those
	retry     []record  // final states that the store has refused, and inserts of unknown outcome
	unknown   []record  // inserts of unknown outcome to read first
	writing   []*task   // tasks whose updates are being written

	retryAt time.Time // when to retry
	backoff time.Duration
}

// change adds a task to changed, and reports whether it is the first one there.
func (b *backlog) change(t *task) (first bool) {
	if t.listed || t.final != nil {
		return false
	}
	t.listed = true
	b.changed = append(b.changed, t)
	if first = len(b.changed) == 1; first {
		b.changedAt = time.Now()
	}
	return first
}

// take removes and returns what is due, or with all, everything. The caller fills in
// the operations of changed tasks.
func (b *backlog) take(now time.Time, all bool) batch {
	out := batch{inserts: b.inserts}
	b.inserts = nil
	var changed []*task
	var retry []record
	out.updates, b.finals = cut(b.finals, fitting(b.finals), all)
	if all || !now.Before(b.retryAt) {
		retry, b.retry = cut(b.retry, fitting(b.retry), all)
		out.unknown, b.unknown = cut(b.unknown, maxBatch, all)
		along := min(b.before, maxChanges)
		switch {
		case all || now.Sub(b.changedAt) >= changeDelay:
			along = len(b.changed)
		case out.empty():
			along = 0
		}
		if b.urgent {
			along = max(along, b.checkpointsFirst())
		}
		changed, b.changed = cut(b.changed, along, false)
	}
	b.before = len(b.changed)
	for _, t := range changed {
		if t.listed = false; t.final == nil {
			out.updates = append(out.updates, record{t: t, checkpoints: t.checkpoints})
			t.checkpoints = nil
		}
	}
	out.updates = append(out.updates, retry...)
	b.writing = nil
	for _, w := range out.updates {
		if w.t != nil {
			b.writing = append(b.writing, w.t)
		}
	}
	return out
}

// checkpointsFirst moves the tasks that Checkpoint waits for to the front of
// changed, and returns their number.
func (b *backlog) checkpointsFirst() int {
	var first, rest []*task
	for _, t := range b.changed {
		if len(t.checkpoints) > 0 {
			first = append(first, t)
		} else {
			rest = append(rest, t)
		}
	}
	b.changed, b.urgent = append(first, rest...), false
	return len(first)
}

// fitting returns how many of the records fit into one write.
func fitting(records []record) (n int) {
	for bytes := 0; n < min(len(records), maxBatch); n++ {
		if bytes += records[n].op.valueBytes(); n > 0 && bytes > maxBytes {
			break
		}
	}
	return n
}

func cut[T any](s []T, n int, all bool) (head, tail []T) {
	if all || len(s) <= n {
		return s, nil
	}
	return s[:n:n], s[n:]
}

// next returns when something already in the backlog is due.
func (b *backlog) next() (at time.Time, ok bool) {
	if len(b.retry)+len(b.unknown) > 0 || b.urgent {
		return b.retryAt, true
	}
	if len(b.changed) > 0 {
		return latest(b.changedAt.Add(changeDelay), b.retryAt), true
	}
	return at, false
}

// again schedules a retry of a record.
func (b *backlog) again(w record, now time.Time) {
	if !now.Before(b.retryAt) {
		b.backoff = min(max(2*b.backoff, minBackoff), maxBackoff)
		b.retryAt = now.Add(b.backoff)
	}
	switch {
	case w.t == nil || w.final:
		b.tryAgain(w)
	case w.t.final != nil:
		answer(w.checkpoints, errReturned)
	default:
		w.t.checkpoints = append(w.t.checkpoints, w.checkpoints...)
		b.change(w.t)
	}
}

// remember schedules an update to FAILED for an insert that has failed, in case the
// row was stored after all.
func (b *backlog) remember(w record) {
	if len(b.retry)+len(b.unknown) >= maxUnknown { // recovery finds the rest
		return
	}
	failed := *w.op
	failed.State, failed.UpdatedAt = StateFailed, latest(wall(), failed.UpdatedAt)
	failed.bound(maxUnknownValue)
	failed.Error = validUTF8("not started, because Submit failed: " + w.err.Error())
	b.tryAgain(record{op: &failed, given: w.t.given})
}

func (b *backlog) tryAgain(w record) {
	if _, omitted := w.op.Metadata.(Omitted); omitted || w.given {
		b.unknown = append(b.unknown, w)
	} else {
		b.retry = append(b.retry, w)
	}
}

// forget drops the remembered insert of an ID once a new insert has used that ID.
func (b *backlog) forget(id string) {
	b.unknown = slices.DeleteFunc(b.unknown, func(w record) bool { return w.op.ID == id })
}

// unstored yields the tasks whose present state may not be stored.
func (b *backlog) unstored(yield func(*task) bool) {
	tasks := slices.Concat(b.changed, b.writing)
	for _, w := range slices.Concat(b.finals, b.retry) {
		tasks = append(tasks, w.t)
	}
	for _, t := range tasks {
		if t != nil && !yield(t) {
			return
		}
	}
}

// A source supplies a writer. The writer's goroutine calls its methods in turn.
type source interface {
	// next returns the batch that is due. If that is empty, it returns when to
	// call it again at the latest (zero for never), and whether the writer should
	// end.
	next(now time.Time) (b batch, at time.Time, done bool)

	// written takes the outcome of a batch, and reports whether anything is to be
	// retried.
	written(b batch) (more bool)
}

// A writer stores the batches of its source.
type writer struct {
	db      Persistence
	log     *slog.Logger
	source  source
	wake    chan struct{} // holds a token when there may be something to write
	stopped chan struct{} // closed when run has ended
	trouble bool          // a failed write has been logged
}

// signal wakes the writer. It never blocks.
func (w *writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *writer) run() {
	defer close(w.stopped)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		// Let the goroutines that are about to submit or to finish run first:
		// batches become fewer and larger.
		runtime.Gosched()
		runtime.Gosched()
		b, at, done := w.source.next(time.Now())
		if !b.empty() {
			w.write(&b)
			w.note(b, w.source.written(b))
			continue
		}
		if done {
			return
		}
		timer.Stop()
		if !at.IsZero() {
			timer.Reset(time.Until(at))
		}
		select {
		case <-w.wake:
		case <-timer.C:
		}
	}
}

// write stores a batch and sets the outcome of each row. It begins with the inserts
// of unknown outcome, so that it does not mistake a new row with the same ID for one
// of them. Those that it leaves in b.unknown are to be retried.
func (w *writer) write(b *batch) {
	start, unknown := time.Now(), b.unknown
	b.unknown = nil
	for i, u := range unknown {
		if time.Since(start) > maxBackoff { // the next write begins with the rest
			b.unknown = append(unknown[i:], b.unknown...)
			break
		}
		if u.err = w.failInsert(u); u.err != nil {
			b.unknown = append(b.unknown, u)
		}
	}
	if len(b.inserts)+len(b.updates) == 0 {
		return
	}
	saves, updates := rows(b.inserts), rows(b.updates)
	errs := writeBatch(w.db, saves, updates)
	for i := range b.inserts {
		b.inserts[i].err = errs[i]
	}
	for i, err := range errs[len(saves):] {
		b.updates[i].err = err
		if errors.Is(err, ErrNotFound) {
			w.resolve(&b.updates[i])
		}
	}
}

// failInsert marks the row of an insert of unknown outcome as FAILED. If the caller
// gave the ID, it does so only for a row that is certainly this manager's.
func (w *writer) failInsert(u record) error {
	row, err := get(w.db, u.op.ID)
	if err == nil && (!u.given || u.op.saved(row) && row.Owner != "") {
		_, err = updateOrphan(w.db, u.op.ID, u.op.Error, false)
	}
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// rows returns copies, which then belong to the store.
func rows(records []record) []*Operation {
	copies := make([]Operation, len(records))
	rows := make([]*Operation, len(records))
	for i, w := range records {
		copies[i] = *w.op
		rows[i] = &copies[i]
	}
	return rows
}

// resolve replaces a final state by the stored one if the store refuses the update
// because the operation was deleted or has already finished.
func (w *writer) resolve(u *record) {
	if !u.final { // an unknown insert was not stored; for a change, the final state will find out
		return
	}
	op, err := get(w.db, u.op.ID)
	switch {
	case errors.Is(err, ErrNotFound):
		u.err = ErrNotFound
		w.log.Error("task: deleted before its final state could be stored", "id", u.op.ID,
			"name", u.op.Name, "state", u.op.State)
	case err != nil:
		u.err = err
	case op.State.live():
		u.err = fmt.Errorf("the store has it as %s, but does not update it", op.State)
	default:
		if op.State != u.op.State || !op.UpdatedAt.Equal(u.op.UpdatedAt) { // otherwise an earlier write that seemed to fail has stored it
			w.log.Error("task: finished by another manager", "id", u.op.ID, "name", u.op.Name,
				"state", u.op.State, "stored", op.State)
		}
		u.op, u.err = op, nil
	}
}

// retryable reports whether a write that failed with err should be retried.
func retryable(err error) bool {
	return err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrLost)
}

// note logs when writes start and stop failing. Two kinds of inserts don't count: with an
// ID that the caller gave, because the ID may exist, and in a store without Save.
func (w *writer) note(b batch, more bool) {
	var failed error
	for i, records := range [][]record{b.inserts, b.updates, b.unknown} {
		for _, r := range records {
			if retryable(r.err) && (i > 0 || !r.t.given && !errors.Is(r.err, errors.ErrUnsupported)) {
				failed = cmp.Or(failed, r.err)
			}
		}
	}
	switch {
	case failed != nil && !w.trouble:
		w.log.Error("task: storing failed; what was acknowledged will be tried again", "err", failed)
		w.trouble = true
	case failed == nil && !more && w.trouble:
		w.log.Info("task: storing works again")
		w.trouble = false
	}
}
