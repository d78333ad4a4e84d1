package task_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// recoveryInsert adds an unfinished row as another store would have left it.
func recoveryInsert(t *testing.T, path string, owner any) (id string) {
	t.Helper()
	id = uuid.NewString()
	testkit.Exec(t, path, `INSERT INTO tasks (id, name, state, progress, created_at, updated_at, owner)
		VALUES (?, 'left', 'PENDING', 7, '2024-01-01 00:00:00.000000', '2024-01-01 00:00:01.000000', ?)`, id, owner)
	return id
}

// twoManagers runs an operation each with two managers on the same database. It then
// closes the store of the second one, so that it counts as dead.
func twoManagers(t *testing.T, path string) (managers []*task.Manager, ids []string, release func()) {
	t.Helper()
	living, dead := openSQLite(t, path), openSQLite(t, path)
	moving := testkit.NewFake(dead)
	released := make(chan struct{})
	for _, db := range []task.Persistence{living, moving} {
		m, _ := testkit.NewLogged(t, db)
		op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
			update(30)
			<-released
			return "finished", nil
		})
		managers, ids = append(managers, m), append(ids, op.ID)
	}
	must(t, testkit.Until(func() bool {
		a, errA := living.Get(ids[0])
		b, errB := living.Get(ids[1])
		return errA != nil || errB != nil || a.Progress == 30 && b.Progress == 30
	}))
	moving.Swap(living)
	must(t, dead.Close())
	return managers, ids, func() { close(released) }
}

// leaveOwners adds operations of owners that are dead, each in another way, and of one
// that may be dead or alive. It also creates a file that no owner's ID must lead to.
func leaveOwners(t *testing.T, path string) (lost []string, doubtful string) {
	t.Helper()
	must(t, os.WriteFile(path+"-owner-"+unlockedOwner, nil, 0o600))
	must(t, os.Mkdir(path+"-owner-"+directoryOwner, 0o700))
	must(t, os.WriteFile(outside(path), nil, 0o600))
	for _, owner := range []any{
		nil, "", "garbage", "../../x", "/../../x", []byte("\x00\xff"), 42, uuid.NewString(), unlockedOwner,
		strings.ToUpper(unlockedOwner), "urn:uuid:" + unlockedOwner,
	} {
		lost = append(lost, recoveryInsert(t, path, owner))
	}
	return lost, recoveryInsert(t, path, directoryOwner)
}

// outside returns the path of a file called x, two directories above the database.
func outside(path string) string { return filepath.Join(filepath.Dir(filepath.Dir(path)), "x") }

// IDs of owners whose file is not locked, or is a directory.
var unlockedOwner, directoryOwner = uuid.NewString(), uuid.NewString()

// TestRecoveryOfStores uses several stores in one process. One of them is closed while
// an operation of its manager runs, so that it counts as dead.
func TestRecoveryOfStores(t *testing.T) {
	path := testkit.Path(t)
	managers, ids, release := twoManagers(t, path)
	locked := openSQLite(t, path) // alive, without a manager
	must(t, locked.Save(&task.Operation{ID: "of a living store", State: task.StatePending}))
	lost, doubtful := leaveOwners(t, path)
	lost = append(lost, ids[1])
	fresh := openSQLite(t, path)
	before := testkit.Stored(t, fresh)
	m, l := testkit.NewLogged(t, fresh)

	t.Run("only operations of the dead fail", func(t *testing.T) {
		before.WantFailed(t, testkit.Stored(t, fresh), lost...)
		l.WantRecovered(t, lost...)
	})
	t.Run("not twice", func(t *testing.T) {
		for _, store := range []*task.SQLiteStore{locked, fresh, openSQLite(t, path)} {
			_, l := testkit.NewLogged(t, store)
			l.WantRecovered(t)
		}
	})
	t.Run("only owner files of the dead go", func(t *testing.T) {
		if _, err := os.Stat(outside(path)); err != nil {
			t.Error(err)
		}
		if got := testkit.OwnerFiles(t, path); got != 4 {
			t.Errorf("%d owner files, want those of living, locked and fresh, and a directory", got)
		}
		if _, err := os.Stat(path + "-owner-" + unlockedOwner); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("stat of the file of a dead owner: %v", err)
		}
	})
	t.Run("alive until the opposite is known", func(t *testing.T) {
		must(t, os.Remove(path+"-owner-"+directoryOwner))
		_, l := testkit.NewLogged(t, openSQLite(t, path))
		l.WantRecovered(t, doubtful)
	})
	t.Run("finished once", func(t *testing.T) {
		release()
		for i, want := range []task.State{task.StateDone, task.StateFailed} {
			for _, m := range append(managers, m) {
				op, err := m.Wait(t.Context(), ids[i])
				must(t, err)
				if op.State != want || (op.Error == testkit.RestartText) != (want == task.StateFailed) {
					t.Errorf("operation %d is %+v, want it %s", i, op, want)
				}
			}
		}
	})
}

