package eventlog

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var errEnd = errors.New("the end")

// A script has the following steps. A value is a single letter for the key and a
// number; /n gives its size, 1 by default.
//
//	a=1/20       append a hard event
//	a~2          append a soft event
//	open R       a reader of all
//	open R a b   a reader of the keys a and b
//	from R 3     ReadFrom(3), which must succeed
//	lost R 3     ReadFrom(3), which must fail
//	R: a1 b2     read these events, and then nothing
//	R: a1 ...    read only these events
//	R: LAGGED    Next returns ErrLagged
//	R: END       Next returns the error given to Close
//	close R      close a reader
//	end          close the log
var scripts = []struct {
	name              string
	maxKeys, maxBytes int
	steps             string
}{
	{"order", 9, 99, "open R; a=1; b=2; a=3; R: a1 b2 a3; R:"},
	{"only later events", 9, 99, "open Q; a=1; open R; b=2; R: b2"},
	{"hard events stay", 9, 99, "open R; a=1; a=2; a=3; R: a1 a2 a3"},
	{"soft replaces unread soft", 9, 99, "open R; a~1; b=1; a~2; R: a2 b1"},
	{"soft replaces unread hard", 9, 99, "open R; a=1; a~2; a~3; R: a3"},
	{"soft after read hard", 9, 99, "open R; a=1; R: a1; a~2; R: a2"},
	{"soft supersedes read soft", 9, 99, "open R; open Q; a~1; b=1; R: a1 ...; a~2; Q: b1 a2; R: b1 a2"},
	{"soft does not supersede read hard", 9, 99, "open R; open Q; a=1; R: a1; a~2; Q: a1 a2; R: a2"},
	{"soft does not change what a reader starts after", 9, 99, "open Q; a=1; open R; a~2; R: a2; Q: a1 a2"},
	{"reading another key is not reading", 9, 99, "open Q; open R b; a~1; b=1; R: b1; a~2; Q: a2 b1"},
	{"named keys", 9, 99, "open R a c; a=1; b=2; c=3; b~4; R: a1 c3"},
	{"events are kept for readers only", 9, 99, "a=1; open R; R:; close R; b=1; open R; R:"},
	{"more keys than allowed", 2, 99, "open R; a=1; b=1; R: a1 ...; c=1; d=1; R: LAGGED; R: LAGGED"},
	{"as many keys as allowed", 2, 99, "open R; a=1; b=1; a=2; b=2; R: a1 b1 a2 b2"},
	{"more bytes than allowed", 9, 10, "open R; a=1/5; b=1/6; R: LAGGED"},
	{"only the latest value of a key counts", 9, 10, "open R; a=1/9; a=2/9; a~3/1; b=1/9; R: a1 a3 b1"},
	{"replacing in place may exceed the bound", 9, 10, "open R; a~1/1; b=1/5; a~2/6; R: LAGGED"},
	{"the newest event stays", 9, 10, "open R; a=1/50; R: a1; b=1; b~2/50; R: b2"},
	{"a read event makes no reader lag", 1, 99, "open R; open Q; a=1; R: a1; b=1; R: b1; Q: LAGGED"},
	{"lagging for named keys only", 1, 99, "open R a; open Q b; a=1; c=1; c=2; R: a1; b=1; d=1; e=1; Q: b1"},
	{"named keys go last", 2, 99, "open R a; open Q; a=1; b=1; c=1; d=1; R: a1; Q: LAGGED"},
	{"named keys go in the end", 1, 99, "open R a b; open Q b; a=1; b=1; R: LAGGED; Q: b1"},
	{"events that nobody wants need no room", 1, 99, "open R a; a=1; b=1; c=1; R: a1"},
	{"events that only others have to read need no room", 2, 99, "open R a; open Q; a=1; b=1; Q: a1 b1; c=1; Q: c1; R: a1"},
	{"closing a reader makes room", 1, 99, "open R a; open Q b; a=1; close R; b=1; Q: b1"},
	{"resume", 9, 99, "open K; a=1; b=2; c=3; from R 1; R: b2 c3; from R 3; R:; lost R 4; from R 0; R: a1 b2 c3"},
	{"resume after supersession", 9, 99, "open K; open R; a~1; R: a1; a~2; from Q 0; Q: a2; from Q 1; Q: a2"},
	{"no resume after eviction", 2, 99, "open K; a=1; b=1; c=1; lost R 0; from R 1; R: b1 c1"},
	{"no resume after eviction of a named key", 1, 99, "open R a; open Q b; open K; a=1; b=1; lost P 0; from P 1; P: b1; R: LAGGED"},
	{"no resume over a time without readers", 9, 99, "open R; a=1; close R; b=1; open R; lost Q 1; from Q 2; Q:"},
	{"end", 9, 99, "open R; open Q a; a=1; b=1; end; c=1; R: a1 b1; R: END; Q: a1; Q: END; open P; P: END"},
	{"lagging before the end", 1, 99, "open R; a=1; b=1; end; R: LAGGED"},
	{"closed reader", 9, 99, "open R; open Q; a=1; close R; close R; R:; R:; b=1; R:; Q: a1 b1; end; R: END"},
	{"closed reader of keys", 9, 99, "open R a; open Q; a=1; close R; R:; a=2; R:; Q: a1 a2"},
}

