package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"syscall"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
)

// An api is the REST API of the daemon:
//
//	GET  /api/pools                     all pools, with what they hold, the bytes free on their
//	                                    disk, and the outcome of their last operations
//	POST /api/pools                     {"name": NAME} creates a pool
//	DELETE /api/pools/NAME?confirm=NAME deletes a pool and its snapshots
//	PUT  /api/pools/NAME/files/PATH     stores the body as a file, as an operation; 204 when done
//	POST /api/pools/NAME/scrub          reads all files and finds corrupted ones
//	POST /api/pools/NAME/accept         accepts the present content of all files
//	POST /api/pools/NAME/replicate      {"to": NAME} copies changed files to another pool
//	POST /api/pools/NAME/snapshot       takes a snapshot
//	GET  /api/pools/NAME/snapshots      all snapshots, oldest first
//	GET  /api/pools/NAME/snapshots/ID/files?prefix=PREFIX
//	                                    the first 1,000 files of a snapshot whose paths begin with
//	                                    PREFIX, and whether there are more
//	POST /api/pools/NAME/snapshots/ID/restore
//	                                    {"path": PATH} restores a file from a snapshot
//	     /api/tasks/                    the operations, and their page at ui: see package taskhttp
//	GET  /                              the web page
//
// The response to a POST or DELETE is 202 and the operation that was started, or the same
// operation if it was already waiting or running.
type api struct {
	storage *storage
	last    *lastResults
	usages  *usages
}

// tasksPath is the path prefix of the operations.
const tasksPath = "/api/tasks"

// newAPI returns the API. If local, it accepts only IP addresses and "localhost" in the
// Host header.
func newAPI(s *storage, last *lastResults, local bool) http.Handler {
	a := &api{s, last, &usages{storage: s, pool: make(map[string]*measurement)}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /api/pools", a.create)
	mux.HandleFunc("GET /api/pools", a.pools)
	mux.HandleFunc("DELETE /api/pools/{name}", a.remove)
	mux.HandleFunc("PUT /api/pools/{name}/files/{path...}", a.put)
	mux.HandleFunc("POST /api/pools/{name}/scrub", a.on(s.scrub))
	mux.HandleFunc("POST /api/pools/{name}/accept", a.on(s.accept))
	mux.HandleFunc("POST /api/pools/{name}/replicate", a.replicate)
	mux.HandleFunc("POST /api/pools/{name}/snapshot", a.on(s.snapshot))
	mux.HandleFunc("GET /api/pools/{name}/snapshots", a.snapshots)
	mux.HandleFunc("GET /api/pools/{name}/snapshots/{id}/files", a.filesOf)
	mux.HandleFunc("POST /api/pools/{name}/snapshots/{id}/restore", a.restore)
	mux.Handle(tasksPath+"/", http.StripPrefix(tasksPath, taskhttp.Handler(s.tasks)))
	mux.HandleFunc("GET /{$}", servePage)

	// A page of another site must not start anything here, neither directly nor through a
	// host name of its own that resolves to this machine.
	protection := http.NewCrossOriginProtection()
	protection.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		taskhttp.Problem(w, r, http.StatusForbidden, errors.New("requests from pages of other sites are not allowed"))
	}))
	h := protection.Handler(routed(mux))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if local && !isAddress(r.Host) {
			taskhttp.Problem(w, r, http.StatusMisdirectedRequest, errors.New("the Host header must be an IP address or localhost"))
			return
		}
		h.ServeHTTP(w, r)
	})
}

// routed responds with problem details to requests that the mux would reject in plain text.
func routed(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refuse, pattern := mux.Handler(r)
		if pattern != "" {
			mux.ServeHTTP(w, r)
			return
		}
		no := refusal{header: w.Header()} // for Allow
		refuse.ServeHTTP(&no, r)
		err := fmt.Errorf("there is nothing at %s", r.URL.Path)
		if no.status == http.StatusMethodNotAllowed {
			err = fmt.Errorf("%s is not allowed here", r.Method)
		}
		taskhttp.Problem(w, r, no.status, err)
	})
}

// A refusal records the header and the status of a response.
type refusal struct {
	header http.Header
	status int
}

func (f *refusal) Header() http.Header         { return f.header }
func (f *refusal) Write(p []byte) (int, error) { return len(p), nil }
func (f *refusal) WriteHeader(status int)      { f.status = status }

// isAddress reports whether a Host header holds an IP address or localhost.
func isAddress(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	_, err := netip.ParseAddr(host)
	return err == nil || host == "localhost"
}

func (a *api) create(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name string `json:"name"`
	}
	if err := readJSON(w, r, &in); err != nil {
		fail(w, r, err)
		return
	}
	op, err := a.storage.create(in.Name)
	if err == nil || errors.Is(err, task.ErrExists) {
		// The client will use the pool next, so wait until it exists, but not for long.
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		if now, _ := a.storage.tasks.Wait(ctx, op.ID); now != nil {
			op = now
		}
	}
	answer(w, r, op, err)
}

func (a *api) remove(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	switch confirm := r.URL.Query().Get("confirm"); confirm {
	case name:
		op, err := a.storage.remove(name)
		answer(w, r, op, err)
	case "":
		fail(w, r, inputError("deleting a pool needs the query ?confirm=NAME with its name"))
	default:
		taskhttp.Problem(w, r, http.StatusConflict, fmt.Errorf("confirm is %q, not the name of the pool", confirm))
	}
}

