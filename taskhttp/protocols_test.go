package taskhttp_test

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
)

// eachProtocol runs f as a subtest for each protocol. serve starts a server and a client
// that use only this protocol.
func eachProtocol(t *testing.T, f func(t *testing.T, serve func(http.Handler) *site)) {
	tests := []struct {
		name  string
		major int // of the HTTP version
		tls   bool
	}{
		{"HTTP1", 1, false},
		{"HTTP2", 2, true},
		{"HTTP2Unencrypted", 2, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f(t, func(h http.Handler) *site { return newProtocolSite(t, h, test.major, test.tls) })
		})
	}
}

func newProtocolSite(t *testing.T, h http.Handler, major int, tls bool) *site {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != major || (r.TLS != nil) != tls {
			t.Errorf("request over %s, TLS %v", r.Proto, r.TLS != nil)
		}
		strict(t, h, 2*time.Millisecond).ServeHTTP(w, r)
	}))
	if tls {
		s.EnableHTTP2 = major == 2
		s.StartTLS()
	} else {
		s.Config.Protocols = new(http.Protocols)
		s.Config.Protocols.SetHTTP1(major == 1)
		s.Config.Protocols.SetUnencryptedHTTP2(major == 2)
		s.Start()
		s.Client().Transport.(*http.Transport).Protocols = s.Config.Protocols
	}
	t.Cleanup(s.Close)
	s.Client().CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	// All later HTTP/2 requests share the connection of the first request. Without it, each
	// of them would open a connection of its own, and net/http's Shutdown waits for a
	// connection that is opened meanwhile.
	answer, err := s.Client().Get(s.URL + prefix + "/")
	must(t, err)
	io.Copy(io.Discard, answer.Body)
	answer.Body.Close()
	return &site{t, s.URL + prefix, s.Client(), s.Config}
}

// strict wraps a handler so that the test fails if the ResponseWriter is used after the
// handler has returned. Such a use is undefined: over HTTP/2 it crashes the process, over
// HTTP/1.1 it changes the next response on the connection. When a stream is to end, setting
// its short deadline takes delay, so that a handler that does not wait for that call
// returns first.
func strict(t testing.TB, h http.Handler, delay time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &strictWriter{t: t, w: w, c: http.NewResponseController(w), delay: delay}
		defer s.returned.Store(true)
		h.ServeHTTP(s, r)
	})
}

type strictWriter struct {
	t        testing.TB
	w        http.ResponseWriter
	c        *http.ResponseController
	delay    time.Duration
	returned atomic.Bool
}

// late reports a call that comes after the handler has returned.
func (s *strictWriter) late(method string) bool {
	if !s.returned.Load() {
		return false
	}
	s.t.Errorf("%s called after the handler has returned", method)
	return true
}

func (s *strictWriter) Header() http.Header {
	if s.late("Header") {
		return make(http.Header)
	}
	return s.w.Header()
}

func (s *strictWriter) WriteHeader(status int) {
	if !s.late("WriteHeader") {
		s.w.WriteHeader(status)
	}
}

func (s *strictWriter) Write(p []byte) (int, error) {
	if s.late("Write") {
		return 0, http.ErrHandlerTimeout
	}
	return s.w.Write(p)
}

func (s *strictWriter) FlushError() error {
	if s.late("Flush") {
		return http.ErrHandlerTimeout
	}
	return s.c.Flush()
}

func (s *strictWriter) SetWriteDeadline(deadline time.Time) error {
	if time.Until(deadline) < time.Second {
		time.Sleep(s.delay)
	}
	if s.late("SetWriteDeadline") {
		return http.ErrHandlerTimeout
	}
	return s.c.SetWriteDeadline(deadline)
}

// An exchange is a request and the expected response. In the path, DONE, LIVE and STOP
// stand for the IDs of operations.
type exchange struct {
	route       string // as in Routes, or only a method
	path        string
	header      string // "Name: value", or empty
	status      int
	contentType string
	body        string // part of the response body
	endless     bool   // the response ends when the client closes it
}

