package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

func TestAPIErrors(t *testing.T) {
	s := newStorage(t, "tank", "backup")
	files := openPool(t, s, "tank").files
	write(t, files, "dir/a", "a")
	write(t, s.pools, "stray", "")
	for name, target := range map[string]string{"out": t.TempDir(), "nowhere": "gone", "loop": "loop"} {
		must(t, os.Symlink(target, filepath.Join(files.Name(), name)))
	}
	const snap, restore = "20260102T030405.000Z", "/api/pools/tank/snapshots/20260102T030405.000Z/restore"
	write(t, openPool(t, s, "tank").root, snapshotsDir+"/"+snap+"/dir/a", "a")
	local, open := newAPI(s, newLastResults(s.tasks), true), newAPI(s, newLastResults(s.tasks), false)
	const other = "http://evil.example"
	tests := []struct {
		name, method, path, body string
		host, origin             string
		handler                  http.Handler
		want                     int
	}{
		{name: "pools", method: "GET", path: "/api/pools", want: 200},
		{name: "snapshots", method: "GET", path: "/api/pools/tank/snapshots", want: 200},
		{name: "files of a snapshot", method: "GET", path: "/api/pools/tank/snapshots/" + snap + "/files?prefix=dir/", want: 200},
		{name: "files of an unknown snapshot", method: "GET", path: "/api/pools/backup/snapshots/" + snap + "/files", want: 404},
		{name: "files of no snapshot", method: "GET", path: "/api/pools/tank/snapshots/%2e%2e/files", want: 400},
		{name: "files in an unknown pool", method: "GET", path: "/api/pools/x/snapshots/" + snap + "/files", want: 404},
		{name: "page", method: "GET", path: "/", want: 200},
		{name: "tasks", method: "GET", path: "/api/tasks/", want: 200},
		{name: "unknown path", method: "GET", path: "/x", want: 404},
		{name: "no such pool", method: "GET", path: "/api/pools/x/snapshots", want: 404},
		{name: "no such method", method: "DELETE", path: "/api/pools", want: 405},
		{name: "scrub of an unknown pool", method: "POST", path: "/api/pools/x/scrub", want: 404},
		{name: "bad pool name", method: "POST", path: "/api/pools/%2e%2e/scrub", want: 400},
		{name: "pool exists", method: "POST", path: "/api/pools", body: `{"name":"tank"}`, want: 409},
		{name: "bad name for a new pool", method: "POST", path: "/api/pools", body: `{"name":"../x"}`, want: 400},
		{name: "name is taken by a file", method: "POST", path: "/api/pools", body: `{"name":"stray"}`, want: 409},
		{name: "more than one object", method: "POST", path: "/api/pools", body: `{"name":"x"} {}`, want: 400},
		{name: "no body", method: "POST", path: "/api/pools", want: 400},
		{name: "misspelt member", method: "POST", path: "/api/pools", body: `{"nmae":"x"}`, want: 400},
		{name: "large body", method: "POST", path: "/api/pools", body: `{"name":"` + strings.Repeat("x", 1<<20) + `"}`, want: 413},
		{name: "replicate to an unknown pool", method: "POST", path: "/api/pools/tank/replicate", body: `{"to":"x"}`, want: 404},
		{name: "replicate to itself", method: "POST", path: "/api/pools/tank/replicate", body: `{"to":"tank"}`, want: 400},
		{name: "put", method: "PUT", path: "/api/pools/tank/files/b", body: "b", want: 204},
		{name: "put over a directory", method: "PUT", path: "/api/pools/tank/files/dir", want: 409},
		{name: "put below a file", method: "PUT", path: "/api/pools/tank/files/dir/a/b", want: 409},
		{name: "put through a link to outside", method: "PUT", path: "/api/pools/tank/files/out/x", want: 409},
		{name: "put through a dangling link", method: "PUT", path: "/api/pools/tank/files/nowhere/x", want: 409},
		{name: "put through a loop", method: "PUT", path: "/api/pools/tank/files/loop/x", want: 409},
		{name: "put with a long name", method: "PUT", path: "/api/pools/tank/files/" + strings.Repeat("x", 300), want: 400},
		{name: "put below a long name", method: "PUT", path: "/api/pools/tank/files/" + strings.Repeat("x", 300) + "/x", want: 400},
		{name: "put outside of the pool", method: "PUT", path: "/api/pools/tank/files/%2e%2e/manifest", want: 400},
		{name: "put into .incoming", method: "PUT", path: "/api/pools/tank/files/.incoming/x", want: 400},
		{name: "put without a name", method: "PUT", path: "/api/pools/tank/files/", want: 400},
		{name: "put into an unknown pool", method: "PUT", path: "/api/pools/x/files/a", want: 404},
		{name: "restore outside of the snapshot", method: "POST", path: restore, body: `{"path":"../../manifest"}`, want: 400},
		{name: "restore an absolute path", method: "POST", path: restore, body: `{"path":"/etc/passwd"}`, want: 400},
		{name: "restore a path with NUL", method: "POST", path: restore, body: `{"path":"dir/a\u0000"}`, want: 400},
		{name: "restore without a path", method: "POST", path: restore, body: `{}`, want: 400},
		{name: "restore into .incoming", method: "POST", path: restore, body: `{"path":".incoming/x"}`, want: 400},
		{name: "restore an unknown file", method: "POST", path: restore, body: `{"path":"dir/b"}`, want: 404},
		{name: "restore a directory", method: "POST", path: restore, body: `{"path":"dir"}`, want: 409},
		{name: "restore from an unknown snapshot", method: "POST", path: strings.Replace(restore, "2026", "2025", 1), body: `{"path":"dir/a"}`, want: 404},
		{name: "restore from no snapshot", method: "POST", path: "/api/pools/tank/snapshots/%2e%2e/restore", body: `{"path":"manifest"}`, want: 400},
		{name: "restore into an unknown pool", method: "POST", path: strings.Replace(restore, "tank", "x", 1), body: `{"path":"dir/a"}`, want: 404},
		{name: "delete without confirmation", method: "DELETE", path: "/api/pools/tank", want: 400},
		{name: "delete with another name", method: "DELETE", path: "/api/pools/tank?confirm=backup", want: 409},
		{name: "delete an unknown pool", method: "DELETE", path: "/api/pools/x?confirm=x", want: 404},
		{name: "delete a bad name", method: "DELETE", path: "/api/pools/%2e%2e?confirm=%2e%2e", want: 400},
		{name: "another site deletes", method: "DELETE", path: "/api/pools/tank?confirm=tank", origin: other, want: 403},
		{name: "another site", method: "POST", path: "/api/pools/tank/scrub", origin: other, want: 403},
		{name: "another site puts", method: "PUT", path: "/api/pools/tank/files/a", origin: other, want: 403},
		{name: "another site cancels", method: "POST", path: "/api/tasks/x/cancel", origin: other, want: 403},
		{name: "DNS rebinding", method: "GET", path: "/api/pools", host: "evil.example", want: 421},
		{name: "DNS rebinding with a port", method: "POST", path: "/api/pools/tank/scrub", host: "evil.example:80", origin: other, want: 421},
		{name: "host name, not local", method: "GET", path: "/api/pools", host: "nas.example", handler: open, want: 200},
		{name: "localhost", method: "GET", path: "/api/pools", host: "localhost:8080", want: 200},
		{name: "IPv6", method: "GET", path: "/api/pools", host: "[::1]:8080", want: 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.handler == nil {
				tt.handler = local
			}
			r := httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body))
			r.Host = "127.0.0.1:8080"
			if tt.host != "" {
				r.Host = tt.host
			}
			if tt.origin != "" {
				r.Header.Set("Origin", tt.origin)
			}
			w := httptest.NewRecorder()
			tt.handler.ServeHTTP(deadlines{w}, r)
			if w.Code != tt.want {
				t.Fatalf("got %d, want %d: %s", w.Code, tt.want, w.Body)
			}
			if got := w.Header().Get("Allow"); w.Code == 405 && got != "GET, HEAD, POST" {
				t.Errorf("Allow is %q", got)
			}
			if w.Code >= 400 {
				wantProblem(t, w.Result())
			}
		})
	}
	ops, err := s.tasks.List(10, 0)
	if err != nil || len(ops) != 1 || ops[0].Name != "upload tank/b" || ops[0].State != task.StateDone {
		t.Errorf("the requests have started %v, %v, want the one upload", ops, err)
	}
}

