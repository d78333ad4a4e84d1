package scheduletest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// A schedule is one run of a scenario, in one of its many orders. An event is something
// that may happen next: a call that a goroutine is about to make, a step of the store,
// or the end of a function. Whenever all goroutines are blocked, the schedule picks one
// event to happen.
type schedule struct {
	t      *testing.T
	pick   func(n int) int
	db     task.Persistence // the store itself, for reads without waiting
	gets   bool             // Get waits to be picked
	lists  bool             // List waits to be picked
	faults int              // how many writes may still fail
	limit  int              // how many functions of one manager may run; 0 for any number

	mu     sync.Mutex // guards what follows
	events []event
	busy   int  // goroutines of goes and functions that have not ended
	free   bool // the store does not wait: set before and after run
	trace  []string
	ops    map[string]*scheduled // by name

	managers map[*task.Manager]bool // whether they are closed

	check func() // if not nil: checks the result of the scenario, once all managers are closed
}

// An event lets one goroutine continue.
type event struct {
	name string
	turn chan int // shared by the ways in which that goroutine can continue
	way  int
}

// A scheduled is an operation that the schedule observes.
type scheduled struct {
	name string
	m    *task.Manager
	id   string

	asked   bool  // Submit was called
	refused error // the error of Submit

	calls  int
	ended  bool  // the function has returned
	err    error // the error of the function
	ctx    context.Context
	update func(int)
	saved  int // how often its row was stored
	finals int // how often a final state was stored
	told   *task.Operation
}

// scheduleFactor explores more orders: go test ./internal/scheduletest -args -schedules 100
var scheduleFactor = flag.Int("schedules", 1, "how many times the usual number of orders to explore")

// explore runs a scenario in many orders. A quarter of them are enumerated: each
// differs from the previous one as late as possible, until none is left. The others are
// random, but the same in every test run.
func explore(t *testing.T, runs int, scenario func(s *schedule)) {
	runs *= *scheduleFactor
	var prefix []int
	orders := make(map[string]bool)
	defer func() { t.Logf("%d orders", len(orders)) }()
	for run := range runs {
		var taken, widths []int
		random := rand.New(rand.NewPCG(uint64(run), 0))
		pick := func(n int) int {
			choice := 0
			switch at := len(taken); {
			case run >= runs/4:
				choice = random.IntN(n)
			case at < len(prefix):
				choice = prefix[at] % n
			}
			taken, widths = append(taken, choice), append(widths, n)
			return choice
		}
		synctest.Test(t, func(t *testing.T) {
			s := &schedule{t: t, pick: pick, free: true, ops: make(map[string]*scheduled), managers: make(map[*task.Manager]bool)}
			defer func() {
				order := strings.Join(s.trace, ", ")
				orders[order] = true
				if t.Failed() {
					t.Logf("run %d: %s", run, order)
				}
			}()
			scenario(s)
			s.run()
			s.end()
		})
		if t.Failed() {
			return
		}
		if run >= runs/4 {
			continue
		}
		last := len(taken) - 1
		for last >= 0 && taken[last]+1 == widths[last] {
			last--
		}
		if last < 0 {
			return // that was the last order
		}
		prefix = append(slices.Clone(taken[:last]), taken[last]+1)
	}
}

// wait waits until it is picked to continue, in one of several ways.
func (s *schedule) wait(ways ...string) int {
	s.mu.Lock()
	free := s.free
	s.mu.Unlock()
	if free {
		return 0
	}
	return s.queue(ways...)
}

// queue is wait, but it waits even while the store does not.
func (s *schedule) queue(ways ...string) int {
	s.mu.Lock()
	turn := make(chan int, 1)
	for i, way := range ways {
		s.events = append(s.events, event{way, turn, i})
	}
	s.mu.Unlock()
	return <-turn
}

// goes starts a goroutine that makes a call when it is picked.
func (s *schedule) goes(name string, call func()) {
	s.add(1)
	go func() {
		defer s.add(-1)
		s.queue(name)
		call()
	}()
}

