package taskpg

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/mynt-nas/task"
)

// A write is an operation to insert or to update.
type write struct {
	*task.Operation
	id               string // escaped, as stored
	metadata, result string
	update           bool
	err              error
}

// newWrite encodes the values of an operation.
func newWrite(op *task.Operation, update bool) *write {
	w := &write{Operation: op, id: escape(op.ID), update: update}
	var err1, err2 error
	w.metadata, err1 = valueText(op.Metadata)
	w.result, err2 = valueText(op.Result)
	w.err = errors.Join(err1, err2)
	return w
}

// valueText returns the JSON of metadata or of a result, or "" for none.
func valueText(v any) (string, error) {
	if v == nil {
		return "", nil
	}
	raw, ok := v.(json.RawMessage)
	if !ok {
		var err error
		if raw, err = json.Marshal(v); err != nil {
			return "", err
		}
	}
	return string(raw), nil
}

// Save implements [task.Persistence].
func (s *Store) Save(op *task.Operation) error {
	return s.WriteBatch([]*task.Operation{op}, nil)[0]
}

// Update implements [task.Persistence]. If op has this store's Owner, it changes the
// row only while the row has that Owner, too. Otherwise it changes the row whatever
// its Owner is.
func (s *Store) Update(op *task.Operation) error {
	return s.WriteBatch(nil, []*task.Operation{op})[0]
}

// WriteBatch implements [task.BatchWriter]. It writes up to 1,000 operations, or
// about 32 MiB, in one transaction. If a statement fails because of the data, it
// writes each half in a transaction of its own, and so on.
func (s *Store) WriteBatch(saves, updates []*task.Operation) []error {
	all := make([]*write, 0, len(saves)+len(updates))
	for _, op := range saves {
		all = append(all, newWrite(op, false))
	}
	for _, op := range updates {
		all = append(all, newWrite(op, true))
	}
	send, resolve := unique(all)
	deadline := time.Now().Add(callLimit)
	for len(send) > 0 {
		n := chunk(send)
		s.store(deadline, send[:n])
		send = send[n:]
	}
	resolve()
	errs := make([]error, len(all))
	for i, w := range all {
		errs[i] = w.err
	}
	return errs
}

// unique returns the writes to send: at most one insert and one update per operation,
// because a statement can't write a row twice. resolve then derives the results of the
// other writes: a second insert fails with [task.ErrExists] or the error of the first,
// and an update that a later one replaces has the result of the later one. An update
// after one that finishes the operation fails at once.
func unique(all []*write) (send []*write, resolve func()) {
	first, last := make(map[string]*write), make(map[string]*write)
	follow := make(map[*write]*write)
	for _, w := range all {
		switch before := last[w.id]; {
		case w.err != nil:
		case !w.update && first[w.id] == nil:
			first[w.id] = w
		case !w.update:
			follow[w] = first[w.id]
		case before != nil && before.State.Finished():
			w.err = task.ErrNotFound
		default:
			if before != nil {
				follow[before] = w
			}
			last[w.id] = w
		}
	}
	for _, w := range all {
		if w.err == nil && follow[w] == nil {
			send = append(send, w)
		}
	}
	return send, func() {
		for i := len(all) - 1; i >= 0; i-- { // backwards: an update gets the result of a later one
			if w := all[i]; follow[w] != nil {
				if w.err = follow[w].err; !w.update && w.err == nil {
					w.err = task.ErrExists
				}
			}
		}
	}
}

// chunk returns how many of the first writes go into one transaction.
func chunk(all []*write) int {
	n, size := 0, 0
	for n < len(all) && n < 1000 && size < 32<<20 {
		size += len(all[n].metadata) + len(all[n].result)
		n++
	}
	return n
}

