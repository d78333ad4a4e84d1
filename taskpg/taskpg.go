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
// A function still runs in the process that submitted it. The store shows the
// operation's state to the other processes, and marks it as failed when its process
// is gone.
//
// # Leases
//
// An open store is an owner: a row in the table task_owners. The row has a beat, a
// number that each transaction of the store increments. A store that has nothing to
// write commits a transaction in each third of a lease. Another store declares an
// owner gone once its beat has not changed for a lease, measured by the other store's
// monotonic clock. Clocks of different machines are never compared. The guarantees are:
//
//   - An owner that commits at least once per lease is never declared gone.
//   - Once an owner has been declared gone, the database accepts none of its writes.
//     Its unfinished operations get exactly one final state, from the store that
//     recovers them.
//   - A store that was declared gone learns so at its next transaction: writes of
//     the operations that it has lost fail with [task.ErrLost], and the store continues
//     as a new owner.
//
// A dead machine cannot be told from one that cannot be reached. Nothing can stop what
// the function of a lost operation does outside the database.
//
// While the database is unreachable, no owner is declared gone. Afterwards, every owner
// has a whole lease to commit again.
//
// # Durability
//
// A confirmed write is as durable as a commit of the database: with
// synchronous_commit=on it survives a crash of the server, and with a synchronous
// standby the loss of the server. If a connection breaks during a commit, the
// store retries and determines whether the commit had succeeded. A read or a write ends
// after at most 10 seconds; Recover and Prune run many transactions, each with that limit,
// and Open may take 30 seconds more to change the schema.
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

// callLimit limits the duration of a call.
const callLimit = 10 * time.Second

// An Option is a setting of [Open] and [OpenPool].
type Option func(*Store)

// WithLease sets how long this store may go without a commit before others declare
// it gone: 30 seconds by default. Open returns an error for less than 1 second. Stores with different leases may
// share a database: an observer waits for the longer of its own lease and the owner's.
func WithLease(d time.Duration) Option { return func(s *Store) { s.lease = d } }

// WithNode sets the part before the slash in the Owner of this store's operations,
// the host name by default. It must be 1 to 200 bytes of UTF-8 without spaces and other
// characters up to U+0020, or Open returns an error. Names need not be unique.
func WithNode(name string) Option { return func(s *Store) { s.node = name } }

// WithSchema sets the schema of the tables, a name of at most 63 bytes of UTF-8 without U+0000. The
// default, also for "", is the first schema of the connection's search_path.
func WithSchema(name string) Option { return func(s *Store) { s.schema = name } }

// A Store is a [task.Persistence] in a PostgreSQL database. Any number of
// managers, processes and machines may share the database.
type Store struct {
	// Immutable.
	pool    *pgxpool.Pool
	ownPool bool // whether Close closes pool
	schema  string
	node    string
	lease   time.Duration
	sql     *strings.Replacer // qualifies table names with the schema
	clock   func() instant
	stop    context.CancelFunc
	ctx     context.Context // ends with Close
	loops   sync.WaitGroup
	hints   *hints
	deaths  chan struct{} // see Deaths

	// turn is held during an attempt to write, and guards beat and registered.
	// The beat serializes an owner's transactions anyway.
	turn       chan struct{}
	beat       int64 // last committed, as far as is known
	registered bool  // whether the owner's row exists, as far as is known

	mu     sync.Mutex      // guards the fields below
	owner  string          // the present owner ID
	lost   map[string]bool // earlier owner IDs, all declared gone
	fenced time.Time       // when the store last learned that it was declared gone
	wrote  time.Time       // when the last committed transaction began
	closed bool
}

// Open opens the database of a connection string, in any form that
// [pgxpool.ParseConfig] accepts, and creates missing tables. If the user may not
// create them, run [Schema] as a user who may.
//
// If Open reaches the server directly, the store prepares its statements, once on
// each connection. Behind a pooler, which may use another server connection for each
// transaction, it prepares none. To choose yourself, set default_query_exec_mode in
// the connection string.
func Open(ctx context.Context, dsn string, opts ...Option) (*Store, error) {
	config, err := pgxpool.ParseConfig(dsn)
	if err != nil { // err may contain the password
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

// prepares decides whether connections prepare statements. If the process that
// greets a new connection also serves it, there is no pooler in between, and
// prepared statements stay available on the connection.
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
		// Plan each read anew. Otherwise the server might keep a plan for a small
		// table while the table grows, or use a plan for one value with another.
		config.RuntimeParams["plan_cache_mode"] = "force_custom_plan"
	}
	return nil
}

// OpenPool is like [Open], but uses an application's own pool, which Close leaves
// open. The store takes one connection out of the pool to listen on. Writes use one
// connection at a time, and so do beats and reads. If the pool prepares statements, as
// pgx does by default, set plan_cache_mode=force_custom_plan, as Open does: otherwise
// the server may keep a read's plan for a small table while the table grows.
//
// When a write takes too long, the store closes its connection. pgx then asks the
// server to cancel the statement. With synchronous standbys, this ends the wait for
// them, and other sessions see a commit that may yet be lost. Connections made by Open
// don't ask for that.
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

// check validates the options.
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

// Owner returns the Owner of newly submitted operations: the node's name, a slash
// and a UUID. It changes when the store learns that it was declared gone.
func (s *Store) Owner() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owner
}

// Close closes the store. Close the manager first: its unfinished operations are left
// to other stores, which may recover them at once.
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
		s.notify() // best effort: others would find out later anyway
	}
	if s.ownPool {
		s.pool.Close()
	}
	if err != nil {
		return fmt.Errorf("taskpg: close: others have to wait for a lease to end: %w", err)
	}
	return nil
}
