//go:build cgo && unix

package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// readsVar is the environment variable that makes the test binary run the program, slowly.
// Its value is the path of a file to which the program appends the paths of the files it
// has read.
const readsVar = "CHECKSUM_TEST_READS"

func TestMain(m *testing.M) {
	if path := os.Getenv(readsVar); path != "" {
		reads, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			panic(err)
		}
		afterFile = func(path string) {
			fmt.Fprintln(reads, path)
			time.Sleep(5 * time.Millisecond)
		}
		main()
		return
	}
	testkit.Main(m, nil)
}

const files = 80

// makeTree makes a directory tree in which WalkDir's order differs from that of the paths.
func makeTree(t *testing.T) (dir, want string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "tree")
	for i := range files {
		path := filepath.Join(dir, []string{"a", "a-b", "a/c", ".", "é\n"}[i%5], fmt.Sprintf("file %d", i))
		testkit.Must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		testkit.Must(t, os.WriteFile(path, bytes.Repeat([]byte{byte(i)}, 1000*i), 0o600))
	}
	tree := sha256.New()
	testkit.Must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		fmt.Fprintf(tree, "%x  %s\x00", sha256.Sum256(data), rel)
		return err
	}))
	return dir, fmt.Sprintf("%x", tree.Sum(nil))
}

// TestKilled kills the program again and again. It must finish with the digest of the tree,
// as one operation, and read no file twice except those at which it was killed.
func TestKilled(t *testing.T) {
	dir, want := makeTree(t)
	db, reads := testkit.Path(t), filepath.Join(t.TempDir(), "reads")
	kills := 0
	var out []byte
	for {
		cmd := exec.Command(os.Args[0], "-db", db, dir)
		cmd.Env = append(os.Environ(), readsVar+"="+reads)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		testkit.Must(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("%v: %s", err, &stderr)
			}
			out = stdout.Bytes()
		case <-time.After(time.Duration(rand.Int64N(int64(200+20*kills))) * time.Millisecond): // lets even a slow machine finish eventually
			testkit.Must(t, cmd.Process.Kill())
			if <-ended == nil { // it had finished
				out = stdout.Bytes()
			} else {
				kills++
			}
		}
		if out != nil || done(t, db) {
			break
		}
		if kills > 1000 {
			t.Fatal("it does not get on")
		}
	}
	if out != nil && !strings.HasPrefix(string(out), want) || kills == 0 {
		t.Errorf("after %d kills: %s, want %s", kills, out, want)
	}
	checkHistory(t, db, want)
	read, err := os.ReadFile(reads)
	testkit.Must(t, err)
	if n := bytes.Count(read, []byte(dir)); n > files || n+kills < files {
		t.Errorf("%d files read after %d kills, want %d", n, kills, files)
	}
	t.Logf("%d kills: %s", kills, out)
}

// TestKilledAtTheEnd: an operation that was interrupted when nothing was left to do is
// finished, and no other one is submitted.
func TestKilledAtTheEnd(t *testing.T) {
	dir, want := makeTree(t)
	db := testkit.Path(t)
	for range 10 {
		testkit.Must(t, checksum(db, dir))
		testkit.Exec(t, db, `UPDATE tasks SET state = 'RUNNING', result = NULL`)
	}
	testkit.Must(t, checksum(db, dir))
	ops, err := testkit.OpenSQLite(t, db).List(10, 0)
	testkit.Must(t, err)
	if len(ops) != 1 || ops[0].State != task.StateDone || fmt.Sprintf("%s", ops[0].Result) != strconv.Quote(want) {
		t.Errorf("the history has %d operations, the last one %+v", len(ops), ops[0])
	}
}

// done reports whether the operation is DONE: the program may have been killed just before
// it printed the result.
func done(t *testing.T, db string) bool {
	t.Helper()
	store, err := task.OpenSQLite(db)
	testkit.Must(t, err)
	defer store.Close()
	ops, err := store.List(10, 0)
	testkit.Must(t, err)
	return len(ops) > 0 && ops[0].State == task.StateDone
}

func checkHistory(t *testing.T, db, want string) {
	t.Helper()
	m := testkit.NewManager(t, testkit.OpenSQLite(t, db))
	ops, err := m.List(10, 0)
	testkit.Must(t, err)
	if len(ops) != 1 || ops[0].State != task.StateDone || ops[0].Result != want || ops[0].Message != "" {
		t.Fatalf("the history is %+v", ops)
	}
	var s sum
	testkit.Must(t, ops[0].DecodeMetadata(&s))
	if s.Files != files || s.Runs < 2 {
		t.Errorf("metadata: %+v", s)
	}
}

// TestFails tests a tree that cannot be read.
func TestFails(t *testing.T) {
	db := testkit.Path(t)
	if err := checksum(db, filepath.Join(t.TempDir(), "missing")); err == nil || !strings.Contains(err.Error(), "FAILED") {
		t.Errorf("a missing directory: %v", err)
	}
	if err := checksum(filepath.Join(db, "x"), "."); err == nil {
		t.Error("no error for a database that can't be opened")
	}
}