// TestRecoveryOfOneStore runs two managers on a store that can't be opened twice.
func TestRecoveryOfOneStore(t *testing.T) {
	store := openSQLite(t, ":memory:")
	for range 2 {
		m, l := testkit.NewLogged(t, store)
		l.WantRecovered(t)
		_, err := m.Submit("lasting", func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			return nil, nil
		})
		must(t, err)
	}
	if got := len(testkit.Stored(t, store).Unfinished()); got != 2 {
		t.Errorf("%d operations go on, want 2", got)
	}
}

// TestRecoveryBesideRecovery stops one recovery between two chunks, as if its process
// were slow or about to be killed.
func TestRecoveryBesideRecovery(t *testing.T) {
	path := testkit.Path(t)
	slow, store := openSQLite(t, path), openSQLite(t, path)
	owner := uuid.NewString()
	must(t, os.WriteFile(path+"-owner-"+owner, nil, 0o600))
	testkit.Fill(t, path, 2500, owner, "-1 hour")
	for _, err := range slow.Recover(testkit.RestartText, nil) {
		must(t, err)
		testkit.NewLogged(t, store)
		if left := testkit.Stored(t, store).Unfinished(); len(left) > 0 {
			t.Errorf("New has returned with %d operations unfinished", len(left))
		}
		break
	}
	testkit.NewLogged(t, store)
	if got := testkit.OwnerFiles(t, path); got != 2 {
		t.Errorf("%d owner files, want those of two stores", got)
	}
}

func TestRecoveryOfMany(t *testing.T) {
	for ahead, n := range map[string]int{"-1 hour": testos.Size(3000, 20_000), "+10 years": 100} {
		t.Run(ahead, func(t *testing.T) {
			path := testkit.Path(t)
			store := openSQLite(t, path)
			testkit.Fill(t, path, n, uuid.NewString(), ahead)
			before := testkit.Stored(t, store)
			ids := slices.Collect(maps.Keys(before))
			_, l := testkit.NewLogged(t, store)
			before.WantFailed(t, testkit.Stored(t, store), ids...)
			l.WantRecovered(t, ids...)
		})
	}
}

// TestRecoveryClock recovers rows from the future, also in formats of other code.
func TestRecoveryClock(t *testing.T) {
	for _, updated := range []any{
		"2126-01-02 03:04:05.678901", "2126-01-02 03:04:05", "2126-01-02T03:04:05Z", "2126-01-02 03:04:05.6 +0000 UTC", "", nil,
		"2024-01-02 03:04:05.678901",
	} {
		t.Run(fmt.Sprint(updated), func(t *testing.T) {
			path := testkit.Path(t)
			store := openSQLite(t, path)
			testkit.Exec(t, path, `INSERT INTO tasks (id, name, state, created_at, updated_at, started_at) VALUES
				('a', 'a', 'RUNNING', '2126-01-02T03:04:00Z', ?1, NULL),
				('b', 'b', 'RUNNING', '2024-01-01 00:00:00', ?1, '2126-01-02 03:04:01.000000'),
				('c', 'c', 'RUNNING', NULL, ?1, NULL)`, updated)
			before := testkit.Stored(t, store)
			testkit.NewLogged(t, store)
			before.WantFailed(t, testkit.Stored(t, store), "a", "b", "c")
		})
	}
}

