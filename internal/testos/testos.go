// Package testos gives tests access to features of some operating systems.
package testos

import (
	"os"
	"path/filepath"
	"testing"
)

// Dir returns a temporary directory that every user may enter. The parent of
// t.TempDir admits only its owner.
func Dir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// longVar names the environment variable that makes tests run long.
const longVar = "TASK_LONG"

// Size returns how much a test should do: long if the environment variable TASK_LONG is
// set, otherwise usual, which finds the same faults less reliably.
func Size(usual, long int) int {
	if os.Getenv(longVar) != "" {
		return long
	}
	return usual
}

// memoryDir is where some systems have a file system in memory.
const memoryDir = "/dev/shm"
