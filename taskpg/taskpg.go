// Package taskpg is a store for package task in a PostgreSQL database, for
// programs on several machines that share a history.
//
//	store, err := taskpg.Open(ctx, "postgres://tasks@db.example.com/tasks")
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer store.Close()
//	tasks, err := task.New(store)
//
// A function still runs in the process that has submitted it. The store tells
// the others what it does, and fails it when its process is gone.
//
// # Who lives
//
// An open store is an owner: a row in the table task_owners with a beat, a number
// that each of its transactions increments, and one transaction in each third of
// a lease if it has nothing else to write. Another store declares an owner gone
// once that number has not changed for a lease, measured by its own monotonic
// clock; nobody's clocks are compared. What is promised:
//
//   - An owner that commits at least once in a lease is never declared gone.
//   - Once an owner is declared gone, nothing that it writes is accepted. Its
//     unfinished operations get exactly one final state, from whoever recovers
//     them.
//   - A store that was declared gone learns so at its next transaction: writes of
//     the operations that it has lost fail with [task.ErrLost]. The store goes on as a
//     new owner.
//
// What is impossible: to tell a dead machine from one that cannot be reached, and
// to stop what a function of a lost operation does outside the database.
//
// While the database is away nobody is declared gone. After that everybody has a
// whole lease to be heard.
//
// # Durability
//
// What the store confirms is committed as the database commits: with
// synchronous_commit=on it survives a crash of the server, and with a synchronous
// standby the loss of the server. If a connection breaks during a commit, the
// store tries again and finds out whether the commit had succeeded. Every call
// ends after 10 seconds.
package taskpg

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// callLimit is how long a call may take.
const callLimit = 10 * time.Second

// An Option is a setting of [Open] and [OpenPool].
type Option func(*Store)

// WithLease sets for how long others must not have heard of this store before
// they declare it gone: 30 seconds by default, at least 1 second. Stores with
// different leases may share a database: whoever observes waits for the longer
// one of two.
func WithLease(d time.Duration) Option { return func(s *Store) { s.lease = d } }

// WithNode sets the name that begins the Owner of this store's operations, before
// a slash: the host name by default. Names need not be unique.
func WithNode(name string) Option { return func(s *Store) { s.node = name } }

// WithSchema sets the schema that has the tables. By default that is the first
// one of the connection's search_path.
func WithSchema(name string) Option { return func(s *Store) { s.schema = name } }

// A Store is a [task.Persistence] in a PostgreSQL database. Any number of
// managers, processes and machines may share the database.
type Store struct {
	// Immutable.
	pool    *pgxpool.Pool
	ownPool bool // to be closed
	schema  string
	node    string
	lease   time.Duration
	sql     *strings.Replacer // puts the schema in front of table names
	clock   func() instant
	stop    context.CancelFunc
	ctx     context.Context // ends with Close
	loops   sync.WaitGroup
	hints   *hints
	deaths  chan struct{} // see Deaths

	// turn is held during an attempt to write, and guards beat and registered. The
	// beat orders the transactions of an owner anyway.
	turn       chan struct{}
	beat       int64 // as last committed, as far as is known
	registered bool  // whether the owner's row is there, as far as is known

	mu     sync.Mutex      // guards what follows
	owner  string          // the ID of the present incarnation
	lost   map[string]bool // the IDs of those before
	fenced time.Time       // when the last one of them was found to be gone
	wrote  time.Time       // when the last transaction that was committed began
	closed bool
}

// Open opens the database of a connection string, in any form that
// [pgxpool.ParseConfig] takes, and makes its tables unless they are there. If the
// user may not make them, have [Schema] run by one who may.
//
// Unless the connection string sets default_query_exec_mode, the store prepares
// its statements, once on each connection, if Open reaches the server directly, and
// prepares none behind a pooler, which may give each transaction another connection.
func Open(ctx context.Context, dsn string, opts ...Option) (*Store, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil { // its text may contain the password
		return nil, errors.New("taskpg: open: the connection string is invalid: " +
			"it should look like postgres://USER@HOST:5432/DATABASE or host=HOST user=USER dbname=DATABASE")
	}
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = 5 * time.Second
	}
	if !strings.Contains(dsn, "default_query_exec_mode") {
		if err := prepares(ctx, config.ConnConfig); err != nil {
			return nil, fmt.Errorf("taskpg: open: %w", explain(err))
		}
	}
	watchDials(&config.ConnConfig.Config)
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("taskpg: open: %w", explain(err))
	}
	s, err := OpenPool(ctx, pool, opts...)
	if err != nil {
		pool.Close()
		return nil, err
	}
	s.ownPool = true
	return s, nil
}

