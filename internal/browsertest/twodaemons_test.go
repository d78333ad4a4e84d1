package browsertest

import (
	"encoding/json"
	"net/http"
	"slices"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/mynt-nas/task"
)

// TestTwoDaemons checks that two processes on one database serve the same operations,
// and that each cancels the other's.
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

// TestTwoDaemonsPages uses the pages of two processes on one database, in two browsers.
// Each page shows the operations of both and who runs them, and cancels either's. When
// one process is killed, the page of the other says so.
func TestTwoDaemonsPages(t *testing.T) {
	a := newDaemon(t)
	b := &daemon{t: t, path: a.path, address: "127.0.0.1:0"}
	b.begin()
	t.Cleanup(b.kill)
	ofA, ofB, doomed := a.start("Scrub tank"), b.start("Replicate tank"), b.start("Replicate vault")
	pageA, pageB := newTab(t), newTab(t)
	pageA.open(a.page())
	pageB.open(b.page())
	for _, page := range []*tab{pageA, pageB} {
		for _, id := range []string{ofA, ofB, doomed} {
			page.show(id, "RUNNING", "on "+a.get(t, id).Owner[:8])
		}
		page.until(`$("counts").innerText === "3 running · 0 waiting"`)
		page.filter("replicate")
		page.until(`document.querySelectorAll("li").length === 2`)
		page.show(ofB, "RUNNING", "Replicate tank")
	}
	if a.get(t, ofA).Owner == a.get(t, ofB).Owner {
		t.Error("both processes have one owner")
	}

	b.tell(ofB, "progress", "42")
	pageA.show(ofB, "RUNNING", "42%")
	pageA.click(`li[data-id="` + ofB + `"] .cancel`)
	pageA.until(`$("confirm").open && $("confirm-text").textContent.includes("Replicate tank")`)
	pageA.click("#confirm-yes")
	for _, page := range []*tab{pageA, pageB} {
		page.show(ofB, "CANCELLED", "Replicate tank")
		page.until(`$("counts").innerText === "2 running · 0 waiting"`)
	}
	pageB.do(chromedp.Navigate("about:blank"))
	b.kill()
	pageA.show(doomed, "FAILED", "Replicate vault")
	pageA.until(`$("counts").innerText === "1 running · 0 waiting"`)
	pageA.filter(" ")
	pageA.show(ofA, "RUNNING", "Scrub tank")
}
