// Package taskhttp serves the operations of a [task.Manager] over HTTP, as JSON, as
// server-sent events, and as a web page.
//
//	GET  /               lists the history in pages, selected by the query
//	GET  /{id}           returns one operation
//	GET  /{id}/result    downloads its result
//	POST /{id}/cancel    cancels one operation
//	POST /{id}/again     runs a finished operation again, see [RunAgain]
//	GET  /{id}/wait      waits until one operation has finished
//	GET  /events         streams the changes of all operations
//	GET  /{id}/events    streams the changes of one operation
//	GET  /ui             serves the page
//	GET  /openapi.json   serves the description of this interface
//
// Errors are problem details (RFC 9457).
//
// The list is ordered by submission, newest first. With order=finish it contains only
// finished operations, ordered by finish time, newest first. The parameters state, name,
// containing (a part of the name), metadata.KEY=VALUE, finished_after and finished_before
// filter the list and can be combined; state may be repeated, or hold several states
// separated by commas. limit is 1 to 500, 50 by default. For the next page, pass next_cursor
// as cursor, with the other parameters unchanged. A response without next_cursor is the last
// page.
//
// Wait takes timeout, a Go duration of up to 10m, 30s by default. When that has passed, it
// responds with the present state and status 200.
//
// Cancel does not wait for the operation to end. It responds with the present state and
// status 202, or 200 if the operation had already finished. A PENDING operation will not
// start, but becomes CANCELLED only when that state is stored; wait returns after that. The
// error of a cancelled operation contains the client's address and the reason from the
// query parameter "reason", at most 1,000 bytes.
//
// The stream /events begins with a "snapshot" event, which holds the live operations, and
// continues with an "operation" event for each change. A client that reconnects with
// Last-Event-ID, as browsers do, gets the events it missed. The stream of one operation
// begins with an "operation" event for the present state, and ends when the operation has
// finished. Both contain every state change and the latest progress. There are these other
// events:
//
//   - "reload": events are missing because the event history has expired or the client was
//     too slow. The client must load the list again.
//   - "deleted": an unfinished operation was deleted from the database. It has no final
//     state.
//   - "heartbeat": there was no other event for 15 seconds, or the client has just
//     reconnected. A client that receives nothing for longer has lost its connection.
//   - "closed": the manager is closed.
//
// A client therefore never misses a final state without notice. An event may arrive twice,
// and GET may return a newer state than the next event: compare updated_at. A finished
// operation never changes.
//
// Lists and events omit metadata and results longer than 16 KiB as JSON, and set
// metadata_omitted and result_omitted. They truncate names, messages and errors to that
// length. GET /{id} returns the full values. A page may end before its limit, at 8 MiB:
// continue while there is a next_cursor. A client that accepts no data of a response for 25
// seconds is disconnected.
//
//	curl -N localhost:8080/api/tasks/events
//
// Every client that can reach the [Handler] can see and cancel every operation. Wrap the
// handler in the application's own authentication, as the package example does.
//
// Listening only on 127.0.0.1 or on a local network does not protect a handler without
// authentication. A page on the internet can make its own host name resolve to such an
// address in a visitor's browser (DNS rebinding). To the browser and to
// [http.CrossOriginProtection] its requests then have the same origin as the page, so the
// page can read and cancel every operation. The Host header of these requests contains the
// page's host name, and this package does not check it: reject requests for host names that
// are not the server's own, as an example does. A login by password, or by a cookie for the
// server's own name, also helps, because the browser does not send it to another host name.
package taskhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/url"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mynt-nas/task"
)

const (
	defaultLimit = 50 // operations on a page
	maxLimit     = 500
	listChunk    = 64 // operations read at once

	maxValue = 16 << 10 // bytes of metadata, results and texts in lists and events
	maxPage  = 8 << 20  // bytes of a list or a snapshot

	defaultTimeout = 30 * time.Second // of a wait
	maxTimeout     = 10 * time.Minute

	// grace is how long a client may take to receive one piece of a response, in addition
	// to the time between heartbeats.
	grace = 10 * time.Second

	// shutdownGrace is how long streams and waits continue after the server starts to shut
	// down.
	shutdownGrace = 500 * time.Millisecond
)

