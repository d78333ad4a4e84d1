package tasktest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

// TestWrongStores checks that each wrong store is found by the check of the rule that it
// breaks, with a text that names the fault. Every check must find a wrong store.
func TestWrongStores(t *testing.T) {
	checks := slices.Concat(methodChecks, batchChecks, recoverChecks, filterChecks, pruneChecks, otherChecks)
	for _, c := range checks {
		if !slices.ContainsFunc(wrongStores, func(w wrongStore) bool { return w.rule == c.name }) {
			t.Errorf("%s finds nothing", c.name)
		}
	}
	for _, w := range wrongStores {
		t.Run(w.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // time-outs take no real time
				i := slices.IndexFunc(checks, func(c check) bool { return c.name == w.rule })
				err := checks[i].run(t.TempDir(), w.open)
				if err == nil || !strings.Contains(err.Error(), w.says) {
					t.Errorf("%s: %v, want %q in it", w.rule, err, w.says)
				}
			})
		})
	}
}

// A mapStore is a simple store as a user might write it. It keeps the contract.
type mapStore struct {
	mu    sync.Mutex // guards what follows
	rows  map[string]*task.Operation
	order []string        // IDs in the order of Save
	left  map[string]bool // IDs saved before the last Close

	// For wrong stores.
	busy   sync.Mutex
	shared map[string]*task.Operation
}

func newMapStore() *mapStore {
	return &mapStore{
		rows:   make(map[string]*task.Operation),
		left:   make(map[string]bool),
		shared: make(map[string]*task.Operation),
	}
}

func (s *mapStore) Save(op *task.Operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rows[op.ID] != nil {
		return errors.New("stored already")
	}
	s.put(*op)
	return nil
}

// put stores an operation, replacing any with the same ID. The caller must hold s.mu.
func (s *mapStore) put(op task.Operation) {
	if s.rows[op.ID] == nil {
		s.order = append(s.order, op.ID)
	}
	s.rows[op.ID] = &op
}

func (s *mapStore) Update(op *task.Operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	row := s.rows[op.ID]
	if row == nil || row.State.Finished() {
		return fmt.Errorf("nothing unfinished: %w", task.ErrNotFound)
	}
	op.Name, op.CreatedAt = row.Name, row.CreatedAt
	op.Cancelling = (row.Cancelling || op.Cancelling) && !op.State.Finished()
	s.put(*op)
	return nil
}

func (s *mapStore) List(limit, offset int) (ops []*task.Operation, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.order) - 1 - offset; i >= 0 && len(ops) < limit; i-- {
		op := *s.rows[s.order[i]]
		ops = append(ops, &op)
	}
	return ops, nil
}

func (s *mapStore) Get(id string) (*task.Operation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rows[id] == nil {
		return nil, task.ErrNotFound
	}
	op := *s.rows[id]
	return &op, nil
}

func (s *mapStore) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.rows {
		s.left[id] = true
	}
	return nil
}

// A batchStore adds WriteBatch and keeps the contract.
type batchStore struct {
	*mapStore
	batch func(s batchStore, saves, updates []*task.Operation) []error // replaces WriteBatch unless nil
}

func (s batchStore) WriteBatch(saves, updates []*task.Operation) (errs []error) {
	if s.batch != nil {
		return s.batch(batchStore{mapStore: s.mapStore}, saves, updates)
	}
	for _, op := range saves {
		errs = append(errs, s.Save(op))
	}
	for _, op := range updates {
		errs = append(errs, s.Update(op))
	}
	return errs
}

// A recoverStore adds Recover and keeps the contract.
type recoverStore struct {
	*mapStore
	orphan func(op *task.Operation, left bool) bool
	store  func(s *mapStore, op task.Operation) // stores a recovered operation; the caller holds s.mu

	// For wrong stores: if not nil, these replace steps of Recover.
	ask  func(resume func(*task.Operation) bool, s *mapStore, op *task.Operation) bool
	take func(op *task.Operation, owner string)
}

func isOrphan(op *task.Operation, left bool) bool { return left && !op.State.Finished() }

