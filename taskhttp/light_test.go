package taskhttp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// A listed is an operation in the form used by lists and events.
type listed struct {
	task.Operation
	MetadataOmitted bool `json:"metadata_omitted"`
	ResultOmitted   bool `json:"result_omitted"`
}

const long, fits = 16<<10 + 1, 16<<10 - 2 // bytes of text; JSON adds two quotes

type lightTest struct {
	name                   string
	metadata, result       any
	err                    error
	metadataOut, resultOut bool
	cut                    bool // the name or the error
}

var lightTests = []lightTest{
	{name: "short", metadata: "m", result: "r", err: errors.New("e")},
	{name: "just fits", metadata: strings.Repeat("x", fits), result: strings.Repeat("x", fits), err: errors.New(strings.Repeat("x", fits+2))},
	{name: "long metadata", metadata: strings.Repeat("x", fits+1), result: "r", metadataOut: true},
	{name: "long result", metadata: "m", result: []string{strings.Repeat("x", long)}, resultOut: true},
	{name: "long error", err: errors.New(strings.Repeat("ä", long)), cut: true},
	{name: strings.Repeat("ä", long), cut: true},
}

// check checks an operation of a list or an event. It may be unfinished.
func (test lightTest) check(t *testing.T, where string, got listed) {
	t.Helper()
	finished := got.State.Finished()
	if got.MetadataOmitted != test.metadataOut || (got.Metadata != nil) != (test.metadata != nil && !test.metadataOut) {
		t.Errorf("%s: metadata %.20v, omitted: %v", where, got.Metadata, got.MetadataOmitted)
	}
	if got.ResultOmitted != (finished && test.resultOut) || (got.Result != nil) != (finished && test.result != nil && !test.resultOut) {
		t.Errorf("%s: result %.20v, omitted: %v", where, got.Result, got.ResultOmitted)
	}
	cut := strings.HasSuffix(got.Name, "ä…") || strings.HasSuffix(got.Error, "ä…")
	if finished && cut != test.cut || len(got.Name) > long+3 || len(got.Error) > long+3 {
		t.Errorf("%s: name of %d bytes, error of %d bytes", where, len(got.Name), len(got.Error))
	}
}

// TestLight: lists and events omit long values and truncate long texts. The response for a
// single operation has the full values.
func TestLight(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil)
	s := newSite(t, mount(m))
	for _, test := range lightTests {
		t.Run(test.name[:min(len(test.name), 20)], func(t *testing.T) {
			events := s.listen(t.Context(), "/events")
			events.next() // skip the snapshot
			op := newControlled(t, m, test.name, task.WithMetadata(test.metadata))
			events.next() // skip PENDING: later snapshots have the operation
			snapshot, err := s.listen(t.Context(), "/events").next()
			must(t, err)
			op.end(test.result, test.err)
			whole, err := m.Wait(t.Context(), op.ID)
			must(t, err)

			var list, live struct{ Tasks []listed }
			s.do("GET", "/?limit=1", 200, &list)
			must(t, json.Unmarshal([]byte(snapshot.data), &live))
			test.check(t, "list", list.Tasks[0])
			test.check(t, "snapshot", live.Tasks[0])
			test.check(t, "events", lastEvent(t, events))
			test.check(t, "events of one", lastEvent(t, s.listen(t.Context(), "/"+op.ID+"/events")))

			for _, path := range []string{"", "/wait"} {
				var got task.Operation
				s.do("GET", "/"+op.ID+path, 200, &got)
				if !testkit.Same(got, *whole) {
					t.Errorf("GET /{id}%s has %.200s", path, testkit.JSON(&got))
				}
			}
		})
	}
}

// lastEvent returns the operation of the first event with a final state.
func lastEvent(t *testing.T, r *reader) (op listed) {
	t.Helper()
	for !op.State.Finished() {
		e, err := r.next()
		must(t, err)
		op = listed{}
		must(t, json.Unmarshal([]byte(e.data), &op))
	}
	return op
}