// An Option changes what a [Handler] serves.
type Option func(*handler)

// Title sets the heading of the page, which also begins the title shown by the browser. The
// default is "Tasks".
func Title(text string) Option { return func(h *handler) { h.title = text } }

// Home adds a link with the given text to the page, pointing to a page of the application.
// The URL may be relative to the page's URL.
func Home(text, url string) Option {
	return func(h *handler) { h.homeText, h.homeURL = text, url }
}

// TrustedOrigin allows cross-origin requests from pages of the given origin, such as
// "https://nas.example:8443". Use it for a reverse proxy that changes the Host header; the
// origin is the proxy's, as browsers see it. TrustedOrigin may be given several times.
// Handler panics if the origin has another form.
func TrustedOrigin(origin string) Option {
	return func(h *handler) {
		if err := h.guard.AddTrustedOrigin(origin); err != nil {
			panic(fmt.Sprintf("taskhttp: trusted origin: %v", err))
		}
	}
}

// RunAgain makes it possible to run finished operations again, over HTTP and from the page.
// f gets the finished operation and submits a new one, for example based on its name and
// metadata. f returns the results of [task.Manager.Submit]: with [task.WithUnique], a
// second click then leads to the unfinished operation started by the first. If an operation
// cannot be run again, f returns an error that wraps [errors.ErrUnsupported].
//
// f is called for DONE, FAILED and CANCELLED operations, and may be called concurrently. If
// it panics, the response has status 500 and the stack is logged to [slog.Default]. Without
// RunAgain, these requests get status 501.
func RunAgain(f func(*task.Operation) (*task.Operation, error)) Option {
	return func(h *handler) { h.runAgain = f }
}

// Handler returns a handler that serves m. Mount it under any prefix that ends with a
// slash:
//
//	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(m)))
//
// It rejects cross-origin requests that change something. It compares the Origin header
// with the Host header, so a reverse proxy must pass the Host header on, unless its origin
// is a [TrustedOrigin]. It sets its own deadlines where a response may take longer than
// [http.Server] allows. Event streams and waits end when the client disconnects, when m is
// closed, and when the http.Server that serves them is shut down: they do not delay its
// Shutdown.
//
// The handler needs no closing. It releases the event history when m is closed, or a minute
// after the last stream ends.
func Handler(m *task.Manager, opts ...Option) http.Handler {
	h := &handler{manager: m, servers: make(map[*http.Server]context.Context), title: "Tasks"}
	for _, opt := range opts {
		opt(h)
	}
	h.page = h.renderPage()
	for _, rt := range h.routes() {
		h.mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) {
			query, err := rt.parse(r.URL.RawQuery)
			if err == nil {
				err = rt.serve(w, r, query)
			}
			if err != nil {
				Error(w, r, err)
			}
		})
	}
	return h
}

type handler struct {
	// Immutable.
	manager                  *task.Manager
	mux                      http.ServeMux
	guard                    http.CrossOriginProtection
	page                     []byte // with the title and link set by the options
	title, homeText, homeURL string
	runAgain                 func(*task.Operation) (*task.Operation, error) // nil without RunAgain

	mu       sync.Mutex // guards what follows
	recorder *recorder  // nil until the first stream
	servers  map[*http.Server]context.Context
}

// A route is one line of the table above. serve either writes a response or returns an
// error.
type route struct {
	method, path string
	query        []string // parameter names
	serve        func(w http.ResponseWriter, r *http.Request, query url.Values) error
}

// metadataPrefix begins the names of the parameters that filter by metadata.
const metadataPrefix = "metadata."

var listQuery = []string{"state", "name", "containing", metadataPrefix + "KEY",
	"finished_after", "finished_before", "order", "limit", "cursor", "before"}

func (h *handler) routes() []route {
	return []route{
		{"GET", "/{$}", listQuery, h.list},
		{"GET", "/{id}", nil, h.get},
		{"GET", "/{id}/result", nil, h.result},
		{"POST", "/{id}/cancel", []string{"reason"}, h.cancel},
		{"POST", "/{id}/again", nil, h.again},
		{"GET", "/{id}/wait", []string{"timeout"}, h.wait},
		{"GET", "/events", nil, h.events},
		{"GET", "/{id}/events", nil, h.eventsOf},
		{"GET", "/ui", nil, h.serveUI},
		{"GET", "/ui/{$}", nil, redirectUI},
		{"GET", "/openapi.json", nil, serveOpenAPI},
	}
}

