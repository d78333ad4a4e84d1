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
	done    chan struct{} // closed once op or err is set
	op      *Operation    // the finished operation
	err     error         // why there is none
}

func newFollower(m *Manager) *follower {
	return &follower{manager: m, followed: make(map[string]*followed)}
}

// wait is Manager.Wait for an operation of another manager, which is
// unfinished.
func (f *follower) wait(ctx context.Context, op *Operation) (*Operation, error) {
	w := f.join(op.ID)
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

func (f *follower) join(id string) *followed {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.followed[id]
	if w == nil {
		w = &followed{done: make(chan struct{})}
		f.followed[id] = w
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
			case errors.Is(err, ErrNotFound), err == nil && !op.State.live():
				f.tell(id, op, err)
			case err != nil && m.ctx.Err() != nil:
				// The store has been closed after the manager, or nearly so.
				f.tell(id, nil, fmt.Errorf("%w: %w", ErrClosed, err))
			}
		}
	}
}

func (f *follower) ids() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Keys(f.followed))
}

// tell ends the waiting for an operation.
func (f *follower) tell(id string, op *Operation, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w := f.followed[id]; w != nil {
		w.op, w.err = op, err
		close(w.done)
		delete(f.followed, id)
	}
}