func TestScripts(t *testing.T) {
	for _, test := range scripts {
		t.Run(test.name, func(t *testing.T) {
			s := &script{t: t, log: New[string](test.maxKeys, test.maxBytes), readers: make(map[string]*Reader[string])}
			for step := range strings.SplitSeq(test.steps, "; ") {
				s.run(step)
			}
		})
	}
}

type script struct {
	t       *testing.T
	log     *Log[string]
	readers map[string]*Reader[string]
}

func (s *script) run(step string) {
	s.t.Helper()
	words := strings.Fields(step)
	if name, ok := strings.CutSuffix(words[0], ":"); ok {
		s.read(s.readers[name], step, words[1:])
		return
	}
	switch words[0] {
	case "open":
		s.readers[words[1]] = s.log.Read(words[2:]...)
	case "from", "lost":
		seq, _ := strconv.ParseUint(words[2], 10, 64)
		r, ok := s.log.ReadFrom(seq)
		if ok != (words[0] == "from") {
			s.t.Errorf("%s: ReadFrom reports %v", step, ok)
		}
		s.readers[words[1]] = r
	case "close":
		s.readers[words[1]].Close()
	case "end":
		s.log.Close(errEnd)
	default:
		event, bytes, _ := strings.Cut(step, "/")
		size, err := strconv.Atoi(bytes)
		if err != nil {
			size = 1
		}
		s.log.Append(event[:1], event[2:], size, event[1] == '~')
	}
}

func (s *script) read(r *Reader[string], step string, want []string) {
	s.t.Helper()
	for i := 0; ; i++ {
		if i < len(want) && want[i] == "..." {
			return
		}
		e, ok, err := r.Next()
		got := e.Key + e.Value
		switch {
		case errors.Is(err, ErrLagged):
			got = "LAGGED"
		case errors.Is(err, errEnd) && i < len(want):
			got = "END"
		case !ok && i == len(want):
			return
		}
		if i >= len(want) || got != want[i] {
			s.t.Fatalf("%s: item %d is %q, %v, %v", step, i, got, ok, err)
		}
		if !ok {
			return
		}
	}
}

// A model is a log that keeps the whole history and searches it.
type model struct {
	t                 *testing.T
	log               *Log[int]
	maxKeys, maxBytes int
	seq               uint64
	history           []*modelEvent
	readers           []*modelReader
	end               error
}

type modelEvent struct {
	Event[int]
	bytes               int
	soft, read          bool
	dropped, superseded bool
	skipped             bool // there was no reader
}

