package browsertest

import (
	"context"
	"fmt"
	"io"
	"math"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/cdproto/systeminfo"
	"github.com/chromedp/chromedp"
)

// cpu returns the CPU time that the tabs of the browser have used.
func (b *tab) cpu() (used time.Duration) {
	b.t.Helper()
	b.do(chromedp.ActionFunc(func(ctx context.Context) error {
		c := chromedp.FromContext(ctx)
		all, err := systeminfo.GetProcessInfo().Do(cdp.WithExecutor(ctx, c.Browser))
		for _, p := range all {
			if p.Type == "renderer" {
				used += time.Duration(p.CPUTime * float64(time.Second))
			}
		}
		return err
	}))
	return used
}

// heap returns the bytes that the page's JavaScript uses after a collection.
func (b *tab) heap() (used float64) {
	b.t.Helper()
	b.do(chromedp.ActionFunc(func(ctx context.Context) (err error) {
		if err := runtime.Enable().Do(ctx); err != nil {
			return err
		}
		for range 3 { // weak references need more than one
			if _, _, err := runtime.Evaluate("globalThis.gc?.()").Do(ctx); err != nil {
				return err
			}
		}
		used, _, _, _, err = runtime.GetHeapUsage().Do(ctx)
		return err
	}))
	return used
}

// TestManyReports: 200 running operations that report 20 times a second use at most a
// quarter of a core in the tab, which draws at most four times a second.
func TestManyReports(t *testing.T) {
	s := newSite(t, nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for i := range 200 {
		_, err := s.m.Submit(fmt.Sprint("task ", i), func(_ context.Context, update func(int)) (any, error) {
			for n := 0; ctx.Err() == nil; n++ {
				update(n % 100)
				select {
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
			}
			return nil, nil
		})
		must(t, err)
	}
	b := newTab(t)
	b.open(s.url)
	b.until(`document.querySelectorAll("#active li").length === 200`)
	b.do(chromedp.Evaluate(`window.draws = 0; const original = draw; draw = () => { window.draws++; original(); }`, nil))
	const span = 5 * time.Second
	start, before := time.Now(), b.cpu()
	time.Sleep(span)
	passed, used := time.Since(start), b.cpu()-before
	t.Logf("%.0f %% of a core, %.1f drawings a second", 100*used.Seconds()/passed.Seconds(), eval[float64](b, "draws")/passed.Seconds())
	if used.Seconds() > 0.25*passed.Seconds() {
		t.Errorf("the tab used %v of CPU in %v", used, passed)
	}
	if n := eval[float64](b, "draws"); n > 4.5*passed.Seconds() {
		t.Errorf("%v drawings in %v", n, passed)
	}
}

// TestLongHistory: with 10,000 finished operations, the first rows appear quickly, and
// loading older ones stays fast.
func TestLongHistory(t *testing.T) {
	s := newSite(t, nil, past(10_000, "snapshot")...)
	b := newTab(t)
	b.do(chromedp.Navigate(s.url))
	b.until(`document.querySelectorAll("li").length === 50`)
	first := eval[float64](b, `performance.getEntriesByType("resource").filter(e => e.name.includes("order=finish"))[0].responseEnd`)
	t.Logf("the first rows came after %.0f ms", first)
	var took []float64
	for range 2 {
		var ms float64
		b.do(chromedp.Evaluate(`(async () => {
			const start = performance.now();
			for (let i = 0; i < 20; i++) await loadOlder();
			draw();
			return performance.now() - start;
		})()`, &ms, func(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }))
		took = append(took, ms)
	}
	t.Logf("20 pages of older ones took %.0f ms, the next 20 %.0f ms", took[0], took[1])
	if took[1] > 3*took[0]+500 {
		t.Errorf("loading older operations becomes slow: %v", took)
	}
}

// TestFlatHeap: the heap does not grow with the number of past operations.
func TestFlatHeap(t *testing.T) {
	s := newSite(t, nil)
	b := newTab(t)
	b.open(s.url)
	pass := func(from, to int) float64 {
		b.do(chromedp.Evaluate(fmt.Sprintf(`for (let i = %d; i < %d; i++) for (const state of ["PENDING", "RUNNING", "DONE"]) {
			const at = new Date(now() + i).toISOString();
			receive("operation", JSON.stringify({id: "t" + i, name: "task " + i, state, progress: 1, created_at: at, started_at: at, updated_at: at, result: "x".repeat(500)}));
		}`, from, to), nil))
		b.until(fmt.Sprintf(`draw() || $("history").firstChild.dataset.id === "t%d"`, to-1))
		return b.heap()
	}
	pass(0, 8000) // fills what is bounded
	// A leak raises the smallest heap, too. The largest depends on when the browser
	// collects earlier drawings. Keeping 10,000 operations takes at least 10 MB.
	least := [2]float64{math.Inf(1), math.Inf(1)}
	for i := range 20 {
		from := 8000 + 1000*i
		least[i/10] = min(least[i/10], pass(from, from+1000))
	}
	t.Logf("the smallest heap up to 18,000 operations: %.1f MB, up to 28,000: %.1f MB", least[0]/1e6, least[1]/1e6)
	if least[1] > least[0]+4e6 {
		t.Errorf("the heap grew from %.0f to %.0f bytes", least[0], least[1])
	}
}

// TestPageSize: the page is small.
func TestPageSize(t *testing.T) {
	response, err := client.Get(newSite(t, nil).url)
	must(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	must(t, err)
	t.Logf("the page has %d bytes", len(body))
	if len(body) > 45_000 {
		t.Errorf("the page has %d bytes, want at most 45,000", len(body))
	}
}
