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
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
	"github.com/mynt-nas/task/taskhttp"
)

func TestMain(m *testing.M) { os.Exit(testos.Run(m)) }

// prefix is the path under which tests mount the handler.
const prefix = "/api/tasks"

func mount(m *task.Manager) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(prefix+"/", http.StripPrefix(prefix, taskhttp.Handler(m)))
	return mux
}

// mountAgain is mount with RunAgain, which returns an operation with the same name.
func mountAgain(m *task.Manager) http.Handler {
	return http.StripPrefix(prefix, taskhttp.Handler(m, taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) {
		if op.State == task.StateFailed {
			return nil, errBroken
		}
		return m.Submit(op.Name, func(context.Context, func(int)) (any, error) { return nil, nil })
	})))
}

func newManager(t testing.TB, db task.Persistence, opts ...task.Option) *task.Manager {
	t.Helper()
	m, err := task.New(db, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// A site is a server with its own client.
type site struct {
	t      testing.TB
	url    string // the handler's URL
	client *http.Client
	server *http.Server
}

func newSite(t testing.TB, h http.Handler) *site {
	t.Helper()
	s := httptest.NewServer(strict(t, h, 0))
	t.Cleanup(s.Close)
	return &site{t, s.URL + prefix, s.Client(), s.Config}
}

// newPipeSite is newSite for a synctest bubble: it uses no network and has no buffer
// between server and client.
func newPipeSite(t testing.TB, h http.Handler, configure ...func(*http.Server)) *site {
	t.Helper()
	l := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	s := &http.Server{Handler: strict(t, h, 0)}
	for _, f := range configure {
		f(s)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	transport := &http.Transport{DialContext: l.dial, DisableCompression: true}
	t.Cleanup(func() { transport.CloseIdleConnections(); s.Close(); <-served })
	return &site{t, "http://pipe" + prefix, &http.Client{Transport: transport}, s}
}

// pipes is a listener for connections within the process.
type pipes struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipes) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// request makes a request. header holds pairs of names and values.
func (s *site) request(ctx context.Context, method, path string, body io.Reader, header ...string) *http.Response {
	s.t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, s.url+path, body)
	must(s.t, err)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := s.client.Do(r)
	must(s.t, err)
	return answer
}

// do makes a request, checks the status, and decodes the body into v unless v is nil.
func (s *site) do(method, path string, status int, v any, header ...string) *http.Response {
	s.t.Helper()
	answer := s.request(context.Background(), method, path, nil, header...)
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	must(s.t, err)
	if answer.StatusCode != status {
		s.t.Fatalf("%s %s: status %d, want %d: %s", method, path, answer.StatusCode, status, body)
	}
	if v != nil {
		if err := json.Unmarshal(body, v); err != nil {
			s.t.Fatalf("%s %s: %v in %s", method, path, err, body)
		}
	}
	return answer
}

// A problem is the body of an error response.
type problem struct {
	Type, Title, Detail, Instance string
	Status                        int
}

// fails makes a request and checks that the response is the given problem.
func (s *site) fails(method, path string, status int, detail string, header ...string) {
	s.t.Helper()
	var p problem
	answer := s.do(method, path, status, &p, header...)
	if got := answer.Header.Get("Content-Type"); got != "application/problem+json" {
		s.t.Errorf("%s %s: Content-Type %q", method, path, got)
	}
	if answer.Header.Get("Cache-Control") != "no-store" || answer.Header.Get("X-Content-Type-Options") != "nosniff" {
		s.t.Errorf("%s %s: header %v", method, path, answer.Header)
	}
	uri, _, _ := strings.Cut(path, "?")
	want := problem{"about:blank", http.StatusText(status), p.Detail, prefix + uri, status}
	if p != want || !strings.Contains(p.Detail, detail) {
		s.t.Errorf("%s %s: problem %+v, want %q in %+v", method, path, p, detail, want)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// An event is an event of a stream.
type event struct{ name, id, data string }

// A reader reads a stream of events.
type reader struct {
	t      testing.TB
	body   io.ReadCloser
	lines  *bufio.Reader
	lastID string
}

// listen requests events. The test fails if there is no stream.
func (s *site) listen(ctx context.Context, path string, header ...string) *reader {
	s.t.Helper()
	answer := s.request(ctx, "GET", path, nil, header...)
	s.t.Cleanup(func() { answer.Body.Close() })
	if answer.StatusCode != http.StatusOK || answer.Header.Get("Content-Type") != "text/event-stream" ||
		answer.Header.Get("Cache-Control") != "no-store" {
		body, _ := io.ReadAll(answer.Body)
		s.t.Fatalf("GET %s: status %d, header %v: %s", path, answer.StatusCode, answer.Header, body)
	}
	return &reader{t: s.t, body: answer.Body, lines: bufio.NewReader(answer.Body)}
}

// next returns the next event, skipping heartbeats.
func (r *reader) next() (event, error) {
	for {
		e, err := r.any()
		if err != nil || e.name != "heartbeat" {
			return e, err
		}
	}
}

// any returns the next event.
func (r *reader) any() (e event, err error) {
	hasID := false
	for {
		line, err := r.lines.ReadString('\n')
		if err != nil {
			return event{}, err
		}
		line = strings.TrimSuffix(line, "\n")
		field, value, _ := strings.Cut(line, ": ")
		switch {
		case line == "" && e.name != "":
			if hasID {
				r.lastID = e.id
			}
			return e, nil
		case line == "":
		case field == "event":
			e.name = value
		case field == "data":
			e.data = value
		case field == "id":
			e.id, hasID = value, true
		case field == "retry":
		default:
			return e, fmt.Errorf("line %q", line)
		}
	}
}

// want checks the next events, in the format of event.String.
func (r *reader) want(want ...string) {
	r.t.Helper()
	for _, want := range want {
		e, err := r.next()
		if err != nil {
			r.t.Fatalf("%v, want %q", err, want)
		}
		if got := e.String(); got != want {
			r.t.Fatalf("event %q, want %q", got, want)
		}
	}
}

// wantEnd checks that there are no more events.
func (r *reader) wantEnd() {
	r.t.Helper()
	if e, err := r.next(); err != io.EOF {
		r.t.Fatalf("event %v, error %v, want the end", e, err)
	}
}

// String returns the event's name and the names, states and progress of its tasks.
func (e event) String() string {
	var ops []task.Operation
	switch e.name {
	case "snapshot":
		var s struct{ Tasks []task.Operation }
		json.Unmarshal([]byte(e.data), &s)
		ops = s.Tasks
	case "operation":
		ops = make([]task.Operation, 1)
		json.Unmarshal([]byte(e.data), &ops[0])
	}
	text := e.name
	for _, op := range ops {
		text += fmt.Sprintf(" %s %s %d", op.Name, op.State, op.Progress)
	}
	return text
}

// A controlled is an operation whose function is controlled by the test.
type controlled struct {
	*task.Operation
	do chan func(update func(int)) (any, error, bool)
}

func newControlled(t testing.TB, m *task.Manager, name string, opts ...task.SubmitOption) *controlled {
	t.Helper()
	p := &controlled{do: make(chan func(func(int)) (any, error, bool))}
	op, err := m.Submit(name, func(ctx context.Context, update func(int)) (any, error) {
		for {
			select {
			case f := <-p.do:
				if result, err, end := f(update); end {
					return result, err
				}
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}, opts...)
	must(t, err)
	p.Operation = op
	return p
}

// update reports progress and returns once that is done.
func (p *controlled) update(progress int) {
	done := make(chan struct{})
	p.do <- func(update func(int)) (any, error, bool) {
		update(progress)
		close(done)
		return nil, nil, false
	}
	<-done
}

func (p *controlled) end(result any, err error) {
	p.do <- func(func(int)) (any, error, bool) { return result, err, true }
}

// run submits an operation and waits until it has finished.
func run(t testing.TB, m *task.Manager, name string, result any, err error) *task.Operation {
	t.Helper()
	op, submitErr := m.Submit(name, func(context.Context, func(int)) (any, error) { return result, err })
	must(t, submitErr)
	op, waitErr := m.Wait(context.Background(), op.ID)
	must(t, waitErr)
	return op
}

// A brokenStore fails to read and to update while fails is set.
type brokenStore struct {
	*task.MemoryStore
	mu    sync.Mutex
	fails bool
	deaf  bool // does not pass on cancel requests
}

// RequestCancel implements [task.Canceller].
func (s *brokenStore) RequestCancel(id, text string) error {
	s.mu.Lock()
	deaf := s.deaf
	s.mu.Unlock()
	if deaf {
		return errors.ErrUnsupported
	}
	return s.MemoryStore.RequestCancel(id, text)
}

func (s *brokenStore) setDeaf(deaf bool) { s.mu.Lock(); defer s.mu.Unlock(); s.deaf = deaf }

var errBroken = errors.New("disk I/O error")

func newBrokenStore() *brokenStore { return &brokenStore{MemoryStore: task.NewMemoryStore()} }

func (s *brokenStore) fail(fails bool) { s.mu.Lock(); defer s.mu.Unlock(); s.fails = fails }

func (s *brokenStore) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails {
		return errBroken
	}
	return nil
}

func (s *brokenStore) Get(id string) (*task.Operation, error) {
	if err := s.err(); err != nil {
		return nil, err
	}
	return s.MemoryStore.Get(id)
}

func (s *brokenStore) List(limit, offset int) ([]*task.Operation, error) {
	if err := s.err(); err != nil {
		return nil, err
	}
	return s.MemoryStore.List(limit, offset)
}

func (s *brokenStore) ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error) {
	if err := s.err(); err != nil {
		return nil, err
	}
	return s.MemoryStore.ListFiltered(f, limit, offset)
}

func (s *brokenStore) Update(op *task.Operation) error {
	if err := s.err(); err != nil {
		return err
	}
	return s.MemoryStore.Update(op)
}
