package taskhttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskhttp"
)

type listing struct {
	Tasks  []task.Operation
	Cursor string `json:"next_cursor"`
}

func (l listing) names() (names []string) {
	for _, op := range l.Tasks {
		names = append(names, op.Name)
	}
	return names
}

var listTests = []struct {
	query string
	want  []string // the first names
	count int
	more  bool
}{
	{"", []string{"live", "scrub", "scrub", "task 119"}, 50, true},
	{"?limit=1", []string{"live"}, 1, true},
	{"?limit=124", []string{"live"}, 124, false},
	{"?limit=123", []string{"live"}, 123, true},
	{"?limit=500", []string{"live"}, 124, false},
	{"?state=RUNNING", []string{"live"}, 1, false},
	{"?state=FAILED", []string{"scrub"}, 1, false},
	{"?state=FAILED,RUNNING", []string{"live", "scrub"}, 2, false},
	{"?state=FAILED&state=RUNNING", []string{"live", "scrub"}, 2, false},
	{"?state=", []string{"live", "scrub"}, 50, true},
	{"?state=PENDING", nil, 0, false},
	{"?name=scrub", []string{"scrub", "scrub"}, 2, false},
	{"?name=scrub&state=DONE", []string{"scrub"}, 1, false},
	{"?name=task+7&token=x", []string{"task 7"}, 1, false},
	{"?name=%3Cb%3E", nil, 0, false},
	{"?containing=SCR", []string{"scrub", "scrub"}, 2, false},
	{"?containing=sk+11&order=finish", []string{"task 119", "task 118"}, 11, false},
	{"?metadata.pool=tank", []string{"slow"}, 1, false},
	{"?metadata.pool=tank&metadata.disk=sda", []string{"slow"}, 1, false},
	{"?metadata.pool=tank&metadata.disk=sdb", nil, 0, false},
	{"?order=finish", []string{"slow", "scrub", "scrub", "task 119"}, 50, true},
	{"?order=finish&limit=1", []string{"slow"}, 1, true},
	{"?order=finish&state=FAILED,RUNNING", []string{"scrub"}, 1, false},
	{"?order=submission&limit=1", []string{"live"}, 1, true},
	{"?finished_after=2020-01-02T03:04:05.5%2B01:00&limit=1", []string{"scrub"}, 1, true},
	{"?finished_before=2020-01-02T03:04:05Z", nil, 0, false},
	{"?finished_after=9020-01-02T03:04:05Z", nil, 0, false},
}

func TestList(t *testing.T) {
	t.Parallel()
	store, err := task.OpenSQLite(filepath.Join(t.TempDir(), "tasks.db"))
	must(t, err)
	defer store.Close()
	m := newManager(t, store)
	defer m.Close()
	s := newSite(t, mount(m))

	var raw map[string]any
	s.do("GET", "/", 200, &raw)
	if tasks, ok := raw["tasks"].([]any); !ok || len(tasks) != 0 || len(raw) != 1 {
		t.Errorf("empty history: %v", raw)
	}

	slow := newControlled(t, m, "slow", task.WithMetadata(map[string]string{"pool": "tank", "disk": "sda"}))
	for i := range 120 {
		run(t, m, fmt.Sprint("task ", i), nil, nil)
	}
	run(t, m, "scrub", nil, errors.New("no"))
	run(t, m, "scrub", nil, nil)
	slow.end(nil, nil)
	_, err = m.Wait(t.Context(), slow.ID)
	must(t, err)
	live := newControlled(t, m, "live")
	live.update(40)

	for _, test := range listTests {
		var got listing
		answer := s.do("GET", "/"+test.query, 200, &got)
		if names := got.names(); len(names) != test.count || !slices.Equal(names[:len(test.want)], test.want) {
			t.Errorf("%s: %d tasks %q, want %d beginning with %q", test.query, len(names), names, test.count, test.want)
		}
		if (got.Cursor != "") != test.more {
			t.Errorf("%s: next_cursor %q, more: %v", test.query, got.Cursor, test.more)
		}
		if answer.Header.Get("Cache-Control") != "no-store" || answer.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: header %v", test.query, answer.Header)
		}
	}

	listPages(t, m, s)
}

