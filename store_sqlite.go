package task

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mynt-nas/task/internal/owner"
	"github.com/mynt-nas/task/internal/sqlitefile"
)

// An SQLiteStore is a [Persistence] in an SQLite database, in a table called tasks.
// Several managers and several processes may share the database.
type SQLiteStore struct {
	// Immutable.
	db    *sqlitefile.DB
	owner *owner.Owner // of the operations that this store saves

	reported sync.Map // IDs of the owners that Recover has reported
}

// OpenSQLite opens the SQLite database file at path. It creates the file if it does not
// exist, but not its directory. The path ":memory:" opens a new database in memory.
//
// The database uses WAL mode and synchronous=FULL: confirmed writes survive a crash of
// the program or the system, and a power failure. New files get the mode 0600.
// OpenSQLite uses an existing table tasks if it has the columns listed in
// docs/schema.md, even if other code has created it. It refuses any other table or view
// of that name, and leaves it unchanged.
//
// While the store is open, a locked file PATH-owner-UUID beside the database tells other
// processes that this one is alive. The database must not be on a network filesystem, and
// must not be moved while it is open. OpenSQLite refuses a file that has several hard
// links or is itself a mount point, because commits under one name would be lost under
// another.
//
// If the file is locked, OpenSQLite waits for up to 10 seconds. It returns other errors
// at once. It may be called again after an error.
//
// OpenSQLite uses github.com/mattn/go-sqlite3, which needs cgo. In a program built
// without cgo, or with the build tag task_nosqlite3, it returns an error;
// [NewSQLiteStore] works with any driver. The tag leaves out go-sqlite3, for programs with
// another driver called "sqlite3".
func OpenSQLite(path string) (*SQLiteStore, error) {
	var s *SQLiteStore
	file, err := sqlitefile.Resolve(path)
	if err == nil {
		s, err = newStore(file, func(modeOf string) (*sqlitefile.DB, error) { return sqlitefile.Open(file, modeOf) })
	}
	return s, wrap(err, "open database %q", path)
}

// NewSQLiteStore returns a store inside an application's own SQLite database, which may
// have other tables and may be opened with any driver that has SQLite 3.38 or later. It
// creates a table tasks, or adds the missing columns and indexes to an existing one, and
// touches nothing else. The application's connection settings decide what a power failure
// may lose: with go-sqlite3's default in WAL mode, synchronous=NORMAL, the last commits.
// NewSQLiteStore keeps the same locked file beside the database as [OpenSQLite], and
// refuses the same files.
//
// One connection is enough, as long as the application doesn't hold it in a transaction
// of its own while calling the manager. A database in memory, or one opened with
// cache=shared, must have exactly one: call SetMaxOpenConns(1).
func NewSQLiteStore(db *sql.DB) (*SQLiteStore, error) {
	var s *SQLiteStore
	file, err := sqlitefile.Use(db)
	if err == nil {
		s, err = newStore(file.Path(), func(string) (*sqlitefile.DB, error) { return file, nil })
	}
	return s, wrap(err, "use database")
}

// AttachSQLite opens the database of another program, which may be running, for a tool
// beside it. The store changes only what its caller asks for: it creates neither the
// database nor an owner file (SQLite may create PATH-wal and PATH-shm while it is open), does
// not change the table's columns or the database's settings, recovers nothing, and has
// no owner file. A manager on it can do everything but Submit. Submit and Save return
// an error that wraps [errors.ErrUnsupported]. AttachSQLite returns an error if the
// table lacks columns or indexes of this version.
func AttachSQLite(path string) (*SQLiteStore, error) {
	s, err := attach(path)
	return s, wrap(err, "attach to database %q", path)
}