func (s *schedule) add(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy += n
}

// run lets events happen one after the other until none is left.
func (s *schedule) run() {
	s.mu.Lock()
	s.free = false
	s.mu.Unlock()
	for idle := 0; ; {
		synctest.Wait()
		e, busy := s.next()
		switch {
		case e != nil:
			idle = 0
			e.turn <- e.way
		case !busy:
			return
		case idle > 600:
			s.t.Fatal("nothing has happened for a minute")
		default:
			idle++
			time.Sleep(100 * time.Millisecond) // some events need time to pass
		}
	}
}

// next removes and returns the event that is to happen.
func (s *schedule) next() (picked *event, busy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.events) == 0 {
		return nil, s.busy > 0
	}
	slices.SortStableFunc(s.events, func(a, b event) int { return strings.Compare(a.name, b.name) })
	e := s.events[s.pick(len(s.events))]
	s.events = slices.DeleteFunc(s.events, func(other event) bool { return other.turn == e.turn })
	s.trace = append(s.trace, e.name)
	return &e, true
}

// end closes all managers and checks every operation.
func (s *schedule) end() {
	s.mu.Lock()
	s.free = true
	s.mu.Unlock()
	for m := range s.managers {
		if err := m.Close(); err != nil {
			s.t.Errorf("Close: %v", err)
		}
		if _, err := m.Submit("after Close", testkit.UntilCancelled); !errors.Is(err, task.ErrClosed) {
			s.t.Errorf("Submit after Close: %v", err)
		}
	}
	synctest.Wait()
	for _, op := range s.ops {
		s.checkOp(op)
	}
	if s.check != nil {
		s.check()
	}
}

func (s *schedule) checkOp(op *scheduled) {
	if !op.asked {
		return
	}
	row, err := s.stored(op.name)
	if err != nil {
		s.t.Fatal(err)
	}
	if op.refused != nil {
		if op.calls > 0 {
			s.t.Errorf("%s was called, though Submit returned %v", op.name, op.refused)
		}
		if row != nil && row.State != task.StateFailed && row.State != task.StateCancelled {
			s.t.Errorf("%s is %s, though Submit returned %v", op.name, row.State, op.refused)
		}
		return
	}
	if row == nil || !row.State.Finished() {
		s.t.Fatalf("%s: stored is %+v", op.name, row)
	}
	if op.saved != 1 || op.finals != 1 || op.calls > 1 {
		s.t.Errorf("%s was saved %d times, finished %d times, called %d times", op.name, op.saved, op.finals, op.calls)
	}
	if started := op.calls > 0; started == row.StartedAt.IsZero() {
		s.t.Errorf("%s was called %d times: %+v", op.name, op.calls, row)
	}
	if op.calls > 0 {
		want := task.StateFailed
		switch op.err {
		case nil:
			want = task.StateDone
		case task.ErrCancelled:
			want = task.StateCancelled
		}
		if row.State != want {
			s.t.Errorf("%s returned %v and is %s", op.name, op.err, row.State)
		}
	}
	if row.Error == testkit.RestartText {
		s.t.Errorf("%s was recovered, though its manager was alive", op.name)
	}
	if shown, ok := op.m.Get(op.id); !ok || op.told != nil && testkit.JSON(shown) != testkit.JSON(op.told) {
		s.t.Errorf("%s: told %+v, now %+v", op.name, op.told, shown)
	}
}

// stored returns the operation stored under a name, or nil.
func (s *schedule) stored(name string) (*task.Operation, error) {
	rows, err := s.db.List(100, 0)
	for _, row := range rows {
		if row.Name == name {
			return row, err
		}
	}
	return nil, err
}

