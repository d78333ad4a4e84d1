package browsertest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// A nasd is a process of examples/nasd.
type nasd struct {
	t         *testing.T
	exe, data string
	address   string
	cmd       *exec.Cmd
}

func newNasd(t *testing.T) *nasd {
	t.Helper()
	dir := t.TempDir()
	d := &nasd{t: t, exe: filepath.Join(dir, "nasd"), data: filepath.Join(dir, "data"), address: "127.0.0.1:0"}
	build := exec.Command("go", "build", "-o", d.exe, "./examples/nasd")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.begin()
	t.Cleanup(d.kill)
	return d
}

// begin starts the process, on the same address as before.
func (d *nasd) begin() {
	d.t.Helper()
	d.cmd = exec.Command(d.exe, "-data", d.data, "-listen", d.address, "-snapshot-every", "0")
	out, err := d.cmd.StdoutPipe()
	must(d.t, err)
	must(d.t, d.cmd.Start())
	r := bufio.NewReader(out)
	line, err := r.ReadString('\n')
	must(d.t, err)
	d.address, _, _ = strings.Cut(strings.TrimPrefix(line, "nasd is at http://"), ";")
	go io.Copy(io.Discard, r)
}

// kill ends the process with SIGKILL.
func (d *nasd) kill() {
	d.cmd.Process.Kill()
	d.cmd.Wait() // the error only says that it was killed
}

// file returns the path of a file of a pool.
func (d *nasd) file(pool, name string) string {
	return filepath.Join(d.data, "pools", pool, "files", name)
}

// corrupt changes the content of a file but not its time, as a bad disk does.
func (d *nasd) corrupt(path, content string) {
	d.t.Helper()
	info, err := os.Stat(path)
	must(d.t, err)
	must(d.t, os.WriteFile(path, []byte(content), 0o600))
	must(d.t, os.Chtimes(path, time.Time{}, info.ModTime()))
}

func (b *tab) openNasd(d *nasd) {
	b.t.Helper()
	b.do(chromedp.Navigate("http://" + d.address + "/"))
	b.until(`$("connection").textContent === "Live" && loaded`)
}

// create creates a pool on the page of nasd.
func (b *tab) create(name string) {
	b.t.Helper()
	b.do(chromedp.SendKeys("#name", name+"\r", chromedp.ByQuery))
	b.until(fmt.Sprintf(`document.querySelector('section[data-pool=%q]')`, name))
}

// press presses a button of a pool.
func (b *tab) press(pool, text string) {
	b.t.Helper()
	b.do(chromedp.Click(fmt.Sprintf(`//section[@data-pool=%q]//button[.=%q and not(@hidden) and not(@disabled)]`, pool, text), chromedp.BySearch))
}

// upload chooses files for a pool.
func (b *tab) upload(pool string, paths ...string) {
	b.t.Helper()
	b.do(chromedp.SetUploadFiles(fmt.Sprintf(`section[data-pool=%q] input[type=file]`, pool), paths, chromedp.ByQuery))
	b.until(fmt.Sprintf(`document.querySelector('section[data-pool=%q] .note').textContent.startsWith("Uploaded")`, pool))
}

// last waits until a pool shows an operation of that kind and state, with a text.
func (b *tab) last(pool, kind, state, text string) {
	b.t.Helper()
	b.until(fmt.Sprintf(`[...document.querySelectorAll('section[data-pool=%q] li[data-kind=%q][data-state=%q]')].some(e => e.innerText.includes(%q))`,
		pool, kind, state, text))
}

// TestNasdLongResult checks that the page loads a result that events leave out: a
// long list of corrupted files.
func TestNasdLongResult(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	name := func(i int) string { return fmt.Sprint(strings.Repeat("x", 240), i) }
	for i := range 100 {
		must(t, os.WriteFile(d.file("tank", name(i)), []byte("hello"), 0o600))
	}
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "100 files")
	for i := range 100 {
		d.corrupt(d.file("tank", name(i)), "hallo")
	}
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "FAILED", "corrupted: "+name(0))
	b.press("tank", "Accept as it is")
	b.last("tank", "accept", "DONE", "100 files")
	b.nothingWrong("alert: Accept the present content of 100 files of tank that may be corrupted?\n\n" + name(0) + "\n" + name(1) + "\n")
}

