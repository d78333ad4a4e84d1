package openapitest

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskhttp"
)

func TestMain(m *testing.M) { testkit.Main(m, nil) }

// A store fails while broken is set. While deleted is set, it has no unfinished
// operation.
type store struct {
	*task.MemoryStore
	broken, deleted atomic.Bool
}

func (s *store) Get(id string) (*task.Operation, error) {
	if s.broken.Load() {
		return nil, testkit.ErrDisk
	}
	op, err := s.MemoryStore.Get(id)
	if err == nil && s.deleted.Load() && !op.State.Finished() {
		return nil, task.ErrNotFound
	}
	return op, err
}

func (s *store) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	if s.broken.Load() {
		return nil, testkit.ErrDisk
	}
	return s.MemoryStore.ListFiltered(f, limit, offset)
}

func (s *store) Update(op *task.Operation) error {
	if s.broken.Load() {
		return testkit.ErrDisk
	}
	if s.deleted.Load() {
		return task.ErrNotFound
	}
	return s.MemoryStore.Update(op)
}

// A site is a manager, its server, and operations in several states.
type site struct {
	*checker
	m                  *task.Manager
	store              *store
	url                string
	done, failed, live string // IDs; failed can't be run again
	end                func() // ends live
}

func newSite(t *testing.T) *site {
	db := &store{MemoryStore: task.NewMemoryStore()}
	m := testkit.NewManager(t, db)
	url := serve(t, taskhttp.Handler(m, taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) {
		if op.State == task.StateFailed {
			return nil, testkit.ErrDisk
		}
		return m.Submit(op.Name, testkit.Nothing)
	})))
	s := &site{checker: newChecker(t, url), m: m, store: db, url: url}
	s.done = finished(t, m, map[string]any{"disks": []int{4, 2}}, nil)
	s.failed = finished(t, m, strings.Repeat("x", 100_000), errors.New(strings.Repeat("x", 100_000)))
	s.live, s.end = running(t, m)
	return s
}

// finished returns the ID of an operation that has ended with that result and error.
func finished(t *testing.T, m *task.Manager, result any, err error) string {
	t.Helper()
	op := testkit.Submit(t, m, func(context.Context, func(int)) (any, error) { return result, err },
		task.WithMetadata(map[string]string{"pool": "tank"}))
	return testkit.Wait(t, m, op.ID).ID
}

// running returns the ID of a RUNNING operation, and a function that ends it. A cancel
// ends it, too.
func running(t *testing.T, m *task.Manager) (id string, end func()) {
	t.Helper()
	ended := make(chan struct{})
	op := testkit.Submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
		select {
		case <-ended:
		case <-ctx.Done():
		}
		return nil, context.Cause(ctx)
	})
	testkit.Must(t, testkit.Until(func() bool {
		op, ok := m.Get(op.ID)
		return ok && op.State == task.StateRunning
	}))
	return op.ID, func() { close(ended) }
}

// TestExchanges: the requests and responses of every route are as described, with
// every documented status.
func TestExchanges(t *testing.T) {
	s := newSite(t)
	s.askList()
	s.askOne()
	s.askAgain()
	s.askStatic()
	s.askHead()
	s.askUndescribed()
	s.askBroken()
	s.askCancel()
	s.askStreams()
	s.askClosed()
	s.askUnable()
	s.complete()
}

func (s *site) request(route, id, query string, status int, header ...string) {
	s.t.Helper()
	s.ask(exchange{url: s.url, route: route, id: id, query: query, status: status, header: header})
}

func (s *site) askList() {
	for _, query := range []string{
		"",
		"?state=DONE,FAILED&state=RUNNING&limit=2&order=submission&name=test&containing=ES&metadata.pool=tank",
		"?order=finish&finished_after=2020-01-02T03:04:05Z&finished_before=2100-01-02T03:04:05%2B01:00&limit=1",
		"?before=" + s.live,
		"?limit=500&cursor=" + s.failed,
	} {
		s.request("GET /", "", query, 200)
	}
	for _, query := range []string{"?limit=none", "?limit=0", "?limit=501", "?state=ODD", "?state=DONE,ODD", "?order=none", "?finished_after=today", "?finished_before=1"} {
		s.ask(exchange{url: s.url, route: "GET /", query: query, status: 400, invalid: true})
	}
	s.request("GET /", "", "?cursor=unknown", 400)
}