// deadlines adds deadline methods to a response recorder.
type deadlines struct{ *httptest.ResponseRecorder }

func (deadlines) SetReadDeadline(time.Time) error  { return nil }
func (deadlines) SetWriteDeadline(time.Time) error { return nil }

// wantProblem checks that the body of a response is problem details.
func wantProblem(t *testing.T, resp *http.Response) {
	t.Helper()
	var p struct {
		Title, Detail string
		Status        int
	}
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	if err := json.Unmarshal(body, &p); err != nil || p.Title == "" || p.Detail == "" || p.Status != resp.StatusCode ||
		resp.Header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("got %s (%v) with %v, want problem details", body, err, resp.Header)
	}
}

// TestCreateWaits checks that the response waits for the pool, but not for long.
func TestCreateWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStorage(t)
		h := newAPI(s, newLastResults(s.tasks), true)
		create := func(name string) (state task.State) {
			w := httptest.NewRecorder()
			r := httptest.NewRequest("POST", "/api/pools", strings.NewReader(`{"name":"`+name+`"}`))
			r.Host = "localhost"
			h.ServeHTTP(deadlines{w}, r)
			var op task.Operation
			must(t, json.Unmarshal(w.Body.Bytes(), &op))
			return op.State
		}
		if got := create("tank"); got != task.StateDone {
			t.Errorf("answered with %s, want %s", got, task.StateDone)
		}
		end := make(chan struct{})
		_, err := s.submit(about{Kind: "hold", Pool: "busy"}, func(context.Context, func(int)) (any, error) {
			<-end
			return nil, nil
		})
		must(t, err)
		began := time.Now()
		if got := create("busy"); got != task.StatePending || time.Since(began) != time.Second {
			t.Errorf("answered with %s after %v, want %s after a second", got, time.Since(began), task.StatePending)
		}
		close(end)
	})
}

