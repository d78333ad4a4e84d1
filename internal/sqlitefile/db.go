// Package sqlitefile opens SQLite databases, prepares tables in them, and runs reads and
// transactions that wait while the database is locked. It works with any SQLite driver,
// and does not know what the tables contain.
package sqlitefile

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"iter"
	"os"
	"sync"
	"time"
)

// A DB is an open database. Its methods may be called concurrently.
type DB struct {
	*sql.DB         // the pool for writes
	reads   *sql.DB // for reads; the same pool if there may be no other

	// Timeout bounds each Read and, through Deadline, each Write, including the wait for
	// a connection. Change it only before the first call.
	Timeout time.Duration

	path string      // of the database file; "" if there is none
	info os.FileInfo // of the file when it was opened
	owns bool        // Close closes the pools

	mu       sync.Mutex // guards the fields below, and every use of kept
	watchers int        // calls of Changes
	kept     *sql.Conn  // for version, or nil
	keeps    int64      // how often version has begun to keep a connection
	closed   bool       // Close was called
}

// DefaultTimeout is the Timeout of a new DB. Tests that wait for it shorten it before they
// open a database.
var DefaultTimeout = 10 * time.Second

const readConns = 4 // the connections for reads of a database that Open has opened

// Open opens the database file at a path that Resolve has returned, or a new database in
// memory for "". A new file gets the mode and owner of the file modeOf, unless that is "".
// The database is written with synchronous=FULL. Open needs the go-sqlite3 driver.
//
// Writes have a connection of their own, which readers can't keep busy.
func Open(path, modeOf string) (*DB, error) {
	if path == "" {
		db, err := open(dsn(":memory:", "memory", ""), 1)
		if err != nil {
			return nil, err
		}
		return (&DB{DB: db, reads: db, owns: true}).prepared() // another connection would be another database
	}
	if _, err := os.Stat(path); err != nil {
		// SQLite itself creates the file: if this process opened and closed the file, SQLite
		// would lose its locks on it.
		db, err := openPool(dsn(path, "rwc", modeOf))
		if err != nil {
			return nil, err
		}
		if err := errors.Join(db.Ping(), db.Close()); err != nil {
			return nil, err
		}
	}
	return OpenExisting(path)
}

// OpenExisting is Open for an existing file. If the file is deleted later, it is not
// silently created again.
func OpenExisting(path string) (*DB, error) {
	existing := dsn(path, "rw", "")
	writes, err := open(existing, 1)
	if err != nil {
		return nil, err
	}
	reads, err := open(existing, readConns)
	if err != nil {
		return nil, errors.Join(err, writes.Close())
	}
	return (&DB{DB: writes, reads: reads, path: path, owns: true}).prepared()
}

// open returns a pool that keeps so many connections.
func open(dsn string, conns int) (*sql.DB, error) {
	db, err := openPool(dsn)
	if err == nil {
		db.SetMaxOpenConns(conns)
		db.SetMaxIdleConns(conns)
	}
	return db, err
}

// Use returns a DB for an application's database, and does not change its settings. It
// returns an error before writing anything if the database can't keep what is written.
func Use(db *sql.DB) (*DB, error) {
	if db == nil {
		return nil, errors.New("the *sql.DB is nil")
	}
	return (&DB{DB: db, reads: db}).prepared()
}

