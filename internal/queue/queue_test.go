package queue

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task/internal/testos"
)

// An item has a one-letter name, which is followed by its keys: "a12" needs the
// keys "1" and "2". The steps of a script:
//
//	+a12   add the item a
//	>ab    Next returns a, then b, then none
//	!a     a is done
//	-a     remove a
//	*ab    Clear returns a and b
var scripts = []struct {
	name  string
	limit int
	steps string
}{
	{"nothing", 1, "> *"},
	{"order", 1, "+a +b +c >a !a >b !b >c !c >"},
	{"limit", 2, "+a +b +c +d >ab !b >c !a !c >d"},
	{"no limit", 0, "+a +b +c >abc"},
	{"one at a time of a key", 0, "+a1 +b1 +c >ac !c > !a >b"},
	{"a blocked item lets others pass", 1, "+a1 >a +b1 +c +d !a >b !b >c !c >d"},
	{"a key blocks until Done", 0, "+a1 >a +b1 > +c1 > !a >b !b >c !c +d1 >d"},
	{"the same key twice", 0, "+a11 +b1 >a !a >b"},
	{"several keys", 0, "+a12 +b1 +c2 +d12 +e2 >a !a >bc !b > !c >d !d >e"},
	{"a waiting item holds its other keys", 0, "+a1 >a +b12 +c2 > !a >b !b >c"},
	{"ready by order of arrival", 1, "+a1 >a +b1 +c +d1 !a >b !b >c !c >d"},
	{"remove the only one", 1, "+a1 -a > +b1 >b"},
	{"remove the first", 1, "+a +b +c -a >b !b >c"},
	{"remove the middle", 1, "+a +b +c -b >a !a >c"},
	{"remove the last", 1, "+a +b +c -c >a !a >b !b >"},
	{"remove a holder that waits for a slot", 1, "+a >a +b1 +c1 -b !a >c"},
	{"remove a holder that waits for a key", 0, "+a1 >a +b12 +c2 +d1 -b >c !a >d"},
	{"remove the first waiter", 0, "+a1 +b1 +c1 >a -b !a >c"},
	{"remove the middle waiter", 0, "+a1 +b1 +c1 +d1 >a -c !a >b !b >d"},
	{"remove the last waiter", 0, "+a1 +b1 +c1 >a -c !a >b !b > +d1 >d"},
	{"remove one that waits for two", 0, "+a1 +b2 >ab +c12 +d1 +e2 -c !a >d !b >e"},
	{"remove twice", 0, "+a1 +b1 +c1 -a -a >b !b >c"},
	{"remove one that runs", 1, "+a1 +b1 >a -a > !a >b"},
	{"remove one that has run", 1, "+a1 +b1 >a !a -a >b"},
	{"clear", 1, "+a1 +b12 +c2 +d +e12 >a *bcde > !a > +f12 >f"},
	{"clear leaves keys to those that run", 0, "+a1 +b2 >ab +c12 *c +d1 +e2 > !b >e !a >d"},
	{"clear removes a holder that waits", 0, "+a1 >a +b12 *b +c2 >c"},
	{"add again", 0, "+a1 >a +b12 -b +b12 +c2 > *bc +c2 +b12 >c !c > !a >b"},
}

func TestScripts(t *testing.T) {
	for _, test := range scripts {
		t.Run(test.name, func(t *testing.T) {
			s := &script{t: t, q: New[string](test.limit), tickets: make(map[string]*Ticket[string])}
			for step := range strings.FieldsSeq(test.steps) {
				s.run(step)
			}
		})
	}
}

type script struct {
	t       *testing.T
	q       *Queue[string]
	tickets map[string]*Ticket[string]
}

func (s *script) run(step string) {
	s.t.Helper()
	names := step[1:]
	switch step[0] {
	case '+':
		t := s.tickets[names[:1]]
		if t == nil {
			t = &Ticket[string]{Item: names[:1]}
			s.tickets[t.Item] = t
		}
		for _, key := range names[1:] {
			t.Require(string(key))
		}
		s.q.Add(t)
	case '>':
		got := ""
		for item, ok := s.q.Next(); ok; item, ok = s.q.Next() {
			got += item
		}
		if got != names {
			s.t.Fatalf("%s: Next returns %q", step, got)
		}
	case '!':
		s.q.Done(s.tickets[names])
	case '-':
		s.q.Remove(s.tickets[names])
	case '*':
		if got := strings.Join(s.q.Clear(), ""); got != names {
			s.t.Fatalf("%s: Clear returns %q", step, got)
		}
	}
}

// A model is a queue with a single list, in order of arrival.
type model struct {
	limit int
	list  []*modelItem // waiting or running
}

type modelItem struct {
	ticket  *Ticket[int]
	keys    []string
	running bool
}

// next returns the first waiting item whose keys no earlier item needs.
func (m *model) next() *modelItem {
	running := 0
	var first *modelItem
	taken := make(map[string]bool)
	for _, item := range m.list {
		if item.running {
			running++
		} else if first == nil && !slices.ContainsFunc(item.keys, func(key string) bool { return taken[key] }) {
			first = item
		}
		for _, key := range item.keys {
			taken[key] = true
		}
	}
	if m.limit > 0 && running >= m.limit || first == nil {
		return nil
	}
	first.running = true
	return first
}

func (m *model) remove(item *modelItem) {
	m.list = slices.DeleteFunc(m.list, func(other *modelItem) bool { return other == item })
}

