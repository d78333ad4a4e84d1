package browsertest

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/browser"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"

	"github.com/mynt-nas/task"
)

// TestWhatATaskDoes: the page shows a task's message, the time left, what it waits for,
// and who runs it.
func TestWhatATaskDoes(t *testing.T) {
	s := newSite(t, nil, past(5, "Scrub")...)
	b := newTab(t)
	b.open(s.url)
	b.event("operation", operation("scrub", map[string]any{"name": "Scrub tank", "message": "disk ada3", "owner": "nas1/111"}))
	b.show("scrub", "RUNNING", "disk ada3")
	b.event("operation", operation("next", map[string]any{"state": "PENDING", "waits_for": "scrub", "owner": "nas1/111"}))
	b.show("next", "PENDING", "waits for “Scrub tank”")
	if text := eval[string](b, row("next")+".innerText"); strings.Contains(text, "nas1") {
		t.Errorf("the only node is shown: %q", text)
	}
	b.event("operation", operation("other", map[string]any{"owner": "nas2/222"}))
	b.show("other", "RUNNING", "on nas2")
	b.show("scrub", "RUNNING", "on nas1")
	b.click(`li[data-id="next"] .open`)
	b.until(`$("detail-list").innerText.includes("“Scrub tank”") && $("detail-list").innerText.includes("nas1/111")`)
	b.closeDetail()
	b.nothingWrong("404")

	// The time left is shown only if several reports agree.
	start := time.Now().UTC().Add(-100 * time.Second)
	report := func(id string, after time.Duration, progress int) {
		b.event("operation", operation(id, map[string]any{"progress": progress, "started_at": start, "updated_at": start.Add(after)}))
	}
	report("steady", 90*time.Second, 9)
	report("steady", 95*time.Second, 10)
	b.show("steady", "RUNNING", "10%")
	if text := eval[string](b, row("steady")+".innerText"); strings.Contains(text, "left") {
		t.Errorf("two reports are enough for %q", text)
	}
	report("steady", 99*time.Second, 10+1)
	b.show("steady", "RUNNING", "about 13 min")
	for i, progress := range []int{1, 40, 41, 99} {
		report("jumps", time.Duration(90+i)*time.Second, progress)
	}
	b.show("jumps", "RUNNING", "99%")
	if text := eval[string](b, row("jumps")+".innerText"); strings.Contains(text, "left") {
		t.Errorf("unsteady progress is enough for %q", text)
	}
}

// TestUsually: before the progress allows an estimate, the page shows how long earlier
// tasks of that name took.
func TestUsually(t *testing.T) {
	earlier := past(5, "Scrub")
	for i, op := range earlier {
		op.Name = "Scrub tank"
		op.StartedAt = op.UpdatedAt.Add(-time.Duration(2+i) * time.Hour)
		op.CreatedAt = op.StartedAt
	}
	s := newSite(t, nil, earlier...)
	b := newTab(t)
	b.open(s.url)
	b.event("operation", operation("now", map[string]any{"name": "Scrub tank", "started_at": time.Now().UTC().Add(-time.Minute)}))
	b.show("now", "RUNNING", "usually takes 4 h")
}

// TestCounts: the page counts the tasks that run, wait, and have failed since the user
// last looked.
func TestCounts(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	b.open(s.url)
	title := func(want string) {
		t.Helper()
		b.until(fmt.Sprintf("document.title === %q", want))
	}
	title("Tasks - 127.0.0.1")
	for i := range 3 {
		b.event("operation", operation(fmt.Sprint("r", i), nil))
	}
	b.event("operation", operation("p", map[string]any{"state": "PENDING"}))
	title("(3) Tasks - 127.0.0.1")
	b.until(`$("counts").innerText === "3 running · 1 waiting" && $("failures").hidden`)

	b.do(chromedp.Navigate("about:blank")) // the user leaves
	time.Sleep(2 * time.Second)            // the page knows the server's time only to within the latency
	fails, end := s.start("fails")
	end(nil, errors.New("no"))
	b.open(s.url)
	title("(1 failed) Tasks - 127.0.0.1")
	b.until(`$("failures").innerText === "1 failed since you last looked"`)
	b.click("#failures")
	b.until(`location.search === "?state=FAILED"`)
	b.show(fails, "FAILED", "fails")
	b.open(s.url)
	b.until(`$("failures").hidden`)
}

