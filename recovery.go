package task

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"time"
)

const (
	// pollInterval is how often the operations of other managers are looked at
	// while somebody waits for them.
	pollInterval = 100 * time.Millisecond

	// recoverEvery is how many such looks there are to one at whether those
	// managers are alive.
	recoverEvery = 10

	// maxOrphanLogs is how many recovered operations are logged one by one.
	maxOrphanLogs = 100
)

// recover marks what dead processes have left unfinished as failed.
func (m *Manager) recover() error {
	return m.recoverFrom(func(id string) bool { return m.liveRow(id) != nil })
}

func (m *Manager) recoverFrom(live func(id string) bool) error {
	n := 0
	defer func() {
		if n > 0 {
			m.log.Warn("task: recovered interrupted operations", "count", n)
		}
	}()
	for op, err := range recoverOrphans(m.db, errTextRestart, live) {
		switch {
		case err != nil && op == nil:
			return err
		case err != nil:
			m.log.Error("task: not known whether an operation's process is alive", "id", op.ID, "name", op.Name, "err", err)
			continue
		}
		if n++; n <= maxOrphanLogs {
			m.log.Warn("task: operation interrupted", "id", op.ID, "name", op.Name, "err", op.Error)
		}
		m.callRecovered(op)
	}
	return nil
}

// callRecovered calls the function that WithRecovered has set.
func (m *Manager) callRecovered(op *Operation) {
	defer func() {
		if r := recover(); r != nil {
			m.log.Error("task: the function of WithRecovered panicked", "id", op.ID,
				"panic", fmt.Sprint(r), "stack", string(debug.Stack()))
		}
	}()
	if m.recovered != nil {
		m.recovered(m.copyOut(op))
	}
}

// recoverLoop calls recover until it succeeds or the manager is closed.
func (m *Manager) recoverLoop() {
	for backoff := minBackoff; sleep(m.ctx, backoff); backoff = min(2*backoff, 10*time.Second) {
		err := m.recover()
		if err == nil {
			m.log.Info("task: recovery succeeded")
			return
		}
		m.log.Error("task: recovery failed, will be tried again", "err", err)
	}
}

// sleep waits for so long, and reports whether ctx is not done meanwhile.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// A foreign is an operation of another manager that somebody here waits for or
// watches. However many do, it is looked at once per pollInterval.
type foreign struct {
	life
	waiters int
}

// follow begins to look at an unfinished operation of another manager. Call
// unfollow in the end.
func (m *Manager) follow(row *Operation) *foreign {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.foreign[row.ID]
	if f == nil {
		f = &foreign{life: newLife(row)}
		m.foreign[row.ID] = f
	}
	f.waiters++
	if m.stopPoll == nil {
		m.stopPoll = make(chan struct{})
		go m.poll(m.stopPoll)
	}
	return f
}

// unfollow is the end of follow.
func (m *Manager) unfollow(f *foreign) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.waiters--; f.waiters == 0 && m.foreign[f.op.ID] == f {
		delete(m.foreign, f.op.ID)
	}
	if len(m.foreign) == 0 && m.stopPoll != nil {
		close(m.stopPoll)
		m.stopPoll = nil
	}
}

// poll looks at the operations of others until stop is closed.
func (m *Manager) poll(stop <-chan struct{}) {
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		case <-time.After(pollInterval):
		}
		if n%recoverEvery == 0 && m.ctx.Err() == nil {
			if err := m.recoverFrom(nil); err != nil {
				m.log.Debug("task: recovery failed", "err", err)
			}
		}
		m.mu.Lock()
		ids := slices.Collect(maps.Keys(m.foreign))
		m.mu.Unlock()
		for _, id := range ids {
			op, err := get(m.db, id)
			if err != nil && m.ctx.Err() != nil && !errors.Is(err, ErrNotFound) {
				// The store has been closed after the manager, or nearly so.
				err = fmt.Errorf("%w: %w", ErrClosed, err)
			}
			m.found(id, op, err)
		}
	}
}

// found takes in what an operation of another manager has become.
func (m *Manager) found(id string, op *Operation, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.foreign[id]
	if f == nil {
		return
	}
	before := f.op
	switch {
	case err == nil && op.State == before.State && op.UpdatedAt.Equal(before.UpdatedAt):
		return
	case err == nil:
		f.op = op
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrClosed):
		f.err = err
	default:
		return
	}
	m.appendEvent(event{op: f.op, err: f.err, foreign: true}, f.err == nil && f.op.State == before.State)
	if f.err != nil || !f.op.State.live() {
		close(f.done)
		delete(m.foreign, id)
	}
}
