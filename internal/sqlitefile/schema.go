package sqlitefile

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Schema describes a table.
type Schema struct {
	Table    string
	Required []string // columns that an existing table must have, the primary key first
	Added    []string // definitions of columns that it gets
	Create   []string // statements that create it and its indexes, IF NOT EXISTS
}

// Migrate creates a table, or adds the missing columns and indexes to an existing one, and
// switches a database that Open has opened to WAL mode. It changes nothing if the table
// can't be used.
func (d *DB) Migrate(s Schema) error {
	err := d.Write(d.Deadline(), func(c *sql.Conn) error {
		if err := s.check(c); err != nil {
			return err
		}
		columns, err := Strings(c, `SELECT lower(name) FROM pragma_table_info(?)`, s.Table)
		if err != nil {
			return err
		}
		var stmts []string
		for _, def := range s.Added {
			if name, _, _ := strings.Cut(def, " "); len(columns) > 0 && !slices.Contains(columns, name) {
				stmts = append(stmts, fmt.Sprintf("ALTER TABLE %s ADD COLUMN %s", s.Table, def))
			}
		}
		for _, stmt := range append(stmts, s.Create...) {
			if err := Exec(c, stmt); err != nil {
				return err
			}
		}
		return syncOnOpen(c)
	})
	if err == nil && d.owns && d.path != "" {
		err = d.enterWAL()
	}
	if err == nil || errors.As(err, new(refusal)) {
		return err
	}
	return fmt.Errorf("can't be written: %w: make sure that it is an SQLite database, that you may write it, and that no other program has it locked", err)
}

// Check returns an error, which says what to do, if the database lacks the table, a column
// or an index. It changes nothing.
func (d *DB) Check(s Schema) error {
	return d.Read(context.Background(), func(c *sql.Conn) error {
		if err := s.check(c); err != nil {
			return err
		}
		has, err := Strings(c, `SELECT lower(name) FROM sqlite_master WHERE lower(tbl_name) = ?1
			UNION ALL SELECT lower(name) FROM pragma_table_info(?1)`, s.Table)
		switch {
		case err != nil:
			return err
		case len(has) == 0:
			return refusal(fmt.Sprintf("there is no table %s in it: name the database of a program that uses this package, "+
				"and start that program once", s.Table))
		}
		for _, def := range slices.Concat(s.Added, s.Create) {
			name := strings.Fields(def)[0]
			if name == "CREATE" { // CREATE INDEX IF NOT EXISTS NAME
				name = strings.Fields(def)[5]
			}
			if !slices.Contains(has, name) {
				return refusal(fmt.Sprintf("its table %s was made by an older version and lacks %s: "+
					"start its program once with this version, or use the older version of this one", s.Table, name))
			}
		}
		return nil
	})
}

// A refusal is an error that says why a table can't be used.
type refusal string

func (r refusal) Error() string { return string(r) }

// check returns a refusal if the object with the table's name can't be used.
// pragma_index_info of a table lists the key by which it is stored, if that is not the
// rowid.
func (s Schema) check(c *sql.Conn) error {
	required, err := json.Marshal(s.Required)
	if err != nil {
		return err
	}
	problems, err := Strings(c, fmt.Sprintf(`WITH columns AS MATERIALIZED (SELECT lower(name) AS name, pk FROM pragma_table_info('%[1]s')),
		lacking AS (SELECT group_concat(value, ', ') AS names FROM json_each('%[2]s') WHERE value NOT IN (SELECT name FROM columns))
		SELECT type || ' called %[1]s in it' || problem FROM (SELECT type, CASE
			WHEN type = 'view' THEN ' where a table should be'
			WHEN (SELECT names FROM lacking) IS NOT NULL THEN ' that has no column ' || (SELECT names FROM lacking)
			WHEN (SELECT group_concat(name) FROM columns WHERE pk > 0) IS NOT '%[3]s' THEN ' whose primary key is not %[3]s'
			WHEN EXISTS (SELECT 1 FROM pragma_index_info('%[1]s')) OR 'rowid' IN (SELECT name FROM columns) THEN ' without a rowid of SQLite''s own'
		END AS problem FROM sqlite_master WHERE name = '%[1]s' COLLATE NOCASE AND type IN ('table', 'view')) WHERE problem IS NOT NULL`,
		s.Table, required, s.Required[0]))
	if err == nil && len(problems) > 0 {
		return refusal(fmt.Sprintf("there is a %s: use another database, or rename it", problems[0]))
	}
	return err
}

// syncOnOpen makes the transaction write a page, so that COMMIT syncs the commits of
// others: a process that was killed between writing and syncing a commit has left one that
// everybody sees, but that a power failure would still undo. See internal/powerloss. The
// page is the first one, with the user_version of the application.
func syncOnOpen(c *sql.Conn) error {
	version, err := Strings(c, "PRAGMA user_version")
	if err != nil {
		return err
	}
	return Exec(c, "PRAGMA user_version = "+version[0])
}

// enterWAL switches the database to WAL mode. When several processes do that at once,
// SQLite ignores the busy timeout.
func (d *DB) enterWAL() error {
	return d.retry(context.Background(), d.DB, d.Deadline(), func(c *sql.Conn) error {
		mode, err := Strings(c, "PRAGMA journal_mode = WAL")
		if err == nil && mode[0] != "wal" {
			err = fmt.Errorf("the journal mode stays %q", mode[0])
		}
		return err
	})
}
