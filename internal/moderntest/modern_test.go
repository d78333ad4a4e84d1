package moderntest

import (
	"database/sql"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"github.com/mynt-nas/task/internal/sqlitetest"
)

func openDB(t testing.TB, path string, pragmas ...string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", sqlitetest.WithParams(path, url.Values{"_pragma": pragmas}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func Test(t *testing.T) { sqlitetest.Test(t, openDB) }

func TestSharedCache(t *testing.T) { sqlitetest.TestSharedCache(t, openDB) }

// The store reads the times that this driver writes, in each of its formats.
func TestTimes(t *testing.T) {
	at := time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.FixedZone("CEST", 2*60*60))
	for _, format := range []string{"", "sqlite", "datetime"} {
		for name, at := range map[string]time.Time{"past": at, "in UTC": at.UTC(), "now, with its monotonic part": time.Now()} {
			t.Run(format+" "+name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "app.db")
				dsn := "file:" + filepath.ToSlash(path)
				if format != "" {
					dsn += "?_time_format=" + format
				}
				db, err := sql.Open("sqlite", dsn)
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				sqlitetest.Execute(t, db, sqlitetest.Schema)
				sqlitetest.Execute(t, db, `INSERT INTO tasks (id, name, state, created_at, updated_at) VALUES ('a', 'a', 'DONE', ?, ?)`, at, at.Format(time.RFC3339Nano))
				m, _ := sqlitetest.Use(t, db)
				op, ok := m.Get("a")
				if !ok {
					t.Fatal("not found")
				}
				want := at
				if format == "datetime" { // loses the zone
					want = time.Date(at.Year(), at.Month(), at.Day(), at.Hour(), at.Minute(), at.Second(), 0, time.UTC)
				}
				if !op.CreatedAt.Equal(want) || !op.UpdatedAt.Equal(at) {
					t.Errorf("created %v, updated %v, want %v", op.CreatedAt, op.UpdatedAt, at)
				}
			})
		}
	}
}
