package tasktest

import (
	"errors"
	"iter"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

// A spy records the names of the methods called, and always succeeds.
type spy struct{ called []string }

func (s *spy) Save(*task.Operation) error   { s.called = append(s.called, "Save"); return nil }
func (s *spy) Update(*task.Operation) error { s.called = append(s.called, "Update"); return nil }

func (s *spy) List(int, int) ([]*task.Operation, error) {
	s.called = append(s.called, "List")
	return []*task.Operation{{}}, nil
}

func (s *spy) Get(string) (*task.Operation, error) {
	s.called = append(s.called, "Get")
	return &task.Operation{}, nil
}

func (s *spy) WriteBatch(saves, updates []*task.Operation) []error {
	s.called = append(s.called, "WriteBatch")
	return make([]error, len(saves)+len(updates))
}

func (s *spy) Recover(string, func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		if yield(&task.Operation{}, nil) {
			s.called = append(s.called, "Recover")
		}
	}
}

// injectedCalls calls each method. The functions return its errors and whether it returned
// a result.
var injectedCalls = map[string]func(db task.Persistence) (errs []error, result bool){
	"Save":   func(db task.Persistence) ([]error, bool) { return []error{db.Save(nil)}, false },
	"Update": func(db task.Persistence) ([]error, bool) { return []error{db.Update(nil)}, false },
	"List": func(db task.Persistence) ([]error, bool) {
		ops, err := db.List(1, 0)
		return []error{err}, ops != nil
	},
	"Get": func(db task.Persistence) ([]error, bool) {
		op, err := db.Get("")
		return []error{err}, op != nil
	},
	"WriteBatch": func(db task.Persistence) ([]error, bool) {
		return db.(task.BatchWriter).WriteBatch(make([]*task.Operation, 2), make([]*task.Operation, 1)), false
	},
	"Recover": func(db task.Persistence) (errs []error, result bool) {
		for op, err := range db.(task.Recoverer).Recover("", nil) {
			errs = append(errs, err)
			result = result || op != nil
		}
		return errs, result
	},
}

func TestInjectAnswers(t *testing.T) {
	errFault := errors.New("fault")
	for method, call := range injectedCalls {
		for _, test := range []struct {
			name   string
			answer error
			called bool
			want   error
		}{
			{"passed on", nil, true, nil},
			{"failed", errFault, false, errFault},
			{"lost", Lost(errFault), true, errFault},
		} {
			t.Run(method+"/"+test.name, func(t *testing.T) {
				var db spy
				var asked []Call
				s := Inject(&db, func(c Call) error {
					asked = append(asked, c)
					return test.answer
				})
				errs, result := call(s)
				if want := []Call{{method, 0}}; !slices.Equal(asked, want) {
					t.Errorf("asked for %v, want %v", asked, want)
				}
				if called := slices.Equal(db.called, []string{method}); called != test.called || !called && db.called != nil {
					t.Errorf("called %v, want it called: %v", db.called, test.called)
				}
				want := 1
				if method == "WriteBatch" {
					want = 3
				}
				if len(errs) != want || slices.ContainsFunc(errs, func(err error) bool { return err != test.want }) {
					t.Errorf("errors %v, want %d times %v", errs, want, test.want)
				}
				if result && test.want != nil {
					t.Error("a result beside an error")
				}
			})
		}
	}
}

// TestInjectAbilities checks that the methods of an ability that the store lacks report
// that it is unsupported, and do not count as calls.
func TestInjectAbilities(t *testing.T) {
	s := Inject(bare{new(spy)}, func(c Call) error {
		t.Errorf("call of %s", c.Method)
		return nil
	})
	errs := map[string]error{
		"WriteBatch":    s.(task.BatchWriter).WriteBatch(nil, []*task.Operation{{}})[0],
		"RequestCancel": s.(task.Canceller).RequestCancel("a", ""),
	}
	for _, err := range s.(task.Recoverer).Recover("", nil) {
		errs["Recover"] = err
	}
	_, errs["ListFiltered"] = s.(task.FilteredLister).ListFiltered(task.Filter{}, 1, 0)
	for _, err := range s.(task.Pruner).Prune(time.Time{}) {
		errs["Prune"] = err
	}
	_, errs["CancelRequests"] = s.(task.Canceller).CancelRequests()
	for err := range s.(task.Notifier).Changes(t.Context()) {
		errs["Changes"] = err
	}
	if len(errs) != 7 {
		t.Errorf("only %d errors: %v", len(errs), errs)
	}
	for method, err := range errs {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", method, err)
		}
	}
}

// TestInjectHistory checks that listing and pruning fail as fault demands, before or after
// the store is called.
func TestInjectHistory(t *testing.T) {
	broken := errors.New("broken")
	for _, test := range []struct {
		fault error
		want  error
		left  int
	}{{nil, nil, 0}, {broken, broken, 1}, {Lost(broken), broken, 0}} {
		db := task.NewMemoryStore()
		if err := db.Save(&task.Operation{ID: "1", Name: "old", State: task.StateDone, UpdatedAt: noon}); err != nil {
			t.Fatal(err)
		}
		s := Inject(db, func(Call) error { return test.fault })
		if ops, err := s.(task.FilteredLister).ListFiltered(task.Filter{Name: "old"}, 10, 0); err != test.want || (err == nil) != (len(ops) == 1) {
			t.Errorf("%v: ListFiltered = %v, %v", test.fault, ops, err)
		}
		for n, err := range s.(task.Pruner).Prune(noon.Add(1)) {
			if err != test.want || (err == nil) != (n == 1) {
				t.Errorf("%v: Prune yielded %d, %v", test.fault, n, err)
			}
		}
		if ops, _ := db.List(10, 0); len(ops) != test.left {
			t.Errorf("%v: %d are left, want %d", test.fault, len(ops), test.left)
		}
	}
}

func TestInjectCounts(t *testing.T) {
	const n = 100
	var mu sync.Mutex
	var asked []int
	s := Inject(task.NewMemoryStore(), func(c Call) error {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, c.N)
		return nil
	})
	var all sync.WaitGroup
	for range n {
		all.Go(func() { s.List(1, 0) })
	}
	all.Wait()
	slices.Sort(asked)
	for i := range n {
		if len(asked) != n || asked[i] != i {
			t.Fatalf("numbers of calls: %v", asked)
		}
	}
}

func TestFaults(t *testing.T) {
	errFault := errors.New("fault")
	for name, test := range map[string]struct {
		fault func(Call) error
		want  []error // of calls 0, 1, 2, 3
		takes time.Duration
	}{
		"FailNth":  {FailNth(1, errFault), []error{nil, errFault, nil, nil}, 0},
		"FailFrom": {FailFrom(2, errFault), []error{nil, nil, errFault, errFault}, 0},
		"Delay":    {Delay(time.Hour), []error{nil, nil, nil, nil}, 4 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				s := Inject(new(spy), test.fault)
				for i, want := range test.want {
					if err := s.Save(nil); err != want {
						t.Errorf("call %d: %v, want %v", i, err, want)
					}
				}
				if took := time.Since(began); took != test.takes {
					t.Errorf("took %v, want %v", took, test.takes)
				}
			})
		})
	}
	if err := Lost(errFault); !errors.Is(err, errFault) {
		t.Errorf("Lost: %v", err)
	}
}
