package taskhttp

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

func newTestRecorder() *recorder {
	return &recorder{
		epoch:   "epoch",
		stop:    func() {},
		latest:  make(map[string]uint64),
		live:    make(map[string]*task.Operation),
		changed: make(chan struct{}),
	}
}

func TestRecorderBounds(t *testing.T) {
	rec := newTestRecorder()
	long := strings.Repeat("x", 1000)
	check := func(what string) {
		t.Helper()
		bytes, dead := 0, 0
		for _, e := range rec.recent {
			bytes += len(e.data)
			if e.data == nil {
				dead++
			}
		}
		if bytes != rec.bytes || dead != rec.dead {
			t.Errorf("%s: %d bytes and %d dead, counted as %d and %d", what, bytes, dead, rec.bytes, rec.dead)
		}
		if rec.bytes > maxBytes || len(rec.recent)-rec.dead > maxRecent || len(rec.recent) > 2*maxRecent+100 || len(rec.latest) > maxRecent {
			t.Errorf("%s: %d bytes, %d entries, %d latest", what, rec.bytes, len(rec.recent), len(rec.latest))
		}
	}

	// Progress supersedes progress: nothing is forgotten.
	for i := range 20_000 {
		rec.put(&task.Operation{ID: fmt.Sprint(i % 100), State: task.StateRunning, Progress: i % 101})
	}
	check("progress")
	if rec.forgotten != 0 || len(rec.recent)-rec.dead != 100 {
		t.Errorf("%d entries, forgotten up to %d", len(rec.recent)-rec.dead, rec.forgotten)
	}
	batch, _, _, err := rec.after(0)
	if err != nil || len(batch) != 100 {
		t.Errorf("a batch of %d, %v", len(batch), err)
	}

	// Small and big ones.
	for i := range 12_000 {
		rec.put(&task.Operation{ID: fmt.Sprint("small ", i), State: task.StateDone})
	}
	check("many")
	for i := range 12_000 {
		rec.put(&task.Operation{ID: fmt.Sprint("big ", i), State: task.StateDone, Result: long})
	}
	check("much")
	if len(rec.live) != 100 {
		t.Errorf("%d are live", len(rec.live))
	}

	// A batch is bounded, and they follow each other without a gap.
	at := rec.forgotten
	for n := 0; at < rec.seq; n++ {
		batch, _, _, err := rec.after(at)
		if err != nil || len(batch) == 0 || len(batch) > maxBatch || batch[0].seq != at+1 {
			t.Fatalf("batch %d after %d: %d entries, %v", n, at, len(batch), err)
		}
		at = batch[len(batch)-1].seq
	}
	if _, _, _, err := rec.after(rec.forgotten - 1); err != errForgotten {
		t.Errorf("after what is forgotten: %v", err)
	}
	for seq, want := range map[uint64]bool{0: false, rec.forgotten - 1: false, rec.forgotten: true, rec.seq: true, rec.seq + 1: false} {
		if _, ok := rec.resume(rec.eventID(seq)); ok != want {
			t.Errorf("resume after %d: %v (forgotten up to %d of %d)", seq, ok, rec.forgotten, rec.seq)
		}
	}

	// One that is too big alone is kept until the next one.
	rec.put(&task.Operation{ID: "huge", State: task.StateDone, Result: strings.Repeat("x", maxBytes)})
	if batch, _, _, err := rec.after(rec.seq - 1); len(batch) != 1 || err != nil {
		t.Errorf("huge: a batch of %d, %v", len(batch), err)
	}
	rec.put(&task.Operation{ID: "next", State: task.StateDone})
	check("after a huge one")
}

func TestRecorderPresent(t *testing.T) {
	rec := newTestRecorder()
	for i := range 2 * maxSnapshot {
		state := task.StatePending
		if i%500 == 499 {
			state = task.StateRunning
		}
		rec.put(&task.Operation{ID: fmt.Sprintf("%05d", i), State: state})
	}
	ops, more, at := rec.present()
	if len(ops) != maxSnapshot || !more || at != rec.seq {
		t.Errorf("%d operations, more: %v, at %d", len(ops), more, at)
	}
	for i, want := range []string{"00499", "00999", "01499", "01999", "00000", "00001"} {
		if ops[i].ID != want {
			t.Errorf("operation %d is %s, want %s", i, ops[i].ID, want)
		}
	}
}

// A listener that the recorder itself was too slow for is told so.
func TestRecorderEnd(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("task: watch: %w", task.ErrLagged), "event: reload\nid: \ndata: {\"detail\":"},
		{fmt.Errorf("task: watch: %w", task.ErrClosed), "event: closed\ndata: {\"detail\":"},
		{errors.New("other"), "event: reload\nid: \ndata: {\"detail\":\"other\"}\n\n"},
		{nil, ""},
	} {
		rec := newTestRecorder()
		rec.put(&task.Operation{ID: "1", State: task.StateDone})
		rec.end(test.err)
		rec.end(errors.New("too late"))
		w := httptest.NewRecorder()
		s, err := newStream(context.Background(), w, rec)
		if err != nil {
			t.Fatal(err)
		}
		s.tell(0, func(e entry) string { return "id" })
		_, told, ok := strings.Cut(w.Body.String(), "retry: 2000\n\nevent: operation\nid: id\ndata: {\"id\":\"1\"")
		_, told, _ = strings.Cut(told, "\n\n")
		if !ok || !strings.HasPrefix(told, test.want) || test.want == "" && told != "" {
			t.Errorf("%v: told %q, want %q", test.err, w.Body, test.want)
		}
	}
}

// Without listeners, a recorder ends after a while.
func TestRecorderExpiry(t *testing.T) {
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
		time.Sleep(time.Hour)
		leave()
		time.Sleep(idle - time.Second)
		leave, leaveToo := listen(), listen()
		leave()
		time.Sleep(time.Hour)
		if recorderNow() != first || first.over() {
			t.Error("the recorder ended while somebody listened")
		}
		leaveToo()
		time.Sleep(idle + time.Second)
		if recorderNow() != nil || !first.over() {
			t.Error("the recorder goes on without listeners")
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