func attach(path string) (*SQLiteStore, error) {
	file, err := sqlitefile.Resolve(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(cmp.Or(file, path)); err != nil { // ":memory:" is an error, too
		return nil, fmt.Errorf("%w: name the file of an existing database", err)
	}
	db, err := sqlitefile.OpenExisting(file)
	if err != nil {
		return nil, err
	}
	s := &SQLiteStore{db: db, owner: owner.Observer(file)}
	if err := db.Check(schema); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close closes the store, and the database if this package opened it. Close the manager
// first: operations that it has not finished are left for the next one to recover.
func (s *SQLiteStore) Close() error {
	if s == nil { // returned by a failed open
		return nil
	}
	return errors.Join(s.db.Close(), s.owner.Release())
}

// Owner returns the Owner of operations that the store saves: a UUID, or "" after
// [AttachSQLite].
func (s *SQLiteStore) Owner() string { return s.owner.ID }

// newStore returns a store in the database at path, which the function open opens. A
// new database file gets the mode and owner of the file modeOf.
func newStore(path string, open func(modeOf string) (*sqlitefile.DB, error)) (*SQLiteStore, error) {
	own, err := owner.New(path)
	if err != nil {
		return nil, fmt.Errorf("%w: the directory must be writable", err)
	}
	db, err := open(own.Path())
	if err != nil {
		return nil, errors.Join(err, own.Release())
	}
	s := &SQLiteStore{db: db, owner: own}
	if err := db.Migrate(schema); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// The table of testdata/SPEC.md, with this package's columns at the end. A query uses an index
// only if it repeats the index's expression and condition. The first index is for
// ByState; it stays small, because most operations end DONE. The second is for
// recovery; it contains only unfinished rows, sorted by owner, so that recovery skips
// those of live owners. The third is for Prune and ByFinish, the last for
// CancelRequests.
var schema = sqlitefile.Schema{
	Table:    "tasks",
	Required: []string{"id", "name", "state", "progress", "metadata", "result", "error", "created_at", "updated_at"},
	Added:    []string{"started_at DATETIME", "owner TEXT", "message TEXT", "cancel_cause TEXT", "cancel_requested_at DATETIME"},
	Create: []string{`
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    progress INTEGER DEFAULT 0,
    metadata TEXT,
    result TEXT,
    error TEXT,
    created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    started_at DATETIME,
    owner TEXT,
    message TEXT,
    cancel_cause TEXT,
    cancel_requested_at DATETIME
)`,
		`CREATE INDEX IF NOT EXISTS tasks_state_not_done ON tasks (state) WHERE state <> 'DONE'`,
		`CREATE INDEX IF NOT EXISTS tasks_unfinished ON tasks (` + ownerText + `) WHERE ` + unfinished,
		`CREATE INDEX IF NOT EXISTS tasks_finished ON tasks (` + finishTime + `) WHERE ` + finished,
		`CREATE INDEX IF NOT EXISTS tasks_cancelling ON tasks (` + ownerText + `) WHERE ` + cancelling},
}

// The conditions and expressions of the indexes. They do not use IN, because SQLite
// would build a set of states in each writing statement.
const (
	finished   = `(state = 'DONE' OR state = 'FAILED' OR state = 'CANCELLED')`
	finishTime = `ifnull(updated_at, '')`
	unfinished = `(state = 'PENDING' OR state = 'RUNNING')`
	cancelling = unfinished + ` AND cancel_requested_at IS NOT NULL`
	ownerText  = `ifnull(CAST(owner AS TEXT), '')` // "" for a row without an owner
)

// A row is an operation as stored. Later versions of this package must read the databases
// of earlier ones, so these formats may be extended but not changed:
//
//   - the columns of schema; other programs may read all of them, and may have filled
//     those of SPEC.md in their own formats;
//   - metadata and result as JSON, or NULL; error as text, or NULL;
//   - times in UTC in the layout of timeFormat, or NULL;
//   - owner as the UUID of the store that runs the operation.
//
// Everything is read as text, because each driver converts columns declared DATETIME in
// its own way.
type row struct {
	rowid                           int64 // do not keep it: VACUUM may change it
	id, name, state                 string
	progress                        int64
	metadata, result                any // text, or the length of omitted text
	err                             string
	createdAt, updatedAt, startedAt string
	owner, message, cancelRequested string
}

// columns are the result columns that a row is read from.
var columns = columnsFor(Filter{})

// columnsFor is columns for a filter: metadata and results longer than its MaxValue are
// replaced by their length, an integer, and with WithoutResults results are empty.
func columnsFor(f Filter) string {
	cells := []string{`rowid`, `coalesce(CAST(progress AS INTEGER), 0)`}
	for _, name := range []string{"id", "name", "state", "error", "created_at", "updated_at", "started_at", "owner", "message",
		"cancel_requested_at", "metadata", "result"} {
		length, cell := `length(CAST(`+name+` AS BLOB))`, `coalesce(CAST(`+name+` AS TEXT), '')`
		switch {
		case name == "result" && f.WithoutResults:
			cell = `''`
		case (name == "metadata" || name == "result") && f.MaxValue > 0:
			cell = fmt.Sprintf(`CASE WHEN %s > %d THEN %s ELSE %s END`, length, f.MaxValue, length, cell)
		}
		cells = append(cells, cell)
	}
	return strings.Join(cells, ", ")
}

// operation turns a row into an operation. A cell that it can't read becomes a zero value:
// one bad cell must not hide the rest of the history.
func (r *row) operation() *Operation {
	return &Operation{
		ID:         r.id,
		Name:       validUTF8(r.name),
		State:      State(r.state),
		Progress:   int(min(max(r.progress, 0), 100)),
		Message:    validUTF8(r.message),
		Metadata:   cellJSON(r.metadata),
		Result:     cellJSON(r.result),
		Error:      validUTF8(r.err),
		CreatedAt:  cellTime(r.createdAt),
		StartedAt:  cellTime(r.startedAt),
		UpdatedAt:  cellTime(r.updatedAt),
		Owner:      r.owner,
		Cancelling: r.cancelRequested != "" && State(r.state).live(),
	}
}

func cellJSON(cell any) any {
	var raw json.RawMessage
	switch cell := cell.(type) {
	case int64:
		return Omitted(cell)
	case string: // or bytes, depending on the driver
		raw = json.RawMessage(cell)
	case []byte:
		raw = cell
	}
	if string(raw) == "null" || !json.Valid(raw) {
		return nil
	}
	return raw
}

// timeFormat has a fixed width, so that texts and times have the same order. SQLite's date
// functions read it.
const timeFormat = "2006-01-02 15:04:05.000000"

// formatTime returns "" for the zero time.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	t = t.UTC()
	if t.Year() < 0 || t.Year() > 9999 {
		return t.Format(timeFormat)
	}
	text := t.AppendFormat(make([]byte, 0, len(timeFormat)), time.RFC3339) // Go's fast path: three times as fast
	text[len("2006-01-02")], text[len("2006-01-02 15:04:05")] = ' ', '.'
	for unit := 100_000; unit > 0; unit /= 10 {
		text = append(text, byte('0'+t.Nanosecond()/1000/unit%10))
	}
	return string(text)
}

// cellTime parses a time. It returns the zero time for text in none of the layouts below,
// and for a time that JSON can't represent.
func cellTime(cell string) time.Time {
	if day := len("2006-01-02"); len(cell) == len(timeFormat) && cell[day] == ' ' { // ours: Parse is fastest with RFC3339
		if t, err := time.Parse(time.RFC3339, cell[:day]+"T"+cell[day+1:]+"Z"); err == nil {
			return t
		}
	}
	// time.Time's String, as modernc.org/sqlite writes it, has a zone name and
	// a monotonic clock reading after the first three fields.
	if len(cell) > len(timeFormat) {
		f := strings.Fields(cell)
		cell = strings.Join(f[:min(len(f), 3)], " ")
	}
	for _, layout := range []string{
		"2006-01-02 15:04:05",       // ours and CURRENT_TIMESTAMP; Parse takes fractions anyway
		"2006-01-02 15:04:05Z07:00", // go-sqlite3
		time.RFC3339,
		"2006-01-02 15:04:05 -0700", // time.Time's String
	} {
		if t, err := time.Parse(layout, cell); err == nil {
			if t = t.UTC(); t.Year() >= 0 && t.Year() <= 9999 {
				return t
			}
		}
	}
	return time.Time{}
}

// textCell returns NULL for empty text.
func textCell(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func timeCell(t time.Time) any { return textCell(formatTime(t)) }

func valueCell(v any) any { return textCell(string(rawJSON(v))) }

// A statement writes rows.
type statement struct {
	one    string // SQL for one row
	format string // SQL for many rows, with %s for the rows of parameters
	params int    // parameters of one row
	none   error  // the outcome if it writes fewer rows than given
}

// many returns the SQL for n rows.
func (s *statement) many(n int) string {
	row := ", (?" + strings.Repeat(", ?", s.params-1) + ")"
	return fmt.Sprintf(s.format, strings.Repeat(row, n)[len(", "):])
}

// update changes only unfinished operations, and never recreates a deleted one.
var update = &statement{`UPDATE tasks SET state = ?, progress = ?, metadata = ?, result = ?, error = ?,
	updated_at = ?, started_at = ?, message = ?, cancel_requested_at = coalesce(cancel_requested_at, ?)
	WHERE id = ? AND state IN ('PENDING', 'RUNNING') AND owner IS coalesce(?, owner)`,
	`UPDATE tasks SET state = v.column1, progress = v.column2, metadata = v.column3, result = v.column4,
	error = v.column5, updated_at = v.column6, started_at = v.column7, message = v.column8,
	cancel_requested_at = coalesce(cancel_requested_at, v.column9)
	FROM (VALUES %s) AS v WHERE id = v.column10 AND state IN ('PENDING', 'RUNNING') AND owner IS coalesce(v.column11, owner)`,
	11, ErrNotFound}

const insertInto = `INSERT INTO tasks (state, progress, metadata, result, error, updated_at, started_at,
	message, cancel_requested_at, id, owner, name, created_at) `

// insert begins with the parameters of update.
var insert = &statement{insertInto + `VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING`,
	insertInto + `SELECT * FROM (VALUES %s) WHERE column10 IS NOT NULL ON CONFLICT (id) DO NOTHING`,
	13, errors.New("a trigger of the database has ignored the new row")}

// idCell is the index of the ID in a row's parameters.
const idCell = 9

// maxChunk is the maximum number of rows of one statement. One statement with many rows
// costs less than many statements.
const maxChunk = 64

// A write is a row to insert or to update.
type write struct {
	*statement
	args []any  // of this row, followed by those of all later rows
	err  *error // receives the outcome
}

// appendCells appends the statement's arguments for an operation.
func (s *statement) appendCells(args []any, op *Operation, owner any) ([]any, error) {
	metadata, result, err := op.values()
	if err != nil {
		return args, err
	}
	requested := time.Time{}
	if op.Cancelling {
		requested = latest(op.UpdatedAt, op.CreatedAt)
	}
	args = append(args, string(op.State), op.Progress, valueCell(metadata), valueCell(result), textCell(op.Error),
		timeCell(op.UpdatedAt), timeCell(op.StartedAt), textCell(op.Message), timeCell(requested), op.ID, owner)
	if s == insert {
		args = append(args, op.Name, timeCell(op.CreatedAt))
	}
	return args, nil
}

// Save implements [Persistence].
func (s *SQLiteStore) Save(op *Operation) error {
	return s.WriteBatch([]*Operation{op}, nil)[0]
}

// Update implements [Persistence].
func (s *SQLiteStore) Update(op *Operation) error {
	return s.WriteBatch(nil, []*Operation{op})[0]
}

// errAttached is the error of Save after AttachSQLite: without an owner file, others would
// take the operation for an orphan.
var errAttached = fmt.Errorf("an attached store saves no operations, see AttachSQLite: %w", errors.ErrUnsupported)

// WriteBatch implements [BatchWriter]. It writes all rows in one transaction, with many
// rows per statement. If a statement fails, or writes fewer rows than given (an ID may
// exist, and UPDATE ... FROM applies only one of two updates of the same operation), it
// writes the rows one by one instead, in order. If the disk is too full for all rows, it
// stores those for which there is room. Any other failure of BEGIN or COMMIT, and a
// database that stays locked, fail the whole batch.
func (s *SQLiteStore) WriteBatch(saves, updates []*Operation) []error {
	errs := make([]error, len(saves)+len(updates))
	writes := make([]write, 0, len(errs))
	args := make([]any, 0, len(saves)*insert.params+len(updates)*update.params)
	own := textCell(s.Owner())
	for i, op := range slices.Concat(saves, updates) {
		stmt, owner, start := insert, own, len(args)
		switch {
		case i >= len(saves):
			stmt = update
			if op.Owner != s.Owner() {
				owner = nil // matches any owner
			}
		case owner == nil:
			errs[i] = errAttached
			continue
		}
		if args, errs[i] = stmt.appendCells(args, op, owner); errs[i] == nil {
			writes = append(writes, write{stmt, args[start:cap(args)], &errs[i]})
		}
	}
	if len(writes) == 0 {
		return errs
	}
	deadline := s.db.Deadline()
	var failed error // of a statement
	err := s.db.Write(deadline, func(c *sql.Conn) error {
		for rest := writes; len(rest) > 0; {
			n := chunk(rest)
			if failed = writeRows(c, rest[:n]); failed != nil {
				return failed
			}
			rest = rest[n:]
		}
		return nil
	})
	if failed != nil && !sqlitefile.Locked(failed) || sqlitefile.Full(err) {
		s.writeEach(deadline, writes)
	} else {
		setAll(writes, err)
	}
	return errs
}

func setAll(writes []write, err error) {
	for _, w := range writes {
		*w.err = err
	}
}

// chunk returns how many rows the next statement writes.
func chunk(writes []write) (n int) {
	for n < min(len(writes), maxChunk) && writes[n].statement == writes[0].statement {
		n++
	}
	return n
}

// writeRows writes rows of the same kind with one statement. It pads them with rows of
// NULL, which are not written, to 2, 4 or a multiple of 8 rows, so that there are few
// different statements to prepare.
func writeRows(c *sql.Conn, writes []write) (err error) {
	stmt, n := writes[0].statement, 0
	args := writes[0].args[:len(writes)*stmt.params]
	if len(writes) == 1 {
		n, err = changes(c, stmt.one, args...)
	} else {
		size := (len(writes) + 7) &^ 7
		if len(writes) <= 4 {
			size = (len(writes) + 1) &^ 1
		}
		args = append(args[:len(args):len(args)], make([]any, (size-len(writes))*stmt.params)...)
		// A query, because go-sqlite3 passes a query's arguments to C in one call.
		err = cmp.Or(sqlitefile.Each(c, stmt.many(size), args, func() {}), sqlText(`SELECT changes()`).row(c, &n))
	}
	if err == nil && n < len(writes) {
		err = stmt.none
	}
	return err
}

// writeEach writes each row with a statement of its own, so that a bad row fails alone. If
// a bad row ends the transaction (a trigger or a full disk may do that), it writes the rows
// before it again. If the disk is too full for COMMIT, it writes each half of the rows
// again.
func (s *SQLiteStore) writeEach(deadline time.Time, writes []write) {
	for len(writes) > 0 {
		end := len(writes) // or the index of the row that has ended the transaction
		err := s.db.Write(deadline, func(c *sql.Conn) error {
			end = len(writes)
			for i, w := range writes {
				err := writeRows(c, writes[i:i+1])
				*w.err = err
				switch {
				case err == nil || err == ErrNotFound:
				case err == insert.none:
					*w.err = whyIgnored(c, w.args[idCell], err)
				case sqlitefile.Locked(err):
					return err
				case !sqlitefile.InTransaction(c):
					end = i
					return err
				}
			}
			return nil
		})
		next := end + 1
		switch {
		case end < len(writes):
		case sqlitefile.Full(err) && end > 1:
			end /= 2
			next = end
		default:
			if err != nil {
				setAll(writes, err)
			}
			return
		}
		s.writeEach(deadline, writes[:end])
		writes = writes[next:]
	}
}

// whyIgnored returns ErrExists if there is a row with that ID, and otherwise err: why no
// row was inserted.
func whyIgnored(c *sql.Conn, id any, err error) error {
	ids, readErr := sqlitefile.Strings(c, `SELECT id FROM tasks WHERE id = ?`, id)
	if len(ids) > 0 {
		return ErrExists
	}
	return cmp.Or(readErr, err)
}

// A query is SQL text, or a part of it, with its arguments.
type query struct {
	text string
	args []any
}

func sqlText(text string, args ...any) query { return query{text, args} }

// plus returns the query with text and arguments appended.
func (q query) plus(text string, args ...any) query {
	return query{q.text + text, slices.Concat(q.args, args)}
}

// with returns the query with others appended.
func (q query) with(others ...query) query {
	for _, other := range others {
		q = q.plus(other.text, other.args...)
	}
	return q
}

// unionAll returns a query for the rows of all queries.
func unionAll(queries []query) query {
	all := queries[0]
	for _, q := range queries[1:] {
		all = all.plus(` UNION ALL `).with(q)
	}
	return all
}

// row reads the first row, or returns [sql.ErrNoRows].
func (q query) row(c *sql.Conn, cells ...any) error {
	return c.QueryRowContext(context.Background(), q.text, q.args...).Scan(cells...)
}

// each reads each row into the cells, and then calls f.
func (q query) each(c *sql.Conn, f func(), cells ...any) error {
	return sqlitefile.Each(c, q.text, q.args, f, cells...)
}

func jsonArray[T any](all []T) string {
	raw, _ := json.Marshal(all) // can't fail
	return string(raw)
}

// List implements [Persistence].
func (s *SQLiteStore) List(limit, offset int) ([]*Operation, error) {
	return s.ListFiltered(Filter{}, limit, offset)
}

// ListFiltered implements [FilteredLister]. It uses the index for states other than DONE,
// and searches in steps for whatever no index contains.
func (s *SQLiteStore) ListFiltered(f Filter, limit, offset int) ([]*Operation, error) {
	ctx := cmp.Or(f.Context, context.Background())
	if f.Name+f.Containing != "" || len(f.Metadata) > 0 || f.ranged() || slices.Contains(f.States, StateDone) ||
		f.ByFinish && (len(f.States) > 0 || f.Before != "") {
		return s.search(ctx, f, limit, offset)
	}
	if f.ByFinish {
		return s.read(ctx, columnsFor(f), sqlText(byFinish+orderByFinish+` LIMIT ? OFFSET ?`, limit, offset))
	}
	where := sqlText(`TRUE`)
	if f.Before != "" {
		where = sqlText(`rowid < `).with(placeOf(f.Before))
	}
	ops, err := s.read(ctx, columnsFor(f), selection(f, where, limit, offset))
	if err == nil && len(ops) == 0 && f.Before != "" && !isTimed(f.Before) {
		if _, err = s.Get(f.Before); err != nil {
			err = fmt.Errorf("%s: %w", f.Before, err)
		}
	}
	return ops, err
}

// noneDone reports whether the index of states contains all rows of the filter's states.
func (f Filter) noneDone() bool { return len(f.States) > 0 && !slices.Contains(f.States, StateDone) }

// placeOf returns an expression for a rowid such that the rows below it were submitted
// before the operation; it is NULL if the ID is unknown. A timed ID without a row is
// placed above its nearest neighbours with smaller IDs, and not below its next
// neighbour with a greater one.
func placeOf(id string) query {
	const self = `(SELECT rowid FROM tasks WHERE id = ?)`
	if !isTimed(id) {
		return sqlText(self, id)
	}
	const near = `FROM (SELECT rowid, id FROM tasks WHERE id %s ? ORDER BY id %s LIMIT 100)
		WHERE id GLOB '????????-????-7???-[89ab]???-????????????'`
	smaller, greater := fmt.Sprintf(near, `<`, `DESC`), fmt.Sprintf(near, `>`, `ASC`)
	return sqlText(`coalesce(`+self+`, (SELECT max(rowid) FROM (SELECT rowid + 1 AS rowid `+smaller+`
		UNION ALL SELECT ifnull((SELECT rowid `+greater+` LIMIT 1), 9223372036854775807))))`, id, id, id)
}

// ByFinish uses the order of the index, which sorts times as text: times in foreign
// layouts may be out of place.
const (
	byFinish      = ` FROM tasks INDEXED BY tasks_finished WHERE ` + finished
	orderByFinish = ` ORDER BY ` + finishTime + ` DESC, rowid DESC`
)

// selection returns the FROM clause, and all that follows it, of a query for the rows
// that match a condition and the filter, apart from its Before and its range of time.
func selection(f Filter, where query, limit, offset int) query {
	if f.Name != "" {
		where = where.plus(` AND name = ?`, f.Name)
	}
	if f.Containing != "" {
		where = where.plus(` AND instr(lower(name), lower(?)) > 0`, f.Containing)
	}
	now, page := whereNow(f), sqlText(` LIMIT ? OFFSET ?`, limit, offset)
	switch {
	case f.ByFinish: // where restricts to finished rows, whose states are stored
		if len(f.States) > 0 {
			now = now.plus(` AND state IN (SELECT value FROM json_each(?))`, jsonArray(f.States))
		}
		// Select rowids first, so that the sorter need not hold long columns.
		rowids := sqlText(`SELECT rowid FROM tasks NOT INDEXED WHERE `).with(where, now).plus(orderByFinish).with(page)
		return sqlText(` FROM tasks WHERE rowid IN (`).with(rowids).plus(`)` + orderByFinish)
	case len(f.States) > 0:
		last := int64(min(uint64(limit)+uint64(offset), math.MaxInt64))
		where = whereState(f, where, now, last)
	case len(f.Include) > 0:
		where = where.plus(` AND (TRUE`).with(now).plus(` OR `+included+`)`, jsonArray(f.Include))
	default:
		where = where.with(now)
	}
	return sqlText(` FROM tasks WHERE `).with(where).plus(` ORDER BY rowid DESC`).with(page)
}

// included is the condition for unfinished rows whose IDs are in a JSON array.
const included = `(state IN ('PENDING', 'RUNNING') AND id IN (SELECT value FROM json_each(?)))`

// whereNow returns a condition to append for rows that have the filter's metadata and
// are not in its Exclude. JSON without a backslash contains its strings verbatim, so
// most rows need not be parsed. CASE keeps json_each from failing on invalid JSON.
func whereNow(f Filter) (and query) {
	const cell = `CAST(metadata AS TEXT)`
	for _, key := range slices.Sorted(maps.Keys(f.Metadata)) {
		value := f.Metadata[key]
		and = and.plus(` AND (instr(`+cell+`, ?) > 0 OR instr(`+cell+`, '\') > 0) AND CASE WHEN json_valid(`+cell+`) THEN
			EXISTS (SELECT 1 FROM json_each(`+cell+`) WHERE key = ? AND type = 'text' AND atom = ?) ELSE FALSE END`, value, key, value)
	}
	if len(f.Exclude) > 0 && len(f.States)+len(f.Metadata) > 0 {
		and = and.plus(` AND NOT `+included, jsonArray(f.Exclude))
	}
	return and
}

// whereState returns a condition for the last rows that are in one of the filter's states
// and match both conditions, and for those in its Include that match the first. Each state
// has a query of its own, so that the index returns its rows in order.
func whereState(f Filter, where, now query, last int64) query {
	var queries []query
	for _, state := range f.States {
		term := ` AND state = ?`
		if state != StateDone {
			term += ` AND state <> 'DONE'`
		}
		rows := where.plus(term, string(state)).with(now).plus(` ORDER BY rowid DESC LIMIT ?`, last)
		queries = append(queries, sqlText(`SELECT rowid FROM (SELECT rowid FROM tasks WHERE `).with(rows).plus(`)`))
	}
	if len(f.Include) > 0 {
		queries = append(queries, sqlText(`SELECT rowid FROM tasks WHERE `).with(where).plus(` AND `+included, jsonArray(f.Include)))
	}
	return sqlText(`rowid IN (`).with(unionAll(queries)).plus(`)`)
}

// maxStep is the maximum number of rows of one step of a search: a few milliseconds of
// work. Between steps, others get the connection, the WAL can be checkpointed, and the
// context is checked.
const maxStep = 5000

// A place is a position in a list.
type place struct {
	finish any // a cell of finishTime; only with ByFinish
	rowid  int64
}

// placeFinish is the parameter for a place's finish. Some drivers scan an empty BLOB as
// nil, which would become NULL.
const placeFinish = `coalesce(?, x'')`

// search is ListFiltered in steps. If a VACUUM changes rowids meanwhile, it may miss some
// rows.
func (s *SQLiteStore) search(ctx context.Context, f Filter, limit, offset int) (ops []*Operation, err error) {
	var below *place
	err = s.db.Read(ctx, func(c *sql.Conn) (err error) {
		below, err = start(c, f)
		return err
	})
	const first = 100
	for n := first; err == nil && below != nil && len(ops) < limit; n = min(2*n, maxStep) {
		var found []*Operation
		var skipped int
		var next *place
		err = s.db.Read(ctx, func(c *sql.Conn) (err error) {
			var window query
			if n == 2*first { // frequent rows have been found by now
				window, err = fewFor(c, f, *below)
			}
			if next = nil; err == nil && window.text == "" {
				window, next, err = windowOf(c, f, *below, n)
			}
			if err == nil {
				found, skipped, err = step(c, f, window, limit-len(ops), offset)
			}
			return err
		})
		ops = append(ops, found...)
		offset -= skipped
		below = next
	}
	if err != nil {
		return nil, err
	}
	return ops, nil
}

// start returns the place below which a search begins, or nil if no rows are there.
func start(c *sql.Conn, f Filter) (*place, error) {
	at := place{rowid: math.MaxInt64}
	var err error
	switch {
	case f.ByFinish && f.Before != "":
		err = sqlText(`SELECT `+finishTime+`, rowid FROM tasks WHERE id = ? AND `+finished, f.Before).row(c, &at.finish, &at.rowid)
		if err == sql.ErrNoRows {
			err = fmt.Errorf("%s, finished: %w", f.Before, ErrNotFound)
		}
	case f.ByFinish:
		err = sqlText(`SELECT `+finishTime+byFinish).with(bounds(f)).plus(orderByFinish+` LIMIT 1`).row(c, &at.finish)
		if err == sql.ErrNoRows {
			return nil, nil
		}
	case f.Before != "":
		var below sql.NullInt64
		err = sqlText(`SELECT `).with(placeOf(f.Before)).row(c, &below)
		if at.rowid = below.Int64; err == nil && !below.Valid {
			err = fmt.Errorf("%s: %w", f.Before, ErrNotFound)
		}
	}
	return &at, err
}

// bounds returns a condition to append for finished rows that may be in the filter's range
// of time.
func bounds(f Filter) (and query) {
	if !f.FinishedAfter.IsZero() {
		and = and.plus(` AND `+finishTime+` >= ?`, bound(f.FinishedAfter, -foreignSlack))
	}
	if !f.FinishedBefore.IsZero() {
		and = and.plus(` AND `+finishTime+` <= ?`, bound(f.FinishedBefore, foreignSlack))
	}
	return and
}

// bound returns the text to compare with stored times: that of t plus slack.
func bound(t time.Time, slack time.Duration) string {
	if t = t.UTC(); t.Year() < 9999 {
		t = t.Add(slack)
	}
	if t.Year() > 9999 { // its text has more digits
		return ":" // sorts after all digits
	}
	return formatTime(t)
}

// fewFor returns a condition for the rest of the list if an index with another order
// contains so few candidate rows that one step is enough. Otherwise it returns an empty
// query.
func fewFor(c *sql.Conn, f Filter, below place) (window query, err error) {
	var from query
	switch {
	case f.noneDone() && (f.ByFinish || f.ranged()):
		from = sqlText(` FROM tasks INDEXED BY tasks_state_not_done WHERE state <> 'DONE' AND state IN (SELECT value FROM json_each(?))`, jsonArray(f.States))
	case f.ranged() && !f.ByFinish:
		from = sqlText(byFinish).with(bounds(f))
	default:
		return window, nil
	}
	const few = 4 * maxStep // most are only counted, or are in the slack
	var n int
	err = sqlText(`SELECT count(*) FROM (SELECT 1`).with(from).plus(` LIMIT ?)`, few+1).row(c, &n)
	if err != nil || n > few {
		return window, err
	}
	window = sqlText(`rowid IN (SELECT rowid`).with(from)
	if f.ByFinish {
		return window.plus(`) AND `+finished+` AND (`+finishTime+`, rowid) < (`+placeFinish+`, ?)`, below.finish, below.rowid), nil
	}
	return window.plus(`) AND rowid < ?`, below.rowid), nil
}

// windowOf returns a condition for the next n or fewer rows below a place, and the
// place of the next step, nil if this is the last one.
func windowOf(c *sql.Conn, f Filter, below place, n int) (window query, next *place, err error) {
	if f.ByFinish {
		return windowByFinish(c, f, below, n)
	}
	var last sql.NullInt64
	err = lastOf(f, below.rowid, n).row(c, &last)
	if last.Valid {
		next = &place{rowid: last.Int64}
	} else {
		last.Int64 = math.MinInt64
	}
	return sqlText(`rowid < ? AND rowid >= ?`, below.rowid, last.Int64), next, err
}

// lastOf returns a query for the rowid of the n-th row below another, or NULL if there are
// fewer. If the index contains the filter's states, only their rows count.
func lastOf(f Filter, below int64, n int) query {
	const last = `SELECT (SELECT rowid FROM tasks WHERE rowid < ?%s ORDER BY rowid DESC LIMIT 1 OFFSET ?) AS last`
	if !f.noneDone() || f.ranged() {
		return sqlText(fmt.Sprintf(last, ``), below, n-1)
	}
	var queries []query
	for _, state := range f.States {
		queries = append(queries, sqlText(fmt.Sprintf(last, ` AND state = ? AND state <> 'DONE'`), below, string(state), n-1))
	}
	return sqlText(`SELECT max(last) FROM (`).with(unionAll(queries)).plus(`)`)
}

// windowByFinish is windowOf with ByFinish. Rows with the same time as the place have a step
// of their own.
func windowByFinish(c *sql.Conn, f Filter, below place, n int) (window query, next *place, err error) {
	from, same := sqlText(byFinish), below.rowid > math.MinInt64
	if same {
		from = from.plus(` AND `+finishTime+` = `+placeFinish+` AND rowid < ?`, below.finish, below.rowid)
	} else {
		f.FinishedBefore = time.Time{} // its place is above this one
		from = from.plus(` AND `+finishTime+` < `+placeFinish, below.finish).with(bounds(f))
	}
	from = from.plus(orderByFinish)
	var last place
	err = sqlText(`SELECT `+finishTime+`, rowid`).with(from).plus(` LIMIT 1 OFFSET ?`, n-1).row(c, &last.finish, &last.rowid)
	switch {
	case err == nil:
		next = &last
	case err != sql.ErrNoRows:
		return window, nil, err
	case same:
		next = &place{below.finish, math.MinInt64}
	}
	return sqlText(`rowid IN (SELECT rowid`).with(from).plus(` LIMIT ?)`, n), next, nil
}

// inRange returns a condition for the rows of a window that finished in the filter's range
// of time.
func inRange(c *sql.Conn, f Filter, window query) (query, error) {
	in := []int64{}
	var rowid int64
	var finish string
	rows := sqlText(`SELECT rowid, CAST(` + finishTime + ` AS TEXT) FROM tasks NOT INDEXED WHERE `)
	err := rows.with(window).plus(` AND `+finished).with(bounds(f)).each(c, func() {
		if f.inRange(cellTime(finish)) {
			in = append(in, rowid)
		}
	}, &rowid, &finish)
	return sqlText(`rowid IN (SELECT value FROM json_each(?))`, jsonArray(in)), err
}

// step returns at most limit matching operations of a window, after skipping offset of
// them, and how many it has skipped.
func step(c *sql.Conn, f Filter, window query, limit, offset int) (ops []*Operation, skipped int, err error) {
	if f.ranged() {
		if window, err = inRange(c, f, window); err != nil {
			return nil, 0, err
		}
	}
	if offset > 0 {
		err = sqlText(`SELECT count(*) FROM (SELECT rowid`).with(selection(f, window, offset, 0)).plus(`)`).row(c, &skipped)
		if err != nil {
			return nil, 0, err
		}
	}
	ops, err = operations(c, columnsFor(f), selection(f, window, limit, offset))
	return ops, skipped, err
}

// Get implements [Persistence].
func (s *SQLiteStore) Get(id string) (*Operation, error) {
	ops, err := s.read(context.Background(), columns, sqlText(` FROM tasks WHERE id = ?`, id))
	if err != nil {
		return nil, err
	}
	if len(ops) == 0 {
		return nil, ErrNotFound
	}
	return ops[0], nil
}

// read returns the operations selected by columns and from, the rest of the query.
func (s *SQLiteStore) read(ctx context.Context, columns string, from query) (ops []*Operation, err error) {
	err = s.db.Read(ctx, func(c *sql.Conn) (err error) {
		ops, err = operations(c, columns, from)
		return err
	})
	return ops, err
}

// operations is read on a connection.
func operations(c *sql.Conn, columns string, from query) (ops []*Operation, err error) {
	err = eachRow(c, columns, from, func(r *row) { ops = append(ops, r.operation()) })
	return ops, err
}

// eachRow calls f with each row selected by columns and from, the rest of the query. It
// reuses the row.
func eachRow(c *sql.Conn, columns string, from query, f func(*row)) error {
	var r row
	return sqlText(`SELECT `+columns+from.text, from.args...).each(c, func() { f(&r) },
		&r.rowid, &r.progress, &r.id, &r.name, &r.state, &r.err, &r.createdAt, &r.updatedAt, &r.startedAt,
		&r.owner, &r.message, &r.cancelRequested, &r.metadata, &r.result)
}

// recoverChunk is the maximum number of operations that one transaction of Recover
// changes, so that other writes need not wait long.
const recoverChunk = 1000

// Recover implements [Recoverer]. An operation is an orphan if its row has no owner, or if
// nobody holds the owner's lock.
func (s *SQLiteStore) Recover(reason string, resume func(op *Operation) bool) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		if s.Owner() == "" {
			return
		}
		owners, err := s.owners()
		if err != nil {
			yield(nil, err)
			return
		}
		for _, id := range owners {
			if !s.recoverFrom(id, reason, resume, yield) {
				return
			}
		}
	}
}

// ownersQuery steps through the index from owner to owner, however many rows each has.
const (
	nextOwner   = `SELECT min(` + ownerText + `) FROM tasks INDEXED BY tasks_unfinished WHERE ` + unfinished
	ownersQuery = `WITH RECURSIVE owners (text) AS (` + nextOwner + ` UNION ALL
		SELECT (` + nextOwner + ` AND ` + ownerText + ` > owners.text) FROM owners WHERE text IS NOT NULL)
		SELECT text FROM owners WHERE text IS NOT NULL`
)

// owners returns the owners of unfinished operations, and those that have only a file.
func (s *SQLiteStore) owners() (ids []string, err error) {
	err = s.db.Read(context.Background(), func(c *sql.Conn) (err error) {
		ids, err = sqlitefile.Strings(c, ownersQuery)
		return err
	})
	for _, id := range s.owner.Others() {
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, err
}

// recoverFrom recovers the operations of an owner if it is dead, yields them, and reports
// whether to continue.
func (s *SQLiteStore) recoverFrom(id, reason string, resume func(op *Operation) bool, yield func(*Operation, error) bool) (goOn bool) {
	done, dead, unknown := s.owner.Dead(id)
	switch {
	case unknown != nil:
		return s.reportUnknown(id, unknown, yield)
	case !dead:
		return true
	}
	defer func() { done(goOn) }()
	for at := int64(math.MinInt64); ; {
		var ops []*Operation
		orphans, err := s.orphans(id, at, resume)
		if err == nil && len(orphans) > 0 {
			at = orphans[len(orphans)-1].rowid
			ops, err = s.settle(orphans, id, reason)
		}
		if err != nil {
			yield(nil, err)
			return false
		}
		for _, op := range ops {
			if !yield(op, nil) {
				return false
			}
		}
		if len(orphans) < recoverChunk {
			return true
		}
	}
}

// reportUnknown yields one operation of an owner that can't be examined, with the
// reason, once per owner. It reports whether to continue.
func (s *SQLiteStore) reportUnknown(id string, unknown error, yield func(*Operation, error) bool) (goOn bool) {
	if _, again := s.reported.Load(id); again {
		return true
	}
	ops, err := s.read(context.Background(), columns, sqlText(ofOwner, id, math.MinInt64, 1))
	if err != nil || len(ops) == 0 {
		return err == nil || yield(nil, err)
	}
	s.reported.Store(id, true)
	return yield(ops[0], fmt.Errorf("can't tell whether the process that runs it is alive: %w: "+
		"its operations stay as they are; if it is dead, remove that file", unknown))
}

// ofOwner selects an owner's unfinished operations after a rowid.
const ofOwner = ` FROM tasks INDEXED BY tasks_unfinished WHERE ` + unfinished + ` AND ` + ownerText + ` = ? AND rowid > ?
	ORDER BY rowid LIMIT ?`

// An orphan is a row that Recover has found.
type orphan struct {
	row
	resumed bool // take it over
}

// orphans returns the next operations of a dead owner after a rowid, and asks resume which
// of them to take over. If a VACUUM changes rowids meanwhile, some may be left to the next
// Recover.
func (s *SQLiteStore) orphans(owner string, at int64, resume func(op *Operation) bool) (all []orphan, err error) {
	err = s.db.Read(context.Background(), func(c *sql.Conn) error {
		all = nil
		return eachRow(c, columns, sqlText(ofOwner, owner, at, recoverChunk), func(r *row) { all = append(all, orphan{row: *r}) })
	})
	for i := range all {
		if all[i].id != "" { // otherwise NULL or empty, and maybe not unique
			_, all[i].resumed = resumes(resume, all[i].operation())
		}
	}
	return all, err
}

// The statements of settle, which do nothing if another Recover came first.
const (
	whereOrphan = ` WHERE rowid = ? AND coalesce(CAST(id AS TEXT), '') = ? AND ` + ownerText + ` = ? AND ` + unfinished
	failOrphan  = `UPDATE tasks SET state = 'FAILED', error = ?, updated_at = ?` + whereOrphan
	takeOrphan  = `UPDATE tasks SET state = 'PENDING', owner = ?, updated_at = ?, progress = 0, message = NULL, started_at = NULL` +
		whereOrphan + ` AND cancel_requested_at IS NULL AND typeof(id) = 'text'` // otherwise Update would not find it
)

// settle marks operations of a dead owner as failed, or takes them over. It changes no
// other cells, which other code may have written.
func (s *SQLiteStore) settle(orphans []orphan, owner, reason string) (ops []*Operation, err error) {
	err = s.db.Write(s.db.Deadline(), func(c *sql.Conn) (err error) {
		ops = nil
		for _, o := range orphans {
			n := 0
			op := o.operation().recovered(reason, o.resumed)
			if o.resumed {
				op.Owner = s.Owner()
				n, err = changes(c, takeOrphan, op.Owner, formatTime(op.UpdatedAt), o.rowid, o.id, owner)
			}
			if n == 0 && err == nil {
				op = o.operation().recovered(reason, false)
				n, err = changes(c, failOrphan, reason, formatTime(op.UpdatedAt), o.rowid, o.id, owner)
				// n is 0 if another Recover came first, or if a trigger has ignored the update
			}
			if err != nil {
				return err
			}
			if n > 0 {
				ops = append(ops, op)
			}
		}
		return nil
	})
	return ops, err
}

// pruneChunk is the maximum number of rows that Prune deletes at a time.
const pruneChunk = 100

// foreignSlack is how far a text in a foreign layout may be from its place in the order of
// time: zones go up to 14 hours, and a T sorts after a space.
const foreignSlack = 38 * time.Hour

// A pruneCursor is a place in the index that Prune reads. If a VACUUM changes rowids
// meanwhile, some rows that finished in the microsecond at the cursor may be left to the
// next Prune.
type pruneCursor struct {
	finish string
	rowid  int64
}

// Prune implements [Pruner]. The file does not shrink, but new rows reuse the space.
func (s *SQLiteStore) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		at := pruneCursor{finish: "0"} // after rows without a time
		for more := true; more; {
			var n int
			var next pruneCursor
			start := time.Now()
			err := s.db.Write(s.db.Deadline(), func(c *sql.Conn) (err error) {
				next, n, err = at.prune(c, before)
				return err
			})
			more, at = next != at, next
			if !yield(n, err) || err != nil {
				return
			}
			time.Sleep(time.Since(start)) // let others write
		}
	}
}

