// Package hookdriver lets tests observe and change the statements that a database
// executes, or make them fail.
package hookdriver

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"sync/atomic"
	"testing"
)

// A Hook is called with every statement. The statement is executed when the hook calls
// run.
type Hook func(query string, run func() error) error

// Run executes every statement.
func Run(_ string, run func() error) error { return run() }

// Open opens a database with the driver called "sqlite3", and returns a function that
// sets the hook. The database is closed at the end of the test.
func Open(t testing.TB, dsn string) (db *sql.DB, set func(Hook)) {
	c := &connector{dsn: dsn}
	c.hook.Store(Hook(Run))
	db = sql.OpenDB(c)
	t.Cleanup(func() { db.Close() })
	return db, func(h Hook) { c.hook.Store(h) }
}

type connector struct {
	dsn  string
	hook atomic.Value
}

func (c *connector) Driver() driver.Driver { return nil }

func (c *connector) Connect(context.Context) (driver.Conn, error) {
	db, err := sql.Open("sqlite3", "")
	if err != nil {
		return nil, err
	}
	defer db.Close()
	inner, err := db.Driver().Open(c.dsn)
	return &conn{inner, c}, err
}

type conn struct {
	driver.Conn
	connector *connector
}

func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (res driver.Result, err error) {
	err = c.connector.hook.Load().(Hook)(query, func() (err error) {
		res, err = c.Conn.(driver.ExecerContext).ExecContext(ctx, query, args)
		return err
	})
	return res, err
}

func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (rows driver.Rows, err error) {
	err = c.connector.hook.Load().(Hook)(query, func() (err error) {
		rows, err = c.Conn.(driver.QueryerContext).QueryContext(ctx, query, args)
		return err
	})
	return rows, err
}