func (s recoverStore) Recover(reason string, resume func(*task.Operation) bool) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		all, _ := s.List(1<<30, 0)
		for _, op := range all {
			s.mu.Lock()
			orphan := s.orphan(op, s.left[op.ID])
			s.mu.Unlock()
			if !orphan {
				continue
			}
			asked, resumed := *op, false
			switch {
			case resume == nil:
			case s.ask != nil:
				resumed = s.ask(resume, s.mapStore, &asked)
			case !op.Cancelling:
				resumed = resume(&asked)
			}
			if op = s.settle(op.ID, reason, asked.Owner, resumed); op != nil && !yield(op, nil) {
				return
			}
		}
	}
}

func (s recoverStore) settle(id, reason, owner string, resumed bool) *task.Operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	op := *s.rows[id]
	if !s.orphan(&op, s.left[id]) {
		return nil
	}
	if resumed {
		s.take(&op, owner)
		delete(s.left, id)
	} else {
		op.State, op.Error = task.StateFailed, reason
	}
	s.store(s.mapStore, op)
	return &op
}

// take takes an operation over, as Recover should.
func take(op *task.Operation, owner string) {
	op.State, op.Owner, op.Progress, op.Message, op.StartedAt = task.StatePending, owner, 0, "", time.Time{}
}

// wrong is a mapStore with some methods replaced.
type wrong struct {
	*mapStore
	save   func(s *mapStore, op *task.Operation) error
	update func(s *mapStore, op *task.Operation) error
	list   func(s *mapStore, limit, offset int) ([]*task.Operation, error)
	get    func(s *mapStore, id string) (*task.Operation, error)
}

func (w wrong) Save(op *task.Operation) error {
	if w.save != nil {
		return w.save(w.mapStore, op)
	}
	return w.mapStore.Save(op)
}

func (w wrong) Update(op *task.Operation) error {
	if w.update != nil {
		return w.update(w.mapStore, op)
	}
	return w.mapStore.Update(op)
}

func (w wrong) List(limit, offset int) ([]*task.Operation, error) {
	if w.list != nil {
		return w.list(w.mapStore, limit, offset)
	}
	return w.mapStore.List(limit, offset)
}

func (w wrong) Get(id string) (*task.Operation, error) {
	if w.get != nil {
		return w.get(w.mapStore, id)
	}
	return w.mapStore.Get(id)
}

// open returns an open function for wrong stores like w.
func (w wrong) open() func(dir string) (task.Persistence, error) {
	return once(func() wrong {
		w := w
		w.mapStore = newMapStore()
		return w
	})
}

type (
	saveFunc   = func(s *mapStore, op *task.Operation) error
	listFunc   = func(s *mapStore, limit, offset int) ([]*task.Operation, error)
	getFunc    = func(s *mapStore, id string) (*task.Operation, error)
	openFunc   = func(dir string) (task.Persistence, error)
	changeFunc = func(op *task.Operation)
)

func saving(f saveFunc) openFunc   { return wrong{save: f}.open() }
func updating(f saveFunc) openFunc { return wrong{update: f}.open() }
func listing(f listFunc) openFunc  { return wrong{list: f}.open() }
func getting(f getFunc) openFunc   { return wrong{get: f}.open() }

// storing opens a store that changes an operation before storing it.
func storing(change changeFunc) openFunc {
	return wrong{
		save:   func(s *mapStore, op *task.Operation) error { change(op); return s.Save(op) },
		update: func(s *mapStore, op *task.Operation) error { change(op); return s.Update(op) },
	}.open()
}

// showing opens a store that changes an operation before returning it.
func showing(change changeFunc) openFunc {
	return wrong{
		list: func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
			ops, err := s.List(limit, offset)
			for _, op := range ops {
				change(op)
			}
			return ops, err
		},
		get: func(s *mapStore, id string) (*task.Operation, error) {
			op, err := s.Get(id)
			if err == nil {
				change(op)
			}
			return op, err
		},
	}.open()
}

// sorting opens a store that lists operations in another order.
func sorting(compare func(a, b *task.Operation) int) openFunc {
	return listing(func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
		ops, err := s.List(math.MaxInt, 0)
		slices.SortStableFunc(ops, compare)
		ops = ops[min(offset, len(ops)):]
		return ops[:min(limit, len(ops))], err
	})
}

