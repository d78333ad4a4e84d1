//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package owner

import (
	"os"
	"syscall"
)

const canLock = true

// lock takes the lock on f without waiting for it, alone or shared with others
// who share it. It is f's until f is closed, also against other open files of
// this process.
func lock(f *os.File, shared bool) error {
	how := syscall.LOCK_EX
	if shared {
		how = syscall.LOCK_SH
	}
	for {
		switch err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); err {
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
