package tasktest

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"time"

	"github.com/mynt-nas/task"
)

// The rules for the abilities by which managers learn of each other.

var otherChecks = []check{
	{
		name: "cancel",
		rule: "RequestCancel makes an unfinished operation Cancelling, changes nothing else, and returns an error that wraps task.ErrNotFound for any other.",
		has:  cancels,
		test: requests,
	},
	{
		name: "cancel-kept",
		rule: "A cancel request stays, whatever Update stores, until the operation has finished; only the first one counts.",
		has:  cancels,
		test: requestsKept,
	},
	{
		name: "changes",
		rule: "Changes yields nil at once, and soon after each change; it ends when its context is done.",
		has:  notifies,
		test: notices,
	},
	{
		name: "changes-rate",
		rule: "Changes yields at most every 100 milliseconds.",
		has:  notifies,
		test: noticesSeldom,
	},
}

// cancels reports whether a store, or the store it wraps, is a task.Canceller.
func cancels(db task.Persistence) bool {
	c, ok := db.(task.Canceller)
	if !ok {
		return false
	}
	_, err := c.CancelRequests()
	return !errors.Is(err, errors.ErrUnsupported)
}

// notifies reports the same for task.Notifier.
func notifies(db task.Persistence) bool {
	n, ok := db.(task.Notifier)
	if !ok {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for err := range n.Changes(ctx) {
		return !errors.Is(err, errors.ErrUnsupported)
	}
	return true
}

// requestCancel calls RequestCancel and checks its result.
func (s *session) requestCancel(op task.Operation, text string) {
	var want error
	if at := s.find(op.ID); at == nil || at.State.Finished() {
		want = task.ErrNotFound
	} else {
		at.Cancelling = true
	}
	s.answer("RequestCancel of "+short(op.Name)+" in state "+string(op.State), s.db.(task.Canceller).RequestCancel(op.ID, text), want)
}

// expectRequests checks the result of CancelRequests, and which operations are Cancelling.
func (s *session) expectRequests(when string, want map[string]string) {
	got, err := s.db.(task.Canceller).CancelRequests()
	if err != nil || !maps.Equal(got, want) {
		s.errorf("%s: CancelRequests = %q, %v, want %q", when, got, err, want)
	}
	all, err := s.db.List(len(s.want), 0)
	if err != nil {
		s.errorf("%s: List = %v", when, err)
	}
	for _, op := range all {
		if at := s.find(op.ID); at != nil && op.Cancelling != at.Cancelling {
			s.errorf("%s: %s: Cancelling is %t, want %t", when, show(op), op.Cancelling, at.Cancelling)
		}
	}
	s.verify(when)
}

func requests(s *session) {
	s.expectRequests("in a new store", nil)
	want := make(map[string]string)
	for _, state := range states {
		for _, text := range []string{"", `by "admin": it's late`} {
			op := in(state, s.saved(string(state)+" "+text))
			op.Metadata = json.RawMessage(`{"pool":"tank"}`)
			s.update(op)
			s.requestCancel(op, text)
			if !state.Finished() {
				want[op.ID] = text
			}
		}
		s.update(in(state, s.saved("not cancelled")))
	}
	s.requestCancel(s.new("unknown"), "")
	s.expectRequests("after RequestCancel", want)
}

func requestsKept(s *session) {
	op := s.saved("scrub")
	s.requestCancel(op, "the first")
	s.requestCancel(op, "the second")
	want := map[string]string{op.ID: "the first"}
	s.expectRequests("after two requests", want)
	s.update(in(task.StateRunning, op))
	s.expectRequests("after an Update", want)
	own := in(task.StateRunning, s.saved("cancelled by its manager"))
	own.Cancelling = true
	s.update(own)
	own.Cancelling = false
	s.update(own)
	if at, err := s.db.Get(own.ID); err != nil || !at.Cancelling {
		s.errorf("after an Update to Cancelling and one that is not: %+v, %v, want it Cancelling", at, err)
	}
	s.update(in(task.StateDone, own))
	s.update(in(task.StateCancelled, op))
	s.expectRequests("after the end", nil)
	s.requestCancel(op, "too late")
	s.expectRequests("after a late request", nil)
}

func notices(s *session) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	hints, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		for err := range s.db.(task.Notifier).Changes(ctx) {
			select {
			case hints <- err:
			case <-ctx.Done():
			}
		}
	}()
	wait := func(when string) {
		select {
		case err := <-hints:
			if err != nil {
				s.errorf("%s: Changes yielded %v, want nil", when, err)
			}
		case <-ended:
			s.errorf("%s: Changes has ended, though its context is not done", when)
		case <-time.After(patience):
			s.errorf("%s: Changes yielded nothing for %v", when, patience)
		}
	}
	wait("at the start")
	op := s.saved("scrub")
	wait("after Save")
	s.update(in(task.StateRunning, op))
	wait("after Update")
	if cancels(s.db) {
		s.requestCancel(op, "")
		wait("after RequestCancel")
	}
	cancel()
	start := time.Now()
	select {
	case <-ended:
	case <-time.After(2 * patience):
	}
	if time.Since(start) >= patience {
		s.errorf("Changes has not ended %v after its context", patience)
	}
}

func noticesSeldom(s *session) {
	const second = time.Second
	ctx, cancel := context.WithTimeout(context.Background(), second)
	defer cancel()
	n, last := 0, time.Now().Add(-second)
	for range s.db.(task.Notifier).Changes(ctx) {
		if gap := time.Since(last); gap < 50*time.Millisecond { // timers may be late, but not on average
			s.errorf("Changes yielded again after %v", gap)
			return
		}
		last = time.Now()
		if n++; n <= 3 {
			s.saved("scrub")
		}
	}
	if n < 2 || n > 11 {
		s.errorf("Changes yielded %d times in a second with three changes", n)
	}
}
