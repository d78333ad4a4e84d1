//go:build newcore

package task_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestSubmitWhileStoreFails: rows that were stored although Submit returned an
// error become FAILED. However many Submits fail, the next is tried.
func TestSubmitWhileStoreFails(t *testing.T) {
	never := func(context.Context, func(int)) (any, error) { panic("the function was called") }
	for name, n := range map[string]int{"some": 300, "more than are remembered": 20_100} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				m := newManager(t, testkit.Bare(db))
				db.Before(func(c *testkit.Call) error {
					if c.Method == "Update" {
						return errDisk
					}
					return nil
				})
				db.After(func(c *testkit.Call) {
					if c.Method == "Save" { // which has stored the row
						c.Err = errDisk
					}
				})
				for range n {
					if _, err := m.Submit("never", never); !errors.Is(err, errDisk) {
						t.Fatalf("Submit: %v, want %v", err, errDisk)
					}
				}
				db.Before(nil)
				db.After(nil)
				if op := wait(t, m, submit(t, m, nothing).ID); op.State != task.StateDone {
					t.Errorf("once the store works again: %+v", op)
				}
				time.Sleep(10 * time.Second)
				failed, err := m.List(n+1, 0, task.ByState(task.StateFailed))
				if err != nil || n == 300 && len(failed) != n || len(failed) < 300 {
					t.Errorf("%d of %d operations have failed, %v", len(failed), n, err)
				}
				must(t, m.Close())
				_, l := testkit.NewLogged(t, testkit.Bare(db)) // recovers the others
				if _, recovered := l.Recovered(); len(failed)+recovered != n {
					t.Errorf("%d have failed and %d were recovered, want %d in all", len(failed), recovered, n)
				}
			})
		})
	}
}
