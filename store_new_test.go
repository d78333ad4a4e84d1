//go:build newcore

package task_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// A repository is a store as an application may have it already: the four
// methods on a table of the specification's nine columns. Its Get of a missing
// ID returns sql.ErrNoRows, and its Update does not look for a row.
type repository struct{ db *sql.DB }

func newRepository(t testing.TB) repository {
	t.Helper()
	db, err := sql.Open("sqlite3", testkit.FastPath(t))
	must(t, err)
	t.Cleanup(func() { db.Close() })
	_, err = db.Exec(`CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, progress INTEGER DEFAULT 0,
		metadata TEXT, result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME)`)
	must(t, err)
	return repository{db}
}

// text returns metadata or a result as a cell.
func text(v any) any {
	if v == nil {
		return nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return string(raw)
}

func (r repository) Save(op *task.Operation) error {
	_, err := r.db.Exec(`INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`, op.ID, op.Name, op.State, op.Progress,
		text(op.Metadata), text(op.Result), op.Error, op.CreatedAt, op.UpdatedAt)
	return err
}

func (r repository) Update(op *task.Operation) error {
	_, err := r.db.Exec(`UPDATE tasks SET state = ?, progress = ?, metadata = ?, result = ?, error = ?, updated_at = ? WHERE id = ?`,
		op.State, op.Progress, text(op.Metadata), text(op.Result), op.Error, op.UpdatedAt, op.ID)
	return err
}

const repositoryColumns = `SELECT id, name, state, progress, metadata, result, error, created_at, updated_at FROM tasks `

func scan(row interface{ Scan(...any) error }) (*task.Operation, error) {
	var op task.Operation
	var metadata, result sql.Null[jsonText]
	err := row.Scan(&op.ID, &op.Name, &op.State, &op.Progress, &metadata, &result, &op.Error, &op.CreatedAt, &op.UpdatedAt)
	if err != nil {
		return nil, fmt.Errorf("read operation: %w", err)
	}
	if metadata.Valid {
		op.Metadata = metadata.V
	}
	if result.Valid {
		op.Result = result.V
	}
	return &op, nil
}

// A jsonText is a cell that holds JSON, and encodes as that.
type jsonText string

func (j jsonText) MarshalJSON() ([]byte, error) { return []byte(j), nil }

func (r repository) Get(id string) (*task.Operation, error) {
	return scan(r.db.QueryRow(repositoryColumns+`WHERE id = ?`, id))
}

func (r repository) List(limit, offset int) (ops []*task.Operation, err error) {
	rows, err := r.db.Query(repositoryColumns+`ORDER BY rowid DESC LIMIT ? OFFSET ?`, limit, offset)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		op, err := scan(rows)
		if err != nil {
			return nil, err
		}
		ops = append(ops, op)
	}
	return ops, rows.Err()
}

// TestRepository: a manager works on such a store, and an unknown ID is
// ErrNotFound wherever one is given.
func TestRepository(t *testing.T) {
	db := newRepository(t)
	must(t, db.Save(&task.Operation{ID: "left", Name: "left", State: task.StateRunning, CreatedAt: time.Now(), UpdatedAt: time.Now()}))
	m, l := testkit.NewLogged(t, db)
	l.WantRecovered(t, "left")
	op := submit(t, m, func(context.Context, func(int)) (any, error) { return "result", nil }, task.WithMetadata("metadata"))
	if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != "result" || got.Metadata != "metadata" {
		t.Errorf("%+v", got)
	}
	for name, err := range map[string]error{
		"Cancel":                         m.Cancel("unknown"),
		"Wait":                           second(m.Wait(t.Context(), "unknown")),
		"Watch":                          lastError(m.Watch(t.Context(), op.ID, "unknown")),
		"Before":                         second(m.List(10, 0, task.Before("unknown"))),
		"Cancel of a finished operation": m.Cancel(op.ID),
	} {
		if !errors.Is(err, task.ErrNotFound) {
			t.Errorf("%s: %v, want ErrNotFound", name, err)
		}
	}
	if got, ok := m.Get("unknown"); ok || got != nil {
		t.Errorf("Get: %+v, %v", got, ok)
	}
}

func second[T any](_ T, err error) error { return err }

func lastError(events iter.Seq2[*task.Operation, error]) (err error) {
	for _, err = range events {
	}
	return err
}

// TestRepositoryOvertaken deletes an operation of such a store while it is
// recovered, and another while it runs.
func TestRepositoryOvertaken(t *testing.T) {
	db := newRepository(t)
	fake := testkit.NewFake(db)
	for _, id := range []string{"before", "deleted", "after"} {
		left(t, db, id, task.StateRunning)
	}
	remove := func(id string) {
		_, err := db.db.Exec(`DELETE FROM tasks WHERE id = ?`, id)
		must(t, err)
	}
	fake.Before(func(c *testkit.Call) error {
		if c.Method == "Get" && c.ID == "deleted" {
			remove(c.ID)
		}
		return nil
	})
	m, l := testkit.NewLogged(t, testkit.Bare(fake))
	l.WantRecovered(t, "before", "after")
	fn, started, release := blocker(nil)
	op := submit(t, m, fn)
	<-started
	remove(op.ID)
	release()
	m.Wait(t.Context(), op.ID) // the store does not say that the row is gone
	if got, ok := m.Get(op.ID); ok {
		t.Errorf("Get: %+v", got)
	}
	if _, err := m.Wait(t.Context(), op.ID); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Wait: %v", err)
	}
}