// sharing opens a store that returns pointers to what row returns.
func sharing(row func(s *mapStore, op *task.Operation) *task.Operation) openFunc {
	return wrong{
		list: func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
			ops, err := s.List(limit, offset)
			for i, op := range ops {
				ops[i] = row(s, op)
			}
			return ops, err
		},
		get: func(s *mapStore, id string) (*task.Operation, error) {
			op, err := s.Get(id)
			if err == nil {
				op = row(s, op)
			}
			return op, err
		},
	}.open()
}

func batching(f func(s batchStore, saves, updates []*task.Operation) []error) openFunc {
	return once(func() batchStore { return batchStore{newMapStore(), f} })
}

func recovering(orphan func(op *task.Operation, left bool) bool) openFunc {
	return once(func() recoverStore { return recoverStore{newMapStore(), orphan, (*mapStore).put, nil, take} })
}

type askFunc = func(resume func(*task.Operation) bool, s *mapStore, op *task.Operation) bool

// asking opens a store that calls resume in its own way.
func asking(ask askFunc) openFunc {
	return once(func() recoverStore { return recoverStore{newMapStore(), isOrphan, (*mapStore).put, ask, take} })
}

// taking opens a store that takes operations over in its own way.
func taking(take func(op *task.Operation, owner string)) openFunc {
	return once(func() recoverStore { return recoverStore{newMapStore(), isOrphan, (*mapStore).put, nil, take} })
}

// others lets other goroutines run until they block: in a synctest bubble, no time passes
// before then.
func others() { time.Sleep(time.Nanosecond) }

// A wrongStore breaks a rule.
type wrongStore struct {
	name string
	rule string // name of a check that finds it
	says string // part of that check's error
	open openFunc
}

