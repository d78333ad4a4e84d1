package task_test

import "github.com/mynt-nas/task/internal/testkit"

// The names that fuzz_test.go and trouble_test.go still use. They go with them.
var (
	recoveryMust   = testkit.Must
	recoveryUntil  = testkit.Until
	procOwnerFiles = testkit.OwnerFiles
)

const recoveryText = testkit.RestartText
