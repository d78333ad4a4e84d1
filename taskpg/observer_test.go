//go:build unix

package taskpg

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// A world is a model of two stores and a database: an owner that commits, an
// observer that reads, their clocks, and outages. now is the true time, which
// neither store knows.
type world struct {
	rand *rand.Rand
	now  time.Duration

	beat     int64
	lease    time.Duration // the owner's
	renewed  time.Duration // when the beat last changed
	gone     bool
	pending  bool // whether a transaction of the owner holds its row
	observer observer
	asleep   time.Duration // how long the observer's monotonic clock has been stopped
	set      time.Duration // how far its wall clock was set
	away     bool          // whether the database is unreachable
	log      []string
}

func (w *world) logf(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%8v ", w.now)+fmt.Sprintf(format, args...))
}

func (w *world) clock() instant { return instant{w.now - w.asleep, w.now + w.set} }

// pass advances the time by a random duration below most.
func (w *world) pass(most time.Duration) { w.now += time.Duration(w.rand.Int64N(int64(most))) }

// ownerSteps begins or commits a transaction of the owner.
func (w *world) ownerSteps() {
	switch {
	case w.away || w.gone:
	case !w.pending && w.rand.IntN(3) == 0:
		w.pending = true
		w.logf("owner begins")
	default:
		w.pending = false
		w.beat++
		w.renewed = w.now
		w.logf("owner commits %d", w.beat)
	}
}

// observerSteps makes one read, and declares the owner gone if it is presumed dead. It
// returns an error if that violates a rule.
func (w *world) observerSteps(ownerLives bool) error {
	if w.away {
		return nil
	}
	if w.rand.IntN(8) > 0 {
		w.observer.commit(w.clock())
	}
	began, read := w.clock(), sighting{"owner", w.beat, w.lease, w.gone}
	w.pass(w.observer.lease / 20)
	if w.rand.IntN(4) == 0 && ownerLives {
		w.ownerSteps()
	}
	dead, _ := w.observer.observe(began, w.clock(), []sighting{read})
	w.logf("observer reads %d, dead %v", read.beat, len(dead) > 0)
	if len(dead) == 0 || w.pending || w.beat != dead[0].beat { // the row is locked or has changed
		return nil
	}
	w.gone = true
	if silent := w.now - w.renewed; silent < w.lease || silent < w.observer.lease {
		return fmt.Errorf("an owner was declared gone that had committed %v before", silent)
	}
	return nil
}

// TestObserverModel takes an owner, an observer and their world through random steps.
// An owner that has committed within a lease must not be declared gone. A dead owner
// must be, within 1 1/3 leases if nothing else goes wrong.
func TestObserverModel(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 0))
		lease := time.Duration(1+r.IntN(3)) * time.Second
		w := &world{rand: r, lease: lease, observer: observer{lease: time.Duration(1+r.IntN(3)) * time.Second}}
		fail := func(err error) {
			if err != nil {
				t.Fatalf("seed %d: %v\n%v", seed, err, w.log[max(0, len(w.log)-30):])
			}
		}
		for range 200 {
			switch r.IntN(12) {
			case 0:
				w.away = !w.away
				w.logf("away %v", w.away)
			case 1:
				slept := time.Duration(r.Int64N(int64(3 * lease)))
				w.now += slept
				w.asleep += slept
				w.logf("observer has slept %v", slept)
			case 2:
				w.set += time.Duration(r.Int64N(int64(2*time.Hour))) - time.Hour
				w.logf("clock set")
			case 3, 4, 5, 6:
				w.ownerSteps()
			default:
				fail(w.observerSteps(true))
			}
			w.pass(lease / 5)
		}
		w.away, w.pending = false, false
		if w.gone {
			continue
		}
		// The owner is dead. It takes a lease from the first successful read.
		fail(w.observerSteps(false))
		longest := max(w.lease, w.observer.lease)
		for died := w.now; !w.gone; {
			w.observer.commit(w.clock())
			fail(w.observerSteps(false))
			if w.now-died > longest*4/3 {
				fail(fmt.Errorf("the owner is not declared gone after %v", w.now-died))
			}
			w.now += w.observer.lease / 6
		}
	}
}

// TestObserverRestarts tests what makes the observer start a lease anew.
func TestObserverRestarts(t *testing.T) {
	const lease = time.Minute
	for name, c := range map[string]struct {
		gap, sleep, noCommit time.Duration
		want                 bool // dead at the end
	}{
		"reads all the time":      {want: true},
		"gap of reads":            {gap: lease/2 + 1},
		"sleep":                   {sleep: lease},
		"commits of its own fail": {noCommit: lease},
	} {
		t.Run(name, func(t *testing.T) {
			o := observer{lease: lease}
			var now instant
			dead := false
			for now.mono < lease+lease/4 {
				if c.noCommit == 0 || now.mono < lease/4 || now.mono > lease/4+c.noCommit-1 {
					o.commit(now)
				}
				d, _ := o.observe(now, now, []sighting{{id: "a", lease: lease}})
				dead = dead || len(d) > 0
				step := lease / 8
				if now.mono >= lease/2 && now.mono < lease/2+step {
					step += c.gap
					now.wall += c.sleep
				}
				now.mono += step
				now.wall += step
			}
			if dead != c.want {
				t.Errorf("declared gone: %v, want %v", dead, c.want)
			}
		})
	}
}

// TestClocksApart runs two stores whose wall clocks are two hours apart, and two whose
// clocks are set again and again, beside a process that is killed. Only the killed
// process may be declared gone.
func TestClocksApart(t *testing.T) {
	dsn := pgtest.Database(t)
	real := systemClock()
	apart := func(set func(mono time.Duration) time.Duration) Option {
		return func(s *Store) {
			s.clock = func() instant {
				now := real()
				now.wall += set(now.mono)
				return now
			}
		}
	}
	stores := []*Store{
		open(t, dsn, apart(func(time.Duration) time.Duration { return time.Hour })),
		open(t, dsn, apart(func(time.Duration) time.Duration { return -time.Hour })),
		open(t, dsn, apart(func(mono time.Duration) time.Duration { // set every 1/3 of a lease
			return time.Duration(int(mono/(lease/3))%2) * time.Hour
		})),
		open(t, dsn, apart(func(mono time.Duration) time.Duration { // set every 2 leases
			return time.Duration(int(mono/(2*lease))%2) * -time.Hour
		})),
	}
	var owners []string
	for _, s := range stores {
		owners = append(owners, s.Owner())
	}
	for range 2 {
		p, r := startStore(t, dsn)
		time.Sleep(2 * lease) // time to declare a live process gone by mistake
		if gone(t, dsn, r.Owner) {
			t.Error("a living process is declared gone")
		}
		p.Kill()
		until(t, "declared gone", func() bool { return gone(t, dsn, r.Owner) })
		if got := recovered(t, stores[0]); len(got) != 1 || got[0] != r.ID {
			t.Errorf("recovered %v, want %s", got, r.ID)
		}
	}
	for i, s := range stores {
		owner := owners[i]
		save(t, s, task.StateRunning) // the Owner changes here if the store was declared gone
		if s.Owner() != owner {
			t.Errorf("store %d is declared gone", i)
		}
	}
	if got := recovered(t, stores[1]); len(got) > 0 {
		t.Errorf("recovered %v of living owners", got)
	}
}
