package taskhttp_test

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
)

func ExampleHandler() {
	manager := task.NewManager(nil) // in memory; see task.OpenSQLite
	defer manager.Close()

	mux := http.NewServeMux()
	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(manager)))
	// Call http.ListenAndServe("localhost:8080", mux) and open
	// http://localhost:8080/api/tasks/ui.

	server := httptest.NewServer(mux)
	defer server.Close()
	answer, _ := http.Get(server.URL + "/api/tasks/?state=RUNNING")
	body, _ := io.ReadAll(answer.Body)
	answer.Body.Close()
	fmt.Println(answer.StatusCode, string(body))
	// Output: 200 {"tasks":[]}
}

func ExampleAccepted() {
	manager := task.NewManager(nil)
	defer manager.Close()

	scrub := func(ctx context.Context, update func(int)) (any, error) { return "no errors found", nil }
	mux := http.NewServeMux()
	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(manager)))
	mux.HandleFunc("POST /api/pools/{pool}/scrub", func(w http.ResponseWriter, r *http.Request) {
		name := "scrub " + r.PathValue("pool")
		op, err := manager.Submit(name, scrub, task.WithUnique(name))
		if err != nil && !errors.Is(err, task.ErrExists) { // two clicks start one scrub
			taskhttp.Error(w, r, err)
			return
		}
		taskhttp.Accepted(w, r, "/api/tasks", op)
	})

	server := httptest.NewServer(mux)
	defer server.Close()
	answer, _ := http.Post(server.URL+"/api/pools/tank/scrub", "", nil)
	answer.Body.Close()
	fmt.Println(answer.StatusCode)
	location, _ := answer.Location() // absolute
	answer, _ = http.Get(location.String() + "/wait")
	answer.Body.Close()
	fmt.Println(answer.StatusCode)
	// Output:
	// 202
	// 200
}

// The application knows how to run an operation again, here by its name.
func ExampleRunAgain() {
	manager := task.NewManager(nil)
	defer manager.Close()

	scrub := func(ctx context.Context, update func(int)) (any, error) { return "no errors found", nil }
	handler := taskhttp.Handler(manager, taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) {
		if !strings.HasPrefix(op.Name, "scrub ") {
			return nil, fmt.Errorf("%s: %w", op.Name, errors.ErrUnsupported)
		}
		return manager.Submit(op.Name, scrub, task.WithUnique(op.Name)) // two clicks start one scrub
	}))
	server := httptest.NewServer(handler)
	defer server.Close()

	op, _ := manager.Submit("scrub tank", scrub)
	manager.Wait(context.Background(), op.ID)
	answer, _ := http.Post(server.URL+"/"+op.ID+"/again", "", nil)
	answer.Body.Close()
	fmt.Println(answer.StatusCode)
	// Output: 202
}

// The application decides who may see and cancel tasks by wrapping the handler. Browsers
// also send cookies and passwords with requests for event streams.
func ExampleHandler_authentication() {
	manager := task.NewManager(nil)
	defer manager.Close()

	onlyAdmin := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			user, password, _ := r.BasicAuth()
			if user != "admin" || subtle.ConstantTimeCompare([]byte(password), []byte("secret")) != 1 {
				w.Header().Set("WWW-Authenticate", `Basic realm="NAS"`)
				http.Error(w, "unauthorized", http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
	mux := http.NewServeMux()
	mux.Handle("/api/tasks/", onlyAdmin(http.StripPrefix("/api/tasks", taskhttp.Handler(manager))))

	server := httptest.NewServer(mux)
	defer server.Close()
	answer, _ := http.Get(server.URL + "/api/tasks/")
	answer.Body.Close()
	fmt.Println(answer.StatusCode)

	r, _ := http.NewRequest("GET", server.URL+"/api/tasks/", nil)
	r.SetBasicAuth("admin", "secret")
	answer, _ = http.DefaultClient.Do(r)
	answer.Body.Close()
	fmt.Println(answer.StatusCode)
	// Output:
	// 401
	// 200
}

// Without a login, a page on the internet could reach the handler through a host name of
// its own that resolves to this machine (DNS rebinding). This handler serves only requests
// for the machine's own names and for IP addresses, which the page's host name cannot be.
func ExampleHandler_hosts() {
	manager := task.NewManager(nil)
	defer manager.Close()

	names := []string{"localhost", "nas.example.org"}
	known := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, err := net.SplitHostPort(r.Host)
			if err != nil { // no port
				host = r.Host
			}
			_, err = netip.ParseAddr(strings.Trim(host, "[]"))
			if err != nil && !slices.Contains(names, strings.ToLower(host)) {
				http.Error(w, "unknown host", http.StatusMisdirectedRequest)
				return
			}
			h.ServeHTTP(w, r)
		})
	}
	mux := http.NewServeMux()
	mux.Handle("/api/tasks/", http.StripPrefix("/api/tasks", taskhttp.Handler(manager)))

	server := httptest.NewServer(known(mux)) // wrap all handlers, not only this one
	defer server.Close()
	for _, host := range []string{"nas.example.org", "NAS.example.org:8080", "127.0.0.1:8080", "[::1]:8080", "rebound.example.com"} {
		r, _ := http.NewRequest("GET", server.URL+"/api/tasks/", nil)
		r.Host = host
		answer, _ := http.DefaultClient.Do(r)
		answer.Body.Close()
		fmt.Println(host, answer.StatusCode)
	}
	// Output:
	// nas.example.org 200
	// NAS.example.org:8080 200
	// 127.0.0.1:8080 200
	// [::1]:8080 200
	// rebound.example.com 421
}
