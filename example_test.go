package task_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"github.com/mynt-nas/task"
)

func ExampleManager_Submit() {
	manager := task.NewManager(nil) // in memory; see OpenSQLite
	defer manager.Close()

	op, err := manager.Submit("create pool", func(ctx context.Context, update func(int)) (any, error) {
		update(25)
		// Perform work, report progress, watch ctx ...
		update(75)
		return map[string]int{"disks": 4}, nil
	}, task.WithMetadata(map[string]string{"pool": "tank"}))
	if err != nil {
		log.Fatal(err)
	}

	op, err = manager.Wait(context.Background(), op.ID)
	if err != nil {
		log.Fatal(err)
	}
	var result struct{ Disks int }
	if err := op.DecodeResult(&result); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s: %s, %d%%, %d disks\n", op.Name, op.State, op.Progress, result.Disks)
	// Output: create pool: DONE, 100%, 4 disks
}

func ExampleManager_Cancel() {
	manager := task.NewManager(nil)
	defer manager.Close()

	op, err := manager.Submit("scrub", func(ctx context.Context, update func(int)) (any, error) {
		<-ctx.Done() // an endless scrub
		return nil, context.Cause(ctx)
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := manager.Cancel(op.ID); err != nil { // or op.Cancel()
		log.Fatal(err)
	}
	op, _ = manager.Wait(context.Background(), op.ID)
	fmt.Println(op.State)

	err = manager.Cancel(op.ID)
	fmt.Println(errors.Is(err, task.ErrNotFound))
	// Output:
	// CANCELLED
	// true
}

func ExampleManager_Get() {
	manager := task.NewManager(nil)
	defer manager.Close()

	op, err := manager.Submit("resilver", func(context.Context, func(int)) (any, error) {
		return nil, errors.New("disk ada3 does not answer")
	})
	if err != nil {
		log.Fatal(err)
	}
	manager.Wait(context.Background(), op.ID)

	op, exists := manager.Get(op.ID)
	if !exists {
		log.Fatal("not found")
	}
	switch op.State {
	case task.StateRunning:
		fmt.Printf("Progress: %d%%\n", op.Progress)
	case task.StateDone:
		fmt.Printf("Completed: %v\n", op.Result)
	case task.StateFailed:
		fmt.Printf("Failed: %s\n", op.Error)
	}
	// Output: Failed: disk ada3 does not answer
}

func ExampleManager_List() {
	manager := task.NewManager(nil)
	defer manager.Close()

	for _, name := range []string{"first", "second", "third"} {
		op, err := manager.Submit(name, func(context.Context, func(int)) (any, error) { return nil, nil })
		if err != nil {
			log.Fatal(err)
		}
		manager.Wait(context.Background(), op.ID)
	}

	ops, err := manager.List(2, 0) // limit 2, offset 0
	if err != nil {
		log.Fatal(err)
	}
	for _, op := range ops {
		fmt.Printf("%s - %s (%d%%)\n", op.Name, op.State, op.Progress)
	}
	// Output:
	// third - DONE (100%)
	// second - DONE (100%)
}

func ExampleManager_Wait() {
	manager := task.NewManager(nil)
	defer manager.Close()

	finish := make(chan bool)
	op, err := manager.Submit("replicate", func(_ context.Context, update func(int)) (any, error) {
		update(60)
		<-finish
		return nil, nil
	})
	if err != nil {
		log.Fatal(err)
	}

	// Look at it again after 10 milliseconds at most.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	op, err = manager.Wait(ctx, op.ID)
	fmt.Println(op.State, errors.Is(err, context.DeadlineExceeded))

	// Wait for as long as it takes.
	close(finish)
	op, err = manager.Wait(context.Background(), op.ID)
	fmt.Println(op.State, err)
	// Output:
	// RUNNING true
	// DONE <nil>
}

func ExampleNew_recovery() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "tasks.db")

	// A program that crashes in the middle of its work leaves this.
	store, err := task.OpenSQLite(path)
	if err != nil {
		log.Fatal(err)
	}
	err = store.Save(&task.Operation{ID: uuid.NewString(), Name: "scrub tank", State: task.StateRunning, Progress: 40})
	if err != nil {
		log.Fatal(err)
	}
	store.Close()

	// The next program to start finds it.
	store, err = task.OpenSQLite(path)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	manager, err := task.New(store, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	ops, err := manager.List(10, 0)
	if err != nil {
		log.Fatal(err)
	}
	for _, op := range ops {
		fmt.Printf("%s: %s at %d%%: %s\n", op.Name, op.State, op.Progress, op.Error)
	}
	// Output:
	// scrub tank: FAILED at 40%: Task failed due to system restart
}

// An interrupted operation continues from its stored place after a restart.
func ExampleWithResume() {
	// This stands for the database of a program that has crashed after checking 600 blocks.
	store := task.NewMemoryStore()
	err := store.Save(&task.Operation{ID: uuid.NewString(), Name: "scrub tank", State: task.StateRunning, Metadata: 600})
	if err != nil {
		log.Fatal(err)
	}

	scrub := func(op *task.Operation) (task.Func, []task.SubmitOption) {
		var block int
		if err := op.DecodeMetadata(&block); err != nil {
			return nil, nil // FAILED, as without WithResume
		}
		return func(ctx context.Context, update func(int)) (any, error) {
			for ; block < 1000; block += 100 {
				update(block / 10)
				// Check the blocks, then store the place ...
				if err := errors.Join(task.SetMetadata(ctx, block), task.Checkpoint(ctx)); err != nil {
					return nil, err
				}
			}
			return fmt.Sprint("no errors in ", block, " blocks"), nil
		}, []task.SubmitOption{task.WithLock("tank")}
	}
	manager, err := task.New(store, task.WithResume(scrub), task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	ops, err := manager.List(10, 0)
	if err != nil {
		log.Fatal(err)
	}
	for _, op := range ops {
		op, err := manager.Wait(context.Background(), op.ID)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s: %s: %v\n", op.Name, op.State, op.Result)
	}
	// Output:
	// scrub tank: DONE: no errors in 1000 blocks
}

// A scheduler takes each snapshot once, however often it asks.
func ExampleWithID() {
	manager := task.NewManager(nil)
	defer manager.Close()

	for range 2 {
		op, err := manager.Submit("snapshot", func(context.Context, func(int)) (any, error) {
			fmt.Println("taking the snapshot")
			return nil, nil
		}, task.WithID("auto-tank-2026-11-25"))
		if err != nil && !errors.Is(err, task.ErrExists) {
			log.Fatal(err)
		}
		op, err = manager.Wait(context.Background(), op.ID)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(op.ID, op.State)
	}
	// Output:
	// taking the snapshot
	// auto-tank-2026-11-25 DONE
	// auto-tank-2026-11-25 DONE
}

// Two clicks on a button start one scrub.
func ExampleWithUnique() {
	manager := task.NewManager(nil)
	defer manager.Close()

	click := func() (*task.Operation, error) {
		return manager.Submit("scrub tank", func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}, task.WithUnique("scrub tank"))
	}
	first, err := click()
	if err != nil {
		log.Fatal(err)
	}
	second, err := click()
	fmt.Println(second.ID == first.ID, errors.Is(err, task.ErrExists))
	// Output:
	// true true
}

// An operation shows a message about its current work, and who cancelled it.
func ExampleManager_CancelCause() {
	manager := task.NewManager(nil)
	defer manager.Close()

	op, err := manager.Submit("scrub", func(ctx context.Context, update func(int)) (any, error) {
		update(30)
		if err := task.SetMessage(ctx, "checking ada3"); err != nil {
			return nil, err
		}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err != nil {
		log.Fatal(err)
	}
	for op, err := range manager.Watch(context.Background(), op.ID) {
		if err != nil {
			log.Fatal(err)
		}
		if op.Message != "" && !op.Cancelling && !op.State.Finished() {
			if err := manager.CancelCause(op.ID, "asked for by alice"); err != nil {
				log.Fatal(err)
			}
		}
		if op.State.Finished() {
			fmt.Printf("%s at %d%% (%s): %s\n", op.State, op.Progress, op.Message, op.Error)
		}
	}
	// Output:
	// CANCELLED at 30% (checking ada3): asked for by alice
}

// Options combine.
func ExampleByMetadata() {
	manager := task.NewManager(nil)
	defer manager.Close()

	start := time.Now()
	for _, pool := range []string{"tank", "backup", "tank"} {
		op, err := manager.Submit("Scrub of "+pool, func(context.Context, func(int)) (any, error) { return "no errors", nil },
			task.WithMetadata(map[string]string{"pool": pool}))
		if err != nil {
			log.Fatal(err)
		}
		manager.Wait(context.Background(), op.ID)
	}

	ops, err := manager.List(10, 0, task.ByMetadata("pool", "tank"), task.Containing("scrub"), task.ByState(task.StateDone),
		task.FinishedAfter(start), task.FinishedBefore(start.Add(time.Hour)), task.ByFinish(), task.WithoutResults())
	if err != nil {
		log.Fatal(err)
	}
	for _, op := range ops {
		fmt.Println(op.Name, op.Result)
	}
	// Output:
	// Scrub of tank <nil>
	// Scrub of tank <nil>
}
