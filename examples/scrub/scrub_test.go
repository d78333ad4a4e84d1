//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// TestMain makes the test binary run the program if the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv("SCRUB_TEST_MAIN") != "" {
		main()
		return
	}
	os.Exit(testos.Run(m))
}

func noUpdate(int) {}

// must ends the test if its setup fails.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write creates a file in a directory, and any missing directories.
func write(t *testing.T, dir, name, content string) {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(path), 0o700))
	must(t, os.WriteFile(path, []byte(content), 0o600))
}

// digest returns the digest of a tree with the given files. Names and contents alternate.
func digest(files ...string) string {
	h := sha256.New()
	for f := range slices.Chunk(files, 2) {
		fmt.Fprintf(h, "%x  %s\x00", sha256.Sum256([]byte(f[1])), f[0])
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestScrub(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 3*chunkSize/16) + "end"
	tests := []struct {
		name   string
		make   func(t *testing.T, dir string)
		during func(t *testing.T, dir string) // after the first chunk
		files  []string
		bytes  int
	}{
		{
			name: "empty tree",
			make: func(t *testing.T, dir string) {},
		},
		{
			name: "files",
			make: func(t *testing.T, dir string) {
				write(t, dir, "b", "bb")
				write(t, dir, "a/x", big)
				write(t, dir, "a.txt", "")
				write(t, dir, "a/new\nline", "n")
			},
			files: []string{"a/new\nline", "n", "a/x", big, "a.txt", "", "b", "bb"},
			bytes: len(big) + 3,
		},
		{
			name: "symbolic links, a FIFO",
			make: func(t *testing.T, dir string) {
				write(t, dir, "a", "a")
				must(t, os.Symlink("a", filepath.Join(dir, "link")))
				must(t, os.Symlink(".", filepath.Join(dir, "loop")))
				must(t, os.Symlink("nowhere", filepath.Join(dir, "dangling")))
				must(t, syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
			},
			files: []string{"a", "a"},
			bytes: 1,
		},
		{
			name: "its own history",
			make: func(t *testing.T, dir string) {
				for _, suffix := range []string{"", "-wal", "-shm", "-journal", "-owner-1", ".old"} {
					write(t, dir, "scrub.db"+suffix, "x")
				}
				write(t, dir, "sub/scrub.db", "y")
			},
			files: []string{"scrub.db.old", "x", "sub/scrub.db", "y"},
			bytes: 2,
		},
		{
			name:   "growing file",
			make:   func(t *testing.T, dir string) { write(t, dir, "a", big) },
			during: func(t *testing.T, dir string) { write(t, dir, "a", big+big) },
			files:  []string{"a", big},
			bytes:  len(big),
		},
		{
			name:   "shrinking file",
			make:   func(t *testing.T, dir string) { write(t, dir, "a", big) },
			during: func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, "a"), chunkSize+1)) },
			files:  []string{"a", big[:chunkSize+1]},
			bytes:  chunkSize + 1,
		},
		{
			name: "vanishing files and directories",
			make: func(t *testing.T, dir string) {
				write(t, dir, "a", big)
				write(t, dir, "b", "b")
				write(t, dir, "c/d", "d")
			},
			during: func(t *testing.T, dir string) {
				for _, name := range []string{"a", "b", "c"} {
					must(t, os.RemoveAll(filepath.Join(dir, name)))
				}
			},
			files: []string{"a", big},
			bytes: len(big),
		},
		{
			name: "file replaced by a FIFO",
			make: func(t *testing.T, dir string) {
				write(t, dir, "a", big)
				write(t, dir, "b", "b")
			},
			during: func(t *testing.T, dir string) {
				must(t, os.Remove(filepath.Join(dir, "b")))
				must(t, syscall.Mkfifo(filepath.Join(dir, "b"), 0o600))
			},
			files: []string{"a", big},
			bytes: len(big),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.make(t, dir)
			s := &scrub{dir: dir, db: filepath.Join(dir, "scrub.db")}
			got, err := s.run(t.Context(), func(int) {
				if tt.during != nil {
					tt.during(t, dir)
					tt.during = nil
				}
			})
			must(t, err)
			r := got.(Result)
			if r.Files != len(tt.files)/2 || r.Bytes != int64(tt.bytes) || r.Digest != digest(tt.files...) || r.Unreadable != 0 {
				t.Errorf("got %+v, want %d files, %d bytes, digest %s, none unreadable",
					r, len(tt.files)/2, tt.bytes, digest(tt.files...))
			}
		})
	}
}

