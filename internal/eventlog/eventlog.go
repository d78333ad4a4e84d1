// Package eventlog keeps the latest events of many keys in one order, for any number of
// readers, each at its own pace. It does not know what the events mean.
//
// A [Log] is bounded. A reader that falls too far behind gets [ErrLagged]; it delays
// neither the log nor other readers.
package eventlog

import (
	"errors"
	"slices"
	"sync"
)

// ErrLagged is returned by [Reader.Next] after the log had to drop an event that
// the reader had not read.
var ErrLagged = errors.New("events were dropped before they were read")

// A Log is a bounded, ordered log of events. Its methods, and those of its
// readers, may be called concurrently. Its lock is a leaf: no method calls code
// from outside the package.
type Log[V any] struct {
	// Immutable.
	maxKeys, maxBytes int

	mu      sync.Mutex           // guards what follows, and the readers
	root    entry[V]             // of a ring of entries: next is the oldest, prev the newest
	latest  map[string]*entry[V] // the last entry of each key
	bytes   int                  // of the values of latest
	seq     uint64               // of the last event
	started uint64               // the last event before the start of any reader
	dropped uint64               // the last event dropped
	readers map[*Reader[V]]bool
	all     int                     // number of readers of all keys
	idle    map[*Reader[V]]bool     // readers of all keys that have read everything
	named   map[string][]*Reader[V] // readers that have named a key
	end     error                   // not nil once the log is closed
}

// An Event is one entry of a log.
type Event[V any] struct {
	Seq   uint64 // increases from event to event, not always by 1
	Key   string
	Value V
}

type entry[V any] struct {
	Event[V]
	prev, next *entry[V]
	bytes      int
	unread     int  // number of readers that want it and have not read it
	soft       bool // the next soft event of the key supersedes it
	read       bool // some reader has read it
}

// New returns an empty log that holds events of at most maxKeys keys, and at most maxBytes
// of values, of which the latest of each key counts. The newest event stays whatever its
// size. The log drops events that all its readers have read: for [Log.ReadFrom], create a
// reader that never reads. Events of keys that a reader has named are dropped last.
func New[V any](maxKeys, maxBytes int) *Log[V] {
	l := &Log[V]{
		maxKeys:  maxKeys,
		maxBytes: maxBytes,
		latest:   make(map[string]*entry[V]),
		readers:  make(map[*Reader[V]]bool),
		idle:     make(map[*Reader[V]]bool),
		named:    make(map[string][]*Reader[V]),
	}
	l.root.Seq = ^uint64(0) // the end of the ring is after every event
	l.root.prev, l.root.next = &l.root, &l.root
	return l
}

// Append adds an event of a key. bytes is the size of its value. A soft event updates the
// last event of the key: it replaces that event in place if no reader has read it, and
// supersedes it if that event is soft, too. Append does nothing after [Log.Close].
func (l *Log[V]) Append(key string, v V, bytes int, soft bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.readers) == 0 || l.end != nil {
		l.seq++
		l.dropped = l.seq
		return
	}
	e := l.latest[key]
	if e != nil {
		l.bytes -= e.bytes
		e.bytes = 0
	}
	if e == nil || !soft || e.read || e.Seq <= l.started {
		if e != nil && soft && e.soft {
			l.remove(e)
		}
		e = l.add(key, soft)
	}
	l.bytes += bytes
	e.Value, e.bytes = v, bytes
	l.release(e)
	l.evict(false) // events of named keys go last
	l.evict(true)
}

// add adds an entry without a value.
func (l *Log[V]) add(key string, soft bool) *entry[V] {
	l.seq++
	e := &entry[V]{Event: Event[V]{Seq: l.seq, Key: key}, soft: soft, prev: l.root.prev, next: &l.root}
	e.prev.next, e.next.prev = e, e
	l.latest[key] = e
	e.unread = l.all + len(l.named[key])
	for r := range l.idle {
		r.next = e
		r.signal()
	}
	clear(l.idle)
	for _, r := range l.named[key] {
		if r.next == &l.root {
			r.next = e
			r.signal()
		}
	}
	return e
}

// release drops an event that no reader still has to read.
func (l *Log[V]) release(e *entry[V]) {
	if e.unread == 0 {
		l.dropped = max(l.dropped, e.Seq)
		l.remove(e)
	}
}

// evict drops the oldest events until the log is within its bounds, but never the newest
// one. Readers that have not read a dropped event lag.
func (l *Log[V]) evict(evenNamed bool) {
	for e := l.root.next; e != l.root.prev && l.full(); e = e.next {
		if !evenNamed && len(l.named[e.Key]) > 0 {
			continue
		}
		for r := range l.readers {
			r.lagged = r.lagged || r.next.Seq <= e.Seq && r.wants(e.Key)
		}
		l.dropped = max(l.dropped, e.Seq)
		l.remove(e)
	}
}

