package browsertest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// A tab is a tab in its own browser. It collects errors.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu     sync.Mutex // guards what follows
	wrongs []string   // errors, exceptions, alerts, policy violations
}

func newTab(t *testing.T) *tab {
	t.Helper()
	browser := findBrowser(t)
	opts := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(browser), chromedp.NoSandbox, chromedp.Flag("js-flags", "--expose-gc"), chromedp.WindowSize(1200, 850), chromedp.Flag("lang", "en-GB"))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, opts...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx, chromedp.WithErrorf(func(string, ...any) {})) // drops errors about events that chromedp doesn't know
	t.Cleanup(cancel)
	b := &tab{t: t, ctx: ctx}
	chromedp.ListenTarget(ctx, b.note)
	b.do(chromedp.Navigate("about:blank"))
	t.Cleanup(func() { b.nothingWrong() })
	return b
}

// findBrowser returns the path of the browser.
func findBrowser(t *testing.T) string {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("neither Chromium nor Chrome is installed")
	return ""
}

// note records errors in the page.
func (b *tab) note(event any) {
	wrong := ""
	switch e := event.(type) {
	case *runtime.EventConsoleAPICalled:
		if e.Type == runtime.APITypeError || e.Type == runtime.APITypeWarning {
			wrong = fmt.Sprintf("console.%s: %s", e.Type, e.Args[0].Value)
		}
	case *runtime.EventExceptionThrown:
		wrong = "exception: " + e.ExceptionDetails.Error()
	case *log.EventEntryAdded:
		wrong = fmt.Sprintf("%s %s: %s (%s)", e.Entry.Source, e.Entry.Level, e.Entry.Text, e.Entry.URL)
	case *page.EventJavascriptDialogOpening:
		wrong = "alert: " + e.Message
		go chromedp.Run(b.ctx, page.HandleJavaScriptDialog(true))
	}
	if wrong != "" {
		b.mu.Lock()
		b.wrongs = append(b.wrongs, wrong)
		b.mu.Unlock()
	}
}

// nothingWrong checks that there were no errors except the expected ones.
func (b *tab) nothingWrong(expected ...string) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
next:
	for _, wrong := range b.wrongs {
		for _, e := range expected {
			if strings.Contains(wrong, e) {
				continue next
			}
		}
		b.t.Errorf("in the page: %s", wrong)
	}
	b.wrongs = nil
}

func (b *tab) do(actions ...chromedp.Action) {
	b.t.Helper()
	if err := chromedp.Run(b.ctx, actions...); err != nil {
		b.t.Fatal(err)
	}
}

// open opens a page and waits until it is connected and loaded.
func (b *tab) open(url string) {
	b.t.Helper()
	b.do(chromedp.Navigate(url))
	b.until(`$("connection").textContent === "Live" && loaded`)
}

// eval returns the value of an expression.
func eval[T any](b *tab, expression string) (v T) {
	b.t.Helper()
	b.do(chromedp.Evaluate(expression, &v))
	return v
}

// until waits until an expression is true.
func (b *tab) until(expression string) {
	b.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var v bool
		// Evaluation fails while the browser changes pages.
		err := chromedp.Run(b.ctx, chromedp.Evaluate("!!("+expression+")", &v))
		if err == nil && v {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("timed out waiting for %s (error %v); the page shows:\n%s", expression, err, eval[string](b, "document.body.innerText"))
		}
	}
}

// row returns an expression for the row of an operation.
func row(id string) string { return fmt.Sprintf("document.querySelector('li[data-id=%q]')", id) }

// show waits until the row of an operation has a state and contains a text.
func (b *tab) show(id, state, text string) {
	b.t.Helper()
	b.until(fmt.Sprintf("%[1]s && %[1]s.dataset.state === %[2]q && %[1]s.innerText.includes(%[3]q)", row(id), state, text))
}

// click clicks the element that a selector selects.
func (b *tab) click(selector string) {
	b.t.Helper()
	b.do(chromedp.Click(selector, chromedp.ByQuery))
}

