package faulttest

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// TestDiskFull fills a file system of 2 MB while an operation runs.
func TestDiskFull(t *testing.T) {
	inSmallFileSystem(t, "2m", diskFull)
}

// inSmallFileSystem runs test in a directory with its own file system of a given size.
// It uses a fake clock, and a child process that may mount the file system.
func inSmallFileSystem(t *testing.T, size string, test func(t *testing.T, dir string)) {
	dir := os.Getenv(again)
	if dir == "" {
		testos.RunMounting(t, anew(t, t.TempDir()))
		return
	}
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skip(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	synctest.Test(t, func(t *testing.T) { test(t, dir) })
}

func diskFull(t *testing.T, dir string) {
	path, filler := filepath.Join(dir, "tasks.db"), filepath.Join(dir, "filler")
	store, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	fullDisk(t, store, func() { fillDisk(t, filler, 0) }, func() {
		testkit.Must(t, os.Remove(filler))
	})
	testkit.Must(t, store.Close())
	if ok := sqliteText(t, path, "PRAGMA integrity_check"); ok != "ok" {
		t.Error(ok)
	}
}

// fillDisk extends the file at a path until only the given number of bytes is free.
func fillDisk(t *testing.T, path string, free int64) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	testkit.Must(t, err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 1<<12))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	info, err := f.Stat()
	testkit.Must(t, err)
	testkit.Must(t, f.Truncate(info.Size()-free))
}

// TestDiskFullOfResults: no result is lost while the disk is too full for it, even if
// SQLite's cache can't hold it, so that the statement fails and ends the transaction.
// Smaller results are stored meanwhile.
func TestDiskFullOfResults(t *testing.T) {
	inSmallFileSystem(t, "100m", diskFullOfResults)
}

// largeResults submits operations with large results, which finish when release is
// called.
func largeResults(t *testing.T, m *task.Manager) (results map[string]string, release func()) {
	results = make(map[string]string) // by ID
	free := make(chan struct{})
	for i, kb := range []int{100, 200, 900, 1800, 2100, 2500, 3000, 4000, 6000} {
		result := strings.Repeat(fmt.Sprint(i), kb<<10)
		op := testkit.Submit(t, m, func(context.Context, func(int)) (any, error) { <-free; return result, nil })
		results[op.ID] = result
	}
	return results, func() { close(free) }
}

func diskFullOfResults(t *testing.T, dir string) {
	path, filler := filepath.Join(dir, "tasks.db"), filepath.Join(dir, "filler")
	store, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	m, err := task.New(store, testkit.Quiet)
	testkit.Must(t, err)
	results, release := largeResults(t, m)
	fillDisk(t, filler, 0)
	start := time.Now()
	release()
	testkit.Must(t, testkit.Until(func() bool {
		ops, err := m.List(100, 0, task.ByState(task.StateRunning))
		return err == nil && len(ops) == len(results) && !slices.ContainsFunc(ops, func(op *task.Operation) bool {
			return !strings.Contains(op.Error, "DONE, which can't be stored yet")
		})
	}))
	if _, err := m.Submit("refused", testkit.Nothing); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("Submit while there is no room at all: %v", err)
	}
	fillDisk(t, filler, 800_000)
	for range 3 {
		testkit.Wait(t, m, testkit.Submit(t, m, func(context.Context, func(int)) (any, error) { return "small", nil }).ID)
		time.Sleep(time.Second)
	}
	time.Sleep(time.Until(start.Add(8 * time.Second)))
	ops, err := m.List(100, 0, task.ByState(task.StateRunning))
	var sizes []int
	for _, op := range ops {
		sizes = append(sizes, len(results[op.ID])>>10)
	}
	// The three other operations take some of the room, the more the more commits they have.
	if err != nil || len(sizes) != 7 || slices.Min(sizes) < 900 {
		t.Errorf("with 800 kB of room, results of %d kB are not stored, %v; want those of 900 kB and more", sizes, err)
	}
	testkit.Must(t, os.Remove(filler))
	for id, result := range results {
		if op := testkit.Wait(t, m, id); op.State != task.StateDone || op.Result != result || op.Error != "" {
			t.Errorf("in the end, that with %d bytes is %s, %q", len(result), op.State, op.Error)
		}
	}
	testkit.Must(t, errors.Join(m.Close(), store.Close()))
	if ok := sqliteText(t, path, "PRAGMA integrity_check"); ok != "ok" {
		t.Error(ok)
	}
	done := fmt.Sprint(len(results), " of ", len(results))
	if got := sqliteText(t, path, "SELECT sum(state = 'DONE') || ' of ' || count(*) FROM tasks WHERE length(result) > 99999"); got != done {
		t.Errorf("stored are %s, want %s", got, done)
	}
}

