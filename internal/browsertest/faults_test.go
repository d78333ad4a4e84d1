package browsertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/mynt-nas/task"
)

// TestFinishOrder: an operation that was submitted before many others and finishes
// after them is the first of the finished ones, also after a reload.
func TestFinishOrder(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	long, end := s.start("long")
	for i := range 60 {
		_, end := s.start(fmt.Sprint("short ", i))
		end(nil, nil)
	}
	end(nil, nil)
	b.open(s.url)
	b.until(`document.querySelectorAll("#history li").length === 50`)
	if first := eval[string](b, `$("history").firstChild.dataset.id`); first != long {
		t.Errorf("the first finished operation is %s, want %s", first, long)
	}
	b.click("#older")
	b.until(`document.querySelectorAll("#history li").length === 61 && $("older").hidden`)
}

// TestLoadedStays: rows that the user has loaded stay in place, however many operations
// finish, and memory stays bounded.
func TestLoadedStays(t *testing.T) {
	s := newSite(t, nil, past(200, "old")...)
	b := newTab(t)
	b.open(s.url)
	b.until(`document.querySelectorAll("li").length === 50`)
	b.click("#older")
	b.until(`document.querySelectorAll("li").length === 100`)
	finish := func(from, to int) {
		b.do(chromedp.Evaluate(fmt.Sprintf(`for (let i = %d; i < %d; i++) {
			const at = new Date(now()).toISOString();
			receive("operation", JSON.stringify({id: "new-" + i, name: "new " + i, state: "DONE", progress: 100, created_at: at, started_at: at, updated_at: at}));
		}`, from, to), nil))
	}
	b.do(chromedp.Evaluate(`rows.get([...rows.keys()][80]).li.scrollIntoView({block: "center"})`, nil))
	place := `Math.round(rows.get("` + past(200, "old")[119].ID + `").li.getBoundingClientRect().top)`
	before := eval[int](b, place)
	finish(0, 1500)
	b.until(`$("newer").innerText === "Show 500 newer tasks"`)
	if after := eval[int](b, place); after < before-1 || after > before+1 {
		t.Errorf("the row moved from %d to %d", before, after)
	}
	if n := b.count(); n != 1100 {
		t.Errorf("%d rows, want 1100", n)
	}
	b.do(chromedp.Evaluate(`$("newer").click()`, nil))
	b.until(`document.querySelectorAll("li").length === 50 && $("newer").hidden`)

	// At the top of the unfiltered list, the page drops the oldest rows.
	finish(2000, 3200)
	b.until(`$("history").firstChild.dataset.id === "new-3199" && document.querySelectorAll("li").length < 600`)
}

// TestEightTabs: all tabs of a browser share one stream, even after the tab that reads
// it is closed.
func TestEightTabs(t *testing.T) {
	var mu sync.Mutex
	open, most := 0, 0
	s := newSite(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/events") {
				mu.Lock()
				open++
				most = max(most, open)
				mu.Unlock()
				defer func() { mu.Lock(); open--; mu.Unlock() }()
			}
			h.ServeHTTP(w, r)
		})
	})
	b := newTab(t)
	b.open(s.url)
	tabs := []*tab{b}
	for range 7 {
		o := b.another()
		o.open(s.url)
		tabs = append(tabs, o)
	}
	id, end := s.start("Scrub tank")
	for _, o := range tabs {
		o.do(page.BringToFront()) // hidden tabs draw nothing
		o.show(id, "RUNNING", "Scrub tank")
	}
	tabs[0].until(`$("connection").innerText === "Live"`)
	mu.Lock()
	if most > 2 || open != 1 { // two for a moment, if two tabs lead
		t.Errorf("%d streams are open, and up to %d were", open, most)
	}
	mu.Unlock()

	// The leader leaves.
	leader := slices.IndexFunc(tabs, func(o *tab) bool { return eval[bool](o, "leading") })
	tabs[leader].do(chromedp.Navigate("about:blank"))
	rest := slices.Delete(tabs, leader, leader+1)
	end(nil, nil)
	for _, o := range rest {
		o.do(page.BringToFront())
		o.show(id, "DONE", "Scrub tank")
		o.until(`$("connection").innerText === "Live"`)
	}
}