// tell records a snapshot that a manager has returned. After a finished one, all later
// ones must be the same.
func (s *schedule) tell(op *scheduled, got *task.Operation) {
	row, err := s.stored(op.name)
	if err != nil || row == nil {
		s.t.Errorf("shown %+v, stored is %+v, %v", got, row, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if got.State.Finished() {
		if row.State != got.State {
			s.t.Errorf("shown %s while %s was stored", got.State, row.State)
		}
		op.told = got
	}
}

// memory gives the scenario a memory store.
func (s *schedule) memory() *testkit.Fake {
	s.db = task.NewMemoryStore()
	return s.gate(s.db)
}

// manager returns a manager, which is closed at the end of the scenario.
func (s *schedule) manager(db task.Persistence, opts ...task.Option) *task.Manager {
	m, err := task.New(db, append([]task.Option{testkit.Quiet}, opts...)...)
	if err != nil {
		s.t.Error(err)
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.managers[m] = false
	return m
}

// submit submits an operation when it is picked. If that succeeds, it calls next.
func (s *schedule) submit(m *task.Manager, name string, fn task.Func, next func(*scheduled), opts ...task.SubmitOption) {
	op := &scheduled{name: name, m: m}
	s.mu.Lock()
	s.ops[name] = op
	s.mu.Unlock()
	s.goes("submit "+name, func() {
		s.mu.Lock()
		closed := s.managers[m]
		op.asked = true
		s.mu.Unlock()
		got, err := m.Submit(name, s.watched(op, fn), opts...)
		if closed && !errors.Is(err, task.ErrClosed) {
			s.t.Errorf("Submit of %s after Close: %v", name, err)
		}
		if err != nil {
			op.refused = err
			if errors.Is(err, task.ErrExists) && len(opts) > 0 {
				s.tell(s.ops[got.Name], got)
			} else if !errors.Is(err, task.ErrClosed) && !errors.Is(err, testkit.ErrDisk) {
				s.t.Errorf("Submit of %s: %v", name, err)
			}
			return
		}
		op.id = got.ID
		s.tell(op, got)
		if next != nil {
			next(op)
		}
	})
}

// watched returns a function that records its calls, and that ends when it is picked.
func (s *schedule) watched(op *scheduled, fn task.Func) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		s.add(1)
		defer s.add(-1)
		if row, err := s.stored(op.name); err != nil || row == nil {
			s.t.Errorf("%s started, stored is %v, %v", op.name, row, err)
		}
		s.mu.Lock()
		op.calls++
		op.ctx, op.update = ctx, update
		running := 0
		for _, other := range s.ops {
			if other.m == op.m && other.calls > 0 && !other.ended {
				running++
			}
		}
		s.mu.Unlock()
		if s.limit > 0 && running > s.limit {
			s.t.Errorf("%d functions run", running)
		}
		s.wait("end " + op.name)
		value, err := fn(ctx, update)
		s.mu.Lock()
		op.ended, op.err = true, err
		s.mu.Unlock()
		return value, err
	}
}

// waits starts n goroutines that wait for an operation.
func (s *schedule) waits(op *scheduled, m *task.Manager, n int) {
	for range n {
		s.goes("wait "+op.name, func() {
			got, err := m.Wait(context.Background(), op.id)
			if err != nil || !got.State.Finished() {
				s.t.Errorf("Wait for %s: %+v, %v", op.name, got, err)
				return
			}
			s.tell(op, got)
		})
	}
}

// look reads an operation. Once the operation was shown as finished, it stays so.
func (s *schedule) look(op *scheduled, m *task.Manager) {
	finished := s.isTold(op)
	got, ok := m.Get(op.id)
	if !ok || finished && !got.State.Finished() {
		s.t.Errorf("Get: %v, %+v, told: %v", ok, got, finished)
		return
	}
	s.tell(op, got)

	finished = s.isTold(op)
	page, err := m.List(1000, 0)
	if !s.gets { // List returns the state at its return
		finished = s.isTold(op)
	}
	i := slices.IndexFunc(page, func(listed *task.Operation) bool { return listed.ID == op.id })
	if err != nil || i < 0 || finished && !page[i].State.Finished() {
		s.t.Errorf("List: %+v, %v, told: %v", page, err, finished)
		return
	}
	s.tell(op, page[i])
}

// isTold reports whether the operation was shown as finished.
func (s *schedule) isTold(op *scheduled) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return op.told != nil
}