// store writes operations and sets their errors.
func (s *Store) store(deadline time.Time, all []*write) {
	all = slices.DeleteFunc(slices.Clone(all), func(w *write) bool {
		if s.hasLost(w.Owner) {
			w.err = task.ErrLost
		}
		return w.err != nil
	})
	if len(all) == 0 {
		return
	}
	err := s.storeOnce(deadline, all)
	switch {
	case err == nil:
		s.hints.written()
	case errors.Is(err, errFenced):
		s.store(deadline, all)
	case len(all) > 1 && ofData(err):
		half := len(all) / 2
		s.store(deadline, all[:half])
		s.store(deadline, all[half:])
	default:
		for _, w := range all {
			w.err = err
		}
	}
}

// hasLost reports whether an owner was an earlier one of this store, declared gone.
func (s *Store) hasLost(owner string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lost[owner]
}

// ofData reports whether the data of a single row may have caused an error.
func ofData(err error) bool {
	c := code(err)
	return len(c) == 5 && slices.Contains([]string{"21", "22", "23", "44", "54", "P0"}, c[:2])
}

// storeOnce writes operations in one transaction. It marks the rows with a token, by
// which a later attempt recognizes rows that an earlier one has written.
func (s *Store) storeOnce(deadline time.Time, all []*write) error {
	token := uuid.NewString()
	var done map[bool]map[string]bool // the rows written, by write.update and stored ID
	err := s.transact(deadline, transaction{queue: func(b *pgx.Batch, owner string, again bool) {
		done = map[bool]map[string]bool{false: {}, true: {}}
		var ids []string
		for _, w := range all {
			ids = append(ids, w.id)
		}
		if again {
			b.Queue(s.sql.Replace(confirm), ids, token).Query(collect(done[false], done[true]))
		}
		if saves := columnsOf(all, false, owner); len(saves.id) > 0 {
			b.Queue(s.sql.Replace(insert), append(saves.args(), token)...).Query(collect(done[false]))
		}
		if updates := columnsOf(all, true, owner); len(updates.id) > 0 {
			if len(updates.id) > 1 {
				b.Queue(s.sql.Replace(lock), updates.id)
			}
			b.Queue(s.sql.Replace(update), append(updates.args(), token)...).Query(collect(done[true]))
		}
	}})
	if err != nil {
		return err
	}
	for _, w := range all {
		switch {
		case done[w.update][w.id]:
			w.err = nil
		case w.update:
			w.err = task.ErrNotFound
		default:
			w.err = task.ErrExists
		}
	}
	return nil
}

// collect returns a function that adds the IDs of a query's result to sets.
func collect(sets ...map[string]bool) func(pgx.Rows) error {
	return func(rows pgx.Rows) error {
		for rows.Next() {
			var id string
			if err := rows.Scan(&id); err != nil {
				return err
			}
			for _, set := range sets {
				set[id] = true
			}
		}
		return rows.Err()
	}
}

// The statements write all rows at once: each parameter is a column.
const (
	unnest = `unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::text[], $6::text[], $7::text[], $8::text[],
	$9::text[]::timestamptz[], $10::text[]::timestamptz[], $11::text[]::timestamptz[], $12::text[]::timestamptz[], $13::text[]::timestamptz[], $14::text[])
	WITH ORDINALITY AS u (id, name, state, progress, metadata, result, error, message,
	created_at, updated_at, started_at, cancel_requested_at, finished_at, owner, n)`

	insert = `INSERT INTO {}tasks (id, name, state, progress, metadata, result, error, message,
	created_at, updated_at, started_at, cancel_requested_at, finished_at, owner, attempt)
	SELECT id, name, state, progress, metadata, result, error, message,
	created_at, updated_at, started_at, cancel_requested_at, finished_at, owner, $15::uuid
	FROM ` + unnest + ` ORDER BY n ON CONFLICT (id) DO NOTHING RETURNING id`

	// stillUnfinished is a condition for statements that find rows by ID. It keeps the
	// server from using the index tasks_unfinished, which may contain a million other
	// rows, or finished rows that are not vacuumed yet.
	stillUnfinished = `state || '' IN ('PENDING', 'RUNNING')`

	lock = `SELECT FROM {}tasks WHERE id = ANY ($1::text[]) AND ` + stillUnfinished + ` ORDER BY id FOR UPDATE`

	update = `UPDATE {}tasks t SET state = u.state, progress = u.progress, metadata = u.metadata, result = u.result,
	error = u.error, message = u.message, updated_at = u.updated_at, started_at = u.started_at,
	cancel_requested_at = coalesce(t.cancel_requested_at, u.cancel_requested_at), finished_at = u.finished_at, attempt = $15::uuid
	FROM ` + unnest + ` WHERE t.id = u.id AND t.` + stillUnfinished + ` AND t.owner = coalesce(u.owner, t.owner)
	RETURNING t.id`

	confirm = `SELECT id FROM {}tasks WHERE id = ANY ($1::text[]) AND attempt = $2::uuid`
)

