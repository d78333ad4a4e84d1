package taskpg

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/mynt-nas/task"
)

const (
	// sendInterval is the least time between two notifications by a store.
	sendInterval = 50 * time.Millisecond

	// hintInterval is the least time between two hints that Changes yields.
	hintInterval = 100 * time.Millisecond

	// blindInterval is the polling interval of Changes if no notifications arrive.
	blindInterval = time.Second
)

// hints inform stores of each other's writes. A notification says nothing but that
// something may have changed. It is sent after the commit, in a transaction of its
// own, because the server commits notifying transactions one at a time. A lost
// notification only causes a delay: Changes yields at least in every third of a lease.
type hints struct {
	channel string // contains the OID of the table

	mu      sync.Mutex    // guards changed
	changed chan struct{} // closed and replaced when something may have changed

	dirty  chan struct{} // holds a token when other stores must be notified
	others atomic.Bool   // whether other stores exist, as far as is known
	hears  atomic.Bool   // whether notifications arrive
}

func newHints() *hints {
	return &hints{changed: make(chan struct{}), dirty: make(chan struct{}, 1)}
}

// wait returns a channel that is closed at the next hint.
func (h *hints) wait() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// tell gives a hint to the users of this store.
func (h *hints) tell() {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.changed)
	h.changed = make(chan struct{})
}

// written gives a hint to the users of this store and of the other stores.
func (h *hints) written() {
	h.tell()
	select {
	case h.dirty <- struct{}{}:
	default:
	}
}

// Changes implements [task.Notifier]. If no notifications arrive, as behind a pooler
// in transaction mode, it yields every second. It ends with [task.ErrLost] once the
// store learns that it was declared gone, or if it learned so less than a second
// before the call.
func (s *Store) Changes(ctx context.Context) iter.Seq[error] {
	return func(yield func(error) bool) {
		for began := time.Now(); ; {
			changed := s.hints.wait()
			if s.fencedAfter(began.Add(-time.Second)) {
				yield(task.ErrLost)
				return
			}
			if ctx.Err() != nil || s.ctx.Err() != nil || !yield(nil) {
				return
			}
			pause := time.After(hintInterval)
			again := s.lease / 3
			if !s.hints.hears.Load() {
				again = min(again, blindInterval)
			}
			select {
			case <-changed:
			case <-time.After(again):
			case <-ctx.Done():
			case <-s.ctx.Done():
			}
			select {
			case <-pause:
			case <-ctx.Done():
			case <-s.ctx.Done():
			}
		}
	}
}

// announce notifies other stores when it starts and after each write of this store,
// until the store is closed.
func (s *Store) announce() {
	for first := true; ; first = false {
		if !first {
			select {
			case <-s.ctx.Done():
				return
			case <-s.hints.dirty:
			}
		}
		if first || s.hints.others.Load() {
			s.notify() // best effort: others would find out later anyway
		}
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(sendInterval):
		}
	}
}

// notify sends a notification, in a transaction that doesn't wait for the disk.
func (s *Store) notify() error {
	ctx, cancel := s.limited()
	defer cancel()
	b := new(pgx.Batch)
	b.Queue(`BEGIN`)
	b.Queue(`SET LOCAL synchronous_commit = off`)
	b.Queue(`SELECT pg_notify($1::text, $2::text)`, s.hints.channel, s.Owner())
	b.Queue(`COMMIT`)
	return s.pool.SendBatch(ctx, b).Close()
}

// listen waits for notifications until the store is closed. It has its own connection,
// outside any transaction.
func (s *Store) listen() {
	for s.ctx.Err() == nil {
		err := s.listenOnce()
		s.hints.hears.Store(false)
		pause := min(s.lease/10, time.Second)
		if errors.Is(err, errDeaf) {
			pause = max(10*s.lease, time.Minute)
		}
		select {
		case <-s.ctx.Done():
		case <-time.After(time.Duration((0.5 + rand.Float64()) * float64(pause))):
		}
	}
}