func (e *modelEvent) live() bool { return !e.dropped && !e.superseded && !e.skipped }

type modelReader struct {
	*Reader[int]
	start, at      uint64 // it has read all events up to at that it wants
	told           bool   // Next has reported no event
	keys           []string
	lagged, closed bool
	got            []Event[int]
}

func (r *modelReader) wants(key string) bool { return r.keys == nil || slices.Contains(r.keys, key) }

func (r *modelReader) unread(e *modelEvent) bool {
	return !r.closed && r.at < e.Seq && r.wants(e.Key) && e.live()
}

func newModel(t *testing.T, maxKeys, maxBytes int) *model {
	return &model{t: t, log: New[int](maxKeys, maxBytes), maxKeys: maxKeys, maxBytes: maxBytes}
}

func (m *model) live() (live []*modelEvent) {
	for _, e := range m.history {
		if e.live() {
			live = append(live, e)
		}
	}
	return live
}

// open returns the readers that are not closed.
func (m *model) open() (open []*modelReader) {
	for _, r := range m.readers {
		if !r.closed {
			open = append(open, r)
		}
	}
	return open
}

func (m *model) append(key string, value, bytes int, soft bool) {
	m.log.Append(key, value, bytes, soft)
	if m.end != nil || len(m.open()) == 0 {
		m.seq++
		m.history = append(m.history, &modelEvent{Event: Event[int]{Seq: m.seq, Key: key}, skipped: true})
		return
	}
	var last *modelEvent
	for _, e := range m.live() {
		if e.Key == key {
			last = e
		}
	}
	if soft && last != nil && !last.read {
		last.Value, last.bytes = value, bytes
		m.settle()
		return
	}
	if soft && last != nil && last.soft {
		last.superseded = true
	}
	m.seq++
	m.history = append(m.history, &modelEvent{Event: Event[int]{m.seq, key, value}, bytes: bytes, soft: soft})
	m.settle()
}

// settle drops the events that all readers have read, and those beyond the bounds.
func (m *model) settle() {
	for _, e := range m.live() {
		e.dropped = !slices.ContainsFunc(m.readers, func(r *modelReader) bool { return r.unread(e) })
	}
	for _, evenNamed := range []bool{false, true} {
		live := m.live()
		for _, e := range live[:max(len(live), 1)-1] {
			if !m.full() {
				break
			}
			isNamed := slices.ContainsFunc(m.open(), func(r *modelReader) bool { return slices.Contains(r.keys, e.Key) })
			if evenNamed || !isNamed {
				m.evict(e)
			}
		}
	}
}

func (m *model) full() bool {
	latest := make(map[string]int)
	for _, e := range m.live() {
		latest[e.Key] = e.bytes
	}
	bytes := 0
	for _, n := range latest {
		bytes += n
	}
	return len(latest) > m.maxKeys || bytes > m.maxBytes
}

func (m *model) evict(e *modelEvent) {
	for _, r := range m.open() {
		if r.unread(e) {
			r.lagged = true
		}
	}
	e.dropped = true
}

func (m *model) read(keys ...string) {
	m.add(&modelReader{Reader: m.log.Read(keys...), start: m.seq, at: m.seq, keys: append([]string(nil), keys...)})
}

func (m *model) add(r *modelReader) {
	m.readers = append(m.readers, r)
	for _, e := range m.live() {
		e.read = e.read || e.Seq <= r.start
	}
	if r.Start != r.start {
		m.t.Fatalf("reader starts after %d, want %d", r.Start, r.start)
	}
}

