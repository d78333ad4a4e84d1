package task

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
)

// A Persistence stores operations for a [Manager].
//
// All methods may be called from any number of goroutines at once. Each should return
// within a few seconds, with an error if it fails.
//
// Operations that the manager passes belong to the store from then on. Their Metadata
// and Result are nil or a [json.RawMessage]. Operations that the store returns belong to
// the caller: they are not nil, and no later call may change them. Their Metadata and
// Result may be any values that encode to the same JSON. Neither side modifies the bytes
// of a json.RawMessage. Limits and offsets are never negative.
//
// An error that wraps [sql.ErrNoRows] means the same as one that wraps [ErrNotFound].
//
// A store may have further abilities, which the manager uses if they are present: see
// [BatchWriter], [Recoverer], [FilteredLister], [Pruner], [Canceller] and [Notifier]. If
// one of their methods returns an error that wraps [errors.ErrUnsupported], the store
// counts as one without that ability: a wrapper returns it if the store inside lacks the
// ability.
type Persistence interface {
	// Save stores a new operation. On return the operation is durable, as far as the
	// store promises that. If the ID exists already, Save leaves the existing operation
	// as it is and returns an error. The error wraps [ErrExists] if the store can tell;
	// after any other error the manager calls Get where it matters. No other error wraps
	// ErrExists.
	Save(op *Operation) error

	// Update stores the present state of an operation that is stored and unfinished. It
	// does not change ID, Name, CreatedAt and Owner, and does not reset Cancelling. If
	// the operation is not stored, or is DONE, FAILED or CANCELLED already, Update
	// changes nothing and returns an error that wraps [ErrNotFound]. After any other
	// error the stored operation should be unchanged; the manager retries.
	Update(op *Operation) error

	// List returns at most limit operations in order of Save, newest first, after
	// skipping offset of them. It returns fewer only at the end of the history. Updates
	// do not change the order, and no two operations share a place in it.
	List(limit, offset int) ([]*Operation, error)

	// Get returns the operation with that ID. If there is none, it returns an error that
	// wraps [ErrNotFound].
	Get(id string) (*Operation, error)
}

// usable returns db, or a new memory store if db is nil. For the nil *SQLiteStore of a
// failed open it returns an error, and a store whose methods return that error.
func usable(db Persistence) (Persistence, error) {
	if db == nil {
		return NewMemoryStore(), nil
	}
	if s, ok := db.(*SQLiteStore); ok && s == nil {
		err := errors.New("the store is nil: look at the error of OpenSQLite or NewSQLiteStore")
		return noStore{err}, err
	}
	return db, nil
}

type noStore struct{ err error }

func (s noStore) Save(*Operation) error               { return s.err }
func (s noStore) Update(*Operation) error             { return s.err }
func (s noStore) List(int, int) ([]*Operation, error) { return nil, s.err }
func (s noStore) Get(string) (*Operation, error)      { return nil, s.err }

// notFound makes an error that wraps sql.ErrNoRows wrap ErrNotFound, too.
func notFound(err error) error {
	if errors.Is(err, sql.ErrNoRows) && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// get uses the store's Get.
func get(db Persistence, id string) (*Operation, error) {
	op, err := db.Get(id)
	if err == nil && op == nil {
		err = ErrNotFound
	}
	return op, notFound(err)
}

// A BatchWriter is a [Persistence] that can store many operations at the cost of one.
type BatchWriter interface {
	Persistence

	// WriteBatch does what Save does for each of saves, and then what Update does for
	// each of updates, in that order. It returns one error per operation in the same
	// order, nil for success, or no errors at all if all succeeded. An operation that
	// can't be stored must not keep the others from being stored. On return they are
	// durable. At most two updates are for the same operation: one that does not finish
	// it, followed by one that does.
	WriteBatch(saves, updates []*Operation) []error
}

// writeBatch uses the store's WriteBatch if it has one, and otherwise Save and Update
// for each operation.
func writeBatch(db Persistence, saves, updates []*Operation) []error {
	n := len(saves) + len(updates)
	if b, ok := db.(BatchWriter); ok {
		errs := b.WriteBatch(saves, updates)
		switch {
		case len(errs) == 0:
			return make([]error, n)
		case len(errs) != n:
			err := fmt.Errorf("%T.WriteBatch returned %d errors for %d operations", db, len(errs), n)
			return slices.Repeat([]error{err}, n)
		case !slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, errors.ErrUnsupported) }):
			// Store the operations one by one.
		default:
			for i, err := range errs {
				errs[i] = notFound(err)
			}
			return errs
		}
	}
	errs := make([]error, 0, n)
	for _, op := range saves {
		errs = append(errs, db.Save(op))
	}
	for _, op := range updates {
		errs = append(errs, notFound(db.Update(op)))
	}
	return errs
}

