package task

import (
	"iter"
	"maps"
	"math"
	"slices"
	"sync"
	"time"
)

// A MemoryStore is a [Persistence] in memory: its operations end with the process. It
// keeps all unfinished operations and the 10,000 that finished last.
//
// Several managers may share a MemoryStore. An operation whose manager has been closed,
// or that other code has stored, counts as one whose process has died.
type MemoryStore struct {
	mu       sync.RWMutex          // guards what follows
	rows     map[string]*Operation // Metadata and Result are json.RawMessage or nil
	order    []*Operation          // rows in order of Save, and some deleted ones
	finished []*Operation          // rows in order of finishing
	requests map[string]string     // texts of cancel requests for unfinished rows, by ID
}

const maxFinished = 10_000

// NewMemoryStore returns an empty store.
func NewMemoryStore() *MemoryStore {
	return &MemoryStore{rows: make(map[string]*Operation), requests: make(map[string]string)}
}

// Save implements [Persistence].
func (s *MemoryStore) Save(op *Operation) error {
	row := *op
	if err := row.encode(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rows[op.ID] != nil {
		return ErrExists
	}
	s.rows[op.ID] = &row
	s.order = append(s.order, &row)
	s.retire(&row)
	return nil
}

// Update implements [Persistence].
func (s *MemoryStore) Update(op *Operation) error {
	with := *op
	if err := with.encode(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[op.ID]
	if row == nil || row.State.Finished() {
		return ErrNotFound
	}
	with.Name, with.CreatedAt, with.Owner = row.Name, row.CreatedAt, row.Owner
	with.Cancelling = (row.Cancelling || op.Cancelling) && op.State.live()
	*row = with
	s.retire(row)
	return nil
}

// retire drops the oldest finished row beyond the limit, after a row has changed. The
// caller holds s.mu.
func (s *MemoryStore) retire(row *Operation) {
	if !row.State.Finished() {
		return
	}
	delete(s.requests, row.ID)
	if s.finished = append(s.finished, row); len(s.finished) > maxFinished {
		s.drop(s.finished[0])
		s.finished[0] = nil
		s.finished = s.finished[1:]
	}
}

// drop deletes a row. The caller holds s.mu.
func (s *MemoryStore) drop(row *Operation) {
	delete(s.rows, row.ID)
	if len(s.order) > 2*len(s.rows) {
		s.order = slices.DeleteFunc(s.order, s.gone)
	}
}

// gone reports whether a row has been deleted. The caller holds s.mu.
func (s *MemoryStore) gone(row *Operation) bool { return s.rows[row.ID] != row }

// List implements [Persistence].
func (s *MemoryStore) List(limit, offset int) ([]*Operation, error) {
	return s.ListFiltered(Filter{}, limit, offset)
}

// ListFiltered implements [FilteredLister].
func (s *MemoryStore) ListFiltered(f Filter, limit, offset int) ([]*Operation, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	ops, err := f.page(s.newestFirst, limit, offset)
	for i, row := range ops {
		op := *row
		if f.WithoutResults {
			op.Result = nil
		}
		ops[i] = &op
	}
	return ops, err
}

// newestFirst yields the rows in order of Save, newest first. The caller holds s.mu.
func (s *MemoryStore) newestFirst(yield func(*Operation, error) bool) {
	for _, row := range slices.Backward(s.order) {
		if !s.gone(row) && !yield(row, nil) {
			return
		}
	}
}

// Get implements [Persistence].
func (s *MemoryStore) Get(id string) (*Operation, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	row := s.rows[id]
	if row == nil {
		return nil, ErrNotFound
	}
	op := *row
	return &op, nil
}

// Recover implements [Recoverer].
func (s *MemoryStore) Recover(reason string, resume func(op *Operation) bool) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		ops, _ := s.ListFiltered(Filter{States: []State{StatePending, StateRunning}}, math.MaxInt, 0)
		for _, op := range ops {
			if isOpen(op.Owner) {
				continue
			}
			owner, resumed := resumes(resume, op)
			if op := s.settle(op, reason, owner, resumed); op != nil && !yield(op, nil) {
				return
			}
		}
	}
}

// settle recovers an orphan. It returns nil if another Recover came first.
func (s *MemoryStore) settle(orphan *Operation, reason, owner string, resumed bool) *Operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[orphan.ID]
	if row == nil || !row.State.live() || row.Owner != orphan.Owner {
		return nil
	}
	*row = *row.recovered(reason, resumed && !row.Cancelling)
	if row.State.live() {
		row.Owner = owner
	}
	s.retire(row)
	op := *row
	return &op
}

// Prune implements [Pruner].
func (s *MemoryStore) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		s.mu.Lock()
		n := len(s.finished)
		s.finished = slices.DeleteFunc(s.finished, func(row *Operation) bool {
			old := !row.UpdatedAt.IsZero() && row.UpdatedAt.Before(before)
			if old {
				s.drop(row)
			}
			return old
		})
		n -= len(s.finished)
		s.mu.Unlock()
		yield(n, nil)
	}
}

// RequestCancel implements [Canceller].
func (s *MemoryStore) RequestCancel(id, text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[id]
	switch {
	case row == nil || !row.State.live():
		return ErrNotFound
	case !row.Cancelling:
		row.Cancelling = true
		s.requests[id] = text
	}
	return nil
}

// CancelRequests implements [Canceller].
func (s *MemoryStore) CancelRequests() (map[string]string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.requests), nil
}