// pick returns a running or a waiting item, or nil.
func (m *model) pick(running bool, n int) *modelItem {
	var some []*modelItem
	for _, item := range m.list {
		if item.running == running {
			some = append(some, item)
		}
	}
	if len(some) == 0 {
		return nil
	}
	return some[n%len(some)]
}

// add adds an item that needs the keys whose bits are set.
func (m *model) add(q *Queue[int], number, keys int) {
	item := &modelItem{ticket: &Ticket[int]{Item: number}}
	for k := range 5 {
		if keys>>k&1 == 1 {
			item.keys = append(item.keys, fmt.Sprint(k))
			item.ticket.Require(fmt.Sprint(k))
		}
	}
	q.Add(item.ticket)
	m.list = append(m.list, item)
}

// compare executes the script encoded in bytes on a queue and on the model, and
// compares them.
func compare(t *testing.T, limit int, data []byte) {
	q, m := New[int](limit), &model{limit: limit}
	for i := 0; i+1 < len(data); i += 2 {
		arg := int(data[i+1])
		switch op := data[i] % 32; {
		case op < 6:
			m.add(q, i, arg)
		case op < 12:
			m.add(q, i, arg&3)
		case op < 20:
			want := m.next()
			got, ok := q.Next()
			if ok != (want != nil) || ok && got != want.ticket.Item {
				t.Fatalf("step %d: Next returns %d, %v, want %v", i, got, ok, want)
			}
		case op < 26:
			if item := m.pick(true, arg); item != nil {
				q.Done(item.ticket)
				m.remove(item)
			}
		case op < 31:
			if item := m.pick(false, arg); item != nil {
				q.Remove(item.ticket)
				m.remove(item)
			}
		case arg < 64:
			var want []int
			for item := m.pick(false, 0); item != nil; item = m.pick(false, 0) {
				want = append(want, item.ticket.Item)
				m.remove(item)
			}
			if got := q.Clear(); !slices.Equal(got, want) {
				t.Fatalf("step %d: Clear returns %v, want %v", i, got, want)
			}
		}
	}
	m.finish(t, q)
}

// finish runs all items, and checks that nothing is left in the queue.
func (m *model) finish(t *testing.T, q *Queue[int]) {
	for item := m.pick(true, 0); item != nil; item = m.pick(true, 0) {
		q.Done(item.ticket)
		m.remove(item)
	}
	for len(m.list) > 0 {
		want := m.next()
		got, ok := q.Next()
		if !ok || got != want.ticket.Item {
			t.Fatalf("in the end, Next returns %d, %v, want %v", got, ok, want)
		}
		q.Done(want.ticket)
		m.remove(want)
	}
	if len(q.ready) > 0 || len(q.waiters) > 0 || q.running != 0 {
		t.Fatalf("left are %d ready, %d keys, %d running", len(q.ready), len(q.waiters), q.running)
	}
}

func TestModel(t *testing.T) {
	for seed := range uint64(1000) {
		random := rand.New(rand.NewPCG(seed, 1))
		data := make([]byte, 400)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		compare(t, int(seed%5), data)
	}
}

func FuzzQueue(f *testing.F) {
	f.Add([]byte{2, 0, 1, 0, 3, 12, 0, 20, 0, 26, 0, 31, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 0 && len(data) < 1000 {
			compare(t, int(data[0]%5), data[1:])
		}
	})
}

// TestMany adds tens of thousands of tickets, and then removes or runs all of them. It
// would take minutes if the cost of a step were proportional to the length of the
// queue.
func TestMany(t *testing.T) {
	n := testos.Size(30_000, 100_000)
	random := rand.New(rand.NewPCG(1, 1))
	orders := map[string]func() []int{
		"forwards": func() []int { return increasing(n) },
		"backwards": func() []int {
			order := increasing(n)
			slices.Reverse(order)
			return order
		},
		"at random": func() []int { return random.Perm(n) },
	}
	keys := map[string]func(i int) []string{
		"no key":   func(int) []string { return nil },
		"one key":  func(int) []string { return []string{"k"} },
		"two keys": func(i int) []string { return []string{fmt.Sprint(i % 100), fmt.Sprint("x", i%7)} },
	}
	for name, keysOf := range keys {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			for _, order := range orders {
				q, tickets := many(n, keysOf)
				for _, i := range order() {
					q.Remove(tickets[i])
				}
				if _, ok := q.Next(); ok || len(q.waiters) > 0 {
					t.Fatal("something is left after all are removed")
				}
			}
			q, tickets := many(n, keysOf)
			for range n {
				item, ok := q.Next()
				if !ok {
					t.Fatal("nothing may run")
				}
				q.Done(tickets[item])
			}
			q, _ = many(n, keysOf)
			if items := q.Clear(); !slices.Equal(items, increasing(n)) {
				t.Errorf("Clear returns %d items out of order", len(items))
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

func many(n int, keysOf func(int) []string) (*Queue[int], []*Ticket[int]) {
	q := New[int](1)
	tickets := make([]*Ticket[int], n)
	for i := range tickets {
		tickets[i] = &Ticket[int]{Item: i}
		for _, key := range keysOf(i) {
			tickets[i].Require(key)
		}
		q.Add(tickets[i])
	}
	return q, tickets
}

func increasing(n int) []int {
	list := make([]int, n)
	for i := range list {
		list[i] = i
	}
	return list
}
