package sqlitefile

import (
	"errors"
	"strings"
)

// The result codes of SQLite that mean "try again later".
const (
	busy   = 5 // the database is locked
	locked = 6 // a table is locked, by another connection of a shared cache
)

// Locked reports whether an error says that the database, or a table in it, is
// locked for the moment.
func Locked(err error) bool {
	c := code(err)
	return c == busy || c == locked
}

// code returns the primary result code of a driver's error, or something that
// is neither busy nor locked.
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
	}
	return 0
}