// parse parses the query of a request if the route has parameters. It ignores unknown
// parameters, which may be meant for a wrapper of the handler.
func (rt route) parse(query string) (url.Values, error) {
	if len(rt.query) == 0 {
		return nil, nil
	}
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, badRequest{err}
	}
	maps.DeleteFunc(values, func(name string, _ []string) bool {
		return !slices.Contains(rt.query, name) && !strings.HasPrefix(name, metadataPrefix)
	})
	return values, nil
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	if r.URL.Path == "" { // mounted without the trailing slash
		r = r.Clone(r.Context())
		r.URL.Path = "/"
	}
	if err := h.guard.Check(r); err != nil {
		Problem(w, r, http.StatusForbidden, fmt.Errorf("%w; if the page at %.100q may do this, its proxy must pass on the Host header (here %.100q), "+
			"or the server must call taskhttp.TrustedOrigin", err, r.Header.Get("Origin"), r.Host))
		return
	}
	mux, pattern := h.mux.Handler(r)
	if pattern != "" && clean(r.URL.Path) {
		h.mux.ServeHTTP(w, r)
		return
	}
	// The mux knows the allowed methods, but its response is plain text.
	var refused refusal
	mux.ServeHTTP(&refused, r)
	allow := refused.Header().Get("Allow")
	switch {
	case allow == "":
		Problem(w, r, http.StatusNotFound, errors.New("not found"))
	case r.Method == http.MethodOptions:
		header.Set("Allow", allow+", OPTIONS")
		w.WriteHeader(http.StatusNoContent)
	default:
		header.Set("Allow", allow+", OPTIONS")
		Problem(w, r, http.StatusMethodNotAllowed, fmt.Errorf("method %.20q not allowed", r.Method))
	}
}

// clean reports whether the mux serves p without a redirect. A redirect by the mux would
// lack the prefix under which the handler is mounted.
func clean(p string) bool {
	c := path.Clean(p)
	return p == "/" || c != "/" && (c == p || c+"/" == p)
}

// A refusal is an [http.ResponseWriter] that records only the header.
type refusal struct{ header http.Header }

func (f *refusal) Header() http.Header {
	if f.header == nil {
		f.header = make(http.Header)
	}
	return f.header
}
func (f *refusal) Write(p []byte) (int, error) { return len(p), nil }
func (f *refusal) WriteHeader(int)             {}

func (h *handler) list(w http.ResponseWriter, r *http.Request, query url.Values) error {
	opts, err := listOptions(query)
	if err != nil {
		return err
	}
	limit, err := parseLimit(query.Get("limit"))
	if err != nil {
		return err
	}
	from, cursor := "cursor", query.Get("cursor")
	if cursor == "" {
		from, cursor = "before", query.Get("before")
	}
	next, stop := iter.Pull2(h.history(min(limit+1, listChunk), cursor, append(opts, task.WithContext(r.Context()))...))
	defer stop()
	op, err, more := next()
	if cursor != "" && errors.Is(err, task.ErrNotFound) {
		return badParameter(from, "operation %.64q not found in this order, start with the first page", cursor)
	}
	if err != nil {
		return err
	}
	s, end := h.respond(w, r, http.StatusOK)
	defer end()
	s.write([]byte(`{"tasks":[`))
	a, last := array{s: s}, ""
	for n := 0; more && err == nil && n < limit && a.add(lighten(op)); n++ {
		last = op.ID
		op, err, more = next()
	}
	s.write([]byte("]"))
	if more { // an error is left to the request for the next page
		id, _ := json.Marshal(last)
		s.write(fmt.Appendf(nil, `,"next_cursor":%s`, id))
	}
	s.write([]byte("}\n"))
	return nil
}