// TestUnsupported: a store whose method returns errors.ErrUnsupported counts as
// one without that ability.
func TestUnsupported(t *testing.T) {
	abilities := []string{"WriteBatch", "Recover", "ListFiltered", "Prune"}
	tests := [][]string{abilities}
	for _, method := range abilities {
		tests = append(tests, []string{method})
	}
	for _, methods := range tests {
		t.Run(fmt.Sprint(methods), func(t *testing.T) {
			memory := task.NewMemoryStore()
			left(t, memory, "left", task.StateRunning)
			db := testkit.NewFake(memory)
			db.Before(func(c *testkit.Call) error {
				if slices.Contains(methods, c.Method) {
					return fmt.Errorf("the store behind this one: %w", errors.ErrUnsupported)
				}
				return nil
			})
			m, l := testkit.NewLogged(t, db)
			l.WantRecovered(t, "left")
			historyOf(t, m, "D1", "F1", "R1", "D2")
			if ops, err := m.List(10, 0, task.ByState(task.StateDone, task.StateRunning)); err != nil || names(ops) != "D2 R1 D1" {
				t.Errorf("List: %s, %v", names(ops), err)
			}
			n, err := m.Prune(time.Now().Add(time.Minute))
			if !slices.Contains(methods, "Prune") {
				if err != nil || n != 4 {
					t.Errorf("Prune: %d, %v", n, err)
				}
			} else if !errors.Is(err, errors.ErrUnsupported) || n != 0 {
				t.Errorf("Prune: %d, %v, want ErrUnsupported", n, err)
			}
			for _, method := range abilities {
				if db.Count(method) == 0 {
					t.Errorf("%s was not called", method)
				}
			}
		})
	}
}

// TestListByStateWhileStoreFails: List finds this manager's operations by the
// state that they are shown in, also while that can't be stored, and waits for
// no write.
func TestListByStateWhileStoreFails(t *testing.T) {
	for _, fault := range []string{"writes fail", "writes hang"} {
		for name, open := range testkit.Stores {
			t.Run(fault+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					hang := make(chan struct{})
					release := sync.OnceFunc(func() { close(hang) })
					defer release()
					listByState(t, testkit.NewFake(open(t)), name != "four methods", func() error {
						if fault == "writes fail" {
							return errDisk
						}
						<-hang
						return nil
					}, release)
				})
			})
		}
	}
}

func listByState(t *testing.T, fake *testkit.Fake, abilities bool, fault func() error, release func()) {
	var db task.Persistence = fake
	if !abilities {
		db = testkit.Bare(fake)
	}
	m := newManager(t, db, task.WithLimit(2))
	c := &crew{t: t, m: m, ids: make(map[string]string), ends: make(map[string]chan struct{})}
	for _, step := range []string{"+D1", "-D1", "+R1", "+R2", "+P1", "+P2", "+P3"} {
		c.do(step)
	}
	time.Sleep(time.Second) // R1 and R2 are stored as RUNNING
	fake.Before(func(c *testkit.Call) error {
		if len(c.Saves)+len(c.Updates) > 0 {
			return fault()
		}
		return nil
	})
	c.do("-R2") // its final state can't be stored, so it stays RUNNING; P1 starts
	c.do("!P2") // it stays PENDING
	checkStates(t, c)
	fake.Before(nil)
	release()
	time.Sleep(2 * time.Second)
	c.do("?R2 DONE")
	c.do("?P2 CANCELLED")
	if ops, err := m.List(10, 0, task.ByState(task.StateRunning)); err != nil || names(ops) != "P1 R1" {
		t.Errorf("once the store works again, List = %q, %v", names(ops), err)
	}
	must(t, m.Close())
}

// checkStates lists the operations of listByState by their states.
func checkStates(t *testing.T, c *crew) {
	t.Helper()
	before := func(name string) task.ListOption { return task.Before(c.ids[name]) }
	states := func(states ...task.State) task.ListOption { return task.ByState(states...) }
	for _, tt := range []struct {
		want          string
		limit, offset int
		opts          []task.ListOption
	}{
		{"P1 R2 R1", 10, 0, []task.ListOption{states(task.StateRunning)}},
		{"R2", 1, 1, []task.ListOption{states(task.StateRunning)}},
		{"R2 R1", 10, 0, []task.ListOption{states(task.StateRunning), before("P1")}},
		{"R1", 10, 1, []task.ListOption{states(task.StateRunning), before("P1")}},
		{"R2", 10, 0, []task.ListOption{states(task.StateRunning), task.ByName("R2")}},
		{"P3 P2", 10, 0, []task.ListOption{states(task.StatePending)}},
		{"P2", 10, 0, []task.ListOption{states(task.StatePending), before("P3")}},
		{"", 10, 0, []task.ListOption{states(task.StatePending), task.ByName("P1")}},
		{"D1", 10, 0, []task.ListOption{states(task.StateDone)}},
		{"", 10, 0, []task.ListOption{states(task.StateCancelled, task.StateFailed)}},
		{"P1 R2 R1 D1", 10, 0, []task.ListOption{states(task.StateRunning, task.StateDone)}},
		{"P3 P2 P1 R2 R1 D1", 10, 0, nil},
	} {
		began := time.Now()
		ops, err := c.m.List(tt.limit, tt.offset, tt.opts...)
		if took := time.Since(began); err != nil || names(ops) != tt.want || took > 0 {
			t.Errorf("List(%d, %d, ...) = %q, %v after %v, want %q at once", tt.limit, tt.offset, names(ops), err, took, tt.want)
		}
		for _, op := range ops {
			if shown, _ := c.m.Get(op.ID); shown.State != op.State {
				t.Errorf("%s is listed as %s and is %s", op.Name, op.State, shown.State)
			}
		}
	}
}
