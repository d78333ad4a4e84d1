// Package taskhttp serves the operations of a [task.Manager] over HTTP: as
// JSON, as server-sent events, and as a page for the browser.
//
//	GET  /               the history, newest first, by state and name, page by page
//	GET  /{id}           one operation
//	POST /{id}/cancel    cancels it
//	GET  /{id}/wait      answers once it has finished
//	GET  /events         what happens to all operations, as it happens
//	GET  /{id}/events    what happens to one
//	GET  /ui             the page
//	GET  /openapi.json   the description of all this
//
// Errors are told as problem details (RFC 9457).
//
// A stream of events begins with "snapshot", the operations that are live, and
// goes on with an "operation" whenever one changes: in every state that it gets
// to, while progress is conflated to the latest. Whoever comes back with
// Last-Event-ID, as browsers do by themselves, gets what was missed; "reload"
// says that this is no longer known, or that the client was too slow, and that
// the list has to be read anew. "closed" says that the manager is. So nobody
// misses a final state without being told. An event may come twice, and what
// GET returns may be newer than the next event: updated_at tells, and what has
// finished never changes.
//
//	curl -N localhost:8080/api/tasks/events
//
// Whoever may reach the [Handler] may see everything and cancel everything:
// wrap it in the application's own authentication, as the package's example
// does.
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

	// grace is how long a client may take to receive what is written to it.
	grace = 10 * time.Second

	// farewell is how long streams and waits go on when the server is shut down.
	farewell = 500 * time.Millisecond
)

// Handler returns a handler that serves m. Mount it under any prefix, with a
// slash at the end:
//
//	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(m)))
//
// It refuses requests that change something and come from the pages of other
// origins. A reverse proxy in front has to pass the Host header on, by which
// that is told. It sets its own deadlines where an answer may take longer than
// [http.Server] would allow. Event streams and waits end when the client goes,
// when m is closed, and when the http.Server that serves them is shut down:
// they don't hold up its Shutdown.
//
// It needs no closing: what it keeps for event streams goes with m, or a minute
// after the last one.
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
	recorder *recorder  // nil until somebody listens
	servers  map[*http.Server]context.Context
}

// A route is one line of the table above. It serves a request by answering it
// or by returning an error, not both.
type route struct {
	method, path string
	query        []string // the parameters that it knows
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

// parse reads the query of a request for a route with parameters. Those that it
// doesn't know may be meant for whatever wraps the handler, and don't matter.
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
	if r.URL.Path == "" { // mounted without the slash
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
	// The mux knows which methods there would be, but answers in plain text.
	var refused refusal
	mux.ServeHTTP(&refused, r)
	allow := refused.Header().Get("Allow")
	switch {
	case allow == "":
		Problem(w, r, http.StatusNotFound, errors.New("there is nothing at this path"))
	case r.Method == http.MethodOptions:
		header.Set("Allow", allow+", OPTIONS")
		w.WriteHeader(http.StatusNoContent)
	default:
		header.Set("Allow", allow+", OPTIONS")
		Problem(w, r, http.StatusMethodNotAllowed, fmt.Errorf("%.20q is not a method of this path", r.Method))
	}
}

// clean reports whether the mux would serve p as it is. It would redirect
// others, without knowing the prefix under which it is mounted.
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

// A page is what the list answers with.
type page struct {
	Tasks      []*task.Operation `json:"tasks"`
	NextCursor string            `json:"next_cursor,omitempty"` // leads to the next page, if there is one
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
	ops, err := h.manager.List(limit+1, 0, // one more tells whether there are more
		task.ByState(states...), task.ByName(query.Get("name")), task.Before(cursor))
	if cursor != "" && errors.Is(err, task.ErrNotFound) {
		return badParameter("cursor", "there is no operation %.64q any more: start with the first page", cursor)
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

// parseStates reads the parameter state, which may be repeated and may hold
// several, separated by commas.
func parseStates(values []string) (states []task.State, err error) {
	for name := range strings.SplitSeq(strings.Join(values, ","), ",") {
		if name == "" {
			continue
		}
		state := task.State(name)
		if !slices.Contains(allStates, state) {
			return nil, badParameter("state", "%.64q is none of %v", name, allStates)
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

// look returns an operation as it is now. Manager.Get would not tell an error
// of the database from an unknown operation; Wait does, and this one doesn't
// wait.
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
	case err != nil: // it has finished before
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
		c.SetWriteDeadline(time.Now().Add(server.WriteTimeout)) // as for any other answer
	}
	return writeJSON(w, http.StatusOK, op) // as it is, if the time is up
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

// context returns the request's context, which is also done soon after the
// server that serves it is shut down. Nothing of the request is used after
// cancel but the context itself.
func (h *handler) context(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	server, ok := ctx.Value(http.ServerContextKey).(*http.Server)
	if !ok {
		return ctx, cancel
	}
	stop := context.AfterFunc(h.serving(server), cancel)
	return ctx, func() { stop(); cancel() }
}

// serving returns a context that is done soon after server is shut down. A
// manager that was closed just before has until then to send its last events,
// which tell how operations ended.
func (h *handler) serving(server *http.Server) context.Context {
	h.mu.Lock()
	defer h.mu.Unlock()
	ctx := h.servers[server]
	if ctx == nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(context.Background())
		server.RegisterOnShutdown(func() { time.AfterFunc(farewell, cancel) })
		h.servers[server] = ctx
	}
	return ctx
}

// Accepted answers a request that has started op: with the status 202, the
// operation as body, and in the header Location where to find it. base is the
// path under which the [Handler] is mounted, as in "/api/tasks".
func Accepted(w http.ResponseWriter, base string, op *task.Operation) {
	header := w.Header()
	header.Set("Location", strings.TrimSuffix(base, "/")+"/"+url.PathEscape(op.ID))
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	if err := writeJSON(w, http.StatusAccepted, op); err != nil {
		Error(w, nil, err)
	}
}

// writeJSON answers with v, or returns an error if that can't be encoded.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(v); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body.Bytes()) // nobody is left to be told of an error
	return nil
}
