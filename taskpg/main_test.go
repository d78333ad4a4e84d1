//go:build unix

package taskpg

import (
	"os"
	"testing"

	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