// TestPage checks that the policy allows only the page's own script and style.
func TestPage(t *testing.T) {
	w := httptest.NewRecorder()
	servePage(w, httptest.NewRequest("GET", "/", nil))
	policy := w.Header().Get("Content-Security-Policy")
	if strings.Count(policy, "'sha256-") != 2 || !strings.Contains(policy, "default-src 'none'") ||
		strings.Contains(policy, hash("no such element")) {
		t.Errorf("the policy is %s", policy)
	}
	if got := w.Header().Get("Content-Type"); got != "text/html; charset=utf-8" || !strings.Contains(w.Body.String(), "</html>") {
		t.Errorf("the page is %s: %s", got, w.Body)
	}
}

func TestFailStatus(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{readError{io.ErrUnexpectedEOF}, 400},
		{syscall.ENOSPC, 507},
		{placeError{syscall.ELOOP}, 409},
		{placeError{syscall.ENAMETOOLONG}, 400},
		{deletedError{}, 404},
		{task.ErrCancelled, 409},
		{task.ErrClosed, 503},
		{errors.New("anything else"), 500},
	} {
		w := httptest.NewRecorder()
		fail(w, httptest.NewRequest("GET", "/", nil), tt.err)
		if w.Code != tt.want {
			t.Errorf("%v: got %d, want %d", tt.err, w.Code, tt.want)
		}
		wantProblem(t, w.Result())
	}
}