// TestUnreadable uses a path that is too long for the system, so that not even root can
// read it.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a", "a")
	write(t, dir, "z", "z")
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	deep := strings.Repeat(strings.Repeat("d", 100)+"/", 60) // PATH_MAX is at most 4096
	must(t, root.MkdirAll(deep, 0o700))
	for end := 101; end <= len(deep); end += 101 { // length of a directory name and its slash
		f, err := root.Create(deep[:end] + strings.Repeat("f", 200))
		must(t, err)
		must(t, f.Close())
	}

	got, err := (&scrub{dir: dir}).run(t.Context(), noUpdate)
	must(t, err)
	r := got.(Result)
	if r.Files < 2 || r.Bytes != 2 || r.Digest == "" {
		t.Errorf("the readable files were not read: %+v", r)
	}
	if r.Unreadable < 2 || r.Unreadable != len(r.Errors) {
		t.Errorf("got %d unreadable and %d errors, want equal numbers, at least a file and a directory", r.Unreadable, len(r.Errors))
	}
	for _, u := range r.Errors {
		if !strings.HasPrefix(u.Path, dir) || u.Error != syscall.ENAMETOOLONG.Error() {
			t.Errorf("unexpected %+v", u)
		}
	}
}

func TestUnreadableBounded(t *testing.T) {
	var r Result
	for range 3 * maxListed {
		r.addUnreadable("/a", &os.PathError{Op: "open", Path: "/a", Err: syscall.EACCES})
	}
	want := Unreadable{"/a", syscall.EACCES.Error()}
	if r.Unreadable != 3*maxListed || len(r.Errors) != maxListed || r.Errors[0] != want {
		t.Errorf("got %d, of which %d are listed, as %v; want %d, %d, %v",
			r.Unreadable, len(r.Errors), r.Errors[0], 3*maxListed, maxListed, want)
	}
}

func TestSumReplaced(t *testing.T) {
	for _, by := range []string{"file", "symbolic link", "FIFO"} {
		t.Run(by, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "found", "x")
			write(t, dir, "other", "x")
			info, err := os.Lstat(filepath.Join(dir, "found"))
			must(t, err)
			path := filepath.Join(dir, "now")
			switch by {
			case "file":
				path = filepath.Join(dir, "other")
			case "symbolic link":
				must(t, os.Symlink("other", path))
			case "FIFO":
				must(t, syscall.Mkfifo(path, 0o600))
			}
			if _, err := (&scrub{}).sum(t.Context(), path, info, make([]byte, chunkSize), noUpdate); err == nil {
				t.Error("the replacement was read")
			}
		})
	}
}

func TestRootUnreadable(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	if _, err := (&scrub{dir: dir}).run(t.Context(), noUpdate); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
}

func TestCancel(t *testing.T) {
	dir := t.TempDir()
	makeHuge(t, dir)
	s := &scrub{dir: dir}
	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := s.run(ctx, func(int) { cancel(task.ErrCancelled) })
	if !errors.Is(err, task.ErrCancelled) {
		t.Errorf("got %v, want %v", err, task.ErrCancelled)
	}
	if r := r.(Result); r.Bytes != chunkSize || r.Files != 0 || r.Digest != "" {
		t.Errorf("got %+v, want one chunk read and no digest", r)
	}
}

// makeHuge creates a file that takes no space but hours to read.
func makeHuge(t *testing.T, dir string) {
	t.Helper()
	write(t, dir, "huge", "")
	must(t, os.Truncate(filepath.Join(dir, "huge"), 10<<40))
}