// TestDiskFullAtClose: Close names each operation that it can't store.
func TestDiskFullAtClose(t *testing.T) {
	inSmallFileSystem(t, "20m", diskFullAtClose)
}

func diskFullAtClose(t *testing.T, dir string) {
	path, filler := filepath.Join(dir, "tasks.db"), filepath.Join(dir, "filler")
	store, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	m, err := task.New(store, testkit.Quiet)
	testkit.Must(t, err)
	results, release := largeResults(t, m)
	fillDisk(t, filler, 0)
	release()
	err = m.Close()
	for id := range results {
		if err == nil || !strings.Contains(err.Error(), "DONE of "+id) {
			t.Errorf("Close: %v, want an error that names %s", err, id)
		}
	}
	store.Close()
	testkit.Must(t, os.Remove(filler))
	store, err = task.OpenSQLite(path)
	testkit.Must(t, err)
	m, err = task.New(store, testkit.Quiet)
	testkit.Must(t, err)
	for id := range results {
		if op, ok := m.Get(id); !ok || op.State != task.StateFailed {
			t.Errorf("after the next start, %s is %+v", id, op)
		}
	}
	testkit.Must(t, errors.Join(m.Close(), store.Close()))
}

// TestMountedFile mounts a database file, and then its directory, under other
// names.
func TestMountedFile(t *testing.T) {
	if dir := os.Getenv(again); dir != "" {
		mountedFile(t, dir)
		return
	}
	testos.RunMounting(t, anew(t, t.TempDir()))
}

func mountedFile(t *testing.T, dir string) {
	inside, file := filepath.Join(dir, "in\\side it"), filepath.Join(dir, "tasks.db")
	mounted := filepath.Join(inside, "tasks\t#1.db")
	testkit.Must(t, errors.Join(os.Mkdir(inside, 0o700), os.WriteFile(mounted, nil, 0o600)))
	m := testkit.NewManager(t, testkit.OpenSQLite(t, file))
	first := testkit.Submit(t, m, testkit.Nothing)
	if err := syscall.Mount(file, mounted, "", syscall.MS_BIND, ""); err != nil {
		t.Skip(err)
	}
	refusesName(t, mounted, "is a mount point", "mount the directory that the file is in")
	testkit.Must(t, os.Symlink(mounted, filepath.Join(dir, "link")))
	if _, err := task.OpenSQLite(filepath.Join(dir, "link")); err == nil || !strings.Contains(err.Error(), mounted) {
		t.Errorf("OpenSQLite of a symbolic link to it: %v", err)
	}
	testkit.Must(t, syscall.Unmount(mounted, syscall.MNT_DETACH)) // SQLite keeps the file open
	testkit.Must(t, syscall.Mount(dir, inside, "", syscall.MS_BIND, ""))
	defer syscall.Unmount(inside, syscall.MNT_DETACH)
	other := testkit.OpenSQLite(t, filepath.Join(inside, "tasks.db"))
	second := testkit.Submit(t, m, testkit.Nothing)
	for _, op := range []*task.Operation{first, second} {
		testkit.Wait(t, m, op.ID)
		if got, err := other.Get(op.ID); err != nil || got.State != task.StateDone {
			t.Errorf("under the name that its mounted directory gives it: %s: %+v, %v", op.ID, got, err)
		}
	}
	testkit.Must(t, other.Close())
}

