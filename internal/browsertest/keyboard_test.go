package browsertest

import (
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// tabTo presses Tab until the focused element matches the selector.
func (b *tab) tabTo(selector string) {
	b.t.Helper()
	for range 100 {
		b.do(chromedp.KeyEvent(kb.Tab))
		if eval[bool](b, "document.activeElement.matches(`"+selector+"`)") {
			return
		}
	}
	b.t.Fatalf("Tab does not reach %s", selector)
}

// TestKeyboard uses the page by keyboard alone: filter, search, open a task, cancel it
// with a confirmation, copy, go back, load older ones.
func TestKeyboard(t *testing.T) {
	s := newSite(t, nil, past(60, "old")...)
	b := newTab(t)
	id, _ := s.start("Scrub tank")
	b.open(s.url)
	b.show(id, "RUNNING", "Scrub tank")
	b.tabTo("#states input")
	b.do(chromedp.KeyEvent(kb.ArrowRight))
	b.until(`location.search === "?state=RUNNING" && document.querySelectorAll("li").length === 1`)
	b.do(chromedp.KeyEvent(kb.ArrowLeft))
	b.until(`!location.search`)
	b.tabTo("#name")
	b.do(chromedp.KeyEvent("scrub"))
	b.until(`document.querySelectorAll("li").length === 1`)
	b.tabTo(`li[data-id="` + id + `"] .open`)
	b.do(chromedp.KeyEvent(kb.Enter))
	b.until(`$("detail").open && $("detail-cancel").offsetParent`)
	b.tabTo("#copy-id")
	b.do(chromedp.KeyEvent(kb.Enter))
	b.until(`$("announcement").innerText === "Copied" && document.activeElement === $("copy-id")`)
	b.tabTo("#detail-cancel")
	b.do(chromedp.KeyEvent(kb.Enter))
	b.until(`$("confirm").open && document.activeElement === $("confirm-no")`)
	b.tabTo("#confirm-yes")
	b.do(chromedp.KeyEvent(kb.Enter))
	b.show(id, "CANCELLED", "Scrub tank")
	b.do(chromedp.KeyEvent(kb.Escape))
	b.until(`!$("detail").open && !location.search.includes("task=") && document.activeElement.matches(".open")`)

	b.open(s.url)
	b.until(`document.querySelectorAll("li").length === 50`)
	b.tabTo("#older")
	b.do(chromedp.KeyEvent(kb.Enter))
	b.until(`document.querySelectorAll("li").length === 61`)
}
