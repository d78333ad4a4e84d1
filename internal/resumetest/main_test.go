package resumetest

import (
	"testing"

	"github.com/mynt-nas/task/internal/testkit"
)

func TestMain(m *testing.M) {
	testkit.Main(m, nil)
}
