//go:build !unix || solaris || illumos || aix

package main

import "os"

// lockFile only opens the file, because this system has no flock.
func lockFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
}