// listOptions returns the list options given by the query, except those for paging.
func listOptions(query url.Values) ([]task.ListOption, error) {
	states, err := parseStates(query["state"])
	if err != nil {
		return nil, err
	}
	after, err := parseTime("finished_after", query)
	if err != nil {
		return nil, err
	}
	before, err := parseTime("finished_before", query)
	if err != nil {
		return nil, err
	}
	opts := []task.ListOption{task.ByState(states...), task.ByName(query.Get("name")), task.Containing(query.Get("containing")),
		task.FinishedAfter(after), task.FinishedBefore(before)}
	for name, values := range query {
		key, ok := strings.CutPrefix(name, metadataPrefix)
		if ok && len(values) > 1 && slices.Max(values) != slices.Min(values) {
			return nil, badParameter(metadataPrefix+"KEY", "%.64q has several values, and no operation has them all", key)
		}
		if ok {
			opts = append(opts, task.ByMetadata(key, values[0]))
		}
	}
	switch order := query.Get("order"); order {
	case "", "submission":
	case "finish":
		opts = append(opts, task.ByFinish())
	default:
		return nil, badParameter("order", "%.64q is not one of [submission finish]", order)
	}
	return opts, nil
}

// history yields the operations after the one with the given ID, chunk by chunk.
func (h *handler) history(chunk int, before string, opts ...task.ListOption) iter.Seq2[*task.Operation, error] {
	return func(yield func(*task.Operation, error) bool) {
		for more := true; more; {
			ops, err := h.manager.Raw().List(chunk, 0, append(opts, task.MaxValue(maxValue), task.Before(before))...)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, op := range ops {
				if !yield(op, nil) {
					return
				}
				before = op.ID
			}
			more = len(ops) == chunk
		}
	}
}

// A light is an operation in the form used by lists and events.
type light struct {
	*task.Operation
	MetadataOmitted bool `json:"metadata_omitted,omitempty"`
	ResultOmitted   bool `json:"result_omitted,omitempty"`
}

// lighten returns op without the values that are too long for lists and events.
func lighten(op *task.Operation) light {
	c := *op
	c.Name, c.Message, c.Error = cut(c.Name), cut(c.Message), cut(c.Error)
	return light{&c, omit(&c.Metadata), omit(&c.Result)}
}

// omit reports whether the store omitted a value or the value is too long. It clears such a
// value.
func omit(v *any) bool {
	_, omitted := (*v).(task.Omitted)
	raw, _ := (*v).(json.RawMessage)
	if omitted = omitted || len(raw) > maxValue; omitted {
		*v = nil
	}
	return omitted
}

func cut(text string) string {
	if len(text) <= maxValue {
		return text
	}
	return strings.ToValidUTF8(text[:maxValue], "") + "…"
}

// encode returns an operation as JSON. If that fails, the JSON contains only the basic
// fields and an error that says why.
func (l light) encode() []byte {
	data, err := json.Marshal(l)
	if err != nil {
		data, _ = json.Marshal(task.Operation{ID: l.ID, Name: l.Name, State: l.State, Error: "can't be shown: " + err.Error()})
	}
	return data
}

// An array writes operations as the elements of a JSON array.
type array struct {
	s    *stream
	size int
}

// add writes an operation and reports whether it fits.
func (a *array) add(op light) bool {
	data := op.encode()
	if a.s.err != nil || a.size > 0 && a.size+len(data) > maxPage {
		return false
	}
	if a.size > 0 {
		a.s.write([]byte(","))
	}
	a.s.write(data)
	a.size += len(data) + 1
	return true
}

var allStates = []task.State{
	task.StatePending, task.StateRunning, task.StateDone, task.StateFailed, task.StateCancelled,
}

// parseStates parses the state parameter. It may be repeated, and each value may hold
// several states separated by commas.
func parseStates(values []string) (states []task.State, err error) {
	for name := range strings.SplitSeq(strings.Join(values, ","), ",") {
		if name == "" {
			continue
		}
		state := task.State(name)
		if !slices.Contains(allStates, state) {
			return nil, badParameter("state", "%.64q is not one of %v", name, allStates)
		}
		states = append(states, state)
	}
	return states, nil
}

// parseTime parses a time parameter. It returns the zero time if the parameter is absent.
func parseTime(name string, query url.Values) (time.Time, error) {
	value := query.Get(name)
	if value == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339, value)
	if err != nil {
		return t, badParameter(name, "%.64q is not a time like 2026-01-02T15:04:05Z; a plus sign is written %%2B", value)
	}
	return t, nil
}

