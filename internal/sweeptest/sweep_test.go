package sweeptest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
	"github.com/mynt-nas/task/tasktest"
)

var errSweep = errors.New("injected failure")

// TestSweep runs a scenario repeatedly: the first call of the store fails, then the
// second and so on, until a run ends before that call. In every run, no acknowledged
// operation is lost, and no call hangs.
func TestSweep(t *testing.T) {
	sweepAll(t, sweep)
}

// sweepAll runs a scenario for each store, fault and call.
func sweepAll(t *testing.T, scenario func(s *sweepRun)) {
	for store, opener := range sweepStores {
		for name, fault := range sweepFaults {
			t.Run(store+"/"+name, func(t *testing.T) {
				step := 1
				if strings.Contains(name, "from then on") { // neighbours differ little
					step = testos.Size(2, 1)
				}
				for i, over := 0, 0; over < 3; i += step { // the number of calls varies a little
					over++
					t.Run(fmt.Sprint("call ", i), func(t *testing.T) {
						defer time.AfterFunc(time.Minute, func() { panic("a run takes a minute") }).Stop() // real time
						synctest.Test(t, func(t *testing.T) {
							s := &sweepRun{t: t, open: opener(t), fault: fault(i)}
							s.db = s.open()
							scenario(s)
							if s.faults.Load() > 0 {
								over = 0
							}
						})
					})
				}
			})
		}
	}
}

// sweepStores lists the kinds of store. Each function returns another that opens the
// store, each time with the same operations.
var sweepStores = map[string]func(t *testing.T) func() task.Persistence{
	"memory": func(*testing.T) func() task.Persistence {
		db := task.NewMemoryStore()
		return func() task.Persistence { return db }
	},
	"batches": func(*testing.T) func() task.Persistence {
		db := testkit.NewFake(nil)
		return func() task.Persistence { return db }
	},
	"four methods": func(*testing.T) func() task.Persistence {
		db := testkit.Bare(task.NewMemoryStore())
		return func() task.Persistence { return db }
	},
	"sqlite": func(t *testing.T) func() task.Persistence {
		path := testkit.FastPath(t)
		return func() task.Persistence { return testkit.OpenSQLite(t, path) }
	},
}

var sweepFaults = map[string]func(i int) func(tasktest.Call) error{
	"fails once":         func(i int) func(tasktest.Call) error { return tasktest.FailNth(i, errSweep) },
	"fails from then on": func(i int) func(tasktest.Call) error { return tasktest.FailFrom(i, errSweep) },
	"lost once":          func(i int) func(tasktest.Call) error { return tasktest.FailNth(i, tasktest.Lost(errSweep)) },
	"lost from then on":  func(i int) func(tasktest.Call) error { return tasktest.FailFrom(i, tasktest.Lost(errSweep)) },
}

// sweepJobs lists the ways in which an operation can end.
var sweepJobs = []sweepJob{
	{
		name: "quick",
		fn:   func(context.Context, func(int)) (any, error) { return "result", nil },
		want: task.Operation{State: task.StateDone, Progress: 100, Result: "result"},
	},
	{
		name: "reports",
		opts: []task.SubmitOption{task.WithMetadata("first")},
		fn: func(ctx context.Context, update func(int)) (any, error) {
			update(40)
			if err := task.SetMessage(ctx, "at a"); err != nil {
				return nil, err
			}
			time.Sleep(150 * time.Millisecond) // until the message is stored
			return nil, task.SetMetadata(ctx, "second")
		},
		want: task.Operation{State: task.StateDone, Progress: 100, Metadata: "second"},
	},
	{
		name: "fails",
		fn: func(ctx context.Context, update func(int)) (any, error) {
			update(40)
			return "partial", errors.Join(task.SetMessage(ctx, "at a"), errors.New("broken"))
		},
		want: task.Operation{State: task.StateFailed, Progress: 40, Message: "at a", Result: "partial", Error: "broken"},
	},
	{
		name: "panics",
		fn:   func(context.Context, func(int)) (any, error) { panic("broken") },
		want: task.Operation{State: task.StateFailed, Error: "panic: broken"},
	},
	{
		name:   "cancelled",
		cancel: true,
		fn:     testkit.UntilCancelled,
		want:   task.Operation{State: task.StateCancelled, Error: "operation cancelled"},
	},
	{
		name:   "cancelled, done anyway",
		cancel: true,
		fn:     func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return "result", nil },
		want:   task.Operation{State: task.StateDone, Progress: 100, Result: "result"},
	},
	{
		name: "closed",
		fn:   testkit.UntilCancelled,
		want: task.Operation{State: task.StateFailed, Error: testkit.ShutdownText},
	},
}