// history yields all operations of a store, newest first, from its List.
func history(db Persistence) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		const limit = 1000
		before := make(map[string]bool) // the IDs on the previous page
		for offset := 0; ; {
			page, err := db.List(limit, offset)
			if err != nil {
				yield(nil, err)
				return
			}
			if len(page) == 0 { // a short page may be the store's own limit
				return
			}
			offset += len(page)
			ids := make(map[string]bool, len(page))
			for _, op := range page {
				if op == nil {
					continue
				}
				ids[op.ID] = true
				// An operation saved between two calls moves one from the first page to the second.
				if !before[op.ID] && !yield(op, nil) {
					return
				}
			}
			if maps.Equal(ids, before) { // this would never end
				yield(nil, fmt.Errorf("%T.List(%d, %d) returned the page before it", db, limit, offset-len(page)))
				return
			}
			before = ids
		}
	}
}

// A Recoverer is a [Persistence] that knows which process runs an operation, so that
// several managers can share it.
//
// A store that others may take for dead while it is alive but out of reach has a method
// Owner() string. When it notices that, it continues with a new Owner: writes of
// operations with the earlier one fail with an error that wraps [ErrLost], and Changes
// ends with such an error. The manager then gives up those operations: it cancels the
// contexts of their functions, never starts those that wait, and from then on the
// stored state of these operations counts.
//
// A store that detects deaths of processes by itself may have a method
// Deaths() <-chan struct{}. Its channel holds a token whenever there is something to
// recover, and managers on the store then call Recover. Without Deaths, only managers
// that start, or that wait for or watch operations of others, call it.
type Recoverer interface {
	Persistence

	// Recover finishes every PENDING or RUNNING operation whose process has ended: its
	// State becomes FAILED, and its Error reason. It yields each operation after storing
	// that, and ends with a nil operation and an error if it can't continue. It leaves
	// the operations of managers on this store, and on other live ones, alone. If the
	// caller stops early, more operations may be finished than were yielded.
	//
	// If resume is not nil, Recover calls it for each such operation without a cancel
	// request, outside of any transaction and holding no lock, with a copy in which
	// resume sets Owner to the new owner. If resume returns true, Recover takes the
	// operation over in one atomic step, instead of finishing it, and yields it: with
	// Owner as set (or the store's own), State PENDING, no Progress, Message and
	// StartedAt, a new UpdatedAt, and everything else unchanged. If another Recover came
	// first, it yields nothing; if there is a cancel request by then, it finishes the
	// operation.
	//
	// An operation together with an error means that Recover can't tell whether its
	// process is alive, and has left all operations of that process alone. The error
	// says why, and what to do. Recover yields it once per process, and not again in
	// later calls on the same store.
	Recover(reason string, resume func(op *Operation) bool) iter.Seq2[*Operation, error]
}

// recovered returns the new state of an orphan: FAILED for that reason, or PENDING if it
// is resumed.
func (op Operation) recovered(reason string, resumed bool) *Operation {
	op.UpdatedAt = latest(wall(), op.UpdatedAt, op.StartedAt, op.CreatedAt)
	if resumed {
		op.State, op.Progress, op.Message, op.StartedAt = StatePending, 0, "", time.Time{}
	} else {
		op.State, op.Error, op.Cancelling = StateFailed, reason, false
	}
	return &op
}

// resumes asks resume, if it is not nil, whether to take over an orphan, and returns the
// new owner.
func resumes(resume func(op *Operation) bool, orphan *Operation) (owner string, ok bool) {
	if resume == nil || orphan.Cancelling {
		return "", false
	}
	op := *orphan
	ok = resume(&op)
	return op.Owner, ok
}

