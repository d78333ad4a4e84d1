//go:build !(darwin || dragonfly || freebsd || linux || netbsd)

package main

import "os"

// console returns the screen behind a file, which counts as no terminal.
func console(f *os.File) screen { return screen{Writer: f} }