type sweepJob struct {
	name   string
	cancel bool
	opts   []task.SubmitOption
	fn     task.Func
	want   task.Operation // the final state; only these fields matter
}

// A sweepRun is one run of the scenario.
type sweepRun struct {
	t     *testing.T
	open  func() task.Persistence
	db    task.Persistence // without faults, for the checks
	fault func(tasktest.Call) error
	log   testkit.Log // of the managers
	ops   []*sweepOp

	calls    atomic.Int64 // of the store by managers
	faults   atomic.Int64 // how many of them failed
	surfaced atomic.Bool  // a caller got one of them as an error
}

// A sweepOp is an operation that the scenario submits.
type sweepOp struct {
	sweepJob
	id    string       // "" if Submit returned an error
	calls atomic.Int64 // of its function
	told  string       // what Wait returned, as JSON; "" for an error
	final string       // what was stored when the manager was closed, as JSON; "" for nothing final
}

func sweep(s *sweepRun) {
	t := s.t
	s.restart("first")
	logger := s.log.Option()
	m, err := task.New(s.faulty(), logger)
	if s.saw("New", err); err != nil {
		m, err = task.New(s.faulty(), logger)
		s.saw("New again", err)
	}
	if err == nil {
		s.use(m)
	}

	s.restart("second")
	m = task.NewManager(s.faulty(), logger)
	time.Sleep(time.Second) // if recovery has failed, it is tried again
	s.use(m)
	if left := s.unfinished(); len(left) > 0 && s.faults.Load() <= 1 {
		t.Errorf("unfinished, although at most one call has failed: %v", left)
	}

	s.restart("third")
	m, err = task.New(s.db, testkit.Quiet)
	testkit.Must(t, err)
	testkit.Must(t, m.Close())
	s.settled()
	s.close()

	if s.faults.Load() > 0 && !s.surfaced.Load() && !strings.Contains(s.log.String(), errSweep.Error()) {
		t.Error("the failure was neither returned nor logged")
	}
}

// restart leaves operations in some states, as a dead process does, and opens the store
// again.
func (s *sweepRun) restart(name string) {
	for _, state := range []task.State{task.StatePending, task.StateRunning, task.StateDone} {
		id := fmt.Sprintf("left before the %s manager, %s", name, state)
		testkit.Must(s.t, s.db.Save(&task.Operation{ID: id, Name: "left", State: state}))
	}
	s.close()
	s.db = s.open()
}

func (s *sweepRun) close() {
	if c, ok := s.db.(io.Closer); ok {
		testkit.Must(s.t, c.Close())
	}
}

// faulty returns the store with the fault. Calls are counted across restarts.
func (s *sweepRun) faulty() task.Persistence { return s.inject(s.db) }

func (s *sweepRun) inject(db task.Persistence) task.Persistence {
	return tasktest.Inject(db, func(c tasktest.Call) error {
		c.N = int(s.calls.Add(1)) - 1
		err := s.fault(c)
		if err != nil {
			s.faults.Add(1)
		}
		if err != nil && (c.Method == "CancelRequests" || c.Method == "Changes") {
			s.surfaced.Store(true) // asked again, and Close does not wait until that is logged
		}
		return err
	})
}

// saw records an error that a caller got. It must be the injected one.
func (s *sweepRun) saw(call string, err error) {
	if err == nil {
		return
	}
	s.surfaced.Store(true)
	if !errors.Is(err, errSweep) {
		s.t.Errorf("%s: %v", call, err)
	}
}

// unfinished returns the IDs of operations that are stored as unfinished.
func (s *sweepRun) unfinished() map[string]bool {
	ids := make(map[string]bool)
	for _, op := range s.stored() {
		if !op.State.Finished() {
			ids[op.ID] = true
		}
	}
	return ids
}

func (s *sweepRun) stored() []*task.Operation {
	ops, err := s.db.List(1000, 0)
	testkit.Must(s.t, err)
	return ops
}

// use calls every method of a manager, and closes it.
func (s *sweepRun) use(m *task.Manager) {
	before := s.unfinished()
	var waits sync.WaitGroup
	ops := s.submit(m, &waits)
	synctest.Wait() // until every operation that can start has started
	for _, op := range ops {
		if op.cancel && op.id != "" {
			if err := m.Cancel(op.id); err != nil {
				s.t.Errorf("Cancel: %v", err)
			}
		}
	}
	synctest.Wait()
	_, err := m.List(100, 0)
	s.saw("List", err)
	time.Sleep(200 * time.Millisecond) // until only functions that wait for Close still run

	began := time.Now()
	closed := m.Close()
	s.saw("Close", closed)
	if took := time.Since(began); took > 7*time.Second {
		s.t.Errorf("Close took %v", took)
	}
	waits.Wait()
	for id := range s.unfinished() {
		if !before[id] && (closed == nil || !strings.Contains(closed.Error(), id)) {
			s.t.Errorf("%s is not finished, and Close says %v", id, closed)
		}
	}
	for _, op := range ops {
		s.account(op)
	}
}

