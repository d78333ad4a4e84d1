//go:build !linux || !(386 || amd64 || arm || arm64 || loong64 || riscv64 || s390x)

package main

import (
	"errors"
	"os"
)

// clone is not supported on this system.
func clone(dst, src *os.File) error { return errors.ErrUnsupported }