// cancel cancels an operation and checks what Cancel returns.
func (s *schedule) cancel(op *scheduled, m *task.Manager) {
	before, _ := m.Get(op.id)
	err := m.Cancel(op.id)
	after, _ := m.Get(op.id)
	if before.State.Finished() && !errors.Is(err, task.ErrNotFound) || !before.State.Finished() && !after.State.Finished() && errors.Is(err, task.ErrNotFound) ||
		err != nil && !errors.Is(err, task.ErrNotFound) {
		s.t.Errorf("Cancel of %s: %+v, %v, %+v", op.name, before, err, after)
	}
	s.tell(op, after)
}

// close closes a manager when it is picked.
func (s *schedule) close(m *task.Manager) {
	s.goes("close", func() {
		if err := m.Close(); err != nil {
			s.t.Errorf("Close: %v", err)
		}
		s.closed(m)
	})
}

// closed checks that all operations of a manager are stored as finished.
func (s *schedule) closed(m *task.Manager) {
	rows, err := s.db.List(100, 0)
	testkit.Must(s.t, err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.managers[m] = true
	for _, row := range rows {
		if op := s.ops[row.Name]; op != nil && op.m == m && !row.State.Finished() {
			s.t.Errorf("after Close %+v is stored", row)
		}
	}
}

// yields is a Func that returns the cause of its cancellation, if it was cancelled.
func yields(ctx context.Context, _ func(int)) (any, error) { return "made it", context.Cause(ctx) }

// insists is a Func that always succeeds.
func insists(context.Context, func(int)) (any, error) { return "made it", nil }

// gate returns a store that waits to be picked before and after each write, and also
// before and after reads if the scenario says so. A write may fail, or be stored
// although it seems to have failed.
func (s *schedule) gate(db task.Persistence) *testkit.Fake {
	gate := testkit.NewFake(db)
	gate.Before(s.before)
	gate.After(s.after)
	return gate
}

// The ways in which a write can go.
const (
	succeeds = iota
	fails
	seemsToFail
)

func (s *schedule) before(c *testkit.Call) error {
	switch c.Method {
	case "WriteBatch":
		what := writeName(c)
		ways := []string{what}
		if s.mayFail() {
			ways = append(ways, what+" (fails)", what+" (seems to fail)")
		}
		c.Tag = s.wait(ways...)
		if c.Tag != succeeds {
			s.failed()
		}
		if c.Tag == fails {
			return testkit.ErrDisk
		}
	case "Recover":
		s.wait("recover")
	default:
		if s.gated(c) {
			s.wait("before " + c.Method)
		}
	}
	return nil
}

func (s *schedule) after(c *testkit.Call) {
	switch c.Method {
	case "WriteBatch":
		writes := slices.Concat(c.Saves, c.Updates)
		for i, op := range writes {
			if c.Errs[i] == nil {
				s.note(op, i < len(c.Saves))
			}
		}
		if c.Tag == seemsToFail {
			c.Errs = slices.Repeat([]error{testkit.ErrDisk}, len(writes))
			return
		}
		s.wait("answer " + writeName(c))
	case "Recover":
		s.wait("recovered")
	default:
		if s.gated(c) {
			s.wait("after " + c.Method)
		}
	}
}

// gated reports whether a call is a read that must wait.
func (s *schedule) gated(c *testkit.Call) bool {
	switch c.Method {
	case "Get":
		return s.gets
	case "List", "ListFiltered":
		return s.lists
	}
	return false
}

func writeName(c *testkit.Call) string {
	name := "write"
	for _, op := range slices.Concat(c.Saves, c.Updates) {
		name += fmt.Sprintf(" %s:%s", op.Name, op.State)
	}
	return name
}

func (s *schedule) mayFail() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faults > 0 && s.pick(4) == 3 // more faults would end most scenarios early
}

