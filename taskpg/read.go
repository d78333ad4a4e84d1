package taskpg

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/mynt-nas/task"
)

// columns are the columns that scan reads.
const columns = `id, name, state, coalesce(progress, 0), metadata, 0, result, 0, coalesce(error, ''), coalesce(message, ''),
	created_at, updated_at, started_at, owner, cancel_requested_at IS NOT NULL`

// columnsFor returns columns, adapted to the filter: metadata and results that are
// longer than it allows are replaced by their length in bytes, and results are left
// out if it says so.
func columnsFor(f task.Filter) string {
	wanted := columns
	for _, name := range []string{"metadata", "result"} {
		length := `coalesce(octet_length(` + name + `), 0)`
		switch {
		case name == "result" && f.WithoutResults:
			wanted = strings.Replace(wanted, name+`, 0`, `NULL, 0`, 1)
		case name == "metadata" && len(f.Metadata) > 0: // inMetadata needs it
		case f.MaxValue > 0:
			wanted = strings.Replace(wanted, name+`, 0`,
				fmt.Sprintf(`CASE WHEN %s <= %d THEN %s END, %s`, length, f.MaxValue, name, length), 1)
		}
	}
	return wanted
}

// scan reads an operation from a row. It reads invalid JSON as nil, so that it
// doesn't hide the rest of the history.
func scan(row pgx.CollectableRow) (*task.Operation, error) {
	op := new(task.Operation)
	var state string
	var metadata, result *string
	var metadataLen, resultLen int
	var created, updated, started pgtype.Timestamptz
	err := row.Scan(&op.ID, &op.Name, &state, &op.Progress, &metadata, &metadataLen, &result, &resultLen, &op.Error, &op.Message,
		&created, &updated, &started, &op.Owner, &op.Cancelling)
	if err != nil {
		return nil, err
	}
	op.ID, op.Name, op.State = unescape(op.ID), unescape(op.Name), task.State(unescape(state))
	op.Error, op.Message = unescape(op.Error), unescape(op.Message)
	op.Metadata, op.Result = value(metadata, metadataLen), value(result, resultLen)
	op.CreatedAt, op.UpdatedAt, op.StartedAt = timeOf(created), timeOf(updated), timeOf(started)
	op.Cancelling = op.Cancelling && !op.State.Finished()
	return op, nil
}

func value(cell *string, length int) any {
	if cell == nil && length > 0 {
		return task.Omitted(length)
	}
	if cell == nil || *cell == "null" {
		return nil
	}
	raw := json.RawMessage(unescape(*cell))
	if !json.Valid(raw) {
		return nil
	}
	return raw
}

func timeOf(t pgtype.Timestamptz) time.Time {
	if !t.Valid || t.InfinityModifier != pgtype.Finite || t.Time.UTC().Year() < 0 || t.Time.UTC().Year() > 9999 {
		return time.Time{}
	}
	return t.Time.UTC()
}

// query returns the operations that a query selects. It retries if a connection of
// the pool turns out to be broken.
func (s *Store) query(ctx context.Context, query string, args ...any) (ops []*task.Operation, err error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	for range 3 {
		var rows pgx.Rows
		if rows, err = s.pool.Query(ctx, s.sql.Replace(query), args...); err == nil {
			ops, err = pgx.CollectRows(rows, scan)
		}
		var e *pgconn.PgError
		if err == nil || ctx.Err() != nil || errors.As(err, &e) && e.Code != "57P01" && e.Code != "57P02" {
			break
		}
	}
	return ops, err
}

// Get implements [task.Persistence].
func (s *Store) Get(id string) (*task.Operation, error) {
	if !utf8.ValidString(id) { // no stored ID is invalid UTF-8
		return nil, task.ErrNotFound
	}
	ops, err := s.query(context.Background(), `SELECT `+columns+` FROM {}tasks WHERE id = $1::text`, escape(id))
	if err != nil {
		return nil, err
	}
	if len(ops) == 0 {
		return nil, task.ErrNotFound
	}
	return ops[0], nil
}

// List implements [task.Persistence].
func (s *Store) List(limit, offset int) ([]*task.Operation, error) {
	return s.query(context.Background(), `SELECT `+columns+` FROM {}tasks ORDER BY seq DESC LIMIT $1::bigint OFFSET $2::bigint`, limit, offset)
}

