package main

import (
	"strings"
	"time"

	"github.com/mynt-nas/task"
)

// Stand-ins until the list options exist.

func containing(text string) task.ListOption       { return nil }
func byMetadata(key, value string) task.ListOption { return nil }
func finishedAfter(t time.Time) task.ListOption    { return nil }
func byFinish() task.ListOption                    { return nil }
func withoutResults() task.ListOption              { return nil }
func interrupted(op *task.Operation) bool {
	return op.State == task.StateFailed && strings.HasPrefix(op.Error, "Task failed due to system ")
}
