package queue

import "testing"

// TestHolder checks the holder of the first key that a waiting item lacks.
func TestHolder(t *testing.T) {
	q := New[string](1)
	add := func(name string, keys ...string) *Ticket[string] {
		ticket := &Ticket[string]{Item: name}
		for _, key := range keys {
			ticket.Require(key)
		}
		q.Add(ticket)
		return ticket
	}
	want := func(ticket *Ticket[string], holder string) {
		t.Helper()
		if got, ok := q.Holder(ticket); got != holder || ok != (holder != "") {
			t.Errorf("%s waits for %q, %v, want %q", ticket.Item, got, ok, holder)
		}
	}
	a, b, free := add("a", "x"), add("b", "y"), add("free", "z")
	both, last := add("both", "w", "y", "x"), add("last", "x")
	want(a, "")
	want(free, "") // waits for a slot
	want(both, "b")
	want(last, "a")
	q.Next()
	want(a, "")
	want(last, "a") // a runs
	q.Remove(b)
	want(both, "a")
	q.Done(a)
	want(both, "")
	want(last, "both")
	q.Clear()
	want(last, "")
}
