//go:build !(darwin || dragonfly || freebsd || linux || netbsd)

package main

import "os"

// console returns a screen that writes to f and is never a terminal.
func console(f *os.File) screen { return screen{Writer: f} }
