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
// All methods may be called from any number of goroutines at once. Each should
// return within some seconds, with an error if it can't do its work.
//
// What the manager passes belongs to the store from then on. Its Metadata and
// Result are nil or a [json.RawMessage]. What the store returns belongs to the
// caller: no later call may change it, and none of it is nil. Its Metadata and
// Result may be anything that encodes to the same JSON. Neither side modifies
// the bytes of a json.RawMessage. Limits and offsets are never negative.
//
// An error that wraps [sql.ErrNoRows] means the same as one that wraps
// [ErrNotFound].
//
// A store may have further abilities, which the manager uses if they are there:
// see [BatchWriter], [Recoverer], [FilteredLister], [Pruner], [Canceller] and
// [Notifier]. If a method of theirs returns an error that wraps [errors.ErrUnsupported], as that of a
// wrapper may whose inner store lacks the ability, the store counts as one
// without it.
type Persistence interface {
	// Save stores a new operation. On return it is durable, as far as the
	// store promises that. If there is an operation with the same ID already,
	// Save leaves that as it is and returns an error. That wraps [ErrExists] if
	// the store can tell; after any other error the manager looks with Get,
	// where it matters. No other error wraps ErrExists.
	Save(op *Operation) error

	// Update stores the present state of an operation that is stored and not
	// finished: everything but its ID, Name, CreatedAt and Owner, and but a
	// Cancelling that is true already. If it is not stored, or is DONE, FAILED or
	// CANCELLED already, Update changes nothing and returns an error that wraps
	// [ErrNotFound]. On any other error the operation should be as it was; the
	// manager tries again.
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

// usable returns db, or a new memory store if db is nil. Instead of the nil
// *SQLiteStore of a failed open, it returns one whose methods fail, and the
// error.
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

// notFound makes an error that wraps sql.ErrNoRows also wrap ErrNotFound.
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
	if b, ok := db.(BatchWriter); ok {
		errs := b.WriteBatch(saves, updates)
		switch {
		case len(errs) == 0:
			return make([]error, n)
		case len(errs) != n:
			err := fmt.Errorf("%T.WriteBatch returned %d errors for %d operations", db, len(errs), n)
			return slices.Repeat([]error{err}, n)
		case !slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, errors.ErrUnsupported) }):
			// One by one.
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

// history yields all operations of a store, the newest first, by way of its
// List.
func history(db Persistence) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		const limit = 1000
		before := make(map[string]bool) // the IDs on the page before
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
				// What was saved between two pages has moved some of the first to the second.
				if !before[op.ID] && !yield(op, nil) {
					return
				}
			}
			if maps.Equal(ids, before) { // this would go on for ever
				yield(nil, fmt.Errorf("%T.List(%d, %d) returned the page before it", db, limit, offset-len(page)))
				return
			}
			before = ids
		}
	}
}

// A Recoverer is a [Persistence] that knows which process runs an operation,
// so that several managers can share it.
//
// A store that others may take for dead while it lives, because it can't be
// reached, has a method Owner() string. Once it notices, it goes on with a new
// Owner: each write of an operation with the earlier one fails with an error that
// wraps [ErrLost], and Changes ends with such an error. The manager then gives up
// those operations: the contexts of their functions are cancelled, those that have
// not started never do, and what the store has of them counts from then on.
//
// A store that notices by itself that a process has ended may have a method
// Deaths() <-chan struct{}. Its channel holds a token when there is something to
// recover, and again for as long as there is: the managers on the store then call
// Recover. Without it, only those do that start, or that wait for or watch
// operations of others.
type Recoverer interface {
	Persistence

	// Recover finishes every PENDING or RUNNING operation whose process has
	// ended: its State becomes FAILED and its Error reason. It yields each once
	// that is stored, and ends with a nil operation and an error if it can't go
	// on. It leaves alone what a manager on this store, or on another that is
	// alive, runs. If the caller stops early, more may be finished than was
	// yielded.
	//
	// If resume is not nil, Recover calls it with each such operation of which
	// nobody has asked for the cancellation, outside of any transaction and
	// holding no lock. The operation is a copy, in which resume sets Owner to who
	// wants to run it. If resume returns true, Recover takes the operation over
	// instead of finishing it, in one step, and yields it: Owner as set (or what
	// the store itself calls its owner), State PENDING, no Progress, Message and
	// StartedAt, a new UpdatedAt, the rest as it was. It yields nothing if it then
	// finds that another Recover was first, and finishes the operation if its
	// cancellation has been asked for meanwhile.
	//
	// An operation together with an error means that Recover can't tell whether
	// its process is alive, and has left it, and all others of that process,
	// alone. The error says why, and what to do. It is yielded once for each
	// such process, and not again by the next Recover of the same store.
	Recover(reason string, resume func(op *Operation) bool) iter.Seq2[*Operation, error]
}

