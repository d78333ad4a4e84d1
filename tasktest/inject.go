package tasktest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync/atomic"
	"time"

	"github.com/mynt-nas/task"
)

// A Call is a method call on a store returned by [Inject].
type Call struct {
	Method string // "Save", "Update", "List", "Get", "WriteBatch", "Recover" and so on
	N      int    // the number of earlier calls of any method on that store
}

// Inject returns a store that calls fault before each call. If fault returns nil, the call
// goes to db. If fault returns an error, db is not called and the call fails with that
// error: WriteBatch returns it for each operation, and Recover, Prune and Changes yield
// nothing else. See [Lost] for errors after db was called.
//
// The store has the methods of all abilities. Methods of an ability that db lacks return an
// error that wraps [errors.ErrUnsupported] and do not count as calls. The store has no
// Close; close db. Recover, Prune and Changes count as calls when their results are ranged
// over. A manager calls CancelRequests and Changes some time after an operation begins, and
// then repeatedly.
//
// fault must be safe for concurrent use. It may block, and it may inspect the program under
// test.
func Inject(db task.Persistence, fault func(Call) error) task.Persistence {
	return &injected{db: db, fault: fault}
}

// FailNth is a fault for [Inject]: call n, counted from 0, fails with err.
func FailNth(n int, err error) func(Call) error {
	return failIf(func(c Call) bool { return c.N == n }, err)
}

// FailFrom is a fault for [Inject]: call n, counted from 0, and all later calls fail with
// err.
func FailFrom(n int, err error) func(Call) error {
	return failIf(func(c Call) bool { return c.N >= n }, err)
}

func failIf(cond func(Call) bool, err error) func(Call) error {
	return func(c Call) error {
		if cond(c) {
			return err
		}
		return nil
	}
}

// Delay is a fault for [Inject]: every call reaches the store after d.
func Delay(d time.Duration) func(Call) error {
	return func(Call) error {
		time.Sleep(d)
		return nil
	}
}

// Lost returns an error that simulates a lost acknowledgement: if a fault returns it, the
// store does the work, but the call fails with err. Changes fails without calling the store.
func Lost(err error) error { return &lostError{err} }

type lostError struct{ err error }

func (e *lostError) Error() string { return "done, but reported as failed: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// injected is the store returned by Inject.
type injected struct {
	db    task.Persistence
	fault func(Call) error
	calls atomic.Int64
}

// ask returns whether to call the store, and the error to return to the caller.
func (s *injected) ask(method string) (pass bool, err error) {
	err = s.fault(Call{Method: method, N: int(s.calls.Add(1)) - 1})
	var lost *lostError
	if errors.As(err, &lost) {
		return true, lost.err
	}
	return err == nil, err
}

func (s *injected) do(method string, call func() error) error {
	pass, err := s.ask(method)
	if !pass {
		return err
	}
	own := call()
	return cmp.Or(err, own)
}

// Owner returns the result of db's Owner method, or "" if db has none. Operations thus show
// the same Owner as without Inject.
func (s *injected) Owner() string {
	if db, ok := s.db.(interface{ Owner() string }); ok {
		return db.Owner()
	}
	return ""
}

func (s *injected) Save(op *task.Operation) error {
	return s.do("Save", func() error { return s.db.Save(op) })
}

func (s *injected) Update(op *task.Operation) error {
	return s.do("Update", func() error { return s.db.Update(op) })
}

func (s *injected) List(limit, offset int) (ops []*task.Operation, err error) {
	err = s.do("List", func() (err error) {
		ops, err = s.db.List(limit, offset)
		return err
	})
	if err != nil {
		return nil, err
	}
	return ops, nil
}

func (s *injected) Get(id string) (op *task.Operation, err error) {
	err = s.do("Get", func() (err error) {
		op, err = s.db.Get(id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return op, nil
}

func (s *injected) RequestCancel(id, text string) error {
	c, ok := s.db.(task.Canceller)
	if !ok {
		return s.unsupported("RequestCancel")
	}
	return s.do("RequestCancel", func() error { return c.RequestCancel(id, text) })
}

func (s *injected) CancelRequests() (requests map[string]string, err error) {
	c, ok := s.db.(task.Canceller)
	if !ok {
		return nil, s.unsupported("CancelRequests")
	}
	err = s.do("CancelRequests", func() (err error) {
		requests, err = c.CancelRequests()
		return err
	})
	if err != nil {
		return nil, err
	}
	return requests, nil
}

func (s *injected) Changes(ctx context.Context) iter.Seq[error] {
	return func(yield func(error) bool) {
		n, ok := s.db.(task.Notifier)
		if !ok {
			yield(s.unsupported("Changes"))
			return
		}
		if _, err := s.ask("Changes"); err != nil {
			yield(err)
			return
		}
		n.Changes(ctx)(yield)
	}
}

func (s *injected) unsupported(method string) error {
	return fmt.Errorf("%T has no %s: %w", s.db, method, errors.ErrUnsupported)
}

func (s *injected) WriteBatch(saves, updates []*task.Operation) (errs []error) {
	err := s.unsupported("WriteBatch")
	if b, ok := s.db.(task.BatchWriter); ok {
		err = s.do("WriteBatch", func() error {
			errs = b.WriteBatch(saves, updates)
			return nil
		})
	}
	if err != nil {
		return slices.Repeat([]error{err}, len(saves)+len(updates))
	}
	return errs
}

func (s *injected) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		r, ok := s.db.(task.Recoverer)
		if !ok {
			yield(nil, s.unsupported("Recover"))
			return
		}
		pass, err := s.ask("Recover")
		switch {
		case err == nil:
			r.Recover(reason, resume)(yield)
			return
		case pass:
			for range r.Recover(reason, resume) {
			}
		}
		yield(nil, err)
	}
}

func (s *injected) ListFiltered(f task.Filter, limit, offset int) (ops []*task.Operation, err error) {
	l, ok := s.db.(task.FilteredLister)
	if !ok {
		return nil, s.unsupported("ListFiltered")
	}
	err = s.do("ListFiltered", func() (err error) {
		ops, err = l.ListFiltered(f, limit, offset)
		return err
	})
	if err != nil {
		return nil, err
	}
	return ops, nil
}

func (s *injected) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		p, ok := s.db.(task.Pruner)
		if !ok {
			yield(0, s.unsupported("Prune"))
			return
		}
		pass, err := s.ask("Prune")
		switch {
		case err == nil:
			p.Prune(before)(yield)
			return
		case pass:
			for range p.Prune(before) {
			}
		}
		yield(0, err)
	}
}
