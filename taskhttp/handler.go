// Package taskhttp serves the operations of a [task.Manager] over HTTP: as
// JSON, as server-sent events, and as a page for the browser.
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
// The list has the newest submission first, or, with order=finish, only finished
// operations, the one that finished last first. The parameters state, name,
// containing (a part of the name), metadata.KEY=VALUE, finished_after and
// finished_before select operations, and can be combined. A response with a
// next_cursor is not the last page.
//
// Cancel does not wait until the operation has ended. Its response has the status
// 202 and the present state of the operation: a PENDING operation will not start,
// but becomes CANCELLED only when that is stored. Wait returns after that. The
// error of a cancelled operation contains the address from which it was cancelled,
// and the reason from the query parameter "reason".
//
// A stream of events begins with the event "snapshot", which holds the live
// operations, and continues with an event "operation" for each change. The stream
// contains every change of state, and the latest progress. A client that
// reconnects with Last-Event-ID, as browsers do, gets the events that it has
// missed. The stream has these further events:
//
//   - "reload": events are missing, because the history of events has expired or
//     because the client was too slow. The client must load the list again.
//   - "deleted": an unfinished operation was deleted from the database. It has no
//     final state.
//   - "heartbeat": there was no other event for 15 seconds, or the client has just
//     reconnected. A client that receives nothing for longer has lost its connection.
//   - "closed": the manager is closed.
//
// A client therefore never misses a final state without a notice. An event may come
// twice, and GET may return a newer state than the next event: compare updated_at.
// A finished operation never changes.
//
// Lists and events omit metadata and results of more than 16 KiB as JSON, and set
// metadata_omitted and result_omitted. They cut names, messages and errors to that length.
// GET /{id} returns the full values. A page ends before its limit at 8 MiB: a client
// continues while there is a next_cursor. A client that receives nothing for 25
// seconds is disconnected.
//
//	curl -N localhost:8080/api/tasks/events
//
// Every client that reaches the [Handler] can see and cancel every operation.
// Wrap the handler in the application's own authentication, as the package's
// example does.
//
// Listening only on 127.0.0.1 or in a local network does not protect a handler
// without authentication. A page from the internet can make its own name resolve to
// such an address in a visitor's browser (DNS rebinding). For the browser and for
// [http.CrossOriginProtection] its requests then have the same origin as the page,
// so that the page can read and cancel every operation. The Host header of these
// requests contains the name of the page, and this package does not check it:
// refuse requests for names that are not the server's own, as an example does. A
// login by password, or by a cookie for the server's own name, also helps, because
// the browser does not send it to another name.
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
	listChunk    = 64 // operations that are read at once

	maxValue = 16 << 10 // bytes of metadata, results and texts in lists and events
	maxPage  = 8 << 20  // bytes of a list or a snapshot

	defaultTimeout = 30 * time.Second // of a wait
	maxTimeout     = 10 * time.Minute

	// grace is the time that a client may take to receive a piece of a response, in
	// addition to the time between heartbeats.
	grace = 10 * time.Second

	// shutdownGrace is how long streams and waits continue after the start of the
	// server's shutdown.
	shutdownGrace = 500 * time.Millisecond
)

// An Option changes what a [Handler] serves.
type Option func(*handler)

// Title sets the heading of the page, with which its title in the browser begins
// too. It is "Tasks" by default.
func Title(text string) Option { return func(h *handler) { h.title = text } }

// Home adds a link with that text to the page, to a page of the application. The
// URL may be relative to that of the page.
func Home(text, url string) Option {
	return func(h *handler) { h.homeText, h.homeURL = text, url }
}

// TrustedOrigin admits cross-origin requests from pages of that origin, such as
// "https://nas.example:8443". It is for a reverse proxy that changes the Host header:
// the origin is that of the proxy, as browsers see it. TrustedOrigin may be given
// several times. Handler panics if the origin has another form.
func TrustedOrigin(origin string) Option {
	return func(h *handler) {
		if err := h.guard.AddTrustedOrigin(origin); err != nil {
			panic(fmt.Sprintf("taskhttp: trusted origin: %v", err))
		}
	}
}

// RunAgain offers to run finished operations again, over HTTP and on the page. f
// gets the operation, and submits another one, for example by its name and its
// metadata. f returns what [task.Manager.Submit] has returned: with
// [task.WithUnique], a second click then leads to the unfinished operation that the
// first one has started. For an operation that cannot be run again, f returns an
// error that wraps [errors.ErrUnsupported].
//
// f is called for DONE, FAILED and CANCELLED operations, several times at once. If it
// panics, the response has the status 500, and the stack is logged to [slog.Default].
// Without RunAgain, these requests have the response 501.
func RunAgain(f func(*task.Operation) (*task.Operation, error)) Option {
	return func(h *handler) { h.runAgain = f }
}

