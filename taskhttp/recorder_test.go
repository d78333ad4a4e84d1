package taskhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/eventlog"
)

func put(t testing.TB, rec *recorder, op task.Operation) {
	t.Helper()
	rec.put(lighten(&op))
}

// recorded returns the events that a client can resume with after seq.
func recorded(t *testing.T, rec *recorder, seq uint64) (events []eventlog.Event[entry], bytes int) {
	t.Helper()
	r, ok := rec.resume(rec.eventID(seq))
	if !ok {
		t.Fatalf("can't resume after event %d", seq)
	}
	defer r.Close()
	for {
		e, ok, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return events, bytes
		}
		events = append(events, e)
		bytes += len(e.Value.data)
	}
}

// oldest returns the sequence number of the oldest event after which a client can resume.
func oldest(rec *recorder, last uint64) uint64 {
	for seq := uint64(0); seq <= last; seq++ {
		if r, ok := rec.resume(rec.eventID(seq)); ok {
			r.Close()
			return seq
		}
	}
	return last + 1
}

func TestRecorderBounds(t *testing.T) {
	t.Parallel()
	rec := newRecorder(func() {})
	stuck := rec.log.Read()

	for i := range 20_000 {
		put(t, rec, task.Operation{ID: fmt.Sprint(i % 100), State: task.StateRunning, Progress: i % 101})
	}
	if events, _ := recorded(t, rec, 0); len(events) != 100 {
		t.Errorf("progress of 100 operations: %d events", len(events))
	}

	for i := range 12_000 {
		put(t, rec, task.Operation{ID: fmt.Sprint("small ", i), State: task.StateDone})
	}
	last := uint64(12_100)
	if events, _ := recorded(t, rec, oldest(rec, last)); len(events) != maxRecent {
		t.Errorf("12,000 small operations: %d events", len(events))
	}
	expectReload(t, rec, stuck)

	for i := range 12_000 {
		put(t, rec, task.Operation{ID: fmt.Sprint("big ", i), State: task.StateDone, Result: strings.Repeat("x", 1000)})
	}
	last += 12_000
	if events, bytes := recorded(t, rec, oldest(rec, last)); bytes > maxBytes || bytes < maxBytes-2000 {
		t.Errorf("12,000 big operations: %d events of %d bytes", len(events), bytes)
	}

	// A huge operation does not displace others.
	before := oldest(rec, last)
	huge := json.RawMessage(`"` + strings.Repeat("x", maxBytes) + `"`)
	put(t, rec, task.Operation{ID: "huge", State: task.StateDone, Metadata: huge, Result: huge})
	if events, bytes := recorded(t, rec, last); len(events) != 1 || bytes > 1000 {
		t.Errorf("a huge operation: %d events of %d bytes", len(events), bytes)
	}
	if after := oldest(rec, last); after > before+1 {
		t.Errorf("a huge operation displaced %d events", after-before)
	}
	if ops, _, r := rec.snapshot(); len(ops) != 100 || r.Start != last+1 {
		t.Errorf("snapshot of %d live operations after event %d", len(ops), r.Start)
	}
}

// expectReload checks that a stream with a lagging reader sends "reload".
func expectReload(t *testing.T, rec *recorder, r *eventlog.Reader[entry]) {
	t.Helper()
	if body := follow(t, rec, r); !strings.HasSuffix(body, "event: reload\nid: \ndata: {\"detail\":\"event history expired\"}\n\n") {
		t.Errorf("a stream that lags ends with %.200q", body)
	}
}

// follow returns everything that a stream sends until it ends.
func follow(t *testing.T, rec *recorder, r *eventlog.Reader[entry]) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	w := httptest.NewRecorder()
	s, err := newStream(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	s.follow(r, func(e eventlog.Event[entry]) string { return rec.eventID(e.Seq) })
	if ctx.Err() != nil {
		t.Error("the stream does not end")
	}
	return w.Body.String()
}

func TestRecorderResume(t *testing.T) {
	rec := newRecorder(func() {})
	for i := range 3 {
		put(t, rec, task.Operation{ID: fmt.Sprint(i), State: task.StateDone})
	}
	tests := []struct {
		id   string
		want int // number of events, or -1 if it can't be resumed
	}{
		{rec.epoch + "-0", 3},
		{rec.epoch + "-2", 1},
		{rec.epoch + "-3", 0},
		{rec.epoch + "-4", -1},
		{rec.epoch + "-18446744073709551615", -1},
		{rec.epoch + "-18446744073709551616", -1},
		{rec.epoch + "--1", -1},
		{rec.epoch + "-", -1},
		{rec.epoch, -1},
		{newRecorder(func() {}).epoch + "-2", -1},
		{"2", -1},
		{"-2", -1},
		{"", -1},
		{"RUNNING", -1},
	}
	for _, test := range tests {
		r, ok := rec.resume(test.id)
		got := -1
		if ok {
			for got = 0; ; got++ {
				if _, ok, _ := r.Next(); !ok {
					break
				}
			}
		}
		if got != test.want {
			t.Errorf("resume after %q: %d events, want %d", test.id, got, test.want)
		}
	}
}