// TestRecoveryPaths opens one database by different paths. A store that did not
// recognize the database would take live owners for dead.
func TestRecoveryPaths(t *testing.T) {
	root := t.TempDir()
	dir, link := filepath.Join(root, "a dir?#%20"), filepath.Join(root, "link")
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Symlink(dir, link))
	t.Chdir(root)
	path := filepath.Join(dir, "tasks.db")
	living, _ := testkit.NewLogged(t, openSQLite(t, path))
	must(t, os.Symlink("tasks.db", filepath.Join(dir, "alias.db")))
	op, err := living.Submit("living", func(ctx context.Context, _ func(int)) (any, error) {
		<-ctx.Done()
		return nil, nil
	})
	must(t, err)
	for _, path := range []string{
		path, filepath.Join(dir, "alias.db"), filepath.Join(link, "tasks.db"), filepath.Join(link, "alias.db"),
		"link/tasks.db", "./link/../link/alias.db",
	} {
		t.Run(path, func(t *testing.T) {
			db, err := sql.Open("sqlite3", "file:"+(&url.URL{Path: path}).EscapedPath())
			must(t, err)
			defer db.Close()
			inside, err := task.NewSQLiteStore(db)
			must(t, err)
			defer inside.Close()
			for _, store := range []*task.SQLiteStore{inside, openSQLite(t, path)} {
				m, l := testkit.NewLogged(t, store)
				l.WantRecovered(t)
				if got, ok := m.Get(op.ID); !ok || got.State.Finished() {
					t.Errorf("Get: %+v, %v", got, ok)
				}
				must(t, m.Close())
			}
		})
	}
}

// TestRecoveryWaitEnds closes manager and store while Wait waits for an operation of
// another manager, or is about to.
func TestRecoveryWaitEnds(t *testing.T) {
	for reads := range 2 { // number of reads by Wait before the manager is closed
		path := testkit.Path(t)
		other := openSQLite(t, path)
		must(t, other.Save(&task.Operation{ID: "other's", State: task.StateRunning}))
		store := openSQLite(t, path)
		db, looked, closed := testkit.NewFake(store), make(chan struct{}), make(chan struct{})
		db.After(func(c *testkit.Call) {
			if c.Method == "Get" && c.N == reads {
				close(looked)
				<-closed
			}
		})
		m, _ := testkit.NewLogged(t, db)
		done := make(chan error)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		go func() {
			_, err := m.Wait(ctx, "other's")
			done <- err
		}()
		<-looked
		must(t, m.Close())
		must(t, store.Close())
		close(closed)
		if err := <-done; !errors.Is(err, task.ErrClosed) {
			t.Errorf("closed after %d reads, Wait: %v, want %v", reads+1, err, task.ErrClosed)
		}
	}
}

// left saves an operation as a dead process leaves it.
func left(t *testing.T, db task.Persistence, id string, state task.State) {
	t.Helper()
	at := time.Now().UTC().Add(-time.Hour)
	must(t, db.Save(&task.Operation{ID: id, Name: "left", State: state, Progress: 60, Metadata: "tank", CreatedAt: at, UpdatedAt: at}))
}

// TestRecoveryOfFourMethods recovers through the four methods, with several limits on
// the page size of List.
func TestRecoveryOfFourMethods(t *testing.T) {
	const n = 2500
	for _, page := range []int{math.MaxInt, 100, 1} {
		t.Run(fmt.Sprint(page), func(t *testing.T) {
			memory := task.NewMemoryStore()
			var dead []string
			for i := range n {
				id, state := fmt.Sprint(i), task.StateDone
				switch i {
				case 0, 1, 999, 1000, n / 2, n - 2:
					state = task.StateRunning
				case 2, n/2 + 1, n - 1:
					state = task.StatePending
				}
				if !state.Finished() {
					dead = append(dead, id)
				}
				left(t, memory, id, state)
			}
			before := testkit.Stored(t, memory)
			db := testkit.NewFake(memory)
			db.Before(func(c *testkit.Call) error { c.Limit = min(c.Limit, page); return nil })
			m, l := testkit.NewLogged(t, testkit.Bare(db))
			before.WantFailed(t, testkit.Stored(t, memory), dead...)
			l.WantRecovered(t, dead...)
			if op, ok := m.Get(dead[0]); !ok || op.Error != testkit.RestartText || op.Metadata != "tank" {
				t.Errorf("Get: %+v", op)
			}
		})
	}
}

// TestRecoveryOvertaken: other code finishes or deletes an operation during its
// recovery.
func TestRecoveryOvertaken(t *testing.T) {
	for _, method := range []string{"Get", "Update"} {
		for _, deletes := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, deletes=%v", method, deletes), func(t *testing.T) {
				memory := task.NewMemoryStore()
				left(t, memory, "before", task.StatePending)
				left(t, memory, "taken", task.StateRunning)
				left(t, memory, "after", task.StateRunning)
				want := testkit.Stored(t, memory)
				db, overtaken := testkit.NewFake(memory), false
				db.Before(func(c *testkit.Call) error {
					if c.ID != "taken" {
						return nil
					}
					if c.Method == method && !overtaken {
						overtaken = true
						if !deletes {
							taken := want["taken"]
							taken.State = task.StateDone
							want["taken"] = taken
							return memory.Update(&taken)
						}
					}
					if overtaken && deletes { // the row exists, but nobody sees it
						return task.ErrNotFound
					}
					return nil
				})
				_, l := testkit.NewLogged(t, testkit.Bare(db))
				l.WantRecovered(t, "before", "after")
				want.WantFailed(t, testkit.Stored(t, memory), "before", "after")
				if !overtaken {
					t.Errorf("%s was not called", method)
				}
			})
		}
	}
}

