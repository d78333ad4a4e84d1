package main

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// A usage is how much a pool holds, not counting snapshots.
type usage struct {
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"` // total size of the files; sparse files take less space
}

// A usages measures pools in the background, because measuring a pool with millions of
// files takes minutes, and clients ask every second.
type usages struct {
	storage *storage

	mu   sync.Mutex // guards what follows
	pool map[string]*measurement
}

// A measurement is the latest measurement of a pool.
type measurement struct {
	usage *usage        // nil until a measurement has succeeded
	next  time.Time     // when to measure again
	done  chan struct{} // closed unless a measurement is in progress
}

// of returns the latest usage of a pool, or nil if it is still unknown. If the usage is
// outdated, it starts a measurement and waits for it until ctx is done.
func (u *usages) of(ctx context.Context, name string) *usage {
	u.mu.Lock()
	m := u.pool[name]
	if m == nil {
		m = &measurement{done: make(chan struct{})}
		close(m.done)
		u.pool[name] = m
	}
	select {
	case <-m.done:
		if time.Now().After(m.next) {
			m.done = make(chan struct{})
			go u.measure(name, m)
		}
	default: // a measurement is in progress
	}
	done := m.done
	u.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return m.usage
}

// measure measures a pool. The next measurement is due after 20 times the duration of this
// one, so that measuring takes at most 5 % of the disk's time.
func (u *usages) measure(name string, m *measurement) {
	began := time.Now()
	got, err := u.storage.usage(name)
	if err != nil {
		slog.Debug("pool not measured", "pool", name, "err", err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	m.usage, m.next = got, time.Now().Add(20*time.Since(began))
	close(m.done)
}

// usage adds up the files of a pool.
func (s *storage) usage(name string) (*usage, error) {
	p, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer p.close()
	got := new(usage)
	err = walk(context.Background(), p.files, ".", func(path string, err error) error {
		if err != nil {
			return nil // reported by a scrub
		}
		if info, err := p.files.Lstat(path); err == nil {
			got.Files++
			got.Bytes += info.Size()
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return got, nil
}