// listPages reads the history page by page while new operations are submitted.
func listPages(t *testing.T, m *task.Manager, s *site) {
	t.Helper()
	var names []string
	var got listing
	for cursor := ""; ; cursor = got.Cursor {
		got = listing{}
		s.do("GET", "/?limit=10&state=DONE&cursor="+cursor, 200, &got)
		names = append(names, got.names()...)
		if got.Cursor == "" {
			break
		}
		run(t, m, "new", nil, nil)
	}
	if len(names) != 122 || names[0] != "scrub" || names[1] != "task 119" || names[120] != "task 0" || names[121] != "slow" {
		t.Errorf("page by page: %d names: %q", len(names), names)
	}
}

func TestListBadParameters(t *testing.T) {
	s := newSite(t, mount(newManager(t, nil)))
	for query, detail := range map[string]string{
		"limit=0":            `parameter limit: "0" is not a number from 1 to 500`,
		"limit=-1":           "parameter limit",
		"limit=501":          "parameter limit",
		"limit=many":         `parameter limit: "many"`,
		"state=running":      `parameter state: "running" is not one of [PENDING`,
		"state=DONE,%FF":     `parameter state: "\xff"`,
		"cursor=nonsense":    `parameter cursor: operation "nonsense" not found`,
		"before=nonsense":    `parameter before: operation "nonsense" not found`,
		"order=name":         `parameter order: "name" is not one of [submission finish]`,
		"finished_after=now": `parameter finished_after: "now" is not a time like 2026-01-02T15:04:05Z; a plus sign is written %2B`,
		"finished_before=2026-01-02T03:04:05+01:00": "parameter finished_before",
		"metadata.pool=a&metadata.pool=b":           `parameter metadata.KEY: "pool" has several values`,
		"state=DONE;limit=1":                        "semicolon",
		"name=%zz":                                  "invalid URL escape",
	} {
		s.fails("GET", "/?"+query, 400, detail)
	}
}

func TestGet(t *testing.T) {
	store := newBrokenStore()
	m := newManager(t, store)
	s := newSite(t, mount(m))
	done := run(t, m, "<b> & co", map[string]int{"disks": 4}, nil)
	live := newControlled(t, m, "live", task.WithMetadata(map[string]string{"pool": "tank"}))
	live.update(30)

	var got task.Operation
	answer := s.do("GET", "/"+done.ID, 200, &got)
	if got.Name != done.Name || got.State != task.StateDone || got.Result.(map[string]any)["disks"] != 4.0 ||
		!got.UpdatedAt.Equal(done.UpdatedAt) {
		t.Errorf("got %+v, want %+v", got, done)
	}
	if answer.Header.Get("X-Content-Type-Options") != "nosniff" || answer.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("header %v", answer.Header)
	}
	got = task.Operation{}
	s.do("GET", "/"+live.ID, 200, &got)
	if got.State != task.StateRunning || got.Progress != 30 || got.Metadata.(map[string]any)["pool"] != "tank" {
		t.Errorf("got %+v", got)
	}
	s.fails("GET", "/nonsense", 404, "nonsense: operation not found")
	s.fails("GET", "/"+done.ID+"%2Fx", 404, "operation not found")

	store.fail(true)
	s.fails("GET", "/"+done.ID, 500, "disk I/O error")
	s.fails("GET", "/", 500, "disk I/O error")
	s.fails("GET", "/"+done.ID+"/wait", 500, "disk I/O error")
	s.fails("GET", "/"+done.ID+"/events", 500, "disk I/O error")
	s.fails("POST", "/"+done.ID+"/cancel", 500, "disk I/O error")
	s.do("GET", "/"+live.ID, 200, nil) // served from memory
	store.fail(false)
}

