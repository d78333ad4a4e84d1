//go:build cgo && unix

package engine

import (
	"cmp"
	"database/sql"
	"iter"
	"math"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/owner"
	"github.com/mynt-nas/task/internal/testos"
)

func TestMain(m *testing.M) {
	faultyStores["early"] = newEarlyStore
	faultyStores["lossy"] = func(_ string, s *task.SQLiteStore) task.Persistence { return &lossyStore{SQLiteStore: s} }
	faultyStores["no recovery"] = func(_ string, s *task.SQLiteStore) task.Persistence { return nonRecoveringStore{s} }
	faultyStores["takes over all"] = func(path string, s *task.SQLiteStore) task.Persistence { return grabbingStore{s, path} }
	faultyStores["recovers all"] = func(path string, s *task.SQLiteStore) task.Persistence { return overeagerStore{s, path} }
	Main(SQLite)
	os.Exit(testos.Run(m))
}

// testDir is t.TempDir, but the directory stays if the test fails.
func testDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "storm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the directory is %s", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// stormVar names the environment variable that says how long TestStorm takes,
// as time.ParseDuration reads it.
const stormVar = "TASK_STORM"

func TestStorm(t *testing.T) {
	duration, err := time.ParseDuration(cmp.Or(os.Getenv(stormVar), "3s"))
	if err != nil {
		t.Fatalf("%s: %v", stormVar, err)
	}
	for name, resume := range map[string]bool{"failing": false, "resuming": true} {
		t.Run(name, func(t *testing.T) { testStorm(t, duration/2, resume) })
	}
}

func testStorm(t *testing.T, duration time.Duration, resume bool) {
	s := &Storm{Backend: SQLite, Dir: testDir(t), Seed: rand.Uint64(), Kills: math.MaxInt, Until: time.Now().Add(duration), Resume: resume}
	if err := s.Run(); err != nil {
		t.Error(err)
	}
	t.Logf("seed %d: %v", s.Seed, s.Total)
	for _, text := range s.Bad {
		t.Error(text)
	}
	if s.Total.Kills == 0 || s.Total.Submitted == 0 || s.Total.Finished == 0 || s.Total.Checks == 0 || resume != (s.Total.Resumed > 0) {
		t.Error("the storm has done nothing")
	}
}

// TestViolations checks that the checker finds each violation by a worker, its
// store or other code.
func TestViolations(t *testing.T) {
	for _, test := range []struct {
		name   string
		store  string                     // the store that the workers use
		change string                     // a statement, repeated until it changes something
		tamper func(*testing.T, *checker) // other tampering
		want   string                     // regexp of the violations: any of several checks may find it first
	}{
		{name: "confirmed before stored", store: "early", want: "was acknowledged, but there is no row|not found|Task failed due to system restart"},
		{name: "final state not stored", store: "lossy", want: "shown as finished"},
		{name: "no recovery", store: "no recovery", want: "an unfinished operation belongs to a dead process|owner files, but at most"},
		{name: "recovery of live operations", store: "recovers all", want: "Task failed due to system restart"},
		{name: "take-over of live operations", store: "takes over all", want: "forbidden way|resumed by|has the owner of another|shown as finished|ended as|dead process"},
		{
			name:   "row deleted",
			change: `DELETE FROM tasks WHERE rowid = (SELECT min(rowid) FROM tasks WHERE state = 'DONE')`,
			want:   "are left|not found|but there is no row|shown as finished",
		},
		{
			name:   "result changed",
			change: `UPDATE tasks SET result = '1' WHERE rowid = (SELECT min(rowid) FROM tasks WHERE state = 'DONE' AND result <> '1')`,
			want:   "a finished row has changed|result 1, error|shown as finished",
		},
		{
			name:   "state changed",
			change: `UPDATE tasks SET state = 'RUNNING' WHERE rowid = (SELECT min(rowid) FROM tasks WHERE state = 'CANCELLED')`,
			want:   "a finished row has changed|shown as finished|Task failed due to system restart",
		},
		{
			name: "live operations failed",
			change: `UPDATE tasks SET state = 'FAILED', error = 'Task failed due to system restart', updated_at = created_at
				WHERE state IN ('PENDING', 'RUNNING')`,
			want: "Task failed due to system restart",
		},
		{
			name:   "row that no worker submitted",
			change: `INSERT OR IGNORE INTO tasks (id, name, state, owner) VALUES ('x', 'x', 'PENDING', NULL)`,
			want:   "no worker has submitted",
		},
		{
			name: "index corrupt",
			change: `PRAGMA writable_schema = ON;
				UPDATE sqlite_schema SET sql = replace(sql, '''DONE''', '''NONE''') WHERE name = 'tasks_state_not_done'`,
			want: "integrity check",
		},
		{name: "owner files accumulate", tamper: leaveOwners, want: "owner files"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			s := &Storm{Backend: SQLite, Dir: testDir(t), Seed: rand.Uint64(), Kills: math.MaxInt, Until: time.Now().Add(time.Minute), faulty: test.store,
				Resume: test.store == "takes over all"}
			done := false
			s.tamper = func(c *checker) error {
				if test.change != "" && !done {
					done = change(t, c, test.change)
				}
				if test.tamper != nil {
					test.tamper(t, c)
				}
				return nil
			}
			if err := s.Run(); err != nil {
				t.Error(err)
			}
			if all := strings.Join(s.Bad, "\n"); !regexp.MustCompile(test.want).MatchString(all) {
				t.Errorf("found %d violations, none of them %q: %s", s.Total.Violations, test.want, all)
			}
		})
	}
}

