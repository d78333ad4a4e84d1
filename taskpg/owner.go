package taskpg

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/mynt-nas/task"
)

// observe beats while nothing else is written, and watches the other owners, until
// the store is closed.
func (s *Store) observe() {
	o := &observer{lease: s.lease}
	tick := s.lease / 6
	for wait := time.Duration(0); ; {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(wait):
		}
		if s.idle() > s.lease/3-tick {
			began := s.clock()
			if s.transact(time.Now().Add(s.lease/3), transaction{}) == nil {
				o.commit(began)
			}
		} else {
			now := s.clock()
			now.mono -= s.idle()
			now.wall -= s.idle()
			o.commit(now)
		}
		wait = time.Duration((0.8 + 0.2*rand.Float64()) * float64(tick))
		began := s.clock()
		owners, err := s.owners()
		if err != nil {
			continue
		}
		dead, next := o.observe(began, s.clock(), owners)
		for _, owner := range dead {
			s.declareGone(owner)
		}
		wait = min(wait, next)
	}
}

// idle returns for how long the store has written nothing.
func (s *Store) idle() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.wrote)
}

// owners reads the rows of the owners that are not this store's.
func (s *Store) owners() ([]sighting, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.lease/3)
	defer cancel()
	rows, err := s.pool.Query(ctx, s.sql.Replace(`SELECT id, beat, lease_ms, gone FROM {}task_owners WHERE id <> $1::text`), s.Owner())
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (o sighting, err error) {
		var ms int64
		err = row.Scan(&o.id, &o.beat, &ms, &o.gone)
		o.lease = time.Duration(ms) * time.Millisecond
		return o, err
	})
}

// declareGone declares an owner gone unless its beat has changed. What it has left
// is then recovered by whoever calls Recover.
func (s *Store) declareGone(owner sighting) error {
	return s.transact(time.Now().Add(s.lease/3), transaction{victim: owner.id, queue: func(b *pgx.Batch, _ string, _ bool) {
		b.Queue(s.sql.Replace(`UPDATE {}task_owners SET gone = true WHERE id = $1::text AND beat = $2::bigint`), owner.id, owner.beat).
			Exec(func(tag pgconn.CommandTag) error {
				return nil
			})
	}})
}

// recoverChunk is how many operations one transaction of Recover changes.
const recoverChunk = 1000

// Recover implements [task.Recoverer]. An operation is an orphan if its owner was
// declared gone, or has no row in task_owners.
func (s *Store) Recover(reason string) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		owners, err := s.dead()
		if err != nil {
			yield(nil, err)
			return
		}
		for _, owner := range owners {
			if !s.recoverFrom(owner, reason, yield) {
				return
			}
		}
	}
}

// dead returns the owners that are gone. It steps through the index from one owner
// of unfinished operations to the next, however many each has.
func (s *Store) dead() ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	const next = `SELECT min(owner) FROM {}tasks WHERE ` + unfinished
	rows, err := s.pool.Query(ctx, s.sql.Replace(`WITH RECURSIVE owners (id) AS (`+next+` UNION ALL
		SELECT (`+next+` AND owner > owners.id) FROM owners WHERE id IS NOT NULL)
		SELECT id FROM owners LEFT JOIN {}task_owners o USING (id) WHERE id IS NOT NULL AND coalesce(o.gone, true)
		UNION SELECT id FROM {}task_owners WHERE gone`))
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// recoverFrom recovers what a dead owner has left, and reports whether to go on.
func (s *Store) recoverFrom(owner, reason string, yield func(*task.Operation, error) bool) (goOn bool) {
	for last := int64(0); ; {
		ids, next, err := s.orphans(owner, last)
		if err != nil {
			return yield(nil, err) && false
		}
		if len(ids) == 0 {
			break
		}
		last = next
		ops, err := s.failOrphans(owner, reason, ids)
		if err != nil {
			return yield(nil, err) && false
		}
		for _, op := range ops {
			if !yield(op, nil) {
				return false
			}
		}
	}
	err := s.transact(time.Now().Add(callLimit), transaction{queue: func(b *pgx.Batch, _ string, _ bool) {
		b.Queue(s.sql.Replace(forget), owner)
	}})
	if err != nil && !errors.Is(err, errFenced) {
		return yield(nil, err) && false
	}
	return true
}

// orphans returns the IDs of the next unfinished operations of an owner.
func (s *Store) orphans(owner string, after int64) (ids []string, last int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	rows, err := s.pool.Query(ctx, s.sql.Replace(`SELECT id, seq FROM {}tasks WHERE owner = $1::text AND `+unfinished+`
		AND seq > $2::bigint ORDER BY seq LIMIT $3::bigint`), owner, after, recoverChunk)
	if err != nil {
		return nil, 0, err
	}
	ids, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (id string, err error) {
		return id, row.Scan(&id, &last)
	})
	return ids, last, err
}

// failOrphans marks operations of a dead owner as failed, those left out that
// somebody else recovers at this moment. It returns them.
func (s *Store) failOrphans(owner, reason string, ids []string) (ops []*task.Operation, err error) {
	token := uuid.NewString()
	now := time.Now()
	for range 2 { // the second time as another owner, if this one is gone, too
		err = s.transact(time.Now().Add(callLimit), transaction{queue: func(b *pgx.Batch, _ string, again bool) {
			ops = nil
			collect := func(rows pgx.Rows) error {
				found, err := pgx.CollectRows(rows, scan)
				ops = append(ops, found...)
				return err
			}
			if again {
				b.Queue(s.sql.Replace(`SELECT `+columns+` FROM {}tasks WHERE id = ANY ($1::text[]) AND attempt = $2::uuid`),
					ids, token).Query(collect)
			}
			b.Queue(s.sql.Replace(`UPDATE {}tasks SET state = 'FAILED', error = $3::text, attempt = $4::uuid,
				updated_at = greatest($5::text::timestamptz, updated_at, started_at, created_at),
				finished_at = greatest($5::text::timestamptz, updated_at, started_at, created_at)
				WHERE id IN (SELECT id FROM {}tasks WHERE owner = $1::text AND `+unfinished+` AND id = ANY ($2::text[])
					ORDER BY id FOR UPDATE SKIP LOCKED) RETURNING `+columns),
				owner, ids, text(reason), token, timeCell(now)).Query(collect)
		}})
		if !errors.Is(err, errFenced) {
			break
		}
	}
	return ops, err
}