func TestCancel(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil, task.WithLimit(1))
	s := newSite(t, mount(m))
	running := newControlled(t, m, "running")
	waiting := newControlled(t, m, "waiting")

	tests := []struct {
		name   string
		path   string
		status int
		states []task.State
	}{
		{"pending", waiting.ID, 202, []task.State{task.StatePending, task.StateCancelled}},
		{"pending again", waiting.ID, 200, []task.State{task.StateCancelled}},
		{"running", running.ID, 202, []task.State{task.StateRunning, task.StateCancelled}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var got task.Operation
			s.do("POST", "/"+test.path+"/cancel", test.status, &got, "Sec-Fetch-Site", "same-origin")
			if got.ID != test.path || !slices.Contains(test.states, got.State) {
				t.Errorf("got %+v, want a state of %v", got, test.states)
			}
			var end task.Operation
			s.do("GET", "/"+test.path+"/wait", 200, &end)
			if end.State != task.StateCancelled {
				t.Errorf("wait answers with the state %s", end.State)
			}
		})
	}
	why := newControlled(t, m, "why")
	s.fails("POST", "/"+why.ID+"/cancel?reason="+strings.Repeat("x", 1001), 400, "reason")
	s.do("POST", "/"+why.ID+"/cancel?reason=maintenance%0Atonight", 202, nil)
	if got, err := m.Wait(t.Context(), why.ID); err != nil || got.State != task.StateCancelled || got.Error != "cancelled over HTTP from 127.0.0.1: maintenance\ntonight" {
		t.Errorf("%+v, %v", got, err)
	}
	answer := s.request(t.Context(), "POST", "/"+running.ID+"/cancel", strings.NewReader(strings.Repeat("ignored", 1<<20)))
	answer.Body.Close()
	if answer.StatusCode != 200 {
		t.Errorf("cancel of a cancelled operation, with a body: %s", answer.Status)
	}

	s.fails("POST", "/nonsense/cancel", 404, "operation not found")
}

// TestCancelOfAnother cancels an operation that another manager runs, if the store can pass
// the request on.
func TestCancelOfAnother(t *testing.T) {
	t.Parallel()
	store := task.NewMemoryStore()
	s, unable := newSite(t, mount(newManager(t, store))), newSite(t, mount(newManager(t, testkit.Bare(store))))
	other := newManager(t, store)
	op := newControlled(t, other, "another's")
	unable.fails("POST", "/"+op.ID+"/cancel", 501, "unsupported")
	var got task.Operation
	s.do("POST", "/"+op.ID+"/cancel", 202, &got)
	if !got.Cancelling && !got.State.Finished() {
		t.Errorf("got %+v", got)
	}
	if s.do("GET", "/"+op.ID+"/wait", 200, &got); got.State != task.StateCancelled {
		t.Errorf("got %+v", got)
	}
}

// TestCancelPending: the response does not wait until CANCELLED is stored.
func TestCancelPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newBrokenStore()
		m := newManager(t, store, task.WithLimit(1))
		s := newPipeSite(t, mount(m))
		newControlled(t, m, "running")
		op := newControlled(t, m, "pending")
		synctest.Wait()
		store.fail(true)
		for _, path := range []string{"POST /cancel", "POST /cancel", "GET /wait?timeout=1s"} {
			method, path, _ := strings.Cut(path, " ")
			status := map[string]int{"POST": 202, "GET": 200}[method]
			var got task.Operation
			s.do(method, "/"+op.ID+path, status, &got)
			if got.State.Finished() {
				t.Errorf("%s %s answers with %s, which is not stored", method, path, got.State)
			}
		}
		store.fail(false)
		var got task.Operation
		s.do("GET", "/"+op.ID+"/wait?timeout=1m", 200, &got)
		if got.State != task.StateCancelled {
			t.Errorf("wait answers with the state %s", got.State)
		}
		s.do("POST", "/"+op.ID+"/cancel", 200, &got)
		m.Close()
	})
}