// TestListStates: while the list is loading, the page says so. An error is not shown as
// an empty list, and disappears when the list can be loaded.
func TestListStates(t *testing.T) {
	var does atomic.Value // how the server responds to requests for the list
	does.Store("wait")
	release := make(chan struct{})
	s := newSite(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, prefix+"/") {
				switch does.Load() {
				case "wait":
					select {
					case <-release:
					case <-r.Context().Done():
					}
				case "fail":
					http.Error(w, "no", http.StatusBadGateway)
					return
				}
			}
			h.ServeHTTP(w, r)
		})
	})
	b := newTab(t)
	b.do(chromedp.Navigate(s.url))
	b.until(`$("empty").innerText.includes("Loading…")`)
	does.Store("")
	close(release)
	b.until(`$("empty").innerText.includes("No tasks yet")`)

	does.Store("fail")
	b.filter("x")
	b.until(`$("trouble").innerText.includes("The tasks can't be loaded: Bad Gateway")`)
	b.until(`!document.body.innerText.includes("No task")`)
	does.Store("")
	b.until(`$("trouble").hidden && $("empty").innerText.includes("No task matches")`)

	// A server that does not respond.
	release = make(chan struct{})
	defer close(release)
	does.Store("wait")
	b.do(chromedp.Evaluate("TIMES.timeout = 300", nil))
	b.filter("y")
	b.until(`$("trouble").innerText.includes("The tasks can't be loaded: no response within under 1 s")`)
	does.Store("")
	b.until(`$("trouble").hidden && $("empty").innerText.includes("No task matches")`)
	b.nothingWrong("502")
}

// A holder holds back all of a stream, like a proxy that buffers.
type holder struct{ http.ResponseWriter }

func (h holder) Write(p []byte) (int, error) { return len(p), nil }
func (h holder) WriteHeader(int)             {}
func (h holder) FlushError() error           { return nil }

// A hider hides Flush, as many middlewares do.
type hider struct{ http.ResponseWriter }

// TestNoEvents: if no events arrive, the page shows the list at once, says that there
// are no live updates, and polls.
func TestNoEvents(t *testing.T) {
	for name, wrap := range map[string]func(http.ResponseWriter) http.ResponseWriter{
		"buffered":     func(w http.ResponseWriter) http.ResponseWriter { return holder{w} },
		"Flush hidden": func(w http.ResponseWriter) http.ResponseWriter { return hider{w} },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if strings.HasSuffix(r.URL.Path, "/events") {
						w = wrap(w)
					}
					h.ServeHTTP(w, r)
				})
			})
			b := newTab(t)
			id, end := s.start("Scrub tank")
			b.do(chromedp.Navigate(s.url))
			b.show(id, "RUNNING", "Scrub tank")
			b.until(`$("connection").innerText === "No live updates, refreshed every 5 s"`)
			b.until(row(id) + `.querySelector(".cancel").ariaDisabled !== "true"`)
			end(nil, errors.New("disk ada3"))
			next, _ := s.start("Next")
			b.show(id, "FAILED", "disk ada3")
			b.show(next, "RUNNING", "Next")
			b.nothingWrong("500", "404")
		})
	}
}