func (s *schedule) failed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults--
}

// note counts the writes of an operation.
func (s *schedule) note(row *task.Operation, save bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	op := s.ops[row.Name]
	if op == nil {
		return
	}
	if save {
		op.saved++
	}
	if row.State.Finished() {
		op.finals++
	}
}

// TestCancel: cancel against start and finish, with and without a queue,
// and with writes that fail.
func TestCancel(t *testing.T) {
	for name, fn := range map[string]task.Func{"yields": yields, "insists": insists} {
		for faults := range 3 {
			t.Run(fmt.Sprintf("%s, %d faults", name, faults), func(t *testing.T) {
				explore(t, 200, func(s *schedule) {
					s.faults, s.limit = faults, 1
					m := s.manager(s.memory(), task.WithLimit(1))
					for name, cancels := range map[string]int{"a": 1, "b": 2, "c": 0} {
						s.submit(m, name, fn, func(op *scheduled) {
							s.waits(op, m, 1)
							for range cancels {
								s.goes("cancel "+name, func() { s.cancel(op, m) })
							}
						})
					}
				})
			})
		}
	}
}

// TestUnique: Submits of one unique key, or of one ID, against each other, with writes
// that fail, and against Close.
func TestUnique(t *testing.T) {
	for name, opt := range map[string]task.SubmitOption{"key": task.WithUnique("k"), "ID": task.WithID("x")} {
		for faults := range 2 {
			t.Run(fmt.Sprintf("%s, %d faults", name, faults), func(t *testing.T) {
				explore(t, 300, func(s *schedule) {
					s.faults, s.limit = faults, 1 // one at a time, although the manager has no limit
					m := s.manager(s.memory())
					for _, name := range []string{"a", "b", "c"} {
						s.submit(m, name, yields, func(op *scheduled) { s.waits(op, m, 1) }, opt)
					}
					s.close(m)
					s.check = func() {
						calls := 0
						for _, op := range s.ops {
							calls += op.calls
						}
						if name == "ID" && calls > 1 {
							s.t.Errorf("%d functions were called for one ID", calls)
						}
					}
				})
			})
		}
	}
}

// TestCloseSubmit: Close against Submit, with and without a queue, and
// with writes that fail.
func TestCloseSubmit(t *testing.T) {
	for limit := range 2 {
		for faults := range 2 {
			t.Run(fmt.Sprintf("limit %d, %d faults", limit, faults), func(t *testing.T) {
				explore(t, 200, func(s *schedule) {
					s.faults = faults
					m := s.manager(s.memory(), task.WithLimit(limit))
					for _, name := range []string{"a", "b", "c"} {
						s.submit(m, name, yields, func(op *scheduled) { s.waits(op, m, 1) })
					}
					s.close(m)
				})
			})
		}
	}
}

// TestShutdown: Shutdown against Submit, Cancel, its own context's end
// and Close.
func TestShutdown(t *testing.T) {
	for _, closes := range []bool{false, true} {
		t.Run(fmt.Sprintf("close=%v", closes), func(t *testing.T) {
			explore(t, 300, func(s *schedule) {
				m := s.manager(s.memory(), task.WithLimit(1))
				for _, name := range []string{"a", "b"} {
					s.submit(m, name, yields, func(op *scheduled) {
						s.goes("cancel "+name, func() { s.cancel(op, m) })
					}, task.WithLock("key"))
				}
				ctx, cancel := context.WithCancel(s.t.Context())
				s.goes("shutdown", func() {
					if err := m.Shutdown(ctx); err == nil {
						s.closed(m)
					} else if err != context.Canceled || ctx.Err() == nil {
						s.t.Errorf("Shutdown: %v", err)
					}
				})
				s.goes("give up", cancel)
				if closes {
					s.close(m)
				}
			})
		})
	}
}