func TestCrossOrigin(t *testing.T) {
	m := newManager(t, nil)
	s := newSite(t, mount(m))
	op := newControlled(t, m, "mine")
	for _, header := range [][]string{
		{"Sec-Fetch-Site", "cross-site"},
		{"Sec-Fetch-Site", "same-site"},
		{"Origin", "https://evil.example"},
		{"Origin", "null"},
	} {
		s.fails("POST", "/"+op.ID+"/cancel", 403, "cross-origin", header...)
		s.do("GET", "/", 200, nil, header...) // the browser hides the response from other origins
	}
	if op, _ := m.Get(op.ID); op.State.Finished() {
		t.Errorf("state %s after a refused cancel", op.State)
	}
	s.fails("POST", "/"+op.ID+"/cancel", 403, `the page at "https://nas.example" may do this, its proxy must pass on the Host header`,
		"Origin", "https://nas.example")
	s.do("POST", "/"+op.ID+"/cancel", 202, nil, "Origin", strings.TrimSuffix(s.url, prefix))
}

// TestTrustedOrigin: a page of a trusted origin may cancel, a page of another origin may
// not.
func TestTrustedOrigin(t *testing.T) {
	eachProtocol(t, func(t *testing.T, serve func(http.Handler) *site) {
		m := newManager(t, nil)
		h := taskhttp.Handler(m, taskhttp.TrustedOrigin("https://nas.example"), taskhttp.TrustedOrigin("http://nas:8080"))
		s := serve(http.StripPrefix(prefix, h))
		for origin, status := range map[string]int{
			"https://nas.example": 202, "http://nas:8080": 202, "http://nas.example": 403, "https://nas.example.evil": 403, "null": 403,
		} {
			op := newControlled(t, m, "mine")
			resp := s.request(t.Context(), "POST", "/"+op.ID+"/cancel", nil, "Origin", origin, "Sec-Fetch-Site", "cross-site")
			resp.Body.Close()
			if resp.StatusCode != status {
				t.Errorf("from %s: %s, want %d", origin, resp.Status, status)
			}
		}
	})
	for _, origin := range []string{"", "nas.example", "https://nas.example/", "null"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("no panic for the origin %q", origin)
				}
			}()
			taskhttp.Handler(newManager(t, nil), taskhttp.TrustedOrigin(origin))
		}()
	}
}

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		s := newPipeSite(t, mount(m))
		finished := run(t, m, "finished", "well", nil)
		live := newControlled(t, m, "live")

		tests := []struct {
			id, query string
			end       time.Duration // when the operation ends; 0 for never
			state     task.State
			after     time.Duration
		}{
			{finished.ID, "", 0, task.StateDone, 0},
			{live.ID, "?timeout=0", 0, task.StateRunning, 0},
			{live.ID, "", 0, task.StateRunning, 30 * time.Second},
			{live.ID, "?timeout=1m30s", 0, task.StateRunning, 90 * time.Second},
			{live.ID, "?timeout=10m", 4 * time.Minute, task.StateFailed, 4 * time.Minute},
		}
		for _, test := range tests {
			if test.end > 0 {
				time.AfterFunc(test.end, func() { live.end(nil, errors.New("no")) })
			}
			start := time.Now()
			var got task.Operation
			s.do("GET", "/"+test.id+"/wait"+test.query, 200, &got)
			if passed := time.Since(start).Truncate(time.Second); got.State != test.state || passed != test.after {
				t.Errorf("%s: %s after %v, want %s after %v", test.query, got.State, passed, test.state, test.after)
			}
		}
		for _, timeout := range []string{"-1s", "10m1s", "soon", "30"} {
			s.fails("GET", "/"+live.ID+"/wait?timeout="+timeout, 400, `parameter timeout: "`+timeout)
		}
		start := time.Now()
		s.do("HEAD", "/"+newControlled(t, m, "endless").ID+"/wait?timeout=1h0m", 400, nil)
		s.do("HEAD", "/"+newControlled(t, m, "endless").ID+"/wait", 200, nil)
		if passed := time.Since(start); passed != 0 {
			t.Errorf("HEAD took %v", passed)
		}
		s.fails("GET", "/nonsense/wait", 404, "operation not found")
		m.Close()
	})
}