// TestStoppedDaemon: while the daemon is stopped, the page does not claim to be live,
// stops its clocks, and offers no actions that can't work.
func TestStoppedDaemon(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	id := d.start("Scrub tank")
	b.open(d.page())
	b.show(id, "RUNNING", "Running for 1 s")
	must(t, d.cmd.Process.Signal(syscall.SIGSTOP))
	b.do(chromedp.Evaluate("TIMES.quiet = 1500; TIMES.timeout = 1000", nil))
	b.until(`$("connection").innerText.startsWith("No news for")`)
	b.until(row(id) + `.querySelector(".cancel").ariaDisabled === "true"`)
	shown := eval[string](b, row(id)+`.querySelector(".times").innerText`)
	b.until(`$("trouble").innerText.includes("no response within 1 s")`)
	b.click(`li[data-id="` + id + `"] .cancel`)
	if now := eval[string](b, row(id)+`.querySelector(".times").innerText`); now != shown || eval[bool](b, `$("confirm").open`) {
		t.Errorf("the page went on from %q to %q", shown, now)
	}
	must(t, d.cmd.Process.Signal(syscall.SIGCONT))
	b.do(chromedp.Evaluate("TIMES.quiet = 20000; TIMES.timeout = 10000", nil))
	b.until(`$("trouble").hidden && working()`)
	b.until(row(id) + `.querySelector(".cancel").ariaDisabled !== "true"`)
}

// TestInterrupted: the running time of an interrupted operation is unknown.
func TestInterrupted(t *testing.T) {
	op := past(1, "Scrub tank")[0]
	op.State, op.Progress, op.Error = task.StateFailed, 40, "Task failed due to system restart"
	s := newSite(t, nil, op)
	b := newTab(t)
	b.open(s.url)
	b.show(op.ID, "FAILED", "interrupted")
	if text := eval[string](b, row(op.ID)+".innerText"); strings.Contains(text, "took") {
		t.Errorf("the page shows a duration: %q", text)
	}
	b.click(`li[data-id="` + op.ID + `"] .open`)
	b.until(`$("detail").open && $("detail-list").innerText.includes("Started") && !$("detail-list").innerText.includes("Duration")`)
}

// TestCancelling: the page shows a requested cancel according to the server, also after
// a reload.
func TestCancelling(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	release := make(chan struct{})
	defer close(release)
	op, err := s.m.Submit("slow to stop", func(context.Context, func(int)) (any, error) { <-release; return nil, nil })
	must(t, err)
	b.open(s.url)
	b.show(op.ID, "RUNNING", "slow to stop")
	must(t, s.m.Cancel(op.ID))
	for range 2 {
		b.show(op.ID, "RUNNING", "Cancelling…")
		b.click(`li[data-id="` + op.ID + `"] .cancel`)
		if eval[bool](b, `$("confirm").open`) {
			t.Error("a second cancel is offered")
		}
		b.open(s.url)
	}
}

// TestStrangeEntries: an entry that can't be shown says so, and hides no others.
func TestStrangeEntries(t *testing.T) {
	deep := json.RawMessage(strings.Repeat("[", 4000) + strings.Repeat("]", 4000))
	big := json.RawMessage(`"` + strings.Repeat("x", 5<<20) + `"`)
	s := newSite(t, nil)
	b := newTab(t)
	ids := make(map[string]string)
	for name, result := range map[string]any{"deep": deep, "big": big, "plain": 1} {
		id, end := s.start(name)
		end(result, nil)
		ids[name] = id
	}
	b.open(s.url)
	for name, id := range ids {
		b.show(id, "DONE", name)
	}
	b.click(`li[data-id="` + ids["deep"] + `"] .open`)
	b.until(`$("detail-list").innerText.includes("nested more than 100 deep") && !$("download").hidden`)
	b.closeDetail()
	b.click(`li[data-id="` + ids["big"] + `"] .open`)
	b.until(`$("detail-list").innerText.includes("more characters")`)
	b.click("#detail-close")

	b.event("operation", map[string]any{"id": "strange", "name": []int{1}, "state": "ODD"})
	b.show("strange", "FAILED", "can't be shown")
}

// TestDirection: characters that change the direction of text are visible.
func TestDirection(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	id, _ := s.start("photos\u202egpj.exe")
	b.open(s.url)
	b.show(id, "RUNNING", "photos[U+202E]gpj.exe")
	b.click(`li[data-id="` + id + `"] .cancel`)
	b.until(`$("confirm").open && $("confirm").innerText.includes("photos[U+202E]gpj.exe")`)
	if eval[bool](b, `document.documentElement.outerHTML.includes("\u202e")`) {
		t.Error("the page has the character U+202E")
	}
}

