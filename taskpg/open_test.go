//go:build unix

package taskpg

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// TestOpenErrors shows that each error of Open is one line, says what to do, and
// contains no password.
func TestOpenErrors(t *testing.T) {
	const secret = "hunter2"
	server := pgtest.New(t, "max_connections=10")
	dsn := server.Database("tasks")
	pgtest.Exec(t, dsn, `CREATE ROLE guest LOGIN PASSWORD '`+secret+`'`, `REVOKE CREATE ON SCHEMA public FROM PUBLIC`)
	guest := strings.Replace(dsn, "user=postgres", "user=guest password="+secret, 1)
	latin := server.Database("latin", "ENCODING 'LATIN1' TEMPLATE template0")
	full := server.Database("crowded")
	pgtest.Exec(t, full, `ALTER DATABASE crowded CONNECTION LIMIT 0`)
	for name, c := range map[string]struct {
		dsn  string
		opts []Option
		want string
	}{
		"no connection string":     {"postgres://user:" + secret + "@host:port/db", nil, "should look like postgres://"},
		"nobody there":             {"host=/nowhere user=a password=" + secret, nil, "failed to connect"},
		"no such database":         {server.DSN("nothing") + " password=" + secret, nil, "createdb"},
		"no such user":             {strings.Replace(dsn, "postgres", "nobody", 1), nil, "role \"nobody\" does not exist"},
		"no privilege":             {guest, nil, "taskpg.Schema"},
		"no privilege for schemas": {guest, []Option{WithSchema("other")}, "taskpg.Schema"},
		"encoding":                 {latin, nil, "ENCODING 'UTF8'"},
		"too many connections":     {strings.Replace(guest, "dbname=tasks", "dbname=crowded", 1), nil, "pool_max_conns"},
		"short lease":              {dsn, []Option{WithLease(time.Millisecond)}, "at least 1s"},
		"node":                     {dsn, []Option{WithNode("a b")}, "without spaces"},
		"schema":                   {dsn, []Option{WithSchema("\x00")}, "1 to 63 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(t.Context(), c.dsn, c.opts...)
			if err == nil {
				s.Close()
				t.Fatal("Open succeeds")
			}
			t.Log(err)
			text := err.Error()
			if !strings.HasPrefix(text, "taskpg: open: ") || !strings.Contains(text, c.want) || strings.ContainsAny(text, "\n\t") || strings.Contains(text, secret) {
				t.Errorf("the error is %q, want %q in it", text, c.want)
			}
		})
	}
}

func TestSuits(t *testing.T) {
	for _, c := range []struct {
		version  int
		encoding string
		want     bool
	}{{120022, "UTF8", false}, {130000, "UTF8", true}, {180001, "UTF8", true}, {180001, "SQL_ASCII", false}} {
		if err := suits(c.version, c.encoding); (err == nil) != c.want {
			t.Errorf("suits(%d, %s) = %v", c.version, c.encoding, err)
		}
	}
}

// TestOpenTooOldServer opens a store on a fake server that reports version 12.
func TestOpenTooOldServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			served.Go(func() { serveOldVersion(c) })
		}
	})
	t.Cleanup(served.Wait)
	t.Cleanup(func() { l.Close() })
	s, err := Open(t.Context(), "postgres://user@"+l.Addr().String()+"/tasks?sslmode=disable")
	if err == nil {
		s.Close()
		t.Fatal("Open succeeds")
	}
	const want = "taskpg: open: the server is PostgreSQL 12: version 13 or later is needed"
	if err.Error() != want {
		t.Errorf("the error is %q, want %q", err, want)
	}
}

// serveOldVersion answers the queries for process ID and version on c as a server of
// version 12.22 does.
func serveOldVersion(c net.Conn) {
	defer c.Close()
	b := pgproto3.NewBackend(c, c)
	if _, err := b.ReceiveStartupMessage(); err != nil {
		return
	}
	b.Send(&pgproto3.AuthenticationOk{})
	b.Send(&pgproto3.ParameterStatus{Name: "server_version", Value: "12.22"})
	b.Send(&pgproto3.ParameterStatus{Name: "client_encoding", Value: "UTF8"})
	b.Send(&pgproto3.ParameterStatus{Name: "standard_conforming_strings", Value: "on"})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	column := func(name string, oid uint32, size int16) pgproto3.FieldDescription {
		return pgproto3.FieldDescription{Name: []byte(name), DataTypeOID: oid, DataTypeSize: size, TypeModifier: -1}
	}
	var query string
	for b.Flush() == nil {
		m, err := b.Receive()
		if err != nil {
			return
		}
		switch m := m.(type) {
		case *pgproto3.Parse:
			query = m.Query
		case *pgproto3.Sync: // after Bind, Describe and Execute
			columns := []pgproto3.FieldDescription{column("version", pgtype.Int4OID, 4), column("encoding", pgtype.TextOID, -1)}
			row := [][]byte{[]byte("120022"), []byte("UTF8")}
			if strings.Contains(query, "pg_backend_pid") {
				columns = []pgproto3.FieldDescription{column("pid", pgtype.Int4OID, 4), column("version", pgtype.Int4OID, 4)}
				row = [][]byte{[]byte("0"), []byte("120022")} // the process ID of the greeting
			}
			b.Send(&pgproto3.ParseComplete{})
			b.Send(&pgproto3.BindComplete{})
			b.Send(&pgproto3.RowDescription{Fields: columns})
			b.Send(&pgproto3.DataRow{Values: row})
			b.Send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
			b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		case *pgproto3.Terminate, *pgproto3.Query: // a transaction, which Open must not begin
			return
		}
	}
}

