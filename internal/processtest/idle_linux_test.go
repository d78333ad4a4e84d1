package processtest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// TestIdle: two idle managers on one database do nothing, even after they have run,
// waited and watched. TASK_IDLE sets for how long, a second or more by default.
func TestIdle(t *testing.T) {
	testos.Parallel(t)
	length := time.Duration(testos.Size(1000, 3000)) * time.Millisecond
	if d, err := time.ParseDuration(os.Getenv("TASK_IDLE")); err == nil {
		length = d
	}
	path := testkit.Path(t)
	procs := []*testkit.Process{start(t, path), start(t, path)}
	pids := testkit.CallAll[int](t, procs, "Pid", "")
	works := testkit.CallAll[[]task.Operation](t, procs, "Submit", work)
	for i, p := range procs { // each ends the other's operations
		p.Call("CancelAll", works[1-i][:len(ends)], new(string))
	}
	time.Sleep(2 * time.Second) // until the runtime has finished its own work
	before := []usage{usageOf(t, pids[0]), usageOf(t, pids[1])}
	time.Sleep(length)
	for i, pid := range pids {
		used := usageOf(t, pid)
		t.Logf("in %v: CPU time %d ticks, system calls that read or write %d, switches %d", length,
			used.ticks-before[i].ticks, used.calls-before[i].calls, used.switches-before[i].switches)
		// The runtime itself wakes up once a minute.
		if used.ticks != before[i].ticks || used.calls > before[i].calls+2 || used.switches > before[i].switches+5 {
			t.Errorf("an idle process has gone from %+v to %+v", before[i], used)
		}
	}
}

// CancelAll cancels operations of any process, and waits until they have finished.
func (p *manager) CancelAll(ops []task.Operation, _ *string) error {
	for _, op := range ops {
		if err := p.m.Cancel(op.ID); err != nil {
			return err
		}
		if _, err := p.m.Wait(context.Background(), op.ID); err != nil {
			return err
		}
	}
	return nil
}

// A usage is what a process has used so far.
type usage struct {
	ticks    int // of CPU time, 100 a second
	calls    int // system calls such as read and write
	switches int // voluntary context switches of its threads: one for each call that waits
}

func usageOf(t *testing.T, pid int) (u usage) {
	read := func(path string) string {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Skip(err)
		}
		return string(raw)
	}
	_, stat, _ := strings.Cut(read(fmt.Sprintf("/proc/%d/stat", pid)), ") ")
	fields := strings.Fields(stat)
	var user, system int
	fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	u.ticks = user + system
	for line := range strings.Lines(read(fmt.Sprintf("/proc/%d/io", pid))) {
		var n int
		if key, value, _ := strings.Cut(line, ": "); key == "syscr" || key == "syscw" {
			fmt.Sscan(value, &n)
			u.calls += n
		}
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, thread := range threads {
		for line := range strings.Lines(read(thread)) {
			var n int
			if key, value, _ := strings.Cut(line, ":"); key == "voluntary_ctxt_switches" {
				fmt.Sscan(value, &n)
				u.switches += n
			}
		}
	}
	return u
}
