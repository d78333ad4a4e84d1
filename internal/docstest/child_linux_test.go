package docstest

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task/internal/testos"
)

func run(ctx context.Context, name string, args ...string) (string, error) {
	runtime.LockOSThread() // Pdeathsig is tied to the thread
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second // then SIGKILL, to the child alone
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// parentVar makes the test binary a program that runs a child process.
const parentVar = "DOCSTEST_PARENT"

func TestMain(m *testing.M) {
	if pipe := os.Getenv(parentVar); pipe != "" {
		run(context.Background(), "sh", "-c", `echo $$ >"$0"; exec sleep 60`, pipe)
		os.Exit(1)
	}
	os.Exit(testos.Run(m))
}

func TestRunOutput(t *testing.T) {
	out, err := run(t.Context(), "sh", "-c", "echo out; echo err >&2; exit 3")
	var exit *exec.ExitError
	if out != "out\nerr\n" || !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("got %q, %v", out, err)
	}
}

// TestRunCancel checks that a cancel reaches the child's own child.
func TestRunCancel(t *testing.T) {
	pipe := newPipe(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := run(ctx, "sh", "-c", `sleep 60 & echo $! >"$0"; wait`, pipe)
		done <- err
	}()
	grandchild := readPID(t, pipe)
	cancel()
	if err := <-done; err == nil {
		t.Error("no error after a cancel")
	}
	awaitEnd(t, grandchild)
}

// TestRunKilledParent checks that the child ends when the program is killed.
func TestRunKilledParent(t *testing.T) {
	pipe := newPipe(t)
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), parentVar+"="+pipe)
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	child := readPID(t, pipe)
	parent.Process.Kill()
	parent.Wait()
	awaitEnd(t, child)
}

// newPipe returns the path of a new named pipe.
func newPipe(t *testing.T) string {
	t.Helper()
	path := t.TempDir() + "/pipe"
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// readPID reads the ID of a process from a pipe.
func readPID(t *testing.T, pipe string) int {
	t.Helper()
	file, err := os.Open(pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	line, _ := bufio.NewReader(file).ReadString('\n')
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// awaitEnd waits until a process has ended. A zombie has ended: it stays if no process
// reaps orphans.
func awaitEnd(t *testing.T, pid int) {
	t.Helper()
	for range 1000 {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("process %d still runs", pid)
}
