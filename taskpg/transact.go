package taskpg

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/puddle/v2"
)

// A transaction is what is written in one. All of it is sent at once.
type transaction struct {
	// victim is another owner whose row is locked, too, or "".
	victim string

	// queue adds statements, as an owner. It is called for each attempt. On all but
	// the first, what an earlier one has written may be there.
	queue func(b *pgx.Batch, owner string, again bool)
}

// errFenced means that the owner was declared gone.
var errFenced = errors.New("the owner of these operations was declared gone")

// errBeat means that the owner's row was not as the transaction expected.
type errBeat struct{ error }

func (e errBeat) Unwrap() error { return e.error }

// transact commits a transaction, and tries again until the deadline if that may
// help. The error is errFenced, and the store has another owner, if this one was
// declared gone.
func (s *Store) transact(deadline time.Time, t transaction) error {
	owner := s.Owner()
	for again, backoff := false, 5*time.Millisecond; ; {
		err := s.attempt(deadline, t, owner, again)
		var beat errBeat
		switch {
		case err == nil || errors.Is(err, errFenced):
			return err
		case errors.As(err, &beat): // an earlier attempt was committed after all
			again = true
			continue
		case !temporary(err):
			return err
		}
		again = again || unknown(err)
		wait := time.Duration((0.5 + rand.Float64()) * float64(backoff))
		if time.Until(deadline) < wait {
			return err
		}
		time.Sleep(wait)
		backoff = min(2*backoff, s.lease/40)
	}
}

// attempt is one attempt of transact.
func (s *Store) attempt(deadline time.Time, t transaction, owner string, again bool) error {
	deadline = earlier(deadline, time.Now().Add(s.attemptLimit()))
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-time.After(time.Until(deadline)):
		return notSent{errors.New("the store is busy with other writes")}
	}
	if s.Owner() != owner {
		return errFenced
	}
	began := time.Now()
	err := withConn(context.Background(), s.pool, deadline, func(c *pgxpool.Conn) error {
		err := s.send(c, t, owner, again)
		var beat errBeat
		if errors.As(err, &beat) {
			return s.look(c, owner, beat)
		}
		return err
	})
	if err == nil {
		s.mu.Lock()
		s.wrote = began
		s.mu.Unlock()
		if s.registered {
			s.beat++
		}
		s.registered = true
	}
	return err
}