func TestPrintTable(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	tests := []struct {
		name string
		op   task.Operation
		want string
	}{
		{"done",
			task.Operation{Name: "scrub /a", State: task.StateDone, Progress: 100, StartedAt: at, UpdatedAt: at.Add(90 * time.Second)},
			"scrub /a|DONE|100%|2026-01-02 03:04:05|1m30s|"},
		{"failed, error on one line",
			task.Operation{Name: "scrub /a", State: task.StateFailed, Progress: 7, StartedAt: at, UpdatedAt: at, Error: "disk\n\ton fire"},
			"scrub /a|FAILED|7%|2026-01-02 03:04:05|0s|disk  on fire"},
		{"never started",
			task.Operation{Name: "scrub /a", State: task.StateCancelled, UpdatedAt: at},
			"scrub /a|CANCELLED|0%|-|-|"},
		{"hostile name",
			task.Operation{Name: "scrub /\x1b[2J\t/b", State: task.StatePending},
			"scrub / [2J /b|PENDING|0%|-|-|"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			must(t, printTable(&b, []*task.Operation{&tt.op}))
			head, row, _ := strings.Cut(b.String(), "\n")
			var cells []string // the row, split at the columns of the ASCII header
			for i, from := range columnStarts(head) {
				to := len(row) - 1
				if next := columnStarts(head)[i+1:]; len(next) > 0 {
					to = next[0]
				}
				cells = append(cells, strings.TrimRight(row[from:to], " "))
			}
			if got := strings.Join(cells, "|"); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func columnStarts(head string) (starts []int) {
	for _, word := range strings.Fields(head) {
		starts = append(starts, strings.Index(head, word))
	}
	return starts
}

func TestProgressLine(t *testing.T) {
	tests := []struct {
		name        string
		progress    int
		done, total int64
		took        time.Duration
		want        string
	}{
		{"begin", 0, 1, 1000, time.Second, "  0% [                    ] 1 B of 1.0 kB  1 B/s  ETA 0:16:39"},
		{"half", 50, 2e9, 4e9, 4 * time.Second, " 50% [##########          ] 2.0 GB of 4.0 GB  500.0 MB/s  ETA 0:00:04"},
		{"end", 100, 4e9, 4e9, time.Hour, "100% [####################] 4.0 GB of 4.0 GB  1.1 MB/s  ETA 0:00:00"},
		{"at once", 100, 5, 5, 0, "100% [####################] 5 B of 5 B  5.0 kB/s  ETA 0:00:00"},
		{"more than counted", 100, 999_949, 5, time.Second, "100% [####################] 999.9 kB of 5 B  999.9 kB/s  ETA 0:00:00"},
		{"wide", 99, 888_800e12, 999_900e12, 888e6 * time.Second, " 99% [################### ] 888.8 PB of 999.9 PB  1.0 GB/s  ETA 30833:20:00"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := progressLine(tt.progress, tt.done, tt.total, tt.took)
			if got != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
			if len(got) > 79 {
				t.Errorf("%d columns", len(got))
			}
		})
	}
}

func TestBar(t *testing.T) {
	for _, tt := range []struct {
		name string
		live bool
		want []string
	}{
		{"terminal", true, []string{"", "counting: 100 B", "  0%", "  5%", " 10%", " 35%", "100%"}},
		{"pipe", false, []string{"  0%", " 10%", " 35%", "100%", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			s := &scrub{}
			b := newBar(&out, tt.live, s)
			s.total.Store(100)
			b.show(0)
			s.done.Store(1)
			for _, progress := range []int{0, 5, 10, 35, 100} {
				b.show(progress)
			}
			b.end()
			lines := strings.Split(out.String(), "\n")
			if tt.live {
				lines = strings.Split(strings.TrimSuffix(out.String(), "\n"), "\r")
			}
			if !slices.EqualFunc(lines, tt.want, strings.HasPrefix) {
				t.Errorf("got %q, want lines that begin with %q", lines, tt.want)
			}
		})
	}
}

// TestBarSpeed: a scrub of a small tree has already read something when the bar is first
// shown.
func TestBarSpeed(t *testing.T) {
	var out bytes.Buffer
	s := &scrub{}
	b := newBar(&out, false, s)
	s.total.Store(1 << 60)
	s.done.Store(1 << 59)
	b.show(50)
	if strings.Contains(out.String(), " 0 B/s") {
		t.Errorf("got %q, which assumes more time than has passed", out.String())
	}
}

// program returns the command that runs the program.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Env = append(os.Environ(), "SCRUB_TEST_MAIN=1",
		"GORACE=atexit_sleep_ms=0") // otherwise -race adds a second to each run
	return cmd
}

