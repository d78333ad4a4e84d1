//go:build newcore

package task_test

import (
	"fmt"
	"testing"

	"github.com/google/uuid"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestRecoveryLog: of many recovered operations 100 are logged one by one, and
// all of them as a sum.
func TestRecoveryLog(t *testing.T) {
	for name, open := range map[string]func(t *testing.T, n int) task.Persistence{
		"sqlite": func(t *testing.T, n int) task.Persistence {
			path := testkit.FastPath(t)
			store := openSQLite(t, path)
			testkit.Fill(t, path, n, uuid.NewString(), "-1 hour")
			return store
		},
		"four methods": func(t *testing.T, n int) task.Persistence {
			memory := task.NewMemoryStore()
			for i := range n {
				left(t, memory, fmt.Sprint(i), task.StatePending)
			}
			return testkit.Bare(memory)
		},
	} {
		for _, tt := range []struct{ n, lines, sums int }{{0, 0, 0}, {1, 1, 1}, {100, 100, 1}, {101, 100, 1}, {20_000, 100, 1}} {
			if name == "four methods" {
				tt.n = min(tt.n, 9000) // a MemoryStore drops what exceeds 10,000
			}
			t.Run(fmt.Sprintf("%s/%d", name, tt.n), func(t *testing.T) {
				m, l := testkit.NewLogged(t, open(t, tt.n))
				lines, sums := l.Count("task: operation interrupted"), l.Count("task: recovered interrupted operations")
				if _, n := l.Recovered(); lines != tt.lines || sums != tt.sums || n != tt.n {
					t.Errorf("%d lines and %d sums of %d operations, want %d, %d, %d", lines, sums, n, tt.lines, tt.sums, tt.n)
				}
				if failed, err := m.List(tt.n+1, 0, task.ByState(task.StateFailed)); err != nil || len(failed) != tt.n {
					t.Errorf("%d operations have failed, %v, want %d", len(failed), err, tt.n)
				}
			})
		}
	}
}