// recoverOrphans uses the store's Recover if it has one. A store without it is assumed
// to have one manager: every unfinished operation in its history that is not live is an
// orphan, and an Update that keeps the Owner takes over those to be resumed. If live is
// nil, nothing is recovered in such a store.
func recoverOrphans(db Persistence, reason string, resume func(op *Operation) bool, live func(id string) bool) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		r, able := db.(Recoverer)
		if able {
			for op, err := range r.Recover(reason, resume) {
				// An error of the operating system may be ErrUnsupported for another reason.
				able = op != nil || !errors.Is(err, errors.ErrUnsupported) || errors.As(err, new(syscall.Errno))
				if !able {
					break
				}
				if !yield(op, err) {
					return
				}
			}
		}
		if able || live == nil {
			return
		}
		for op, err := range history(db) {
			if err == nil {
				if !op.State.live() || live(op.ID) {
					continue
				}
				_, resumed := resumes(resume, op)
				op, err = updateOrphan(db, op.ID, reason, resumed)
			}
			if (op != nil || err != nil) && (!yield(op, err) || err != nil) {
				return
			}
		}
	}
}

// updateOrphan recovers an operation with Update. It returns nil if the operation has
// been finished or deleted meanwhile.
func updateOrphan(db Persistence, id, reason string, resumed bool) (*Operation, error) {
	op, err := get(db, id)
	if errors.Is(err, ErrNotFound) || err == nil && !op.State.live() {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	op = op.recovered(reason, resumed && !op.Cancelling)
	if err := op.encode(); err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	stored := *op // belongs to the store from then on
	if err := notFound(db.Update(&stored)); errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	return op, nil
}

// A Filter says which operations a list contains.
type Filter struct {
	States []State // in one of these states; empty for all
	Name   string  // with exactly this name; "" for all
	Before string  // after the operation with this ID in the list; "" for all

	Containing string            // with this text in the name, ASCII letters in either case; "" for all
	Metadata   map[string]string // with a JSON object as metadata that has these members; nil for all

	// Finished at FinishedAfter or later, and before FinishedBefore; zero for no bound.
	// If one of them is set, operations that are unfinished or have no UpdatedAt are
	// left out.
	FinishedAfter, FinishedBefore time.Time

	// Finished operations only, in order of UpdatedAt, latest first. Those with the same
	// UpdatedAt are in the order of List.
	ByFinish bool

	// Context is the caller's, or nil. Once it is done, nobody needs the result: a store
	// that would take long should return the context's error.
	Context context.Context

	// With States or Metadata: the IDs, sorted, of operations whose present state or
	// metadata is not stored yet. As long as they are stored as unfinished, those in
	// Include count as matching States and Metadata, and those in Exclude do not.
	Include, Exclude []string

	// If not 0, metadata and results of more bytes may be replaced by an [Omitted], so
	// that the store need not read them.
	MaxValue int

	// All Results are nil, so that the store need not read them.
	WithoutResults bool
}

// ended returns the error of the filter's context, if it has one.
func (f Filter) ended() error {
	if f.Context == nil {
		return nil
	}
	return f.Context.Err()
}

// matches reports whether a stored operation matches the filter, apart from Before.
func (f Filter) matches(op *Operation) bool {
	return (f.Name == "" || op.Name == f.Name) &&
		(f.Containing == "" || strings.Contains(lowerASCII(op.Name), lowerASCII(f.Containing))) &&
		(!f.ByFinish && !f.ranged() || op.State.Finished()) &&
		f.inRange(op.UpdatedAt) && f.matchesNow(op)
}

// lowerASCII folds letters as SQLite's lower does.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, s)
}

// ranged reports whether the filter has a range of time.
func (f Filter) ranged() bool { return !f.FinishedAfter.IsZero() || !f.FinishedBefore.IsZero() }

func (f Filter) inRange(t time.Time) bool {
	return !f.ranged() || !t.IsZero() && !t.Before(f.FinishedAfter) && (f.FinishedBefore.IsZero() || t.Before(f.FinishedBefore))
}

// matchesNow reports whether an operation matches in state and metadata, which may change
// while it is live.
func (f Filter) matchesNow(op *Operation) bool {
	if len(f.States)+len(f.Metadata) > 0 && op.State.live() {
		if _, ok := slices.BinarySearch(f.Include, op.ID); ok {
			return true
		}
		if _, ok := slices.BinarySearch(f.Exclude, op.ID); ok {
			return false
		}
	}
	return (len(f.States) == 0 || slices.Contains(f.States, op.State)) && f.inMetadata(op.Metadata)
}

