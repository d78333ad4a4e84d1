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

// Unprivileged calls f in a separate goroutine with the file permissions of an ordinary
// user, even if the tests run as root. It reports whether that was possible. The
// permissions apply only to that goroutine.
func Unprivileged(f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Geteuid() == 0 {
			runtime.LockOSThread() // never unlocked, so that the thread ends with the goroutine
			syscall.Setfsgid(nobody)
			syscall.Setfsuid(nobody)
		}
		f()
	}()
	<-done
	return true
}

// RunMounting runs cmd, which runs a test of this program again, in a process that may
// mount file systems. It skips t if the system does not allow that.
func RunMounting(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) || strings.Contains(string(out), "--- SKIP") {
		t.Skipf("this system does not allow mounting: %v", err)
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

// Mkfifo creates a named pipe.
func Mkfifo(path string) error { return syscall.Mkfifo(path, 0o600) }

// fits reports whether a file system has enough space for the tests, and allows
// programs to run.
func fits(dir string) bool {
	const room, noExec = 1 << 30, 8 // ST_NOEXEC of statvfs
	var s syscall.Statfs_t
	err := syscall.Statfs(dir, &s)
	return err == nil && s.Bavail*uint64(s.Bsize) >= room && s.Flags&noExec == 0
}
