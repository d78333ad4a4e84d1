package task

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"
)

// A Persistence stores operations for a [Manager].
//
// All methods may be called from any number of goroutines at once. Each should
// return within some seconds, with an error if it can't do its work.
//
// What the manager passes belongs to the store from then on. Its Metadata and
// Result are nil or a [json.RawMessage]. What the store returns belongs to the
// caller: no later call may change it. Its Metadata and Result may be anything
// that encodes to the same JSON. The bytes of a json.RawMessage, whoever passes
// it, nobody modifies. Limits and offsets are never negative.
//
// A store may have further abilities, which the manager uses when they are
// there: see [BatchWriter], [Recoverer], [FilteredLister] and [Pruner].
type Persistence interface {
	// Save stores a new operation. On return it is durable, as far as the
	// store promises that. If there is an operation with the same ID already,
	// Save leaves that as it is and returns an error.
	Save(op *Operation) error

	// Update stores the present state of an operation that is stored and not
	// finished: everything but its ID, Name and CreatedAt. If it is not stored
	// or is DONE, FAILED or CANCELLED already, Update changes nothing and
	// returns an error that wraps [ErrNotFound]. On any other error the
	// operation should be as it was; the manager tries again.
	Update(op *Operation) error

	// List returns operations by order of their Save, the last one first,
	// skipping the first offset of them and returning at most limit, fewer
	// only where the history ends. Updates do not change the order, and no two
	// operations share a place in it.
	List(limit, offset int) ([]*Operation, error)

	// Get returns the operation with that ID, or an error that wraps
	// [ErrNotFound] if there is none.
	Get(id string) (*Operation, error)
}

// A BatchWriter is a [Persistence] that can store many operations at the cost
// of one.
type BatchWriter interface {
	Persistence

	// WriteBatch does what Save does for each of saves, then what Update does
	// for each of updates, in that order. It returns an error for each of them
	// in the same order, nil where it succeeded, or no errors at all if every
	// one did: an operation that can't be stored must not keep the others from
	// being stored. On return they are durable. No two of the updates are of
	// the same operation, except that one which finishes it may follow one
	// which does not.
	WriteBatch(saves, updates []*Operation) []error
}

// writeBatch uses the store's WriteBatch if it has one, and else Save and
// Update in turn.
func writeBatch(db Persistence, saves, updates []*Operation) []error {
	n := len(saves) + len(updates)
	if db, ok := db.(BatchWriter); ok {
		errs := db.WriteBatch(saves, updates)
		switch len(errs) {
		case n:
			return errs
		case 0:
			return make([]error, n)
		default:
			err := fmt.Errorf("%T.WriteBatch returned %d errors for %d operations", db, len(errs), n)
			return slices.Repeat([]error{err}, n)
		}
	}
	errs := make([]error, 0, n)
	for _, op := range saves {
		errs = append(errs, db.Save(op))
	}
	for _, op := range updates {
		errs = append(errs, db.Update(op))
	}
	return errs
}

// A Recoverer is a [Persistence] that knows which process runs an operation,
// so that several managers can share it.
type Recoverer interface {
	Persistence

	// Recover finishes every PENDING or RUNNING operation whose process is
	// gone: its State becomes FAILED and its Error reason. It yields each once
	// that is stored, and ends with an error if it can't go on. It leaves
	// alone what a manager on this store, or on another that is alive, runs.
	// If the caller stops early, more may be finished than was yielded.
	Recover(reason string) iter.Seq2[*Operation, error]
}

// recoverOrphans uses the store's Recover if it has one. A store without it is
// taken to have one manager: whatever is unfinished in its whole history and
// not live in there is an orphan.
func recoverOrphans(db Persistence, reason string, live func(id string) bool) iter.Seq2[*Operation, error] {
	if db, ok := db.(Recoverer); ok {
		return db.Recover(reason)
	}
	return func(yield func(*Operation, error) bool) {
		const limit = 1000
		first := "" // on the page before
		for offset := 0; ; {
			page, err := db.List(limit, offset)
			if err != nil {
				yield(nil, err)
				return
			}
			if len(page) == 0 { // a short page may be the store's own limit
				return
			}
			if op := page[0]; op != nil {
				if op.ID == first { // this would go on for ever
					yield(nil, fmt.Errorf("%T.List(%d, %d) begins like the page before it", db, limit, offset))
					return
				}
				first = op.ID
			}
			offset += len(page)
			for _, op := range page {
				if op == nil || !op.State.live() || live(op.ID) {
					continue
				}
				op, err := failOrphan(db, op.ID, reason)
				if op == nil && err == nil {
					continue
				}
				if !yield(op, err) || err != nil {
					return
				}
			}
		}
	}
}