// submit submits operations, first one after the other, then all at once.
func (s *sweepRun) submit(m *task.Manager, waits *sync.WaitGroup) (ops []*sweepOp) {
	submit := func(op *sweepOp) {
		got, err := m.Submit(op.name, s.counted(op), op.opts...)
		if s.saw("Submit", err); err == nil {
			op.id = got.ID
			waits.Go(func() { s.wait(m, op) })
		}
	}
	for range 2 {
		for _, job := range sweepJobs {
			ops = append(ops, &sweepOp{sweepJob: job})
		}
	}
	s.ops = append(s.ops, ops...)
	for _, op := range ops[:len(sweepJobs)] {
		submit(op)
	}
	var all sync.WaitGroup
	for _, op := range ops[len(sweepJobs):] {
		all.Go(func() { submit(op) })
	}
	all.Wait()
	return ops
}

// counted returns the function of an operation.
func (s *sweepRun) counted(op *sweepOp) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		op.calls.Add(1)
		self, _ := task.FromContext(ctx)
		if _, err := s.db.Get(self.ID); err != nil {
			s.t.Errorf("%s: its function runs, and the store says %v", op.name, err)
		}
		return op.fn(ctx, update)
	}
}

// wait waits for an operation, whose final state must be stored by then.
func (s *sweepRun) wait(m *task.Manager, op *sweepOp) {
	got, err := m.Wait(context.Background(), op.id)
	if s.saw("Wait", err); err != nil {
		return
	}
	op.told = testkit.JSON(got)
	stored, err := s.db.Get(op.id)
	if err != nil || testkit.JSON(stored) != op.told {
		s.t.Errorf("%s: told   %s,\nstored %s, %v", op.name, op.told, testkit.JSON(stored), err)
	}
}

// account checks an operation after its manager was closed.
func (s *sweepRun) account(op *sweepOp) {
	if op.id == "" {
		if n := op.calls.Load(); n > 0 {
			s.t.Errorf("%s: Submit failed, and its function was called %d times", op.name, n)
		}
		return
	}
	if n := op.calls.Load(); n != 1 {
		s.t.Errorf("%s: its function was called %d times", op.name, n)
	}
	got, err := s.db.Get(op.id)
	if err != nil {
		s.t.Errorf("%s: %v", op.name, err)
		return
	}
	if got.State.Finished() {
		op.final = testkit.JSON(got)
		want := op.want
		want.ID, want.Name = op.id, op.name
		want.CreatedAt, want.StartedAt, want.UpdatedAt = got.CreatedAt, got.StartedAt, got.UpdatedAt
		if want := testkit.JSON(&want); op.final != want {
			s.t.Errorf("%s: stored %s,\nwant   %s", op.name, op.final, want)
		}
	}
	if op.told != "" && op.told != op.final {
		s.t.Errorf("%s: told   %s,\nstored %s", op.name, op.told, op.final)
	}
}

// settled checks that every operation has finished, and only once.
func (s *sweepRun) settled() {
	stored := make(map[string]*task.Operation)
	for _, row := range s.stored() {
		if stored[row.ID] = row; !row.State.Finished() {
			s.t.Errorf("it is not finished: %+v", row)
		}
	}
	for _, op := range s.ops {
		row := stored[op.id]
		switch {
		case op.id == "":
		case row == nil:
			s.t.Errorf("%s: it is gone", op.name)
		case op.final == "" && (row.State != task.StateFailed || row.Error != testkit.RestartText):
			s.t.Errorf("%s: nobody recovered it: %+v", op.name, row)
		case op.final != "" && op.final != testkit.JSON(row):
			s.t.Errorf("%s: finished as %s,\nthen as %s", op.name, op.final, testkit.JSON(row))
		}
		delete(stored, op.id)
	}
	// The others were saved by other code, or are stored although Submit returned an
	// error.
	for id, row := range stored {
		ok := row.State == task.StateFailed && (row.Error == testkit.RestartText || strings.Contains(row.Error, "Submit failed"))
		if strings.HasPrefix(id, "left") && strings.HasSuffix(id, "DONE") {
			ok = row.State == task.StateDone
		}
		if !ok {
			s.t.Errorf("an unknown operation: %+v", row)
		}
	}
}
