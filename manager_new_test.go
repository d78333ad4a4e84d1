//go:build newcore

package task_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestLargeValues: metadata and results are kept up to 16 MiB as JSON.
func TestLargeValues(t *testing.T) {
	const limit = 16 << 20
	quoted := func(n int) any { return strings.Repeat("x", n-2) } // n bytes with the quotes
	for _, tt := range []struct {
		name  string
		value any
		kept  bool
	}{
		{"at the limit", quoted(limit), true},
		{"over the limit", quoted(limit + 1), false},
		{"encoded, over the limit", json.RawMessage(fmt.Sprintf("%q", quoted(limit+1))), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for name, db := range map[string]task.Persistence{"memory": nil, "sqlite": openSQLite(t, testkit.FastPath(t))} {
				m := newManager(t, db)
				if op, err := m.Submit("x", nothing, task.WithMetadata(tt.value)); (err == nil) != tt.kept || (op == nil) == tt.kept {
					t.Errorf("%s: Submit with metadata: %v", name, err)
				}
				var set error
				result := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
					set = task.SetMetadata(ctx, tt.value)
					return tt.value, nil
				}, task.WithMetadata("first"))
				failing := submit(t, m, func(context.Context, func(int)) (any, error) { return tt.value, errDisk })

				got := wait(t, m, result.ID)
				if (set == nil) != tt.kept {
					t.Errorf("%s: SetMetadata: %v", name, set)
				}
				if got.State != task.StateDone || (got.Result != nil) != tt.kept || (got.Metadata == "first") == tt.kept ||
					strings.HasPrefix(got.Error, "result not kept: ") == tt.kept {
					t.Errorf("%s: %s, kept %v, error %q", name, got.State, got.Result != nil, got.Error)
				}
				got = wait(t, m, failing.ID)
				if got.State != task.StateFailed || (got.Result != nil) != tt.kept || !strings.HasPrefix(got.Error, "disk full") ||
					strings.Contains(got.Error, "result not kept: ") == tt.kept {
					t.Errorf("%s: %s, kept %v, error %q", name, got.State, got.Result != nil, got.Error)
				}
			}
		})
	}
}

// TestEmptyError: an operation that failed has an Error that says so, even if
// the function's error has no text.
func TestEmptyError(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for name, value := range map[string]any{"no value": nil, "value": 1, "bad value": make(chan int)} {
			op := submit(t, m, func(context.Context, func(int)) (any, error) { return value, errors.New("") })
			got := wait(t, m, op.ID)
			if got.State != task.StateFailed || strings.TrimSpace(got.Error) == "" || strings.HasPrefix(got.Error, " ") {
				t.Errorf("%s: %s %q", name, got.State, got.Error)
			}
			if stored, err := db.Get(op.ID); err != nil || stored.Error != got.Error {
				t.Errorf("%s: stored %+v, %v", name, stored, err)
			}
		}
	})
}

// TestShutdownText: the cause of the context is not repeated in Error.
func TestShutdownText(t *testing.T) {
	for name, tt := range map[string]struct {
		err  func(ctx context.Context) error
		want string
	}{
		"cause":       {context.Cause, testkit.ShutdownText},
		"ctx.Err":     {context.Context.Err, testkit.ShutdownText},
		"other error": {func(context.Context) error { return errors.New("signal: killed") }, testkit.ShutdownText + ": signal: killed"},
		"empty error": {func(context.Context) error { return errors.New("") }, testkit.ShutdownText},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, nil)
				op := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
					<-ctx.Done()
					return nil, tt.err(ctx)
				})
				synctest.Wait()
				must(t, m.Close())
				if got := wait(t, m, op.ID); got.State != task.StateFailed || got.Error != tt.want {
					t.Errorf("%s %q, want %q", got.State, got.Error, tt.want)
				}
			})
		})
	}
}

// TestCancelPendingAtOnce: Cancel of a PENDING operation waits for no write.
// The operation is shown CANCELLED once that is stored, and never runs.
func TestCancelPendingAtOnce(t *testing.T) {
	for _, fault := range []string{"writes hang", "writes fail"} {
		t.Run(fault, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hang := make(chan struct{})
				db := testkit.NewFake(nil)
				m := newManager(t, testkit.Bare(db), task.WithLimit(1))
				c := &crew{t: t, m: m, ids: make(map[string]string), ends: make(map[string]chan struct{})}
				c.do("+running key")
				c.do("+waiting key")
				c.do("+next key")
				db.Before(func(c *testkit.Call) error {
					if c.Method != "Update" {
						return nil
					}
					if fault == "writes fail" {
						return errDisk
					}
					<-hang
					return nil
				})
				for range 2 {
					must(t, m.Cancel(c.ids["waiting"])) // would be a deadlock if it waited
					c.do("?waiting PENDING")
				}
				waited := make(chan string)
				go func() {
					op, err := m.Wait(context.Background(), c.ids["waiting"])
					waited <- fmt.Sprint(op.State, err)
				}()
				c.do("-running") // its slot and its key go to the next operation
				c.wantStarted("-running", "running next")
				select {
				case got := <-waited:
					t.Errorf("Wait returned %s before that was stored", got)
				default:
				}
				db.Before(nil)
				close(hang)
				if got := <-waited; got != "CANCELLED<nil>" {
					t.Errorf("Wait: %s", got)
				}
				c.do("close")
				c.wantStarted("close", "running next")
			})
		})
	}
}

// TestCancelBeforeSubmitReturns cancels an operation while its first row is
// being stored.
func TestCancelBeforeSubmitReturns(t *testing.T) {
	for name, answer := range map[string]error{"stored": nil, "not stored": errDisk} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				ids, stored := make(chan string), make(chan struct{})
				db.Before(func(c *testkit.Call) error {
					if c.Method != "Save" {
						return nil
					}
					ids <- c.ID
					<-stored
					return answer
				})
				m := newManager(t, testkit.Bare(db))
				submitted := make(chan error)
				go func() {
					_, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
						t.Error("the function was called")
						return nil, nil
					})
					submitted <- err
				}()
				id := <-ids
				must(t, m.Cancel(id)) // would be a deadlock if it waited
				close(stored)
				if err := <-submitted; !errors.Is(err, answer) {
					t.Errorf("Submit: %v, want %v", err, answer)
				}
				op, err := m.Wait(t.Context(), id)
				if answer == nil && (err != nil || op.State != task.StateCancelled) || answer != nil && !errors.Is(err, task.ErrNotFound) {
					t.Errorf("Wait: %+v, %v", op, err)
				}
				must(t, m.Close())
			})
		})
	}
}
