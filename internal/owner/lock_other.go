//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd)

package owner

import (
	"errors"
	"os"
)

const canLock = false

func lock(*os.File, bool) error { return errors.ErrUnsupported }

func share(*os.File, os.FileInfo) {}