// TestPermissionsTakenAway: open files continue to work, and opening a file fails.
func TestPermissionsTakenAway(t *testing.T) {
	if dir := os.Getenv(again); dir != "" {
		permissionsTakenAway(t, dir)
		return
	}
	dir := filepath.Join(testos.Dir(t), "d")
	testkit.Must(t, os.Mkdir(dir, 0o700))
	cmd := anew(t, dir)
	if os.Getuid() == 0 { // root ignores permissions
		const nobody = 65534
		testkit.Must(t, os.Chown(dir, nobody, nobody))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		cmd.Path = copyExecutable(t)
	}
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestTwoUsers: a process can tell whether another user's process on the same database
// is alive. If it can't, it reports that and continues.
func TestTwoUsers(t *testing.T) {
	if dir := os.Getenv(again); dir != "" {
		oneOfTwoUsers(t, filepath.Join(dir, "tasks.db"), os.Getenv("TASK_TEST_USER"))
		return
	}
	if os.Getuid() != 0 {
		t.Skip("only root can act for two users")
	}
	dir := filepath.Join(testos.Dir(t), "d")
	path := filepath.Join(dir, "tasks.db")
	testkit.Must(t, errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777), testkit.OpenSQLite(t, path).Close(), os.Chmod(path, 0o666)))
	executable := copyExecutable(t)
	as := func(user string, uid uint32) *exec.Cmd {
		cmd := anew(t, dir)
		cmd.Path = executable
		cmd.Env = append(cmd.Env, "TASK_TEST_USER="+user)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return cmd
	}
	runner := as("runner", 65532)
	out, err := runner.StdoutPipe()
	testkit.Must(t, err)
	testkit.Must(t, runner.Start())
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "ready"; {
	}
	files, err := filepath.Glob(path + "-owner-*")
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	recovers := func(when, want string) {
		t.Helper()
		out, err := as("recoverer", 65533).Output()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s, want %q", when, err, out, want)
		}
	}
	recovers("while it lives", "recovered 0, told of 0\n")
	testkit.Must(t, os.Chmod(files[0], 0o600)) // as earlier versions created it
	recovers("while nobody can tell", "recovered 0, told of 1: "+files[0])
	testkit.Must(t, os.Chmod(files[0], 0o666))
	testkit.Must(t, runner.Process.Kill())
	runner.Wait()
	recovers("when it is dead", "recovered 1, told of 0\n")
}

// oneOfTwoUsers runs an operation until it is killed, or recovers one.
func oneOfTwoUsers(t *testing.T, path, user string) {
	store, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	if user == "runner" {
		testkit.Must(t, store.Save(&task.Operation{ID: "a", Name: "a", State: task.StateRunning}))
		fmt.Println("ready")
		select {}
	}
	recovered, told, text := 0, 0, ""
	for op, err := range store.Recover("gone", nil) {
		switch {
		case op == nil:
			t.Fatal(err)
		case err == nil:
			recovered++
		default:
			told++
			text = ": " + strings.TrimPrefix(err.Error()[strings.Index(err.Error(), "open "):], "open ")
		}
	}
	fmt.Printf("recovered %d, told of %d%s\n", recovered, told, text)
	m, err := task.New(store, testkit.Quiet) // continues
	testkit.Must(t, err)
	testkit.Must(t, errors.Join(m.Close(), store.Close()))
}

// copyExecutable copies the test binary to a place where every user may run it.
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
	testkit.Must(t, err)
	m, err := task.New(store, testkit.Quiet)
	testkit.Must(t, err)
	fn, started, release := testkit.Blocker(nil)
	held := testkit.Submit(t, m, fn)
	<-started

	testkit.Must(t, errors.Join(os.Chmod(path, 0), os.Chmod(dir, 0o500)))
	if _, err := task.OpenSQLite(path); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("OpenSQLite: %v", err)
	}
	// The writer's connection is open. It depends on chance whether another one is
	// needed.
	op, err := m.Submit("while it lasts", func(context.Context, func(int)) (any, error) { return "kept", nil })
	if err != nil {
		t.Logf("Submit: %v", err)
	}
	release()
	m.Get(held.ID)

	testkit.Must(t, errors.Join(os.Chmod(dir, 0o700), os.Chmod(path, 0o600)))
	if got := testkit.Wait(t, m, held.ID); got.State != task.StateDone {
		t.Errorf("the operation that ran is %+v", got)
	}
	if op != nil {
		if got := testkit.Wait(t, m, op.ID); got.State != task.StateDone || got.Result != "kept" {
			t.Errorf("the operation submitted meanwhile is %+v", got)
		}
	}
	testkit.Must(t, errors.Join(m.Close(), store.Close()))
}

func sqliteText(t *testing.T, path, query string) (text string) {
	t.Helper()
	db, err := sql.Open("sqlite3", path)
	testkit.Must(t, err)
	defer db.Close()
	testkit.Must(t, db.QueryRow(query).Scan(&text))
	return text
}
