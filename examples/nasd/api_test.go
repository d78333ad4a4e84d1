package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestAPIErrors(t *testing.T) {
	s := newStorage(t, "tank", "backup")
	write(t, openPool(t, s, "tank").files, "dir/a", "a")
	local, open := newAPI(s, newLastResults(s.tasks), true), newAPI(s, newLastResults(s.tasks), false)
	const other = "http://evil.example"
	tests := []struct {
		name, method, path, body string
		host, origin             string
		handler                  http.Handler
		want                     int
	}{
		{name: "pools", method: "GET", path: "/pools", want: 200},
		{name: "snapshots", method: "GET", path: "/pools/tank/snapshots", want: 200},
		{name: "page", method: "GET", path: "/", want: 302},
		{name: "tasks", method: "GET", path: "/tasks/", want: 200},
		{name: "nothing there", method: "GET", path: "/x", want: 404},
		{name: "no such pool", method: "GET", path: "/pools/x/snapshots", want: 404},
		{name: "no such method", method: "DELETE", path: "/pools/tank", want: 404},
		{name: "scrub of no pool", method: "POST", path: "/pools/x/scrub", want: 404},
		{name: "bad pool", method: "POST", path: "/pools/%2e%2e/scrub", want: 400},
		{name: "pool exists", method: "POST", path: "/pools", body: `{"name":"tank"}`, want: 409},
		{name: "bad name", method: "POST", path: "/pools", body: `{"name":"../x"}`, want: 400},
		{name: "no body", method: "POST", path: "/pools", want: 400},
		{name: "misspelt", method: "POST", path: "/pools", body: `{"nmae":"x"}`, want: 400},
		{name: "large body", method: "POST", path: "/pools", body: `{"name":"` + strings.Repeat("x", 1<<20) + `"}`, want: 413},
		{name: "to nowhere", method: "POST", path: "/pools/tank/replicate", body: `{"to":"x"}`, want: 404},
		{name: "to itself", method: "POST", path: "/pools/tank/replicate", body: `{"to":"tank"}`, want: 400},
		{name: "put", method: "PUT", path: "/pools/tank/files/b", body: "b", want: 204},
		{name: "put over a directory", method: "PUT", path: "/pools/tank/files/dir", want: 409},
		{name: "put below a file", method: "PUT", path: "/pools/tank/files/dir/a/b", want: 409},
		{name: "put outside", method: "PUT", path: "/pools/tank/files/%2e%2e/manifest", want: 400},
		{name: "put what is hidden", method: "PUT", path: "/pools/tank/files/.incoming/x", want: 400},
		{name: "put nothing", method: "PUT", path: "/pools/tank/files/", want: 400},
		{name: "put into no pool", method: "PUT", path: "/pools/x/files/a", want: 404},
		{name: "another site", method: "POST", path: "/pools/tank/scrub", origin: other, want: 403},
		{name: "another site puts", method: "PUT", path: "/pools/tank/files/a", origin: other, want: 403},
		{name: "another site cancels", method: "POST", path: "/tasks/x/cancel", origin: other, want: 403},
		{name: "rebound", method: "GET", path: "/pools", host: "evil.example", want: 421},
		{name: "rebound with a port", method: "POST", path: "/pools/tank/scrub", host: "evil.example:80", origin: other, want: 421},
		{name: "name of an open one", method: "GET", path: "/pools", host: "nas.example", handler: open, want: 200},
		{name: "localhost", method: "GET", path: "/pools", host: "localhost:8080", want: 200},
		{name: "IPv6", method: "GET", path: "/pools", host: "[::1]:8080", want: 200},
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
			if w.Code >= 400 {
				wantProblem(t, w.Result())
			}
		})
	}
	if ops, err := s.tasks.List(10, 0); err != nil || len(ops) > 0 {
		t.Errorf("started were %v, %v", ops, err)
	}
}

// deadlines makes a recorder a connection that has deadlines.
type deadlines struct{ *httptest.ResponseRecorder }

func (deadlines) SetReadDeadline(time.Time) error  { return nil }
func (deadlines) SetWriteDeadline(time.Time) error { return nil }

// wantProblem checks that an answer has problem details as its body.
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

func TestFailStatus(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{readError{io.ErrUnexpectedEOF}, 400},
		{syscall.ENOSPC, 507},
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
