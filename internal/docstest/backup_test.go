package docstest

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/mynt-nas/task"
)

func backup(ctx context.Context, db *sql.DB, path string) error {
	if _, err := db.ExecContext(ctx, "VACUUM INTO ?", path); err != nil {
		return err // also if there is such a file
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close()) // SQLite does not sync it
}

// TestBackup copies the database of a running manager and restores it as
// docs/durability.md says.
func TestBackup(t *testing.T) {
	dir := t.TempDir()
	path, saved := filepath.Join(dir, "tasks.db"), filepath.Join(dir, "backup.db")
	store, m := open(t, path)
	before := submit(t, m, "before", nothing)
	wait(t, m, before.ID)
	during := submit(t, m, "during", untilCancelled)
	db := openDB(t, path)
	if err := backup(t.Context(), db, saved); err != nil {
		t.Fatal(err)
	}
	if err := backup(t.Context(), db, saved); err == nil {
		t.Error("a second backup has overwritten the first")
	}
	after := submit(t, m, "after", nothing)
	wait(t, m, after.ID)
	db.Close()
	m.Close()
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}

	os.Remove(path + "-wal") // they exist after a crash
	os.Remove(path + "-shm")
	if err := os.Rename(saved, path); err != nil {
		t.Fatal(err)
	}
	_, m = open(t, path)
	for id, want := range map[string]task.State{before.ID: task.StateDone, during.ID: task.StateFailed} {
		if op, ok := m.Get(id); !ok || op.State != want {
			t.Errorf("restored %v, want it %s", op, want)
		}
	}
	if _, ok := m.Get(after.ID); ok {
		t.Error("the copy has an operation submitted after the backup")
	}
}

func open(t *testing.T, path string) (*task.SQLiteStore, *task.Manager) {
	t.Helper()
	store, err := task.OpenSQLite(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store, newManager(t, store)
}
