//go:build cgo && !task_nosqlite3

package sqlitetest

import (
	"database/sql"
	"strings"
	"testing"

	"github.com/mynt-nas/task/internal/testos"
)

// open opens a database with go-sqlite3, whose parameters are named after the pragmas.
func open(t testing.TB, path string, pragmas ...string) *sql.DB {
	t.Helper()
	params := strings.NewReplacer("(", "=", ")", "").Replace(strings.Join(pragmas, "&_"))
	db, err := sql.Open("sqlite3", WithParams(path, "_"+params))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func Test_mattn(t *testing.T) {
	testos.Parallel(t)
	Test(t, open)
}

func TestSharedCache_mattn(t *testing.T) {
	testos.Parallel(t)
	TestSharedCache(t, open)
}