var wrongStores = append(wrongOthers, []wrongStore{
	{"leaves out all values", "max-value", "Metadata is", once(func() *valuelessLister {
		return &valuelessLister{task.NewMemoryStore()}
	})},
	{"lists from the beginning again", "filtered", "want 0 operations", once(func() *forgetfulLister {
		return &forgetfulLister{task.NewMemoryStore()}
	})},
	{"continues only after what it has stored", "filtered-deleted", "want 2 operations", once(func() *strictLister {
		return &strictLister{task.NewMemoryStore()}
	})},
	{"distinguishes upper and lower case", "filtered-containing", `containing "scrub"`, wrongFilter(func(f *task.Filter) {
		f.Name, f.Containing = f.Containing, ""
	})},
	{"knows the stored metadata only", "filtered-metadata", "Include:[", wrongFilter(func(f *task.Filter) {
		if len(f.Metadata) > 0 {
			f.Include, f.Exclude = nil, nil
		}
	})},
	{"compares one member", "filtered-metadata", "user:root", wrongFilter(func(f *task.Filter) {
		if pool, ok := f.Metadata["pool"]; ok {
			f.Metadata = map[string]string{"pool": pool}
		}
	})},
	{"includes the end of a range", "filtered-finished", "FinishedBefore:2024-02-29 12:00:03", wrongFilter(func(f *task.Filter) {
		if !f.FinishedBefore.IsZero() {
			f.FinishedBefore = f.FinishedBefore.Add(time.Microsecond)
		}
	})},
	{"excludes the start of a range", "filtered-finished", "FinishedAfter:2024-02-29 12:00:01", wrongFilter(func(f *task.Filter) {
		if !f.FinishedAfter.IsZero() {
			f.FinishedAfter = f.FinishedAfter.Add(time.Microsecond)
		}
	})},
	{"lists by submission", "filtered-by-finish", "ByFinish:true", wrongFilter(func(f *task.Filter) {
		if f.ByFinish && len(f.States) == 0 {
			f.ByFinish, f.States = false, []task.State{task.StateDone, task.StateFailed, task.StateCancelled}
		}
	})},
	{"ignores unknown places by finish", "filtered-by-finish", "unfinished operation", once(func() *lenientLister {
		return &lenientLister{task.NewMemoryStore()}
	})},
	{"reads results", "filtered-without-results", "without results", wrongFilter(func(f *task.Filter) { f.WithoutResults = false })},
	{"prunes by age alone", "prune", "after Prune: List shows", once(func() *eagerPruner {
		return &eagerPruner{mapStore: newMapStore()}
	})},
	{"is full from the start", "empty", "shows no operations", once(func() *mapStore {
		s := newMapStore()
		s.Save(&task.Operation{ID: "1", Name: "somebody's"})
		return s
	})},
	{"saves as PENDING", "save", "whatever its state", saving(func(s *mapStore, op *task.Operation) error {
		op.State = task.StatePending
		return s.Save(op)
	})},
	{"loses updates", "update", `State is "PENDING", want "RUNNING"`, updating(func(s *mapStore, op *task.Operation) error {
		if row, err := s.Get(op.ID); err != nil || row.State.Finished() {
			return task.ErrNotFound
		}
		return nil
	})},
	{"loses updates that only report progress", "update", `Progress is`, updating(func(s *mapStore, op *task.Operation) error {
		if row, err := s.Get(op.ID); err == nil && row.State == task.StateRunning && op.State == row.State &&
			jsonText(row.Metadata) == jsonText(op.Metadata) && row.Error == op.Error {
			return nil
		}
		return s.Update(op)
	})},
	{"keeps what an update empties", "update", "have become empty", updating(func(s *mapStore, op *task.Operation) error {
		if row, err := s.Get(op.ID); err == nil && op.Metadata == nil {
			op.Metadata = row.Metadata
		}
		return s.Update(op)
	})},
	{"resurrects", "update-finished", "resurrected", updating(func(s *mapStore, op *task.Operation) error {
		row, err := s.Get(op.ID)
		if err != nil {
			return err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		op.Name, op.CreatedAt = row.Name, row.CreatedAt
		s.put(*op)
		return nil
	})},
	{"changes the finished and reports them missing", "update-finished", "changes nothing", updating(func(s *mapStore, op *task.Operation) error {
		err := s.Update(op)
		s.mu.Lock()
		defer s.mu.Unlock()
		if row := s.rows[op.ID]; err != nil && row != nil {
			row.Error = op.Error
		}
		return err
	})},
	{"upserts in Save", "save-duplicate", "already stored", saving(func(s *mapStore, op *task.Operation) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.put(*op)
		return nil
	})},
	{"takes upper and lower case for the same", "ids", "Save(", saving(func(s *mapStore, op *task.Operation) error {
		s.mu.Lock()
		for id := range s.rows {
			if strings.EqualFold(id, op.ID) {
				s.mu.Unlock()
				return task.ErrExists
			}
		}
		s.mu.Unlock()
		return s.Save(op)
	})},
	{"runs what is finished again", "manager-ids", "functions have run, want 0", saving(func(s *mapStore, op *task.Operation) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.put(*op)
		return nil
	})},
	{"accepts duplicates silently", "save-duplicate", "want an error", saving(func(s *mapStore, op *task.Operation) error {
		s.Save(op)
		return nil
	})},
	{"upserts in Update", "update-missing", "upsert", updating(func(s *mapStore, op *task.Operation) error {
		if _, err := s.Get(op.ID); err != nil {
			return s.Save(op)
		}
		return s.Update(op)
	})},
	{"returns another error for a missing operation", "update-missing", "wraps task.ErrNotFound", updating(func(s *mapStore, op *task.Operation) error {
		if s.Update(op) != nil {
			return errors.New("0 rows affected")
		}
		return nil
	})},
	{"renames", "update-keeps", "Name is", updating(func(s *mapStore, op *task.Operation) error {
		name := op.Name
		err := s.Update(op)
		if err == nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.rows[op.ID].Name = name
		}
		return err
	})},
	{"pages unstably", "order", "order of their Save", sorting(func(a, b *task.Operation) int { return rand.IntN(3) - 1 })},
	{"orders by ID", "order", "whatever their times and IDs", sorting(func(a, b *task.Operation) int { return strings.Compare(b.ID, a.ID) })},
	{"orders by creation", "order", "earlier times", sorting(func(a, b *task.Operation) int {
		return strings.Compare(b.CreatedAt.String(), a.CreatedAt.String())
	})},
	{"orders by creation, then by ID", "order", "equal times", sorting(func(a, b *task.Operation) int {
		return cmp.Or(strings.Compare(b.CreatedAt.String(), a.CreatedAt.String()), strings.Compare(b.ID, a.ID))
	})},
	{"orders by update", "order", "however they are updated", sorting(func(a, b *task.Operation) int { return b.UpdatedAt.Compare(a.UpdatedAt) })},
	{"ignores the limit", "pages", "at most limit", listing(func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
		return s.List(math.MaxInt, offset)
	})},
	{"takes limit 0 for no limit", "pages", "at most limit", listing(func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
		return s.List(cmp.Or(limit, math.MaxInt), offset)
	})},
	{"ignores the offset", "pages", "skips offset", listing(func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
		return s.List(limit, 0)
	})},
	{"has a largest page", "pages", "fewer only where the history ends", listing(func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
		return s.List(min(limit, 100), offset)
	})},
	{"fails past the end", "pages", "no such page", listing(func(s *mapStore, limit, offset int) ([]*task.Operation, error) {
		if offset >= len(s.order) && offset > 0 {
			return nil, errors.New("no such page")
		}
		return s.List(limit, offset)
	})},
	{"reads pages row by row", "pages-moving", "the page at no moment", wrong{
		save: func(s *mapStore, op *task.Operation) error { others(); return s.Save(op) },
		list: func(s *mapStore, limit, offset int) (page []*task.Operation, err error) {
			for range min(limit, 100) {
				ops, _ := s.List(1, offset)
				page = append(page, ops...)
				offset++
				others()
			}
			return page, nil
		},
	}.open()},
	{"returns nil, nil", "get-unknown", "want an error that wraps task.ErrNotFound", getting(func(s *mapStore, id string) (*task.Operation, error) {
		op, _ := s.Get(id)
		return op, nil
	})},
	{"wants a UUID", "get-unknown", "whatever the ID looks like", getting(func(s *mapStore, id string) (*task.Operation, error) {
		if len(id) != 36 {
			return nil, errors.New("invalid input syntax for type uuid")
		}
		return s.Get(id)
	})},
	{"returns what it keeps", "returned", "belongs to the caller", sharing(func(s *mapStore, op *task.Operation) *task.Operation {
		return s.rows[op.ID]
	})},
	{"overwrites what it has returned", "returned", "belongs to the caller", sharing(func(s *mapStore, op *task.Operation) *task.Operation {
		// It keeps one copy and updates that copy on each read.
		s.mu.Lock()
		defer s.mu.Unlock()
		shared := s.shared[op.ID]
		if shared == nil {
			shared = new(task.Operation)
			s.shared[op.ID] = shared
		}
		*shared = *op
		return shared
	})},
	{"overwrites what it was given", "passed", "does not modify", updating(func(s *mapStore, op *task.Operation) error {
		if row, err := s.Get(op.ID); err == nil {
			old, _ := row.Metadata.(json.RawMessage)
			if raw, _ := op.Metadata.(json.RawMessage); len(raw) == len(old) && len(raw) > 0 {
				copy(old, raw)
				op.Metadata = old
			}
		}
		return s.Update(op)
	})},
	{"ends texts at NUL", "texts", "whatever characters", storing(func(op *task.Operation) { op.Error, _, _ = strings.Cut(op.Error, "\x00") })},
	{"trims texts", "texts", "kept unchanged", storing(func(op *task.Operation) { op.Name = strings.TrimSpace(op.Name) })},
	{"cuts long texts", "texts", "however long", storing(func(op *task.Operation) { op.Name = op.Name[:min(255, len(op.Name))] })},
	{"cuts long values", "values", "invalid JSON", storing(func(op *task.Operation) {
		if raw, ok := op.Metadata.(json.RawMessage); ok {
			op.Metadata = raw[:min(len(raw), 1<<16)]
		}
	})},
	{"floats numbers", "numbers", "all their digits", showing(func(op *task.Operation) {
		var v any
		if raw, ok := op.Metadata.(json.RawMessage); ok && json.Unmarshal(raw, &v) == nil {
			op.Metadata = v
		}
	})},
	{"keeps times to the second", "times", "microsecond", storing(func(op *task.Operation) { op.UpdatedAt = op.UpdatedAt.Truncate(time.Second) })},
	{"shows local times", "times", "UTC", showing(func(op *task.Operation) { op.CreatedAt = op.CreatedAt.In(time.FixedZone("", 3600)) })},
	{"forgets", "reopen", "closed and opened again", func(string) (task.Persistence, error) { return newMapStore(), nil }},
	{"does not expect concurrent calls", "concurrent", "any number of goroutines", wrong{
		save: func(s *mapStore, op *task.Operation) error {
			if !s.busy.TryLock() {
				return errors.New("busy")
			}
			defer s.busy.Unlock()
			others()
			return s.Save(op)
		},
	}.open()},
	{"looks before it writes", "one-winner", "exactly one succeeds", updating(func(s *mapStore, op *task.Operation) error {
		row, err := s.Get(op.ID)
		if err != nil || row.State.Finished() {
			return task.ErrNotFound
		}
		others()
		s.mu.Lock()
		defer s.mu.Unlock()
		op.Name, op.CreatedAt = row.Name, row.CreatedAt
		s.put(*op)
		return nil
	})},
	{"rejects finishing an interrupted operation", "manager", "left by a dead process", updating(func(s *mapStore, op *task.Operation) error {
		if s.left[op.ID] {
			return task.ErrNotFound
		}
		return s.Update(op)
	})},

	{"stops a batch at a bad member", "batch-bad-member", "fails alone", batching(func(s batchStore, saves, updates []*task.Operation) (errs []error) {
		for _, op := range saves {
			if err := s.Save(op); err != nil {
				return slices.Repeat([]error{err}, len(saves)+len(updates))
			}
		}
		return append(make([]error, len(saves)), s.WriteBatch(nil, updates)...)
	})},
	{"returns one error for a batch", "batch-bad-member", "returned 1 errors", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		if err := errors.Join(s.WriteBatch(saves, updates)...); err != nil {
			return []error{err}
		}
		return nil
	})},
	{"returns no errors for a batch", "batch-bad-member", "returned 0 errors", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		s.WriteBatch(saves, updates)
		return nil
	})},
	{"returns errors in another order", "batch-bad-member", "in the order of the operations", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		errs := s.WriteBatch(saves, updates)
		slices.Reverse(errs)
		return errs
	})},
	{"stores the last save first", "batch", "in their order", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		slices.Reverse(saves)
		errs := s.WriteBatch(saves, updates)
		slices.Reverse(errs[:len(saves)])
		return errs
	})},
	{"updates before it saves", "batch-same", "saved and updated", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		late := s.WriteBatch(nil, updates)
		return append(s.WriteBatch(saves, nil), late...)
	})},
	{"returns an error for an empty batch", "batch-empty", "returned 1 errors", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		if len(saves)+len(updates) == 0 {
			return []error{errors.New("empty batch")}
		}
		return s.WriteBatch(saves, updates)
	})},
	{"does not expect concurrent batches", "batch-concurrent", "any number of goroutines", batching(func(s batchStore, saves, updates []*task.Operation) []error {
		if !s.busy.TryLock() {
			return slices.Repeat([]error{errors.New("busy")}, len(saves)+len(updates))
		}
		defer s.busy.Unlock()
		others()
		return s.WriteBatch(saves, updates)
	})},

	{"recovers the finished", "recover", "nothing that is finished", recovering(func(op *task.Operation, left bool) bool { return left })},
	{"recovers the living", "recover-living", "leaves alone", recovering(func(op *task.Operation, left bool) bool { return !op.State.Finished() })},
	{"recovers only the running", "recover", "PENDING", recovering(func(op *task.Operation, left bool) bool {
		return left && op.State == task.StateRunning
	})},
	{"asks for the cancelled", "recover-resume", "is not to be resumed", asking(
		func(resume func(*task.Operation) bool, _ *mapStore, op *task.Operation) bool { return resume(op) })},
	{"never asks", "recover-resume", "asked resume for 0", asking(
		func(func(*task.Operation) bool, *mapStore, *task.Operation) bool { return false })},
	{"asks twice", "recover-resume", "called twice", asking(
		func(resume func(*task.Operation) bool, _ *mapStore, op *task.Operation) bool {
			other := *op
			return !op.Cancelling && resume(&other) && resume(op)
		})},
	{"asks with its own row", "recover-resume", "changed by resume", asking(
		func(resume func(*task.Operation) bool, s *mapStore, op *task.Operation) bool {
			return !op.Cancelling && resume(s.rows[op.ID])
		})},
	{"takes over what has finished", "recover-race", "another Recover was first", asking(
		func(resume func(*task.Operation) bool, s *mapStore, op *task.Operation) bool {
			before := *op
			defer func() { s.left[op.ID], s.rows[op.ID] = true, &before }()
			return resume(op)
		})},
	{"recovers one at a time", "recover-race", "no lock is held", asking(
		func(resume func(*task.Operation) bool, s *mapStore, op *task.Operation) bool {
			for !s.busy.TryLock() {
				time.Sleep(time.Second)
			}
			defer s.busy.Unlock()
			return resume(op)
		})},
	{"takes over as it was", "recover-resume", "Progress", taking(func(op *task.Operation, owner string) {
		op.State, op.Owner, op.Message, op.StartedAt = task.StatePending, owner, "", time.Time{}
	})},
	{"takes over RUNNING", "recover-resume", "State", taking(func(op *task.Operation, owner string) {
		take(op, owner)
		op.State = task.StateRunning
	})},
	{"takes over without owner", "recover-resume", "Owner", taking(func(op *task.Operation, _ string) { take(op, "") })},
	{"yields what it does not store", "recover-break", "What Recover yields is stored", once(func() recoverStore {
		return recoverStore{newMapStore(), isOrphan, func(*mapStore, task.Operation) {}, nil, take}
	})},
}...)

