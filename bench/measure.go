package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// use opens a system on a new database below dir and calls f, which submits n
// jobs and waits for them. It checks that each was run once and is stored as
// done, and returns the settings.
func use(s system, dir, sync string, f func(session, *tally) (n int, err error)) (settings string, err error) {
	dir, err = os.MkdirTemp(dir, "round")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	runtime.GC() // of the previous system's garbage
	e := env{dir: dir, sync: sync, jobs: new(tally)}
	ses, err := s.open(e)
	if err != nil {
		return "", fmt.Errorf("%s: open: %w", s.name, err)
	}
	n, err := f(ses, e.jobs)
	if err == nil {
		settings, err = ses.settings()
	}
	if err == nil {
		err = check(ses, e.jobs, n)
	}
	if err := errors.Join(err, ses.close()); err != nil {
		return "", fmt.Errorf("%s, synchronous=%s: %w", s.name, sync, err)
	}
	return settings, nil
}

func check(ses session, jobs *tally, n int) error {
	finals, err := ses.finals()
	if err != nil {
		return err
	}
	if ran := jobs.started.Load(); finals != n || ran != int64(n) {
		return fmt.Errorf("of %d jobs, %d were run and %d final states are stored", n, ran, finals)
	}
	return nil
}

// A load is the conditions of a throughput measurement.
type load struct {
	sync       string
	submitters int
}

// throughput submits n jobs and waits until all final states are stored. Each
// submitter takes the next job, or batch of jobs, until all are submitted.
func throughput(s system, dir string, l load, n int) (elapsed time.Duration, settings string, err error) {
	settings, err = use(s, dir, l.sync, func(ses session, _ *tally) (int, error) {
		var (
			submitters sync.WaitGroup
			taken      atomic.Int64
			errs       = make([]error, l.submitters)
		)
		start := time.Now()
		for i := range l.submitters {
			submitters.Go(func() {
				for errs[i] == nil && taken.Add(int64(s.batch)) <= int64(n) {
					_, errs[i] = ses.submit(s.batch)
				}
			})
		}
		submitters.Wait()
		err := errors.Join(errs...)
		if err == nil {
			err = ses.drain(n)
		}
		elapsed = time.Since(start)
		return n, err
	})
	return elapsed, settings, err
}

const (
	maxJobs = 1 << 18 // in a round
	minJobs = 32
)

// jobsPerRound finds how many jobs take about as long as d.
func jobsPerRound(s system, dir string, l load, d time.Duration) (int, error) {
	for n := batches(minJobs, s.batch); ; {
		elapsed, _, err := throughput(s, dir, l, n)
		if err != nil {
			return 0, err
		}
		fit := batches(int(float64(n)*d.Seconds()/elapsed.Seconds()), s.batch)
		if elapsed > d/2 || fit >= maxJobs {
			return min(fit, maxJobs/s.batch*s.batch), nil
		}
		n = min(fit, 8*n)
	}
}

// batches rounds n up to whole batches and to at least minJobs.
func batches(n, batch int) int { return (max(n, minJobs) + batch - 1) / batch * batch }

// A latency holds the times of one job, measured from the call of submit.
type latency struct {
	returned, started, final time.Duration
}

// pause is the time between the end of a job and the next one.
const pause = 20 * time.Millisecond

// latencies submits n jobs one at a time, after one that is not counted: it opens
// connections and prepares statements.
func latencies(s system, dir string, n int) (all []latency, err error) {
	_, err = use(s, dir, "FULL", func(ses session, jobs *tally) (int, error) {
		for range n + 1 {
			time.Sleep(pause)
			submitted := time.Since(epoch)
			id, err := ses.submit(1)
			if err != nil {
				return 0, err
			}
			returned := time.Since(epoch)
			if err := ses.wait(id); err != nil {
				return 0, err
			}
			final := time.Since(epoch)
			started := time.Duration(jobs.last.Load())
			all = append(all, latency{returned - submitted, started - submitted, final - submitted})
		}
		return n + 1, nil
	})
	if err != nil {
		return nil, err
	}
	return all[1:], nil
}