// TestNasd tries everything that examples/nasd does in the browser.
func TestNasd(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.until(`!$("empty").hidden`)
	b.create("tank")
	b.until(`$("empty").hidden && document.querySelector("select").parentNode.hidden`) // nothing to replicate to
	b.create("backup")

	// A name with the special characters of paths and of HTML.
	const name = `a b#?%<img src=x onerror=alert(1)>.txt`
	path := filepath.Join(t.TempDir(), name)
	must(t, os.WriteFile(path, []byte("hello"), 0o600))
	b.upload("tank", path)
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "1 file, 5 bytes")
	b.press("tank", "Snapshot")
	b.last("tank", "snapshot", "DONE", "1 file")
	b.press("tank", "Replicate to")
	b.last("tank", "replicate", "DONE", "1 file copied")
	b.press("backup", "Scrub")
	b.last("backup", "scrub", "DONE", "1 file, 5 bytes")

	d.corrupt(d.file("tank", name), "hallo")
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "FAILED", "corrupted: "+name)
	b.openNasd(d) // now from the history
	b.last("tank", "scrub", "FAILED", "corrupted: "+name)
	b.press("tank", "Accept as it is")
	b.last("tank", "accept", "DONE", "1 file")
	b.until(`[...document.querySelectorAll("li button")].every(e => e.hidden)`)
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "1 file")

	// A damaged manifest can be replaced, too.
	must(t, os.WriteFile(filepath.Join(d.data, "pools/tank/manifest"), nil, 0o600))
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "FAILED", "the manifest is damaged")
	b.press("tank", "Accept as it is")
	b.until(`[...document.querySelectorAll("li button")].every(e => e.hidden)`)
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "1 file")

	// The API refuses a name that is taken.
	b.do(chromedp.SendKeys("#name", "tank\r", chromedp.ByQuery))
	b.until(`!$("trouble").hidden && $("trouble").textContent.includes("the name tank is already taken")`)
	b.press("tank", "Snapshot") // hides the error
	b.until(`$("trouble").hidden`)
	b.nothingWrong("409", // the browser logs the refusal
		"alert: Accept the present content of 1 file of tank that may be corrupted?\n\n"+name,
		"alert: The checksums of tank are damaged.")

	b.do(chromedp.Click(".title a", chromedp.ByQuery), chromedp.WaitVisible("#history li", chromedp.ByQuery))
}

// TestNasdRestarts checks that the page shows running operations live, and
// reconnects to a restarted daemon, which resumes them.
func TestNasdRestarts(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	huge := d.file("tank", "huge")
	must(t, os.WriteFile(huge, nil, 0o600))
	must(t, os.Truncate(huge, 10<<40)) // takes no space, but hours to read
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "RUNNING", "huge")
	b.until(`document.querySelector("li[data-state=RUNNING] progress").checkVisibility()`)
	b.press("tank", "Snapshot")
	b.last("tank", "snapshot", "PENDING", "Waiting")
	d.kill()
	b.until(`$("connection").dataset.is === "lost"`)
	d.begin()
	b.until(`$("connection").dataset.is === "live"`)
	b.last("tank", "scrub", "RUNNING", "huge") // resumed, like the operation that waits for it
	b.until(`document.querySelectorAll("li").length === 2`)
	must(t, os.Remove(huge))
	b.do(chromedp.Click(`//li[@data-kind="scrub"]//button[.="Cancel" and not(@disabled)]`, chromedp.BySearch))
	b.last("tank", "scrub", "CANCELLED", "")
	b.last("tank", "snapshot", "DONE", "")
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "0 files")
	b.nothingWrong("net::ERR_", "Failed to load resource") // while no daemon ran
}

// TestNasdUsage checks that the page shows what a pool holds and how much is free.
func TestNasdUsage(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	const usage = `document.querySelector("section[data-pool=tank] .usage").innerText`
	b.until(usage + `.startsWith("0 files, 0 bytes · ") && ` + usage + `.endsWith("B free")`)
	path := filepath.Join(t.TempDir(), "a")
	must(t, os.WriteFile(path, make([]byte, 1_234_567), 0o600))
	b.upload("tank", path)
	b.until(usage + `.startsWith("1 file, 1.2 MB · ")`)
}