// readFrom resumes after an event. The log must allow that if and only if it has all
// later events.
func (m *model) readFrom(seq uint64) {
	want := seq <= m.seq && !slices.ContainsFunc(m.history, func(e *modelEvent) bool {
		return e.Seq > seq && (e.dropped || e.skipped)
	})
	r, ok := m.log.ReadFrom(seq)
	if ok != want {
		m.t.Fatalf("ReadFrom(%d) reports %v, want %v", seq, ok, want)
	}
	if ok {
		m.add(&modelReader{Reader: r, start: seq, at: seq})
	}
}

// next calls a reader's Next, and reports whether there was an event.
func (m *model) next(r *modelReader) bool {
	var want Event[int]
	wantOK, wantErr := false, m.end
	if r.lagged {
		wantErr = ErrLagged
	} else if i := slices.IndexFunc(m.history, r.unread); i >= 0 {
		e := m.history[i]
		want, wantOK, wantErr = e.Event, true, nil
		e.read = true
		r.at = e.Seq
	}
	got, ok, err := r.Next()
	if got != want || ok != wantOK || err != wantErr {
		m.t.Fatalf("Next returns %v, %v, %v, want %v, %v, %v", got, ok, err, want, wantOK, wantErr)
	}
	if ok {
		r.got = append(r.got, got)
	} else {
		select {
		case <-r.Ready():
		default:
		}
	}
	r.told = !ok && err == nil
	m.settle()
	return ok
}

func (m *model) close(r *modelReader) {
	r.Reader.Close()
	r.closed = true
	m.settle()
}

// check compares the log with the model.
func (m *model) check() {
	m.t.Helper()
	l, live := m.log, m.live()
	e := l.root.next
	for _, want := range live {
		if e == &l.root || e.Event != want.Event || e.next.prev != e {
			m.t.Fatalf("entry %v, want %v", e.Event, want.Event)
		}
		e = e.next
	}
	if e != &l.root {
		m.t.Fatalf("there is an entry %v after the last one", e.Event)
	}
	latest := make(map[string]int)
	for _, e := range live {
		latest[e.Key] = e.bytes
	}
	bytes := 0
	for _, n := range latest {
		bytes += n
	}
	if len(l.latest) != len(latest) || l.bytes != bytes {
		m.t.Fatalf("%d keys and %d bytes, want %d and %d", len(l.latest), l.bytes, len(latest), bytes)
	}
	if (len(latest) > m.maxKeys || bytes > m.maxBytes) && len(live) > 1 {
		m.t.Fatalf("%d keys and %d bytes exceed the bounds", len(latest), bytes)
	}
	if n := l.Readers(); n != len(m.open()) {
		m.t.Fatalf("%d readers, want %d", n, len(m.open()))
	}
	for _, r := range m.readers {
		something := r.lagged || m.end != nil || r.closed || slices.ContainsFunc(m.history, r.unread)
		if r.told && something && len(r.ready) == 0 {
			m.t.Fatalf("Ready holds no token for a reader of %v", r.keys)
		}
	}
}

// finish reads everything, and checks all events that each reader has received.
func (m *model) finish() {
	for _, r := range m.open() {
		for m.next(r) {
		}
		if r.lagged {
			continue
		}
		var hard []uint64
		last := make(map[string]int)
		for _, e := range m.history {
			if e.Seq > r.start && r.wants(e.Key) && !e.skipped {
				last[e.Key] = e.Value
				if !e.soft {
					hard = append(hard, e.Seq)
				}
			}
		}
		at := r.start
		for _, e := range r.got {
			if e.Seq <= at || !r.wants(e.Key) {
				m.t.Fatalf("a reader of %v got %v after %d", r.keys, e, at)
			}
			if at = e.Seq; len(hard) > 0 && hard[0] == e.Seq {
				hard = hard[1:]
			}
			if value, ok := last[e.Key]; ok && value == e.Value {
				delete(last, e.Key)
			}
		}
		if len(hard) > 0 || len(last) > 0 {
			m.t.Fatalf("a reader of %v did not get the hard events %v and the values %v", r.keys, hard, last)
		}
	}
	for _, r := range m.open() {
		m.close(r)
	}
	m.check()
	if m.log.root.next != &m.log.root || len(m.log.named) > 0 {
		m.t.Fatal("something is left in the log without readers")
	}
}

