package browsertest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
)

// These environment variables make the test binary a daemon.
const (
	databaseVar = "TASK_BROWSERTEST_DATABASE"
	addressVar  = "TASK_BROWSERTEST_ADDRESS"
)

// prefix is where the daemon mounts the handler.
const prefix = "/api/tasks"

func TestMain(m *testing.M) {
	if path := os.Getenv(databaseVar); path != "" {
		if err := serve(path, os.Getenv(addressVar)); err != nil {
			log.Fatal(err)
		}
		return
	}
	os.Exit(m.Run())
}

// serve runs the daemon. Its operations follow orders that arrive as requests.
func serve(path, address string) error {
	go func() { // ends with the test, however that ends
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	store, err := task.OpenSQLite(path)
	if err != nil {
		return err
	}
	m, err := task.New(store, task.WithLimit(3))
	if err != nil {
		return err
	}
	p := &puppets{manager: m, orders: make(map[string]chan url.Values)}
	mux := http.NewServeMux()
	mux.Handle(prefix+"/", http.StripPrefix(prefix, taskhttp.Handler(m)))
	mux.HandleFunc("POST /start", p.start)
	mux.HandleFunc("POST /tell/{id}", p.tell)
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	return http.Serve(l, mux)
}

type puppets struct {
	manager *task.Manager

	mu     sync.Mutex // guards what follows
	orders map[string]chan url.Values
}

// start starts an operation that waits for orders.
func (p *puppets) start(w http.ResponseWriter, r *http.Request) {
	orders := make(chan url.Values)
	fn := func(ctx context.Context, update func(int)) (any, error) {
		for {
			select {
			case order := <-orders:
				switch progress, _ := strconv.Atoi(order.Get("progress")); {
				case order.Has("error"):
					return nil, errors.New(order.Get("error"))
				case order.Has("result"):
					return json.RawMessage(order.Get("result")), nil
				default:
					update(progress)
				}
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}
	var opts []task.SubmitOption
	if metadata := r.FormValue("metadata"); metadata != "" {
		opts = append(opts, task.WithMetadata(json.RawMessage(metadata)))
	}
	op, err := p.manager.Submit(r.FormValue("name"), fn, opts...)
	if err != nil {
		taskhttp.Error(w, r, err)
		return
	}
	p.mu.Lock()
	p.orders[op.ID] = orders
	p.mu.Unlock()
	taskhttp.Accepted(w, r, prefix, op)
}

func (p *puppets) tell(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	p.mu.Lock()
	orders := p.orders[r.PathValue("id")]
	p.mu.Unlock()
	select {
	case orders <- r.Form:
	case <-r.Context().Done():
	}
}

// A daemon is a process that serves.
type daemon struct {
	t       *testing.T
	path    string
	address string
	cmd     *exec.Cmd
	in      io.Closer
}

func newDaemon(t *testing.T) *daemon {
	d := &daemon{t: t, path: t.TempDir() + "/tasks.db", address: "127.0.0.1:0"}
	d.begin()
	t.Cleanup(d.kill)
	return d
}

// begin starts the process, on the same address as before.
func (d *daemon) begin() {
	d.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), databaseVar+"="+d.path, addressVar+"="+d.address)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(d.t, err)
	out, err := cmd.StdoutPipe()
	must(d.t, err)
	must(d.t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	must(d.t, err)
	d.address, d.cmd, d.in = strings.TrimSpace(line), cmd, in
}

// kill ends the process with SIGKILL.
func (d *daemon) kill() {
	if d.cmd == nil {
		return
	}
	d.cmd.Process.Kill()
	d.cmd.Wait() // the error only says that it was killed
	d.in.Close()
	d.cmd = nil
}

func (d *daemon) page() string { return "http://" + d.address + prefix + "/ui" }

var client = http.Client{Timeout: 20 * time.Second}

// start makes the daemon start an operation, and returns its ID.
func (d *daemon) start(name string, form ...string) string {
	d.t.Helper()
	var op task.Operation
	d.post("/start", append(form, "name", name), &op)
	return op.ID
}

// tell gives an order to an operation.
func (d *daemon) tell(id string, form ...string) {
	d.t.Helper()
	d.post("/tell/"+id, form, nil)
}

func (d *daemon) post(path string, pairs []string, v any) {
	d.t.Helper()
	form := make(url.Values)
	for i := 0; i+1 < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
	}
	answer, err := client.PostForm("http://"+d.address+path, form)
	must(d.t, err)
	defer answer.Body.Close()
	if answer.StatusCode >= 300 {
		d.t.Fatalf("POST %s: %s", path, answer.Status)
	}
	if v != nil {
		must(d.t, json.NewDecoder(answer.Body).Decode(v))
	}
}

// wait waits until an operation has ended.
func (d *daemon) wait(id string) {
	d.t.Helper()
	answer, err := client.Get("http://" + d.address + prefix + "/" + id + "/wait")
	must(d.t, err)
	answer.Body.Close()
}

// run makes the daemon run an operation to its end.
func (d *daemon) run(name string, form ...string) string {
	d.t.Helper()
	id := d.start(name)
	d.tell(id, form...)
	d.wait(id)
	return id
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
