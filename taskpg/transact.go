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

// A transaction describes the statements of one transaction, which are sent as one
// batch.
type transaction struct {
	// victim is another owner whose row is locked, too, or "".
	victim string

	// queue adds the statements, with owner as the writing store's Owner. It is called
	// for each attempt. If again is true, an earlier attempt may have been committed.
	queue func(b *pgx.Batch, owner string, again bool)
}

// errFenced means that the owner was declared gone.
var errFenced = errors.New("the owner of these operations was declared gone")

// errBeat means that the owner's row was not in the state that the transaction
// expected.
type errBeat struct{ error }

func (e errBeat) Unwrap() error { return e.error }

// transact commits a transaction, and retries until the deadline if that may help. If
// the owner was declared gone, it returns errFenced, and the store has a new owner.
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

// attempt makes one attempt of transact.
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

// attemptLimit limits the duration of an attempt, so that a call has time for two
// attempts, and a lease for three.
func (s *Store) attemptLimit() time.Duration { return min(callLimit/2, s.lease/3) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// send sends the transaction and reads the replies. If a statement has failed, send
// leaves the connection usable, or closed.
//
// The last statement before COMMIT increments the owner's beat, and fails if the beat
// is not the expected one. So a transaction that the network delivers late can't be
// committed after a later attempt was, or after the owner was declared gone. It is
// the last statement because the server does not end a half-received transaction: if
// this process is stopped while it sends, the transaction doesn't lock the owner's row.
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
		if rollback != nil { // the connection is closed: nothing was committed
			return err
		}
	}
	return err
}

// settings sets the time limits of a transaction and the planning of its statements.
// They must find rows by ID: a plan made while the table was small might read a whole
// table or index, and the server would keep it while the table grows.
const settings = `SELECT set_config('statement_timeout', $1::text, true),
	set_config('idle_in_transaction_session_timeout', $1::text, true),
	set_config('plan_cache_mode', 'force_generic_plan', true), set_config('enable_seqscan', 'off', true),
	set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)`

// queueBeat adds the statement that increments the owner's beat, or inserts its row.
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

// look determines why the owner's row is not as expected.
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

// fencedAfter reports whether the store learned after t that it was declared gone.
func (s *Store) fencedAfter(t time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fenced.After(t)
}

func (s *Store) newOwner() string { return s.node + "/" + uuid.NewString() }

// unknown reports whether a transaction may have been committed despite its error.
func unknown(err error) bool {
	var before notSent
	var e *pgconn.PgError
	return !errors.As(err, &before) && (!errors.As(err, &e) || e.Severity != "ERROR" && e.SeverityUnlocalized != "ERROR")
}

// temporary reports whether another attempt may succeed after this error.
func temporary(err error) bool {
	if errors.Is(err, puddle.ErrClosedPool) {
		return false
	}
	if unknown(err) || errors.As(err, new(notSent)) && !refused(err) {
		return true
	}
	return slices.Contains([]string{
		"40001", "40P01", // serialization failure, deadlock
		"55P03", "57014", "25P03", // timeout of a lock, a statement, an idle transaction
		"57P01", "57P02", "57P03", // the server is stopping or starting
		"53300",          // too many connections
		"25006", "08P01", // a standby that may be promoted; a pooler without a server
	}, code(err))
}

// refused reports whether the server would refuse the next connection, too.
func refused(err error) bool {
	switch c := code(err); {
	case c == "28000" || c == "28P01" || c == "3D000":
		return true
	}
	return false
}

// leave declares the store's own owner gone, so that other stores need not wait for
// its lease to end, and removes its row if it has no unfinished operations. Any
// transaction still in progress then fails.
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

// forget removes the row of an owner that is gone and has no unfinished operations.
const forget = `DELETE FROM {}task_owners WHERE id = $1::text AND gone
	AND NOT EXISTS (SELECT FROM {}tasks WHERE owner = $1::text AND state IN ('PENDING', 'RUNNING'))`
