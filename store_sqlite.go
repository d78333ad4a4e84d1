package task

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task/internal/owner"
)

// An SQLiteStore is a [Persistence] in an SQLite database, in a table called
// tasks. Several managers and several processes may share the database.
type SQLiteStore struct {
	// Immutable.
	db    *sql.DB
	owns  bool         // the store opened db, with busyTimeout
	owner *owner.Owner // who runs what this store saves
	path  string       // of the database file, if owns; "" for none
	file  os.FileInfo  // what was there
}

// writeTimeout is how long a write waits before it gives up: for a connection,
// and for the database to be unlocked.
const writeTimeout = 10 * time.Second

// busyTimeout is the part of it in which SQLite itself waits for locks, in a
// database that the store opened. What is left is for a connection.
const busyTimeout = 8 * time.Second

// OpenSQLite opens the SQLite database in the file with that path, creating
// the file, but no directory, if there is none. The path ":memory:" stands for
// a new database in memory.
//
// The database is put into WAL mode and written with synchronous=FULL: what
// the store has confirmed survives a crash of the program, of the system, and
// a loss of power. New files get the mode 0600. A table tasks that other code
// has made, with the columns that the README lists, is taken over; one that is
// something else is refused and left as it is.
//
// While the store is open, a locked file PATH-owner-UUID beside the database
// tells other processes that this one is alive. The database must not be on a
// network filesystem, nor be moved while it is open.
//
// OpenSQLite uses github.com/mattn/go-sqlite3, which needs cgo. In a program
// built without cgo it returns an error; [NewSQLiteStore] takes any driver.
func OpenSQLite(path string) (*SQLiteStore, error) {
	s, err := openSQLite(path)
	if err != nil {
		return nil, fmt.Errorf("task: open database %q: %w", path, err)
	}
	return s, nil
}

// NewSQLiteStore returns a store inside an application's own SQLite database,
// which may have other tables and be opened through any SQLite driver. It adds
// a table tasks, or to one that is there the columns and the index that it
// lacks, and touches nothing else: the connections' settings are the
// application's, and so is what a loss of power may take (go-sqlite3's default
// is synchronous=NORMAL in WAL mode: the last moments). Next to the database
// file it keeps the same locked file as [OpenSQLite].
//
// One connection is enough, as long as the application doesn't hold it in a
// transaction of its own while it calls the manager.
func NewSQLiteStore(db *sql.DB) (*SQLiteStore, error) {
	s, err := newSQLiteStore(db)
	if err != nil {
		return nil, fmt.Errorf("task: use database: %w", err)
	}
	return s, nil
}

// Close ends the store, and closes the database if [OpenSQLite] opened it.
// Close the manager first: what it has not finished by then is left for the
// next one to recover.
func (s *SQLiteStore) Close() error {
	var err error
	if s.owns {
		err = s.db.Close()
	}
	return errors.Join(err, s.owner.Release())
}

func openSQLite(path string) (*SQLiteStore, error) {
	// Without cgo, go-sqlite3 compiles to stand-ins that do nothing.
	if _, ok := any((*sqlite3.SQLiteConn)(nil)).(driver.Conn); !ok {
		return nil, errors.New("OpenSQLite needs cgo, and this program was built without: " +
			"build it with CGO_ENABLED=1, or open the database with another driver and pass it to NewSQLiteStore")
	}
	if path == ":memory:" {
		own, err := owner.New("")
		if err != nil {
			return nil, err
		}
		return openPool(path, own, 1) // another connection would be another database
	}
	path, exists, err := resolve(path)
	if err != nil {
		return nil, err
	}
	own, err := owner.New(path)
	if err != nil {
		return nil, fmt.Errorf("%w: the directory must be writable", err)
	}
	if !exists {
		if err := create(path, own.Path()); err != nil {
			return nil, errors.Join(err, own.Release())
		}
	}
	return openPool(path, own, max(4, runtime.NumCPU()))
}