func TestRecoveryFails(t *testing.T) {
	for _, method := range []string{"List", "Get", "Update"} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // fails if goroutines are left
				memory := task.NewMemoryStore()
				db := testkit.NewFake(memory)
				db.Before(func(c *testkit.Call) error {
					if c.Method == method {
						return errDisk
					}
					return nil
				})
				left(t, memory, "left", task.StateRunning)
				before := testkit.Stored(t, memory)
				if m, err := task.New(testkit.Bare(db), quiet); m != nil || !errors.Is(err, errDisk) {
					t.Errorf("New: %v, %v", m, err)
				}
				before.WantFailed(t, testkit.Stored(t, memory))
			})
		})
	}
	t.Run("SQLite", func(t *testing.T) {
		store := openSQLite(t, testkit.Path(t))
		must(t, store.Close())
		if m, err := task.New(store, quiet); m != nil || err == nil {
			t.Errorf("New on a closed store: %v, %v", m, err)
		}
	})
}

// TestRecoveryInBackground makes the first recoveries fail. Meanwhile, operations of
// the manager itself are live, or finish while recovery reads them.
func TestRecoveryInBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const failures = 6
		memory := task.NewMemoryStore()
		left(t, memory, "left", task.StateRunning)
		release, releaseSlow := make(chan struct{}), make(chan struct{})
		var quick *task.Operation
		var m *task.Manager
		db := testkit.NewFake(memory)
		db.After(func(c *testkit.Call) {
			switch {
			case c.Method != "List":
			case c.N < failures:
				c.Ops, c.Err = nil, errDisk
			case c.N == failures: // the page has been read
				close(release)
				m.Wait(context.Background(), quick.ID)
			}
		})
		l := new(testkit.Log)
		m = task.NewManager(testkit.Bare(db), l.Option())
		defer m.Close()
		submit := func(release chan struct{}) *task.Operation {
			return submit(t, m, func(context.Context, func(int)) (any, error) {
				<-release
				return "own", nil
			})
		}
		quick = submit(release)
		slow := submit(releaseSlow)
		wantTries := func(failed, succeeded int) {
			t.Helper()
			if f, s := l.Count("task: recovery failed, will be tried again"), l.Count("task: recovery succeeded"); f != failed || s != succeeded {
				t.Errorf("%d recoveries have failed and %d succeeded, want %d and %d", f, s, failed, succeeded)
			}
		}
		time.Sleep(5 * time.Second) // six failures take 100+200+400+800+1600 ms, the seventh 3200 more
		l.WantRecovered(t)
		wantTries(failures, 0)
		time.Sleep(time.Minute)
		l.WantRecovered(t, "left")
		wantTries(failures, 1)
		close(releaseSlow)
		for _, op := range []*task.Operation{quick, slow} {
			if got := wait(t, m, op.ID); got.State != task.StateDone || got.Result != "own" {
				t.Errorf("Wait: %+v", got)
			}
		}
	})
}

// TestRecoveryInBackgroundEnds closes a manager whose recovery always fails.
func TestRecoveryInBackgroundEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		db.Before(func(*testkit.Call) error { return errDisk })
		m := task.NewManager(testkit.Bare(db), quiet)
		time.Sleep(time.Hour)
		must(t, m.Close())
	})
}

