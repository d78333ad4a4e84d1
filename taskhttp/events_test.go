package taskhttp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
	"github.com/mynt-nas/task/taskhttp"
)

func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil, task.WithLimit(2))
		s := newPipeSite(t, mount(m))
		run(t, m, "old", nil, nil)
		a, b, c := newControlled(t, m, "a"), newControlled(t, m, "b"), newControlled(t, m, "c")
		b.update(20)

		r := s.listen(t.Context(), "/events")
		r.want("snapshot a RUNNING 0 b RUNNING 20 c PENDING 0")
		for i := range 100 {
			a.update(i)
			time.Sleep(time.Millisecond)
		}
		for n := 1; ; n++ {
			e, err := r.next()
			must(t, err)
			if e.String() == "operation a RUNNING 99" {
				if n > 3 {
					t.Errorf("%d events in a tenth of a second", n)
				}
				break
			}
		}
		must(t, m.Cancel(c.ID))
		r.want("operation c PENDING 0", "operation c CANCELLED 0") // still cancelling at first
		b.end("result", nil)
		r.want("operation b DONE 100")
		run(t, m, "d", nil, errors.New("no"))
		r.want("operation d PENDING 0", "operation d RUNNING 0", "operation d FAILED 0")

		// A second stream begins with the present state.
		second := s.listen(t.Context(), "/events")
		second.want("snapshot a RUNNING 99")
		a.end(nil, nil)
		second.want("operation a DONE 100")
		r.want("operation a DONE 100")

		m.Close()
		for _, r := range []*reader{r, second} {
			r.want("closed")
			r.wantEnd()
		}
		s.fails("GET", "/events", 503, "manager closed")
	})
}

func TestEventsHeartbeat(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		s := newPipeSite(t, mount(m))
		r := s.listen(t.Context(), "/events")
		r.want("snapshot")
		start := time.Now()
		for i := range testos.Size(100, 1000) {
			e, err := r.any()
			must(t, err)
			if passed := time.Since(start).Round(time.Second); e != (event{"heartbeat", "", "{}"}) || passed != time.Duration(i+1)*15*time.Second {
				t.Fatalf("event %v after %v", e, passed)
			}
		}
		m.Close()
		r.want("closed")
	})
}

func TestEventsResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		h := mount(m)
		s := newPipeSite(t, h)
		a := newControlled(t, m, "a")
		first := s.listen(t.Context(), "/events")
		first.want("snapshot a RUNNING 0")
		a.update(10)
		first.want("operation a RUNNING 10")
		first.body.Close()

		// Only the missed events are sent.
		a.update(20)
		a.update(30)
		run(t, m, "b", nil, nil)
		a.end(nil, nil)
		synctest.Wait()
		again := s.listen(t.Context(), "/events", "Last-Event-ID", first.lastID)
		again.want("operation a RUNNING 30", "operation b PENDING 0", "operation b RUNNING 0", "operation b DONE 100", "operation a DONE 100")
		again.body.Close()

		// If no events were missed, a heartbeat says so at once.
		same := s.listen(t.Context(), "/events", "Last-Event-ID", again.lastID)
		start := time.Now()
		e, err := same.any()
		must(t, err)
		if passed := time.Since(start); e.name != "heartbeat" || passed != 0 {
			t.Errorf("event %v after %v", e, passed)
		}
		same.body.Close()
		c := newControlled(t, m, "c")
		synctest.Wait()
		again = s.listen(t.Context(), "/events", "Last-Event-ID", again.lastID)
		again.want("operation c PENDING 0", "operation c RUNNING 0")
		again.body.Close()
		again = s.listen(t.Context(), "/events", "Last-Event-ID", again.lastID)
		c.update(5)
		again.want("operation c RUNNING 5")
		again.body.Close()
		m.Close()
	})
}

// TestEventsReload: a client that can't resume gets "reload" and a snapshot.
func TestEventsReload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		s := newPipeSite(t, mount(m))
		c := newControlled(t, m, "c")
		first := s.listen(t.Context(), "/events")
		first.want("snapshot c RUNNING 0")
		c.update(5)
		first.want("operation c RUNNING 5")
		first.body.Close()

		// Unknown event IDs.
		for _, id := range []string{"nonsense", "-1", first.lastID + "0000", first.lastID[:len(first.lastID)-1] + "x", "DONE"} {
			r := s.listen(t.Context(), "/events", "Last-Event-ID", id)
			r.want("reload", "snapshot c RUNNING 5")
			r.body.Close()
		}

		// Too many events were missed: the history has expired.
		r := s.listen(t.Context(), "/events")
		r.want("snapshot c RUNNING 5")
		r.body.Close()
		for range 600 {
			run(t, m, "big", strings.Repeat("x", 15_000), nil)
		}
		synctest.Wait()
		r = s.listen(t.Context(), "/events", "Last-Event-ID", r.lastID)
		r.want("reload", "snapshot c RUNNING 5")
		r.body.Close()

		// Another handler has a new event history, as after a restart.
		s = newPipeSite(t, mount(m))
		r = s.listen(t.Context(), "/events", "Last-Event-ID", r.lastID)
		r.want("reload", "snapshot c RUNNING 5")
		r.body.Close()
		m.Close()
	})
}