// change runs a statement and reports whether it has changed anything that the
// checker has seen.
func change(t *testing.T, c *checker, stmt string) bool {
	if err := c.check(); err != nil {
		t.Error(err)
	}
	db, err := sql.Open("sqlite3", databasePath(c.dir)+"?_busy_timeout=8000")
	if err != nil {
		t.Error(err)
		return true
	}
	defer db.Close()
	res, err := db.Exec(stmt)
	if err != nil {
		t.Error(err)
		return true
	}
	n, err := res.RowsAffected()
	return err != nil || n > 0
}

// leaveOwners creates files of live owners that own nothing.
func leaveOwners(t *testing.T, c *checker) {
	for range 2 * slots {
		o, err := owner.New(databasePath(c.dir))
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { o.Release() })
	}
}

// An earlyStore confirms operations a second before it stores them.
type earlyStore struct {
	*task.SQLiteStore
	mu    sync.Mutex // guards what follows
	queue []func()
}

func newEarlyStore(_ string, s *task.SQLiteStore) task.Persistence {
	e := &earlyStore{SQLiteStore: s}
	go func() {
		for range time.Tick(time.Second) {
			e.mu.Lock()
			queue := e.queue
			e.queue = nil
			e.mu.Unlock()
			for _, write := range queue {
				write()
			}
		}
	}()
	return e
}

func (s *earlyStore) WriteBatch(saves, updates []*task.Operation) []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queue = append(s.queue, func() { s.SQLiteStore.WriteBatch(saves, updates) })
	return nil
}

// A lossyStore confirms some final states that it does not store.
type lossyStore struct {
	*task.SQLiteStore
	n int // final states so far; only one goroutine of the manager writes
}

func (s *lossyStore) WriteBatch(saves, updates []*task.Operation) []error {
	for i, op := range updates {
		if op.State.Finished() {
			s.n++
		}
		if op.State.Finished() && s.n%10 == 0 {
			other := *op
			other.State = task.StateRunning
			updates[i] = &other
		}
	}
	return s.SQLiteStore.WriteBatch(saves, updates)
}

// A nonRecoveringStore recovers nothing.
type nonRecoveringStore struct{ *task.SQLiteStore }

func (nonRecoveringStore) Recover(string, func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(func(*task.Operation, error) bool) {}
}

// An overeagerStore recovers operations of live processes.
type overeagerStore struct {
	*task.SQLiteStore
	path string
}

func (s overeagerStore) Recover(reason string, _ func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		db, err := sql.Open("sqlite3", s.path+"?_busy_timeout=8000")
		if err == nil {
			defer db.Close()
			_, err = db.Exec(`UPDATE tasks SET state = 'FAILED', error = ? WHERE state IN ('PENDING', 'RUNNING')`, reason)
		}
		if err != nil {
			yield(nil, err)
		}
	}
}

// A grabbingStore takes over operations of live processes.
type grabbingStore struct {
	*task.SQLiteStore
	path string
}

func (s grabbingStore) Recover(_ string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		db, err := sql.Open("sqlite3", s.path+"?_busy_timeout=8000")
		if err != nil {
			yield(nil, err)
			return
		}
		defer db.Close()
		ops, _ := s.ListFiltered(task.Filter{States: []task.State{task.StatePending, task.StateRunning}}, 10, 0)
		for _, op := range ops {
			if !resume(op) {
				continue
			}
			if _, err := db.Exec(`UPDATE tasks SET state = 'PENDING', owner = ? WHERE id = ?`, s.Owner(), op.ID); err != nil {
				yield(nil, err)
				return
			}
			op.State, op.Owner = task.StatePending, s.Owner()
			if !yield(op, nil) {
				return
			}
		}
	}
}