// output runs the program to its end.
func output(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs strings.Builder
	cmd := program(t, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); !errors.As(err, new(*exec.ExitError)) {
		must(t, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "tree/a", "a")
	tree, db := filepath.Join(dir, "tree"), filepath.Join(dir, "scrub.db")
	tests := []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string // substrings
	}{
		{"no directory", []string{}, 2, "", "usage: scrub"},
		{"two directories", []string{tree, tree}, 2, "", "usage: scrub"},
		{"history of a directory", []string{"-history", tree}, 2, "", "usage: scrub"},
		{"no history yet", []string{"-db", db, "-history"}, 1, "", "scrub a directory first"},
		{"missing", []string{"-db", db, filepath.Join(dir, "gone")}, 1, "", "DIR must be a directory that you may read"},
		{"not a directory", []string{"-db", db, filepath.Join(tree, "a")}, 1, "", "DIR must be a directory that you may read"},
		{"database in a missing directory", []string{"-db", filepath.Join(dir, "gone", "db"), tree}, 1, "", "create it"},
		{"scrub", []string{"-db", db, tree}, 0, "SHA-256: " + digest("a", "a"), ""},
		{"history", []string{"-db", db, "-history"}, 0, "DONE   100%", ""},
		{"history in the tree", []string{"-db", filepath.Join(tree, "scrub.db"), tree}, 0, "SHA-256: " + digest("a", "a"), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := output(t, tt.args...)
			if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) {
				t.Errorf("exit code %d, want %d\nstdout %q\n  want %q\nstderr %q\n  want %q",
					code, tt.code, stdout, tt.stdout, stderr, tt.stderr)
			}
		})
	}
}

// start starts a scrub that takes hours, and returns once it is reading.
func start(t *testing.T, db, dir string) (cmd *exec.Cmd, stdout *bufio.Reader, stderr *bufio.Reader) {
	t.Helper()
	cmd = program(t, "-db", db, dir)
	out, err := cmd.StdoutPipe()
	must(t, err)
	errs, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	stdout = bufio.NewReader(out)
	line, err := stdout.ReadString('\n')
	must(t, err)
	if !strings.HasPrefix(line, "  0%") {
		t.Fatalf("the first line is %q, want 0 %%", line)
	}
	return cmd, stdout, bufio.NewReader(errs)
}

func TestKill(t *testing.T) {
	dir, db := t.TempDir(), filepath.Join(t.TempDir(), "scrub.db")
	makeHuge(t, dir)
	cmd, _, _ := start(t, db, dir)
	for { // RUNNING is stored shortly after the start
		stdout, stderr, code := output(t, "-db", db, "-history")
		if code != 0 || strings.Contains(stdout, "FAILED") {
			t.Fatalf("while it runs: exit code %d\n%s%s", code, stdout, stderr)
		}
		if strings.Contains(stdout, "RUNNING") && strings.Contains(stdout, "at "+dir) && strings.Contains(stdout, "B/s)") {
			break
		}
	}

	must(t, cmd.Process.Kill())
	cmd.Wait() // the error only says that it was killed
	stdout, stderr, code := output(t, "-db", db, "-history")
	if code != 0 || !strings.Contains(stdout, "FAILED") || !strings.Contains(stdout, "Task failed due to system restart: at "+dir) {
		t.Errorf("after the kill: exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestSignal(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			dir, db := t.TempDir(), filepath.Join(t.TempDir(), "scrub.db")
			makeHuge(t, dir)
			cmd, stdout, stderr := start(t, db, dir)
			must(t, cmd.Process.Signal(sig))
			out, err := io.ReadAll(stdout)
			must(t, err)
			errs, err := io.ReadAll(stderr)
			must(t, err)
			cmd.Wait() // the error only holds the exit code
			if code := cmd.ProcessState.ExitCode(); code != 130 || !strings.Contains(string(out), "CANCELLED: ") ||
				!strings.Contains(string(errs), "cancelling") {
				t.Errorf("exit code %d\n%s%s", code, out, errs)
			}
			if table, _, _ := output(t, "-db", db, "-history"); !strings.Contains(table, "CANCELLED") {
				t.Errorf("history:\n%s", table)
			}
		})
	}
}

// TestSecondSignal checks that a second signal ends a scrub that ignores the first one.
func TestSecondSignal(t *testing.T) {
	if os.Getenv("SCRUB_TEST_ENDLESS") != "" {
		m := task.NewManager(nil)
		op, err := m.Submit("endless", func(context.Context, func(int)) (any, error) { select {} })
		must(t, err)
		signals := make(chan os.Signal, 2)
		signals <- os.Interrupt
		signals <- os.Interrupt
		cancelOnSignal(op, signals)
	}
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestSecondSignal$")
	cmd.Env = append(os.Environ(), "SCRUB_TEST_ENDLESS=1")
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 130 {
		t.Errorf("exit code %d\n%s", cmd.ProcessState.ExitCode(), out)
	}
}
