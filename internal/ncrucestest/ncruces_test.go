//go:build task_nosqlite3

package ncrucestest

import (
	"database/sql"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	_ "github.com/ncruces/go-sqlite3/driver"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/sqlitetest"
)

func open(t testing.TB, path string, pragmas ...string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite3", sqlitetest.WithParams(path, url.Values{"_pragma": pragmas}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func Test(t *testing.T) { sqlitetest.Test(t, open) }

// The store reads the times that this driver writes.
func TestTimes(t *testing.T) {
	at := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.FixedZone("CEST", 2*60*60))
	db := open(t, filepath.Join(t.TempDir(), "app.db"))
	sqlitetest.Execute(t, db, sqlitetest.Schema)
	sqlitetest.Execute(t, db, `INSERT INTO tasks (id, name, state, created_at) VALUES ('a', 'a', 'DONE', ?)`, at)
	m, _ := sqlitetest.Use(t, db)
	if op, ok := m.Get("a"); !ok || !op.CreatedAt.Equal(at) {
		t.Errorf("Get = %+v, want it created at %v", op, at)
	}
}

// Without go-sqlite3, OpenSQLite says what to do.
func TestOpenSQLite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	if s, err := task.OpenSQLite(path); err == nil || s != nil ||
		!strings.Contains(err.Error(), "task_nosqlite3") || !strings.Contains(err.Error(), "NewSQLiteStore") {
		t.Errorf("OpenSQLite = %v, %v", s, err)
	}
	if left, err := filepath.Glob(path + "*"); err != nil || len(left) > 0 {
		t.Errorf("it left %q, %v", left, err)
	}
}
