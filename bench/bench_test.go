package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

// TestSystems runs a few jobs on every system. The function use checks that each
// job was run once and is stored as done.
func TestSystems(t *testing.T) {
	for _, s := range systems() {
		t.Run(s.name, func(t *testing.T) {
			if s.skip != "" {
				t.Skip(s.skip)
			}
			submitters := 4
			if s.single {
				submitters = 1
			}
			for _, sync := range []string{"FULL", "NORMAL"} {
				_, settings, err := throughput(s, t.TempDir(), load{sync, submitters}, batches(20, s.batch))
				if err != nil {
					t.Fatal(err)
				}
				if want := wantSetting(s, sync); !strings.Contains(settings, want) {
					t.Errorf("synchronous=%s: settings are %q, want %q among them", sync, settings, want)
				}
			}
			if s.batch > 1 {
				return
			}
			all, err := latencies(s, t.TempDir(), 2)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range all {
				if l.returned <= 0 || l.started <= 0 || l.final < l.started {
					t.Errorf("impossible latency %+v", l)
				}
			}
		})
	}
}

func wantSetting(s system, sync string) string {
	if strings.HasPrefix(s.name, "asynq") {
		return map[string]string{"FULL": "appendfsync always", "NORMAL": "appendfsync everysec"}[sync]
	}
	return "journal_mode wal, synchronous " + sync
}

// A falseSystem reports final states as stored that are not.
type falseSystem struct{ session }

func (falseSystem) submit(int) (string, error) { return "", nil }
func (falseSystem) drain(int) error            { return nil }

func TestLiarIsFound(t *testing.T) {
	s := byHand
	s.open = func(e env) (session, error) {
		ses, err := openByHand(e)
		return falseSystem{ses}, err
	}
	_, _, err := throughput(s, t.TempDir(), load{"FULL", 2}, 20)
	if err == nil || !strings.Contains(err.Error(), "of 20 jobs, 0 were run and 0 final states are stored") {
		t.Errorf("got %v", err)
	}
}

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		all  []int
		q    float64
		want int
	}{
		{[]int{7}, 0.5, 7},
		{[]int{7}, 0.99, 7},
		{[]int{3, 1, 2}, 0.5, 2},
		{[]int{4, 3, 2, 1}, 0.5, 2},
		{[]int{5, 4, 3, 2, 1}, 0.99, 5},
		{[]int{5, 4, 3, 2, 1}, 0, 1},
	} {
		if got := quantile(test.all, test.q); got != test.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", test.all, test.q, got, test.want)
		}
	}
}

func TestFormats(t *testing.T) {
	for f, want := range map[float64]string{0.4: "0", 7: "7", 999.6: "1,000", 1234: "1,230", 56789: "56,800", 1234567: "1,230,000"} {
		if got := number(f); got != want {
			t.Errorf("number(%v) = %s, want %s", f, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-3 * time.Microsecond: "-3 µs", 42 * time.Microsecond: "42 µs", 1234 * time.Microsecond: "1.23 ms", 247e6: "247 ms"} {
		if got := duration(d); got != want {
			t.Errorf("duration(%v) = %s, want %s", d, got, want)
		}
	}
}

// TestPlot checks that the plot is well-formed and shows every system.
func TestPlot(t *testing.T) {
	b := &bench{loads: append(tableLoads, plotLoads...)}
	for i, s := range systems() {
		r := &result{system: s, rates: make(map[load][]float64)}
		for _, l := range b.loads {
			if r.measures(l) {
				r.rates[l] = []float64{float64(1000 * (i + 1) * l.submitters)}
			}
		}
		b.results = append(b.results, r)
	}
	svg := b.plot()
	for _, s := range systems() {
		if !strings.Contains(svg, ">"+s.name+": ") {
			t.Errorf("%s is missing", s.name)
		}
	}
	d := xml.NewDecoder(strings.NewReader(svg))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
