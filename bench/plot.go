package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// The plot's measures, in pixels.
const (
	plotWidth, plotHeight             = 960, 600
	plotLeft, plotRight               = 80, 290 // the labels are on the right
	plotTop, plotBottom               = 50, 60
	labelHeight                       = 15
	axisColor, gridColor, singleColor = "#444", "#ddd", "#888"
)

// Colors that are distinguishable with color blindness, after Paul Tol. The first
// one is this library's.
var plotColors = []string{"#cc3311", "#000000", "#0077bb", "#33bbee", "#009988", "#99aa00", "#ee7733", "#ee3377", "#aa4499", "#775500", "#7777ff"}

// A line is the line of one system in the plot.
type line struct {
	name   string
	color  string
	dashed bool
	points []point
}

type point struct{ submitters, rate float64 }

// plot draws jobs/s at synchronous=FULL against the number of submitters as SVG.
// Both axes are logarithmic.
func (b *bench) plot() string {
	lines := b.lines()
	var low, high, most = math.Inf(1), 0.0, 1.0
	for _, l := range lines {
		for _, p := range l.points {
			low, high, most = min(low, p.rate), max(high, p.rate), max(most, p.submitters)
		}
	}
	low, high = math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(high)))
	x := func(submitters float64) float64 {
		return plotLeft + (plotWidth-plotLeft-plotRight)*math.Log(submitters)/math.Log(max(most, 2))
	}
	y := func(rate float64) float64 {
		return plotHeight - plotBottom - (plotHeight-plotTop-plotBottom)*math.Log(rate/low)/math.Log(high/low)
	}

	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&s, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", plotWidth, plotHeight)
	text(&s, plotLeft, 28, "start", "#000", "Jobs per second, from submission to a stored final state, synchronous=FULL")
	text(&s, (x(1)+x(most))/2, plotHeight-15, "middle", axisColor, "goroutines submitting")
	for n := 1.0; n <= most; n *= 2 {
		stroke(&s, gridColor, x(n), y(low), x(n), y(high))
		text(&s, x(n), y(low)+20, "middle", axisColor, fmt.Sprint(n))
	}
	for r := low; r <= high; r *= 10 {
		stroke(&s, gridColor, x(1), y(r), x(most), y(r))
		text(&s, plotLeft-8, y(r)+4, "end", axisColor, number(r))
	}
	// From top to bottom, each label is as close to the end of its line as the
	// labels above allow.
	slices.SortFunc(lines, func(a, b line) int { return int(y(a.last().rate) - y(b.last().rate)) })
	next := float64(plotTop)
	for _, l := range lines {
		l.draw(&s, x, y)
		end := y(l.last().rate)
		next = max(next, end)
		stroke(&s, l.color, x(most)+2, end, x(most)+12, next)
		text(&s, x(most)+16, next+4, "start", l.color, fmt.Sprintf("%s: %s", l.name, number(l.last().rate)))
		next += labelHeight
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// lines returns a line for each measured system. A system with one submitter is
// drawn level and dashed.
func (b *bench) lines() []line {
	most := slices.MaxFunc(b.loads, func(a, b load) int { return a.submitters - b.submitters }).submitters
	var lines []line
	for i, r := range b.results {
		l := line{name: r.name, color: plotColors[i%len(plotColors)], dashed: r.single}
		for _, load := range b.loads {
			if rates := r.rates[load]; load.sync == "FULL" && len(rates) > 0 {
				l.points = append(l.points, point{float64(load.submitters), median(rates)})
			}
		}
		if r.single && len(l.points) > 0 {
			l.color = singleColor
			l.points = append(l.points, point{float64(most), l.points[0].rate})
		}
		if len(l.points) > 0 {
			slices.SortFunc(l.points, func(a, b point) int { return int(a.submitters - b.submitters) })
			lines = append(lines, l)
		}
	}
	return lines
}

func (l line) last() point { return l.points[len(l.points)-1] }

func (l line) draw(s *strings.Builder, x, y func(float64) float64) {
	var points []string
	for _, p := range l.points {
		points = append(points, fmt.Sprintf("%.1f,%.1f", x(p.submitters), y(p.rate)))
		if !l.dashed {
			fmt.Fprintf(s, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", x(p.submitters), y(p.rate), l.color)
		}
	}
	style := ""
	if l.dashed {
		style = ` stroke-dasharray="6 4"`
	}
	fmt.Fprintf(s, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.Join(points, " "), l.color, style)
}

func text(s *strings.Builder, x, y float64, anchor, color, text string) {
	fmt.Fprintf(s, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s">%s</text>`+"\n", x, y, anchor, color, html.EscapeString(text))
}

func stroke(s *strings.Builder, color string, x1, y1, x2, y2 float64) {
	fmt.Fprintf(s, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`+"\n", x1, y1, x2, y2, color)
}