// TestNasdRestore checks that the page lists snapshots, folds automatic ones away, and
// restores a file.
func TestNasdRestore(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	must(t, os.WriteFile(d.file("tank", "a b"), []byte("old"), 0o600))
	must(t, os.WriteFile(d.file("tank", "c"), nil, 0o600))
	const auto = "20260102T030405.000Z-auto"
	must(t, os.MkdirAll(filepath.Join(d.data, "pools/tank/snapshots", auto), 0o700))
	b.press("tank", "Snapshot")
	b.last("tank", "snapshot", "DONE", "2 files")
	must(t, os.WriteFile(d.file("tank", "a b"), []byte("new"), 0o600))
	b.do(chromedp.Click(".snapshots summary", chromedp.ByQuery))
	const folded = `[...document.querySelectorAll(".snapshots details .snapshot")]`
	b.until(folded + `.length === 1 && ` + folded + `.every(e => !e.checkVisibility())`)
	b.until(`document.querySelectorAll(".snapshots > div .snapshot").length === 1`)
	b.press("tank", "Files…")
	const listed = `[...document.querySelectorAll("#files-list bdi")].map(e => e.textContent).join()`
	b.until(listed + ` === "a b,c"`)
	b.do(chromedp.SendKeys("#files-prefix", "a", chromedp.ByQuery))
	b.until(listed + ` === "a b" && $("files-note").textContent === "1 file"`)
	b.do(chromedp.Click("#files-list button", chromedp.ByQuery))
	b.until(`$("files-note").textContent === "Restoring a b"`)
	b.do(chromedp.Click("#files-close", chromedp.ByQuery))
	b.last("tank", "restore", "DONE", "Restore a b")
	b.last("tank", "restore", "DONE", "3 bytes")
	if got, err := os.ReadFile(d.file("tank", "a b")); err != nil || string(got) != "old" {
		t.Errorf("the file is %q, %v", got, err)
	}
	b.do(chromedp.Click(".snapshots details summary", chromedp.ByQuery))
	b.until(folded + `.every(e => e.checkVisibility() && e.innerText.includes("2026"))`)
	b.do(emulation.SetDeviceMetricsOverride(375, 812, 2, true))
	b.until(`[...document.querySelectorAll(".snapshots code")].every(e => e.offsetHeight < 40)`) // one line each
}

// TestNasdDelete checks that a pool is deleted after its name has been typed, and only
// that name.
func TestNasdDelete(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	b.press("tank", "Delete…")
	b.until(`$("delete").open && $("delete-go").disabled`)
	b.do(chromedp.SendKeys("#delete-name", "tan", chromedp.ByQuery))
	b.until(`$("delete-go").disabled`)
	b.do(chromedp.SendKeys("#delete-name", "k", chromedp.ByQuery))
	b.until(`!$("delete-go").disabled`)
	b.do(chromedp.SendKeys("#delete-name", "\r", chromedp.ByQuery))
	b.until(`!document.querySelector("section") && !$("empty").hidden`)
	if _, err := os.Stat(filepath.Join(d.data, "pools/tank")); !os.IsNotExist(err) {
		t.Errorf("the pool is still there: %v", err)
	}
}

// TestNasdNoNews checks that the buttons are disabled while the daemon is stopped.
func TestNasdNoNews(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	const buttons = `[...document.querySelectorAll("section button, #create-go")]`
	b.until(buttons + `.length > 5 && ` + buttons + `.every(e => !e.disabled)`)
	must(t, d.cmd.Process.Signal(syscall.SIGSTOP))
	b.until(`$("connection").textContent === "No news: nasd does not answer" && ` + buttons + `.every(e => e.disabled)`)
	must(t, d.cmd.Process.Signal(syscall.SIGCONT))
	b.until(`$("connection").textContent === "Live" && ` + buttons + `.every(e => !e.disabled)`)
}

// TestNasdDoubleClick checks that a button makes one request at a time.
func TestNasdDoubleClick(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	n := eval[int](b, `(() => {
		let n = 0;
		const send = fetch;
		fetch = (path, options) => { n += options?.method === "POST"; return send(path, options); };
		const scrub = [...document.querySelectorAll("section button")].find(e => e.textContent === "Scrub");
		scrub.click();
		scrub.click();
		return n;
	})()`)
	if n != 1 {
		t.Errorf("two clicks have made %d requests", n)
	}
	b.last("tank", "scrub", "DONE", "0 files")
}

