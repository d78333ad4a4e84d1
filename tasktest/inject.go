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

// A Call is a method call of a store that [Inject] has returned.
type Call struct {
	Method string // "Save", "Update", "List", "Get", "WriteBatch", "Recover" and so on
	N      int    // the number of earlier calls of that store, of any method
}

// Inject returns a store that asks fault about each call. If fault returns nil,
// the call goes to db. If it returns an error, db is not called, and the call
// fails with that error: WriteBatch returns it for each operation, Recover, Prune
// and Changes yield nothing else. See [Lost] for errors after db was called.
//
// The store has the abilities of db: it is a [task.BatchWriter] or a
// [task.Recoverer] if db is, and a [task.FilteredLister] and [task.Pruner] if
// db is both. It is always a [task.Canceller] and a [task.Notifier], whose methods
// return errors that wrap [errors.ErrUnsupported] if db is none. It has no Close;
// close db. Recover, Prune and Changes count as calls when their results are ranged
// over. A manager calls CancelRequests and Changes some time after an operation has
// begun, and then again and again.
//
// Many goroutines call fault at once. It may block, and it may inspect the
// program under test.
func Inject(db task.Persistence, fault func(Call) error) task.Persistence {
	s := &injected{db: db, fault: fault}
	b, batches := db.(task.BatchWriter)
	r, recovers := db.(task.Recoverer)
	f, filters := db.(task.FilteredLister)
	p, prunes := db.(task.Pruner)
	history := filters && prunes
	switch {
	case batches && recovers && history:
		return struct {
			*injected
			injectedBatch
			injectedRecover
			injectedHistory
		}{s, injectedBatch{s, b}, injectedRecover{s, r}, injectedHistory{s, f, p}}
	case batches && recovers:
		return struct {
			*injected
			injectedBatch
			injectedRecover
		}{s, injectedBatch{s, b}, injectedRecover{s, r}}
	case batches && history:
		return struct {
			*injected
			injectedBatch
			injectedHistory
		}{s, injectedBatch{s, b}, injectedHistory{s, f, p}}
	case recovers && history:
		return struct {
			*injected
			injectedRecover
			injectedHistory
		}{s, injectedRecover{s, r}, injectedHistory{s, f, p}}
	case batches:
		return struct {
			*injected
			injectedBatch
		}{s, injectedBatch{s, b}}
	case recovers:
		return struct {
			*injected
			injectedRecover
		}{s, injectedRecover{s, r}}
	case history:
		return struct {
			*injected
			injectedHistory
		}{s, injectedHistory{s, f, p}}
	default:
		return s
	}
}

// FailNth is a fault for [Inject]: call n, counted from 0, fails with err.
func FailNth(n int, err error) func(Call) error {
	return failIf(func(c Call) bool { return c.N == n }, err)
}

// FailFrom is a fault for [Inject]: call n, counted from 0, and all later ones
// fail with err.
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

// Lost returns an error that stands for a lost acknowledgement: when a fault
// returns it, the store does the work, and the call still fails with err.
func Lost(err error) error { return &lostError{err} }

type lostError struct{ err error }

func (e *lostError) Error() string { return "done, but reported as failed: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

type injected struct {
	db    task.Persistence
	fault func(Call) error
	calls atomic.Int64
}

// ask returns whether to call the store, and the error that the caller gets.
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

type injectedBatch struct {
	store *injected
	db    task.BatchWriter
}

func (s injectedBatch) WriteBatch(saves, updates []*task.Operation) (errs []error) {
	err := s.store.do("WriteBatch", func() error {
		errs = s.db.WriteBatch(saves, updates)
		return nil
	})
	if err != nil {
		return slices.Repeat([]error{err}, len(saves)+len(updates))
	}
	return errs
}

type injectedRecover struct {
	store *injected
	db    task.Recoverer
}

func (s injectedRecover) Recover(reason string) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		pass, err := s.store.ask("Recover")
		switch {
		case err == nil:
			s.db.Recover(reason)(yield)
			return
		case pass:
			for range s.db.Recover(reason) {
			}
		}
		yield(nil, err)
	}
}

type injectedHistory struct {
	store  *injected
	lister task.FilteredLister
	pruner task.Pruner
}

func (s injectedHistory) ListFiltered(f task.Filter, limit, offset int) (ops []*task.Operation, err error) {
	err = s.store.do("ListFiltered", func() (err error) {
		ops, err = s.lister.ListFiltered(f, limit, offset)
		return err
	})
	if err != nil {
		return nil, err
	}
	return ops, nil
}

func (s injectedHistory) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		pass, err := s.store.ask("Prune")
		switch {
		case err == nil:
			s.pruner.Prune(before)(yield)
			return
		case pass:
			for range s.pruner.Prune(before) {
			}
		}
		yield(0, err)
	}
}