func TestRecorderSnapshot(t *testing.T) {
	rec := newRecorder(func() {})
	for i := range 2 * maxSnapshot {
		state := task.StatePending
		if i%500 == 499 {
			state = task.StateRunning
		}
		put(t, rec, task.Operation{ID: fmt.Sprintf("%05d", i), State: state})
	}
	ops, more, r := rec.snapshot()
	if len(ops) != maxSnapshot || !more || r.Start != 2*maxSnapshot {
		t.Errorf("%d operations, more: %v, after event %d", len(ops), more, r.Start)
	}
	for i, want := range []string{"00499", "00999", "01499", "01999", "00000", "00001"} {
		if ops[i].ID != want {
			t.Errorf("operation %d is %s, want %s", i, ops[i].ID, want)
		}
	}
}

func TestRecorderEnd(t *testing.T) {
	t.Parallel()
	tests := []struct {
		err  error
		want string
	}{
		{fmt.Errorf("task: watch: %w", task.ErrLagged), "event: reload\nid: \ndata: {\"detail\":"},
		{fmt.Errorf("task: watch: %w", task.ErrClosed), "event: closed\ndata: {\"detail\":"},
		{errors.New("other"), "event: reload\nid: \ndata: {\"detail\":\"other\"}\n\n"},
		{nil, ""},
	}
	for _, test := range tests {
		rec := newRecorder(func() {})
		r := rec.log.Read()
		rec.run(sequence(&task.Operation{ID: "1", State: task.StateDone}, test.err))
		if !rec.over() {
			t.Errorf("%v: the recorder has not ended", test.err)
		}
		body := follow(t, rec, r)
		_, end, ok := strings.Cut(body, "retry: 2000\n\nevent: operation\nid: "+rec.eventID(1)+"\ndata: {\"id\":\"1\"")
		_, end, _ = strings.Cut(end, "\n\n")
		if !ok || !strings.HasPrefix(end, test.want) || test.want == "" && end != "" {
			t.Errorf("%v: the stream is %q, want %q", test.err, body, test.want)
		}
	}
}

// sequence yields an operation, and then err unless it is nil.
func sequence(op *task.Operation, err error) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		if yield(op, nil) && err != nil {
			yield(nil, err)
		}
	}
}

func TestRecorderEncodingError(t *testing.T) {
	rec := newRecorder(func() {})
	r := rec.log.Read()
	rec.run(sequence(&task.Operation{ID: "1", Result: func() {}}, nil))
	if body := follow(t, rec, r); !strings.Contains(body, "event: operation\n") || !strings.Contains(body, "can't be shown: json: unsupported type") {
		t.Errorf("the stream is %q", body)
	}
}

// TestRecorderReplay takes snapshots while operations start and finish. Each snapshot plus
// the events after it must lead to the manager's state.
func TestRecorderReplay(t *testing.T) {
	t.Parallel()
	m := task.NewManager(nil, task.WithLimit(8))
	h := Handler(m).(*handler)
	var l load
	var all sync.WaitGroup
	submitted := make(chan bool)
	go func() { l.submit(t, m, 400); close(submitted) }()
	var replays []*replay
	for i := range 40 {
		rec, leave, err := h.listen()
		if err != nil {
			t.Fatal(err)
		}
		defer leave()
		p := &replay{t: t, ops: make(map[string]*task.Operation), finished: make(map[string]bool)}
		live, _, r := rec.snapshot()
		p.begin(m, live)
		replays = append(replays, p)
		all.Go(func() { p.read(r) })
		time.Sleep(time.Millisecond)
		if i%10 == 9 { // the next round begins with a new recorder
			h.mu.Lock()
			h.recorder = nil
			h.mu.Unlock()
			defer rec.stop()
		}
	}
	<-submitted
	m.Close()
	all.Wait()
	for _, p := range replays {
		p.compare(m, l.submitted())
	}
}

// A load submits operations and cancels some of them.
type load struct {
	mu  sync.Mutex // guards ids
	ids []string
}

func (l *load) submit(t *testing.T, m *task.Manager, n int) {
	for i := range n {
		op, err := m.Submit("op", work(i))
		if err != nil {
			t.Error(err)
			return
		}
		l.mu.Lock()
		l.ids = append(l.ids, op.ID)
		l.mu.Unlock()
		if i%10 == 9 {
			m.Cancel(op.ID)
		}
	}
}

func (l *load) submitted() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.ids)
}

// work returns a function that reports progress. i determines how it ends.
func work(i int) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		for p := range i % 5 {
			update(20 * p)
			time.Sleep(time.Duration(i%3) * 100 * time.Microsecond)
		}
		if i%7 == 0 {
			return nil, errors.New("no")
		}
		return i, nil
	}
}