func (a *api) replicate(w http.ResponseWriter, r *http.Request) {
	var in struct {
		To string `json:"to"`
	}
	if err := readJSON(w, r, &in); err != nil {
		fail(w, r, err)
		return
	}
	op, err := a.storage.replicate(r.PathValue("name"), in.To)
	answer(w, r, op, err)
}

// on returns a handler that starts an operation on a pool.
func (a *api) on(start func(pool string) (*task.Operation, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		op, err := start(r.PathValue("name"))
		answer(w, r, op, err)
	}
}

func answer(w http.ResponseWriter, r *http.Request, op *task.Operation, err error) {
	if err != nil && !errors.Is(err, task.ErrExists) {
		fail(w, r, err)
		return
	}
	taskhttp.Accepted(w, r, tasksPath, op)
}

// patience is how long the list of pools waits for measurements in progress.
const patience = 200 * time.Millisecond

func (a *api) pools(w http.ResponseWriter, r *http.Request) {
	names, err := a.storage.names()
	if err != nil {
		fail(w, r, err)
		return
	}
	type pool struct {
		Name  string                     `json:"name"`
		Usage *usage                     `json:"usage,omitempty"` // absent while unknown
		Free  *int64                     `json:"free,omitempty"`
		Last  map[string]*task.Operation `json:"last,omitempty"` // finished operations, by kind
	}
	pools := make([]pool, 0, len(names))
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	for _, name := range names {
		p := pool{Name: name, Usage: a.usages.of(ctx, name), Last: a.last.of(name)}
		if free, err := freeBytes(filepath.Join(a.storage.pools.Name(), name)); err == nil { // unknown on some systems
			p.Free = &free
		}
		pools = append(pools, p)
	}
	writeJSON(w, map[string]any{"pools": pools})
}

func (a *api) snapshots(w http.ResponseWriter, r *http.Request) {
	ids, err := a.storage.snapshots(r.PathValue("name"))
	if err != nil {
		fail(w, r, err)
		return
	}
	snapshots := make([]snapshotInfo, 0, len(ids))
	for _, id := range ids {
		snapshots = append(snapshots, newSnapshotInfo(id))
	}
	writeJSON(w, map[string]any{"snapshots": snapshots})
}

func (a *api) filesOf(w http.ResponseWriter, r *http.Request) {
	p, err := a.storage.open(r.PathValue("name"))
	if err != nil {
		fail(w, r, err)
		return
	}
	defer p.close()
	files, more, err := p.filesOf(r.Context(), r.PathValue("id"), r.URL.Query().Get("prefix"))
	if err != nil {
		fail(w, r, err)
		return
	}
	writeJSON(w, map[string]any{"files": files, "more": more})
}

func (a *api) restore(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Path string `json:"path"`
	}
	if err := readJSON(w, r, &in); err != nil {
		fail(w, r, err)
		return
	}
	op, err := a.storage.restore(r.PathValue("name"), r.PathValue("id"), in.Path)
	answer(w, r, op, err)
}

func (a *api) put(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	err := a.storage.upload(r.Context(), &upload{
		pool: r.PathValue("name"), path: r.PathValue("path"), size: r.ContentLength, body: r.Body,
		setReadDeadline: c.SetReadDeadline,
	})
	if err != nil {
		// Before sending the response, the server reads some of the remaining body. A
		// client that sends nothing must not delay that.
		c.SetReadDeadline(time.Now().Add(time.Second))
		fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// slowBody returns the body of a request. Reading it may take any amount of time, as long
// as some data arrives every 30 seconds (idleBody).
func slowBody(w http.ResponseWriter, r *http.Request) io.Reader {
	c := http.NewResponseController(w)
	return readerFunc(func(p []byte) (int, error) {
		if err := c.SetReadDeadline(time.Now().Add(idleBody)); err != nil {
			return 0, err
		}
		return r.Body.Read(p)
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, io.NopCloser(slowBody(w, r)), 1<<20))
	d.DisallowUnknownFields()
	switch err := d.Decode(v); {
	case errors.As(err, new(*http.MaxBytesError)):
		return err // taskhttp has a status for it
	case err != nil:
		return inputError("the body must be a JSON object: " + err.Error())
	case d.Decode(new(any)) != io.EOF:
		return inputError("the body must be a single JSON object")
	default:
		return nil
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		slog.Debug("answer not written", "err", err)
	}
}

// fail responds with an error. It leaves errors that are not from the storage service to
// taskhttp.
func fail(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.As(err, new(inputError)), errors.Is(err, syscall.ENAMETOOLONG),
		errors.As(err, new(readError)): // of the body
		taskhttp.Problem(w, r, http.StatusBadRequest, err)
	case errors.Is(err, fs.ErrExist), errors.As(err, new(placeError)), errors.Is(err, task.ErrCancelled):
		taskhttp.Problem(w, r, http.StatusConflict, err)
	case errors.Is(err, fs.ErrNotExist):
		taskhttp.Problem(w, r, http.StatusNotFound, err)
	case errors.Is(err, syscall.ENOSPC):
		taskhttp.Problem(w, r, http.StatusInsufficientStorage, err)
	default:
		taskhttp.Error(w, r, err)
	}
}