const (
	jsonType    = "application/json"
	problemType = "application/problem+json"
	streamType  = "text/event-stream"
)

var exchanges = []exchange{
	{route: "GET /", path: "/", status: 200, contentType: jsonType, body: `"tasks":[{`},
	{route: "GET /", path: "/?limit=x", status: 400, contentType: problemType, body: "parameter limit"},
	{route: "GET /{id}", path: "/DONE", status: 200, contentType: jsonType, body: `"state":"DONE"`},
	{route: "GET /{id}/result", path: "/DONE/result", status: 200, contentType: jsonType, body: `"well"`},
	{route: "GET /{id}/result", path: "/LIVE/result", status: 404, contentType: problemType, body: "has no result"},
	{route: "GET /{id}", path: "/unknown", status: 404, contentType: problemType, body: "operation not found"},
	{route: "POST /{id}/cancel", path: "/STOP/cancel", status: 202, contentType: jsonType, body: `"name":"stop"`},
	{route: "POST /{id}/cancel", path: "/DONE/cancel", status: 200, contentType: jsonType, body: `"state":"DONE"`},
	{route: "POST /{id}/cancel", path: "/unknown/cancel", status: 404, contentType: problemType, body: "operation not found"},
	{route: "POST /{id}/cancel", path: "/LIVE/cancel", header: "Sec-Fetch-Site: cross-site", status: 403, contentType: problemType, body: "cross-origin"},
	{route: "POST /{id}/again", path: "/DONE/again", status: 202, contentType: jsonType, body: `"name":"done"`},
	{route: "POST /{id}/again", path: "/LIVE/again", status: 409, contentType: problemType, body: "has not finished"},
	{route: "POST /{id}/again", path: "/unknown/again", status: 404, contentType: problemType, body: "operation not found"},
	{route: "POST /{id}/again", path: "/DONE/again", header: "Sec-Fetch-Site: cross-site", status: 403, contentType: problemType, body: "cross-origin"},
	{route: "GET /{id}/wait", path: "/DONE/wait", status: 200, contentType: jsonType, body: `"state":"DONE"`},
	{route: "GET /{id}/wait", path: "/LIVE/wait?timeout=20ms", status: 200, contentType: jsonType, body: `"state":"RUNNING"`},
	{route: "GET /{id}/wait", path: "/LIVE/wait?timeout=x", status: 400, contentType: problemType, body: "parameter timeout"},
	{route: "GET /{id}/wait", path: "/unknown/wait", status: 404, contentType: problemType, body: "operation not found"},
	{route: "GET /events", path: "/events", status: 200, contentType: streamType, body: "event: snapshot\n", endless: true},
	{route: "GET /{id}/events", path: "/LIVE/events", status: 200, contentType: streamType, body: "event: operation\n", endless: true},
	{route: "GET /{id}/events", path: "/DONE/events", status: 200, contentType: streamType, body: "id: DONE\n"},
	{route: "GET /{id}/events", path: "/DONE/events", header: "Last-Event-ID: DONE", status: 204},
	{route: "GET /{id}/events", path: "/unknown/events", status: 404, contentType: problemType, body: "operation not found"},
	{route: "GET /ui", path: "/ui", status: 200, contentType: "text/html; charset=utf-8", body: "<html"},
	{route: "GET /ui/", path: "/ui/", status: 308},
	{route: "GET /openapi.json", path: "/openapi.json", status: 200, contentType: jsonType, body: `"openapi"`},
	{route: "DELETE", path: "/DONE", status: 405, contentType: problemType, body: "not allowed"},
	{route: "OPTIONS", path: "/DONE", status: 204},
	{route: "GET", path: "/DONE/nothing", status: 404, contentType: problemType, body: "not found"},
}

