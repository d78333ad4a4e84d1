package engine

import (
	"database/sql"
	"net/url"
	"path/filepath"

	_ "github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task"
)

// A Backend is a kind of database on which a storm can run. Each directory of a
// storm stands for one database.
type Backend struct {
	// Open opens the store of a directory.
	Open func(dir string) (Store, error)

	// Rows calls row for each operation of one snapshot of the database. It passes a
	// function that scans the columns id, name, state, progress, metadata, result,
	// error, created_at, updated_at, started_at and owner as texts, with "" for NULL and
	// times in UTC with microseconds; and whether a cancel was requested. It returns
	// what is wrong with the database's structure, or "".
	Rows func(dir string, row func(scan func(dest ...any) error) error) (problem string, err error)

	// Outage crashes the database's server and restarts it. Only the driver calls it.
	Outage func() error

	// Outages reports that Outage is used, so that workers accept errors of the
	// database.
	Outages bool

	// Late reports that operations of dead processes are recovered some time after the
	// death, and not by the next New.
	Late bool
}

// A Store is the store of a worker.
type Store interface {
	task.Persistence
	Owner() string
	Close() error
}

// SQLite is the backend whose databases are files.
var SQLite = Backend{
	Open: func(dir string) (Store, error) { return task.OpenSQLite(databasePath(dir)) },
	Rows: sqliteRows,
}

func sqliteRows(dir string, row func(scan func(dest ...any) error) error) (problem string, err error) {
	path := (&url.URL{Path: filepath.ToSlash(databasePath(dir))}).EscapedPath()
	db, err := sql.Open("sqlite3", "file:"+path+"?mode=ro&_busy_timeout=8000")
	if err != nil {
		return "", err
	}
	defer db.Close()
	tx, err := db.Begin()
	if err != nil {
		return "", err
	}
	defer tx.Rollback()
	if err := tx.QueryRow(`PRAGMA integrity_check`).Scan(&problem); err != nil {
		return "", err
	}
	if problem == "ok" {
		problem = ""
	}
	rows, err := tx.Query(`SELECT id, name, state, CAST(progress AS TEXT), coalesce(metadata, ''), coalesce(result, ''),
		coalesce(error, ''), CAST(created_at AS TEXT), CAST(updated_at AS TEXT), coalesce(CAST(started_at AS TEXT), ''),
		coalesce(owner, ''), cancel_requested_at IS NOT NULL FROM tasks`)
	if err != nil {
		return problem, err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return problem, err
		}
	}
	return problem, rows.Err()
}