// cells are the values of several rows, by column.
type cells struct {
	id, name, state                             []string
	progress                                    []int32
	metadata, result, error, message            []*string
	created, updated, started, cancel, finished []*string
	owner                                       []*string
}

func (c *cells) args() []any {
	return []any{c.id, c.name, c.state, c.progress, c.metadata, c.result, c.error, c.message,
		c.created, c.updated, c.started, c.cancel, c.finished, c.owner}
}

// columnsOf returns the columns of the inserts, or of the updates, that owner writes.
// An update of an operation with another Owner matches a row of any owner.
func columnsOf(all []*write, update bool, owner string) *cells {
	c := new(cells)
	for _, w := range all {
		if w.update != update {
			continue
		}
		own := &owner
		if update && w.Owner != owner {
			own = nil
		}
		finished := timeCell(w.UpdatedAt)
		if !w.State.Finished() {
			finished = nil
		} else if finished == nil {
			finished = text("-infinity")
		}
		var cancel *string
		if w.Cancelling {
			cancel = timeCell(latest(w.UpdatedAt, w.CreatedAt))
		}
		c.id, c.name, c.state = append(c.id, w.id), append(c.name, escape(w.Name)), append(c.state, escape(string(w.State)))
		c.progress = append(c.progress, int32(min(max(w.Progress, 0), 100)))
		c.metadata, c.result = append(c.metadata, text(w.metadata)), append(c.result, text(w.result))
		c.error, c.message = append(c.error, text(w.Error)), append(c.message, text(w.Message))
		c.created, c.updated = append(c.created, timeCell(w.CreatedAt)), append(c.updated, timeCell(w.UpdatedAt))
		c.started, c.cancel = append(c.started, timeCell(w.StartedAt)), append(c.cancel, cancel)
		c.finished, c.owner = append(c.finished, finished), append(c.owner, own)
	}
	return c
}

// text returns a text as it is stored: nil for "".
func text(s string) *string {
	if s == "" {
		return nil
	}
	s = escape(s)
	return &s
}

// timeCell returns a time as it is stored: nil for the zero time, and for one that
// JSON can't represent.
func timeCell(t time.Time) *string {
	if t.IsZero() || t.UTC().Year() < 1 || t.UTC().Year() > 9999 {
		return nil
	}
	s := t.UTC().Format("2006-01-02 15:04:05.999999Z")
	return &s
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// A text in PostgreSQL can't contain U+0000. It is stored as U+FFFF followed by 0.
// U+FFFF itself, which no text should contain, is stored as U+FFFF followed by 1.
const mark = "\uFFFF"

var (
	escaper   = strings.NewReplacer("\x00", mark+"0", mark, mark+"1")
	unescaper = strings.NewReplacer(mark+"0", "\x00", mark+"1", mark)
)

// escape returns a text as it is stored. It replaces invalid UTF-8 by U+FFFD.
func escape(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if strings.IndexByte(s, 0) < 0 && !strings.Contains(s, mark) {
		return s
	}
	return escaper.Replace(s)
}

func unescape(s string) string {
	if !strings.Contains(s, mark) {
		return s
	}
	return unescaper.Replace(s)
}

// wrap adds the operation's ID to an error.
func wrap(id string, err error) error { return fmt.Errorf("%s: %w", id, err) }
