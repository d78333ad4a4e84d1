//go:build !cgo || task_nosqlite3

package sqlitefile

import (
	"database/sql"
	"errors"
)

func openPool(string) (*sql.DB, error) {
	return nil, errors.New("OpenSQLite needs go-sqlite3, and this program was built without it: " +
		"build it with CGO_ENABLED=1 and without the build tag task_nosqlite3, " +
		"or open the database with another driver and use NewSQLiteStore")
}

func mattnCode(error) (code int, ok bool) { return 0, false }
