package tasktest

import (
	"context"
	"errors"
	"iter"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// A cancelStore adds cancel requests. It keeps the contract as long as change does.
type cancelStore struct {
	*mapStore
	texts  map[string]string
	change func(s cancelStore, op *task.Operation) // replaces RequestCancel for an unfinished row
	late   error                                   // result of RequestCancel for other rows
	list   func(s cancelStore) map[string]string   // replaces CancelRequests
}

func newCancelStore() cancelStore {
	return cancelStore{mapStore: newMapStore(), texts: make(map[string]string), late: task.ErrNotFound}
}

func (s cancelStore) RequestCancel(id, text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[id]
	switch {
	case row == nil || row.State.Finished():
		return s.late
	case !row.Cancelling:
		s.texts[id] = text
	}
	if row.Cancelling = true; s.change != nil {
		s.change(s, row)
	}
	return nil
}

func (s cancelStore) CancelRequests() (map[string]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.list != nil {
		return s.list(s), nil
	}
	requests := make(map[string]string)
	for id, text := range s.texts {
		if s.rows[id].Cancelling {
			requests[id] = text
		}
	}
	return requests, nil
}

// cancelling opens a cancelStore modified by wrong.
func cancelling(wrong func(s *cancelStore)) openFunc {
	return once(func() cancelStore {
		s := newCancelStore()
		wrong(&s)
		return s
	})
}

// A notifyStore yields changes as its function does.
type notifyStore struct {
	*mapStore
	changes func(s notifyStore, ctx context.Context, yield func(error) bool)
}

func (s notifyStore) Changes(ctx context.Context) iter.Seq[error] {
	return func(yield func(error) bool) { s.changes(s, ctx, yield) }
}

// poll keeps the contract.
func poll(s notifyStore, ctx context.Context, yield func(error) bool) {
	for ctx.Err() == nil && yield(nil) {
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func notifying(changes func(s notifyStore, ctx context.Context, yield func(error) bool)) openFunc {
	return once(func() notifyStore { return notifyStore{newMapStore(), changes} })
}

// forgetfulUpdates is a store whose Update forgets cancel requests.
type forgetfulUpdates struct{ cancelStore }

func (s forgetfulUpdates) Update(op *task.Operation) error {
	err := s.cancelStore.Update(op)
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rows[op.ID].Cancelling = false
	}
	return err
}

var wrongOthers = []wrongStore{
	{"cancels what has finished", "cancel", "task.ErrNotFound", cancelling(func(s *cancelStore) { s.late = nil })},
	{"does not know which", "cancel", "CancelRequests =", cancelling(func(s *cancelStore) {
		s.list = func(s cancelStore) map[string]string { return s.texts }
		s.change = func(s cancelStore, op *task.Operation) { s.texts["other"] = "" }
	})},
	{"ends it itself", "cancel", "State is", cancelling(func(s *cancelStore) {
		s.change = func(_ cancelStore, op *task.Operation) { op.State = task.StateCancelled }
	})},
	{"shows no request", "cancel", "Cancelling is false", cancelling(func(s *cancelStore) {
		s.change = func(_ cancelStore, op *task.Operation) { op.Cancelling = false }
		s.list = func(s cancelStore) map[string]string { return s.texts }
	})},
	{"lets the last request count", "cancel-kept", "the second", cancelling(func(s *cancelStore) {
		s.change = func(s cancelStore, op *task.Operation) {
			if len(s.texts) == 1 && s.texts[op.ID] == "the first" && s.shared["asked"] != nil {
				s.texts[op.ID] = "the second"
			}
			s.shared["asked"] = op
		}
	})},
	{"forgets a request with an Update", "cancel-kept", "after an Update", once(func() forgetfulUpdates {
		return forgetfulUpdates{newCancelStore()}
	})},
	{"goes on listing", "cancel-kept", "after the end: CancelRequests", cancelling(func(s *cancelStore) {
		s.list = func(s cancelStore) map[string]string { return s.texts }
	})},

	{"does not begin", "changes", "at the start", notifying(func(_ notifyStore, ctx context.Context, _ func(error) bool) { <-ctx.Done() })},
	{"misses changes", "changes", "after Save", notifying(func(_ notifyStore, ctx context.Context, yield func(error) bool) {
		yield(nil)
		<-ctx.Done()
	})},
	{"ends early", "changes", "has ended", notifying(func(_ notifyStore, _ context.Context, yield func(error) bool) { yield(nil) })},
	{"reports an error", "changes", "after Save: Changes yielded no", notifying(func(s notifyStore, ctx context.Context, yield func(error) bool) {
		if yield(nil) && yield(errors.New("no changes")) {
			poll(s, ctx, yield)
		}
	})},
	{"goes on for ever", "changes", "has not ended", notifying(func(s notifyStore, ctx context.Context, yield func(error) bool) {
		poll(s, ctx, yield)
		time.Sleep(patience)
	})},
	{"polls too often", "changes-rate", "again after", notifying(func(_ notifyStore, ctx context.Context, yield func(error) bool) {
		for ctx.Err() == nil && yield(nil) {
			time.Sleep(10 * time.Millisecond)
		}
	})},
}

// TestRightOthers: stores that keep the contract of these abilities pass.
func TestRightOthers(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]openFunc{
		"cancel":  cancelling(func(*cancelStore) {}),
		"changes": notifying(poll),
		"neither, injected": once(func() task.Persistence {
			return Inject(bare{newMapStore()}, func(Call) error { return nil })
		}),
	} {
		t.Run(name, func(t *testing.T) { TestPersistence(t, open) })
	}
}

// both has both abilities.
type both struct {
	cancelStore
	notifyStore
}

func (b both) Save(op *task.Operation) error          { return b.cancelStore.Save(op) }
func (b both) Update(op *task.Operation) error        { return b.cancelStore.Update(op) }
func (b both) Get(id string) (*task.Operation, error) { return b.cancelStore.Get(id) }
func (b both) List(limit, offset int) ([]*task.Operation, error) {
	return b.cancelStore.List(limit, offset)
}

func newBoth() both {
	s := newCancelStore()
	return both{s, notifyStore{s.mapStore, poll}}
}

// TestInjectOthers: the abilities fail with the fault, and are unsupported if the store
// lacks them.
func TestInjectOthers(t *testing.T) {
	fault := errors.New("fault")
	for _, tt := range []struct {
		name string
		db   task.Persistence
		err  error
		want error
	}{
		{"passed on", newBoth(), nil, nil},
		{"failed", newBoth(), fault, fault},
		{"unsupported", newMapStore(), nil, errors.ErrUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := Inject(tt.db, func(Call) error { return tt.err })
			_, err := db.(task.Canceller).CancelRequests()
			errs := []error{err}
			if tt.want != nil {
				errs = append(errs, db.(task.Canceller).RequestCancel("", ""))
			}
			for err := range db.(task.Notifier).Changes(t.Context()) {
				errs = append(errs, err)
				break
			}
			for _, err := range errs {
				if !errors.Is(err, tt.want) {
					t.Errorf("%v, want %v", errs, tt.want)
				}
			}
		})
	}
}
