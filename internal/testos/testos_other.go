//go:build !linux

package testos

import (
	"errors"
	"os"
)

// Unprivileged calls f with the rights to files that an ordinary user has. It
// reports whether it could: here only if the tests don't run as root.
func Unprivileged(f func()) bool {
	if os.Geteuid() <= 0 {
		return false
	}
	f()
	return true
}

// Umask does nothing: most developers' mask is the one that tests want.
func Umask(int) (restore func()) { return func() {} }

// Mkfifo returns an error.
func Mkfifo(string) error { return errors.ErrUnsupported }