// prepared returns d if the database is suitable, and otherwise closes it.
func (d *DB) prepared() (*DB, error) {
	d.Timeout = DefaultTimeout
	if err := d.prepare(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// prepare checks that the database is suitable, and determines its file.
func (d *DB) prepare() error {
	var version, journal string
	var file sql.NullString
	err := d.Read(context.Background(), func(c *sql.Conn) error {
		return c.QueryRowContext(context.Background(), `SELECT sqlite_version(), (SELECT journal_mode FROM pragma_journal_mode),
			(SELECT file FROM pragma_database_list WHERE seq = 0)`).Scan(&version, &journal, &file)
	})
	switch {
	case err != nil:
		return fmt.Errorf("can't be read as an SQLite database: %w: make sure that it is one, that you may read and write it, and that no other program has it locked", err)
	case tooOld(version):
		return fmt.Errorf("its driver has SQLite %s: use a driver with SQLite 3.38 or later", version)
	case journal == "off":
		return errors.New("its journal_mode is OFF, which can't undo a failed transaction: use another journal_mode")
	case file.String == "" && d.Stats().MaxOpenConnections != 1:
		return errors.New("it has no file, so that each connection may be a database of its own: use SetMaxOpenConns(1)")
	case file.String == "":
		return nil
	case !d.owns && d.Stats().MaxOpenConnections != 1 && d.sharedCache():
		return errors.New("its connections share a cache, in which readers and writers of a table lock each other out: " +
			"open it without cache=shared, or use SetMaxOpenConns(1)")
	}
	d.path = cmp.Or(d.path, file.String)
	if d.info, err = os.Stat(d.path); err != nil {
		return err
	}
	return onlyName(d.path, d.info)
}

// tooOld reports whether a version of SQLite lacks something that this module needs:
// json_each is built in since 3.38, everything else is older.
func tooOld(version string) bool {
	var major, minor int
	fmt.Sscanf(version, "%d.%d", &major, &minor)
	return major < 3 || major == 3 && minor < 38
}

// Path returns the path of the database file, "" if there is none.
func (d *DB) Path() string { return d.path }

// Close closes the database if Open has opened it.
func (d *DB) Close() error {
	if !d.owns {
		return nil
	}
	d.mu.Lock()
	d.closed = true
	d.drop() // Changes then ends
	d.mu.Unlock()
	return errors.Join(d.reads.Close(), d.DB.Close()) // they may be the same pool
}

// Read calls f, which must only read, with a connection. While the database is locked, it
// calls f again, until d.Timeout has passed or ctx is done. It does not interrupt f.
func (d *DB) Read(ctx context.Context, f func(*sql.Conn) error) error {
	return d.retry(ctx, d.reads, d.Deadline(), f)
}

// Deadline returns when a Write that begins now should give up.
func (d *DB) Deadline() time.Time { return time.Now().Add(d.Timeout) }

// Write calls f in a transaction that holds SQLite's write lock, and commits if f returns
// nil. While the database is locked, it retries with a new transaction until the deadline;
// f must set its results anew each time. Any other error ends Write at once.
func (d *DB) Write(deadline time.Time, f func(*sql.Conn) error) error {
	return d.retry(context.Background(), d.DB, deadline, func(c *sql.Conn) error {
		if err := Exec(c, "BEGIN IMMEDIATE"); err != nil {
			return err
		}
		err := f(c)
		if err == nil {
			// With a rollback journal, SQLite admits no new readers during these retries.
			err = wait(deadline, func(err error) bool { return code(err) == busy }, func() error { return Exec(c, "COMMIT") })
		}
		if err != nil {
			d.rollback(c, deadline)
		}
		return err
	})
}

// rollback ends the transaction of a connection before it returns to the pool. It closes a
// connection that stays in the transaction, except that of a database without a file, which
// would be lost.
func (d *DB) rollback(c *sql.Conn, deadline time.Time) {
	for Exec(c, "ROLLBACK") != nil && InTransaction(c) {
		if d.path != "" || time.Now().After(deadline) {
			c.Raw(func(any) error { return driver.ErrBadConn })
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// InTransaction reports whether c may be in a transaction. SQLite does not nest
// transactions, and needs no lock to begin one.
func InTransaction(c *sql.Conn) bool {
	return Exec(c, "BEGIN") != nil || Exec(c, "ROLLBACK") != nil
}

// retry calls f with a connection of a pool, and again while f fails because of a lock,
// until the deadline or until ctx is done.
func (d *DB) retry(ctx context.Context, pool *sql.DB, deadline time.Time, f func(*sql.Conn) error) error {
	if err := d.checkFile(); err != nil {
		return err
	}
	// Only the wait for a connection gets the context: with one, go-sqlite3 would start a
	// goroutine for each statement.
	bounded, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	timedOut := errors.New("timed out waiting for a connection to the database")
	return wait(deadline, Locked, func() error {
		c, err := pool.Conn(bounded) // may fail because of a lock, too
		switch {
		case err == nil:
			defer c.Close()
			err = f(c)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, context.DeadlineExceeded):
			return timedOut // or the last error of the database
		default:
			err = fmt.Errorf("no connection to the database: %w", err)
		}
		timedOut = cmp.Or(err, timedOut)
		return err
	})
}

// checkFile returns an error if the database file is no longer the one that was opened:
// SQLite would continue to write to a file that nobody can find.
func (d *DB) checkFile() error {
	if d.info == nil {
		return nil
	}
	info, err := os.Stat(d.path)
	if err == nil && !os.SameFile(info, d.info) {
		err = errors.New("another file is there now")
	}
	if err != nil {
		return fmt.Errorf("%s was removed or replaced while it was open: %w", d.path, err)
	}
	return nil
}

// wait calls f until it succeeds, fails with an error that is not worth a retry, or the
// deadline has passed.
func wait(deadline time.Time, again func(error) bool, f func() error) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := f()
		if err == nil || !again(err) || time.Until(deadline) < pause {
			return err
		}
		time.Sleep(pause)
	}
}

// Exec executes a statement without arguments.
func Exec(c *sql.Conn, query string) error {
	_, err := c.ExecContext(context.Background(), query)
	return err
}

// Each reads each row of a query into cells, as [sql.Rows.Scan] does, and then calls f.
func Each(c *sql.Conn, query string, args []any, f func(), cells ...any) error {
	rows, err := c.QueryContext(context.Background(), query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(cells...); err != nil {
			return err
		}
		f()
	}
	return cmp.Or(rows.Err(), rows.Close())
}

// Strings returns the first column of a query's rows.
func Strings(c *sql.Conn, query string, args ...any) (all []string, err error) {
	var s string
	err = Each(c, query, args, func() { all = append(all, s) }, &s)
	return all, err
}

// Changes yields nil at once, and then checks at the interval every, and yields nil if any
// commit has changed the database since it last yielded. It ends when ctx is done, or with
// an error. All callers together keep one connection. While the pool has no other free one,
// they keep none, and each yields every time.
func (d *DB) Changes(ctx context.Context, every time.Duration) iter.Seq[error] {
	return func(yield func(error) bool) {
		d.watch(1)
		defer d.watch(-1)
		for last := int64(0); ; {
			version, err := d.version(ctx)
			changed := err != nil || version == 0 || version != last
			if ctx.Err() != nil || changed && !yield(err) || err != nil || !pause(ctx, every) {
				return
			}
			last = version
		}
	}
}

// watch adds n to the number of callers of Changes.
func (d *DB) watch(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.watchers += n; d.watchers == 0 {
		d.drop()
	}
}

// version returns a number that changes with each commit on another connection than the
// one that it keeps for this, or 0 if the pool has no connection to spare.
func (d *DB) version(ctx context.Context) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return 0, sql.ErrConnDone
	}
	s := d.reads.Stats()
	spare := s.MaxOpenConnections - s.InUse
	switch {
	case d.kept != nil && s.MaxOpenConnections > 0 && spare < 1:
		d.drop()
	case d.kept == nil && (s.MaxOpenConnections == 0 || spare > 1):
		// Others may take the free connections meanwhile: then it keeps none.
		soon, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		var err error
		if d.kept, err = d.reads.Conn(soon); err != nil && soon.Err() == nil {
			return 0, err
		}
		d.keeps++ // SQLite's numbers of two connections are not comparable
	}
	if d.kept == nil {
		return 0, nil
	}
	var n int64
	err := d.kept.QueryRowContext(context.Background(), "PRAGMA data_version").Scan(&n)
	if err != nil {
		d.drop()
	}
	return d.keeps<<32 | n, err
}

// drop gives back the connection that version keeps. The caller holds d.mu: a sql.Conn must
// not be closed while it is in use, or database/sql dereferences nil.
func (d *DB) drop() {
	if d.kept != nil {
		d.kept.Close()
		d.kept = nil
	}
}

// pause waits for d, or until ctx is done, and reports whether d has passed.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
