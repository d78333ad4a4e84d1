//go:build cgo && !task_nosqlite3

package sqlitefile

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"

	"github.com/mattn/go-sqlite3"
)

// No other file imports go-sqlite3: it registers the driver name "sqlite3",
// and panics if another driver has that name.

// openPool returns a pool of go-sqlite3's connections.
func openPool(dsn string) (*sql.DB, error) { return sql.OpenDB(connector(dsn)), nil }

// A connector opens connections to its data source name.
type connector string

// walLimit is the size to which SQLite truncates the WAL after a long reader has made it
// grow.
const walLimit = "PRAGMA journal_size_limit = 67108864"

var mattn = &sqlite3.SQLiteDriver{ConnectHook: func(c *sqlite3.SQLiteConn) error {
	_, err := c.Exec(walLimit, nil) // a DSN can't say that
	return err
}}

func (c connector) Connect(context.Context) (driver.Conn, error) { return mattn.Open(string(c)) }

func (c connector) Driver() driver.Driver { return mattn }

// mattnCode returns the result code of an error of go-sqlite3's.
func mattnCode(err error) (code int, ok bool) {
	var e sqlite3.Error
	ok = errors.As(err, &e)
	return int(e.Code), ok
}
