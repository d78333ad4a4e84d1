package testkit

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/mynt-nas/task"
)

// A Call is one call of a method of a [Fake].
type Call struct {
	Method        string // the method's name
	N             int    // number of earlier calls of the same method
	ID            string // of the operation, for Get, Save, Update and RequestCancel
	Saves         []*task.Operation
	Updates       []*task.Operation
	Limit, Offset int // of List and ListFiltered

	// The answer, for the hook that runs after the store.
	Ops  []*task.Operation // what Get, List and ListFiltered return, or Recover yields
	Errs []error           // what WriteBatch returns
	Err  error             // what the other methods return or yield

	Tag int // for hooks to use
}

// Finished reports whether c stores a final state.
func (c *Call) Finished() bool {
	return slices.ContainsFunc(slices.Concat(c.Saves, c.Updates), func(op *task.Operation) bool { return op.State.Finished() })
}

// A Fake is a store in front of another one that lets a test control each call. It has
// all abilities. If the store behind it is not a BatchWriter, WriteBatch calls the
// Fake's own Save and Update in turn, hooks included. If another ability is missing,
// its method returns an error that wraps [errors.ErrUnsupported]. Use [Bare] to hide
// all abilities.
type Fake struct {
	mu     sync.Mutex // guards what follows
	db     task.Persistence
	before func(*Call) error
	after  func(*Call)
	calls  map[string]int
}

// NewFake returns a fake in front of db, or of a new MemoryStore if db is nil.
func NewFake(db task.Persistence) *Fake {
	if db == nil {
		db = task.NewMemoryStore()
	}
	return &Fake{db: db, calls: make(map[string]int)}
}

// Before makes the Fake call hook before each call reaches the store. The hook may
// change the call and take its time. If it returns an error, the store is not called,
// and the caller gets that error.
func (f *Fake) Before(hook func(*Call) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = hook
}

// After makes the Fake call hook after each call of the store, and after each operation
// that Recover yields. The hook may change the answer.
func (f *Fake) After(hook func(*Call)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after = hook
}

// Swap sends the next calls to db.
func (f *Fake) Swap(db task.Persistence) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.db = db
}

// Count returns the number of calls of a method.
func (f *Fake) Count(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// FailWrites is a hook that fails every Save and Update.
func FailWrites(c *Call) error {
	if c.Method == "Save" || c.Method == "Update" {
		return ErrDisk
	}
	return nil
}

// FailFinals is a hook that fails every Save and Update of a final state.
func FailFinals(c *Call) error {
	if c.Finished() {
		return FailWrites(c)
	}
	return nil
}

// enter begins a call. Unless err is set, the caller continues with db, and calls after
// at the end.
func (f *Fake) enter(c *Call) (db task.Persistence, after func(*Call), err error) {
	f.mu.Lock()
	before := f.before
	c.N = f.calls[c.Method]
	f.calls[c.Method]++
	f.mu.Unlock()
	if before != nil {
		err = before(c)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if after = f.after; after == nil {
		after = func(*Call) {}
	}
	return f.db, after, err
}

func (f *Fake) do(c *Call, call func(db task.Persistence)) *Call {
	db, after, err := f.enter(c)
	if err != nil {
		c.Err = err
		return c
	}
	call(db)
	after(c)
	return c
}

// Owner returns the Owner of operations that the store saves, or "" if it has none.
func (f *Fake) Owner() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.db.(interface{ Owner() string }); ok {
		return s.Owner()
	}
	return ""
}

func unsupported(db task.Persistence, method string) error {
	return fmt.Errorf("%T has no %s: %w", db, method, errors.ErrUnsupported)
}

// Save implements [task.Persistence].
func (f *Fake) Save(op *task.Operation) error {
	c := &Call{Method: "Save", ID: op.ID, Saves: []*task.Operation{op}}
	return f.do(c, func(db task.Persistence) { c.Err = db.Save(c.Saves[0]) }).Err
}

// Update implements [task.Persistence].
func (f *Fake) Update(op *task.Operation) error {
	c := &Call{Method: "Update", ID: op.ID, Updates: []*task.Operation{op}}
	return f.do(c, func(db task.Persistence) { c.Err = db.Update(c.Updates[0]) }).Err
}

// List implements [task.Persistence].
func (f *Fake) List(limit, offset int) ([]*task.Operation, error) {
	c := &Call{Method: "List", Limit: limit, Offset: offset}
	f.do(c, func(db task.Persistence) { c.Ops, c.Err = db.List(c.Limit, c.Offset) })
	return c.Ops, c.Err
}

// Get implements [task.Persistence].
func (f *Fake) Get(id string) (*task.Operation, error) {
	c := &Call{Method: "Get", ID: id}
	f.do(c, func(db task.Persistence) {
		op, err := db.Get(c.ID)
		if c.Err = err; op != nil {
			c.Ops = []*task.Operation{op}
		}
	})
	if c.Err != nil || len(c.Ops) == 0 {
		return nil, c.Err
	}
	return c.Ops[0], nil
}

// WriteBatch implements [task.BatchWriter].
func (f *Fake) WriteBatch(saves, updates []*task.Operation) []error {
	c := &Call{Method: "WriteBatch", Saves: saves, Updates: updates}
	f.do(c, func(db task.Persistence) {
		if db, ok := db.(task.BatchWriter); ok {
			c.Errs = db.WriteBatch(c.Saves, c.Updates)
			return
		}
		for _, op := range c.Saves {
			c.Errs = append(c.Errs, f.Save(op))
		}
		for _, op := range c.Updates {
			c.Errs = append(c.Errs, f.Update(op))
		}
	})
	if c.Err != nil {
		return slices.Repeat([]error{c.Err}, len(saves)+len(updates))
	}
	return c.Errs
}

// Recover implements [task.Recoverer].
func (f *Fake) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		c := &Call{Method: "Recover"}
		db, after, err := f.enter(c)
		r, ok := db.(task.Recoverer)
		if err == nil && !ok {
			err = unsupported(db, "Recover")
		}
		if err != nil {
			yield(nil, err)
			return
		}
		for op, err := range r.Recover(reason, resume) {
			c.Ops, c.Err = []*task.Operation{op}, err
			if after(c); !yield(c.Ops[0], c.Err) {
				return
			}
		}
	}
}

