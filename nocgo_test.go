//go:build !cgo

package task_test

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/mynt-nas/task"
)

// TestWithoutCgo is run on its own, in a build with CGO_ENABLED=0.
func TestWithoutCgo(t *testing.T) {
	_, err := task.OpenSQLite(filepath.Join(t.TempDir(), "tasks.db"))
	if err == nil || !strings.Contains(err.Error(), "cgo") || !strings.Contains(err.Error(), "NewSQLiteStore") {
		t.Errorf("OpenSQLite: %v", err)
	}
}