// inMetadata reports whether metadata has all members of the filter. Omitted metadata
// matches: the store has compared it.
func (f Filter) inMetadata(metadata any) bool {
	if _, ok := metadata.(Omitted); ok || len(f.Metadata) == 0 {
		return true
	}
	members, _ := decode(rawJSON(metadata)).(map[string]any)
	for key, value := range f.Metadata {
		if members[key] != any(value) {
			return false
		}
	}
	return true
}

// A FilteredLister is a [Persistence] that can find operations by more than their place
// in the history.
type FilteredLister interface {
	Persistence

	// ListFiltered is List for the operations that match the filter. If there is no
	// operation with the ID Before and the ID is a UUIDv7, as Submit makes them, the page
	// begins where that operation would be: UUIDv7s are in order of time. For any other
	// unknown ID, ListFiltered returns an error that wraps [ErrNotFound]; with ByFinish,
	// for the ID of any operation that is not stored as finished.
	ListFiltered(f Filter, limit, offset int) ([]*Operation, error)
}

// isTimed reports whether an ID is a UUIDv7: later ones are greater.
func isTimed(id string) bool {
	u, err := uuid.Parse(id)
	return err == nil && u.Version() == 7 && u.String() == id
}

// neighbour finds where a list continues if its Before is an unknown timed ID: before
// the returned ID, or at the start if that is "". The ID is the next greater one, or
// the one just before the first smaller one, whichever comes first: if the clock was
// set back, a list may repeat operations but leaves none out.
func neighbour(newestFirst iter.Seq2[*Operation, error], id string) (before string, err error) {
	var last, greater, beforeSmaller string
	var smaller, late bool
	for op, err := range newestFirst {
		switch {
		case err != nil:
			return "", err
		case !isTimed(op.ID):
		case op.ID < id:
			if !smaller {
				smaller, beforeSmaller = true, last
			}
		case greater == "" || op.ID < greater:
			greater, late = op.ID, smaller
		}
		last = op.ID
	}
	if late {
		return beforeSmaller, nil
	}
	return greater, nil
}

// listFiltered uses the store's ListFiltered if it has one, its List if there is nothing
// to filter, and otherwise searches the whole history.
func listFiltered(db Persistence, f Filter, limit, offset int) ([]*Operation, error) {
	if err := f.ended(); err != nil {
		return nil, err
	}
	all := len(f.States)+len(f.Metadata) == 0 && f.Name+f.Containing+f.Before == "" && !f.ByFinish && !f.ranged()
	if l, ok := db.(FilteredLister); ok && (!all || f.Context != nil || f.MaxValue != 0 || f.WithoutResults) {
		ops, err := l.ListFiltered(f, limit, offset)
		if !errors.Is(err, errors.ErrUnsupported) {
			return ops, notFound(err)
		}
	}
	if all {
		return db.List(limit, offset)
	}
	return f.page(history(db), limit, offset)
}

// page returns at most limit matching operations after skipping offset of them. It
// keeps only a few more than both together in memory.
func (f Filter) page(newestFirst iter.Seq2[*Operation, error], limit, offset int) (ops []*Operation, err error) {
	start, err := f.start(newestFirst)
	if err != nil {
		return nil, err
	}
	last := limit + min(offset, math.MaxInt-limit)
	passed := f.Before == ""
	for op, err := range newestFirst {
		if err := cmp.Or(err, f.ended()); err != nil {
			return nil, err
		}
		behind := passed
		if f.ByFinish && start != nil {
			behind = op.UpdatedAt.Before(start.UpdatedAt) || passed && op.UpdatedAt.Equal(start.UpdatedAt)
		}
		passed = passed || op.ID == f.Before
		if behind && f.matches(op) {
			ops = append(ops, op)
		}
		if passed && len(ops) >= last && !f.ByFinish {
			break
		}
		if len(ops)-1000 > last {
			ops = f.sorted(ops)[:last]
		}
	}
	switch {
	case passed || f.ByFinish: // even if start was deleted meanwhile
	case !isTimed(f.Before):
		return nil, fmt.Errorf("%s: %w", f.Before, ErrNotFound)
	default:
		if f.Before, err = neighbour(newestFirst, f.Before); err != nil {
			return nil, err
		}
		return f.page(newestFirst, limit, offset)
	}
	ops = f.sorted(ops)
	return ops[min(offset, len(ops)):min(last, len(ops))], nil
}