func TestWaitStops(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		stop func(s *site, disconnect context.CancelFunc, m *task.Manager, op *controlled)
		want string // the state in the response; empty if there is no response
	}{
		{"client disconnects", func(_ *site, disconnect context.CancelFunc, _ *task.Manager, _ *controlled) { disconnect() }, ""},
		{"server shut down", func(s *site, _ context.CancelFunc, _ *task.Manager, _ *controlled) {
			must(s.t, s.server.Shutdown(context.Background()))
		}, "RUNNING"},
		{"manager closed", func(s *site, _ context.CancelFunc, m *task.Manager, _ *controlled) { m.Close() }, "FAILED"},
		{"cancelled", func(s *site, _ context.CancelFunc, m *task.Manager, op *controlled) { m.Cancel(op.ID) }, "CANCELLED"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, nil)
				returned := make(chan time.Time, 1)
				h := mount(m)
				s := newPipeSite(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					h.ServeHTTP(w, r)
					returned <- time.Now()
				}))
				op := newControlled(t, m, "live")
				ctx, disconnect := context.WithCancel(t.Context())
				start := time.Now()
				stopped := make(chan bool)
				time.AfterFunc(3*time.Second, func() { test.stop(s, disconnect, m, op); close(stopped) })
				r, _ := http.NewRequestWithContext(ctx, "GET", s.url+"/"+op.ID+"/wait?timeout=10m", nil)
				answer, err := s.client.Do(r)
				body := ""
				if err == nil {
					raw, _ := io.ReadAll(answer.Body)
					answer.Body.Close()
					body = string(raw)
				}
				if passed := (<-returned).Sub(start).Truncate(time.Second); passed != 3*time.Second {
					t.Errorf("the wait took %v", passed)
				}
				if test.want == "" && err == nil || !strings.Contains(body, test.want) {
					t.Errorf("error %v, body %q, want %q", err, body, test.want)
				}
				<-stopped
				disconnect()
				m.Close()
			})
		})
	}
}

func TestWaitForStoring(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := newBrokenStore()
		m := newManager(t, store)
		s := newPipeSite(t, mount(m))
		op := newControlled(t, m, "live")
		synctest.Wait()
		store.fail(true)
		op.end(nil, nil)
		time.AfterFunc(time.Second, func() { m.Close() })
		s.fails("GET", "/"+op.ID+"/wait", 503, "manager closed")
		store.fail(false)
		m.Close()
	})
}

// TestServerTimeouts: the server's timeouts do not end streams or waits.
func TestServerTimeouts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		s := newPipeSite(t, mount(m), func(s *http.Server) {
			s.ReadTimeout, s.WriteTimeout = 2*time.Second, 2*time.Second
		})
		op := newControlled(t, m, "live")
		r := s.listen(t.Context(), "/events")
		r.want("snapshot live RUNNING 0")
		go func() {
			time.Sleep(time.Hour)
			op.update(50)
			time.Sleep(time.Minute)
			op.end(nil, nil)
		}()
		r.want("operation live RUNNING 50")
		waited := make(chan bool)
		go func() { s.do("GET", "/"+op.ID+"/wait?timeout=10m", 200, nil); close(waited) }()
		r.want("operation live DONE 100")
		<-waited
		m.Close()
		r.want("closed")
		r.wantEnd()
	})
}