// A valuelessLister also omits short values.
type valuelessLister struct{ *task.MemoryStore }

func (s *valuelessLister) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	ops, err := s.MemoryStore.ListFiltered(f, limit, offset)
	for _, op := range ops {
		if f.MaxValue > 0 {
			op.Metadata = task.Omitted(f.MaxValue + 1)
		}
	}
	return ops, err
}

// A forgetfulLister ignores Before.
type forgetfulLister struct{ *task.MemoryStore }

func (s *forgetfulLister) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	f.Before = ""
	return s.MemoryStore.ListFiltered(f, limit, offset)
}

// A strictLister requires the operation Before to exist.
type strictLister struct{ *task.MemoryStore }

func (s *strictLister) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	if f.Before != "" {
		if _, err := s.Get(f.Before); err != nil {
			return nil, err
		}
	}
	return s.MemoryStore.ListFiltered(f, limit, offset)
}

// A filteringStore changes the filter.
type filteringStore struct {
	*task.MemoryStore
	change func(*task.Filter)
}

func wrongFilter(change func(*task.Filter)) openFunc {
	return once(func() *filteringStore { return &filteringStore{task.NewMemoryStore(), change} })
}

func (s *filteringStore) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	s.change(&f)
	return s.MemoryStore.ListFiltered(f, limit, offset)
}

// A lenientLister starts over when Before is unknown.
type lenientLister struct{ *task.MemoryStore }

func (s *lenientLister) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	ops, err := s.MemoryStore.ListFiltered(f, limit, offset)
	if f.ByFinish && errors.Is(err, task.ErrNotFound) {
		f.Before = ""
		return s.MemoryStore.ListFiltered(f, limit, offset)
	}
	return ops, err
}

// An eagerPruner also deletes unfinished operations.
type eagerPruner struct{ *mapStore }

func (s *eagerPruner) Prune(before time.Time) iter.Seq2[int, error] {
	return func(yield func(int, error) bool) {
		s.mu.Lock()
		n := 0
		s.order = slices.DeleteFunc(s.order, func(id string) bool {
			old := !s.rows[id].UpdatedAt.IsZero() && s.rows[id].UpdatedAt.Before(before)
			if old {
				delete(s.rows, id)
				n++
			}
			return old
		})
		s.mu.Unlock()
		yield(n, nil)
	}
}
