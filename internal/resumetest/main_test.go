package resumetest

import (
	"testing"

	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

func TestMain(m *testing.M) {
	testos.UseMemory()
	testkit.Main(m, nil)
}