// errDeaf means that the connection receives no notifications, as behind a pooler
// in transaction mode.
var errDeaf = errors.New("no notifications arrive")

// limited returns a context with the time limit of an attempt. Close does not cancel
// it: pgx would ask the server to cancel the query, which not all poolers survive.
func (s *Store) limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), s.attemptLimit())
}

// listenOnce listens on one connection until it fails or proves deaf.
func (s *Store) listenOnce() error {
	ctx, cancel := s.limited()
	defer cancel()
	pooled, err := s.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	c := pooled.Hijack()
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c.Close(ctx)
	}()
	if _, err := c.Exec(ctx, `LISTEN `+s.hints.channel); err != nil {
		return err
	}
	if err := s.notify(); err != nil {
		return err
	}
	for heard := false; ; {
		limit := s.lease / 3
		if !heard {
			limit = 2 * time.Second
		}
		n, err := s.next(c, limit)
		switch {
		case err != nil:
			return err
		case n != nil:
			if n.Payload != s.Owner() { // own writes have called tell already
				s.hints.others.Store(true)
				s.hints.tell()
			}
			if !heard { // something may have been missed before
				heard = true
				s.hints.hears.Store(true)
				s.hints.tell()
			}
		case !heard:
			return errDeaf
		default:
			ctx, cancel := s.limited()
			err := c.Ping(ctx)
			cancel()
			if err != nil {
				return err
			}
		}
	}
}

// next returns the next notification, or nil if none arrives within the limit.
func (s *Store) next(c *pgx.Conn, limit time.Duration) (*pgconn.Notification, error) {
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	n, err := c.WaitForNotification(ctx)
	if err != nil && ctx.Err() != nil && s.ctx.Err() == nil && !c.IsClosed() {
		return nil, nil
	}
	return n, err
}

// nameChannel names the channel after the table.
func (s *Store) nameChannel(ctx context.Context) error {
	var oid uint32
	err := s.pool.QueryRow(ctx, `SELECT to_regclass($1::text)::oid`, s.sql.Replace(`{}tasks`)).Scan(&oid)
	s.hints.channel = fmt.Sprintf("taskpg_%d", oid)
	return err
}

// RequestCancel implements [task.Canceller].
func (s *Store) RequestCancel(id, cause string) error {
	found := false
	queue := func(b *pgx.Batch, _ string, _ bool) {
		found = false
		b.Queue(s.sql.Replace(`UPDATE {}tasks SET cancel_requested_at = coalesce(cancel_requested_at, $2::text::timestamptz),
			cancel_cause = CASE WHEN cancel_requested_at IS NULL THEN $3::text ELSE cancel_cause END
			WHERE id = $1::text AND `+stillUnfinished), escape(id), timeCell(time.Now()), text(cause)).
			Exec(func(tag pgconn.CommandTag) error {
				found = tag.RowsAffected() > 0
				return nil
			})
	}
	err := s.transact(time.Now().Add(callLimit), transaction{queue: queue})
	if errors.Is(err, errFenced) { // retry as a new owner: the operation may be another store's
		err = s.transact(time.Now().Add(callLimit), transaction{queue: queue})
	}
	if err != nil {
		return err
	}
	if !found {
		return task.ErrNotFound
	}
	s.hints.written()
	return nil
}

// CancelRequests implements [task.Canceller].
func (s *Store) CancelRequests() (map[string]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	rows, err := s.pool.Query(ctx, s.sql.Replace(`SELECT id, coalesce(cancel_cause, '') FROM {}tasks
		WHERE cancel_requested_at IS NOT NULL AND `+unfinished+` AND owner = $1::text`), s.Owner())
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	requests := make(map[string]string)
	for rows.Next() {
		var id, cause string
		if err := rows.Scan(&id, &cause); err != nil {
			return nil, err
		}
		requests[unescape(id)] = unescape(cause)
	}
	return requests, rows.Err()
}