// TestResult: the result is downloaded as stored.
func TestResult(t *testing.T) {
	m := newManager(t, nil)
	s := newSite(t, mount(m))
	result := strings.Repeat("<&>", 1<<18)
	want, err := json.Marshal(result)
	must(t, err)
	op := run(t, m, "report", result, nil)
	answer := s.request(t.Context(), "GET", "/"+op.ID+"/result", nil)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	must(t, err)
	if !bytes.Equal(body, want) || answer.ContentLength != int64(len(want)) {
		t.Errorf("%d bytes, Content-Length %d, want %d", len(body), answer.ContentLength, len(want))
	}
	for name, want := range map[string]string{
		"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
		"Content-Disposition": "attachment; filename=result-" + op.ID + ".json",
	} {
		if got := answer.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	s.fails("GET", "/"+run(t, m, "none", nil, nil).ID+"/result", 404, "has no result")
	s.fails("GET", "/nonsense/result", 404, "operation not found")
}

// submitHeavy submits operations that each take 30 kB in a list and do not end.
func submitHeavy(t *testing.T, m *task.Manager, n int) {
	t.Helper()
	value := strings.Repeat("x", 15_000)
	for range n {
		newControlled(t, m, value, task.WithMetadata(value))
	}
}

// TestListBytes: a page that becomes too large ends before its limit, and the next page
// continues there.
func TestListBytes(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil)
	s := newSite(t, mount(m))
	const count = 400
	submitHeavy(t, m, count)
	var pages []int
	seen := make(map[string]bool)
	for cursor := ""; ; {
		answer := s.request(t.Context(), "GET", "/?limit=500&cursor="+cursor, nil)
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		must(t, err)
		var page listing
		must(t, json.Unmarshal(body, &page))
		if len(body) > 8<<20+1000 {
			t.Errorf("a page of %d bytes", len(body))
		}
		pages = append(pages, len(page.Tasks))
		for _, op := range page.Tasks {
			seen[op.ID] = true
		}
		if cursor = page.Cursor; cursor == "" {
			break
		}
	}
	if len(seen) != count || len(pages) != 2 || pages[0]+pages[1] != count {
		t.Errorf("pages of %v operations, %d in all, want 2 with %d", pages, len(seen), count)
	}

	e, err := s.listen(t.Context(), "/events").next()
	must(t, err)
	var snapshot struct {
		Tasks     []listed
		Truncated bool
	}
	must(t, json.Unmarshal([]byte(e.data), &snapshot))
	if len(e.data) > 8<<20+1000 || len(snapshot.Tasks) != pages[0] || !snapshot.Truncated {
		t.Errorf("a snapshot of %d operations, %d bytes, truncated: %v", len(snapshot.Tasks), len(e.data), snapshot.Truncated)
	}
}

// TestListFailsLater: a page ends where the store starts to fail, and the request for the
// next page gets the error.
func TestListFailsLater(t *testing.T) {
	fake := testkit.NewFake(nil)
	m := newManager(t, fake)
	s := newSite(t, mount(m))
	for range 150 {
		run(t, m, "op", nil, nil)
	}
	fail := func(n int) {
		calls := 0
		fake.Before(func(c *testkit.Call) error {
			if c.Method != "ListFiltered" {
				return nil
			}
			if calls++; calls > n {
				return errBroken
			}
			return nil
		})
	}
	fail(2)
	var page listing
	s.do("GET", "/?limit=150", 200, &page)
	if len(page.Tasks) != 128 || page.Cursor != page.Tasks[127].ID {
		t.Errorf("%d operations, cursor %q", len(page.Tasks), page.Cursor)
	}
	fail(0)
	s.fails("GET", "/?limit=150&cursor="+page.Cursor, 500, "disk I/O error")
	fail(10)
	s.do("GET", "/?limit=150&cursor="+page.Cursor, 200, &page)
	if len(page.Tasks) != 22 {
		t.Errorf("%d operations on the next page", len(page.Tasks))
	}
}

// newPipeProtocolSite is newPipeSite for a given HTTP version.
func newPipeProtocolSite(t *testing.T, h http.Handler, major int, configure func(*http.Server)) *site {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(major == 1)
	protocols.SetUnencryptedHTTP2(major == 2)
	s := newPipeSite(t, h, func(server *http.Server) { server.Protocols = protocols }, configure)
	s.client.Transport.(*http.Transport).Protocols = protocols
	return s
}

// TestPagesStuckClient: a client that does not read a long response is disconnected.
func TestPagesStuckClient(t *testing.T) {
	t.Parallel()
	for _, major := range []int{1, 2} {
		t.Run(fmt.Sprint("HTTP", major), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, nil)
				defer m.Close()
				returned := make(chan bool, 10)
				h := mount(m)
				s := newPipeProtocolSite(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					h.ServeHTTP(w, r)
					returned <- true
				}), major, func(*http.Server) {})
				op := run(t, m, "big", strings.Repeat("x", 5<<20), nil) // more than an HTTP/2 client buffers unread
				submitHeavy(t, m, 180)
				for _, request := range []string{"GET /?limit=500", "GET /ID", "GET /ID/result", "GET /ID/wait", "POST /ID/cancel", "GET /events"} {
					start := time.Now()
					method, path, _ := strings.Cut(strings.Replace(request, "ID", op.ID, 1), " ")
					answer := s.request(t.Context(), method, path, nil)
					<-returned
					if passed := time.Since(start); passed < 20*time.Second || passed > 40*time.Second {
						t.Errorf("%s ended after %v", request, passed)
					}
					if _, err := io.ReadAll(answer.Body); err == nil {
						t.Errorf("%s: the client gets all", request)
					}
					answer.Body.Close()
				}
			})
		})
	}
}

