package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"
)

// A system stores jobs, runs them, and stores their final states.
type system struct {
	name   string
	tuning string // how it was tuned, besides the settings read back
	batch  int    // how many jobs one call of submit stores
	single bool   // it has only one submitter
	skip   string // why it can't be measured here; "" if it can
	open   func(env) (session, error)
}

// An env is the environment of a session.
type env struct {
	dir  string // its own, new and empty
	sync string // FULL or NORMAL
	jobs *tally
}

// path returns the path of the SQLite database.
func (e env) path() string { return filepath.Join(e.dir, "jobs.db") }

// A session is a running system with a database of its own.
type session interface {
	// submit stores n jobs, 1 or the system's batch, in one call of the
	// library, and returns the ID of the last. It may be called concurrently.
	submit(n int) (id string, err error)

	// wait waits until the final state of a job is stored, the way a user of
	// the library would learn it. One job is in the system at a time.
	wait(id string) error

	// drain waits until the final states of all n jobs that were submitted are
	// stored. Nothing is submitted after it.
	drain(n int) error

	// settings reads back what the system's own connections are set to.
	settings() (string, error)

	// finals counts the stored final states without using the library.
	finals() (int, error)

	close() error
}

// A tally counts the calls of a session's jobs, which do nothing else.
type tally struct {
	started atomic.Int64
	last    atomic.Int64 // the start of the last one, since epoch
}

var epoch = time.Now()

func (t *tally) run() {
	t.last.Store(int64(time.Since(epoch)))
	t.started.Add(1)
}

// openSQLite opens the database through mattn/go-sqlite3.
func (e env) openSQLite(conns int) (*sql.DB, error) {
	db, err := sql.Open("sqlite3", "file:"+(&url.URL{Path: e.path()}).EscapedPath()+
		"?_journal_mode=WAL&_synchronous="+e.sync+"&_busy_timeout=10000&_txlock=immediate&_stmt_cache_size=64")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

// count opens a new connection and returns the number that query selects.
func (e env) count(query string) (n int, err error) {
	db, err := e.openSQLite(1)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	err = db.QueryRow(query).Scan(&n)
	return n, err
}

// pragmas reads the settings of all open connections of db, which must agree.
func pragmas(db *sql.DB) (string, error) {
	var all []string
	for range max(1, db.Stats().OpenConnections) {
		c, err := db.Conn(context.Background())
		if err != nil {
			return "", err
		}
		defer c.Close() // at the end, so that each connection is another one
		var mode string
		var synchronous, pageSize int
		err = errors.Join(
			c.QueryRowContext(context.Background(), "PRAGMA journal_mode").Scan(&mode),
			c.QueryRowContext(context.Background(), "PRAGMA synchronous").Scan(&synchronous),
			c.QueryRowContext(context.Background(), "PRAGMA page_size").Scan(&pageSize))
		if err != nil {
			return "", err
		}
		all = append(all, fmt.Sprintf("journal_mode %s, synchronous %s, page_size %d",
			mode, [...]string{"OFF", "NORMAL", "FULL", "EXTRA"}[synchronous], pageSize))
	}
	if slices.Sort(all); all[0] != all[len(all)-1] {
		return "", fmt.Errorf("the connections differ: %q", all)
	}
	return all[0], nil
}

// patience is how long a system may take to store what it was given.
const patience = 2 * time.Minute

var errPatience = errors.New("timed out waiting for the final states")

// poll calls done every interval until it reports true.
func poll(every time.Duration, done func() (bool, error)) error {
	for start := time.Now(); time.Since(start) < patience; time.Sleep(every) {
		if ok, err := done(); ok || err != nil {
			return err
		}
	}
	return errPatience
}

// drainByCount is drain for a system without a notification: it counts the final
// states once all functions have been called.
func (e env) drainByCount(n int, finals func() (int, error)) error {
	err := poll(time.Millisecond, func() (bool, error) { return e.jobs.started.Load() >= int64(n), nil })
	if err != nil {
		return fmt.Errorf("%d of %d functions called: %w", e.jobs.started.Load(), n, err)
	}
	return poll(time.Millisecond, func() (bool, error) {
		got, err := finals()
		return got >= n, err
	})
}