// prune looks at the next operations after the cursor, deletes those that finished before
// a time, and returns the new cursor. Only texts count as times.
func (at pruneCursor) prune(c *sql.Conn, before time.Time) (next pruneCursor, deleted int, err error) {
	next = at
	var old []int64
	err = sqlText(pruneQuery, at.finish, at.rowid, pruneChunk,
		at.finish, bound(before, foreignSlack), bound(before, 0), pruneChunk, pruneChunk).each(c, func() {
		if t := cellTime(next.finish); !t.IsZero() && t.Before(before) {
			old = append(old, next.rowid)
		}
	}, &next.finish, &next.rowid)
	if err != nil || len(old) == 0 {
		return next, 0, err
	}
	deleted, err = changes(c, `DELETE FROM tasks WHERE rowid IN (SELECT value FROM json_each(?))`, jsonArray(old))
	return next, deleted, err
}

// pruneQuery selects rows after the cursor: first those with the same time, then those
// with a later time, up to a bound.
const (
	pruneFrom  = `SELECT * FROM (SELECT ` + finishTime + `, rowid FROM tasks INDEXED BY tasks_finished WHERE ` + finished
	pruneQuery = pruneFrom + ` AND ` + finishTime + ` = ? AND rowid > ? ORDER BY rowid LIMIT ?) UNION ALL ` +
		pruneFrom + ` AND ` + finishTime + ` > ? AND ` + finishTime + ` < ?
		AND (` + finishTime + ` < ? OR ` + finishTime + ` NOT GLOB '????-??-?? ??:??:??.??????')
		ORDER BY ` + finishTime + `, rowid LIMIT ?) ORDER BY 1, 2 LIMIT ?`
)

