package task

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// pollInterval is how often the operations of other managers are looked at
// while somebody waits for them.
const pollInterval = 100 * time.Millisecond

// recover marks what dead processes have left unfinished as failed.
func (m *Manager) recover() error {
	n := 0
	live := func(id string) bool { return m.live(id) != nil }
	defer func() {
		if n > 0 {
			m.log.Warn("task: recovered interrupted operations", "count", n)
		}
	}()
	for op, err := range recoverOrphans(m.db, errTextRestart, live) {
		if err != nil {
			return err
		}
		n++
		m.log.Warn("task: operation interrupted", "id", op.ID, "name", op.Name, "err", op.Error)
	}
	return nil
}

// keepRecovering calls recover until it succeeds or the manager is closed.
func (m *Manager) keepRecovering() {
	for backoff := minBackoff; ; backoff = min(2*backoff, 10*time.Second) {
		select {
		case <-m.ctx.Done():
			return
		case <-time.After(backoff):
		}
		err := m.recover()
		if err == nil {
			m.log.Info("task: recovery succeeded")
			return
		}
		m.log.Error("task: recovery failed, will be tried again", "err", err)
	}
}

// A follower waits for operations that other managers run. However many calls
// wait, it looks at each operation once per pollInterval, and not at all while
// nobody waits.
type follower struct {
	manager *Manager

	mu       sync.Mutex           // guards what follows
	followed map[string]*followed // by operation ID
	stop     context.CancelFunc   // ends the poll; nil if none runs
}

type followed struct {
	waiters int
	op      *Operation    // as it was found last
	done    chan struct{} // closed once op has finished or err is set
	err     error         // why op will not finish
}

func newFollower(m *Manager) *follower {
	return &follower{manager: m, followed: make(map[string]*followed)}
}

// wait is Manager.Wait for an operation of another manager, which is
// unfinished.
func (f *follower) wait(ctx context.Context, op *Operation) (*Operation, error) {
	w := f.join(op)
	defer f.leave(op.ID, w)
	select {
	case <-w.done:
	case <-ctx.Done():
		if now, err := f.manager.stored(op.ID); err == nil {
			op = now
		}
		return op, ctx.Err()
	}
	if w.err != nil {
		return nil, fmt.Errorf("task: wait for %s: %w", op.ID, w.err)
	}
	return f.manager.present(*w.op), nil
}

// join follows an operation that is unfinished. Call leave in the end.
func (f *follower) join(op *Operation) *followed {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.followed[op.ID]
	if w == nil {
		w = &followed{op: op, done: make(chan struct{})}
		f.followed[op.ID] = w
	}
	w.waiters++
	if f.stop == nil {
		var ctx context.Context
		ctx, f.stop = context.WithCancel(context.Background())
		go f.poll(ctx)
	}
	return w
}

func (f *follower) leave(id string, w *followed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w.waiters--; w.waiters == 0 && f.followed[id] == w {
		delete(f.followed, id)
	}
	if len(f.followed) == 0 && f.stop != nil {
		f.stop()
		f.stop = nil
	}
}

// poll looks at the followed operations until ctx is done.
func (f *follower) poll(ctx context.Context) {
	m := f.manager
	_, shared := m.db.(Recoverer)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pollInterval):
		}
		if shared && m.ctx.Err() == nil {
			if err := m.recover(); err != nil {
				m.log.Debug("task: recovery failed", "err", err)
			}
		}
		for _, id := range f.ids() {
			op, err := m.stored(id)
			switch {
			case err == nil:
				f.found(op)
			case errors.Is(err, ErrNotFound):
				f.lost(id, err)
			case m.ctx.Err() != nil:
				// The store has been closed after the manager, or nearly so.
				f.lost(id, fmt.Errorf("%w: %w", ErrClosed, err))
			}
		}
	}
}

func (f *follower) ids() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.followed))
}

// found tells those who follow an operation what it is now.
func (f *follower) found(op *Operation) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.followed[op.ID]
	if w == nil {
		return
	}
	if before := w.op; op.State != before.State || op.Progress != before.Progress || !op.UpdatedAt.Equal(before.UpdatedAt) {
		w.op = op
		f.manager.hub.tell(news{op: *op, foreign: true}, op.State != before.State)
	}
	if !op.State.live() {
		close(w.done)
		delete(f.followed, op.ID)
	}
}

// lost tells those who follow an operation why they will not see its end.
func (f *follower) lost(id string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w := f.followed[id]; w != nil {
		w.err = err
		f.manager.hub.tell(news{op: *w.op, foreign: true, err: err}, true)
		close(w.done)
		delete(f.followed, id)
	}
}