// prepares makes connections prepare statements, or not. Where the process that
// greets a new connection is the one that serves it, there is no pooler between,
// and a prepared statement is where it was prepared.
func prepares(ctx context.Context, config *pgx.ConnConfig) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	config.DefaultQueryExecMode = pgx.QueryExecModeExec
	c, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer c.Close(ctx)
	var pid int64
	var version int
	err = c.QueryRow(ctx, `SELECT pg_backend_pid(), current_setting('server_version_num')::int`).Scan(&pid, &version)
	if err != nil {
		return err
	}
	if pid == int64(c.PgConn().PID()) && version >= minVersion*10000 {
		config.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
		// Reads are planned each time: the plan for a small table, or for one value,
		// would be kept while the table grows, or for another value.
		config.RuntimeParams["plan_cache_mode"] = "force_custom_plan"
	}
	return nil
}

// OpenPool is Open for an application's own pool, which Close leaves open. The
// store takes one connection out of the pool to listen on; writes use one at a
// time, and so do beats and reads. If the pool prepares statements, as pgx does by
// default, set plan_cache_mode=force_custom_plan, as Open does: the server may keep
// the plan of a read for a small table while that grows.
//
// When a write takes too long, the store closes the connection. pgx then asks the
// server to cancel what that does. With synchronous standbys this ends the wait
// for them, so that others see what may yet be lost; [Open] makes connections that
// do not ask.
func OpenPool(ctx context.Context, pool *pgxpool.Pool, opts ...Option) (*Store, error) {
	host, _ := os.Hostname()
	s := &Store{pool: pool, node: cmp.Or(host, "unknown"), lease: 30 * time.Second, clock: systemClock(),
		turn: make(chan struct{}, 1), lost: make(map[string]bool), hints: newHints(), deaths: make(chan struct{}, 1)}
	for _, opt := range opts {
		opt(s)
	}
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("taskpg: open: %w", err)
	}
	prefix := ""
	if s.schema != "" {
		prefix = pgx.Identifier{s.schema}.Sanitize() + "."
	}
	s.sql = strings.NewReplacer("{}", prefix)
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.owner = s.newOwner()
	err := s.migrate(ctx)
	if err == nil {
		err = s.nameChannel(ctx)
	}
	if err == nil {
		err = s.transact(time.Now().Add(callLimit), transaction{})
	}
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("taskpg: open: %w", explain(err))
	}
	s.loops.Go(s.renew)
	s.loops.Go(s.observe)
	s.loops.Go(s.announce)
	s.loops.Go(s.listen)
	return s, nil
}

// check looks at the options.
func (s *Store) check() error {
	switch {
	case s.lease < time.Second:
		return fmt.Errorf("a lease of %v: it must be at least 1s", s.lease)
	case s.node == "" || len(s.node) > 200 || !utf8.ValidString(s.node) || strings.ContainsFunc(s.node, func(r rune) bool { return r <= ' ' }):
		return fmt.Errorf("the node's name %q: it must have 1 to 200 bytes of UTF-8, without spaces", s.node)
	case s.schema != "" && (len(s.schema) > 63 || !utf8.ValidString(s.schema) || strings.ContainsRune(s.schema, 0)):
		return fmt.Errorf("the schema's name %q: it must have 1 to 63 bytes of UTF-8", s.schema)
	}
	return nil
}

// Owner returns the Owner of the operations that are submitted now: the node's
// name, a slash and a UUID. It changes when the store was declared gone.
func (s *Store) Owner() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owner
}

// Close ends the store. Close the manager first: what it has not finished by then
// is left for others to recover, which they may do at once.
func (s *Store) Close() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return nil
	}
	s.stop()
	s.loops.Wait()
	err := s.leave()
	if err == nil && s.hints.others.Load() {
		s.notify() // whose loss costs time only
	}
	if s.ownPool {
		s.pool.Close()
	}
	if err != nil {
		return fmt.Errorf("taskpg: close: others have to wait for a lease to end: %w", err)
	}
	return nil
}