func TestMethods(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil)
	s := newSite(t, mount(m))
	id := "/" + run(t, m, "done", nil, nil).ID
	tests := []struct {
		method, path string
		status       int
		allow        string
	}{
		{"HEAD", "/", 200, ""},
		{"HEAD", id, 200, ""},
		{"HEAD", id + "/wait", 200, ""},
		{"HEAD", "/events", 200, ""},
		{"HEAD", id + "/events", 200, ""},
		{"HEAD", "/nonsense/events", 404, ""},
		{"HEAD", "/nonsense", 404, ""},
		{"HEAD", "/ui", 200, ""},
		{"OPTIONS", "/", 204, "GET, HEAD, OPTIONS"},
		{"OPTIONS", id + "/cancel", 204, "POST, OPTIONS"},
		{"OPTIONS", "/a/b/c", 404, ""},
		{"POST", "/", 405, "GET, HEAD, OPTIONS"},
		{"DELETE", id, 405, "GET, HEAD, OPTIONS"},
		{"GET", id + "/cancel", 405, "POST, OPTIONS"},
		{"PUT", "/events", 405, "GET, HEAD, OPTIONS"},
		{"POST", "/ui", 405, "GET, HEAD, OPTIONS"},
		{"GET", "/a/b/c", 404, ""},
		{"GET", id + "/", 404, ""},
		{"GET", id + "/nothing", 404, ""},
	}
	for _, test := range tests {
		answer := s.do(test.method, test.path, test.status, nil)
		if got := answer.Header.Get("Allow"); got != test.allow {
			t.Errorf("%s %s: Allow %q, want %q", test.method, test.path, got, test.allow)
		}
		if test.method != "HEAD" && test.status >= 400 {
			s.fails(test.method, test.path, test.status, "")
		}
	}
}

// TestPaths: the handler may be mounted without an http.ServeMux.
func TestPaths(t *testing.T) {
	m := newManager(t, nil)
	h := taskhttp.Handler(m)
	for path, status := range map[string]int{
		"": 200, "/": 200, "//": 404, "/.": 404, "/../ui": 404, "/ui": 200, "/ui/": 308, "/ui//": 404, "//ui": 404, "/ui/x": 404,
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.Path = path
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != status {
			t.Errorf("path %q: status %d, want %d", path, w.Code, status)
		}
	}
}

func TestError(t *testing.T) {
	tests := []struct {
		err    error
		status int
	}{
		{fmt.Errorf("pool: %w", task.ErrNotFound), 404},
		{fmt.Errorf("a: %w", task.ErrExists), 409},
		{fmt.Errorf("submit: %w", task.ErrClosed), 503},
		{fmt.Errorf("watch: %w", task.ErrLagged), 503},
		{fmt.Errorf("prune: %w", errors.ErrUnsupported), 501},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), 504},
		{&http.MaxBytesError{Limit: 10}, 413},
		{errors.New("disk full"), 500},
		{nil, 500},
	}
	for _, test := range tests {
		r := httptest.NewRequest("GET", "/x?token=secret", nil)
		w := httptest.NewRecorder()
		w.Header().Set("ETag", `"x"`)
		taskhttp.Error(w, r, test.err)
		text := "unknown error"
		if test.err != nil {
			text = test.err.Error()
		}
		want := fmt.Sprintf(`{"type":"about:blank","title":%q,"status":%d,"detail":%q,"instance":"/x"}`+"\n",
			http.StatusText(test.status), test.status, text)
		if w.Code != test.status || w.Body.String() != want || w.Header().Get("ETag") != "" {
			t.Errorf("%v: status %d, header %v, body %s, want %s", test.err, w.Code, w.Header(), w.Body, want)
		}
	}
}

func TestAccepted(t *testing.T) {
	m := newManager(t, nil)
	op := run(t, m, "started", nil, nil)
	for _, test := range []struct{ base, target, location string }{
		{"/api/tasks", "/api/pools", "./tasks/ID"},
		{"/api/tasks/", "/api/pools", "./tasks/ID"},
		{"/api/tasks", "/api/pools/a%2Fb/scrub?x=/", "../../tasks/ID"},
		{"/api/tasks", "/api/pools/", "../tasks/ID"},
		{"/api/tasks", "/api/tasks", "./tasks/ID"},
		{"/api/tasks", "/api/tasks/", "./ID"},
		{"/api/tasks", "/api/tasks/x/again", "../ID"},
		{"/api/tasks", "/", "./api/tasks/ID"},
		{"/api/tasks", "/other//x", "../../api/tasks/ID"},
		{"/", "/scrub", "./ID"},
		{"/api/tasks", "http://nas.example/api/pools", "./tasks/ID"},
		{"/api/tasks", "*", "/api/tasks/ID"},
		{"../tasks", "/api/pools", "../tasks/ID"},
	} {
		w, r := httptest.NewRecorder(), &http.Request{RequestURI: test.target}
		taskhttp.Accepted(w, r, test.base, op)
		if got := strings.ReplaceAll(w.Header().Get("Location"), op.ID, "ID"); w.Code != 202 || got != test.location ||
			w.Header().Get("Content-Type") != "application/json" || !strings.Contains(w.Body.String(), op.ID) {
			t.Errorf("%s from %s: status %d, header %v, body %s", test.base, test.target, w.Code, w.Header(), w.Body)
		}
		if base, err := url.Parse("http://x/prefix" + test.target); err == nil && strings.HasPrefix(test.target, "/") && test.base != "../tasks" {
			got, err := base.Parse(w.Header().Get("Location"))
			if want := "/prefix" + strings.TrimSuffix(test.base, "/") + "/" + op.ID; err != nil || got.Path != want {
				t.Errorf("%s from %s: %v is %s, %v, want %s", test.base, test.target, w.Header(), got, err, want)
			}
		}
	}
}