// TestEventsStuckClient: a client that does not read is disconnected, and no other client
// is delayed.
func TestEventsStuckClient(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		returned := make(chan bool, 10)
		h := mount(m)
		s := newPipeSite(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h.ServeHTTP(w, r)
			if strings.HasSuffix(r.URL.Path, "events") {
				returned <- true
			}
		}))
		op := newControlled(t, m, "op")
		synctest.Wait()
		stuck := []*reader{s.listen(t.Context(), "/events"), s.listen(t.Context(), "/"+op.ID+"/events")}
		start := time.Now()
		reads := s.listen(t.Context(), "/events")
		reads.want("snapshot op RUNNING 0")
		op.update(50)
		reads.want("operation op RUNNING 50")
		op.end(nil, nil)
		reads.want("operation op DONE 100")
		if passed := time.Since(start); passed > time.Second {
			t.Errorf("other clients waited for %v", passed)
		}
		for range stuck {
			<-returned
		}
		if passed := time.Since(start); passed > 30*time.Second {
			t.Errorf("the stuck streams ended after %v", passed)
		}
		reads.body.Close()
		<-returned
		m.Close()
	})
}

// TestEventsSlowClient: a client that reads too slowly gets "reload".
func TestEventsSlowClient(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		s := newPipeSite(t, mount(m))
		r := s.listen(t.Context(), "/events")
		r.want("snapshot")
		for range 1000 {
			run(t, m, "big", strings.Repeat("x", 15_000), nil)
		}
		for {
			e, err := r.next()
			must(t, err)
			if e.name == "reload" {
				break
			}
		}
		r.wantEnd()
		if r.lastID != "" {
			t.Errorf("last event ID %q after reload", r.lastID)
		}
		m.Close()
	})
}

func TestEventsShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		h := mount(m)
		s, other := newPipeSite(t, h), newPipeSite(t, h)
		op := newControlled(t, m, "op")
		synctest.Wait()
		streams := []*reader{s.listen(t.Context(), "/events"), s.listen(t.Context(), "/"+op.ID+"/events")}
		stays := other.listen(t.Context(), "/events")
		streams[0].want("snapshot op RUNNING 0")
		streams[1].want("operation op RUNNING 0")
		stays.want("snapshot op RUNNING 0")
		start := time.Now()
		shut := make(chan error)
		go func() { shut <- s.server.Shutdown(context.Background()) }()
		for _, r := range streams {
			r.wantEnd()
		}
		must(t, <-shut)
		if passed := time.Since(start); passed > time.Second {
			t.Errorf("Shutdown took %v", passed)
		}
		op.update(7)
		stays.want("operation op RUNNING 7")
		m.Close()
		stays.want("operation op FAILED 7", "closed")
		stays.wantEnd()
	})
}

func TestEventsOfOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := task.NewMemoryStore()
		m, other := newManager(t, store), newManager(t, store)
		s := newPipeSite(t, mount(m))
		for _, by := range []*task.Manager{m, other} {
			op := newControlled(t, by, "op")
			op.update(10)
			time.Sleep(time.Second) // stored by now
			r := s.listen(t.Context(), "/"+op.ID+"/events", "Last-Event-ID", "PENDING")
			r.want("operation op RUNNING 10")
			run(t, m, "another", nil, nil)
			op.update(20)
			r.want("operation op RUNNING 20")
			op.end(nil, nil)
			r.want("operation op DONE 100")
			r.wantEnd()

			r = s.listen(t.Context(), "/"+op.ID+"/events", "Last-Event-ID", "RUNNING")
			r.want("operation op DONE 100")
			r.wantEnd()
			s.do("GET", "/"+op.ID+"/events", 204, nil, "Last-Event-ID", r.lastID)
		}
		s.fails("GET", "/nonsense/events", 404, "operation not found")

		op := newControlled(t, other, "another manager's")
		synctest.Wait()
		r := s.listen(t.Context(), "/"+op.ID+"/events")
		_, err := r.next()
		must(t, err)
		m.Close()
		for e := (event{}); e.name != "closed"; {
			e, err = r.next()
			must(t, err)
		}
		r.wantEnd()
		other.Close()
	})
}

// unflushable is the [http.ResponseWriter] of a middleware that hides Flush.
type unflushable struct{ http.ResponseWriter }

func TestEventsWithoutFlush(t *testing.T) {
	m := newManager(t, nil)
	h := taskhttp.Handler(m)
	w := httptest.NewRecorder()
	h.ServeHTTP(unflushable{w}, httptest.NewRequest("GET", "/events", nil))
	if w.Code != 500 || w.Header().Get("Content-Type") != "application/problem+json" {
		t.Errorf("status %d, header %v: %s", w.Code, w.Header(), w.Body)
	}
}

