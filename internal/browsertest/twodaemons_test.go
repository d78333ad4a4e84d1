package browsertest

import (
	"encoding/json"
	"net/http"
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
	answer, err := client.Get("http://" + d.address + prefix + "/" + id)
	must(t, err)
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s", id, answer.Status)
	}
	var op task.Operation
	must(t, json.NewDecoder(answer.Body).Decode(&op))
	return op
}