// attemptLimit is how long an attempt may take: there is time for a second one in
// a call, and for a third one in a lease.
func (s *Store) attemptLimit() time.Duration { return min(callLimit/2, s.lease/3) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// send sends the transaction and reads the replies. If a statement has failed,
// the connection is good again when it returns.
//
// The last statement before COMMIT moves the owner's beat from what it was to the
// next one, and fails if it was something else: so whatever the network delays
// and delivers later, nothing of it is committed after a later attempt was, or
// after the owner was declared gone. It is the last one because the server ends no
// transaction of which it has received half: if this process is stopped while it
// sends, its owner's row is not locked.
func (s *Store) send(c *pgxpool.Conn, t transaction, owner string, again bool) error {
	b := new(pgx.Batch)
	b.Queue(`BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE`)
	b.Queue(settings, strconv.FormatInt(s.attemptLimit().Milliseconds(), 10))
	if t.victim != "" {
		b.Queue(s.sql.Replace(`SELECT FROM {}task_owners WHERE id = ANY ($1::text[]) ORDER BY id FOR UPDATE`),
			[]string{owner, t.victim})
	}
	if t.queue != nil {
		t.queue(b, owner, again)
	}
	s.queueBeat(b, owner)
	b.Queue(`COMMIT`).Exec(func(tag pgconn.CommandTag) error {
		if tag.String() != "COMMIT" {
			return fmt.Errorf("the server has answered COMMIT with %s", tag)
		}
		return nil
	})
	err := c.SendBatch(context.Background(), b).Close()
	if err != nil && !c.Conn().IsClosed() && c.Conn().PgConn().TxStatus() != 'I' {
		_, rollback := c.Exec(context.Background(), `ROLLBACK`)
		if rollback != nil { // the connection is closed; nothing was committed
			return err
		}
	}
	return err
}

// settings are those of a transaction: its limits, and how its statements are
// planned. They find rows by ID. A plan that reads a whole table or index instead,
// because it was made while the table was small, would be kept while that grows.
const settings = `SELECT set_config('statement_timeout', $1::text, true),
	set_config('idle_in_transaction_session_timeout', $1::text, true),
	set_config('plan_cache_mode', 'force_generic_plan', true), set_config('enable_seqscan', 'off', true),
	set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)`

// queueBeat adds the statement that renews the owner, or makes its row.
func (s *Store) queueBeat(b *pgx.Batch, owner string) {
	var q *pgx.QueuedQuery
	if s.registered {
		q = b.Queue(s.sql.Replace(`WITH beaten AS (UPDATE {}task_owners SET beat = beat + 1
			WHERE id = $1::text AND beat = $2::bigint AND NOT gone RETURNING 1)
			SELECT 1 / (SELECT count(*) FROM beaten)`), owner, s.beat)
	} else {
		s.beat = 0
		q = b.Queue(s.sql.Replace(`INSERT INTO {}task_owners (id, node, beat, lease_ms) VALUES ($1::text, $2::text, 0, $3::bigint)
			RETURNING 1`), owner, s.node, s.lease.Milliseconds())
	}
	q.QueryRow(func(row pgx.Row) error {
		err := row.Scan(new(int64))
		if code := code(err); code == "22012" || code == "23505" { // division by zero, duplicate key
			return errBeat{err}
		}
		return err
	})
}

// look finds out why the owner's row is not as expected.
func (s *Store) look(c *pgxpool.Conn, owner string, unexpected errBeat) error {
	var beat int64
	var gone bool
	err := c.QueryRow(context.Background(), s.sql.Replace(`SELECT beat, gone FROM {}task_owners WHERE id = $1::text`), owner).
		Scan(&beat, &gone)
	switch {
	case err == nil && !gone:
		s.beat, s.registered = beat, true
		return unexpected
	case err == nil || errors.Is(err, pgx.ErrNoRows):
		s.mu.Lock()
		defer s.mu.Unlock()
		s.lost[owner] = true
		s.owner, s.registered, s.fenced = s.newOwner(), false, time.Now()
		s.hints.tell()
		return errFenced
	}
	return err
}

// fencedAfter reports whether the store was declared gone after a time.
func (s *Store) fencedAfter(t time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fenced.After(t)
}

func (s *Store) newOwner() string { return s.node + "/" + uuid.NewString() }

// unknown reports whether a transaction that has failed may have been committed.
func unknown(err error) bool {
	var before notSent
	var e *pgconn.PgError
	return !errors.As(err, &before) && (!errors.As(err, &e) || e.Severity != "ERROR" && e.SeverityUnlocalized != "ERROR")
}

// temporary reports whether another attempt may succeed where one has failed.
func temporary(err error) bool {
	if errors.Is(err, puddle.ErrClosedPool) {
		return false
	}
	if unknown(err) || errors.As(err, new(notSent)) && !refused(err) {
		return true
	}
	return slices.Contains([]string{
		"40001", "40P01", // serialization failure, deadlock
		"55P03", "57014", "25P03", // a lock, a statement, a transaction has taken too long
		"57P01", "57P02", "57P03", // the server stops or starts
		"53300",          // too many connections
		"25006", "08P01", // a standby until it is promoted; a pooler without server
	}, code(err))
}

// refused reports whether the server will not take connections the next time,
// either.
func refused(err error) bool {
	switch c := code(err); {
	case c == "28000" || c == "28P01" || c == "3D000":
		return true
	}
	return false
}

// leave declares the store's own owner gone, so that nobody has to wait for its
// lease to end, and removes it if it leaves nothing. Any transaction that is still
// under way then fails.
func (s *Store) leave() error {
	owner := s.Owner()
	for deadline := time.Now().Add(callLimit); ; time.Sleep(s.lease / 40) {
		err := withConn(context.Background(), s.pool, earlier(deadline, time.Now().Add(s.attemptLimit())), func(c *pgxpool.Conn) error {
			_, err := c.Exec(context.Background(), s.sql.Replace(`UPDATE {}task_owners SET gone = true WHERE id = $1::text`), owner)
			if err == nil {
				_, err = c.Exec(context.Background(), s.sql.Replace(forget), owner)
			}
			return err
		})
		if err == nil || !temporary(err) || time.Until(deadline) < s.lease/40 {
			return err
		}
	}
}

// forget removes an owner that is gone and has nothing unfinished.
const forget = `DELETE FROM {}task_owners WHERE id = $1::text AND gone
	AND NOT EXISTS (SELECT FROM {}tasks WHERE owner = $1::text AND state IN ('PENDING', 'RUNNING'))`
