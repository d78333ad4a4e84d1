package task_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// TestDiskFull fills a file system of 2 MB, made for it in a process that may
// mount one.
func TestDiskFull(t *testing.T) {
	if dir := os.Getenv(again); dir != "" {
		diskFull(t, dir)
		return
	}
	cmd := anew(t, t.TempDir())
	testos.RunMounting(t, cmd)
}

func diskFull(t *testing.T, dir string) {
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skip(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	path, filler := filepath.Join(dir, "tasks.db"), filepath.Join(dir, "filler")
	store, err := task.OpenSQLite(path)
	recoveryMust(t, err)
	fullDisk(t, store, func() {
		f, err := os.Create(filler)
		recoveryMust(t, err)
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 1<<12))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}, func() {
		recoveryMust(t, os.Remove(filler))
	})
	recoveryMust(t, store.Close())
	if ok := sqliteText(t, path, "PRAGMA integrity_check"); ok != "ok" {
		t.Error(ok)
	}
}

// TestPermissionsTakenAway: what is open goes on; what is opened is told.
func TestPermissionsTakenAway(t *testing.T) {
	if dir := os.Getenv(again); dir != "" {
		permissionsTakenAway(t, dir)
		return
	}
	dir := filepath.Join(testos.Dir(t), "d")
	recoveryMust(t, os.Mkdir(dir, 0o700))
	cmd := anew(t, dir)
	if os.Getuid() == 0 { // whom no permissions hold
		const nobody = 65534
		recoveryMust(t, os.Chown(dir, nobody, nobody))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		cmd.Path = copyExecutable(t)
	}
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// copyExecutable puts the test binary where everybody may run it.
func copyExecutable(t *testing.T) string {
	path := filepath.Join(testos.Dir(t), "test")
	out, err := exec.Command("cp", os.Args[0], path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func permissionsTakenAway(t *testing.T, dir string) {
	path := filepath.Join(dir, "tasks.db")
	store, err := task.OpenSQLite(path)
	recoveryMust(t, err)
	m, err := task.New(store, quiet)
	recoveryMust(t, err)
	fn, started, release := blocker(nil)
	held := submit(t, m, fn)
	<-started

	recoveryMust(t, errors.Join(os.Chmod(path, 0), os.Chmod(dir, 0o500)))
	if _, err := task.OpenSQLite(path); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("OpenSQLite: %v", err)
	}
	// The writer's connection is open. Whether another one is needed is chance.
	op, err := m.Submit("while it lasts", func(context.Context, func(int)) (any, error) { return "kept", nil })
	if err != nil {
		t.Logf("Submit: %v", err)
	}
	release()
	m.Get(held.ID)

	recoveryMust(t, errors.Join(os.Chmod(dir, 0o700), os.Chmod(path, 0o600)))
	if got := wait(t, m, held.ID); got.State != task.StateDone {
		t.Errorf("the operation that ran is %+v", got)
	}
	if op != nil {
		if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != "kept" {
			t.Errorf("the operation submitted meanwhile is %+v", got)
		}
	}
	recoveryMust(t, errors.Join(m.Close(), store.Close()))
}

func sqliteText(t *testing.T, path, query string) (text string) {
	t.Helper()
	db, err := sql.Open("sqlite3", path)
	recoveryMust(t, err)
	defer db.Close()
	recoveryMust(t, db.QueryRow(query).Scan(&text))
	return text
}