func parseLimit(value string) (int, error) {
	if value == "" {
		return defaultLimit, nil
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 || n > maxLimit {
		return 0, badParameter("limit", "%.64q is not a number from 1 to %d", value, maxLimit)
	}
	return n, nil
}

func (h *handler) get(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	op, err := h.look(r.PathValue("id"))
	if err != nil {
		return err
	}
	return h.whole(w, r, http.StatusOK, op)
}

func (h *handler) result(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	id := r.PathValue("id")
	op, err := h.look(id)
	if err != nil {
		return err
	}
	raw, ok := op.Result.(json.RawMessage)
	if !ok {
		Problem(w, r, http.StatusNotFound, fmt.Errorf("%.64s has no result", id))
		return nil
	}
	w.Header().Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": "result-" + id + ".json"}))
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	s, end := h.respond(w, r, http.StatusOK)
	defer end()
	s.write(raw)
	return nil
}

// whole writes a response with the complete operation, including its values as stored.
func (h *handler) whole(w http.ResponseWriter, r *http.Request, status int, op *task.Operation) error {
	rest := *op
	rest.Metadata, rest.Result = nil, nil
	data, err := json.Marshal(rest)
	if err != nil {
		return err
	}
	s, end := h.respond(w, r, status)
	defer end()
	s.write(data[:len(data)-1])
	if raw, ok := op.Metadata.(json.RawMessage); ok {
		s.write([]byte(`,"metadata":`))
		s.write(raw)
	}
	if raw, ok := op.Result.(json.RawMessage); ok {
		s.write([]byte(`,"result":`))
		s.write(raw)
	}
	s.write([]byte("}\n"))
	return nil
}

// respond begins a JSON response that is written through the returned stream. The caller
// must call end.
func (h *handler) respond(w http.ResponseWriter, r *http.Request, status int) (s *stream, end func()) {
	ctx, cancel := h.context(r)
	s = &stream{ctx: ctx, w: w, c: http.NewResponseController(w)}
	stop := s.unblock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	return s, func() { s.send(s.buf); stop(); cancel() }
}

// look returns the present state of an operation. Unlike Manager.Get, Wait distinguishes a
// database error from an unknown operation. With a context that is already done it does not
// wait.
func (h *handler) look(id string) (*task.Operation, error) {
	done, cancel := context.WithCancel(context.Background())
	cancel()
	op, err := h.manager.Raw().Wait(done, id)
	switch {
	case op != nil:
		return op, nil
	case errors.Is(err, task.ErrNotFound):
		return nil, fmt.Errorf("%.64s: %w", id, task.ErrNotFound)
	default:
		return nil, err
	}
}

func (h *handler) cancel(w http.ResponseWriter, r *http.Request, query url.Values) error {
	reason := query.Get("reason")
	if len(reason) > maxReason {
		return badParameter("reason", "it has more than %d bytes", maxReason)
	}
	id := r.PathValue("id")
	err := h.manager.CancelCause(id, cancelText(r, reason))
	if err != nil && !errors.Is(err, task.ErrNotFound) {
		return err
	}
	status := http.StatusAccepted
	op, lookErr := h.look(id)
	switch {
	case lookErr != nil:
		return lookErr
	case err != nil && !op.State.Finished():
		return err
	case err != nil: // it had already finished
		status = http.StatusOK
	}
	return h.whole(w, r, status, op)
}

// maxReason is the maximum length in bytes of the reason for a cancel.
const maxReason = 1000

// cancelText returns a text that says from where and why an operation is cancelled. Behind
// a proxy, the address is the proxy's; over a Unix socket there is none.
func cancelText(r *http.Request, reason string) string {
	text := "cancelled over HTTP"
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		text += " from " + host
	}
	if reason != "" {
		text += ": " + reason
	}
	return text
}

func (h *handler) again(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	id := r.PathValue("id")
	if h.runAgain == nil {
		return fmt.Errorf("this server does not run tasks again: %w", errors.ErrUnsupported)
	}
	op, err := h.look(id)
	if err != nil {
		return err
	}
	if !op.State.Finished() {
		Problem(w, r, http.StatusConflict, fmt.Errorf("%.64s has not finished", id))
		return nil
	}
	op, err = h.manager.Wait(r.Context(), id) // with decoded metadata and result
	if err != nil {
		return err
	}
	op, err = h.callRunAgain(op)
	if err != nil && (!errors.Is(err, task.ErrExists) || op == nil || op.State.Finished()) {
		return err
	}
	accepted(w, r, "../"+url.PathEscape(op.ID), op)
	return nil
}

