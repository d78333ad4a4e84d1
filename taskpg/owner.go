package taskpg

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/mynt-nas/task"
)

// renew updates the owner's row in each third of a lease without another write,
// until the store is closed.
func (s *Store) renew() {
	for {
		wait := time.Duration((0.8+0.2*rand.Float64())*float64(s.lease/3)) - s.idle()
		if wait <= 0 {
			s.transact(time.Now().Add(s.lease/3), transaction{}) // retries until then
			wait = s.lease / 100
		}
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// observe watches the other owners until the store is closed. It reads their rows in
// each sixth of a lease, and when an owner's lease expires.
func (s *Store) observe() {
	o := &observer{lease: s.lease}
	for wait := time.Duration(0); ; {
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = time.Duration((0.8 + 0.2*rand.Float64()) * float64(s.lease/6))
		began, idle := s.clock(), s.idle()
		owners, err := s.owners()
		if err != nil {
			continue
		}
		o.commit(instant{began.mono - idle, began.wall - idle})
		s.hints.others.Store(slices.ContainsFunc(owners, func(o sighting) bool { return !o.gone }))
		dead, next := o.observe(began, s.clock(), owners)
		orphaned := slices.ContainsFunc(owners, s.leaves)
		for _, owner := range dead {
			if s.declareGone(owner) == nil {
				s.hints.written()
				orphaned = true
			}
		}
		if orphaned {
			select {
			case s.deaths <- struct{}{}:
			default:
			}
		}
		wait = min(wait, next)
	}
}

// leaves reports whether an owner may have left operations to recover. It excludes
// an owner that this store lost less than a lease ago: the functions may still run
// here, so other stores recover the operations.
func (s *Store) leaves(o sighting) bool {
	return o.gone && !(s.hasLost(o.id) && s.fencedAfter(time.Now().Add(-s.lease)))
}

// Deaths returns a channel that holds a token when a dead process has left operations
// to recover: see [task.Recoverer].
func (s *Store) Deaths() <-chan struct{} { return s.deaths }

// idle returns the time since the last committed transaction began.
func (s *Store) idle() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.wrote)
}

// owners reads the rows of all owners except this store's.
func (s *Store) owners() ([]sighting, error) {
	ctx, cancel := s.limited()
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

// declareGone declares an owner gone unless its beat has changed. The managers on the
// open stores then recover its operations: see Deaths.
func (s *Store) declareGone(owner sighting) error {
	return s.transact(time.Now().Add(s.lease/3), transaction{victim: owner.id, queue: func(b *pgx.Batch, _ string, _ bool) {
		b.Queue(s.sql.Replace(`UPDATE {}task_owners SET gone = true WHERE id = $1::text AND beat = $2::bigint`), owner.id, owner.beat)
	}})
}

// recoverChunk limits the operations that one transaction of Recover changes.
const recoverChunk = 1000

// Recover implements [task.Recoverer]. An operation is an orphan if its owner was
// declared gone, or has no row in task_owners.
func (s *Store) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		owners, err := s.dead()
		if err != nil {
			yield(nil, err)
			return
		}
		for _, owner := range owners {
			if !s.recoverFrom(owner, reason, resume, yield) {
				return
			}
		}
	}
}

// dead returns the owners that are gone. It steps through the index from one owner
// of unfinished operations to the next, so its cost doesn't depend on how many
// operations each has.
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

// recoverFrom recovers the operations of a dead owner, and reports whether to
// continue. It retries rows that another store is recovering, or that a half-sent
// transaction of the dead owner locks, until a lease passes without progress.
func (s *Store) recoverFrom(owner, reason string, resume func(*task.Operation) bool, yield func(*task.Operation, error) bool) bool {
	asked := make(map[string]bool) // the answer of resume, by operation ID
	last := int64(0)
	for patience := time.Now().Add(s.lease); ; {
		orphans, next, err := s.orphans(owner, last)
		if err == nil && len(orphans) == 0 && last == 0 {
			break
		}
		if err == nil && len(orphans) == 0 {
			last = 0 // start over, for the rows that were skipped
			err = s.unlock(owner)
			if time.Now().After(patience) {
				break
			}
			time.Sleep(s.lease / 100)
		}
		var ops []*task.Operation
		if err == nil && len(orphans) > 0 {
			last = next
			ops, err = s.recoverThese(owner, reason, orphans, ask(orphans, asked, resume))
		}
		for _, op := range ops {
			patience = time.Now().Add(s.lease)
			s.hints.written()
			if !yield(op, nil) {
				return false
			}
		}
		if err != nil {
			yield(nil, err)
			return false
		}
	}
	err := s.transact(time.Now().Add(callLimit), transaction{queue: func(b *pgx.Batch, _ string, _ bool) {
		b.Queue(s.sql.Replace(forget), owner)
	}})
	if err != nil && !errors.Is(err, errFenced) {
		yield(nil, err)
		return false
	}
	return true
}