// ListFiltered implements [task.FilteredLister]. Metadata is not stored as jsonb, which
// can't contain U+0000. So the query selects operations whose metadata may match, and
// inMetadata drops the few that don't.
func (s *Store) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	ctx := cmp.Or(f.Context, context.Background())
	last := limit + min(offset, math.MaxInt-limit)
	c, err := s.condition(ctx, f)
	if err != nil {
		return nil, err
	}
	order := ` ORDER BY seq DESC`
	if f.ByFinish {
		order = ` ORDER BY finished_at DESC, seq DESC`
	}
	query := `SELECT ` + columnsFor(f) + ` FROM {}tasks WHERE ` + c.inStates(f, last) + order + ` LIMIT ` + c.arg(limit) +
		`::bigint OFFSET ` + c.arg(offset) + `::bigint`
	if len(f.Metadata) == 0 {
		return s.query(ctx, query, c.args...)
	}
	for n := last + min(100, math.MaxInt-last); ; n *= 8 {
		c.args[len(c.args)-2], c.args[len(c.args)-1] = n, 0
		ops, err := s.query(ctx, query, c.args...)
		if err != nil {
			return nil, err
		}
		read := len(ops)
		ops = slices.DeleteFunc(ops, func(op *task.Operation) bool { return !inMetadata(f, op) })
		if len(ops) >= last || read < n || n > math.MaxInt/8 {
			return ops[min(offset, len(ops)):min(last, len(ops))], nil
		}
	}
}

// inMetadata reports whether an operation has the filter's metadata, or counts as
// having it. It replaces metadata that is longer than the filter allows by its length.
func inMetadata(f task.Filter, op *task.Operation) bool {
	raw, _ := op.Metadata.(json.RawMessage)
	if f.MaxValue > 0 && len(raw) > f.MaxValue {
		op.Metadata = task.Omitted(len(raw))
	}
	if _, included := slices.BinarySearch(f.Include, op.ID); included && !op.State.Finished() {
		return true
	}
	var members map[string]any
	if json.Unmarshal(raw, &members) != nil {
		return false
	}
	for key, value := range f.Metadata {
		if members[key] != any(value) {
			return false
		}
	}
	return true
}

// condition returns the filter's condition without its states and metadata.
func (s *Store) condition(ctx context.Context, f task.Filter) (*condition, error) {
	c := new(condition)
	if f.Before != "" && f.ByFinish {
		before, err := s.Get(f.Before)
		if err != nil || !before.State.Finished() {
			return nil, wrap(f.Before+", finished", cmp.Or(err, task.ErrNotFound))
		}
		c.add(`(finished_at, seq) < (SELECT finished_at, seq FROM {}tasks WHERE id = ?::text)`, escape(f.Before))
	} else if f.Before != "" {
		place, err := s.place(ctx, f.Before)
		if err != nil {
			return nil, err
		}
		c.add(`seq < ?::bigint`, place)
	}
	if f.Name != "" {
		c.add(`name = ?::text`, escape(f.Name))
	}
	if f.Containing != "" { // with this collation, lower changes ASCII only
		c.add(`strpos(lower(name COLLATE "C"), lower(?::text COLLATE "C")) > 0`, escape(f.Containing))
	}
	if f.ByFinish {
		c.terms = append(c.terms, `finished_at IS NOT NULL`)
	}
	if !f.FinishedAfter.IsZero() || !f.FinishedBefore.IsZero() {
		c.terms = append(c.terms, `finished_at > '-infinity'`)
	}
	if !f.FinishedAfter.IsZero() {
		c.add(`finished_at >= ?::text::timestamptz`, bound(f.FinishedAfter))
	}
	if !f.FinishedBefore.IsZero() {
		c.add(`finished_at < ?::text::timestamptz`, bound(f.FinishedBefore))
	}
	return c, nil
}

// bound returns a time, rounded up to microseconds, for a comparison with stored
// times, which are in microseconds.
func bound(t time.Time) string {
	if rounded := t.Truncate(time.Microsecond); rounded.Before(t) {
		t = rounded.Add(time.Microsecond)
	}
	switch cell := timeCell(t); {
	case cell != nil:
		return *cell
	case t.UTC().Year() > 9999:
		return "infinity"
	}
	return "-infinity"
}

// A condition is a condition on rows: terms joined by AND, with their arguments.
type condition struct {
	terms []string
	args  []any
}

// arg adds an argument and returns its placeholder.
func (c *condition) arg(v any) string {
	c.args = append(c.args, v)
	return fmt.Sprintf("$%d", len(c.args))
}

// add adds a term in which the question mark stands for an argument.
func (c *condition) add(term string, v any) {
	c.terms = append(c.terms, strings.Replace(term, "?", c.arg(v), 1))
}

func (c *condition) and(term string) string {
	return strings.Join(append(slices.Clone(c.terms), term), ` AND `)
}

const unfinished = `state IN ('PENDING', 'RUNNING')`

