package task_test

import (
	"testing"

	"github.com/mynt-nas/task"
)

func TestStateFinished(t *testing.T) {
	for state, want := range map[task.State]bool{
		task.StatePending:   false,
		task.StateRunning:   false,
		task.StateDone:      true,
		task.StateFailed:    true,
		task.StateCancelled: true,
		"":                  false,
		"done":              false,
	} {
		if got := state.Finished(); got != want {
			t.Errorf("State(%q).Finished() = %v, want %v", state, got, want)
		}
	}
}
