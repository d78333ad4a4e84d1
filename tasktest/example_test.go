package tasktest_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/tasktest"
)

// Put this in a file whose name ends in _test.go.
func ExampleTestPersistence() {
	TestStore := func(t *testing.T) {
		tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
			return task.OpenSQLite(filepath.Join(dir, "tasks.db"))
		})
	}
	_ = TestStore
}

// For a store without files, a map from the directory to the store makes it possible to
// open the store again.
func ExampleTestPersistence_memory() {
	TestStore := func(t *testing.T) {
		stores := make(map[string]task.Persistence)
		tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
			if stores[dir] == nil {
				stores[dir] = task.NewMemoryStore()
			}
			return stores[dir], nil
		})
	}
	_ = TestStore
}

// How does a program cope with a full disk? Here the disk fills up while a function runs,
// and later has space again.
func ExampleInject() {
	errFull := errors.New("no space left on device")
	var full atomic.Bool
	db := tasktest.Inject(task.NewMemoryStore(), func(tasktest.Call) error {
		if full.Load() {
			return errFull
		}
		return nil
	})
	manager, err := task.New(db, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	first, err := manager.Submit("first", func(context.Context, func(int)) (any, error) {
		full.Store(true)
		return "no errors found", nil
	})
	if err != nil {
		log.Fatal(err)
	}
	for !full.Load() {
		runtime.Gosched()
	}

	_, err = manager.Submit("second", func(context.Context, func(int)) (any, error) {
		panic("never called")
	})
	fmt.Println("second:", err)
	op, _ := manager.Get(first.ID)
	fmt.Println("first:", op.State)

	full.Store(false)
	op, err = manager.Wait(context.Background(), first.ID)
	fmt.Println("first:", op.State, op.Result, err)
	// Output:
	// second: task: submit "second": no space left on device
	// first: RUNNING
	// first: DONE no errors found <nil>
}

func ExampleFailNth() {
	// The first call is Recover, called by task.New.
	db := tasktest.Inject(task.NewMemoryStore(), tasktest.FailNth(0, errors.New("disk failure")))
	_, err := task.New(db)
	fmt.Println(err)
	manager, err := task.New(db)
	fmt.Println(err)
	manager.Close()
	// Output:
	// task: recovery: disk failure
	// <nil>
}