// TestProtocols requests every endpoint over every protocol, also with HEAD.
func TestProtocols(t *testing.T) {
	t.Parallel()
	tested := make(map[string]bool)
	for _, e := range exchanges {
		tested[e.route] = true
	}
	for route := range taskhttp.Routes() {
		if !tested[route] {
			t.Errorf("no test requests %s", route)
		}
	}
	eachProtocol(t, func(t *testing.T, serve func(http.Handler) *site) {
		m := newManager(t, nil)
		s := serve(mountAgain(m))
		ids := strings.NewReplacer(
			"DONE", run(t, m, "done", "well", nil).ID,
			"LIVE", newControlled(t, m, "live").ID,
			"STOP", newControlled(t, m, "stop").ID)
		for _, e := range exchanges {
			method, _, _ := strings.Cut(e.route, " ")
			s.exchange(ids, method, e)
			if method == "GET" {
				e.body, e.endless = "", false
				s.exchange(ids, "HEAD", e)
			}
		}
	})
}

// exchange makes a request and checks the response.
func (s *site) exchange(ids *strings.Replacer, method string, e exchange) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	var header []string
	if name, value, ok := strings.Cut(e.header, ": "); ok {
		header = []string{name, value}
	}
	answer := s.request(ctx, method, ids.Replace(e.path), nil, header...)
	defer answer.Body.Close()
	if answer.StatusCode != e.status || method != "HEAD" && answer.Header.Get("Content-Type") != e.contentType {
		s.t.Errorf("%s %s: status %d, header %v, want %d, %s", method, e.path, answer.StatusCode, answer.Header, e.status, e.contentType)
	}
	var body strings.Builder
	for lines := bufio.NewReader(answer.Body); ; {
		line, err := lines.ReadString('\n')
		body.WriteString(line)
		if err == io.EOF && !e.endless || e.endless && strings.Contains(body.String(), e.body) {
			break
		}
		if err != nil {
			s.t.Fatalf("%s %s: %v after %q", method, e.path, err, body.String())
		}
	}
	if !strings.Contains(body.String(), e.body) || method == "HEAD" && body.Len() > 0 {
		s.t.Errorf("%s %s: body %q, want %q", method, e.path, body.String(), e.body)
	}
}

// TestStreamsOpenedAndClosed opens and closes hundreds of event streams and waits, with a
// disturbance halfway. The process must not crash.
func TestStreamsOpenedAndClosed(t *testing.T) {
	t.Parallel()
	const clients, visits = 8, 30
	tests := []struct {
		name  string
		begin func(t *testing.T, s *site, m *task.Manager) (end func()) // called after half of the visits
	}{
		{"idle", func(*testing.T, *site, *task.Manager) func() { return func() {} }},
		{"busy", func(t *testing.T, _ *site, m *task.Manager) func() { return keepBusy(t, m) }},
		{"server shut down", func(t *testing.T, s *site, _ *task.Manager) func() {
			var shutdown sync.WaitGroup
			shutdown.Go(func() { shutDown(t, s, 10*time.Second) })
			return shutdown.Wait
		}},
		{"manager closed", func(_ *testing.T, _ *site, m *task.Manager) func() { m.Close(); return func() {} }},
	}
	eachProtocol(t, func(t *testing.T, serve func(http.Handler) *site) {
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) {
				m := newManager(t, nil)
				s := serve(mount(m))
				paths := pathsOf(newControlled(t, m, "live"))
				var all sync.WaitGroup
				var begun, answered atomic.Int64
				end := make(chan func(), 1)
				for c := range clients {
					all.Go(func() {
						for v := range visits {
							if begun.Add(1) == clients*visits/2 {
								end <- test.begin(t, s, m)
							}
							if s.visit(paths[(c+v)%len(paths)], v%4) {
								answered.Add(1)
							}
						}
					})
				}
				all.Wait()
				s.client.CloseIdleConnections() // Shutdown waits for connections that were never used
				(<-end)()
				if n := answered.Load(); n < clients*visits/16 {
					t.Errorf("%d of %d requests were answered", n, clients*visits)
				}
			})
		}
	})
}

// pathsOf returns the paths whose responses take at least as long as op.
func pathsOf(op *controlled) []string {
	return []string{"/events", "/" + op.ID + "/events", "/" + op.ID + "/wait"}
}