// failOrphan marks an operation as failed that was not live a moment ago. It
// returns nil if the operation has finished or has been deleted before that.
func failOrphan(db Persistence, id, reason string) (*Operation, error) {
	op, err := db.Get(id)
	if errors.Is(err, ErrNotFound) || err == nil && (op == nil || !op.State.live()) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	failed := *op
	if err := failed.encode(); err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	failed.State = StateFailed
	failed.Error = reason
	failed.UpdatedAt = latest(time.Now().UTC().Truncate(time.Microsecond), op.UpdatedAt, op.StartedAt, op.CreatedAt)
	stored := failed // which belongs to the store from then on
	if err := db.Update(&stored); errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	return &failed, nil
}

func latest(times ...time.Time) time.Time {
	return slices.MaxFunc(times, time.Time.Compare)
}

// A Filter says which operations a list is of.
type Filter struct {
	States []State // in one of these states; of none for all
	Name   string  // with exactly this name; "" for all
	Before string  // submitted before the operation with this ID; "" for all
}

// matches reports whether the state and the name are as the filter says.
func (f Filter) matches(op *Operation) bool {
	return (len(f.States) == 0 || slices.Contains(f.States, op.State)) && (f.Name == "" || op.Name == f.Name)
}

// A FilteredLister is a [Persistence] that can find operations by more than
// their place in the history.
type FilteredLister interface {
	Persistence

	// ListFiltered does what List does with those operations that the filter
	// is for. It returns an error that wraps [ErrNotFound] if there is no
	// operation with the ID Before.
	ListFiltered(f Filter, limit, offset int) ([]*Operation, error)
}

// listFiltered uses the store's ListFiltered if it has one, and else looks at
// the whole history, page by page.
func listFiltered(db Persistence, f Filter, limit, offset int) ([]*Operation, error) {
	if db, ok := db.(FilteredLister); ok {
		return db.ListFiltered(f, limit, offset)
	}
	const page = 1000
	var ops []*Operation
	seen := make(map[string]bool) // a page begins with what is on the one before if something was saved
	before := f.Before            // what is yet to be found
	for at := 0; len(ops) < limit; {
		rows, err := db.List(page, at)
		if err != nil {
			return nil, err
		}
		if len(rows) == 0 {
			if before != "" {
				return nil, fmt.Errorf("%s: %w", before, ErrNotFound)
			}
			break
		}
		at += len(rows)
		for _, op := range rows {
			if op == nil || seen[op.ID] {
				continue
			}
			seen[op.ID] = true
			switch {
			case before != "":
				if op.ID == before {
					before = ""
				}
			case !f.matches(op):
			case offset > 0:
				offset--
			case len(ops) < limit:
				ops = append(ops, op)
			}
		}
	}
	return ops, nil
}

// A Pruner is a [Persistence] that can delete operations.
type Pruner interface {
	Persistence

	// Prune deletes the operations that have finished before that time. It does
	// so in steps that keep nobody else waiting for long, and yields how many
	// operations each has deleted. What is not finished, or has no UpdatedAt,
	// stays.
	Prune(before time.Time) iter.Seq2[int, error]
}

// prune uses the store's Prune. Nothing else will do.
func prune(db Persistence, before time.Time) iter.Seq2[int, error] {
	if db, ok := db.(Pruner); ok {
		return db.Prune(before)
	}
	return func(yield func(int, error) bool) {
		yield(0, fmt.Errorf("%T has no Prune: %w", db, errors.ErrUnsupported))
	}
}

// A MemoryStore is a [Persistence] that forgets everything with its process.
// It keeps all unfinished operations and the 10,000 that finished last.
//
// Several managers may share one. An operation whose manager has been closed,
// or that was stored by other code, counts as one whose process is gone.
type MemoryStore struct {
	mu       sync.RWMutex // guards what follows
	rows     map[string]*memoryRow
	order    []*memoryRow // by order of Save; may hold rows that are gone
	finished []*memoryRow // by order of finishing
}