// TestExists: when an application rejects a second request, the response names the existing
// operation.
func TestExists(t *testing.T) {
	w := httptest.NewRecorder()
	w.Header().Set("Location", "../ID")
	taskhttp.Error(w, httptest.NewRequest("POST", "/scrub", nil), fmt.Errorf("scrub: %w", task.ErrExists))
	if w.Code != 409 || w.Header().Get("Location") != "../ID" {
		t.Errorf("status %d, header %v", w.Code, w.Header())
	}
}

// TestWaitDeadline: if a wrapper's deadline ends a wait, there is a response, even if the
// request body never arrives.
func TestWaitDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		defer m.Close()
		op := newControlled(t, m, "live")
		h := mount(m)
		s := newPipeSite(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
			defer cancel()
			h.ServeHTTP(w, r.WithContext(ctx))
		}), func(server *http.Server) { server.ReadTimeout = 5 * time.Second })
		var got task.Operation
		s.do("GET", "/"+op.ID+"/wait", 200, &got)
		if got.State != task.StateRunning {
			t.Errorf("got %+v", got)
		}

		start := time.Now()
		never, end := io.Pipe()
		defer end.Close()
		r, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/"+op.ID+"/wait?timeout=0s", never)
		must(t, err)
		r.ContentLength = 10
		answer, err := s.client.Do(r)
		must(t, err)
		answer.Body.Close()
		if took := time.Since(start); answer.StatusCode != 200 || took > 6*time.Second {
			t.Errorf("status %d after %v", answer.StatusCode, took)
		}
	})
}

// A slowLister keeps searching until its caller's context is done.
type slowLister struct {
	*task.MemoryStore
	searching chan struct{}
	ended     chan error
}

func (s slowLister) ListFiltered(f task.Filter, _, _ int) ([]*task.Operation, error) {
	close(s.searching)
	select {
	case <-f.Context.Done():
	case <-time.After(10 * time.Second):
	}
	s.ended <- f.Context.Err()
	return nil, f.Context.Err()
}

// TestListEndsWithClient: the search for a list ends when the client disconnects.
func TestListEndsWithClient(t *testing.T) {
	t.Parallel()
	store := slowLister{task.NewMemoryStore(), make(chan struct{}), make(chan error, 1)}
	s := newSite(t, mount(newManager(t, store)))
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-store.searching
		cancel()
	}()
	req, err := http.NewRequestWithContext(ctx, "GET", s.url+"/?name=rare", nil)
	must(t, err)
	if resp, err := s.client.Do(req); err == nil {
		resp.Body.Close()
		t.Error("there was a response")
	}
	if err := <-store.ended; err == nil {
		t.Error("the search continued for 10 s")
	}
}

