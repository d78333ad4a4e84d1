package sqlitetest

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// TestSharedCache tests the store with connections that share a cache, for
// drivers that can do that: a pool of them is refused. A single one waits for
// those of other pools.
func TestSharedCache(t *testing.T, open Opener) {
	path := filepath.Join(t.TempDir(), "app.db") + "?cache=shared"
	db := open(t, path)
	Execute(t, db, App)
	before := Dump(t, db)
	refused(t, db, "open it without cache=shared, or use SetMaxOpenConns(1)")
	if after := Dump(t, db); after != before {
		t.Errorf("the database is %s\nand was %s", after, before)
	}
	save := func(s *task.SQLiteStore) error { return s.Save(newOp("late", task.StatePending)) }
	update := func(s *task.SQLiteStore) error { return s.Update(newOp("live", task.StateDone)) }
	list := func(s *task.SQLiteStore) error { _, err := s.List(10, 0); return err }
	get := func(s *task.SQLiteStore) error { _, err := s.Get("early"); return err }
	prune := func(s *task.SQLiteStore) error { return first(s.Prune(time.Now().Add(time.Hour))) }
	recover := func(s *task.SQLiteStore) error { return first(s.Recover("gone", nil)) }
	const (
		reading  = "BEGIN; SELECT * FROM tasks"
		writing  = "BEGIN IMMEDIATE; UPDATE tasks SET metadata = 1 WHERE id = 'early'"
		creating = "BEGIN IMMEDIATE; CREATE TABLE more (x)"
	)
	for _, test := range []struct {
		name, hold string
		do         func(*task.SQLiteStore) error // nil: NewSQLiteStore
	}{
		{"Save beside a reader", reading, save},
		{"Save beside a writer", writing, save},
		{"Save while a table is created", creating, save},
		{"Update beside a reader", reading, update},
		{"Update beside a writer", writing, update},
		{"List beside a writer", writing, list},
		{"List while a table is created", creating, list},
		{"Get beside a writer", writing, get},
		{"Prune beside a reader", reading, prune},
		{"Prune beside a writer", writing, prune},
		{"Recover beside a reader", reading, recover},
		{"Recover beside a writer", writing, recover},
		{"NewSQLiteStore beside a writer", writing, nil},
		{"NewSQLiteStore while a table is created", creating, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			besideShared(t, open, test.hold, test.do)
		})
	}
}

// besideShared checks that do waits for a transaction of another connection to
// the same cache.
func besideShared(t *testing.T, open Opener, hold string, do func(*task.SQLiteStore) error) {
	path := filepath.Join(t.TempDir(), "app.db") + "?cache=shared"
	app, own := open(t, path, "busy_timeout(0)"), open(t, path, "busy_timeout(0)")
	own.SetMaxOpenConns(1)
	Execute(t, app, App+"PRAGMA journal_mode = WAL")
	newStore := func() *task.SQLiteStore {
		s, err := task.NewSQLiteStore(own)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	s := newStore()
	for id, state := range map[string]task.State{"early": task.StateDone, "live": task.StateRunning} {
		if err := s.Save(newOp(id, state)); err != nil {
			t.Fatal(err)
		}
	}
	Execute(t, app, `INSERT INTO tasks (id, name, state) VALUES ('orphan', 'orphan', 'RUNNING')`)
	if do == nil {
		do = func(*task.SQLiteStore) error { s, err := task.NewSQLiteStore(own); s.Close(); return err }
	}
	c, err := app.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, stmt := range strings.Split(hold, "; ") {
		onConn(t, c, stmt)
	}
	done := make(chan error, 1)
	go func() { done <- do(s) }()
	select {
	case err := <-done:
		t.Errorf("it returned %v while the table was locked", err)
	case <-time.After(80 * time.Millisecond):
	}
	onConn(t, c, "COMMIT")
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("still waiting after 30 s")
	}
}

// onConn executes a statement and reads what it returns.
func onConn(t *testing.T, c *sql.Conn, query string) {
	t.Helper()
	rows, err := c.QueryContext(context.Background(), query)
	if err != nil {
		t.Fatalf("%v: %s", err, query)
	}
	for rows.Next() {
	}
	if err := rows.Close(); err != nil {
		t.Fatalf("%v: %s", err, query)
	}
}
