package task

import (
	"cmp"
	"container/heap"
	"container/list"
	"errors"
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
// Given several times, it takes several keys, all at once: no two operations
// ever wait for each other. While it waits for one of them, those that come
// later and need another of them wait behind it.
//
// Submit returns an error if the key is empty.
func WithLock(key string) SubmitOption {
	return func(t *task) error {
		if key == "" {
			return errors.New("the lock's key is empty")
		}
		if !slices.ContainsFunc(t.locks, func(l lock) bool { return l.key == key }) {
			t.locks = append(t.locks, lock{key: key})
		}
		return nil
	}
}

// A queue decides which operation starts when. Its methods are called with
// Manager.mu held, and none takes longer than the logarithm of its length.
type queue struct {
	limit   int    // how many may run; 0 for any number
	running int    // right only if somebody may wait: see Manager.release
	last    uint64 // the place of the task that came last
	ready   ready  // those that wait for nothing but the limit

	// lines has for each key the tasks that have it, by order of submission.
	// The first one holds it, be it running or waiting.
	lines map[string]*list.List
}

// A turn is the place of a task in a queue.
type turn struct {
	locks   []lock // as many as it has keys
	place   uint64 // by order of submission; 0 before and after it waits
	index   int32  // in ready
	blocked int32  // how many of its keys others hold
}

// A lock is the place of a task in the line of a key.
type lock struct {
	key string
	at  *list.Element
}

// add puts t at the end of the queue.
func (q *queue) add(t *task) {
	q.last++
	t.place = q.last
	for i := range t.locks {
		l := &t.locks[i]
		line := q.lines[l.key]
		if line == nil {
			if q.lines == nil {
				q.lines = make(map[string]*list.List)
			}
			line = list.New()
			q.lines[l.key] = line
		}
		if line.Len() > 0 {
			t.blocked++
		}
		l.at = line.PushBack(t)
	}
	if t.blocked == 0 {
		heap.Push(&q.ready, t)
	}
}

// next takes the task out of the queue that is to run now, or returns nil.
// Call done when it has run.
func (q *queue) next() *task {
	if len(q.ready) == 0 || q.limit > 0 && q.running >= q.limit {
		return nil
	}
	q.running++
	t := heap.Pop(&q.ready).(*task)
	t.place = 0
	return t
}

// done gives back the place and the keys of a task that has run.
func (q *queue) done(t *task) {
	q.running--
	q.unlock(t)
}

// remove takes t out of the queue, if it is in there.
func (q *queue) remove(t *task) {
	if t.place == 0 {
		return
	}
	if t.blocked == 0 {
		heap.Remove(&q.ready, int(t.index))
	}
	t.place = 0
	q.unlock(t)
}

// unlock takes t out of the lines of its keys. Who gets the last key that it
// needs is ready.
func (q *queue) unlock(t *task) {
	for _, l := range t.locks {
		line := q.lines[l.key]
		if line == nil { // the queue has been cleared
			continue
		}
		held := line.Front() == l.at
		line.Remove(l.at)
		if line.Len() == 0 {
			delete(q.lines, l.key)
		} else if held {
			heir := line.Front().Value.(*task)
			if heir.blocked--; heir.blocked == 0 {
				heap.Push(&q.ready, heir)
			}
		}
	}
}

// clear takes all tasks out of the queue, by order of submission.
func (q *queue) clear() []*task {
	all := slices.Clone(q.ready)
	for _, line := range q.lines {
		for e := line.Front(); e != nil; e = e.Next() {
			if t := e.Value.(*task); t.blocked > 0 {
				all = append(all, t)
				t.blocked = 0 // it may be in other lines, too
			}
		}
	}
	q.ready, q.lines = nil, nil
	slices.SortFunc(all, func(a, b *task) int { return cmp.Compare(a.place, b.place) })
	for _, t := range all {
		t.place = 0
	}
	return all
}

// ready is a heap of tasks by place.
type ready []*task

func (r ready) Len() int           { return len(r) }
func (r ready) Less(i, j int) bool { return r[i].place < r[j].place }

func (r ready) Swap(i, j int) {
	r[i], r[j] = r[j], r[i]
	r[i].index, r[j].index = int32(i), int32(j)
}

func (r *ready) Push(x any) {
	t := x.(*task)
	t.index = int32(len(*r))
	*r = append(*r, t)
}

func (r *ready) Pop() any {
	last := len(*r) - 1
	t := (*r)[last]
	(*r)[last] = nil
	*r = (*r)[:last]
	return t
}
