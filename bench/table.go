package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

// print prints the table and how it was measured.
func (b *bench) print(w io.Writer) {
	fmt.Fprintf(w, "Jobs that do nothing, from submission to a stored final state, on %s/%s, %d CPUs, %s.\n\n",
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version())
	b.printTable(w)
	fmt.Fprintf(w, `
Jobs/s: the median (minimum–maximum) of %d rounds, from the first call to the stored final state
of the last job, with 1 and with 64 goroutines that submit one job (or batch) per call, at
synchronous=FULL and NORMAL. Bare SQLite is one loop: a job is a row that is inserted and later
updated, so that n a commit means n jobs in two commits. After every round the stored final states
were counted and found complete.

Latency: p50 / p99 of %d jobs a round, one at a time after pauses of %v, at FULL, from the call
until it returned, until the function started, and until a user could know that the final state
is stored.
`, b.rounds, b.latencies, pause)
	b.printRatios(w)
	fmt.Fprint(w, "\nTuning, and the settings as read back from each system's own connections after every round:\n\n")
	for _, r := range b.results {
		r.printSettings(w)
	}
	fmt.Fprintf(w, "\nVersions: %s.\n", strings.Join(versions(), ", "))
}

func (b *bench) printTable(w io.Writer) {
	fmt.Fprint(w, "| system ")
	for _, l := range tableLoads {
		fmt.Fprintf(w, "| jobs/s, %s, %d ", l.sync, l.submitters)
	}
	fmt.Fprint(w, "| call returned | function started | final state stored |\n|")
	fmt.Fprint(w, " --- |", strings.Repeat(" ---: |", len(tableLoads)+3), "\n")
	for _, r := range b.results {
		if r.skip != "" {
			fmt.Fprintf(w, "| %s | skipped: %s |%s\n", r.name, r.skip, strings.Repeat(" |", len(tableLoads)+2))
			continue
		}
		fmt.Fprintf(w, "| %s |", r.name)
		for _, l := range tableLoads {
			fmt.Fprintf(w, " %s |", rate(r.rates[l]))
		}
		for _, f := range latencyColumns {
			fmt.Fprintf(w, " %s |", r.percentiles(f))
		}
		fmt.Fprintln(w)
	}
}

var latencyColumns = []func(latency) time.Duration{
	func(l latency) time.Duration { return l.returned },
	func(l latency) time.Duration { return l.started },
	func(l latency) time.Duration { return l.final },
}

// percentiles formats the p50 and p99 of a column.
func (r *result) percentiles(column func(latency) time.Duration) string {
	if len(r.latencies) == 0 {
		return "–"
	}
	var all []time.Duration
	for _, l := range r.latencies {
		all = append(all, column(l))
	}
	return duration(quantile(all, 0.5)) + " / " + duration(quantile(all, 0.99))
}

// printRatios prints the throughput of this library at FULL as a multiple of each
// other system's, and how soon it starts a job.
func (b *bench) printRatios(w io.Writer) {
	i := slices.IndexFunc(b.results, func(r *result) bool { return r.name == taskSystem.name })
	if i < 0 {
		return
	}
	task := b.results[i]
	fmt.Fprintln(w)
	for _, l := range []load{{"FULL", 1}, {"FULL", 64}} {
		var ratios []string
		for _, r := range b.results {
			other := l
			if r.single {
				other.submitters = 1
			}
			if r != task && len(r.rates[other]) > 0 {
				ratios = append(ratios, fmt.Sprintf("%.3g %s", median(task.rates[l])/median(r.rates[other]), r.name))
			}
		}
		fmt.Fprintf(w, "Throughput of task at FULL, submitters %d, as a multiple of: %s.\n", l.submitters, strings.Join(ratios, "; "))
	}
	fmt.Fprintf(w, "Time from the return of Submit to the start of the function: %s.\n",
		task.percentiles(func(l latency) time.Duration { return l.started - l.returned }))
}

func (r *result) printSettings(w io.Writer) {
	if r.skip != "" {
		fmt.Fprintf(w, "- %s: skipped, %s.\n", r.name, r.skip)
		return
	}
	var jobs []string
	for _, l := range tableLoads {
		if n, ok := r.jobs[l]; ok {
			jobs = append(jobs, strconv.Itoa(n))
		}
	}
	fmt.Fprintf(w, "- %s. FULL: %s. NORMAL: %s. Tuning: %s. Jobs in a round: %s.\n",
		r.name, r.settings["FULL"], r.settings["NORMAL"], r.tuning, strings.Join(jobs, ", "))
}

// versions returns the modules of the peers and the drivers.
func versions() []string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return []string{"unknown"}
	}
	named := []string{"river", "riversqlite", "goqite", "backlite", "dbos-transact-golang", "asynq", "go-sqlite3", "sqlite"}
	var all []string
	for _, m := range info.Deps {
		if slices.Contains(named, m.Path[strings.LastIndexByte(m.Path, '/')+1:]) {
			all = append(all, m.Path+" "+m.Version)
		}
	}
	return all
}

// rate formats jobs/s: the median, and the extremes.
func rate(rates []float64) string {
	if len(rates) == 0 {
		return "–"
	}
	return fmt.Sprintf("%s (%s–%s)", number(median(rates)), number(slices.Min(rates)), number(slices.Max(rates)))
}

func median[T cmp.Ordered](all []T) T { return quantile(all, 0.5) }

// quantile returns the smallest value that a fraction q of all does not exceed.
func quantile[T cmp.Ordered](all []T, q float64) T {
	all = slices.Sorted(slices.Values(all))
	return all[max(0, int(math.Ceil(q*float64(len(all))))-1)]
}

// number formats f with three significant digits and commas.
func number(f float64) string {
	unit := math.Pow(10, math.Max(0, math.Floor(math.Log10(f))-2))
	s := strconv.FormatFloat(math.Round(f/unit)*unit, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// duration formats d with three significant digits at most.
func duration(d time.Duration) string {
	us := float64(d) / float64(time.Microsecond)
	if math.Abs(us) < 1000 {
		return fmt.Sprintf("%.0f µs", us)
	}
	return fmt.Sprintf("%.3g ms", us/1000)
}