// callRunAgain calls the application's function. It turns a panic or a missing operation
// into an error.
func (h *handler) callRunAgain(op *task.Operation) (again *task.Operation, err error) {
	defer func() {
		if v := recover(); v != nil {
			slog.Error("taskhttp: RunAgain panicked", "id", op.ID, "panic", v, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	again, err = h.runAgain(op)
	if again == nil && err == nil {
		err = errors.New("the server has started no task")
	}
	return again, err
}

func (h *handler) wait(w http.ResponseWriter, r *http.Request, query url.Values) error {
	timeout, err := parseTimeout(query.Get("timeout"))
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		return h.get(w, r, nil) // do not wait for a response without a body
	}
	http.NewResponseController(w).SetWriteDeadline(time.Time{}) // none during the wait
	ctx, cancel := h.context(r)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, timeout)
	defer cancel()
	op, err := h.manager.Raw().Wait(ctx, r.PathValue("id"))
	if err != nil && ctx.Err() == nil || op == nil {
		return err
	}
	return h.whole(w, r, http.StatusOK, op) // after a timeout, in its present state
}

func parseTimeout(value string) (time.Duration, error) {
	if value == "" {
		return defaultTimeout, nil
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < 0 || d > maxTimeout {
		return 0, badParameter("timeout", "%.64q is not a duration like 30s, of at most %v", value, maxTimeout)
	}
	return d, nil
}

// context returns a context derived from the request's, which is also done shutdownGrace
// after the server starts to shut down. After cancel, nothing of the request is used except
// the context itself.
func (h *handler) context(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	server, ok := ctx.Value(http.ServerContextKey).(*http.Server)
	if !ok {
		return ctx, cancel
	}
	stop := context.AfterFunc(h.serving(server), cancel)
	return ctx, func() { stop(); cancel() }
}

// serving returns a context that is done shutdownGrace after the server starts to shut
// down. The delay lets final events reach clients if the manager was closed just before.
func (h *handler) serving(server *http.Server) context.Context {
	h.mu.Lock()
	defer h.mu.Unlock()
	ctx := h.servers[server]
	if ctx == nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(context.Background())
		server.RegisterOnShutdown(func() { time.AfterFunc(shutdownGrace, cancel) })
		h.servers[server] = ctx
	}
	return ctx
}

// Accepted writes the response to a request that started op, or that found op already
// started (see [task.ErrExists]): status 202, the operation as the body, and its address in
// the Location header. base is the path under which the [Handler] is mounted, for example
// "/api/tasks". Location is relative to the request's address, so that it is also correct
// behind a proxy that adds a path prefix.
func Accepted(w http.ResponseWriter, r *http.Request, base string, op *task.Operation) {
	accepted(w, r, relative(r, strings.TrimSuffix(base, "/")+"/"+url.PathEscape(op.ID)), op)
}

func accepted(w http.ResponseWriter, r *http.Request, location string, op *task.Operation) {
	body, err := json.Marshal(op)
	if err != nil {
		Error(w, r, err)
		return
	}
	header := w.Header()
	header.Set("Location", location)
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	w.Write(append(body, '\n')) // an error means that the client has disconnected
}

// relative returns path relative to the path of a request.
func relative(r *http.Request, path string) string {
	u, err := url.ParseRequestURI(r.RequestURI) // not r.URL, from which a prefix may have been stripped
	if err != nil || !strings.HasPrefix(u.EscapedPath(), "/") || !strings.HasPrefix(path, "/") {
		return path
	}
	from, to := strings.Split(u.EscapedPath(), "/"), strings.Split(path, "/")
	for len(from) > 1 && len(to) > 1 && from[0] == to[0] {
		from, to = from[1:], to[1:]
	}
	up := strings.Repeat("../", len(from)-1)
	if up == "" {
		up = "./" // otherwise the path may look like a URL with a scheme
	}
	return up + strings.Join(to, "/")
}
