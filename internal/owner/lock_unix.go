//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package owner

import (
	"os"
	"syscall"
)

const canLock = true

// lock takes the lock on f without waiting for it. It is f's until f is
// closed, also against other open files of this process.
func lock(f *os.File) error {
	for {
		switch err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err {
		case nil:
			return nil
		case syscall.EINTR:
		case syscall.EWOULDBLOCK:
			return errLocked
		default:
			return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
	}
}