// TestPagesSlowClient: a client that reads slowly gets the whole response, even if
// the server's WriteTimeout is short.
func TestPagesSlowClient(t *testing.T) {
	t.Parallel()
	for _, major := range []int{1, 2} {
		t.Run(fmt.Sprint("HTTP", major), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, nil)
				defer m.Close()
				s := newPipeProtocolSite(t, mount(m), major, func(server *http.Server) { server.WriteTimeout = 3 * time.Second })
				submitHeavy(t, m, 200)
				start := time.Now()
				answer := s.request(t.Context(), "GET", "/?limit=500", nil)
				defer answer.Body.Close()
				var body bytes.Buffer
				for {
					_, err := io.CopyN(&body, answer.Body, 64<<10)
					time.Sleep(2 * time.Second)
					if err == io.EOF {
						break
					}
					must(t, err)
				}
				var page listing
				must(t, json.Unmarshal(body.Bytes(), &page))
				if len(page.Tasks) != 200 || time.Since(start) < time.Minute {
					t.Errorf("%d operations after %v", len(page.Tasks), time.Since(start))
				}
			})
		})
	}
}

// TestPagesBlocked shuts a server down while clients do not read their pages.
func TestPagesBlocked(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil)
	op := run(t, m, "big", strings.Repeat("x", 15<<20), nil)
	submitHeavy(t, m, 300)
	eachProtocol(t, func(t *testing.T, serve func(http.Handler) *site) {
		s := serve(mount(m))
		for _, path := range []string{"/?limit=500", "/" + op.ID, "/" + op.ID + "/result"} {
			answer := s.request(t.Context(), "GET", path, nil)
			defer answer.Body.Close()
		}
		start := time.Now()
		shutDown(t, s, 20*time.Second)
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("Shutdown took %v", took)
		}
	})
}

// A deletingStore deletes unfinished operations once deleted is set.
type deletingStore struct {
	*task.MemoryStore
	deleted atomic.Bool
}

func (s *deletingStore) Update(op *task.Operation) error {
	if s.deleted.Load() {
		return task.ErrNotFound
	}
	return s.MemoryStore.Update(op)
}

func (s *deletingStore) Get(id string) (*task.Operation, error) {
	op, err := s.MemoryStore.Get(id)
	if err == nil && s.deleted.Load() && !op.State.Finished() {
		return nil, task.ErrNotFound
	}
	return op, err
}

// TestEventsDeleted: an operation whose row is deleted while it runs is removed from the
// stream and its snapshots.
func TestEventsDeleted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &deletingStore{MemoryStore: task.NewMemoryStore()}
		m := newManager(t, store)
		defer m.Close()
		s := newPipeSite(t, mount(m))
		op := newControlled(t, m, "deleted")
		other := newControlled(t, m, "other")
		time.Sleep(time.Second) // until stored as RUNNING
		r := s.listen(t.Context(), "/events")
		r.want("snapshot deleted RUNNING 0 other RUNNING 0")
		one := s.listen(t.Context(), "/"+op.ID+"/events")
		one.want("operation deleted RUNNING 0")
		store.deleted.Store(true)
		op.end(nil, nil)
		e, err := r.next()
		must(t, err)
		if e.name != "deleted" || e.data != `{"id":"`+op.ID+`"}` {
			t.Errorf("event %s: %s", e.name, e.data)
		}
		one.want("reload")
		one.wantEnd()
		store.deleted.Store(false)
		again := s.listen(t.Context(), "/events")
		again.want("snapshot other RUNNING 0")
		other.end(nil, nil)
		r.want("operation other DONE 100")
	})
}

// TestMessage: lists, events and the response for a single operation have the message.
// Lists truncate a long one, which only another program can have stored.
func TestMessage(t *testing.T) {
	store := task.NewMemoryStore()
	must(t, store.Save(&task.Operation{ID: "foreign", Name: "foreign", State: task.StateFailed, Message: strings.Repeat("ä", long)}))
	m := newManager(t, store)
	s := newSite(t, mount(m))
	said, end := make(chan error), make(chan bool)
	op, err := m.Submit("talks", func(ctx context.Context, _ func(int)) (any, error) {
		said <- task.SetMessage(ctx, "at a.txt")
		<-end
		return nil, nil
	})
	must(t, err)
	defer close(end)
	must(t, <-said)

	var whole, foreign task.Operation
	var list, live struct{ Tasks []listed }
	s.do("GET", "/"+op.ID, 200, &whole)
	s.do("GET", "/", 200, &list)
	snapshot, err := s.listen(t.Context(), "/events").next()
	must(t, err)
	must(t, json.Unmarshal([]byte(snapshot.data), &live))
	for _, got := range []task.Operation{whole, list.Tasks[0].Operation, live.Tasks[0].Operation} {
		if got.ID != op.ID || got.Message != "at a.txt" || got.Owner != op.Owner {
			t.Errorf("got %+v", got)
		}
	}
	s.do("GET", "/foreign", 200, &foreign)
	if n, cut := len(foreign.Message), list.Tasks[1].Message; n != 2*long || len(cut) > long+3 || !strings.HasSuffix(cut, "ä…") {
		t.Errorf("messages of %d and %d bytes", n, len(cut))
	}
}