// TestAddress: the filters and the open task are in the address.
func TestAddress(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	id, end := s.start("Scrub tank", task.WithMetadata(map[string]string{"pool": "tank"}))
	end(nil, errors.New("no"))
	for i := range 70 {
		_, end := s.start(fmt.Sprint("other ", i), task.WithMetadata(map[string]string{"pool": "backup"}))
		end(nil, nil)
	}
	only := func() {
		t.Helper()
		b.show(id, "FAILED", "Scrub tank")
		b.until(`document.querySelectorAll("li").length === 1`)
	}
	b.open(s.url)
	b.until(`document.querySelectorAll("li").length === 50`)
	b.click(`#states input[value="FAILED"]`)
	only()
	b.do(chromedp.Reload())
	only()
	b.until(`$("states").querySelector("input:checked").value === "FAILED"`)
	b.do(chromedp.Evaluate("history.back()", nil))
	b.until(`document.querySelectorAll("li").length === 50 && !location.search`)

	b.open(s.url + "?metadata=pool%3Dtank&name=SCRUB")
	only()
	b.until(`$("metadata").value === "pool=tank" && $("name").value === "SCRUB" && $("more").open`)

	b.open(s.url + "?from=2020-01-01T00:00&to=2020-01-02T00:00")
	b.until(`$("empty").innerText.includes("No task matches")`)
	b.open(s.url + "?from=nonsense&to=2120-01-02T00:00&state=NONSENSE")
	b.until(`document.querySelectorAll("li").length === 50`)

	// A link to a task that is not in the list.
	b.open(s.url + "?state=CANCELLED&task=" + id)
	b.until(`$("detail").open && $("detail-name").innerText === "Scrub tank" && $("detail-state").innerText === "Failed"`)
	b.click("#detail-close")
	b.until(`!$("detail").open && location.search === "?state=CANCELLED"`)
	b.open(s.url)
	b.until(row(id) + ` || !$("older").hidden`)
	b.do(chromedp.Evaluate(`document.querySelector(".open").click()`, nil))
	b.until(`$("detail").open && location.search.startsWith("?task=")`)
	b.do(chromedp.Evaluate("history.back()", nil))
	b.until(`!$("detail").open && !location.search`)
	b.do(chromedp.Evaluate("history.forward()", nil))
	b.until(`$("detail").open`)
	b.open(s.url + "?task=unknown")
	b.until(`$("detail").innerText.includes("unknown: operation not found")`)
	b.nothingWrong("404")
}

// TestCopyAndDownload: exact times, copy buttons, and the result as a file.
func TestCopyAndDownload(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	id, end := s.start("Report")
	end(map[string]any{"n": 1}, errors.New("line 1\nline 2"))
	dir := t.TempDir()
	b.do(browser.SetDownloadBehavior(browser.SetDownloadBehaviorBehaviorAllow).WithDownloadPath(dir))
	b.open(s.url)
	b.until(fmt.Sprintf(`(e => e && e.title.includes(":") && new Date(e.dateTime).getFullYear() > 2000)(%s.querySelector("time"))`, row(id)))
	b.do(chromedp.Evaluate(`document.addEventListener("copy", () => window.copied = document.activeElement.value);
		navigator.clipboard.writeText = async text => { window.copied = text; }`, nil))
	b.click(`li[data-id="` + id + `"] .open`)
	b.until(`$("detail").open`)
	b.click("#copy-id")
	b.until(fmt.Sprintf(`window.copied === %q && $("announcement").innerText === "Copied"`, id))
	b.click("#copy-error")
	b.until(`window.copied === "line 1\nline 2"`)
	b.do(chromedp.Evaluate(`navigator.clipboard.writeText = undefined; window.copied = ""`, nil)) // as without HTTPS
	b.click("#copy-id")
	b.until(fmt.Sprintf(`window.copied === %q`, id))

	b.click("#download")
	file := filepath.Join(dir, "result-"+id+".json")
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if data, err := os.ReadFile(file); err == nil && string(data) == `{"n":1}` {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the result was not downloaded")
		}
	}
}

// TestCancelAll: one confirmation counts all matching tasks, and cancels exactly those.
func TestCancelAll(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	var backups []string
	for i := range 5 {
		id, _ := s.start(fmt.Sprint("Backup ", i))
		backups = append(backups, id)
	}
	other, _ := s.start("Scrub tank")
	b.open(s.url)
	b.filter("backup")
	b.until(`$("cancel-all").innerText === "Cancel all 5…"`)
	b.click("#cancel-all")
	b.until(`$("confirm").open && $("confirm").innerText.includes("Cancel 5 tasks?") && $("confirm").innerText.includes("5 running, 0 waiting")`)
	later, _ := s.start("Backup later")
	b.click("#confirm-yes")
	for _, id := range backups {
		b.show(id, "CANCELLED", "Backup")
	}
	b.show(later, "RUNNING", "Backup later")
	b.filter(" ")
	b.show(other, "RUNNING", "Scrub tank")
}

// TestCancelAllFails: failures are counted.
func TestCancelAllFails(t *testing.T) {
	s := newSite(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == "POST" {
				http.Error(w, "no", http.StatusBadGateway)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	b := newTab(t)
	s.start("a")
	id, _ := s.start("b")
	b.open(s.url)
	b.until(`$("cancel-all").innerText === "Cancel all 2…"`)
	b.click("#cancel-all")
	b.until(`$("confirm").open`)
	b.click("#confirm-yes")
	b.until(`$("trouble").innerText === "2 tasks could not be cancelled: Bad Gateway."`)
	b.show(id, "RUNNING", "Cancel")
	b.nothingWrong("502")
}

// TestNotifications: a hidden page shows notifications of finished tasks if the user
// has enabled them.
func TestNotifications(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	b.do(browser.SetPermission(&browser.PermissionDescriptor{Name: "notifications"}, browser.PermissionSettingGranted))
	b.open(s.url)
	b.do(chromedp.Evaluate(`window.notes = []; window.Notification = class {
		static permission = "granted";
		static async requestPermission() { return "granted"; }
		constructor(title, options) { notes.push(title + ": " + options.body); }
	}`, nil))
	b.click("#notify")
	b.until(`$("notify").ariaPressed === "true" && mayNotify()`)
	o := b.another()
	o.do(chromedp.Navigate("about:blank"), page.BringToFront())
	b.until("document.hidden")
	_, end := s.start("Scrub tank")
	end(nil, errors.New("no"))
	b.until(`notes.join() === "Tasks: Scrub tank: Failed"`)
	b.do(page.BringToFront())
	b.click("#notify")
	b.until(`$("notify").ariaPressed === "false" && !mayNotify()`)
}
