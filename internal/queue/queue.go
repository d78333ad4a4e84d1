// Package queue decides which waiting items may run: a limited number at once, one per key
// at a time, and otherwise in order of arrival.
package queue

import (
	"cmp"
	"slices"
)

// A Queue holds the tickets of items that wait or run. Its methods must not be called
// concurrently.
type Queue[T any] struct {
	limit   int // number of items that may run at once; 0 for no limit
	running int
	last    uint64       // number of the last ticket
	ready   []*Ticket[T] // tickets that wait only for a slot, by number

	// waiters holds, for each key, the tickets that need it, by number. The first one
	// holds the key, whether it runs or waits.
	waiters map[string][]*Ticket[T]
}

// A Ticket is the place of an item in a queue. It may be added again after Done, Remove or
// Clear.
type Ticket[T any] struct {
	Item    T
	keys    []string
	number  uint64 // in order of arrival; 0 unless the item waits
	blocked int    // number of its keys that others hold
}

// New returns an empty queue that lets at most limit items run at once, or any number if
// limit is 0.
func New[T any](limit int) *Queue[T] {
	return &Queue[T]{limit: limit, waiters: make(map[string][]*Ticket[T])}
}

// Require adds a key to those that the item needs. Call it before Add.
func (t *Ticket[T]) Require(key string) {
	if !slices.Contains(t.keys, key) {
		t.keys = append(t.keys, key)
	}
}

// Add puts a ticket at the end of the queue.
func (q *Queue[T]) Add(t *Ticket[T]) {
	q.last++
	t.number = q.last
	for _, key := range t.keys {
		if len(q.waiters[key]) > 0 {
			t.blocked++
		}
		q.waiters[key] = append(q.waiters[key], t)
	}
	if t.blocked == 0 {
		q.ready = append(q.ready, t)
	}
}

// Next takes the first item that may run out of the queue, or reports false if none may.
// The caller must call Done when the item has run.
func (q *Queue[T]) Next() (item T, ok bool) {
	if len(q.ready) == 0 || q.limit > 0 && q.running >= q.limit {
		return item, false
	}
	t := q.ready[0]
	q.ready[0] = nil
	q.ready = q.ready[1:]
	q.running++
	t.number = 0
	return t.Item, true
}

// Holder returns the item that holds the first key that a ticket waits for, or reports
// false if it waits for none.
func (q *Queue[T]) Holder(t *Ticket[T]) (item T, ok bool) {
	for _, key := range t.keys {
		if t.blocked > 0 && q.waiters[key][0] != t {
			return q.waiters[key][0].Item, true
		}
	}
	return item, false
}

// Done frees the slot and the keys of an item that has run.
func (q *Queue[T]) Done(t *Ticket[T]) {
	q.running--
	q.release(t)
}

// Remove takes a ticket out of the queue, if it waits there.
func (q *Queue[T]) Remove(t *Ticket[T]) {
	if t.number == 0 {
		return
	}
	if t.blocked == 0 {
		i := position(q.ready, t)
		q.ready = slices.Delete(q.ready, i, i+1)
	}
	q.release(t)
	t.number, t.blocked = 0, 0
}

// position returns the index of a ticket in a list, or where it belongs. The running
// ticket that holds a key has number 0 and is the first of its list.
func position[T any](list []*Ticket[T], t *Ticket[T]) int {
	i, _ := slices.BinarySearchFunc(list, t, func(a, b *Ticket[T]) int { return cmp.Compare(a.number, b.number) })
	return i
}

// release takes a ticket out of the lists of its keys. A waiter that then holds all of its
// keys becomes ready.
func (q *Queue[T]) release(t *Ticket[T]) {
	for _, key := range t.keys {
		waiters := q.waiters[key]
		i := position(waiters, t)
		if i > 0 {
			q.waiters[key] = slices.Delete(waiters, i, i+1)
			continue
		}
		if len(waiters) == 1 {
			delete(q.waiters, key)
			continue
		}
		waiters[0] = nil
		q.waiters[key] = waiters[1:]
		next := waiters[1]
		if next.blocked--; next.blocked == 0 {
			q.ready = slices.Insert(q.ready, position(q.ready, next), next)
		}
	}
}

// Clear removes all waiting items and returns them in order of arrival. Running items hold
// their keys until Done.
func (q *Queue[T]) Clear() []T {
	waiting := slices.Clone(q.ready)
	for _, waiters := range q.waiters {
		for _, t := range waiters {
			if t.blocked > 0 {
				waiting = append(waiting, t)
			}
		}
	}
	slices.SortFunc(waiting, func(a, b *Ticket[T]) int { return cmp.Compare(a.number, b.number) })
	waiting = slices.Compact(waiting) // a ticket with several keys is there several times
	items := make([]T, len(waiting))
	for i, t := range slices.Backward(waiting) { // backward, so that none becomes ready
		items[i] = t.Item
		q.Remove(t)
	}
	return items
}