// ask calls resume once with a copy of each orphan, and returns the stored IDs of the
// operations to resume.
func ask(orphans []*task.Operation, asked map[string]bool, resume func(*task.Operation) bool) (ids []string) {
	for _, op := range orphans {
		if resume == nil || op.Cancelling {
			continue
		}
		if _, again := asked[op.ID]; !again {
			c := *op
			asked[op.ID] = resume(&c)
		}
		if asked[op.ID] {
			ids = append(ids, escape(op.ID))
		}
	}
	return ids
}

// orphans returns the next unfinished operations of an owner, and the seq of the last
// one.
func (s *Store) orphans(owner string, after int64) (ops []*task.Operation, last int64, err error) {
	const from = ` FROM {}tasks WHERE owner = $1::text AND ` + unfinished + ` AND seq > $2::bigint ORDER BY seq LIMIT $3::bigint`
	ops, err = s.query(context.Background(), `SELECT `+columns+from, owner, after, recoverChunk)
	if err != nil || len(ops) == 0 {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	err = s.pool.QueryRow(ctx, s.sql.Replace(`SELECT seq FROM {}tasks WHERE id = $1::text`), escape(ops[len(ops)-1].ID)).Scan(&last)
	if errors.Is(err, pgx.ErrNoRows) { // recovered and pruned meanwhile, like the others perhaps
		return s.orphans(owner, after)
	}
	return ops, last, err
}

// unlock terminates half-sent transactions that have locked operations of a dead
// owner for a lease: the sending process may be stopped for hours. It ends only
// transactions of its own user, which needs no privilege.
func (s *Store) unlock(owner string) error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	_, err := s.pool.Exec(ctx, s.sql.Replace(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity a WHERE usename = current_user
		AND wait_event = 'ClientRead' AND xact_start < clock_timestamp() - $2::bigint * interval '1 millisecond'
		AND pid IN (SELECT l.pid FROM {}tasks t JOIN pg_locks l ON l.transactionid = t.xmax AND l.granted
			WHERE t.owner = $1::text AND t.state IN ('PENDING', 'RUNNING'))`), owner, s.lease.Milliseconds())
	return err
}

// recoverThese marks operations of a dead owner as failed, or takes them over if they
// are to be resumed. It returns the operations that it changed: those that another
// store is recovering are missing.
func (s *Store) recoverThese(owner, reason string, orphans []*task.Operation, resumed []string) (ops []*task.Operation, err error) {
	ids := make([]string, len(orphans))
	for i, op := range orphans {
		ids[i] = escape(op.ID)
	}
	if resumed == nil {
		resumed = []string{}
	}
	token, now := uuid.NewString(), timeCell(time.Now())
	queue := func(b *pgx.Batch, self string, again bool) {
		ops = nil
		collect := func(rows pgx.Rows) error {
			found, err := pgx.CollectRows(rows, scan)
			ops = append(ops, found...)
			return err
		}
		if again {
			b.Queue(s.sql.Replace(`SELECT `+columns+` FROM {}tasks WHERE id = ANY ($1::text[]) AND attempt = $2::uuid`), ids, token).Query(collect)
		}
		if len(resumed) > 0 {
			b.Queue(s.sql.Replace(takeOver), owner, resumed, token, now, self).Query(collect)
		}
		b.Queue(s.sql.Replace(fail), owner, ids, token, now, text(reason), resumed).Query(collect)
	}
	for range 2 { // if this owner is gone, too, retry as a new one
		if err = s.transact(time.Now().Add(callLimit), transaction{queue: queue}); !errors.Is(err, errFenced) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	place := make(map[string]int, len(orphans))
	for i, op := range orphans {
		place[op.ID] = i
	}
	slices.SortFunc(ops, func(a, b *task.Operation) int { return place[a.ID] - place[b.ID] })
	return ops, nil
}

// The recovery statements. An operation to resume fails if its cancellation has been
// requested meanwhile. The owner is compared as an expression: otherwise the server
// might read all operations of the owner through an index, for each chunk.
const (
	ofDead = `WHERE id IN (SELECT id FROM {}tasks WHERE owner || '' = $1::text AND ` + stillUnfinished + ` AND id = ANY ($2::text[])
		ORDER BY id FOR UPDATE SKIP LOCKED)`
	recoveredAt = `greatest($4::text::timestamptz, updated_at, started_at, created_at)`

	takeOver = `UPDATE {}tasks SET state = 'PENDING', owner = $5::text, progress = 0, message = NULL, started_at = NULL,
		attempt = $3::uuid, updated_at = ` + recoveredAt + ` ` + ofDead + ` AND cancel_requested_at IS NULL RETURNING ` + columns

	fail = `UPDATE {}tasks SET state = 'FAILED', error = $5::text, attempt = $3::uuid,
		updated_at = ` + recoveredAt + `, finished_at = ` + recoveredAt + ` ` + ofDead + `
		AND (id <> ALL ($6::text[]) OR cancel_requested_at IS NOT NULL) RETURNING ` + columns
)