// inStates returns c with the condition that an operation is in one of the filter's
// states and has its metadata, or counts as if. Only the last rows matter, so the
// states with an index of their own are each searched through that index.
func (c *condition) inStates(f task.Filter, last int) string {
	metadata := c.metadata(f)
	if len(f.States)+len(f.Metadata) == 0 {
		return c.and(`TRUE`)
	}
	if f.ByFinish { // only finished operations remain
		if len(f.States) > 0 {
			c.add(`state = ANY (?::text[])`, texts(f.States))
		}
		return c.and(metadata)
	}
	now := func(condition string) string { // for operations stored as unfinished
		return fmt.Sprintf(`(id = ANY (%s::text[]) OR id <> ALL (%s::text[]) AND %s AND %s)`,
			c.arg(escapeAll(f.Include)), c.arg(escapeAll(without(f.Exclude, f.Include))), condition, metadata)
	}
	if len(f.States) == 0 {
		return c.and(fmt.Sprintf(`CASE WHEN %s THEN %s ELSE %s END`, unfinished, now(`TRUE`), metadata))
	}
	live, failed, other := byIndex(f.States)
	var all []string
	if len(live)+len(f.Include) > 0 {
		all = append(all, c.and(unfinished+` AND `+now(`state = ANY (`+c.arg(texts(live))+`::text[])`)))
	}
	if len(failed) > 0 {
		all = append(all, c.and(`state IN ('FAILED', 'CANCELLED') AND state = ANY (`+c.arg(texts(failed))+`::text[]) AND `+metadata))
	}
	if len(other) > 0 {
		all = append(all, c.and(`state = ANY (`+c.arg(texts(other))+`::text[]) AND `+metadata))
	}
	if len(all) == 1 {
		return all[0]
	}
	if len(f.Metadata) > 0 { // more than the last rows may have to be read
		return `(` + strings.Join(all, ` OR `) + `)`
	}
	limit := c.arg(last) + `::bigint`
	for i, where := range all {
		all[i] = `(SELECT seq FROM {}tasks WHERE ` + where + ` ORDER BY seq DESC LIMIT ` + limit + `)`
	}
	return `seq IN (` + strings.Join(all, ` UNION ALL `) + `)`
}

// byIndex groups states by the index that contains their operations.
func byIndex(states []task.State) (live, failed, other []task.State) {
	for _, state := range states {
		switch state {
		case task.StatePending, task.StateRunning:
			live = append(live, state)
		case task.StateFailed, task.StateCancelled:
			failed = append(failed, state)
		default:
			other = append(other, state)
		}
	}
	return live, failed, other
}

// metadata returns a condition that holds for all operations with the filter's
// metadata: their JSON contains its keys and values, or an escape sequence.
func (c *condition) metadata(f task.Filter) string {
	terms := []string{`TRUE`}
	for key, value := range f.Metadata {
		terms = append(terms, fmt.Sprintf(`(strpos(metadata, '\') > 0 OR strpos(metadata, %s::text) > 0 AND strpos(metadata, %s::text) > 0)`,
			c.arg(escape(key)), c.arg(escape(value))))
	}
	return strings.Join(terms, ` AND `)
}

func texts(states []task.State) []string {
	all := make([]string, len(states))
	for i, state := range states {
		all[i] = escape(string(state))
	}
	return all
}

// without returns the IDs that are not among others, which must be sorted.
func without(ids, others []string) []string {
	return slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
		_, found := slices.BinarySearch(others, id)
		return found
	})
}

func escapeAll(ids []string) []string {
	all := make([]string, len(ids))
	for i, id := range ids {
		all[i] = escape(id)
	}
	return all
}

// timed matches a UUIDv7. Later ones are greater.
const timed = `^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`

var timedID = regexp.MustCompile(timed)

// place returns the seq below which all rows were saved before an operation. If a
// timed ID is not stored, place assumes that its operation was saved after the nearest
// neighbours with smaller IDs, and after all rows that precede the next neighbour with
// a greater ID.
func (s *Store) place(ctx context.Context, id string) (seq int64, err error) {
	query := `SELECT seq FROM {}tasks WHERE id = $1::text`
	if timedID.MatchString(id) {
		query = `SELECT coalesce((` + query + `), greatest(
			(SELECT max(seq) + 1 FROM (SELECT seq, id FROM {}tasks WHERE id < $1::text ORDER BY id DESC LIMIT 100) AS smaller WHERE id ~ '` + timed + `'),
			coalesce((SELECT seq FROM (SELECT seq, id FROM {}tasks WHERE id > $1::text ORDER BY id LIMIT 100) AS greater WHERE id ~ '` + timed + `'
				ORDER BY id LIMIT 1), 9223372036854775807)))`
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	err = s.pool.QueryRow(ctx, s.sql.Replace(query), escape(id)).Scan(&seq)
	if errors.Is(err, pgx.ErrNoRows) {
		err = wrap(id, task.ErrNotFound)
	}
	return seq, err
}
