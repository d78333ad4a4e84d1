//go:build unix

package taskpg

import (
	"sync"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
	"github.com/mynt-nas/task/tasktest"
)

func TestPersistence(t *testing.T) {
	for _, mode := range []string{"straight", "session", "transaction"} {
		t.Run(mode, func(t *testing.T) {
			// Each directory of a store maps to a schema of one database.
			dsn := pgtest.Database(t)
			if mode != "straight" {
				dsn = pgtest.Pooler(t, dsn, mode)
			}
			var mu sync.Mutex
			schemas := make(map[string]string)
			tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
				mu.Lock()
				defer mu.Unlock()
				if schemas[dir] == "" {
					schemas[dir] = "Schema " + string(rune('a'+len(schemas)))
				}
				return Open(t.Context(), dsn, WithSchema(schemas[dir]))
			})
		})
	}
}