// visit opens a stream, reads some lines, and closes it. It reports whether there was a
// response. If lines is 0, it may disconnect before the response.
func (s *site) visit(path string, lines int) (served bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if lines == 0 || strings.HasSuffix(path, "/wait") {
		time.AfterFunc(time.Duration(lines+1)*time.Millisecond, cancel)
	}
	r, _ := http.NewRequestWithContext(ctx, "GET", s.url+path, nil)
	answer, err := s.client.Do(r)
	if err != nil {
		return false
	}
	defer answer.Body.Close()
	for scan := bufio.NewScanner(answer.Body); lines > 0 && scan.Scan(); lines-- {
	}
	return true
}

// keepBusy submits one operation after another until stop is called.
func keepBusy(t *testing.T, m *task.Manager) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			op, err := m.Submit("busy", func(_ context.Context, update func(int)) (any, error) {
				update(i % 100)
				return i, nil
			})
			if err != nil {
				t.Error(err)
				return
			}
			m.Wait(ctx, op.ID)
		}
	})
	return func() { cancel(); all.Wait() }
}

// shutDown checks that Shutdown succeeds within limit.
func shutDown(t *testing.T, s *site, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := s.server.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// TestStreamsEnded ends a hundred open streams and waits from the server's side.
func TestStreamsEnded(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		end  func(t *testing.T, s *site, m *task.Manager)
		want []string // part of what a client receives, for each of pathsOf
	}{
		{
			"server shut down", func(t *testing.T, s *site, _ *task.Manager) { shutDown(t, s, 10*time.Second) },
			[]string{"event: snapshot\n", "id: RUNNING\n", `"state":"RUNNING"`},
		},
		{
			"manager closed", func(_ *testing.T, _ *site, m *task.Manager) { m.Close() },
			[]string{"event: closed\n", "id: FAILED\n", `"state":"FAILED"`},
		},
	}
	eachProtocol(t, func(t *testing.T, serve func(http.Handler) *site) {
		for _, test := range tests {
			t.Run(test.name, func(t *testing.T) {
				m := newManager(t, nil)
				s := serve(mount(m))
				paths := pathsOf(newControlled(t, m, "live"))
				var opened, ended sync.WaitGroup
				for i := range 100 {
					opened.Add(1)
					ended.Go(func() {
						path, want := paths[i%len(paths)], test.want[i%len(paths)]
						if body := s.receive(path, opened.Done); !strings.Contains(body, want) {
							t.Errorf("GET %s: received %q, want %q", path, body, want)
						}
					})
				}
				opened.Wait()
				test.end(t, s, m)
				ended.Wait()
			})
		}
	})
}

// receive reads a response to its end. It calls opened once the first event has come, or, for
// a wait, once the server is serving the request.
func (s *site) receive(path string, opened func()) string {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if strings.HasSuffix(path, "/wait") {
		// There is no response before the end of the wait.
		time.AfterFunc(200*time.Millisecond, opened)
		opened = func() {}
	}
	opened = sync.OnceFunc(opened)
	defer opened()
	r, _ := http.NewRequestWithContext(ctx, "GET", s.url+path, nil)
	answer, err := s.client.Do(r)
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	body := bufio.NewReader(answer.Body)
	body.Peek(1)
	opened()
	text, err := io.ReadAll(body)
	if err != nil {
		return string(text) + err.Error()
	}
	return string(text)
}

// TestStreamsBlocked shuts a server down while a client does not read its response: the
// blocked write must end soon.
func TestStreamsBlocked(t *testing.T) {
	t.Parallel()
	m := newManager(t, nil)
	for range 600 { // more than the client's and the server's buffers hold
		newControlled(t, m, "live", task.WithMetadata(strings.Repeat("x", 15_000)))
	}
	eachProtocol(t, func(t *testing.T, serve func(http.Handler) *site) {
		s := serve(mount(m))
		answer := s.request(t.Context(), "GET", "/events", nil)
		defer answer.Body.Close()
		start := time.Now()
		shutDown(t, s, 20*time.Second)
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("Shutdown took %v", took)
		}
	})
}
