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
	ioError = 10 // reading or writing failed, maybe because a disk quota is used up
	full    = 13 // the disk is full
)

// Locked reports whether an error says that the database or a table is locked at the
// moment.
func Locked(err error) bool {
	c := code(err)
	return c == busy || c == locked
}

// sharedCache reports whether connections of the pool share a cache: then they share its
// size, which nobody else can change. Without two free connections it reports false.
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

// Full reports whether an error may mean that the disk is full, so that a smaller write
// might succeed.
func Full(err error) bool {
	return err != nil && (code(err) == full || code(err) == ioError)
}

// code returns the primary result code of a driver's error, if it is one of the above.
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
