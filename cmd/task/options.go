package main

import (
	"strings"

	"github.com/mynt-nas/task"
)

// A stand-in until Operation.Interrupted exists.
func interrupted(op *task.Operation) bool {
	return op.State == task.StateFailed && strings.HasPrefix(op.Error, "Task failed due to system ")
}