// resolve returns the path that SQLite will use for the file, whether there is
// a file, and an error if a database can't be there.
func resolve(path string) (resolved string, exists bool, err error) {
	if path == "" {
		return "", false, errors.New("the path is empty: choose one, or \":memory:\"")
	}
	if strings.ContainsRune(path, 0) {
		return "", false, errors.New("the path contains a NUL byte: choose another one")
	}
	if os.IsPathSeparator(path[len(path)-1]) || filepath.Base(path) == "." { // or else the file would be called like the directory
		return "", false, errors.New("the path names a directory: choose a file in it")
	}
	path, err = filepath.Abs(path)
	if err != nil {
		return "", false, err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, fmt.Errorf("there is no directory %s: create it first", filepath.Dir(path))
	}
	if err != nil {
		return "", false, fmt.Errorf("%s: %w: choose another path", filepath.Dir(path), err)
	}
	path = filepath.Join(dir, filepath.Base(path))
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return path, false, nil
	}
	path, err = filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, fmt.Errorf("the symbolic link leads nowhere: %w: remove it, or choose another path", err)
	}
	if err != nil {
		return "", false, fmt.Errorf("%w: make sure that you may use that path", err)
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", false, err
	case !info.Mode().IsRegular():
		return "", false, fmt.Errorf("%s is not a regular file: choose another path", path)
	case info.Mode().Perm()&0o222 == 0: // root could write it, but was told not to
		return "", false, fmt.Errorf("%s is read-only: make it writable, or choose another path", path)
	}
	return path, true, nil
}

// create creates an empty database, with the mode of the file modeOf.
func create(path, modeOf string) error {
	params := []string{"mode", "rwc"}
	if modeOf != "" {
		params = append(params, "modeof", modeOf)
	}
	db, err := sql.Open("sqlite3", dsn(path, params...))
	if err != nil {
		return err
	}
	return errors.Join(db.Ping(), db.Close())
}