// closeDetail closes the details, which goes back in the browser's history.
func (b *tab) closeDetail() {
	b.t.Helper()
	b.click("#detail-close")
	b.until(`!$("detail").open && !location.search.includes("task=")`)
}

// filter types a name into the filter.
func (b *tab) filter(name string) {
	b.t.Helper()
	b.do(chromedp.Evaluate(`$("name").select()`, nil), chromedp.SendKeys("#name", name, chromedp.ByQuery))
}

func (b *tab) count() int { return eval[int](b, `document.querySelectorAll("li").length`) }

func TestPage(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	b.open(d.page())
	b.until(`!$("empty").hidden && $("empty").innerText.includes("No tasks yet")`)

	// A task appears, and its bar moves.
	id := d.start("Scrub tank")
	b.show(id, "RUNNING", "Scrub tank")
	for _, progress := range []int{10, 55, 30} {
		d.tell(id, "progress", fmt.Sprint(progress))
		b.until(fmt.Sprintf(`%s.querySelector("progress").value === %d`, row(id), progress))
		b.show(id, "RUNNING", fmt.Sprint(progress, "%"))
	}
	b.show(id, "RUNNING", "Running for 1 s") // the duration counts

	// The row is updated, not replaced.
	b.do(chromedp.Evaluate(row(id)+`.marked = true`, nil))
	d.tell(id, "result", `{"errors": 0, "files": ["a", "<b>"]}`)
	b.show(id, "DONE", "Done")
	if !eval[bool](b, row(id)+`.marked === true`) {
		t.Error("the row was replaced")
	}

	// The details open by keyboard.
	b.do(chromedp.Focus(`li[data-id="`+id+`"] .open`, chromedp.ByQuery), chromedp.KeyEvent("\r"))
	b.until(`$("detail").open && $("detail").innerText.includes('"<b>"')`)
	b.do(chromedp.KeyEvent("\x1b"))
	b.until(`!$("detail").open`)

	// An operation that fails shows its error.
	id = d.run("Replicate tank", "error", "disk ada3 does not answer")
	b.show(id, "FAILED", "disk ada3 does not answer")
}

// TestLongValues checks that the details load what the list leaves out.
func TestLongValues(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	long := func(word string) string { return `["` + word + `", "` + strings.Repeat("x", 20_000) + `"]` }
	id := d.start("Report", "metadata", long("started"))
	b.open(d.page())
	b.show(id, "RUNNING", "Report")
	b.click(`li[data-id="` + id + `"] .open`)
	b.until(`$("detail").innerText.includes('"started"')`)
	d.tell(id, "result", long("well"))
	b.until(`$("detail").innerText.includes('"well"') && $("detail").innerText.includes('"started"')`)
	b.closeDetail()

	b.open(d.page()) // now from the history
	b.show(id, "DONE", "Report")
	b.click(`li[data-id="` + id + `"] .open`)
	b.until(`$("detail").innerText.includes('"well"') && $("detail").innerText.includes('"started"')`)
	b.closeDetail()

	testkit.Exec(t, d.path, "DELETE FROM tasks")
	b.click(`li[data-id="` + id + `"] .open`)
	b.until(`$("detail").innerText.includes("Can't be loaded: ` + id + `: operation not found")`)
	b.nothingWrong("404")
}

// TestDeleted checks that a task leaves the list when its row is deleted while
// it runs.
func TestDeleted(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	b.open(d.page())
	id := d.start("Scrub tank")
	b.show(id, "RUNNING", "Scrub tank")
	testkit.Exec(t, d.path, "DELETE FROM tasks")
	d.tell(id, "result", "1")
	b.until(row(id) + ` === null`)
}

