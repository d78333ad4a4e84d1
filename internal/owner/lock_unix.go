//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package owner

import (
	"os"
	"syscall"
)

const canLock = true

// lock takes an exclusive or a shared lock on f, without waiting. f holds it until f is
// closed, also against other open files of this process.
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

// share gives the users that may write the database the right to lock the owner's file f.
// If the process may not set the file's group, the group gets no right.
func share(f *os.File, database os.FileInfo) {
	mode := database.Mode().Perm() & 0o222
	if want, ok := database.Sys().(*syscall.Stat_t); ok && f.Chown(int(want.Uid), int(want.Gid)) != nil && f.Chown(-1, int(want.Gid)) != nil {
		mode &^= 0o020 // else another group would get the right
	}
	f.Chmod(0o600 | mode | mode<<1)
}