// run executes the script encoded in bytes.
func (m *model) run(data []byte) {
	keys := []string{"a", "b", "c", "d", "e"}
	for i := 0; i+1 < len(data); i += 2 {
		op, arg := data[i]%16, int(data[i+1])
		switch {
		case op < 8: // values are distinct
			m.append(keys[arg%len(keys)], i+1, arg/16, op%2 == 0)
		case op < 13:
			if open := m.open(); len(open) > 0 {
				r := open[arg%len(open)]
				for n := arg / 64; n >= 0 && m.next(r); n-- {
				}
			}
		case op == 13 && len(m.open()) < 6:
			first := arg % len(keys)
			m.read(keys[first:min(first+arg/64, len(keys))]...)
		case op == 14 && len(m.open()) < 6:
			m.readFrom(max(m.seq+1, uint64(arg%16)) - uint64(arg%16))
		case op == 15 && arg < 250:
			if len(m.readers) > 0 {
				m.close(m.readers[arg%len(m.readers)]) // perhaps already closed
			}
		case op == 15:
			m.end = errEnd
			m.log.Close(errEnd)
		}
		m.check()
	}
	m.finish()
}

func TestModel(t *testing.T) {
	for seed := range uint64(400) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			data := make([]byte, 600)
			for i := range data {
				data[i] = byte(random.Uint32())
			}
			m := newModel(t, 1+int(seed%5), 4+int(seed%40))
			m.read() // often stuck
			m.run(data)
		})
	}
}

func FuzzLog(f *testing.F) {
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 2))
		data := make([]byte, 10+10*seed)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 2 || len(data) > 2000 {
			return
		}
		newModel(t, int(data[0]%6), int(data[1]%64)).run(data[2:])
	})
}

// count returns the number of entries in a log.
func (l *Log[V]) count() (n int) {
	for e := l.root.next; e != &l.root; e = e.next {
		n++
	}
	return n
}

// TestMemory appends many events that readers read soon.
func TestMemory(t *testing.T) {
	tests := []struct {
		name  string
		every int // a reader reads after this many events
		soft  bool
		keys  []string
	}{
		{"each", 1, false, nil},
		{"in batches", 1000, false, nil},
		{"soft", 1000, true, nil},
		{"named", 1000, false, []string{"7"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := New[[]byte](10_000, 64<<20)
			r := l.Read(test.keys...)
			before := heap()
			for i := range 300_000 {
				l.Append(strconv.Itoa(i%5000), make([]byte, 100), 100, test.soft)
				if i%test.every == 0 {
					for _, ok, _ := r.Next(); ok; _, ok, _ = r.Next() {
					}
					if n := l.count(); n > 0 {
						t.Fatalf("%d entries are left after all are read", n)
					}
				}
			}
			for _, ok, _ := r.Next(); ok; _, ok, _ = r.Next() {
			}
			if grown := heap() - before; grown > 3<<18 {
				t.Errorf("the heap has grown by %d bytes", grown)
			}
			runtime.KeepAlive(l)
		})
	}
}

// TestMemoryBounds appends a million events that nobody reads.
func TestMemoryBounds(t *testing.T) {
	l := New[[]byte](1000, 1<<20)
	keeps := l.Read()
	before := heap()
	for i := range 1_000_000 {
		l.Append(strconv.Itoa(i), make([]byte, 100), 100, false)
	}
	if n := l.count(); n != 1000 {
		t.Errorf("%d entries, want as many as keys are allowed", n)
	}
	if grown := heap() - before; grown > 3<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
	r, ok := l.ReadFrom(1_000_000 - 1000)
	if !ok {
		t.Fatal("ReadFrom reports that events are missing")
	}
	for i := range 1000 {
		if e, ok, err := r.Next(); !ok || e.Key != strconv.Itoa(999_000+i) {
			t.Fatalf("event %d is %v, %v, %v", i, e.Key, ok, err)
		}
	}
	r.Close()
	keeps.Close()
	if n := l.count(); n > 0 || len(l.latest) > 0 || l.bytes != 0 {
		t.Errorf("%d entries, %d keys and %d bytes are left without readers", n, len(l.latest), l.bytes)
	}
}

