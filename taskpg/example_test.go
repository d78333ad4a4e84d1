package taskpg_test

import (
	"context"
	"log"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskpg"
)

// A program that shares its history with programs on other machines.
func Example() {
	ctx := context.Background()
	store, err := taskpg.Open(ctx, "postgres://tasks@db.example.com/tasks?target_session_attrs=read-write")
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	tasks, err := task.New(store)
	if err != nil {
		log.Fatal(err)
	}
	defer tasks.Close() // before the store
	op, err := tasks.Submit("scrub", func(ctx context.Context, update func(int)) (any, error) { return "no errors", nil })
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("%s is run by %s", op.ID, op.Owner)
}