// TestSchemaByOthers opens a store as a user without CREATE, after an administrator has
// run Schema.
func TestSchemaByOthers(t *testing.T) {
	dsn := pgtest.Database(t)
	name := "guest_" + pgtest.Value[string](t, dsn, `SELECT current_database()`)
	pgtest.Exec(t, dsn, Schema, Schema, `REVOKE CREATE ON SCHEMA public FROM PUBLIC`, `CREATE ROLE `+name+` LOGIN`,
		`GRANT SELECT, INSERT, UPDATE, DELETE ON tasks, task_owners TO `+name)
	s := open(t, strings.Replace(dsn, "user=postgres", "user="+name, 1))
	save(t, s, task.StateDone)
	for n := range s.Prune(time.Now().Add(time.Hour)) {
		if n != 1 {
			t.Errorf("pruned %d operations, want 1", n)
		}
	}
}

// TestOlderSchema opens tables that have only the columns of SPEC.md.
func TestOlderSchema(t *testing.T) {
	dsn := pgtest.Database(t)
	pgtest.Exec(t, dsn, `CREATE TABLE tasks (id text COLLATE "C" PRIMARY KEY, name text NOT NULL, state text NOT NULL, progress integer DEFAULT 0,
		metadata text, result text, error text, created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now())`,
		`INSERT INTO tasks (id, name, state) VALUES ('a', 'scrub', 'DONE'), ('b', 'scrub', 'RUNNING')`)
	s := open(t, dsn)
	wantState(t, s, "a", task.StateDone)
	if got := recovered(t, s); len(got) != 1 || got[0] != "b" {
		t.Errorf("recovered %v, want b", got)
	}
	n := 0
	for some, err := range s.Prune(time.Now().Add(time.Hour)) {
		testkit.Must(t, err)
		n += some
	}
	if n != 2 {
		t.Errorf("pruned %d operations, want 2", n)
	}
}

// TestOpenAtOnce opens many stores on an empty database at the same time.
func TestOpenAtOnce(t *testing.T) {
	dsn := pgtest.Database(t)
	errs := make(chan error)
	for i := range 10 {
		go func() {
			s, err := Open(context.Background(), dsn, WithSchema("My \"schema\""), WithNode(fmt.Sprint("node", i)))
			if err == nil {
				if !strings.HasPrefix(s.Owner(), fmt.Sprintf("node%d/", i)) {
					t.Errorf("the owner is %q", s.Owner())
				}
				err = s.Close()
			}
			errs <- err
		}()
	}
	for range 10 {
		testkit.Must(t, <-errs)
	}
}

// TestOpenPool uses an application's pool, in each of pgx's query execution modes.
func TestOpenPool(t *testing.T) {
	for _, mode := range []string{"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"} {
		t.Run(mode, func(t *testing.T) {
			pool, err := pgxpool.New(t.Context(), pgtest.Database(t)+" default_query_exec_mode="+mode)
			testkit.Must(t, err)
			defer pool.Close()
			s, err := OpenPool(t.Context(), pool)
			testkit.Must(t, err)
			m, err := task.New(s, testkit.Quiet)
			testkit.Must(t, err)
			op, err := m.Submit("a\x00b", func(ctx context.Context, update func(int)) (any, error) { update(40); return "\x00\uFFFF0", nil },
				task.WithMetadata(map[string]any{"pool": "tank\uFFFF"}))
			testkit.Must(t, err)
			op = testkit.Wait(t, m, op.ID)
			if op.State != task.StateDone || op.Result != "\x00\uFFFF0" || op.Name != "a\x00b" {
				t.Errorf("got %+v", op)
			}
			page, err := m.List(10, 0, task.ByState(task.StateDone, task.StateFailed))
			if err != nil || len(page) != 1 || testkit.JSON(page[0]) != testkit.JSON(op) {
				t.Errorf("List = %v, %v", page, err)
			}
			testkit.Must(t, m.Close())
			testkit.Must(t, s.Close())
			testkit.Must(t, pool.Ping(t.Context()))
		})
	}
}

// TestPrepares shows that a store prepares statements if it reaches the server
// directly, and behind a pooler only if the connection string says so.
func TestPrepares(t *testing.T) {
	for _, c := range []struct {
		name, pooler, setting string
		want                  bool
	}{
		{"straight", "", "", true},
		{"straight, told not to", "", " default_query_exec_mode=exec", false},
		{"session", "session", "", false},
		{"session, told to", "session", " default_query_exec_mode=cache_statement", true},
		{"transaction", "transaction", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dsn := pgtest.Database(t)
			if c.pooler != "" {
				dsn = pgtest.Pooler(t, dsn, c.pooler)
			}
			s := open(t, dsn+c.setting)
			op := save(t, s, task.StateRunning)
			testkit.Must(t, s.Update(finished(op)))
			wantState(t, s, op.ID, task.StateDone)
			var names []string // of this connection, without the query's own
			testkit.Must(t, s.pool.AcquireFunc(t.Context(), func(conn *pgxpool.Conn) error {
				rows, err := conn.Query(t.Context(), `SELECT name FROM pg_prepared_statements WHERE statement LIKE '%task%'`)
				if err == nil {
					names, err = pgx.CollectRows(rows, pgx.RowTo[string])
				}
				return err
			}))
			if got := len(names) > 0; got != c.want {
				t.Errorf("the connection has the prepared statements %q, want any: %v", names, c.want)
			}
		})
	}
}