func heap() int {
	runtime.GC()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc)
}

// TestConcurrent: readers of all and of some keys read while writers write. Some
// readers are slow, some are closed meanwhile, and some never read.
func TestConcurrent(t *testing.T) {
	const writers, events = 4, 5000
	for _, maxKeys := range []int{2 * writers, 2} { // no reader lags, or some do
		l := New[int](maxKeys, 1<<20)
		var reading, writing sync.WaitGroup
		for i := range 12 {
			var keys []string
			if i%3 == 1 {
				keys = []string{"0", strconv.Itoa(1 + i%(writers-1))}
			}
			r := l.Read(keys...)
			closed := make(chan bool)
			if i == 11 {
				continue // never reads
			}
			if i%4 == 3 {
				reading.Go(func() { time.Sleep(time.Duration(i) * time.Millisecond); r.Close(); close(closed) })
			}
			reading.Go(func() { readAll(t, r, closed, keys, events, i%2*i, maxKeys < writers || i%4 == 3) })
		}
		for w := range writers {
			writing.Go(func() {
				for i := range events {
					l.Append(strconv.Itoa(w), i, 10, i%3 != 0)
				}
			})
		}
		writing.Wait()
		l.Close(errEnd)
		reading.Wait()
	}
}

// readAll reads to the end. It checks that the values of each key increase, that each
// multiple of 3 or a later value in its place comes exactly once, and that the last
// value comes.
func readAll(t *testing.T, r *Reader[int], closed chan bool, keys []string, events, slow int, mayEnd bool) {
	defer r.Close()
	last := make(map[string]int)
	for {
		e, ok, err := r.Next()
		before, known := last[e.Key]
		switch {
		case errors.Is(err, ErrLagged):
			if !mayEnd {
				t.Errorf("a reader of %v lags", keys)
			}
			return
		case err != nil:
			for key, value := range last {
				if value != events-1 && !mayEnd {
					t.Errorf("the last value of %s is %d", key, value)
				}
			}
			return
		case !ok:
			select {
			case <-r.Ready():
			case <-closed:
				return
			}
			continue
		case known && e.Value <= before || e.Value/3 > (before+3)/3 || keys != nil && !slices.Contains(keys, e.Key):
			t.Errorf("a reader of %v got %v after %d", keys, e, before)
			return
		}
		last[e.Key] = e.Value
		if slow > 0 && e.Value%(100*slow) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

// BenchmarkAppend measures an event that readers read at once.
func BenchmarkAppend(b *testing.B) {
	for _, readers := range []int{0, 1, 1000} {
		b.Run(fmt.Sprintf("readers=%d", readers), func(b *testing.B) {
			l := New[int](10_000, 64<<20)
			var r *Reader[int]
			for i := range readers {
				if r = l.Read(); i < readers-1 {
					r.Close()
					l.Read(strconv.Itoa(i))
				}
			}
			for i := range b.N {
				l.Append("a", i, 100, false)
				if r != nil {
					r.Next()
					r.Next()
				}
			}
		})
	}
}

// BenchmarkAppendFull measures an event that makes the log drop another one.
func BenchmarkAppendFull(b *testing.B) {
	l := New[int](10_000, 64<<20)
	l.Read()
	for i := range b.N + 20_000 {
		if i == 20_000 {
			b.ResetTimer()
		}
		l.Append(strconv.Itoa(i), i, 100, false)
	}
}