func TestCancel(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	b.open(d.page())
	var ids []string
	for i := range 4 { // three of them run
		ids = append(ids, d.start(fmt.Sprint("task ", i)))
	}
	b.show(ids[0], "RUNNING", "task 0")
	b.show(ids[3], "PENDING", "Waiting")

	b.click(`li[data-id="` + ids[0] + `"] .cancel`)
	b.until(`$("confirm").open && $("confirm-text").textContent.includes("task 0")`)
	b.click("#confirm-no")
	b.until(`!$("confirm").open`)
	b.show(ids[0], "RUNNING", "task 0")

	b.click(`li[data-id="` + ids[3] + `"] .cancel`)
	b.until(`$("confirm").open && $("confirm-text").textContent.includes("not started")`)
	b.click("#confirm-yes")
	b.show(ids[3], "CANCELLED", "before it started")
	b.show(ids[0], "RUNNING", "task 0")

	b.click(`li[data-id="` + ids[0] + `"] .open`)
	b.until(`$("detail").open`)
	b.click("#detail-cancel")
	b.until(`$("confirm").open`)
	b.click("#confirm-yes")
	b.show(ids[0], "CANCELLED", "Cancelled")
	b.until(`$("detail").innerText.includes("Cancelled")`)
	b.show(ids[1], "RUNNING", "task 1")
}

// TestForeignTexts checks that names, errors, results and metadata are never
// interpreted as HTML.
func TestForeignTexts(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	b.open(d.page())
	const evil = `<script>alert(1)</script><img src=x onerror=alert(2)>`
	live := d.start(evil, "metadata", `{"`+evil+`": "`+evil+`"}`)
	b.show(live, "RUNNING", evil)
	b.click(`li[data-id="` + live + `"] .cancel`)
	b.until(`$("confirm").open && $("confirm").innerText.includes("<script>")`)
	b.click("#confirm-no")
	b.click(`li[data-id="` + live + `"] .open`)
	b.until(`$("detail").innerText.includes("<script>")`)
	b.closeDetail()
	failed := d.run(evil, "error", evil)
	b.show(failed, "FAILED", evil)
	done := d.run(evil, "result", `"`+evil+`"`)
	b.show(done, "DONE", evil)
	b.open(d.page()) // now from the history
	b.show(failed, "FAILED", evil)
	b.click(`li[data-id="` + done + `"] .open`)
	b.until(`$("detail").innerText.includes("<script>")`)
	if n := eval[int](b, `document.querySelectorAll("img, body script ~ script, main script, dialog script").length`); n != 0 {
		t.Errorf("texts were interpreted as %d elements", n)
	}
}

func TestDaemonRestarts(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	b.open(d.page())
	running := d.start("Resilver")
	d.tell(running, "progress", "42")
	b.show(running, "RUNNING", "42%")
	for range 60 { // beyond the first page of history
		d.run("snapshot", "result", "1")
	}
	for range 2 {
		d.kill()
		b.until(`$("connection").dataset.is === "lost"`)
		d.begin()
		b.until(`$("connection").dataset.is === "live"`)
		b.show(running, "FAILED", "Task failed due to system restart")
		running = d.start("Resilver again")
		b.show(running, "RUNNING", "Resilver again")
	}
	b.nothingWrong("net::ERR_", "Failed to load resource") // while no daemon ran
}

