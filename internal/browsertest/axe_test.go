package browsertest

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// TestAxe runs the accessibility checks of axe-core, whose script axe.min.js
// TASK_AXE names, on the page in several states, colours and sizes.
func TestAxe(t *testing.T) {
	path := os.Getenv("TASK_AXE")
	if path == "" {
		t.Skip("TASK_AXE is not set")
	}
	script, err := os.ReadFile(path)
	must(t, err)
	b := newTab(t)
	d := newDaemon(t)
	furnish(d)
	media := func(name, value string) *emulation.SetEmulatedMediaParams {
		return emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: name, Value: value}})
	}
	for name, look := range map[string]chromedp.Action{
		"light":              media("prefers-color-scheme", "light"),
		"dark":               media("prefers-color-scheme", "dark"),
		"forced colours":     media("forced-colors", "active"),
		"reduced motion":     media("prefers-reduced-motion", "reduce"),
		"phone":              emulation.SetDeviceMetricsOverride(390, 844, 2, true),
		"zoom of 200 %":      emulation.SetDeviceMetricsOverride(640, 512, 2, false),
		"zoom of 400 %":      emulation.SetDeviceMetricsOverride(320, 256, 4, false),
		"the largest window": emulation.SetDeviceMetricsOverride(2560, 1440, 1, false),
	} {
		b.do(look)
		b.open(d.page())
		b.do(chromedp.Evaluate(string(script), nil))
		b.axe(name + ", list")
		b.do(chromedp.Evaluate(`$("more").open = true; fail("x", "An error.")`, nil))
		b.axe(name + ", filters and an error")
		b.do(chromedp.Evaluate(`[...document.querySelectorAll(".open")].find(e => e.textContent.includes("photos")).click()`, nil))
		b.until(`$("detail").open && document.querySelector(".json")`)
		b.axe(name + ", details")
		b.do(chromedp.Evaluate(`$("detail").close(); findAll()`, nil))
		b.until(`$("confirm").open`)
		b.axe(name + ", confirmation")
		b.do(chromedp.Evaluate(`$("confirm").close()`, nil))
	}
	b.nothingWrong("net::ERR_", "Failed to load resource") // while the history was created
}

// axe reports the findings of axe-core.
func (b *tab) axe(what string) {
	b.t.Helper()
	var findings []string
	b.do(chromedp.Evaluate(`axe.run().then(r => r.violations.map(v => v.id + ": " + v.nodes.map(n => n.html).join(", ")))`,
		&findings, func(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) }))
	if len(findings) > 0 {
		b.t.Errorf("%s:\n%s", what, strings.Join(findings, "\n"))
	}
	if n := eval[int](b, "document.documentElement.scrollWidth - innerWidth"); n > 0 {
		b.t.Error(fmt.Sprint(what, ": the page scrolls sideways by ", n, " pixels"))
	}
}
