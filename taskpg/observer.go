package taskpg

import "time"

// An instant is a reading of both clocks. Only differences have a meaning.
type instant struct {
	mono time.Duration // stands still while the system sleeps
	wall time.Duration // does not, but may be set
}

// systemClock returns a function that reads the clocks.
func systemClock() func() instant {
	start := time.Now()
	return func() instant {
		now := time.Now()
		return instant{mono: now.Sub(start), wall: now.Round(0).Sub(start.Round(0))}
	}
}

// A sighting is what a read shows of an owner.
type sighting struct {
	id    string
	beat  int64
	lease time.Duration
	gone  bool
}

// An observer decides which owners are dead. It has no clock and no database: it
// is told when reads and commits of its own store began and ended.
//
// An owner is presumed dead when its beat was the same at the end of one read and
// at the beginning of another a lease later, and in between neither reads nor
// commits of the observer's own had a gap of more than half a lease: else the
// database, the network or the observer itself may have been away, and nobody can
// be blamed. The lease is the longer one of the owner's and the observer's.
type observer struct {
	lease     time.Duration
	read      instant // the end of the last read
	committed instant // the beginning of the last commit
	started   bool    // whether there was a read since the last gap
	since     map[string]unchanged
}

// unchanged is the beat of an owner, and the end of the read that showed it first.
type unchanged struct {
	beat int64
	at   instant
}

// commit tells of a commit of the observer's own store.
func (o *observer) commit(began instant) {
	if o.gap(o.committed, began) {
		o.started = false
	}
	o.committed = began
}

// gap reports whether more than half a lease has passed, by either clock, or the
// clocks disagree by as much.
func (o *observer) gap(from, to instant) bool {
	mono, wall := to.mono-from.mono, to.wall-from.wall
	return mono > o.lease/2 || (wall-mono).Abs() > o.lease/2
}

// observe takes in a read of all owners, which shows those of other stores. It
// returns those that are presumed dead, and how long it takes until the next one
// may be, if nothing changes.
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