// ListFiltered implements [task.FilteredLister].
func (f *Fake) ListFiltered(filter task.Filter, limit, offset int) ([]*task.Operation, error) {
	c := &Call{Method: "ListFiltered", Limit: limit, Offset: offset}
	f.do(c, func(db task.Persistence) {
		if l, ok := db.(task.FilteredLister); ok {
			c.Ops, c.Err = l.ListFiltered(filter, c.Limit, c.Offset)
		} else {
			c.Err = unsupported(db, c.Method)
		}
	})
	return c.Ops, c.Err
}

// Prune implements [task.Pruner].
func (f *Fake) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		db, _, err := f.enter(&Call{Method: "Prune"})
		p, ok := db.(task.Pruner)
		if err == nil && !ok {
			err = unsupported(db, "Prune")
		}
		if err != nil {
			yield(0, err)
			return
		}
		p.Prune(before)(yield)
	}
}

// RequestCancel implements [task.Canceller].
func (f *Fake) RequestCancel(id, text string) error {
	c := &Call{Method: "RequestCancel", ID: id}
	return f.do(c, func(db task.Persistence) {
		if r, ok := db.(task.Canceller); ok {
			c.Err = r.RequestCancel(c.ID, text)
		} else {
			c.Err = unsupported(db, c.Method)
		}
	}).Err
}

// CancelRequests implements [task.Canceller].
func (f *Fake) CancelRequests() (requests map[string]string, err error) {
	c := &Call{Method: "CancelRequests"}
	err = f.do(c, func(db task.Persistence) {
		if r, ok := db.(task.Canceller); ok {
			requests, c.Err = r.CancelRequests()
		} else {
			c.Err = unsupported(db, c.Method)
		}
	}).Err
	return requests, err
}

// Changes implements [task.Notifier].
func (f *Fake) Changes(ctx context.Context) iter.Seq[error] {
	return func(yield func(error) bool) {
		db, _, err := f.enter(&Call{Method: "Changes"})
		n, ok := db.(task.Notifier)
		if err == nil && !ok {
			err = unsupported(db, "Changes")
		}
		if err != nil {
			yield(err)
			return
		}
		n.Changes(ctx)(yield)
	}
}
