//go:build unix

package main

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// TestMain makes the test binary run the program if the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv("SCHEDULER_TEST_MAIN") != "" {
		main()
		return
	}
	os.Exit(testos.Run(m))
}

// must ends the test if its setup fails.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// command returns a command that runs the program.
func command(t *testing.T, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "SCHEDULER_TEST_MAIN=1")
	cmd.Stderr = t.Output()
	return cmd
}

// complete returns the paths of the completed snapshots.
func complete(snapshots string) []string {
	paths, _ := filepath.Glob(filepath.Join(snapshots, "2*"))
	return paths
}

// awaitPartial waits until a snapshot has begun, but at most a second.
func awaitPartial(snapshots string) {
	partial := func() []string {
		paths, _ := filepath.Glob(filepath.Join(snapshots, "partial-*"))
		return paths
	}
	before := partial()
	begun := func(path string) bool { return !slices.Contains(before, path) }
	for deadline := time.Now().Add(time.Second); !slices.ContainsFunc(partial(), begun) && time.Now().Before(deadline); {
		time.Sleep(100 * time.Microsecond)
	}
}

// TestKilledAllTheTime kills two schedulers on one database again and again. In the end,
// each snapshot must exist once and be complete, and at most one operation may have
// completed it.
func TestKilledAllTheTime(t *testing.T) {
	tmp := t.TempDir()
	dir, snapshots, db := filepath.Join(tmp, "dir"), filepath.Join(tmp, "snapshots"), filepath.Join(tmp, "tasks.db")
	must(t, os.Mkdir(dir, 0o700))
	const files = 100 // makes a snapshot take some milliseconds
	for i := range files {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(strings.Repeat("x", i)), 0o600))
	}
	args := []string{"-db", db, "-every", "50ms", dir, snapshots}
	var procs [2]*exec.Cmd
	kill := func(victims []*exec.Cmd) {
		for _, p := range victims {
			must(t, p.Process.Kill())
		}
		for i, p := range victims {
			p.Wait() // the error only says that it was killed
			victims[i] = nil
		}
	}
	deadline := time.Now().Add(20 * time.Second)
	for i := 0; i < testos.Size(18, 60) || len(complete(snapshots)) < 5 && time.Now().Before(deadline); i++ {
		for p := range procs {
			if procs[p] == nil {
				procs[p] = command(t, args...)
				must(t, procs[p].Start())
			}
		}
		time.Sleep(rand.N(time.Duration(1+20*(i%10)) * time.Millisecond))
		if n := i % 3; n < 2 {
			kill(procs[n : n+1]) // the other one continues
		} else {
			awaitPartial(snapshots)
			kill(procs[:])
		}
	}
	kill(slices.DeleteFunc(procs[:], func(p *exec.Cmd) bool { return p == nil }))
	last := command(t, args...)
	out, err := last.StdoutPipe()
	must(t, err)
	must(t, last.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, "DONE") {
		t.Errorf("the last scheduler has said %q, %v", line, err)
	}
	must(t, last.Process.Signal(os.Interrupt))
	must(t, last.Wait())

	check(t, db, snapshots, files)
}

// check checks that each snapshot was taken by one operation and is complete.
func check(t *testing.T, db, snapshots string, files int) {
	t.Helper()
	store, err := task.OpenSQLite(db)
	must(t, err)
	defer store.Close()
	m, err := task.New(store)
	must(t, err)
	defer m.Close()
	ops, err := m.List(100_000, 0)
	must(t, err)
	taken, interrupted := make(map[string]int), 0
	id := regexp.MustCompile(`^(.*Z)\.[0-9]+$`)
	for _, op := range ops {
		name := id.FindStringSubmatch(op.ID)[1]
		switch {
		case op.Interrupted():
			interrupted++
		case op.State != task.StateDone:
			t.Errorf("%s is %s: %s", op.ID, op.State, op.Error)
		default:
			if taken[name]++; taken[name] > 1 {
				t.Errorf("%s was taken %d times", name, taken[name])
			}
		}
	}
	for name := range taken {
		all, err := os.ReadDir(filepath.Join(snapshots, name))
		if err != nil || len(all) != files {
			t.Errorf("%s has %d files, want %d: %v", name, len(all), files, err)
		}
	}
	if len(taken) < 3 || interrupted == 0 {
		t.Errorf("%d taken, %d interrupted: the test has shown nothing", len(taken), interrupted)
	}
	t.Logf("%d taken, %d interrupted", len(taken), interrupted)
}