// TestEviction: reads at the moment when an operation leaves the manager's memory,
// because its final state is stored.
func TestEviction(t *testing.T) {
	for name, lists := range map[string]bool{"Get": false, "List": true} {
		t.Run(name, func(t *testing.T) {
			explore(t, 400, func(s *schedule) {
				s.faults = 1
				s.gets, s.lists = !lists, lists
				m := s.manager(s.memory())
				s.submit(m, "a", yields, func(op *scheduled) {
					s.waits(op, m, 2)
					s.goes("look 1", func() { s.look(op, m) })
					s.goes("look 2", func() { s.look(op, m) })
				})
			})
		})
	}
}

// TestTwoManagers: two managers on one store. One of them closes, and a third one joins
// them and recovers.
func TestTwoManagers(t *testing.T) {
	for name, test := range map[string]struct {
		runs int
		open func(s *schedule) (open func() *testkit.Fake)
	}{
		"memory": {300, func(s *schedule) func() *testkit.Fake {
			db := s.memory()
			return func() *testkit.Fake { return db }
		}},
		"sqlite": {15, func(s *schedule) func() *testkit.Fake {
			path := testkit.FastPath(s.t)
			s.db = testkit.OpenSQLite(s.t, path)
			return func() *testkit.Fake { return s.gate(testkit.OpenSQLite(s.t, path)) }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			explore(t, test.runs, func(s *schedule) {
				open := test.open(s)
				one, two := s.manager(open()), s.manager(open())
				s.submit(one, "a", yields, func(op *scheduled) {
					s.waits(op, one, 1)
					s.waits(op, two, 1)
					s.goes("look", func() { s.look(op, two) })
					s.goes("cancel by two", func() {
						if err := two.Cancel(op.id); err != nil && !errors.Is(err, task.ErrNotFound) {
							s.t.Errorf("Cancel by the other manager: %v", err)
						}
					})
				})
				s.submit(two, "b", insists, func(op *scheduled) { s.waits(op, one, 1) })
				s.close(one)
				s.goes("open three", func() { s.manager(open()) })
			})
		})
	}
}

// TestRecovery: two managers recover the same operations at the same time, while one of
// them closes and a third one keeps running.
func TestRecovery(t *testing.T) {
	explore(t, 300, func(s *schedule) {
		db := s.memory()
		alive := s.manager(db)
		s.submit(alive, "a", yields, nil)
		for _, id := range []string{"left 1", "left 2"} {
			testkit.Must(s.t, s.db.Save(&task.Operation{ID: id, Name: id, State: task.StateRunning}))
		}
		log := new(testkit.Log)
		for _, name := range []string{"one", "two"} {
			s.goes("open "+name, func() {
				m := s.manager(db, log.Option())
				for _, id := range []string{"left 1", "left 2"} {
					if got, ok := m.Get(id); !ok || got.State != task.StateFailed || got.Error != testkit.RestartText {
						s.t.Errorf("after New: %+v", got)
					}
				}
				if name == "one" {
					s.close(m)
				}
			})
		}
		s.check = func() {
			log.WantRecovered(s.t, "left 1", "left 2")
		}
	})
}

// TestResume: two managers resume the same operations at the same time, while one of
// them closes. Each operation is resumed once, or failed by the Close.
func TestResume(t *testing.T) {
	explore(t, 300, func(s *schedule) {
		db := s.memory()
		calls := map[string]*atomic.Int32{"left 1": new(atomic.Int32), "left 2": new(atomic.Int32)}
		for id := range calls {
			testkit.Must(s.t, s.db.Save(&task.Operation{ID: id, Name: id, State: task.StateRunning}))
		}
		resume := task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
			return func(ctx context.Context, update func(int)) (any, error) {
				calls[op.ID].Add(1)
				s.add(1)
				defer s.add(-1)
				s.wait("end " + op.ID)
				return yields(ctx, update)
			}, []task.SubmitOption{task.WithLock("k")}
		})
		s.goes("open one", func() { s.close(s.manager(db, resume)) })
		s.goes("open two", func() { s.manager(db, resume) })
		s.check = func() {
			for id, calls := range calls {
				row, err := s.stored(id)
				testkit.Must(s.t, err)
				closed := row.State == task.StateFailed && row.Error == testkit.ShutdownText
				if n := calls.Load(); n > 1 || !closed && (n != 1 || row.State != task.StateDone) {
					s.t.Errorf("called %d times: %+v", n, row)
				}
			}
		}
	})
}

