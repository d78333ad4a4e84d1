// Command bench measures the throughput and the latency of this library and of
// other systems, with jobs that do nothing, from submission to a stored final state.
//
//	go run . [-rounds N] [-time D] [-only REGEXP] [-dir DIR] [-plot FILE.svg] [-quick]
//
// All systems run in one process, one at a time, on the same file system. In each
// round every system is measured once, in rotating order and on a new database. The
// printed table is Markdown.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"slices"
	"time"
)

func main() {
	log.SetFlags(0)
	var (
		rounds = flag.Int("rounds", 5, "measure every system `N` times")
		length = flag.Duration("time", 2*time.Second, "how long a system's round of throughput should take; less than a second is unfair to systems that work in intervals")
		only   = flag.String("only", "", "measure only the systems whose name matches this `regexp`")
		dir    = flag.String("dir", "", "create the databases in this `directory` (default: a new temporary one)")
		plot   = flag.String("plot", "", "also plot jobs/s against 1, 2, 4 ... 256 submitters to this SVG `file`")
		quick  = flag.Bool("quick", false, "one short round, as a test: its figures mean nothing")
	)
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	pattern, err := regexp.Compile(*only)
	if err != nil {
		log.Fatal(err)
	}
	b := &bench{rounds: *rounds, length: *length, latencies: 40, dir: *dir, loads: tableLoads}
	if *quick {
		b.rounds, b.length, b.latencies = 1, 0, 2
	}
	if *plot != "" {
		b.loads = append(slices.Clone(tableLoads), plotLoads...)
	}
	for _, s := range systems() {
		if pattern.MatchString(s.name) {
			b.systems = append(b.systems, s)
		}
	}
	if len(b.systems) == 0 {
		log.Fatalf("no system's name matches %q", *only)
	}
	if err := b.main(*plot); err != nil {
		log.Fatal(err)
	}
}

// systems returns all systems in the order of the table.
func systems() []system {
	return []system{
		taskSystem,
		byHand,
		riverSystem(1), riverSystem(1000), riverTxSystem,
		backliteSystem(1), backliteSystem(1000),
		goqiteSystem,
		dbosSystem,
		asynqSystem(1), asynqSystem(32),
		bare(1), bare(64), bare(1000),
	}
}

var tableLoads = []load{{"FULL", 1}, {"FULL", 64}, {"NORMAL", 1}, {"NORMAL", 64}}

// plotLoads are the loads of the plot that are not in the table.
var plotLoads = []load{{"FULL", 2}, {"FULL", 4}, {"FULL", 8}, {"FULL", 16}, {"FULL", 32}, {"FULL", 128}, {"FULL", 256}}

// A bench is a set of measurements and their results.
type bench struct {
	rounds    int
	length    time.Duration // of a round of throughput
	latencies int           // jobs in a round of latency
	dir       string
	systems   []system
	loads     []load

	results []*result // one per system
}

// A result is what was measured of one system.
type result struct {
	system
	jobs      map[load]int       // in a round
	rates     map[load][]float64 // jobs/s in each round
	settings  map[string]string  // by sync
	latencies []latency
}

func (b *bench) main(plotFile string) error {
	if b.dir == "" {
		dir, err := os.MkdirTemp("", "bench")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		b.dir = dir
	}
	if err := b.run(); err != nil {
		return err
	}
	b.print(os.Stdout)
	if plotFile == "" {
		return nil
	}
	return os.WriteFile(plotFile, []byte(b.plot()), 0o666)
}

// run measures everything.
func (b *bench) run() error {
	for _, s := range b.systems {
		b.results = append(b.results, &result{
			system:   s,
			jobs:     make(map[load]int),
			rates:    make(map[load][]float64),
			settings: make(map[string]string),
		})
	}
	for _, l := range b.loads {
		log.Printf("finding how many jobs to submit: synchronous=%s, submitters %d", l.sync, l.submitters)
		err := b.each(0, func(r *result) (err error) {
			if r.measures(l) {
				r.jobs[l], err = jobsPerRound(r.system, b.dir, l, b.length)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	for round := range b.rounds {
		for _, l := range b.loads {
			log.Printf("round %d of %d: synchronous=%s, submitters %d", round+1, b.rounds, l.sync, l.submitters)
			if err := b.each(round, func(r *result) error { return r.addRate(b.dir, l) }); err != nil {
				return err
			}
		}
		log.Printf("round %d of %d: latency", round+1, b.rounds)
		if err := b.each(round, func(r *result) error { return r.addLatencies(b.dir, b.latencies) }); err != nil {
			return err
		}
	}
	return nil
}

// each calls f for the result of every system. Each round starts with another
// system.
func (b *bench) each(round int, f func(*result) error) error {
	for i := range b.results {
		r := b.results[(i+round)%len(b.results)]
		if r.skip != "" {
			continue
		}
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

// measures reports whether the system is measured under that load.
func (r *result) measures(l load) bool { return l.submitters == 1 || !r.single }

func (r *result) addRate(dir string, l load) error {
	if !r.measures(l) {
		return nil
	}
	n := r.jobs[l]
	elapsed, settings, err := throughput(r.system, dir, l, n)
	if err != nil {
		return err
	}
	r.rates[l] = append(r.rates[l], float64(n)/elapsed.Seconds())
	if before := r.settings[l.sync]; before != "" && before != settings {
		return fmt.Errorf("%s: the settings have changed from %s to %s", r.name, before, settings)
	}
	r.settings[l.sync] = settings
	return nil
}

func (r *result) addLatencies(dir string, n int) error {
	if r.batch > 1 {
		return nil
	}
	all, err := latencies(r.system, dir, n)
	r.latencies = append(r.latencies, all...)
	return err
}
