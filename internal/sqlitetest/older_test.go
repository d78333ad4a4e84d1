//go:build cgo && !task_nosqlite3

package sqlitetest

import (
	"database/sql"
	"fmt"
	"testing"

	"github.com/google/uuid"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// The statements of the package before the columns message, cancel_cause and
// cancel_requested_at were added: commit c3838a9.
var (
	olderSchema = []string{`
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    progress INTEGER DEFAULT 0,
    metadata TEXT,
    result TEXT,
    error TEXT,
    created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    updated_at DATETIME DEFAULT CURRENT_TIMESTAMP,
    started_at DATETIME,
    owner TEXT
)`,
		`CREATE INDEX IF NOT EXISTS tasks_state_not_done ON tasks (state) WHERE state <> 'DONE'`,
		`CREATE INDEX IF NOT EXISTS tasks_unfinished ON tasks (ifnull(CAST(owner AS TEXT), '')) WHERE (state = 'PENDING' OR state = 'RUNNING')`,
		`CREATE INDEX IF NOT EXISTS tasks_finished ON tasks (ifnull(updated_at, '')) WHERE (state = 'DONE' OR state = 'FAILED' OR state = 'CANCELLED')`,
	}
	olderInsert = `INSERT INTO tasks
	(state, progress, metadata, result, error, updated_at, started_at, id, name, created_at, owner) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	olderUpdate = `UPDATE tasks SET state = ?, progress = ?, metadata = ?, result = ?, error = ?,
	updated_at = ?, started_at = ? WHERE id = ? AND state IN ('PENDING', 'RUNNING')`
	olderUpdateMany = `UPDATE tasks SET state = v.column1, progress = v.column2, metadata = v.column3, result = v.column4,
	error = v.column5, updated_at = v.column6, started_at = v.column7
	FROM (VALUES (?, ?, ?, ?, ?, ?, ?, ?), (?, ?, ?, ?, ?, ?, ?, ?)) AS v WHERE id = v.column8 AND state IN ('PENDING', 'RUNNING')`
	olderRecover = `UPDATE tasks SET state = 'FAILED', error = ?, updated_at = ? WHERE rowid = ?`
)

// An older is a process with an older version of the package: a connection, and the
// file that shows that it is alive.
type older struct {
	t     *testing.T
	db    *sql.DB
	owner string
}

func newOlder(t *testing.T, path string) *older {
	testos.CheckLeaks(t)
	db, err := sql.Open("sqlite3", path+"?_journal_mode=WAL&_busy_timeout=10000")
	testkit.Must(t, err)
	t.Cleanup(func() { db.Close() })
	o := &older{t: t, db: db}
	for _, stmt := range olderSchema { // which it executes for a file of any version
		o.exec(stmt)
	}
	return o
}

func (o *older) exec(stmt string, args ...any) {
	o.t.Helper()
	_, err := o.db.Exec(stmt, args...)
	testkit.Must(o.t, err)
}

const olderTime = "2026-01-02 03:04:05.000006"

// cells returns the parameters of an update.
func (o *older) cells(state task.State, progress int, id string) []any {
	return []any{string(state), progress, `"tank"`, nil, nil, olderTime, olderTime, id}
}

func (o *older) insert(state task.State) (id string) {
	id = uuid.Must(uuid.NewV7()).String()
	o.exec(olderInsert, append(o.cells(state, 0, id), "older", olderTime, o.owner)...)
	return id
}

// TestOlderFile opens a database of an older version.
func TestOlderFile(t *testing.T) {
	path := testkit.Path(t)
	o := newOlder(t, path)
	var ids []string
	for _, state := range []task.State{task.StateRunning, task.StateDone, task.StatePending} {
		ids = append(ids, o.insert(state))
	}
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	for i, want := range []task.State{task.StateFailed, task.StateDone, task.StateFailed} {
		got, ok := m.Get(ids[i])
		if !ok || got.State != want || got.Metadata != "tank" || got.Message != "" || got.Cancelling || got.CreatedAt.Year() != 2026 {
			t.Errorf("%+v, want %s", got, want)
		}
	}
	op := testkit.Submit(t, m, testkit.Nothing)
	testkit.Wait(t, m, op.ID)
}

// TestOlderBeside: an older version continues to work on a file that a newer one has
// opened, beside a manager that sees, waits for and watches its operations. The older
// version does not receive cancel requests.
func TestOlderBeside(t *testing.T) {
	path := testkit.Path(t)
	store := testkit.OpenSQLite(t, path)
	m := testkit.NewManager(t, store)
	o := newOlder(t, path)
	o.owner = testkit.OpenSQLite(t, path).Owner() // the ID of a live process, whose file the store holds
	fn, started, release := testkit.Blocker(nil)
	own := testkit.Submit(t, m, fn)
	<-started
	testkit.Must(t, m.Cancel(own.ID))
	ids := []string{o.insert(task.StatePending), o.insert(task.StatePending), o.insert(task.StateRunning)}
	testkit.Must(t, m.CancelCause(ids[0], "in vain"))

	changes := m.Watch(t.Context())
	o.exec(olderUpdate, o.cells(task.StateRunning, 10, ids[0])...)
	o.exec(olderUpdateMany, append(o.cells(task.StateRunning, 20, ids[1]), o.cells(task.StateRunning, 30, ids[2])...)...)
	for i, id := range ids {
		testkit.Must(t, testkit.Until(func() bool { got, _ := m.Get(id); return got.Progress == 10*(i+1) }))
		if got, _ := m.Get(id); got.Cancelling != (i == 0) || got.Owner != o.owner || got.Metadata != "tank" {
			t.Errorf("%+v", got)
		}
	}
	o.exec(olderUpdateMany, append(o.cells(task.StateDone, 100, ids[0]), o.cells(task.StateFailed, 20, ids[1])...)...)
	o.exec(olderRecover, "by recovery of the older version", olderTime, fmt.Sprint(4))
	o.exec(olderUpdate, o.cells(task.StateDone, 100, ids[0])...) // finished: no effect
	release()
	want := map[string]task.State{ids[0]: task.StateDone, ids[1]: task.StateFailed, ids[2]: task.StateFailed, own.ID: task.StateDone}
	for id, state := range want {
		if got := testkit.Wait(t, m, id); got.State != state || got.Cancelling {
			t.Errorf("%+v, want %s", got, state)
		}
	}
	told := 0
	for op, err := range changes {
		testkit.Must(t, err)
		if op.State.Finished() {
			if told++; op.State != want[op.ID] {
				t.Errorf("told %+v", op)
			}
		}
		if told == len(want) {
			break
		}
	}
}
