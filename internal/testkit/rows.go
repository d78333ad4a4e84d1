package testkit

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// Rows are the operations of a store by ID, with metadata and results as JSON, for
// comparisons.
type Rows map[string]task.Operation

// Stored returns all operations of a store.
func Stored(t testing.TB, db task.Persistence) Rows {
	t.Helper()
	rows := make(Rows)
	for {
		page, err := db.List(10_000, len(rows))
		Must(t, err)
		if len(page) == 0 {
			return rows
		}
		for _, op := range page {
			row := *op
			row.Metadata, row.Result = raw(t, op.Metadata), raw(t, op.Result)
			rows[op.ID] = row
		}
	}
}

func raw(t testing.TB, v any) json.RawMessage {
	t.Helper()
	raw, err := json.Marshal(v)
	Must(t, err)
	return raw
}

// Unfinished returns the IDs of the unfinished operations.
func (rows Rows) Unfinished() (ids []string) {
	for id, op := range rows {
		if !op.State.Finished() {
			ids = append(ids, id)
		}
	}
	return ids
}

// WantFailed checks that now differs from rows only in the operations with those IDs,
// which recovery has failed.
func (rows Rows) WantFailed(t testing.TB, now Rows, failed ...string) {
	t.Helper()
	want := maps.Clone(rows)
	for _, id := range failed {
		op := want[id]
		op.State, op.Error, op.UpdatedAt = task.StateFailed, RestartText, now[id].UpdatedAt
		want[id] = op
		if latest := slices.MaxFunc([]time.Time{op.CreatedAt, op.StartedAt, rows[id].UpdatedAt}, time.Time.Compare); op.UpdatedAt.Before(latest) {
			t.Errorf("%s: UpdatedAt is %v, before %v", id, op.UpdatedAt, latest)
		}
	}
	if len(now) != len(want) {
		t.Errorf("%d operations are stored, want %d", len(now), len(want))
	}
	for id, op := range want {
		if got := now[id]; !reflect.DeepEqual(got, op) {
			t.Fatalf("stored operation:\n got %+v\nwant %+v", got, op)
		}
	}
}

// Fill adds n unfinished rows of one owner to a database. Their times are ahead of now
// by ahead, a modifier of SQLite's date functions.
func Fill(t testing.TB, path string, n int, owner any, ahead string) {
	t.Helper()
	Exec(t, path, `WITH RECURSIVE n(i) AS (SELECT 1 WHERE ?1 > 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
		INSERT INTO tasks (id, name, state, progress, created_at, started_at, updated_at, owner)
		SELECT printf('%s-%05d', ?2, i), 'left', iif(i % 2, 'PENDING', 'RUNNING'), i % 100,
			strftime('%F %T.000000', 'now', ?3), strftime('%F %T.000001', 'now', ?3), strftime('%F %T.000002', 'now', ?3), ?2
		FROM n`, n, owner, ahead)
}
