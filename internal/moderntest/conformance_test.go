package moderntest

import (
	"database/sql"
	"errors"
	"path/filepath"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/tasktest"
)

// An appStore is a store in an application's database, which it closes too.
type appStore struct {
	*task.SQLiteStore
	db *sql.DB
}

func (s appStore) Close() error { return errors.Join(s.SQLiteStore.Close(), s.db.Close()) }

// TestPersistence has the store keep its contract on this driver.
func TestPersistence(t *testing.T) {
	for _, test := range []struct {
		name    string
		conns   int
		pragmas []string
	}{
		{"as modernc opens it", 0, nil},
		{"one connection, WAL", 1, []string{"journal_mode(WAL)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
				db := openDB(t, filepath.Join(dir, "app.db"), test.pragmas...)
				db.SetMaxOpenConns(test.conns)
				s, err := task.NewSQLiteStore(db)
				return appStore{s, db}, err
			})
		})
	}
}