// recovered returns what becomes of an orphan: FAILED for that reason, or, if
// resumed, PENDING.
func (op Operation) recovered(reason string, resumed bool) *Operation {
	op.UpdatedAt = latest(wall(), op.UpdatedAt, op.StartedAt, op.CreatedAt)
	if resumed {
		op.State, op.Progress, op.Message, op.StartedAt = StatePending, 0, "", time.Time{}
	} else {
		op.State, op.Error, op.Cancelling = StateFailed, reason, false
	}
	return &op
}

// resumes asks resume, if there is one, whether to take over an orphan, and
// returns the owner that it then gets.
func resumes(resume func(op *Operation) bool, orphan *Operation) (owner string, ok bool) {
	if resume == nil || orphan.Cancelling {
		return "", false
	}
	op := *orphan
	ok = resume(&op)
	return op.Owner, ok
}

// recoverOrphans uses the store's Recover if it has one. A store without it is
// taken to have one manager: whatever is unfinished in its whole history and
// not live in there is an orphan. If live is nil, it recovers nothing there.
// Update takes over what is to be resumed there; its Owner stays.
func recoverOrphans(db Persistence, reason string, resume func(op *Operation) bool, live func(id string) bool) iter.Seq2[*Operation, error] {
	return func(yield func(*Operation, error) bool) {
		r, able := db.(Recoverer)
		if able {
			for op, err := range r.Recover(reason, resume) {
				// An error of the operating system may say the same, of something else.
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

// updateOrphan recovers an operation that was not live a moment ago. It returns
// nil if the operation has finished or has been deleted before that.
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
	stored := *op // which belongs to the store from then on
	if err := notFound(db.Update(&stored)); errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	return op, nil
}

// A Filter says which operations a list is of.
type Filter struct {
	States []State // in one of these states; of none for all
	Name   string  // with exactly this name; "" for all
	Before string  // behind the operation with this ID in the list; "" for all

	Containing string            // with this text in the name, ASCII letters in either case; "" for all
	Metadata   map[string]string // with a JSON object as metadata that has these strings as members; nil for all

	// Finished at FinishedAfter or later, and before FinishedBefore, zero for any
	// time. If one of them is not zero, what is not finished, or has no UpdatedAt,
	// is left out.
	FinishedAfter, FinishedBefore time.Time

	// Finished, and listed by UpdatedAt, the latest first; those with the same in
	// the order of List.
	ByFinish bool

	// Context is the caller's, or nil. Once it is done, the result is not needed: a
	// store that would go on for long should return its error.
	Context context.Context

	// With States or Metadata: the IDs, sorted, of operations whose state or metadata
	// is not yet stored. If they are stored as unfinished, those in Include count as
	// being in one of the states and having the metadata, and those in Exclude do not.
	Include, Exclude []string

	// If not 0: in place of metadata and results of more bytes than that there
	// may be an [Omitted], so that the store does not read them.
	MaxValue int

	// The Result of all operations is nil, so that the store does not read it.
	WithoutResults bool
}

// ended returns the error of the filter's context.
func (f Filter) ended() error {
	if f.Context == nil {
		return nil
	}
	return f.Context.Err()
}

// matches reports whether a stored operation is one that the filter is for,
// Before left aside.
func (f Filter) matches(op *Operation) bool {
	return (f.Name == "" || op.Name == f.Name) &&
		(f.Containing == "" || strings.Contains(lowerASCII(op.Name), lowerASCII(f.Containing))) &&
		(!f.ByFinish && !f.ranged() || op.State.Finished()) &&
		f.inRange(op.UpdatedAt) && f.matchesNow(op)
}

// lowerASCII folds letters as SQLite does.
func lowerASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, s)
}

// ranged reports whether the filter is for a range of time.
func (f Filter) ranged() bool { return !f.FinishedAfter.IsZero() || !f.FinishedBefore.IsZero() }

func (f Filter) inRange(t time.Time) bool {
	return !f.ranged() || !t.IsZero() && !t.Before(f.FinishedAfter) && (f.FinishedBefore.IsZero() || t.Before(f.FinishedBefore))
}

// matchesNow reports whether an operation matches in what may change while it is
// live: its state and its metadata.
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

// inMetadata reports whether metadata has all the strings. What was left out has
// been compared by the store.
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

// A FilteredLister is a [Persistence] that can find operations by more than
// their place in the history.
type FilteredLister interface {
	Persistence

	// ListFiltered does what List does with those operations that the filter
	// is for. If there is no operation with the ID Before, and that is a UUIDv7,
	// as Submit makes them, the page begins where it would be: their order is
	// that of their times. For any other ID, ListFiltered then returns an error
	// that wraps [ErrNotFound]. With ByFinish it does so for the ID of any operation
	// that is not stored as finished.
	ListFiltered(f Filter, limit, offset int) ([]*Operation, error)
}

// isTimed reports whether an ID is a UUIDv7, of which later ones are greater.
func isTimed(id string) bool {
	u, err := uuid.Parse(id)
	return err == nil && u.Version() == 7 && u.String() == id
}

// neighbour returns the ID before which a list goes on, "" for the start, if it was
// to go on before a timed ID that is not there. That is the next greater ID, or
// what is before the first smaller one if that comes earlier: where the clock was
// set back, rather something twice than something left out.
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

// listFiltered uses the store's ListFiltered if it has one, its List if there is
// nothing to filter, and else looks at the whole history.
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

// page returns a part of the operations that the filter is for. It keeps little
// more than offset and limit ask for.
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
	case passed || f.ByFinish: // also if start was deleted meanwhile
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

// sorted sorts operations in the order of List by finish, if the filter says so.
func (f Filter) sorted(ops []*Operation) []*Operation {
	if f.ByFinish {
		slices.SortStableFunc(ops, func(a, b *Operation) int { return b.UpdatedAt.Compare(a.UpdatedAt) })
	}
	return ops
}

// start returns the finished operation Before with ByFinish, or nil for the start
// of the list and for the order of List.
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

	// Prune deletes the operations that have finished before that time. It does
	// so in steps that do not delay other calls for long, and yields how many
	// operations each has deleted. What is not finished, or has no UpdatedAt,
	// stays.
	Prune(before time.Time) iter.Seq2[int, error]
}