// RequestCancel implements [Canceller].
func (s *SQLiteStore) RequestCancel(id, text string) error {
	n := 0
	err := s.db.Write(s.db.Deadline(), func(c *sql.Conn) (err error) {
		n, err = changes(c, `UPDATE tasks SET cancel_cause = iif(cancel_requested_at IS NULL, ?, cancel_cause),
			cancel_requested_at = coalesce(cancel_requested_at, ?) WHERE id = ? AND `+unfinished,
			textCell(validUTF8(text)), formatTime(wall()), id)
		return err
	})
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	return err
}

// CancelRequests implements [Canceller].
func (s *SQLiteStore) CancelRequests() (requests map[string]string, err error) {
	err = s.db.Read(context.Background(), func(c *sql.Conn) error {
		requests = make(map[string]string)
		var id, text string
		return sqlText(`SELECT CAST(id AS TEXT), coalesce(CAST(cancel_cause AS TEXT), '')
			FROM tasks INDEXED BY tasks_cancelling WHERE `+cancelling+` AND `+ownerText+` = ?`, s.owner.ID).
			each(c, func() { requests[id] = validUTF8(text) }, &id, &text)
	})
	return requests, err
}

// Changes implements [Notifier].
func (s *SQLiteStore) Changes(ctx context.Context) iter.Seq[error] {
	return s.db.Changes(ctx, pollInterval)
}

// changes executes a statement and returns the number of changed rows.
func changes(c *sql.Conn, query string, args ...any) (int, error) {
	res, err := c.ExecContext(context.Background(), query, args...)
	if err != nil {
		return 0, err
	}
	n, err := res.RowsAffected()
	return int(n), err
}
