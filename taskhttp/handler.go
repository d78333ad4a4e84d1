// Package taskhttp serves the operations of a [task.Manager] over HTTP: as
// JSON, as server-sent events, and as a page for the browser.
//
//	GET  /               lists the history, newest first, by state and name, in pages
//	GET  /{id}           returns one operation
//	POST /{id}/cancel    cancels one operation
//	GET  /{id}/wait      waits until one operation has finished
//	GET  /events         streams the changes of all operations
//	GET  /{id}/events    streams the changes of one operation
//	GET  /ui             serves the page
//	GET  /openapi.json   serves the description of this interface
//
// Errors are problem details (RFC 9457).
//
// Cancel does not wait until the operation has ended. Its response has the status
// 202 and the operation as it is then: a PENDING operation will not start, but
// becomes CANCELLED only when that is stored. Wait returns it after that.
//
// A stream of events begins with the event "snapshot", which holds the live
// operations, and continues with an event "operation" for each change. No change
// of state is left out; of progress, only the latest is sent. A client that
// reconnects with Last-Event-ID, as browsers do, gets the events that it has
// missed. The event "reload" means that events are missing, because the history
// of events has expired or because the client was too slow: the client must load
// the list again. The event "closed" means that the manager is closed. A client
// therefore never misses a final state without a notice. An event may come twice,
// and GET may return a newer state than the next event: compare updated_at. A
// finished operation never changes.
//
//	curl -N localhost:8080/api/tasks/events
//
// Every client that reaches the [Handler] can see and cancel every operation.
// Wrap the handler in the application's own authentication, as the package's
// example does.
package taskhttp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"path"
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

	defaultTimeout = 30 * time.Second // of a wait
	maxTimeout     = 10 * time.Minute

	// grace is how long a client may take to receive a piece of a stream.
	grace = 10 * time.Second

	// shutdownGrace is how long streams and waits continue after the start of the
	// server's shutdown.
	shutdownGrace = 500 * time.Millisecond
)

// Handler returns a handler that serves m. Mount it under any prefix, with a
// slash at the end:
//
//	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(m)))
//
// It refuses cross-origin requests that change something. It compares the Origin
// header with the Host header, which a reverse proxy must therefore pass on. It
// sets its own deadlines where a response may take longer than [http.Server]
// allows. Event streams and waits end when the client disconnects, when m is
// closed, and when the http.Server that serves them is shut down: they do not
// delay its Shutdown.
//
// The handler needs no closing: it releases the event history when m is closed,
// or a minute after the last stream has ended.
func Handler(m *task.Manager) http.Handler {
	h := &handler{manager: m, servers: make(map[*http.Server]context.Context)}
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
	manager *task.Manager
	mux     http.ServeMux
	guard   http.CrossOriginProtection

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

func (h *handler) routes() []route {
	return []route{
		{"GET", "/{$}", []string{"state", "name", "limit", "cursor"}, h.list},
		{"GET", "/{id}", nil, h.get},
		{"POST", "/{id}/cancel", nil, h.cancel},
		{"GET", "/{id}/wait", []string{"timeout"}, h.wait},
		{"GET", "/events", nil, h.events},
		{"GET", "/{id}/events", nil, h.eventsOf},
		{"GET", "/ui", nil, serveUI},
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
	maps.DeleteFunc(values, func(name string, _ []string) bool { return !slices.Contains(rt.query, name) })
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
		Problem(w, r, http.StatusForbidden, err)
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

// A refusal is a [http.ResponseWriter] that keeps only the header.
type refusal struct{ header http.Header }

func (f *refusal) Header() http.Header {
	if f.header == nil {
		f.header = make(http.Header)
	}
	return f.header
}
func (f *refusal) Write(p []byte) (int, error) { return len(p), nil }
func (f *refusal) WriteHeader(int)             {}

// A page is the response body of the list.
type page struct {
	Tasks      []*task.Operation `json:"tasks"`
	NextCursor string            `json:"next_cursor,omitempty"` // of the next page; empty on the last one
}

func (h *handler) list(w http.ResponseWriter, r *http.Request, query url.Values) error {
	states, err := parseStates(query["state"])
	if err != nil {
		return err
	}
	limit, err := parseLimit(query.Get("limit"))
	if err != nil {
		return err
	}
	cursor := query.Get("cursor")
	ops, err := h.manager.List(limit+1, 0, // one more shows whether there is a next page
		task.WithContext(r.Context()), task.ByState(states...), task.ByName(query.Get("name")), task.Before(cursor))
	if cursor != "" && errors.Is(err, task.ErrNotFound) {
		return badParameter("cursor", "operation %.64q not found, start with the first page", cursor)
	}
	if err != nil {
		return err
	}
	answer := page{Tasks: ops}
	if len(ops) > limit {
		answer.Tasks = ops[:limit]
		answer.NextCursor = ops[limit-1].ID
	}
	return writeJSON(w, http.StatusOK, answer)
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
	return writeJSON(w, http.StatusOK, op)
}

// look returns the present state of an operation. Unlike Manager.Get, Wait
// distinguishes an error of the database from an unknown operation; with a context
// that is done it does not wait.
func (h *handler) look(id string) (*task.Operation, error) {
	done, cancel := context.WithCancel(context.Background())
	cancel()
	op, err := h.manager.Wait(done, id)
	switch {
	case op != nil:
		return op, nil
	case errors.Is(err, task.ErrNotFound):
		return nil, fmt.Errorf("%.64s: %w", id, task.ErrNotFound)
	default:
		return nil, err
	}
}

func (h *handler) cancel(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	id := r.PathValue("id")
	err := h.manager.Cancel(id)
	switch {
	case errors.Is(err, errors.ErrUnsupported): // another manager runs it
		Problem(w, r, http.StatusConflict, err)
		return nil
	case err != nil && !errors.Is(err, task.ErrNotFound):
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
	return writeJSON(w, status, op)
}

func (h *handler) wait(w http.ResponseWriter, r *http.Request, query url.Values) error {
	timeout, err := parseTimeout(query.Get("timeout"))
	if err != nil {
		return err
	}
	c := http.NewResponseController(w)
	c.SetWriteDeadline(time.Time{}) // while it waits
	ctx, cancel := h.context(r)
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, timeout)
	defer cancel()
	op, err := h.manager.Wait(ctx, r.PathValue("id"))
	if err != nil && ctx.Err() == nil || op == nil {
		return err
	}
	if server, ok := r.Context().Value(http.ServerContextKey).(*http.Server); ok && server.WriteTimeout > 0 {
		c.SetWriteDeadline(time.Now().Add(server.WriteTimeout)) // as for any other response
	}
	return writeJSON(w, http.StatusOK, op) // in its present state, if the time is up
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

// Accepted writes the response to a request that has started op: the status 202,
// the operation as the body, and its path as the header Location. base is the
// path under which the [Handler] is mounted, for example "/api/tasks".
func Accepted(w http.ResponseWriter, base string, op *task.Operation) {
	header := w.Header()
	header.Set("Location", strings.TrimSuffix(base, "/")+"/"+url.PathEscape(op.ID))
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	if err := writeJSON(w, http.StatusAccepted, op); err != nil {
		Error(w, nil, err)
	}
}

// writeJSON writes v as the response, or returns an error if v can't be encoded.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(v); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body.Bytes()) // an error means that the client has disconnected
	return nil
}