type memoryRow struct {
	op   Operation // Metadata and Result are json.RawMessage or nil
	gone bool
}

const maxFinished = 10_000

// NewMemoryStore returns an empty store.
func NewMemoryStore() *MemoryStore {
	return &MemoryStore{rows: make(map[string]*memoryRow)}
}

// Save implements [Persistence].
func (s *MemoryStore) Save(op *Operation) error {
	row, err := newMemoryRow(op)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rows[op.ID] != nil {
		return fmt.Errorf("operation %s is already stored", op.ID)
	}
	s.rows[op.ID] = row
	s.order = append(s.order, row)
	s.retire(row)
	return nil
}

// Update implements [Persistence].
func (s *MemoryStore) Update(op *Operation) error {
	with, err := newMemoryRow(op)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[op.ID]
	if row == nil || row.op.State.Finished() {
		return ErrNotFound
	}
	with.op.Name, with.op.CreatedAt = row.op.Name, row.op.CreatedAt
	row.op = with.op
	s.retire(row)
	return nil
}

// newMemoryRow returns a copy of op.
func newMemoryRow(op *Operation) (*memoryRow, error) {
	row := &memoryRow{op: *op}
	return row, row.op.encode()
}

// retire makes room for a row if it is finished. The caller holds s.mu.
func (s *MemoryStore) retire(row *memoryRow) {
	if !row.op.State.Finished() {
		return
	}
	s.finished = append(s.finished, row)
	if len(s.finished) <= maxFinished {
		return
	}
	oldest := s.finished[0]
	s.finished[0] = nil
	s.finished = s.finished[1:]
	s.drop(oldest)
}

// drop deletes a row. The caller holds s.mu.
func (s *MemoryStore) drop(row *memoryRow) {
	row.gone = true
	delete(s.rows, row.op.ID)
	if len(s.order) > 2*len(s.rows) {
		s.order = slices.DeleteFunc(s.order, func(r *memoryRow) bool { return r.gone })
	}
}

// List implements [Persistence].
func (s *MemoryStore) List(limit, offset int) ([]*Operation, error) {
	return s.ListFiltered(Filter{}, limit, offset)
}

// ListFiltered implements [FilteredLister].
func (s *MemoryStore) ListFiltered(f Filter, limit, offset int) ([]*Operation, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	rows := s.order
	if f.Before != "" {
		i := slices.IndexFunc(rows, func(r *memoryRow) bool { return r.op.ID == f.Before && !r.gone })
		if i < 0 {
			return nil, fmt.Errorf("%s: %w", f.Before, ErrNotFound)
		}
		rows = rows[:i]
	}
	ops := make([]*Operation, 0, max(0, min(limit, len(s.rows))))
	for _, row := range slices.Backward(rows) {
		if len(ops) == limit {
			break
		}
		if row.gone || !f.matches(&row.op) {
			continue
		}
		if offset > 0 {
			offset--
			continue
		}
		op := row.op
		ops = append(ops, &op)
	}
	return ops, nil
}

// Get implements [Persistence].
func (s *MemoryStore) Get(id string) (*Operation, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	row := s.rows[id]
	if row == nil {
		return nil, ErrNotFound
	}
	op := row.op
	return &op, nil
}

// Recover implements [Recoverer].
func (s *MemoryStore) Recover(reason string) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		for _, id := range s.orphans() {
			op, err := failOrphan(s, id, reason)
			if (op != nil || err != nil) && !yield(op, err) {
				return
			}
		}
	}
}

func (s *MemoryStore) orphans() (ids []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, row := range s.order {
		if !row.gone && row.op.State.live() && !row.op.manager.alive() {
			ids = append(ids, row.op.ID)
		}
	}
	return ids
}

// Prune implements [Pruner].
func (s *MemoryStore) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		s.mu.Lock()
		n := 0
		s.finished = slices.DeleteFunc(s.finished, func(row *memoryRow) bool {
			old := !row.op.UpdatedAt.IsZero() && row.op.UpdatedAt.Before(before)
			if old {
				s.drop(row)
				n++
			}
			return old
		})
		s.mu.Unlock()
		yield(n, nil)
	}
}