// TestLate: goroutines that outlive their function report progress and metadata, before
// its return, after it, and after the final state is stored.
func TestLate(t *testing.T) {
	explore(t, 300, func(s *schedule) {
		m := s.manager(s.memory())
		progress, metadata := 0, any(nil)
		s.submit(m, "a", func(context.Context, func(int)) (any, error) { return nil, testkit.ErrDisk }, func(op *scheduled) {
			s.goes("late update", func() {
				if op.update == nil {
					return // not even started
				}
				if !op.ended {
					progress = 42
				}
				op.update(42)
			})
			s.goes("late metadata", func() {
				if op.update == nil {
					return
				}
				if !op.ended {
					metadata = "new"
				}
				if err := task.SetMetadata(op.ctx, "new"); op.ended != (err != nil) {
					s.t.Errorf("SetMetadata: %v, ended: %v", err, op.ended)
				}
			})
			s.waits(op, m, 1)
		})
		s.close(m)
		s.check = func() {
			op := s.ops["a"]
			if op.refused != nil {
				return
			}
			if got, _ := m.Get(op.id); got.Progress != progress || got.Metadata != metadata {
				s.t.Errorf("got %d%% %v, want %d%% %v", got.Progress, got.Metadata, progress, metadata)
			}
		}
	})
}

// TestCloseClose: Close against Close and Shutdown. This test uses real time, because
// later calls wait for a mutex, which synctest does not count as blocked.
func TestCloseClose(t *testing.T) {
	events := []string{"close", "close", "shutdown", "end", "store"}
	permute(events, func(order []string) {
		db := testkit.NewFake(nil)
		m, err := task.New(testkit.Bare(db), testkit.Quiet)
		testkit.Must(t, err)
		fn, started, release := testkit.Blocker(nil)
		op := testkit.Submit(t, m, fn)
		<-started
		var ended, stores atomic.Bool
		gate := make(chan struct{})
		db.Before(func(c *testkit.Call) error {
			if c.Finished() {
				<-gate
			}
			return nil
		})
		var closers sync.WaitGroup
		returned := func(err error) {
			if row, _ := db.Get(op.ID); err != nil || !ended.Load() || !stores.Load() || row.State != task.StateDone {
				t.Errorf("%q: %v, ended %v, stored %v: %+v", order, err, ended.Load(), stores.Load(), row)
			}
			if _, err := m.Submit("late", fn); !errors.Is(err, task.ErrClosed) {
				t.Errorf("%q: Submit after Close: %v", order, err)
			}
		}
		for _, event := range order {
			switch event {
			case "close":
				closers.Go(func() { returned(m.Close()) })
			case "shutdown":
				closers.Go(func() { returned(m.Shutdown(context.Background())) })
			case "end":
				ended.Store(true)
				release()
			case "store":
				stores.Store(true)
				close(gate)
			}
			for range 10 {
				runtime.Gosched()
			}
		}
		closers.Wait()
	})
}

// permute calls f with every order of s.
func permute(s []string, f func([]string)) {
	var rec func(n int)
	rec = func(n int) {
		if n == len(s) {
			f(s)
			return
		}
		for i := n; i < len(s); i++ {
			s[n], s[i] = s[i], s[n]
			rec(n + 1)
			s[n], s[i] = s[i], s[n]
		}
	}
	rec(0)
}
