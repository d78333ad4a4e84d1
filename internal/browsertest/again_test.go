package browsertest

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
)

// TestRunAgain: the details of a finished task let the user run it again, and then show
// the new task. They also show an error.
func TestRunAgain(t *testing.T) {
	m, err := task.New(nil)
	must(t, err)
	release := make(chan struct{})
	endless := func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return nil, ctx.Err() }
	var calls atomic.Int32
	server := httptest.NewServer(http.StripPrefix(prefix, taskhttp.Handler(m, taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) {
		calls.Add(1)
		return m.Submit(op.Name, endless, task.WithUnique(op.Name))
	}))))
	t.Cleanup(func() { m.Close(); server.CloseClientConnections(); server.Close() })
	first, err := m.Submit("Scrub tank", func(context.Context, func(int)) (any, error) { <-release; return nil, nil })
	must(t, err)
	b := newTab(t)
	b.open(server.URL + prefix + "/ui?task=" + first.ID)
	b.until(`$("detail-state").innerText === "Running" && $("again").hidden`)
	close(release)
	b.until(`$("detail-state").innerText === "Done" && !$("again").hidden`)
	b.do(chromedp.Evaluate(`for (let i = 0; i < 2; i++) $("again").click()`, nil))
	b.until(`$("detail-state").innerText === "Running" && $("again").hidden && view.task !== "` + first.ID + `"`)
	if n := calls.Load(); n != 1 {
		t.Errorf("two clicks made %d requests", n)
	}
	second := eval[string](b, "view.task")
	b.until(`$("detail-list").innerText.includes(view.task) && location.search.includes(view.task)`)
	b.show(second, "RUNNING", "Scrub tank")
	b.closeDetail()

	must(t, m.Cancel(second))
	b.show(second, "CANCELLED", "Scrub tank")
	go m.Shutdown(context.Background())
	b.click(`li[data-id="` + first.ID + `"] .open`)
	b.until(`!$("again").hidden`)
	b.until(`$("detail-error").innerText.startsWith("Not started: ") || ($("again").click(), false)`)
	b.nothingWrong("503")
}

// TestLongMetadata: the metadata filter shows the live tasks that the server finds
// although their metadata is too long for lists and events, and those that finish
// meanwhile.
func TestLongMetadata(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	long := func(pool string) task.SubmitOption {
		return task.WithMetadata(map[string]string{"pool": pool, "log": strings.Repeat("x", 20_000)})
	}
	here, endHere := s.start("here", long("tank"))
	away, _ := s.start("away", long("backup"))
	b.open(s.url + "?metadata=pool%3Dtank")
	b.show(here, "RUNNING", "here")
	later, endLater := s.start("later", long("tank"))
	b.show(later, "RUNNING", "later")
	brief, endBrief := s.start("brief", long("tank"))
	endBrief(nil, nil)
	b.show(brief, "DONE", "brief")
	endHere(nil, nil)
	endLater(nil, nil)
	b.show(here, "DONE", "here")
	b.show(later, "DONE", "later")
	if eval[bool](b, row(away)+" !== null") {
		t.Error("the page shows a task that does not match")
	}
	b.do(chromedp.Evaluate(`setView({metadata: "pool=backup"})`, nil))
	b.show(away, "RUNNING", "away")
	b.until(`document.querySelectorAll("li").length === 1`)
}