// openPool opens an existing database, or one in memory. A file is not created
// again should somebody delete it under the running program: that must not go
// unnoticed.
func openPool(path string, own *owner.Owner, conns int) (*SQLiteStore, error) {
	mode := "rw"
	if path == ":memory:" {
		mode = "memory"
	}
	db, err := sql.Open("sqlite3", dsn(path, "mode", mode))
	if err != nil {
		return nil, errors.Join(err, own.Release())
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	s := &SQLiteStore{db: db, owns: true, owner: own}
	if mode == "rw" {
		s.path = path
		if s.file, err = os.Stat(path); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	if err := s.init(mode == "rw"); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// dsn returns the data source name for a path and SQLite's own URI parameters.
// The settings are in there because a PRAGMA would reach one connection only.
func dsn(path string, params ...string) string {
	path = filepath.ToSlash(path)
	if filepath.VolumeName(path) != "" {
		path = "/" + path
	}
	s := "file:" + (&url.URL{Path: path}).EscapedPath() +
		"?_synchronous=FULL&_stmt_cache_size=16&_busy_timeout=" + strconv.FormatInt(busyTimeout.Milliseconds(), 10)
	for kv := range slices.Chunk(params, 2) {
		// SQLite knows no + for a space.
		s += "&" + kv[0] + "=" + strings.ReplaceAll(url.QueryEscape(kv[1]), "+", "%20")
	}
	return s
}

func newSQLiteStore(db *sql.DB) (*SQLiteStore, error) {
	if db == nil {
		return nil, errors.New("the *sql.DB is nil")
	}
	s := &SQLiteStore{db: db}
	var file sql.NullString
	if err := s.connect(); err != nil {
		return nil, err
	}
	var seq, name any // nothing of this needs the database to be unlocked
	err := db.QueryRow(`PRAGMA database_list`).Scan(&seq, &name, &file)
	if err != nil {
		return nil, fmt.Errorf("can't ask for its file (is it SQLite?): %w: use an SQLite database", err)
	}
	s.owner, err = owner.New(file.String)
	if err != nil {
		return nil, fmt.Errorf("%w: the directory must be writable", err)
	}
	if err := s.init(false); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// connect waits until there is a connection: to open one may need the lock.
func (s *SQLiteStore) connect() error {
	deadline := time.Now().Add(writeTimeout)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	return s.unlocked(deadline, func() error { return s.db.PingContext(ctx) })
}

// The table as SPEC.md has it, with what this package adds at the end.
const createTable = `
CREATE TABLE tasks (
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
    owner TEXT
)`

// The index serves recovery, and stays small however long the history is. A
// query uses it only if it repeats the very term.
const createIndex = `CREATE INDEX IF NOT EXISTS tasks_state_not_done ON tasks (state) WHERE state <> 'DONE'`

var (
	requiredColumns = []string{"id", "name", "state", "progress", "metadata", "result", "error", "created_at", "updated_at"}
	addedColumns    = []string{"started_at DATETIME", "owner TEXT"}
)

// init makes the database ready. It changes nothing before it knows that the
// database can be used.
func (s *SQLiteStore) init(wal bool) error {
	_, err := missing(func(query string) (answer []string, err error) {
		err = s.read(func() error {
			answer, err = texts(s.db, query)
			return err
		})
		return answer, err
	})
	if err != nil {
		return err
	}
	var refused error
	err = s.transact(func(c *sql.Conn) error {
		refused = complete(c)
		return refused
	})
	if refused != nil {
		return refused
	}
	if err != nil {
		return fmt.Errorf("can't be written: %w: make sure that you may write it and that no other program has it locked", err)
	}
	if wal {
		return s.enterWAL()
	}
	return nil
}

// complete adds what is missing. The database is locked by now, and looked at
// again: it was not before.
func complete(c *sql.Conn) error {
	stmts, err := missing(func(query string) ([]string, error) { return texts(c, query) })
	if err != nil {
		return err
	}
	for _, stmt := range stmts {
		if err := exec(c, stmt); err != nil {
			return fmt.Errorf("can't be written: %w: make sure that you may write it", err)
		}
	}
	return trial(c)
}

// enterWAL switches the file to WAL mode. While several processes do that at
// once, SQLite doesn't wait for the busy timeout.
func (s *SQLiteStore) enterWAL() error {
	var mode string
	err := retry(time.Now().Add(writeTimeout), func() error {
		return s.db.QueryRow("PRAGMA journal_mode = WAL").Scan(&mode)
	})
	if err == nil && mode != "wal" {
		err = fmt.Errorf("the journal mode stays %q", mode)
	}
	if err != nil {
		return fmt.Errorf("can't switch to WAL mode: %w", err)
	}
	return nil
}

// advice says what to do about a table tasks that is something else.
const advice = "use another database, or rename that table"

// missing returns the statements that make the database ready, or an error if
// a table called tasks is something else. It asks by way of ask, which
// returns the first column of a query's rows.
func missing(ask func(query string) ([]string, error)) ([]string, error) {
	kinds, err := ask(`SELECT type FROM sqlite_master WHERE name = 'tasks' COLLATE NOCASE AND type IN ('table', 'view')`)
	if err != nil {
		return nil, fmt.Errorf("can't be read as an SQLite database: %w: make sure that it is one, that you may read and write it, and that no other program has it locked", err)
	}
	if len(kinds) == 0 {
		return []string{createTable, createIndex}, nil
	}
	if kinds[0] != "table" {
		return nil, fmt.Errorf("there is a %s called tasks in it: %s", kinds[0], advice)
	}
	columns, err := ask(`SELECT lower(name) FROM pragma_table_info('tasks')`)
	if err != nil {
		return nil, err
	}
	lacks := slices.DeleteFunc(slices.Clone(requiredColumns), func(c string) bool { return slices.Contains(columns, c) })
	if len(lacks) > 0 {
		return nil, fmt.Errorf("there is a table called tasks in it that is something else, it has no column %s: %s",
			strings.Join(lacks, ", "), advice)
	}
	key, err := ask(`SELECT lower(name) FROM pragma_table_info('tasks') WHERE pk > 0`)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(key, []string{"id"}) {
		return nil, fmt.Errorf("there is a table called tasks in it whose primary key is not id: %s", advice)
	}
	// Of a table, this lists the key by which it is stored if that is not the rowid.
	stored, err := ask(`SELECT name FROM pragma_index_info('tasks')`)
	if err != nil {
		return nil, err
	}
	if len(stored) > 0 || slices.Contains(columns, "rowid") {
		return nil, fmt.Errorf("there is a table called tasks in it without a rowid of SQLite's own: %s", advice)
	}
	var stmts []string
	for _, c := range addedColumns {
		if name, _, _ := strings.Cut(c, " "); !slices.Contains(columns, name) {
			stmts = append(stmts, "ALTER TABLE tasks ADD COLUMN "+c)
		}
	}
	indexes, err := ask(`SELECT name FROM pragma_index_list('tasks')`)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(indexes, "tasks_state_not_done") {
		stmts = append(stmts, createIndex)
	}
	return stmts, nil
}

// A querier is a *sql.DB or a *sql.Conn.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// texts returns the first column of a query's rows.
func texts(q querier, query string) ([]string, error) {
	rows, err := q.QueryContext(context.Background(), query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			return nil, err
		}
		all = append(all, text)
	}
	return all, rows.Err()
}

// trial writes an operation and takes that back: a table that looks right may
// have constraints or triggers that won't let it.
//
// The pages that it has touched are written and synced by the COMMIT all the
// same, and have to be: a process that was killed after writing a commit and
// before syncing it has left one that everybody sees from now on, but that a
// loss of power would still take back. See internal/powerloss.
func trial(c *sql.Conn) error {
	id := "00000000-0000-0000-0000-000000000000"
	now := time.Now().UTC()
	op := &Operation{ID: id, Name: "trial", State: StatePending, CreatedAt: now, UpdatedAt: now}
	if err := exec(c, "SAVEPOINT task_trial"); err != nil {
		return err
	}
	err := insert(c, op, "")
	if err == nil {
		op.State = StateDone
		err = update(c, op)
	}
	if err != nil {
		return fmt.Errorf("the table tasks in it won't take an operation: %w: make sure that you may write it, or %s", err, advice)
	}
	return errors.Join(exec(c, "ROLLBACK TO task_trial"), exec(c, "RELEASE task_trial"))
}

func exec(c *sql.Conn, query string) error {
	_, err := c.ExecContext(context.Background(), query)
	return err
}

// A row is an operation in the form in which it is stored. Databases written
// by one version of this package are read by all later ones, so these forms
// may be added to but not changed:
//
//   - the columns of createTable, of which other programs may read all and
//     have filled those of the specification in their own ways;
//   - metadata and result as JSON, NULL for none; error as NULL for none;
//   - times in UTC in the layout of timeFormat, NULL for none;
//   - owner as the UUID of the store that runs the operation.
//
// Everything is read as text. Drivers convert columns declared DATETIME each
// in its own way, and to some cells other code has written none of it applies.
type row struct {
	id, name, state                 string
	progress                        int64
	metadata, result, err           string
	createdAt, updatedAt, startedAt string
}

// columns are what a row is read from.
const columns = `coalesce(CAST(id AS TEXT), ''), coalesce(CAST(name AS TEXT), ''), coalesce(CAST(state AS TEXT), ''),
	coalesce(CAST(progress AS INTEGER), 0), coalesce(CAST(metadata AS TEXT), ''), coalesce(CAST(result AS TEXT), ''),
	coalesce(CAST(error AS TEXT), ''), coalesce(CAST(created_at AS TEXT), ''), coalesce(CAST(updated_at AS TEXT), ''),
	coalesce(CAST(started_at AS TEXT), '')`

func scan(rows *sql.Rows) (*Operation, error) {
	var r row
	err := rows.Scan(&r.id, &r.name, &r.state, &r.progress, &r.metadata, &r.result, &r.err,
		&r.createdAt, &r.updatedAt, &r.startedAt)
	if err != nil {
		return nil, err
	}
	return r.operation(), nil
}

// operation turns a row into an operation. What it can't make sense of becomes
// a zero value: one bad cell must not hide the rest of the history.
func (r *row) operation() *Operation {
	return &Operation{
		ID:        r.id,
		Name:      validUTF8(r.name),
		State:     State(r.state),
		Progress:  int(min(max(r.progress, 0), 100)),
		Metadata:  cellJSON(r.metadata),
		Result:    cellJSON(r.result),
		Error:     validUTF8(r.err),
		CreatedAt: cellTime(r.createdAt),
		StartedAt: cellTime(r.startedAt),
		UpdatedAt: cellTime(r.updatedAt),
	}
}

func cellJSON(cell string) any {
	if cell == "" || cell == "null" || !json.Valid([]byte(cell)) {
		return nil
	}
	return json.RawMessage(cell)
}

func insert(c *sql.Conn, op *Operation, owner string) error {
	metadata, result, err := jsonCells(op)
	if err != nil {
		return err
	}
	res, err := c.ExecContext(context.Background(), `INSERT INTO tasks
		(id, name, state, progress, metadata, result, error, created_at, updated_at, started_at, owner)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		op.ID, op.Name, string(op.State), op.Progress, metadata, result, textCell(op.Error),
		formatTime(op.CreatedAt), formatTime(op.UpdatedAt), timeCell(op.StartedAt), textCell(owner))
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil {
		return err
	} else if n == 0 {
		return errors.New("a trigger of the database has ignored the new row")
	}
	return nil
}

// update never finishes an operation twice and never makes one again that has
// been deleted.
func update(c *sql.Conn, op *Operation) error {
	metadata, result, err := jsonCells(op)
	if err != nil {
		return err
	}
	res, err := c.ExecContext(context.Background(), `UPDATE tasks
		SET state = ?, progress = ?, metadata = ?, result = ?, error = ?, updated_at = ?, started_at = ?
		WHERE id = ? AND state IN ('PENDING', 'RUNNING')`,
		string(op.State), op.Progress, metadata, result, textCell(op.Error),
		formatTime(op.UpdatedAt), timeCell(op.StartedAt), op.ID)
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil {
		return err
	} else if n == 0 {
		return ErrNotFound
	}
	return nil
}

func jsonCells(op *Operation) (metadata, result any, err error) {
	c := *op
	if err := c.encode(); err != nil {
		return nil, nil, err
	}
	m, _ := c.Metadata.(json.RawMessage)
	r, _ := c.Result.(json.RawMessage)
	return textCell(string(m)), textCell(string(r)), nil
}

// textCell returns NULL for an empty text.
func textCell(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func timeCell(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return formatTime(t)
}

// timeFormat has a fixed width, so that the order of texts is that of times,
// and is one that SQLite's date functions read.
const timeFormat = "2006-01-02 15:04:05.000000"

func formatTime(t time.Time) string { return t.UTC().Format(timeFormat) }

// The layouts in which other code writes times: SQLite's CURRENT_TIMESTAMP,
// go-sqlite3, RFC 3339, the SQLite shell. Parse takes fractions of a second
// also where a layout has none.
var timeLayouts = []string{
	"2006-01-02 15:04:05",
	"2006-01-02 15:04:05Z07:00",
	"2006-01-02T15:04:05Z07:00",
	"2006-01-02T15:04:05",
	"2006-01-02 15:04:05 -0700",
	"2006-01-02 15:04",
	"2006-01-02T15:04",
	"2006-01-02",
}

// cellTime returns the zero time for what is none, and for what JSON can't say.
func cellTime(cell string) time.Time {
	t := parseTime(cell)
	if y := t.Year(); y < 0 || y > 9999 {
		return time.Time{}
	}
	return t
}

func parseTime(cell string) time.Time {
	if cell == "" {
		return time.Time{}
	}
	for _, layout := range timeLayouts {
		if t, err := time.Parse(layout, cell); err == nil {
			return t.UTC()
		}
	}
	// time.Time's String: "2006-01-02 15:04:05.999999999 -0700 MST m=+0.1",
	// of which the first three fields tell the time.
	if f := strings.Fields(cell); len(f) > 3 {
		return parseTime(strings.Join(f[:3], " "))
	}
	// Unix time in seconds, or in milliseconds.
	if n, err := strconv.ParseInt(cell, 10, 64); err == nil {
		if n > 1e11 {
			return time.UnixMilli(n).UTC()
		}
		return time.Unix(n, 0).UTC()
	}
	return time.Time{}
}

// Save implements [Persistence].
func (s *SQLiteStore) Save(op *Operation) error {
	return s.WriteBatch([]*Operation{op}, nil)[0]
}

// Update implements [Persistence].
func (s *SQLiteStore) Update(op *Operation) error {
	return s.WriteBatch(nil, []*Operation{op})[0]
}

// WriteBatch implements [BatchWriter]. Drivers have errors of their own each, so
// whom an error concerns is told by where it occurs. Begin and commit are
// everybody's: if they fail, so does the whole batch. If a statement fails, it
// may be its operation's fault: that is then tried alone, between the others.
func (s *SQLiteStore) WriteBatch(saves, updates []*Operation) []error {
	b := &batch{store: s, saves: saves, updates: updates, errs: make([]error, len(saves)+len(updates))}
	b.write(0, len(b.errs))
	return b.errs
}

type batch struct {
	store          *SQLiteStore
	saves, updates []*Operation
	errs           []error // of saves, then of updates
}

// write stores the operations from up to to. It reports false if that is of no
// use any more.
func (b *batch) write(from, to int) bool {
	for from < to {
		failed, err := b.transact(from, to)
		if err == nil {
			return true
		}
		var own statementError
		if !errors.As(err, &own) {
			copy(b.errs[from:], slices.Repeat([]error{err}, len(b.errs)-from))
			return false
		}
		if to-from == 1 {
			b.errs[from] = err
			return true
		}
		if !b.write(from, failed) || !b.write(failed, failed+1) {
			return false
		}
		from = failed + 1
	}
	return true
}

// transact stores the operations from up to to in one transaction. If a
// statement fails, that is a statementError, and failed says whose it was.
func (b *batch) transact(from, to int) (failed int, err error) {
	err = b.store.transact(func(c *sql.Conn) error {
		for i := from; i < to; i++ {
			if i < len(b.saves) {
				err = insert(c, b.saves[i], b.store.owner.ID)
			} else {
				err = update(c, b.updates[i-len(b.saves)])
			}
			if b.errs[i] = err; err != nil && !errors.Is(err, ErrNotFound) { // which has changed nothing
				failed = i
				return statementError{err}
			}
		}
		return nil
	})
	return failed, err
}

// A statementError is one that a single operation may be to blame for.
type statementError struct{ error }

func (e statementError) Unwrap() error { return e.error }

// transact calls f in a transaction that may write from its beginning.
func (s *SQLiteStore) transact(f func(*sql.Conn) error) error {
	deadline := time.Now().Add(writeTimeout)
	forConn := deadline
	if s.owns {
		forConn = deadline.Add(-busyTimeout)
	}
	// The context is not passed on to statements: for each one go-sqlite3
	// would start a goroutine.
	ctx, cancel := context.WithDeadline(context.Background(), forConn)
	defer cancel()
	var c *sql.Conn
	err := s.unlocked(deadline, func() (err error) {
		c, err = s.db.Conn(ctx) // to open one may need the lock
		return err
	})
	if errors.Is(err, context.DeadlineExceeded) { // which is no caller's
		return errors.New("no connection to the database became free in time")
	}
	if err != nil {
		return fmt.Errorf("no connection to the database: %w", err)
	}
	defer c.Close()
	if err := s.unlocked(deadline, func() error { return exec(c, "BEGIN IMMEDIATE") }); err != nil {
		return err
	}
	err = f(c)
	if err == nil {
		err = s.commit(c, deadline)
	}
	if err != nil {
		rollback(c)
	}
	return err
}

// commit commits. With a rollback journal that may have to wait for readers.
func (s *SQLiteStore) commit(c *sql.Conn, deadline time.Time) error {
	var final error
	err := s.unlocked(deadline, func() error {
		err := exec(c, "COMMIT")
		if err != nil && !inTransaction(c) { // it has been rolled back
			final = err
			return nil
		}
		return err
	})
	return errors.Join(final, err)
}

func rollback(c *sql.Conn) {
	if exec(c, "ROLLBACK") != nil && inTransaction(c) {
		// Nobody else may get this connection.
		c.Raw(func(any) error { return driver.ErrBadConn })
	}
}

// inTransaction reports whether c may be in a transaction: SQLite does not
// nest them, and to begin one takes no lock.
func inTransaction(c *sql.Conn) bool {
	if exec(c, "BEGIN") != nil {
		return true
	}
	return exec(c, "ROLLBACK") != nil
}

// unlocked calls f until it succeeds or the deadline has passed, if waiting for
// locks is the store's business. It is SQLite's in a database that the store
// opened, by way of the busy timeout.
func (s *SQLiteStore) unlocked(deadline time.Time, f func() error) error {
	if s.owns {
		if err := s.gone(); err != nil {
			return err
		}
		return f()
	}
	var closed error
	err := retry(deadline, func() error {
		err := f()
		if err != nil {
			if closed = s.closed(); closed != nil {
				return nil
			}
		}
		return err
	})
	return errors.Join(closed, err)
}

// closed returns an error if the application has closed its database, and
// that without waiting for a connection or opening one.
func (s *SQLiteStore) closed() error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.db.PingContext(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// gone returns an error if the database file is no longer where it was: SQLite
// would go on with one that nobody will find again.
func (s *SQLiteStore) gone() error {
	if s.path == "" {
		return nil
	}
	now, err := os.Stat(s.path)
	if err == nil && !os.SameFile(now, s.file) {
		err = fmt.Errorf("%s is another file by now", s.path)
	}
	if err != nil {
		return fmt.Errorf("the database was removed while it was open: %w", err)
	}
	return nil
}

// retry calls f until it succeeds or the deadline has passed.
func retry(deadline time.Time, f func() error) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := f()
		if err == nil || time.Until(deadline) < wait {
			return err
		}
		time.Sleep(wait)
	}
}

// List implements [Persistence].
func (s *SQLiteStore) List(limit, offset int) ([]*Operation, error) {
	return s.query(`SELECT `+columns+` FROM tasks ORDER BY rowid DESC LIMIT ? OFFSET ?`, limit, offset)
}

// ListFiltered implements [FilteredLister]. By state it uses the index, except
// for those DONE.
func (s *SQLiteStore) ListFiltered(f Filter, limit, offset int) ([]*Operation, error) {
	var where []string
	var args []any
	if f.Name != "" {
		where = append(where, `name = ?`)
		args = append(args, f.Name)
	}
	if f.Before != "" {
		where = append(where, `rowid < (SELECT rowid FROM tasks WHERE id IN (?, CAST(? AS BLOB)) LIMIT 1)`)
		args = append(args, f.Before, f.Before)
	}
	if len(f.States) > 0 {
		last := int64(min(uint64(limit)+uint64(offset), math.MaxInt64))
		where, args = whereState(f.States, where, args, last)
	}
	query := `SELECT ` + columns + ` FROM tasks`
	if len(where) > 0 {
		query += ` WHERE ` + strings.Join(where, ` AND `)
	}
	ops, err := s.query(query+` ORDER BY rowid DESC LIMIT ? OFFSET ?`, append(args, limit, offset)...)
	if err == nil && len(ops) == 0 && f.Before != "" {
		_, err = s.Get(f.Before)
	}
	return ops, err
}

// whereState has the last rows found that are in one of those states, and for
// which where holds. Each state has a query of its own, because only so is
// each answered in the order of the index.
func whereState(states []State, where []string, args []any, last int64) ([]string, []any) {
	var queries []string
	var all []any
	for _, state := range states {
		terms := append([]string{`state = ?`}, where...)
		if state != StateDone {
			terms = append(terms, `state <> 'DONE'`)
		}
		queries = append(queries, `SELECT rowid FROM (SELECT rowid FROM tasks WHERE `+strings.Join(terms, ` AND `)+
			` ORDER BY rowid DESC LIMIT ?)`)
		all = append(append(append(all, string(state)), args...), last)
	}
	return []string{`rowid IN (` + strings.Join(queries, ` UNION ALL `) + `)`}, all
}

// Get implements [Persistence].
func (s *SQLiteStore) Get(id string) (*Operation, error) {
	ops, err := s.query(`SELECT `+columns+` FROM tasks WHERE id IN (?, CAST(? AS BLOB)) LIMIT 1`, id, id)
	if err != nil {
		return nil, err
	}
	if len(ops) == 0 {
		return nil, ErrNotFound
	}
	return ops[0], nil
}

// query returns the operations that a query selects.
func (s *SQLiteStore) query(query string, args ...any) (ops []*Operation, err error) {
	err = s.read(func() error {
		rows, err := s.db.Query(query, args...)
		if err != nil {
			return err
		}
		ops, err = scanAll(rows)
		return err
	})
	return ops, err
}

func scanAll(rows *sql.Rows) ([]*Operation, error) {
	defer rows.Close()
	var ops []*Operation
	for rows.Next() {
		op, err := scan(rows)
		if err != nil {
			return nil, err
		}
		ops = append(ops, op)
	}
	return ops, rows.Err()
}

// read calls f, which only reads, until the database is not locked.
func (s *SQLiteStore) read(f func() error) error {
	return s.unlocked(time.Now().Add(writeTimeout), f)
}

// unfinished repeats the index's own term.
const unfinished = `state <> 'DONE' AND state IN ('PENDING', 'RUNNING', CAST('PENDING' AS BLOB), CAST('RUNNING' AS BLOB))`

// recoverChunk is how many operations one transaction of Recover changes, so
// that the writes of the living are not held up by a long history of the dead.
const recoverChunk = 1000

// Recover implements [Recoverer]. An operation is an orphan if its row has no
// owner, or one whose lock nobody holds.
func (s *SQLiteStore) Recover(reason string) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		owners, err := s.owners()
		if err != nil {
			yield(nil, err)
			return
		}
		for _, o := range owners {
			done, dead := s.owner.Dead(o.String)
			if !dead {
				continue
			}
			ok := s.recoverFrom(o, reason, yield)
			done(ok)
			if !ok {
				return
			}
		}
	}
}

// owners returns the owners of unfinished operations, and those that have left
// nothing but a file.
func (s *SQLiteStore) owners() ([]sql.NullString, error) {
	var owners []sql.NullString
	err := s.read(func() error {
		owners = nil
		rows, err := s.db.Query(`SELECT DISTINCT CAST(owner AS TEXT) FROM tasks WHERE ` + unfinished)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var o sql.NullString
			if err := rows.Scan(&o); err != nil {
				return err
			}
			owners = append(owners, o)
		}
		return rows.Err()
	})
	for _, id := range s.owner.Others() {
		if o := (sql.NullString{String: id, Valid: true}); !slices.Contains(owners, o) {
			owners = append(owners, o)
		}
	}
	return owners, err
}

// recoverFrom yields what it has recovered from a dead owner, and reports
// whether to go on.
func (s *SQLiteStore) recoverFrom(o sql.NullString, reason string, yield func(*Operation, error) bool) bool {
	for {
		var ops []*Operation
		err := s.transact(func(c *sql.Conn) (err error) {
			ops, err = failOrphans(c, o, reason)
			return err
		})
		if err != nil {
			yield(nil, err)
			return false
		}
		for _, op := range ops {
			if !yield(op, nil) {
				return false
			}
		}
		if len(ops) < recoverChunk {
			return true
		}
	}
}

// failOrphans marks some operations of a dead owner as failed. It touches no
// cell that this does not concern: other code may have written it.
func failOrphans(c *sql.Conn, o sql.NullString, reason string) ([]*Operation, error) {
	ctx := context.Background()
	now := time.Now().UTC().Truncate(time.Microsecond)
	rows, err := c.QueryContext(ctx, `UPDATE tasks SET state = 'FAILED', error = ?, updated_at = max(updated_at, ?)
		WHERE rowid IN (SELECT rowid FROM tasks WHERE `+unfinished+` AND CAST(owner AS TEXT) IS ? LIMIT ?)
		RETURNING `+columns, reason, formatTime(now), o, recoverChunk)
	if err != nil {
		return nil, err
	}
	ops, err := scanAll(rows)
	if err != nil {
		return nil, err
	}
	for _, op := range ops {
		// In timeFormat that max is all; other layouts take a closer look.
		updated := latest(now, op.UpdatedAt, op.StartedAt, op.CreatedAt)
		if updated.Equal(op.UpdatedAt) {
			continue
		}
		op.UpdatedAt = updated
		// Other code may have stored two IDs that read the same.
		if _, err := c.ExecContext(ctx, `UPDATE tasks SET updated_at = ? WHERE id IN (?, CAST(? AS BLOB)) AND state = 'FAILED' AND error = ?`,
			formatTime(updated), op.ID, op.ID, reason); err != nil {
			return nil, err
		}
	}
	return ops, nil
}

// pruneChunk is how many rows Prune looks at, and at most deletes, at a time.
const pruneChunk = 100

// Prune implements [Pruner]. The file does not get smaller, but what is deleted
// makes room in it.
func (s *SQLiteStore) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		var after sql.NullString // the ID of the last row that stays
		for {
			ids, old, err := s.oldest(after, before)
			if err != nil {
				yield(0, err)
				return
			}
			if len(ids) == 0 {
				return
			}
			start := time.Now()
			n, err := s.delete(old)
			if !yield(n, err) || err != nil {
				return
			}
			for _, id := range ids {
				if !old[id] {
					after = sql.NullString{String: id, Valid: true}
				}
			}
			time.Sleep(time.Since(start)) // in which others may write
		}
	}
}

const finished = `state IN ('DONE', 'FAILED', 'CANCELLED')`

// oldest returns the IDs of the first rows after one, or of all if there is no
// such row, and which of them Prune may delete.
func (s *SQLiteStore) oldest(after sql.NullString, before time.Time) (ids []string, old map[string]bool, err error) {
	err = s.read(func() error {
		ids, old = nil, make(map[string]bool)
		rows, err := s.db.Query(`SELECT id, coalesce(`+finished+`, 0), coalesce(CAST(updated_at AS TEXT), '') FROM tasks
			WHERE rowid > coalesce((SELECT rowid FROM tasks WHERE id = ?), -9223372036854775808) AND typeof(id) = 'text'
			ORDER BY rowid LIMIT ?`, after, pruneChunk)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var id, updated string
			var finished bool
			if err := rows.Scan(&id, &finished, &updated); err != nil {
				return err
			}
			ids = append(ids, id)
			if at := cellTime(updated); finished && !at.IsZero() && at.Before(before) {
				old[id] = true
			}
		}
		return rows.Err()
	})
	return ids, old, err
}

// delete deletes finished operations, and takes out of ids those that stay,
// because a trigger of the database wants it so.
func (s *SQLiteStore) delete(ids map[string]bool) (n int, err error) {
	if len(ids) == 0 {
		return 0, nil
	}
	var stay []string
	err = s.transact(func(c *sql.Conn) error {
		n, stay = 0, nil
		for id := range ids {
			res, err := c.ExecContext(context.Background(), `DELETE FROM tasks WHERE id = ? AND `+finished, id)
			if err != nil {
				return err
			}
			deleted, err := res.RowsAffected()
			if err != nil {
				return err
			}
			if n += int(deleted); deleted > 0 {
				continue
			}
			var left int
			if err := c.QueryRowContext(context.Background(), `SELECT count(*) FROM tasks WHERE id = ?`, id).Scan(&left); err != nil {
				return err
			}
			if left > 0 {
				stay = append(stay, id)
			}
		}
		return nil
	})
	for _, id := range stay {
		delete(ids, id)
	}
	return n, err
}
