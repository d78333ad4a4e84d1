package taskpg

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Schema creates the tables and indexes that the store needs, and adds the columns
// that tables of an earlier version lack. [Open] runs these statements if something
// is missing. If the store's user may not run them, run them as another user, and then
//
//	GRANT SELECT, INSERT, UPDATE, DELETE ON tasks, task_owners TO the_user;
//
// The tables go into the first schema of the search_path. PostgreSQL updates a row of
// tasks in place while none of its indexed columns change. The finish time therefore
// has a column of its own, finished_at, which is set once.
const Schema = `
CREATE TABLE IF NOT EXISTS task_owners (
	id text COLLATE "C" PRIMARY KEY,
	node text NOT NULL,
	beat bigint NOT NULL,
	gone boolean NOT NULL DEFAULT false,
	lease_ms bigint NOT NULL,
	opened_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);
CREATE TABLE IF NOT EXISTS tasks (
	id text COLLATE "C" PRIMARY KEY,
	name text NOT NULL,
	state text NOT NULL,
	progress integer DEFAULT 0,
	metadata text,
	result text,
	error text,
	created_at timestamptz DEFAULT now(),
	updated_at timestamptz DEFAULT now()
) WITH (fillfactor = 80);
ALTER TABLE tasks
	ADD COLUMN IF NOT EXISTS started_at timestamptz,
	ADD COLUMN IF NOT EXISTS owner text COLLATE "C" NOT NULL DEFAULT '',
	ADD COLUMN IF NOT EXISTS message text,
	ADD COLUMN IF NOT EXISTS cancel_cause text,
	ADD COLUMN IF NOT EXISTS cancel_requested_at timestamptz,
	ADD COLUMN IF NOT EXISTS attempt uuid,
	ADD COLUMN IF NOT EXISTS seq bigint GENERATED ALWAYS AS IDENTITY,
	ADD COLUMN IF NOT EXISTS finished_at timestamptz;
UPDATE tasks SET finished_at = coalesce(updated_at, '-infinity')
	WHERE finished_at IS NULL AND state IN ('DONE', 'FAILED', 'CANCELLED');
CREATE UNIQUE INDEX IF NOT EXISTS tasks_seq ON tasks (seq);
CREATE INDEX IF NOT EXISTS tasks_unfinished ON tasks (owner, seq) WHERE state IN ('PENDING', 'RUNNING');
CREATE INDEX IF NOT EXISTS tasks_finished ON tasks (finished_at, seq) WHERE finished_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_not_done ON tasks (seq) WHERE state IN ('FAILED', 'CANCELLED');
CREATE INDEX IF NOT EXISTS tasks_cancelling ON tasks (owner)
	WHERE cancel_requested_at IS NOT NULL AND state IN ('PENDING', 'RUNNING');
`

// indexes are the names of the indexes that Schema creates.
var indexes = []string{"tasks_seq", "tasks_unfinished", "tasks_finished", "tasks_not_done", "tasks_cancelling"}

const minVersion = 13

// migrate checks the server, and creates what the database lacks.
func (s *Store) migrate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*callLimit) // indexing an existing table takes time
	defer cancel()
	var version int
	var encoding string
	err := s.pool.QueryRow(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_encoding')`).
		Scan(&version, &encoding)
	if err == nil {
		err = suits(version, encoding)
	}
	if err != nil {
		return err
	}
	if complete, err := s.complete(ctx); err != nil || complete {
		return err
	}
	return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		// Two stores that open at the same time take turns.
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('taskpg.Schema', 0))`); err != nil {
			return err
		}
		stmts := Schema
		if s.schema != "" {
			name := pgx.Identifier{s.schema}.Sanitize()
			stmts = `SET LOCAL search_path = ` + name + `; ` + Schema
			if exists, err := schemaExists(ctx, tx, s.schema); err != nil {
				return err
			} else if !exists {
				stmts = `CREATE SCHEMA ` + name + `; ` + stmts
			}
		}
		return tx.Conn().PgConn().Exec(ctx, stmts).Close()
	})
}

// suits returns an error if the store can't work with a database of that version, a
// server_version_num, and encoding.
func suits(version int, encoding string) error {
	switch {
	case version < minVersion*10000:
		return fmt.Errorf("the server is PostgreSQL %d: version %d or later is needed", version/10000, minVersion)
	case encoding != "UTF8":
		return fmt.Errorf("the database's encoding is %s: make one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0", encoding)
	}
	return nil
}

func schemaExists(ctx context.Context, tx pgx.Tx, name string) (exists bool, err error) {
	err = tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1::text)`, name).Scan(&exists)
	return exists, err
}

// complete reports whether nothing of Schema is missing.
func (s *Store) complete(ctx context.Context) (bool, error) {
	_, err := s.pool.Exec(ctx, s.sql.Replace(`SELECT `+columns+`, cancel_cause, attempt, seq, finished_at FROM {}tasks LIMIT 0`))
	if err == nil {
		_, err = s.pool.Exec(ctx, s.sql.Replace(`SELECT id, node, beat, gone, lease_ms, opened_at FROM {}task_owners LIMIT 0`))
	}
	if code(err) == "42P01" || code(err) == "42703" || code(err) == "3F000" { // no such table, column, schema
		return false, nil
	}
	if err != nil {
		return false, err
	}
	names := slices.Clone(indexes)
	for i, name := range names {
		names[i] = s.sql.Replace("{}" + name)
	}
	var n int
	err = s.pool.QueryRow(ctx, `SELECT count(to_regclass(name)) FROM unnest($1::text[]) AS name`, names).Scan(&n)
	return n == len(names), err
}

// code returns the SQLSTATE of a server error, or "".
func code(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// advice says what to do about an error of Open, by SQLSTATE.
var advice = map[string]string{
	"28000": "the server does not let this user in: look at pg_hba.conf, and at sslmode in the connection string",
	"28P01": "wrong user or password",
	"3D000": "the database does not exist: make it with createdb",
	"3F000": "no schema to make tables in: set one with taskpg.WithSchema",
	"42501": "the user lacks a privilege: have the statements of taskpg.Schema run by one who may make tables, " +
		"and GRANT SELECT, INSERT, UPDATE, DELETE ON tasks, task_owners",
	"25006": "the server is a standby: name all servers in the connection string, with target_session_attrs=read-write",
	"42703": "there is a table called tasks that is not this store's: rename it, or choose another schema with taskpg.WithSchema",
	"53300": "too many connections: raise the server's max_connections, lower pool_max_conns in the connection string, " +
		"or put a pooler in front",
}

// advise returns what to do about an error of Open, or "".
func advise(err error) string {
	switch {
	case code(err) != "":
		return advice[code(err)]
	case errors.As(err, new(*net.DNSError)):
		return "the host is unknown: look at host in the connection string"
	case errors.As(err, new(*tls.CertificateVerificationError)):
		return "the server's certificate is not trusted: set sslrootcert in the connection string to the file of its authority, " +
			"and host to a name that the certificate has"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return "no server listens there: look at host and port in the connection string"
	}
	return ""
}

// explain puts the advice for an error in front of it, and joins its lines.
func explain(err error) error {
	if what := advise(err); what != "" {
		return oneLine{fmt.Errorf("%s: %w", what, err)}
	}
	return oneLine{err}
}

// A oneLine is an error with its text on one line.
type oneLine struct{ error }

func (e oneLine) Error() string { return strings.Join(strings.Fields(e.error.Error()), " ") }
func (e oneLine) Unwrap() error { return e.error }
