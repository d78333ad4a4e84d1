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