// Handler returns a handler that serves m. Mount it under any prefix, with a
// slash at the end:
//
//	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(m)))
//
// It refuses cross-origin requests that change something. It compares the Origin
// header with the Host header, which a reverse proxy must therefore pass on, unless
// its origin is a [TrustedOrigin]. It sets its own deadlines where a response may take longer than [http.Server]
// allows. Event streams and waits end when the client disconnects, when m is
// closed, and when the http.Server that serves them is shut down: they do not
// delay its Shutdown.
//
// The handler needs no closing: it releases the event history when m is closed,
// or a minute after the last stream has ended.
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
	page                     []byte // with the title and the link of the options
	title, homeText, homeURL string
	runAgain                 func(*task.Operation) (*task.Operation, error) // nil without RunAgain

	mu       sync.Mutex // guards what follows
	recorder *recorder  // nil until the first stream
	servers  map[*http.Server]context.Context
}

// A route is one line of the table above. serve either writes a response or
// returns an error.
type route struct {
	method, path string
	query        []string // the names of its parameters
	serve        func(w http.ResponseWriter, r *http.Request, query url.Values) error
}

// metadataPrefix begins the names of parameters that select by metadata.
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

// parse parses the query of a request for a route with parameters. It ignores
// unknown parameters, which may be meant for a wrapper of the handler.
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

// clean reports whether the mux serves p without a redirect. Its redirects would
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
	if more { // an error is for the request for the next page
		id, _ := json.Marshal(last)
		s.write(fmt.Appendf(nil, `,"next_cursor":%s`, id))
	}
	s.write([]byte("}\n"))
	return nil
}

// listOptions returns the options that the query of a list asks for, except those
// of its pages.
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

// history yields the operations after the one with that ID, chunk by chunk.
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

// A light is an operation in the form that lists and events contain.
type light struct {
	*task.Operation
	MetadataOmitted bool `json:"metadata_omitted,omitempty"`
	ResultOmitted   bool `json:"result_omitted,omitempty"`
}

// lighten returns op without the values that are too long for a list.
func lighten(op *task.Operation) light {
	c := *op
	c.Name, c.Message, c.Error = cut(c.Name), cut(c.Message), cut(c.Error)
	return light{&c, omit(&c.Metadata), omit(&c.Result)}
}

// omit reports whether a value was omitted from a list, or must be.
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

// encode returns an operation as JSON. If it can't be encoded, the JSON has an
// error that says why.
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

// add writes an operation, and reports whether it fits.
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

// parseStates parses the parameter state. It may be repeated, and each value may
// hold several states, separated by commas.
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

// parseTime parses a time. The zero time means that there is none.
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

// whole writes a response with the complete operation, with its values as they are
// stored.
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

// respond begins a response of JSON, which the stream writes. The caller must then
// call end.
func (h *handler) respond(w http.ResponseWriter, r *http.Request, status int) (s *stream, end func()) {
	ctx, cancel := h.context(r)
	s = &stream{ctx: ctx, w: w, c: http.NewResponseController(w)}
	stop := s.unblock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	return s, func() { s.send(s.buf); stop(); cancel() }
}

// look returns the present state of an operation. Unlike Manager.Get, Wait
// distinguishes an error of the database from an unknown operation; with a context
// that is done it does not wait.
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
	case err != nil: // it had finished before
		status = http.StatusOK
	}
	return h.whole(w, r, status, op)
}

// maxReason is the maximum length in bytes of the reason for a cancel.
const maxReason = 1000

// cancelText returns a text about who cancels an operation, and why. Behind a
// proxy, the address is the proxy's; over a Unix socket there is none.
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

// callRunAgain calls the application's function, and makes an error of a panic and
// of a missing operation.
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
		return h.get(w, r, nil) // no wait for a response without a body
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
	return h.whole(w, r, http.StatusOK, op) // in its present state after a timeout
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

// context returns the request's context, which is also done soon after the start
// of the server's shutdown. After cancel, nothing of the request is used except
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

// serving returns a context that is done shutdownGrace after the start of the
// server's shutdown. The delay lets final events reach clients if the manager was
// closed just before.
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

// Accepted writes the response to a request that has started op, or that finds op
// started already (see [task.ErrExists]): the status 202, the operation as the body,
// and its address as the header Location. base is the path under which the [Handler]
// is mounted, for example "/api/tasks". Location is relative to the address of the
// request, so that it is right behind a proxy that serves all under a prefix, too.
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

// relative returns a path relative to the path of a request.
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
		up = "./" // the rest may begin with what looks like a scheme
	}
	return up + strings.Join(to, "/")
}