// A replay is the state of a client that applies a snapshot and later events.
type replay struct {
	t        *testing.T
	ops      map[string]*task.Operation
	finished map[string]bool // finished operations that were not in the snapshot
}

// begin applies a snapshot. A stored operation that is not in it has either finished,
// possibly before its Submit returned, or its first event will follow, because the recorder
// may lag behind the manager.
func (p *replay) begin(m *task.Manager, live []light) {
	for _, op := range live {
		p.ops[op.ID] = op.Operation
	}
	stored, err := m.List(1000, 0)
	if err != nil {
		p.t.Error(err)
	}
	for _, op := range stored {
		p.finished[op.ID] = p.ops[op.ID] == nil && op.State.Finished()
	}
}

// read applies the events and checks that the states are in order and complete.
func (p *replay) read(r *eventlog.Reader[entry]) {
	for {
		e, ok, err := r.Next()
		if err != nil {
			if !errors.Is(err, task.ErrClosed) {
				p.t.Error(err)
			}
			return
		}
		if !ok {
			<-r.Ready()
			continue
		}
		op := new(task.Operation)
		if err := json.Unmarshal(e.Value.data, op); err != nil {
			p.t.Error(err)
			return
		}
		var before task.State
		if known := p.ops[op.ID]; known != nil {
			before = known.State
		}
		if before.Finished() || !slices.Contains(following[before], op.State) {
			p.t.Errorf("%s is %s after %q", op.ID, op.State, before)
		}
		p.ops[op.ID] = op
	}
}

var following = map[task.State][]task.State{
	"":                {task.StatePending},
	task.StatePending: {task.StatePending, task.StateRunning, task.StateFailed, task.StateCancelled},
	task.StateRunning: {task.StateRunning, task.StateDone, task.StateFailed, task.StateCancelled},
}

func (p *replay) compare(m *task.Manager, ids []string) {
	for _, id := range ids {
		want, ok := m.Get(id)
		if !ok {
			p.t.Fatalf("operation %s not found", id)
		}
		got := p.ops[id]
		if got == nil && p.finished[id] {
			continue
		}
		if got == nil {
			p.t.Errorf("%s is missing in a replay, and had not finished before", id)
			continue
		}
		gotJSON, _ := json.Marshal(got)
		wantJSON, _ := json.Marshal(want)
		if string(gotJSON) != string(wantJSON) {
			p.t.Errorf("replay ends with %s, want %s", gotJSON, wantJSON)
		}
	}
}

func TestRecorderClosedManager(t *testing.T) {
	m := task.NewManager(nil)
	op, err := m.Submit("op", work(0))
	if err != nil {
		t.Fatal(err)
	}
	h := Handler(m).(*handler)
	get := func(path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Code
	}
	m.Close()
	for range 2 {
		if code := get("/events"); code != http.StatusServiceUnavailable {
			t.Errorf("GET /events: status %d", code)
		}
	}
	if _, _, err := h.listen(); !errors.Is(err, task.ErrClosed) || h.recorder != nil {
		t.Errorf("listen: %v, recorder %v", err, h.recorder)
	}
	if code := get("/" + op.ID + "/events"); code != http.StatusOK {
		t.Errorf("GET /{id}/events of a finished operation: status %d", code)
	}
}

// TestRecorderExpiry: a recorder without streams ends after a while.
func TestRecorderExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := task.NewManager(nil)
		defer m.Close()
		h := Handler(m).(*handler)
		listen := func() (leave func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan bool)
			go func() {
				defer close(done)
				h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/events", nil).WithContext(ctx))
			}()
			synctest.Wait()
			return func() { cancel(); <-done }
		}
		recorderNow := func() *recorder { h.mu.Lock(); defer h.mu.Unlock(); return h.recorder }

		leave := listen()
		first := recorderNow()
		time.Sleep(10 * idle)
		leave()
		time.Sleep(idle - time.Second)
		leave, leaveToo := listen(), listen()
		leave()
		time.Sleep(10 * idle)
		if recorderNow() != first || first.over() {
			t.Error("the recorder ended although there was a stream")
		}
		leaveToo()
		time.Sleep(idle + time.Second)
		if recorderNow() != nil || !first.over() {
			t.Error("the recorder continues without streams")
		}
		defer listen()()
		if now := recorderNow(); now == nil || now == first {
			t.Error("there is no new recorder")
		}
	})
}

func TestPolicy(t *testing.T) {
	got := policy([]byte("<script>1</script><style>a</style><script>2</script>"))
	for _, want := range []string{
		"default-src 'none'; script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s=' 'sha256-1HNeOiZeFu7gP1lxi5tdAwGcB9i2xR+Q2jpmbuwTqzU='; style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='; ",
		"connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("policy %q, want %q", got, want)
		}
	}
	if strings.Contains(pagePolicy, "unsafe") || strings.Count(pagePolicy, "'sha256-") != 2 {
		t.Errorf("policy of the page: %q", pagePolicy)
	}
}