func (s *site) askOne() {
	for _, route := range []string{"GET /{id}", "GET /{id}/result", "GET /{id}/wait", "GET /{id}/events", "POST /{id}/cancel"} {
		s.request(route, s.done, "", 200)
		s.request(route, s.failed, "", 200)
		s.request(route, "unknown", "", 404)
	}
	s.request("GET /{id}", s.live, "", 200)
	s.request("GET /{id}/result", s.live, "", 404)
	s.request("GET /{id}/wait", s.live, "?timeout=0", 200)
	for _, timeout := range []string{"", "0", "30s", "1m30s", "1.5m0.5ms", "0h1ms", ".5m", "5.s", "%2B7us", "7µs", "7μs", "3ns"} {
		s.request("GET /{id}/wait", s.done, "?timeout="+timeout, 200)
	}
	for _, timeout := range []string{"soon", "30", "-1s", "1m%2030s", "5d", "."} {
		s.ask(exchange{url: s.url, route: "GET /{id}/wait", id: s.live, query: "?timeout=" + timeout, status: 400, invalid: true})
	}
	s.request("GET /{id}/wait", s.live, "?timeout=11m", 400) // no pattern can say that
	s.request("GET /{id}/events", s.done, "", 204, "Last-Event-ID", "DONE")
}

func (s *site) askAgain() {
	s.request("POST /{id}/again", s.done, "", 202)
	s.request("POST /{id}/again", "unknown", "", 404)
	s.request("POST /{id}/again", s.live, "", 409)
	s.request("POST /{id}/again", s.failed, "", 500)
	for _, route := range []string{"POST /{id}/cancel", "POST /{id}/again"} {
		s.request(route, s.done, "", 403, "Origin", "https://other.example")
	}
}

func (s *site) askStatic() {
	for _, path := range []string{"/ui", "/openapi.json"} {
		s.request("GET "+path, "", "", 200)
		response, err := http.Get(s.url + path)
		testkit.Must(s.t, err)
		_, err = io.Copy(io.Discard, response.Body)
		testkit.Must(s.t, err)
		testkit.Must(s.t, response.Body.Close())
		tag := response.Header.Get("ETag")
		s.request("GET "+path, "", "", 304, "If-None-Match", tag)
		s.request("GET "+path, "", "", 304, "If-None-Match", `"other", W/`+tag)
		s.request("GET "+path, "", "", 200, "If-None-Match", `"other"`)
	}
	s.request("GET /ui/", "", "", 308)
}

func (s *site) askHead() {
	for _, path := range []string{"/", "/{id}", "/{id}/result", "/{id}/wait", "/{id}/events", "/events", "/ui", "/openapi.json"} {
		s.request("HEAD "+path, s.done, "", 200)
	}
	s.request("HEAD /{id}", "unknown", "", 404)
	s.request("HEAD /ui/", "", "", 308)
}

func (s *site) askUndescribed() {
	s.askProblem(s.url, "GET", "/a/b/c", 404, "")
	s.askProblem(s.url, "DELETE", "/"+s.done, 405, "GET, HEAD, OPTIONS")
	s.askProblem(s.url, "GET", "/"+s.done+"/cancel", 405, "POST, OPTIONS")
	s.askProblem(s.url, "OPTIONS", "/"+s.done, 204, "GET, HEAD, OPTIONS")
}

func (s *site) askBroken() {
	s.store.broken.Store(true)
	defer s.store.broken.Store(false)
	for _, route := range []string{"GET /", "GET /{id}", "GET /{id}/result", "GET /{id}/wait", "GET /{id}/events", "POST /{id}/cancel"} {
		s.request(route, s.done, "", 500)
	}
}

func (s *site) askCancel() {
	id, _ := running(s.t, s.m)
	s.ask(exchange{url: s.url, route: "POST /{id}/cancel", id: id, query: "?reason=" + strings.Repeat("x", 1001), status: 400, invalid: true})
	s.request("POST /{id}/cancel", id, "?reason="+strings.Repeat("é", 501), 400) // 1002 bytes
	s.request("POST /{id}/cancel", id, "?reason=late", 202)
	testkit.Wait(s.t, s.m, id)
}

