package testos

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

const nobody = 65534

// Unprivileged calls f, in a goroutine of its own, with the rights to files
// that an ordinary user has, also if the tests run as root. It reports whether
// it could. What f opens it must open in that same goroutine.
func Unprivileged(f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Geteuid() == 0 {
			runtime.LockOSThread() // and never unlocked: the thread ends here
			syscall.Setfsgid(nobody)
			syscall.Setfsuid(nobody)
		}
		f()
	}()
	<-done
	return true
}

// RunMounting runs cmd, which runs a test of this program once more, in a
// process that may mount file systems. It skips t where nobody may.
func RunMounting(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) || strings.Contains(string(out), "--- SKIP") {
		t.Skipf("this system lets nobody mount a small disk: %v", err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v: %s", err, out)
	}
}

// Umask sets the file mode creation mask of the process until restore is called.
func Umask(mask int) (restore func()) {
	old := syscall.Umask(mask)
	return func() { syscall.Umask(old) }
}

// Mkfifo makes a named pipe.
func Mkfifo(path string) error { return syscall.Mkfifo(path, 0o600) }