// prune uses the store's Prune. There is no way without it.
func prune(db Persistence, before time.Time) iter.Seq2[int, error] {
	if p, ok := db.(Pruner); ok {
		return p.Prune(before)
	}
	return func(yield func(int, error) bool) {
		yield(0, fmt.Errorf("%T has no Prune: %w", db, errors.ErrUnsupported))
	}
}

// A Canceller is a [Persistence] that passes cancel requests to the managers that
// run the operations.
type Canceller interface {
	Persistence

	// RequestCancel stores a request to cancel the operation with that ID, with a
	// text that says who asks and why, or "". The operation is Cancelling from
	// then on, and keeps its other fields. Only the first request counts, or the
	// first Update to Cancelling: later ones change nothing. If there is no such
	// operation, or it has finished, RequestCancel returns an error that wraps
	// [ErrNotFound].
	RequestCancel(id, text string) error

	// CancelRequests returns the texts of the requests, by the ID of the
	// operation, for the unfinished operations that this store has saved. It may
	// include others that are Cancelling. It is called often, and should not read
	// the operations that have none.
	CancelRequests() (map[string]string, error)
}

// requestCancel uses the store's RequestCancel. There is no way without it: then
// the error wraps [errors.ErrUnsupported] if the operation is not finished.
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

// cancelRequests uses the store's CancelRequests. Without it nobody can have asked.
func cancelRequests(db Persistence) (map[string]string, error) {
	if c, ok := db.(Canceller); ok {
		if requests, err := c.CancelRequests(); !errors.Is(err, errors.ErrUnsupported) {
			return requests, err
		}
	}
	return nil, nil
}

// A Notifier is a [Persistence] that notices when its data may have changed.
type Notifier interface {
	Persistence

	// Changes yields nil at once, and then whenever another store, or this one,
	// may have changed something since it yielded last: no later than about 100
	// milliseconds after the change is committed, and at most every 100
	// milliseconds. It ends when ctx is done, or with an error when it can't go
	// on.
	Changes(ctx context.Context) iter.Seq[error]
}

// pollInterval is how long a change by another manager may go unnoticed.
const pollInterval = 100 * time.Millisecond

// hints uses the store's Changes if it has one, and else takes the data to change
// all the time.
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
