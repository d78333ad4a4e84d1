//go:build unix

package taskpg

import (
	"testing"

	"github.com/mynt-nas/task/internal/storm/engine"
	"github.com/mynt-nas/task/internal/testkit"
)

func TestMain(m *testing.M) {
	engine.Main(stormBackend)
	testkit.Main(m, map[string]func() any{"store": func() any { return new(role) }})
}