// TestKeyboardScroll: the keyboard can scroll a long result.
func TestKeyboardScroll(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	id, end := s.start("report")
	end(strings.Split(strings.Repeat("line ", 200), " "), nil)
	b.open(s.url)
	b.click(`li[data-id="` + id + `"] .open`)
	b.until(`$("detail").open && document.querySelector(".json").innerText.includes("line")`)
	b.do(chromedp.Focus(".json", chromedp.ByQuery), chromedp.KeyEvent(kb.PageDown))
	b.until(`document.activeElement.matches(".json[tabindex=\"0\"]") && document.activeElement.scrollTop > 0`)
}

// TestZoom: at 400 % zoom on a screen of 1280 by 1024 pixels, everything can be
// reached, and nothing scrolls sideways.
func TestZoom(t *testing.T) {
	s := newSite(t, nil, past(3, strings.Repeat("verylongname", 10))...)
	b := newTab(t)
	b.do(emulation.SetDeviceMetricsOverride(320, 256, 4, false))
	id, _ := s.start("Scrub tank", task.WithMetadata(map[string]string{"pool": "tank"}))
	b.open(s.url)
	b.click("#more summary")
	b.until(row(id))
	narrow := func(what string) {
		t.Helper()
		if w := eval[int](b, "document.documentElement.scrollWidth"); w > 320 {
			t.Errorf("%s: the page is %d pixels wide", what, w)
		}
	}
	narrow("list")
	b.do(chromedp.Focus(`li[data-id="`+id+`"] .open`, chromedp.ByQuery), chromedp.KeyEvent("\r"))
	b.until(`$("detail").open && $("detail-list").innerText.includes("tank")`)
	narrow("detail")
	if h := eval[int](b, `(() => { const e = $("detail-list"); e.scrollIntoView(); const r = e.getBoundingClientRect();
		return Math.round(innerHeight - r.top); })()`); h < 100 {
		t.Errorf("%d pixels of the details are visible", h)
	}
	b.click("#detail-cancel")
	b.until(`$("confirm").open`)
	narrow("dialog")
	b.click("#confirm-yes")
	b.show(id, "CANCELLED", "Scrub tank")
}

// TestDoubleClick: a double click on Cancel does not confirm it, and a confirmed
// cancel is sent once.
func TestDoubleClick(t *testing.T) {
	var cancels atomic.Int32
	s := newSite(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				cancels.Add(1)
			}
			h.ServeHTTP(w, r)
		})
	})
	b := newTab(t)
	id, _ := s.start("Scrub tank")
	b.open(s.url)
	b.until(row(id))
	// The button of the dialog is where the row's button is.
	b.click(`li[data-id="` + id + `"] .cancel`)
	b.until(`$("confirm").open`)
	b.do(chromedp.Evaluate(`(() => {
		const from = $("confirm-yes").getBoundingClientRect(), to = `+row(id)+`.querySelector(".cancel").getBoundingClientRect();
		$("confirm").style.transform = "translate(" + (to.x - from.x) + "px," + (to.y - from.y) + "px)";
		window.x = to.x + 20;
		window.y = to.y + 10;
	})()`, nil))
	x, y := eval[float64](b, "x"), eval[float64](b, "y")
	b.click("#confirm-no")
	b.do(chromedp.MouseClickXY(x, y))
	b.until(`$("confirm").open`)
	b.do(chromedp.MouseClickXY(x, y, chromedp.ClickCount(2)))
	time.Sleep(300 * time.Millisecond) // time for a request that must not come
	if n := cancels.Load(); n != 0 || !eval[bool](b, `$("confirm").open`) {
		t.Errorf("a double click made %d cancels", n)
	}
	b.do(chromedp.Evaluate(`for (let i = 0; i < 2; i++) $("confirm-yes").click()`, nil))
	b.show(id, "CANCELLED", "Scrub tank")
	if n := cancels.Load(); n != 1 {
		t.Errorf("%d cancels were sent, want 1", n)
	}
}