// TestNasdTabs checks that eight tabs of one browser follow an operation, over HTTP/1.1.
func TestNasdTabs(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	tabs := []*tab{b}
	for range 7 {
		ctx, cancel := chromedp.NewContext(b.ctx)
		t.Cleanup(cancel)
		other := &tab{t: t, ctx: ctx}
		other.openNasd(d)
		tabs = append(tabs, other)
	}
	front := func(i int) *tab { // a browser draws only the tab in front
		tabs[i].do(page.BringToFront())
		return tabs[i]
	}
	front(0).create("tank")
	huge := d.file("tank", "huge")
	must(t, os.WriteFile(huge, nil, 0o600))
	must(t, os.Truncate(huge, 10<<40))
	b.press("tank", "Scrub")
	for i := range tabs {
		front(i).last("tank", "scrub", "RUNNING", "huge")
	}
	front(7).press("tank", "Cancel")
	for i := range tabs {
		front(i).last("tank", "scrub", "CANCELLED", "")
	}
}

// TestNasdAxe is TestAxe for the page of nasd.
func TestNasdAxe(t *testing.T) {
	file := os.Getenv("TASK_AXE")
	if file == "" {
		t.Skip("TASK_AXE is not set")
	}
	script, err := os.ReadFile(file)
	must(t, err)
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	must(t, os.MkdirAll(filepath.Join(d.data, "pools/tank/snapshots/20260102T030405.000Z-auto"), 0o700))
	must(t, os.WriteFile(d.file("tank", "small"), nil, 0o600))
	b.press("tank", "Snapshot")
	b.last("tank", "snapshot", "DONE", "1 file")
	huge := d.file("tank", "huge")
	must(t, os.WriteFile(huge, nil, 0o600))
	must(t, os.Truncate(huge, 10<<40)) // takes hours to read
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "RUNNING", "huge")
	b.do(chromedp.Evaluate(string(script), nil))
	b.do(chromedp.Evaluate(`document.querySelectorAll("details").forEach(e => e.open = true)`, nil))
	b.until(`document.querySelectorAll(".snapshot").length === 2`)
	for name, look := range map[string]chromedp.Action{
		"light": emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "light"}}),
		"dark":  emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}}),
		"phone": emulation.SetDeviceMetricsOverride(390, 844, 2, true),
	} {
		b.do(look)
		b.axe(name + ", pools")
		b.press("tank", "Delete…")
		b.until(`$("delete").open`)
		b.axe(name + ", delete")
		b.do(chromedp.Click("#delete-no", chromedp.ByQuery))
		b.until(`!$("delete").open`)
		b.do(chromedp.Click(`//section[@data-pool="tank"]//button[.="Files…"]`, chromedp.BySearch))
		b.until(`$("files").open && $("files-note").textContent.endsWith("file") && $("files-list").children.length === 1`)
		b.axe(name + ", files of a snapshot")
		b.do(chromedp.Click("#files-close", chromedp.ByQuery))
		b.until(`!$("files").open`)
	}
}

// TestNasdPhone checks that a phone shows everything without scrolling sideways.
func TestNasdPhone(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.do(emulation.SetDeviceMetricsOverride(360, 740, 2, true))
	b.openNasd(d)
	long := strings.Repeat("x", 63)
	b.create(long)
	b.create("tank")
	path := filepath.Join(t.TempDir(), strings.Repeat("y", 200))
	must(t, os.WriteFile(path, []byte("hello"), 0o600))
	b.upload("tank", path)
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "1 file")
	d.corrupt(d.file("tank", filepath.Base(path)), "hallo")
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "FAILED", "corrupted: yyy")
	b.do(chromedp.Click("footer summary", chromedp.ByQuery))
	if w := eval[int](b, "document.documentElement.scrollWidth"); w != 360 {
		t.Errorf("the page is %d pixels wide", w)
	}
}