// TestEventsFinalStates: the stream contains the final state of each operation that is live
// after the snapshot, even if the operation ends soon after the first request.
func TestEventsFinalStates(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil)
	for i := range 100 {
		func() {
			s := newSite(t, mount(m)) // a new handler has no recorder yet
			defer s.server.Close()
			op := newControlled(t, m, fmt.Sprint("op ", i))
			ended := make(chan bool)
			go func() {
				defer close(ended)
				time.Sleep(time.Duration(i*10) * time.Microsecond)
				op.end(nil, nil)
			}()
			defer func() { <-ended }()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			r := s.listen(ctx, "/events")
			if e, err := r.next(); err != nil || e.name != "snapshot" {
				t.Fatalf("%v, %v, want the snapshot", e, err)
			}
			var now task.Operation
			s.do("GET", "/"+op.ID, 200, &now)
			for want := "operation " + op.Name + " DONE 100"; now.State != task.StateDone; {
				e, err := r.next()
				if err != nil {
					t.Fatalf("%v instead of %q", err, want)
				}
				if e.String() == want {
					break
				}
			}
		}()
	}
}

// TestEventsReconnecting: a client that loses its connection again and again gets all final
// states.
func TestEventsReconnecting(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil, task.WithLimit(20))
	s := newSite(t, mount(m))
	const clients, tasks = 4, 500
	var all sync.WaitGroup
	submitted := make(chan bool)
	for c := range clients {
		all.Go(func() {
			<-submitted
			ended := make(map[string]bool)
			lastID := ""
			for n := 1; len(ended) < tasks; n++ {
				s.follow(&lastID, n*(c+1), ended)
			}
		})
	}
	for i := range tasks {
		_, err := m.Submit(fmt.Sprint(i), func(ctx context.Context, update func(int)) (any, error) {
			for p := range 5 {
				update(p * 20)
				time.Sleep(time.Millisecond)
			}
			return strings.Repeat("x", 1000), nil
		})
		must(t, err)
		if i == 10 {
			close(submitted)
		}
	}
	all.Wait()
}

// follow reads n events and records the finished operations, as the page does.
func (s *site) follow(lastID *string, n int, ended map[string]bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	r, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/events", nil)
	if *lastID != "" {
		r.Header.Set("Last-Event-ID", *lastID)
	}
	answer, err := s.client.Do(r)
	if err != nil {
		s.t.Error(err)
		return
	}
	defer answer.Body.Close()
	events := reader{t: s.t, body: answer.Body, lines: bufio.NewReader(answer.Body), lastID: *lastID}
	for range n {
		e, err := events.next()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.t.Errorf("after %q: %v", events.lastID, err)
			}
			break
		}
		switch e.name {
		case "snapshot":
			for cursor, more := "", true; more; more = cursor != "" {
				var page listing
				s.do("GET", "/?limit=500&cursor="+cursor, 200, &page)
				for _, op := range page.Tasks {
					if op.State.Finished() {
						ended[op.Name] = true
					}
				}
				cursor = page.Cursor
			}
		case "operation":
			var op task.Operation
			must(s.t, json.Unmarshal([]byte(e.data), &op))
			if op.State.Finished() {
				ended[op.Name] = true
			}
		}
		if len(ended) == 500 {
			break
		}
	}
	*lastID = events.lastID
}

// TestEventsMany: hundreds of stuck streams do not delay Submit, and they end when their
// clients disconnect.
func TestEventsMany(t *testing.T) {
	m := newManager(t, nil)
	h := taskhttp.Handler(m)
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 500 {
		all.Go(func() {
			client, server := net.Pipe()
			defer server.Close()
			defer client.Close()
			w := &slowWriter{header: make(http.Header), conn: server}
			go func() { <-ctx.Done(); client.Close() }()
			h.ServeHTTP(w, httptest.NewRequest("GET", "/events", nil).WithContext(ctx))
		})
	}
	start := time.Now()
	for range 200 {
		run(t, m, "op", nil, nil)
	}
	if passed := time.Since(start); passed > 10*time.Second {
		t.Errorf("200 operations took %v", passed)
	}
	cancel()
	all.Wait()
}

// A slowWriter writes to a connection whose peer does not read.
type slowWriter struct {
	header http.Header
	conn   net.Conn
}

func (w *slowWriter) Header() http.Header                { return w.header }
func (w *slowWriter) WriteHeader(int)                    {}
func (w *slowWriter) Write(p []byte) (int, error)        { return w.conn.Write(p) }
func (w *slowWriter) FlushError() error                  { return nil }
func (w *slowWriter) SetWriteDeadline(t time.Time) error { return w.conn.SetWriteDeadline(t) }

// TestEventsStuckShutdown: a client that does not read does not delay Shutdown.
func TestEventsStuckShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		defer m.Close()
		s := newPipeSite(t, mount(m))
		newControlled(t, m, "live", task.WithMetadata(strings.Repeat("x", 1<<20)))
		answer := s.request(t.Context(), "GET", "/events", nil)
		defer answer.Body.Close()
		synctest.Wait()
		start := time.Now()
		must(t, s.server.Shutdown(context.Background()))
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("Shutdown took %v", took)
		}
	})
}
