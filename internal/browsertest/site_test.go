package browsertest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
)

// A site is a server in this process, for tests of how a proxy or a slow server affects
// the page.
type site struct {
	t   *testing.T
	m   *task.Manager
	url string // of the page
}

// newSite serves the operations of a new database, after storing history in it.
func newSite(t *testing.T, wrap func(http.Handler) http.Handler, history ...*task.Operation) *site {
	t.Helper()
	return newSiteWith(t, nil, wrap, history...)
}

// newSiteWith is newSite with options of the handler.
func newSiteWith(t *testing.T, opts []taskhttp.Option, wrap func(http.Handler) http.Handler, history ...*task.Operation) *site {
	t.Helper()
	store, err := task.OpenSQLite(filepath.Join(t.TempDir(), "tasks.db"))
	must(t, err)
	t.Cleanup(func() { store.Close() })
	for _, op := range history {
		must(t, store.Save(op))
	}
	m, err := task.New(store, task.WithLimit(300))
	must(t, err)
	h := http.StripPrefix(prefix, taskhttp.Handler(m, opts...))
	if wrap != nil {
		h = wrap(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(func() {
		m.Close()
		s.CloseClientConnections()
		s.Close()
	})
	return &site{t, m, s.URL + prefix + "/ui"}
}

// past returns n finished operations, the last of which finished last.
func past(n int, name string) (ops []*task.Operation) {
	start := time.Now().UTC().Add(-time.Duration(n+10) * time.Second)
	for i := range n {
		at := start.Add(time.Duration(i) * time.Second)
		ops = append(ops, &task.Operation{ID: fmt.Sprintf("00000000-0000-7000-8000-%012d", i), Name: fmt.Sprint(name, " ", i),
			State: task.StateDone, Progress: 100, CreatedAt: at, StartedAt: at, UpdatedAt: at.Add(time.Second)})
	}
	return ops
}

// start starts an operation that runs until the returned function gives it a
// result.
func (s *site) start(name string, opts ...task.SubmitOption) (id string, end func(result any, err error)) {
	s.t.Helper()
	type outcome struct {
		result any
		err    error
	}
	ended := make(chan outcome, 1)
	op, err := s.m.Submit(name, func(ctx context.Context, update func(int)) (any, error) {
		select {
		case o := <-ended:
			return o.result, o.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, opts...)
	must(s.t, err)
	return op.ID, func(result any, err error) {
		ended <- outcome{result, err}
		_, err = s.m.Wait(s.t.Context(), op.ID)
		must(s.t, err)
	}
}

// event gives the page an event, as if from the server.
func (b *tab) event(name string, data any) {
	b.t.Helper()
	text, err := json.Marshal(data)
	must(b.t, err)
	b.do(chromedp.Evaluate(fmt.Sprintf("receive(%q, %q)", name, text), nil))
}

// operation returns the JSON of a running operation with changes.
func operation(id string, changes map[string]any) map[string]any {
	now := time.Now().UTC()
	op := map[string]any{"id": id, "name": id, "state": "RUNNING", "progress": 0,
		"created_at": now, "started_at": now, "updated_at": now}
	for name, v := range changes {
		op[name] = v
	}
	return op
}

// another returns another tab of the same browser.
func (b *tab) another() *tab {
	b.t.Helper()
	ctx, cancel := chromedp.NewContext(b.ctx)
	b.t.Cleanup(cancel)
	o := &tab{t: b.t, ctx: ctx}
	chromedp.ListenTarget(ctx, o.note)
	o.do(chromedp.Navigate("about:blank"))
	b.t.Cleanup(func() { o.nothingWrong() })
	return o
}
