package processtest

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

func TestMain(m *testing.M) {
	testkit.Main(m, map[string]func() any{
		"manager": func() any { return &manager{orders: make(map[string]chan task.Operation)} },
	})
}

// A manager is the role of a child process. The test calls its methods.
type manager struct {
	store *task.SQLiteStore
	m     *task.Manager

	mu     sync.Mutex                     // guards what follows
	orders map[string]chan task.Operation // by ID: orders for the function
}

// opened is the result of New in a process.
type opened = struct {
	Recovered  []string // logged IDs
	N          int      // how many operations New has recovered
	Unfinished int      // how many are not finished
}

func (p *manager) Open(path string, found *opened) (err error) {
	if p.store, err = task.OpenSQLite(path); err != nil {
		return err
	}
	l := new(testkit.Log)
	if p.m, err = task.New(p.store, l.Option()); err != nil {
		return err
	}
	found.Recovered, found.N = l.Recovered()
	ops, err := p.m.List(100_000, 0)
	for _, op := range ops {
		if !op.State.Finished() {
			found.Unfinished++
		}
	}
	return err
}

// Submit submits operations with those names, metadata and progress, which run until
// the test ends them. It returns them once all of that is stored. Those that want a
// final state have reached it by then.
func (p *manager) Submit(wants []task.Operation, got *[]task.Operation) error {
	ids := make([]string, len(wants))
	for i, want := range wants {
		orders := make(chan task.Operation, 1)
		op, err := p.m.Submit(want.Name, func(ctx context.Context, update func(int)) (any, error) {
			update(want.Progress)
			if err := task.SetMetadata(ctx, want.Metadata); err != nil {
				return nil, err
			}
			for {
				select {
				case op := <-orders:
					switch op.State {
					case task.StateDone:
						return op.Result, nil
					case task.StateFailed:
						return op.Result, errors.New(op.Error)
					}
					update(op.Progress)
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
			}
		})
		if err != nil {
			return err
		}
		ids[i] = op.ID
		p.mu.Lock()
		p.orders[op.ID] = orders
		p.mu.Unlock()
	}
	for i, want := range wants {
		op, err := p.stored(ids[i], want)
		if err == nil && want.State.Finished() {
			want.ID = op.ID
			err = p.End(want, op)
		}
		if err != nil {
			return err
		}
		*got = append(*got, *op)
	}
	return nil
}

// stored returns a running operation once its row shows the wanted values.
func (p *manager) stored(id string, want task.Operation) (op *task.Operation, err error) {
	late := testkit.Until(func() bool {
		op, err = p.store.Get(id)
		var metadata any
		return err != nil || op.State == task.StateRunning && op.Progress == want.Progress &&
			op.DecodeMetadata(&metadata) == nil && metadata == want.Metadata
	})
	return op, cmp.Or(err, late)
}

// Report makes an operation report progress, and returns it once that is stored.
func (p *manager) Report(want task.Operation, got *task.Operation) error {
	p.order(want)
	op, err := p.stored(want.ID, want)
	if err == nil {
		*got = *op
	}
	return err
}

func (p *manager) order(want task.Operation) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.orders[want.ID] <- want
}

// End ends an operation in the wanted way, and returns it.
func (p *manager) End(want task.Operation, got *task.Operation) error {
	if want.State == task.StateCancelled {
		if err := p.m.Cancel(want.ID); err != nil {
			return err
		}
	} else {
		p.order(want)
	}
	op, err := p.m.Wait(context.Background(), want.ID)
	if err == nil {
		*got = *op
	}
	return err
}

// Leave stores an operation without starting a manager, which would recover
// others. It takes a path and a state, and returns the ID.
func (p *manager) Leave(what [2]string, id *string) error {
	store, err := task.OpenSQLite(what[0])
	if err != nil {
		return err
	}
	*id = uuid.NewString()
	return store.Save(&task.Operation{ID: *id, Name: "left", State: task.State(what[1])})
}

func (p *manager) Close(string, *string) error {
	return errors.Join(p.m.Close(), p.store.Close())
}

// start starts a process with a manager on the database.
func start(t *testing.T, path string) *testkit.Process {
	t.Helper()
	p := testkit.StartProcess(t, "manager")
	p.Call("Open", path, new(opened))
	return p
}
