package task_test

import (
	"testing"

	"github.com/mynt-nas/task/internal/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m, nil) }

// Short names of what most tests here use.
var (
	quiet          = testkit.Quiet
	must           = testkit.Must
	openSQLite     = testkit.OpenSQLite
	sqliteExec     = testkit.Exec
	newManager     = testkit.NewManager
	eachStore      = testkit.EachStore
	submit         = testkit.Submit
	wait           = testkit.Wait
	blocker        = testkit.Blocker
	nothing        = testkit.Nothing
	untilCancelled = testkit.UntilCancelled
	errDisk        = testkit.ErrDisk
)
