package sqlitefile

import (
	"errors"
	"strings"
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
