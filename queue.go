package task

import (
	"cmp"
	"container/heap"
	"errors"
	"fmt"
	"slices"
)

// WithLimit makes the manager run at most n functions at once. The operations
// beyond that are PENDING, without a goroutine of their own, and start in the
// order of their submission. A limit of 0 or less is none, as is the default.
func WithLimit(n int) Option {
	return func(m *Manager) { m.queue.limit = max(n, 0) }
}

// WithLock makes the operation wait, PENDING, for all operations that were
// submitted before it to the same manager with the same key: of one key, one
// runs at a time, in the order of submission. It holds back no other: with
// [WithLimit], a place that gets free goes to the oldest operation whose key
// is free. The key is free again when the function has returned.
//
// Submit returns an error if the key is empty or not the only one.
func WithLock(key string) SubmitOption {
	return func(t *task) error {
		switch {
		case key == "":
			return errors.New("the lock's key is empty")
		case t.key != "":
			return fmt.Errorf("two locks, %.64q and %.64q", t.key, key)
		}
		t.key = key
		return nil
	}
}

// A queue decides which operation starts when. Its methods are called with
// Manager.mu held, and none takes longer than the logarithm of its length.
type queue struct {
	limit   int    // how many may run; 0 for any number
	running int    // counted only if somebody may wait: see Manager.release
	last    uint64 // the place of the task that came last
	ready   line   // those that wait for nothing but the limit

	// keys has an entry for each key that a running or ready task holds: the
	// line of those that wait for it.
	keys map[string]*line
}

// A turn is the place of a task in a queue.
type turn struct {
	key   string // immutable; "" for none
	place uint64 // by order of submission
	line  *line  // where it stands; nil before and after
	index int    // in line
}

// add puts t at the end of the queue.
func (q *queue) add(t *task) {
	q.last++
	t.place = q.last
	if t.key == "" {
		heap.Push(&q.ready, t)
		return
	}
	if behind, held := q.keys[t.key]; held {
		heap.Push(behind, t)
		return
	}
	if q.keys == nil {
		q.keys = make(map[string]*line)
	}
	q.keys[t.key] = new(line)
	heap.Push(&q.ready, t)
}

// next takes the task out of the queue that is to run now, or returns nil.
// Call done when it has run.
func (q *queue) next() *task {
	if len(q.ready) == 0 || q.limit > 0 && q.running >= q.limit {
		return nil
	}
	q.running++
	return heap.Pop(&q.ready).(*task)
}

// done gives back the place and the key of a task that has run.
func (q *queue) done(t *task) {
	q.running--
	q.free(t.key)
}

// remove takes t out of the queue, if it is in there.
func (q *queue) remove(t *task) {
	line := t.line
	if line == nil {
		return
	}
	heap.Remove(line, t.index)
	if line == &q.ready {
		q.free(t.key)
	}
}

// free makes the next task of that key ready.
func (q *queue) free(key string) {
	behind, held := q.keys[key]
	switch {
	case !held: // the task has no key
	case len(*behind) == 0:
		delete(q.keys, key)
	default:
		heap.Push(&q.ready, heap.Pop(behind))
	}
}

// clear takes all tasks out of the queue, by order of submission.
func (q *queue) clear() []*task {
	all := slices.Clone(q.ready)
	for _, behind := range q.keys {
		all = append(all, *behind...)
	}
	for _, t := range all {
		t.line = nil
	}
	q.ready, q.keys = nil, nil
	slices.SortFunc(all, func(a, b *task) int { return cmp.Compare(a.place, b.place) })
	return all
}

// A line is a heap of tasks by place.
type line []*task

func (l line) Len() int           { return len(l) }
func (l line) Less(i, j int) bool { return l[i].place < l[j].place }

func (l line) Swap(i, j int) {
	l[i], l[j] = l[j], l[i]
	l[i].index, l[j].index = i, j
}

func (l *line) Push(x any) {
	t := x.(*task)
	t.line, t.index = l, len(*l)
	*l = append(*l, t)
}

func (l *line) Pop() any {
	last := len(*l) - 1
	t := (*l)[last]
	t.line = nil
	(*l)[last] = nil
	*l = (*l)[:last]
	return t
}
