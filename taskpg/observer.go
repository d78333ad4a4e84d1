package taskpg

import "time"

// An instant is a reading of both clocks. Only differences are meaningful.
type instant struct {
	mono time.Duration // stops while the system sleeps
	wall time.Duration // doesn't stop, but may be set
}

// systemClock returns a function that reads the clocks.
func systemClock() func() instant {
	start := time.Now()
	return func() instant {
		now := time.Now()
		return instant{mono: now.Sub(start), wall: now.Round(0).Sub(start.Round(0))}
	}
}

// A sighting is an owner's row as one read shows it.
type sighting struct {
	id    string
	beat  int64
	lease time.Duration
	gone  bool
}

// An observer decides which owners are dead. It has no clock and no database: its
// caller reports when the reads and commits of the observer's own store began and
// ended.
//
// The observer presumes an owner dead if one read showed a beat, and another read,
// which began at least a lease after the end of the first, showed the same beat. In
// between, neither the reads nor the commits of the observer's own store may have had a
// gap of more than half a lease: otherwise the database, the network or the observer
// itself may have been away, and no owner is to blame. The lease is the longer of the
// owner's and the observer's.
type observer struct {
	lease     time.Duration
	read      instant // the end of the last read
	committed instant // the beginning of the last commit
	started   bool    // whether there was a read after the last gap
	since     map[string]unchanged
}

// unchanged is the beat of an owner, and the end of the first read that showed it.
type unchanged struct {
	beat int64
	at   instant
}

// commit records a commit of the observer's own store.
func (o *observer) commit(began instant) {
	if o.gap(o.committed, began) {
		o.started = false
	}
	o.committed = began
}

// gap reports whether more than half a lease has passed by the monotonic clock, or
// the clocks disagree by as much.
func (o *observer) gap(from, to instant) bool {
	mono, wall := to.mono-from.mono, to.wall-from.wall
	return mono > o.lease/2 || (wall-mono).Abs() > o.lease/2
}

// observe processes a read of the owners of all other stores. It returns the owners
// that are presumed dead, and the time until the next one may be if nothing changes.
func (o *observer) observe(began, ended instant, owners []sighting) (dead []sighting, next time.Duration) {
	if !o.started || o.gap(o.read, ended) || o.gap(o.committed, ended) {
		o.since = nil
	}
	o.read, o.started = ended, true
	since := make(map[string]unchanged)
	next = o.lease
	for _, owner := range owners {
		if owner.gone {
			continue
		}
		u, ok := o.since[owner.id]
		if !ok || u.beat != owner.beat {
			u = unchanged{owner.beat, ended}
		}
		since[owner.id] = u
		lease := max(o.lease, owner.lease)
		if left := lease - (began.mono - u.at.mono); left <= 0 {
			dead = append(dead, owner)
		} else {
			next = min(next, left)
		}
	}
	o.since = since
	return dead, next
}
