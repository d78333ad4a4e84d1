//go:build darwin || dragonfly || freebsd || linux || netbsd

package main

import (
	"os"
	"syscall"
	"unsafe"
)

// console returns the screen behind f.
func console(f *os.File) screen {
	size := func() (width, height int) {
		var w struct{ rows, columns, x, y uint16 }
		_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&w)))
		if errno != 0 {
			return 0, 0
		}
		if w.columns == 0 || w.rows == 0 { // unknown, as on a serial line
			return 80, 24
		}
		return int(w.columns), int(w.rows)
	}
	if width, _ := size(); width == 0 || os.Getenv("TERM") == "dumb" {
		return screen{Writer: f}
	}
	return screen{f, size}
}
