// Package testos lets tests do what only some operating systems can.
package testos

import (
	"os"
	"path/filepath"
	"testing"
)

// Dir returns a temporary directory that every user may enter. The one above
// t.TempDir's lets nobody in but its owner.
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
