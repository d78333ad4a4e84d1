package testkit_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/tasktest"
)

func TestMain(m *testing.M) { testkit.Main(m, nil) }

// TestFakeKeepsContract: without hooks, a fake behaves like the store behind it.
func TestFakeKeepsContract(t *testing.T) {
	stores := make(map[string]*task.MemoryStore) // by directory
	tasktest.TestPersistence(t, func(dir string) (task.Persistence, error) {
		if stores[dir] == nil {
			stores[dir] = task.NewMemoryStore()
		}
		return testkit.NewFake(stores[dir]), nil
	})
}

// call calls each method of a fake, and returns the error of each.
func call(f *testkit.Fake, id string) map[string]error {
	errs := make(map[string]error)
	op := func(state task.State) *task.Operation {
		return &task.Operation{ID: id, Name: "x", State: state, CreatedAt: time.Now(), UpdatedAt: time.Now()}
	}
	errs["Save"] = f.Save(op(task.StateRunning))
	errs["Update"] = f.Update(op(task.StateDone))
	_, errs["List"] = f.List(10, 0)
	_, errs["Get"] = f.Get(id)
	_, errs["ListFiltered"] = f.ListFiltered(task.Filter{}, 10, 0)
	for _, err := range f.Recover("x", nil) {
		errs["Recover"] = err
	}
	for _, err := range f.Prune(time.Time{}) {
		errs["Prune"] = err
	}
	errs["WriteBatch"] = errors.Join(f.WriteBatch([]*task.Operation{op(task.StateRunning)}, []*task.Operation{op(task.StateDone)})...)
	return errs
}

var methods = []string{"Save", "Update", "List", "Get", "ListFiltered", "Recover", "Prune", "WriteBatch"}

func TestFakeFails(t *testing.T) {
	for _, method := range methods {
		t.Run(method, func(t *testing.T) {
			memory := task.NewMemoryStore()
			f := testkit.NewFake(memory)
			f.Before(func(c *testkit.Call) error {
				if c.Method == method {
					return testkit.ErrDisk
				}
				return nil
			})
			if err := call(f, "a")[method]; !errors.Is(err, testkit.ErrDisk) {
				t.Errorf("%s returned %v", method, err)
			}
			want := 1
			if method == "Save" || method == "Update" {
				want = 2 // the second one through WriteBatch
			}
			if n := f.Count(method); n != want {
				t.Errorf("%d calls of %s, want %d", n, method, want)
			}
			if _, err := memory.Get("a"); (err == nil) == (method == "Save") {
				t.Errorf("stored: %v", err)
			}
		})
	}
}

func TestFakeWithoutAbilities(t *testing.T) {
	f := testkit.NewFake(testkit.Bare(task.NewMemoryStore()))
	for method, err := range call(f, "a") {
		want := slices.Contains([]string{"ListFiltered", "Recover", "Prune"}, method)
		if errors.Is(err, errors.ErrUnsupported) != want || want && !strings.Contains(err.Error(), method) {
			t.Errorf("%s returned %v", method, err)
		}
	}
	for name, ok := range map[string]bool{
		"BatchWriter":    is[task.BatchWriter](testkit.Bare(f)),
		"Recoverer":      is[task.Recoverer](testkit.Bare(f)),
		"FilteredLister": is[task.FilteredLister](testkit.Bare(f)),
		"Pruner":         is[task.Pruner](testkit.Bare(f)),
	} {
		if ok {
			t.Errorf("Bare returned a %s", name)
		}
	}
}

func is[T any](db task.Persistence) bool { _, ok := db.(T); return ok }

// TestFakeChangesAnswers: hooks can change calls and answers.
func TestFakeChangesAnswers(t *testing.T) {
	memory := task.NewMemoryStore()
	testkit.Must(t, memory.Save(&task.Operation{ID: "left", State: task.StateRunning}))
	f := testkit.NewFake(memory)
	f.Before(func(c *testkit.Call) error {
		c.Limit, c.ID = 1, strings.TrimPrefix(c.ID, "not ")
		return nil
	})
	if op, err := f.Get("not left"); err != nil || op.ID != "left" {
		t.Errorf("Get: %v, %v", op, err)
	}
	f.After(func(c *testkit.Call) {
		c.Ops, c.Err, c.Errs = []*task.Operation{{ID: "other"}}, nil, []error{testkit.ErrDisk}
	})
	if op, err := f.Get("missing"); err != nil || op.ID != "other" {
		t.Errorf("Get: %v, %v", op, err)
	}
	if ops, err := f.List(10, 0); err != nil || len(ops) != 1 || ops[0].ID != "other" {
		t.Errorf("List: %v, %v", ops, err)
	}
	for op, err := range f.Recover("x", nil) {
		if err != nil || op.ID != "other" {
			t.Errorf("Recover: %v, %v", op, err)
		}
	}
	if errs := f.WriteBatch(nil, nil); len(errs) != 1 || errs[0] != testkit.ErrDisk {
		t.Errorf("WriteBatch: %v", errs)
	}
	other := task.NewMemoryStore()
	f.Swap(other)
	f.Save(&task.Operation{ID: "later"})
	if _, err := other.Get("later"); err != nil {
		t.Errorf("after Swap: %v", err)
	}
}