func TestFilterAndPaging(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	old := d.run("the oldest", "error", "broken")
	for i := range 130 {
		d.run(fmt.Sprint("snapshot ", i), "result", "1")
	}
	live := d.start("Scrub tank")
	b.open(d.page())
	b.until(`document.querySelectorAll("li").length === 51`)

	// Back through the history.
	for _, want := range []int{101, 132} {
		b.click("#older")
		b.until(fmt.Sprintf(`document.querySelectorAll("li").length === %d`, want))
	}
	b.until(`$("older").hidden`)

	// By name, also beyond the loaded pages.
	b.filter("SCRUB")
	b.until(`document.querySelectorAll("li").length === 1`)
	b.show(live, "RUNNING", "Scrub tank")
	b.filter("zzz")
	b.until(`!$("empty").hidden && $("empty").innerText.includes("No task matches")`)
	b.open(d.page())
	b.filter("OLDest")
	b.show(old, "FAILED", "broken")
	b.until(`document.querySelectorAll("li").length === 1`)
	b.open(d.page())

	// By state, with operations that come later.
	b.click(`#states input[value="FAILED"]`)
	b.until(`document.querySelectorAll("li").length === 1`)
	b.show(old, "FAILED", "broken")
	d.run("not shown", "result", "1")
	fails := d.run("shown", "error", "no")
	b.show(fails, "FAILED", "shown")
	if n := b.count(); n != 2 {
		t.Errorf("%d rows, want 2", n)
	}
	b.click(`#states input[value="RUNNING"]`)
	b.show(live, "RUNNING", "Scrub tank")
	d.tell(live, "result", "1")
	b.until(`document.querySelectorAll("li").length === 0`)
}

// TestPhone checks that a phone shows everything without scrolling sideways.
func TestPhone(t *testing.T) {
	d := newDaemon(t)
	b := newTab(t)
	b.do(emulation.SetDeviceMetricsOverride(360, 740, 2, true))
	long := strings.Repeat("verylongname", 20)
	d.run(long, "error", strings.Repeat("x", 500))
	furnish(d)
	id := d.start(long, "metadata", `{"`+long+`":"`+long+`"}`)
	b.open(d.page())
	b.until(row(id) + " !== null")
	narrow := func(what string) {
		t.Helper()
		if w := eval[int](b, "document.documentElement.scrollWidth"); w != 360 {
			t.Errorf("%s: the page is %d pixels wide", what, w)
		}
	}
	narrow("list")
	b.click(`li[data-id="` + id + `"] .open`)
	b.until(`$("detail").open`)
	narrow("detail")
	b.click("#detail-cancel")
	b.until(`$("confirm").open`)
	narrow("dialog")
}

// TestManyRows checks that the page stays smooth while many tasks report.
func TestManyRows(t *testing.T) {
	b := newTab(t)
	d := newDaemon(t)
	b.open(d.page())
	b.do(chromedp.Evaluate(`(() => {
		const op = i => ({id: "many-" + i, name: "task " + i, state: "RUNNING", progress: 0,
			created_at: "2026-01-01T00:00:00Z", started_at: "2026-01-01T00:00:00Z", updated_at: "2026-01-01T00:00:00Z"});
		for (let i = 0; i < 800; i++) take(op(i));
		changed(true);
		window.worst = 0;
		let last = 0, n = 0;
		const frame = at => {
			if (last && n > 3) window.worst = Math.max(window.worst, at - last);
			last = at;
			if (++n > 40) { window.finished = true; return; }
			for (let i = 0; i < 800; i++) { take({...op(i), progress: n}); changed(false, "many-" + i); }
			requestAnimationFrame(frame);
		};
		requestAnimationFrame(frame);
	})()`, nil))
	b.until("window.finished === true")
	if n := b.count(); n != 800 {
		t.Errorf("%d rows", n)
	}
	t.Logf("the longest frame with 800 changing rows: %.0f ms", eval[float64](b, "window.worst"))
}

