package tasktest

import (
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	_ "github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

func TestMain(m *testing.M) { os.Exit(testos.Run(m)) }

// once returns an open function for stores without files. It returns the same store for the
// same directory.
func once[S task.Persistence](newStore func() S) func(dir string) (task.Persistence, error) {
	var mu sync.Mutex
	stores := make(map[string]S)
	return func(dir string) (task.Persistence, error) {
		mu.Lock()
		defer mu.Unlock()
		s, ok := stores[dir]
		if !ok {
			s = newStore()
			stores[dir] = s
		}
		return s, nil
	}
}

func openSQLite(dir string) (task.Persistence, error) {
	return task.OpenSQLite(filepath.Join(dir, "tasks.db"))
}

// openInApp opens a store inside an application's database.
func openInApp(dir string) (task.Persistence, error) {
	db, err := sql.Open("sqlite3", filepath.Join(dir, "app.db"))
	if err != nil {
		return nil, err
	}
	if _, err := db.Exec(`CREATE TABLE IF NOT EXISTS users (name TEXT)`); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s, err := task.NewSQLiteStore(db)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return inApp{s, db}, nil
}

// An inApp also closes the application's database.
type inApp struct {
	*task.SQLiteStore
	db *sql.DB
}

func (s inApp) Close() error { return errors.Join(s.SQLiteStore.Close(), s.db.Close()) }

// bare hides all methods of a store except those of Persistence.
type bare struct{ task.Persistence }

// rightStores keep the contract.
var rightStores = map[string]func(dir string) (task.Persistence, error){
	"memory":                once(task.NewMemoryStore),
	"OpenSQLite":            openSQLite,
	"NewSQLiteStore":        openInApp,
	"four methods":          once(func() bare { return bare{task.NewMemoryStore()} }),
	"a user's own":          once(newMapStore),
	"a user's own batches":  once(func() batchStore { return batchStore{mapStore: newMapStore()} }),
	"a user's own recovery": once(func() recoverStore { return recoverStore{newMapStore(), isOrphan, (*mapStore).put, nil, take} }),
	"nothing injected": once(func() task.Persistence {
		return Inject(task.NewMemoryStore(), func(Call) error { return nil })
	}),
}

func TestRightStores(t *testing.T) {
	t.Parallel() // mostly waiting
	for name, open := range rightStores {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			TestPersistence(t, open)
		})
	}
}