func (l *Log[V]) full() bool { return len(l.latest) > l.maxKeys || l.bytes > l.maxBytes }

// remove takes an entry out of the ring.
func (l *Log[V]) remove(e *entry[V]) {
	if e.unread > 0 {
		for r := range l.readers {
			if r.next == e {
				r.skip()
			}
		}
	}
	if l.latest[e.Key] == e {
		l.bytes -= e.bytes
		delete(l.latest, e.Key)
	}
	e.prev.next, e.next.prev = e.next, e.prev
}

// Close ends the log: Next returns err, which is not nil, after the last event.
func (l *Log[V]) Close(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end = err
	for r := range l.readers {
		r.signal()
	}
}

// Readers returns the number of readers.
func (l *Log[V]) Readers() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.readers)
}

// A Reader reads the events of a log, or those of some keys, in order.
type Reader[V any] struct {
	Start uint64 // the Seq of the last event before those that it reads

	log   *Log[V]
	keys  map[string]bool // nil for all
	ready chan struct{}   // holds a token when there may be something to read

	// Guarded by log.mu.
	next   *entry[V] // the next entry to read; log.root if there is none
	lagged bool
}

// Read returns a reader of the events from now on: of the given keys, which must be
// distinct, or of all keys if none is given. The caller must close it.
func (l *Log[V]) Read(keys ...string) *Reader[V] {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.reader(l.seq)
	if len(keys) > 0 {
		r.keys = make(map[string]bool, len(keys))
	}
	for _, key := range keys {
		r.keys[key] = true
		l.named[key] = append(l.named[key], r)
	}
	if r.keys == nil {
		l.all++
		l.idle[r] = true
	}
	return r
}

// ReadFrom returns a reader of all events after the one with that Seq. It reports false if
// the log no longer has all of them. The caller must close the reader.
func (l *Log[V]) ReadFrom(seq uint64) (*Reader[V], bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if seq < l.dropped || seq > l.seq {
		return nil, false
	}
	r := l.reader(seq)
	for e := l.root.prev; e.Seq > seq && e != &l.root; e = e.prev {
		e.unread++
		r.next = e
	}
	l.all++
	if r.next == &l.root {
		l.idle[r] = true
	}
	return r, true
}

func (l *Log[V]) reader(seq uint64) *Reader[V] {
	r := &Reader[V]{Start: seq, log: l, ready: make(chan struct{}, 1), next: &l.root}
	l.readers[r] = true
	l.started = max(l.started, seq)
	return r
}

func (r *Reader[V]) wants(key string) bool { return r.keys == nil || r.keys[key] }

// skip moves the reader to the next entry that it wants.
func (r *Reader[V]) skip() {
	end := &r.log.root
	for r.next = r.next.next; r.next != end && !r.wants(r.next.Key); r.next = r.next.next {
	}
	if r.next == end && r.keys == nil {
		r.log.idle[r] = true
	}
}

// Next returns the next event, or false if there is none now: then wait for Ready. It
// returns [ErrLagged] after the log has dropped an event that the reader had not read, and
// the error given to [Log.Close] after the last event. After [Reader.Close] there are no
// more events.
func (r *Reader[V]) Next() (Event[V], bool, error) {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.lagged {
		return Event[V]{}, false, ErrLagged
	}
	e := r.next
	if e == &l.root {
		return Event[V]{}, false, l.end
	}
	r.skip()
	e.read = true
	e.unread--
	l.release(e)
	return e.Event, true, nil
}

// Ready returns a channel that receives a token when, after Next has returned nothing,
// there may be something to read.
func (r *Reader[V]) Ready() <-chan struct{} { return r.ready }

func (r *Reader[V]) signal() {
	select {
	case r.ready <- struct{}{}:
	default:
	}
}

// Close ends the reader. It may be called at any time, and more than once.
func (r *Reader[V]) Close() {
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.readers[r] {
		return
	}
	delete(l.readers, r)
	for r.next != &l.root {
		e := r.next
		r.skip()
		e.unread--
		l.release(e)
	}
	if r.keys == nil {
		l.all--
		delete(l.idle, r)
	}
	for key := range r.keys {
		l.named[key] = slices.DeleteFunc(l.named[key], func(other *Reader[V]) bool { return other == r })
		if len(l.named[key]) == 0 {
			delete(l.named, key)
		}
	}
	r.signal()
}
