package sqlitefile

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Result codes of SQLite.
const (
	busy    = 5  // the database is locked
	locked  = 6  // a table is locked, by another connection of a shared cache
	ioError = 10 // reading or writing failed; with a disk quota, for lack of room
	full    = 13 // there is no room
)

// Locked reports whether an error says that the database, or a table in it, is
// locked for the moment.
func Locked(err error) bool {
	c := code(err)
	return c == busy || c == locked
}

// sharedCache reports whether connections of the pool share a cache, and with it
// the size of the cache, which nobody else can change. If there are no two
// connections at the moment, it reports false.
func (d *DB) sharedCache() bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	a, err := d.Conn(ctx)
	if err != nil {
		return false
	}
	defer a.Close()
	b, err := d.Conn(ctx)
	if err != nil {
		return false
	}
	defer b.Close()
	var mine, before, after int
	size := func(c *sql.Conn, n *int) error {
		return c.QueryRowContext(context.Background(), "PRAGMA cache_size").Scan(n)
	}
	set := func(n int) error { return Exec(a, fmt.Sprint("PRAGMA cache_size = ", n)) }
	if err = errors.Join(size(a, &mine), size(b, &before)); err == nil {
		err = errors.Join(set(mine-1), size(b, &after), set(mine))
	}
	return err == nil && after != before || err != nil && code(err) == locked
}

// Full reports whether an error may be due to a lack of room, so that less might
// still be written.
func Full(err error) bool {
	return err != nil && (code(err) == full || code(err) == ioError)
}

// code returns the primary result code of a driver's error, or something that
// is none of the above.
func code(err error) int {
	var coded interface{ Code() int } // as modernc.org/sqlite has it
	text := strings.ToLower(err.Error())
	switch c, ok := mattnCode(err); {
	case ok:
		return c & 0xff
	case errors.As(err, &coded):
		return coded.Code() & 0xff
	case strings.Contains(text, "table is locked"):
		return locked
	case strings.Contains(text, "locked"), strings.Contains(text, "busy"):
		return busy
	case strings.Contains(text, "disk is full"):
		return full
	case strings.Contains(text, "disk i/o error"):
		return ioError
	}
	return 0
}