// TestNasdUpload checks that a long upload is on the page of each tab, with its progress,
// and that another tab can cancel it.
func TestNasdUpload(t *testing.T) {
	b := newTab(t)
	d := newNasd(t)
	b.openNasd(d)
	b.create("tank")
	dir := t.TempDir()
	big, small := filepath.Join(dir, "big.img"), filepath.Join(dir, "small.txt")
	must(t, os.WriteFile(small, []byte("small"), 0o600))
	must(t, os.WriteFile(big, nil, 0o600))
	must(t, os.Truncate(big, 8<<30)) // sparse; takes longer to upload than to cancel
	b.do(chromedp.SetUploadFiles(`section[data-pool=tank] input[type=file]`, []string{big, small}, chromedp.ByQuery))
	running := func(b *tab) {
		t.Helper()
		b.last("tank", "upload", "RUNNING", "Upload big.img")
		b.last("tank", "upload", "RUNNING", "of 8.6 GB")
		b.until(`document.querySelector("li[data-kind=upload] progress").value > 0`)
	}
	running(b) // before the tab is in the background, where browsers don't draw
	other := b.another()
	other.openNasd(d)
	running(other)
	other.press("tank", "Cancel")
	b.until(`document.querySelector("section[data-pool=tank] .note").textContent === "Uploaded small.txt. Cancelled: big.img."`)
	other.last("tank", "upload", "DONE", "Upload small.txt")
	entries, err := os.ReadDir(d.file("tank", ""))
	must(t, err)
	for _, e := range entries {
		if e.Name() != "small.txt" && e.Name() != ".incoming" {
			t.Errorf("the pool has %s", e.Name())
		}
	}
	b.nothingWrong("409", "net::ERR_")
}

// TestNasdScreenshots stores pictures of the page for people to look at.
func TestNasdScreenshots(t *testing.T) {
	b, shoot := newStudio(t, "nasd-")
	d := newNasd(t)
	b.scheme("light")
	b.openNasd(d)
	b.until(`!$("empty").hidden`)
	shoot("empty")
	for _, name := range []string{"tank", "backup", "scratch"} {
		b.create(name)
	}
	var paths []string
	for _, name := range []string{"hello.txt", "IMG_2041.jpg", "accounts 2025.ods"} {
		paths = append(paths, filepath.Join(t.TempDir(), name))
		must(t, os.WriteFile(paths[len(paths)-1], make([]byte, 1_234_567), 0o600))
	}
	b.upload("tank", paths...)
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "DONE", "3 files")
	b.press("tank", "Snapshot")
	b.last("tank", "snapshot", "DONE", "3 files")
	b.press("tank", "Replicate to")
	b.last("tank", "replicate", "DONE", "3 files copied")
	d.corrupt(d.file("tank", "IMG_2041.jpg"), strings.Repeat("x", 1_234_567))
	b.press("tank", "Scrub")
	b.last("tank", "scrub", "FAILED", "corrupted: IMG")
	huge := d.file("scratch", "disk.img")
	must(t, os.WriteFile(huge, nil, 0o600))
	must(t, os.Truncate(huge, 8<<30))
	b.press("scratch", "Scrub")
	b.last("scratch", "scrub", "RUNNING", "disk.img")
	b.press("scratch", "Snapshot")
	b.do(emulation.SetDeviceMetricsOverride(1000, 1000, 1, false))
	shoot("desktop-light")
	b.scheme("dark")
	shoot("desktop-dark")
	b.do(chromedp.Click("section[data-pool=tank] .snapshots summary", chromedp.ByQuery))
	b.press("tank", "Files…")
	b.until(`$("files-note").textContent === "3 files"`)
	shoot("files-dark")
	b.do(emulation.SetDeviceMetricsOverride(375, 812, 2, true))
	shoot("files-phone")
	b.do(chromedp.Click("#files-close", chromedp.ByQuery))
	b.do(emulation.SetDeviceMetricsOverride(375, 812, 2, true))
	shoot("phone-dark")
	b.scheme("light")
	b.do(chromedp.SendKeys("#name", "tank\r", chromedp.ByQuery), chromedp.Click("footer summary", chromedp.ByQuery))
	b.until(`!$("trouble").hidden`)
	shoot("phone-light")
	b.do(chromedp.Evaluate("scrollTo(0, 1e6)", nil))
	shoot("phone-light-end")
	b.nothingWrong("409")
}