// TestPageOptions: the page has the application's heading and link, escaped as text.
func TestPageOptions(t *testing.T) {
	page := func(opts ...taskhttp.Option) string {
		w := httptest.NewRecorder()
		taskhttp.Handler(newManager(t, nil), opts...).ServeHTTP(w, httptest.NewRequest("GET", "/ui", nil))
		return w.Body.String()
	}
	if got := page(); !strings.Contains(got, "<h1>Tasks</h1><span") || !strings.Contains(got, "<title>Tasks</title>") {
		t.Error("the default heading is missing")
	}
	got := page(taskhttp.Title("NAS & <b>"), taskhttp.Home("My <NAS>", `../../?a="b"&c`))
	for _, want := range []string{
		"<title>NAS &amp; &lt;b&gt;</title>",
		`<h1>NAS &amp; &lt;b&gt;</h1><a class="button" href="../../?a=&#34;b&#34;&amp;c">My &lt;NAS&gt;</a>`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
}

// TestRunAgain: the results of the application's function determine the response.
func TestRunAgain(t *testing.T) {
	m := newManager(t, nil)
	done := run(t, m, "scrub", nil, nil)
	live := newControlled(t, m, "live")
	var again func(op *task.Operation) (*task.Operation, error)
	h := taskhttp.Handler(m, taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) { return again(op) }))
	s := newSite(t, http.StripPrefix(prefix, h))

	var asked *task.Operation
	again = func(op *task.Operation) (*task.Operation, error) {
		asked = op
		return m.Submit(op.Name, func(context.Context, func(int)) (any, error) { return nil, nil })
	}
	var op task.Operation
	path := "/" + done.ID + "/again"
	answer := s.do("POST", path, 202, &op)
	location, err := answer.Location()
	must(t, err)
	if asked == nil || asked.ID != done.ID || op.Name != "scrub" || op.ID == done.ID || location.Path != prefix+"/"+op.ID {
		t.Errorf("asked for %v, got %v at %v", asked, op, location)
	}
	s.do("GET", strings.TrimPrefix(location.Path, prefix), 200, nil)

	for _, test := range []struct {
		name   string
		op     *task.Operation
		err    error
		status int
		detail string
	}{
		{"an unfinished one exists", live.Operation, fmt.Errorf("busy: %w", task.ErrExists), 202, ""},
		{"a finished one exists", done, fmt.Errorf("twice: %w", task.ErrExists), 409, "twice"},
		{"one exists that is not returned", nil, task.ErrExists, 409, "exist"},
		{"not that task", nil, fmt.Errorf("no scrub: %w", errors.ErrUnsupported), 501, "no scrub"},
		{"closed", nil, task.ErrClosed, 503, "closed"},
		{"another error", live.Operation, errors.New("disk ada3"), 500, "disk ada3"},
		{"nothing", nil, nil, 500, "no task"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &site{t, s.url, s.client, s.server}
			again = func(*task.Operation) (*task.Operation, error) { return test.op, test.err }
			if test.status == 202 {
				s.do("POST", path, 202, &op)
				if op.ID != test.op.ID {
					t.Errorf("the response has %s, want %s", op.ID, test.op.ID)
				}
				return
			}
			s.fails("POST", path, test.status, test.detail)
		})
	}
	again = func(*task.Operation) (*task.Operation, error) { panic("lost") }
	s.fails("POST", path, 500, "panic: lost")
	again = func(*task.Operation) (*task.Operation, error) { t.Error("called"); return nil, nil }
	s.fails("POST", "/"+live.ID+"/again", 409, "has not finished")
	s.fails("POST", "/unknown/again", 404, "not found")
	s.fails("POST", path, 403, "cross-origin", "Sec-Fetch-Site", "cross-site")
	newSite(t, mount(m)).fails("POST", path, 501, "does not run tasks again")
}

// TestRunAgainOffered: the page offers to run an operation again only if the server
// supports it.
func TestRunAgainOffered(t *testing.T) {
	hook := taskhttp.RunAgain(func(*task.Operation) (*task.Operation, error) { return nil, nil })
	for want, opts := range map[string][]taskhttp.Option{"<body>": nil, "<body data-again>": {hook}} {
		w := httptest.NewRecorder()
		taskhttp.Handler(newManager(t, nil), opts...).ServeHTTP(w, httptest.NewRequest("GET", "/ui", nil))
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("the page lacks %s", want)
		}
	}
}
