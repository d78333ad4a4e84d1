package browsertest

import (
	"encoding/json"
	"net/http"
	"slices"
	"testing"

	"github.com/mynt-nas/task"
)

// TestTwoDaemons checks that two processes on one database serve the same
// operations, and that either cancels what the other one runs.
func TestTwoDaemons(t *testing.T) {
	a := newDaemon(t)
	b := &daemon{t: t, path: a.path, address: "127.0.0.1:0"}
	b.begin()
	t.Cleanup(b.kill)
	for _, c := range []struct {
		name         string
		owner, other *daemon
	}{
		{"the second cancels the first's", a, b},
		{"the first cancels the second's", b, a},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := c.owner.start("scrub")
			for _, d := range []*daemon{c.owner, c.other} {
				if !d.lists(t, id) {
					t.Errorf("the list of the daemon at %s lacks the operation", d.address)
				}
			}
			if op := c.other.get(t, id); op.Name != "scrub" || op.State.Finished() {
				t.Fatalf("the other daemon shows %q in state %s", op.Name, op.State)
			}
			answer, err := client.Post("http://"+c.other.address+prefix+"/"+id+"/cancel", "", nil)
			must(t, err)
			answer.Body.Close()
			if answer.StatusCode >= 300 {
				t.Fatalf("cancel: %s", answer.Status)
			}
			for _, d := range []*daemon{c.owner, c.other} {
				d.wait(id)
				if op := d.get(t, id); op.State != task.StateCancelled {
					t.Errorf("the daemon at %s shows state %s, want %s", d.address, op.State, task.StateCancelled)
				}
			}
		})
	}
}

// get returns an operation as the daemon's API shows it.
func (d *daemon) get(t *testing.T, id string) task.Operation {
	t.Helper()
	var op task.Operation
	d.read(t, "/"+id, &op)
	return op
}

// lists reports whether the daemon's list has an operation.
func (d *daemon) lists(t *testing.T, id string) bool {
	t.Helper()
	var page struct{ Tasks []task.Operation }
	d.read(t, "/", &page)
	return slices.ContainsFunc(page.Tasks, func(op task.Operation) bool { return op.ID == id })
}

// read decodes the answer to a GET of the daemon's API.
func (d *daemon) read(t *testing.T, path string, v any) {
	t.Helper()
	answer, err := client.Get("http://" + d.address + prefix + path)
	must(t, err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s", path, answer.Status)
	}
	must(t, json.NewDecoder(answer.Body).Decode(v))
}