func TestRecoveryOfMemoryStore(t *testing.T) {
	store := task.NewMemoryStore()
	save := func(id string) {
		must(t, store.Save(&task.Operation{ID: id, Name: "left", State: task.StateRunning, Progress: 60, Metadata: "tank"}))
	}
	first, _ := testkit.NewLogged(t, store)
	release := make(chan struct{})
	op, err := first.Submit("first", func(ctx context.Context, _ func(int)) (any, error) {
		select {
		case <-release:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	must(t, err)
	for _, id := range []string{"", "saved", "saved later"} { // saved by other code
		if id != "" {
			save(id)
		}
		before := testkit.Stored(t, store)
		m, l := testkit.NewLogged(t, store)
		if id == "" {
			l.WantRecovered(t)
		} else {
			l.WantRecovered(t, id)
			before.WantFailed(t, testkit.Stored(t, store), id)
		}
		if got, ok := m.Get(op.ID); !ok || got.State.Finished() {
			t.Errorf("the operation of the first manager: %+v", got)
		}
	}
	// Operations that Close ends are FAILED by shutdown and stay so.
	must(t, first.Close())
	before := testkit.Stored(t, store)
	if got := before[op.ID]; !strings.HasPrefix(got.Error, testkit.ShutdownText) {
		t.Errorf("after Close: %+v", got)
	}
	_, l := testkit.NewLogged(t, store)
	l.WantRecovered(t)
	before.WantFailed(t, testkit.Stored(t, store))
}

// getsIn10s returns the number of calls of a store's Get in 10 seconds.
func getsIn10s(db *testkit.Fake) int {
	synctest.Wait()
	before := db.Count("Get")
	time.Sleep(10 * time.Second)
	synctest.Wait()
	return db.Count("Get") - before
}

// TestRecoveryPoll makes many calls of Wait for an operation of another manager.
func TestRecoveryPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := task.NewMemoryStore()
		db := testkit.NewFake(memory)
		m, other := newManager(t, db), newManager(t, memory)
		fn, _, release := blocker(nil)
		op := submit(t, other, fn)
		const waiters = 50
		var wg sync.WaitGroup
		wait := func(ctx context.Context, want task.State, wantErr error) {
			for range waiters {
				wg.Go(func() {
					got, err := m.Wait(ctx, op.ID)
					if err != wantErr || got.State != want {
						t.Errorf("Wait: %+v, %v; want %s, %v", got, err, want, wantErr)
					}
				})
			}
		}
		for range 2 { // all waiters leave, and others come
			ctx, cancel := context.WithCancel(t.Context())
			wait(ctx, task.StateRunning, context.Canceled)
			if got := getsIn10s(db); got < 95 || got > 105 {
				t.Errorf("%d gets in 10 seconds, want 100 for any number of waiters", got)
			}
			cancel()
			wg.Wait()
			if got := getsIn10s(db); got > 0 {
				t.Errorf("%d gets while nobody waits", got)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		wait(ctx, task.StateRunning, context.Canceled)
		wait(t.Context(), task.StateDone, nil)
		synctest.Wait()
		cancel() // some leave, some stay
		synctest.Wait()
		db.Before(func(*testkit.Call) error { return errDisk })
		release()
		getsIn10s(db)
		db.Before(nil)
		wg.Wait()
		if got := getsIn10s(db); got > 0 {
			t.Errorf("%d gets after all have returned", got)
		}
	})
}

// TestRecoveryLog: of many recovered operations, 100 are logged individually, and all
// are counted in one record.
func TestRecoveryLog(t *testing.T) {
	for name, open := range map[string]func(t *testing.T, n int) task.Persistence{
		"sqlite": func(t *testing.T, n int) task.Persistence {
			path := testkit.FastPath(t)
			store := openSQLite(t, path)
			testkit.Fill(t, path, n, uuid.NewString(), "-1 hour")
			return store
		},
		"four methods": func(t *testing.T, n int) task.Persistence {
			memory := task.NewMemoryStore()
			for i := range n {
				left(t, memory, fmt.Sprint(i), task.StatePending)
			}
			return testkit.Bare(memory)
		},
	} {
		for _, tt := range []struct{ n, lines, sums int }{{0, 0, 0}, {1, 1, 1}, {100, 100, 1}, {101, 100, 1}, {testos.Size(2500, 20_000), 100, 1}} {
			if name == "four methods" {
				tt.n = min(tt.n, 9000) // a MemoryStore keeps 10,000 finished operations
			}
			t.Run(fmt.Sprintf("%s/%d", name, tt.n), func(t *testing.T) {
				m, l := testkit.NewLogged(t, open(t, tt.n))
				lines, sums := l.Count("task: operation interrupted"), l.Count("task: recovered interrupted operations")
				if _, n := l.Recovered(); lines != tt.lines || sums != tt.sums || n != tt.n {
					t.Errorf("%d lines and %d sums of %d operations, want %d, %d, %d", lines, sums, n, tt.lines, tt.sums, tt.n)
				}
				if failed, err := m.List(tt.n+1, 0, task.ByState(task.StateFailed)); err != nil || len(failed) != tt.n {
					t.Errorf("%d operations have failed, %v, want %d", len(failed), err, tt.n)
				}
			})
		}
	}
}
