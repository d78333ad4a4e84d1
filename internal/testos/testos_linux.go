package testos

import (
	"os"
	"runtime"
	"syscall"
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

// Umask sets the file mode creation mask of the process until restore is called.
func Umask(mask int) (restore func()) {
	old := syscall.Umask(mask)
	return func() { syscall.Umask(old) }
}

// Mkfifo makes a named pipe.
func Mkfifo(path string) error { return syscall.Mkfifo(path, 0o600) }