// furnish creates a history, three running operations and a waiting one.
func furnish(d *daemon) {
	d.t.Helper()
	d.kill()
	store, err := task.OpenSQLite(d.path)
	must(d.t, err)
	for i, op := range []task.Operation{
		{Name: "Import pool tank", State: task.StateDone, Result: json.RawMessage(`{"vdevs": 3, "status": "ONLINE"}`)},
		{Name: "Scrub backup", State: task.StateFailed, Progress: 71, Error: "Task failed due to system restart"},
		{Name: "Snapshot tank/home@daily", State: task.StateDone, Result: json.RawMessage(`{"used": 48213504}`)},
		{Name: "Replicate tank/photos to backup", State: task.StateFailed, Progress: 30,
			Error:    "send tank/photos@weekly: connection to backup.local lost after 18.2 GiB of 61.0 GiB",
			Metadata: json.RawMessage(`{"from": "tank/photos", "to": "backup.local", "incremental": true}`)},
		{Name: "Thin out snapshots", State: task.StateDone, Result: json.RawMessage(`{"kept": 42, "removed": 7}`)},
		{Name: "Checksum tank/archive", State: task.StateCancelled, Progress: 37, Error: "context canceled"},
		{Name: "Snapshot tank/home@hourly", State: task.StateDone, Result: json.RawMessage(`{"used": 811008}`)},
	} {
		op.ID = fmt.Sprintf("00000000-0000-7000-8000-%012d", i)
		if op.State == task.StateDone {
			op.Progress = 100
		}
		op.CreatedAt = time.Now().UTC().Add(time.Duration(i-7) * 11 * time.Minute)
		op.StartedAt = op.CreatedAt.Add(time.Second)
		op.UpdatedAt = op.StartedAt.Add(time.Duration(i*i*7%11*23+4) * time.Second)
		must(d.t, store.Save(&op))
	}
	must(d.t, store.Close())
	d.begin()
	id := d.start("Scrub tank", "metadata", `{"pool": "tank", "requested_by": "admin", "disks": ["ada0", "ada1", "ada2"]}`)
	d.tell(id, "progress", "64")
	id = d.start("Replicate tank/home to backup")
	d.tell(id, "progress", "23")
	id = d.start("Create pool scratch")
	d.tell(id, "progress", "88")
	d.start("Scrub backup")
}

// newStudio returns a tab, and a function that stores a picture of it in the directory
// TASK_SCREENSHOTS.
func newStudio(t *testing.T, prefix string) (b *tab, shoot func(name string)) {
	t.Helper()
	dir := os.Getenv("TASK_SCREENSHOTS")
	if dir == "" {
		t.Skip("TASK_SCREENSHOTS is not set")
	}
	must(t, os.MkdirAll(dir, 0o777))
	b = newTab(t)
	return b, func(name string) {
		t.Helper()
		var png []byte
		b.do(chromedp.Sleep(400*time.Millisecond), chromedp.CaptureScreenshot(&png))
		must(t, os.WriteFile(filepath.Join(dir, prefix+name+".png"), png, 0o666))
	}
}

// scheme makes the page light or dark.
func (b *tab) scheme(value string) {
	b.t.Helper()
	b.do(emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: value}}))
}

// TestScreenshots stores pictures for people to look at.
func TestScreenshots(t *testing.T) {
	b, shoot := newStudio(t, "")
	d := newDaemon(t)
	b.scheme("light")
	b.open(d.page())
	shoot("empty")
	furnish(d)
	b.open(d.page())
	b.until(`document.querySelectorAll("li").length === 11`)
	b.do(emulation.SetDeviceMetricsOverride(1000, 900, 1, false), chromedp.Sleep(3*time.Second))
	shoot("desktop-light")
	b.scheme("dark")
	shoot("desktop-dark")
	details := func(scheme string) {
		b.do(chromedp.Evaluate(`[...document.querySelectorAll(".open")].find(e => e.textContent === "Scrub tank").click()`, nil))
		shoot("detail-" + scheme)
		b.click("#detail-cancel")
		shoot("dialog-" + scheme)
		b.click("#confirm-no")
		b.closeDetail()
		b.do(chromedp.Evaluate(`[...document.querySelectorAll(".open")].find(e => e.textContent.includes("photos")).click()`, nil))
		shoot("detail-failed-" + scheme)
		b.closeDetail()
	}
	details("dark")
	b.scheme("light")
	details("light")
	b.filter("nothing")
	shoot("no-match")
	b.open(d.page())
	b.do(emulation.SetDeviceMetricsOverride(390, 844, 2, true))
	shoot("phone-light")
	details("phone")
	b.scheme("dark")
	shoot("phone-dark")
	b.nothingWrong("net::ERR_", "Failed to load resource") // while the history was created
}
