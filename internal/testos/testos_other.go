//go:build !linux

package testos

import (
	"errors"
	"os"
)

// Unprivileged calls f with the file permissions of an ordinary user. It reports
// whether that was possible: here, only if the tests don't run as root.
func Unprivileged(f func()) bool {
	if os.Geteuid() <= 0 {
		return false
	}
	f()
	return true
}

// Umask does nothing: the tests expect the usual mask.
func Umask(int) (restore func()) { return func() {} }

// Mkfifo returns an error.
func Mkfifo(string) error { return errors.ErrUnsupported }

func fits(string) bool { return false }