// sorted sorts operations by finish if the filter says so.
func (f Filter) sorted(ops []*Operation) []*Operation {
	if f.ByFinish {
		slices.SortStableFunc(ops, func(a, b *Operation) int { return b.UpdatedAt.Compare(a.UpdatedAt) })
	}
	return ops
}

// start returns the finished operation f.Before of a list ByFinish. It returns nil for
// any other list, and if Before is empty.
func (f Filter) start(newestFirst iter.Seq2[*Operation, error]) (*Operation, error) {
	if !f.ByFinish || f.Before == "" {
		return nil, nil
	}
	for op, err := range newestFirst {
		if err := cmp.Or(err, f.ended()); err != nil {
			return nil, err
		}
		if op.ID == f.Before && op.State.Finished() {
			return op, nil
		}
	}
	return nil, fmt.Errorf("%s, finished: %w", f.Before, ErrNotFound)
}

// A Pruner is a [Persistence] that can delete operations.
type Pruner interface {
	Persistence

	// Prune deletes the operations that finished before that time, in steps that do not
	// delay other calls for long, and yields how many operations each step has deleted.
	// Operations that are unfinished or have no UpdatedAt stay.
	Prune(before time.Time) iter.Seq2[int, error]
}

// prune uses the store's Prune. There is no fallback.
func prune(db Persistence, before time.Time) iter.Seq2[int, error] {
	if p, ok := db.(Pruner); ok {
		return p.Prune(before)
	}
	return func(yield func(int, error) bool) {
		yield(0, fmt.Errorf("%T has no Prune: %w", db, errors.ErrUnsupported))
	}
}

// A Canceller is a [Persistence] that passes cancel requests to the managers of the
// operations.
type Canceller interface {
	Persistence

	// RequestCancel stores a request to cancel the operation with that ID, with a text
	// that says who asks and why, or "". The operation is Cancelling from then on; its
	// other fields do not change. Only the first request, or the first Update to
	// Cancelling, counts. If there is no such operation or it has finished,
	// RequestCancel returns an error that wraps [ErrNotFound].
	RequestCancel(id, text string) error

	// CancelRequests returns the texts of the cancel requests for the unfinished
	// operations that this store has saved, by ID. It may include other operations that
	// are Cancelling. It is called often, and should not read operations without a
	// request.
	CancelRequests() (map[string]string, error)
}

// requestCancel uses the store's RequestCancel. There is no fallback: without it, the
// error for an unfinished operation wraps [errors.ErrUnsupported].
func requestCancel(db Persistence, id, text string) error {
	if c, ok := db.(Canceller); ok {
		if err := notFound(c.RequestCancel(id, text)); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	op, err := get(db, id)
	switch {
	case err != nil:
		return err
	case !op.State.live():
		return fmt.Errorf("already %s: %w", op.State, ErrNotFound)
	}
	return fmt.Errorf("another manager runs it, and %T has no RequestCancel: %w", db, errors.ErrUnsupported)
}

// cancelRequests uses the store's CancelRequests. Without it there are no requests.
func cancelRequests(db Persistence) (map[string]string, error) {
	if c, ok := db.(Canceller); ok {
		if requests, err := c.CancelRequests(); !errors.Is(err, errors.ErrUnsupported) {
			return requests, err
		}
	}
	return nil, nil
}

// A Notifier is a [Persistence] that reports when its data may have changed.
type Notifier interface {
	Persistence

	// Changes yields nil at once, and then whenever this store or another one may have
	// changed something since it last yielded: at most about 100 milliseconds after the
	// commit, and at most once every 100 milliseconds. It ends when ctx is done, or with
	// an error if it can't continue.
	Changes(ctx context.Context) iter.Seq[error]
}

// pollInterval is how long another manager's change may go unnoticed.
const pollInterval = 100 * time.Millisecond

// hints uses the store's Changes if it has one, and otherwise yields nil every
// pollInterval.
func hints(ctx context.Context, db Persistence) iter.Seq[error] {
	return func(yield func(error) bool) {
		n, able := db.(Notifier)
		if able {
			for err := range n.Changes(ctx) {
				if able = !errors.Is(err, errors.ErrUnsupported); !able {
					break
				}
				if !yield(err) {
					return
				}
			}
		}
		for more := !able; more && yield(nil); {
			more = sleep(ctx, pollInterval)
		}
	}
}