// askStreams reads a stream of all operations from its start until the manager, which
// can't store the final state of one operation, has closed.
func (s *site) askStreams() {
	s.ask(exchange{url: s.url, route: "GET /events", status: 200, header: []string{"Last-Event-ID", "expired"}, begun: func() {
		finished(s.t, s.m, nil, nil)
		s.store.deleted.Store(true)
		s.end()
		_, err := s.m.Wait(s.t.Context(), s.live)
		if !errors.Is(err, task.ErrNotFound) {
			s.t.Errorf("Wait for a deleted operation: %v", err)
		}
		s.store.deleted.Store(false)
		s.live, _ = running(s.t, s.m)
		s.store.broken.Store(true)
		if err := s.m.Close(); err == nil {
			s.t.Error("Close has stored a final state in a broken store")
		}
		s.store.broken.Store(false)
	}})
}

func (s *site) askClosed() {
	s.request("GET /events", "", "", 503)
	s.request("GET /{id}/wait", s.live, "", 503)
	s.request("POST /{id}/again", s.done, "", 503)
}

// askUnable makes requests that need an ability that a store, the program or a wrapper
// of the handler lacks.
func (s *site) askUnable() {
	bare := testkit.Bare(task.NewMemoryStore())
	m, other := testkit.NewManager(s.t, bare), testkit.NewManager(s.t, bare)
	h := taskhttp.Handler(m)
	s.url = serve(s.t, h)
	s.request("POST /{id}/again", finished(s.t, m, nil, nil), "", 501)
	id, end := running(s.t, other)
	defer end()
	s.request("POST /{id}/cancel", id, "", 501)

	type unflushable struct{ http.ResponseWriter }
	s.url = serve(s.t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(unflushable{w}, r) }))
	s.request("GET /events", "", "", 500)
}

// TestFaultsFound: the checker finds responses that are not as described.
func TestFaultsFound(t *testing.T) {
	c := newSite(t).checker
	const (
		object                           = `{"id":"1","name":"n","state":"DONE","progress":100,"created_at":"2026-01-01T00:00:00Z","updated_at":"2026-01-01T00:00:00.5Z"}`
		problem                          = `{"type":"about:blank","title":"Not Found","status":404}`
		jsonType, problemType, eventType = "application/json", "application/problem+json", "text/event-stream"
	)
	for _, tt := range []struct {
		route       string
		status      int
		contentType string
		body, want  string
	}{
		{"GET /1", 200, jsonType, object, ""},
		{"GET /1", 200, jsonType, strings.Replace(object, "DONE", "WELL", 1), "enum"},
		{"GET /1", 200, jsonType, strings.Replace(object, "100", "101", 1), "maximum"},
		{"GET /1", 200, jsonType, strings.Replace(object, "100", "1.5", 1), "integer"},
		{"GET /1", 200, jsonType, strings.Replace(object, `"id":"1",`, "", 1), "id"},
		{"GET /1", 200, jsonType, strings.Replace(object, "id", "colour", 1), "colour"},
		{"GET /1", 200, jsonType, strings.Replace(object, "00.5Z", "00.5", 1), "date-time"},
		{"GET /1", 200, jsonType, object + "}", "invalid JSON"},
		{"GET /1", 200, "text/plain", object, "content type"},
		{"GET /1", 418, jsonType, object, "not documented"},
		{"GET /1", 404, problemType, problem, ""},
		{"GET /1", 404, problemType, strings.Replace(problem, "404", "200", 1), "minimum"},
		{"HEAD /1", 200, jsonType, object, "unexpected body"},
		{"HEAD /1", 200, "", "", "content type"},
		{"GET /ui", 304, "", "page", "unexpected body"},
		{"GET /ui/", 308, "", "", "Location"},
		{"GET /ui", 304, "", "", "ETag"},
		{"GET /1/result", 200, jsonType, "1", "Content-Disposition"},
		{"POST /1/again", 202, jsonType, object, "Location"},
		{"GET /events", 200, eventType, "event: operation\ndata: " + object + "\n\n", ""},
		{"GET /events", 200, eventType, "event: operation\ndata: {}\n\n", "operation"},
		{"GET /events", 200, eventType, "event: other\ndata: {}\n\n", "other"},
		{"GET /events", 200, eventType, "nothing\n\n", "line"},
	} {
		method, path, _ := strings.Cut(tt.route, " ")
		r := httptest.NewRequest(method, path, nil)
		in := c.find(r, strings.Replace(path, "1", "{id}", 1))
		response := &http.Response{StatusCode: tt.status, Request: r, Header: http.Header{"Content-Type": {tt.contentType}}}
		err := c.validate(in, response, []byte(tt.body))
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s, status %d, body %s: %v, want %q", tt.route, tt.status, tt.body, err, tt.want)
		}
	}
}
