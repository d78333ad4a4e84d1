package processtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// journal returns a Func that adds a line to a file, in one write.
func journal(path, line string) task.Func {
	return func(context.Context, func(int)) (any, error) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		_, err = f.WriteString(line + "\n")
		return nil, errors.Join(err, f.Close())
	}
}

// runs returns how often each line occurs in a journal.
func runs(t *testing.T, path string) map[string]int {
	t.Helper()
	raw, err := os.ReadFile(path)
	if !errors.Is(err, os.ErrNotExist) {
		testkit.Must(t, err)
	}
	n := make(map[string]int)
	for line := range strings.Lines(string(raw)) {
		n[strings.TrimSpace(line)]++
	}
	return n
}

// A submission is a Submit with an ID whose function adds the ID to a journal.
type submission = struct{ ID, Journal string }

// SubmitID submits, and returns after the operation has finished. It reports whether
// this process has run it.
func (p *manager) SubmitID(s submission, won *bool) error {
	op, err := p.m.Submit("by ID", journal(s.Journal, s.ID), task.WithID(s.ID))
	if *won = err == nil; err != nil && !errors.Is(err, task.ErrExists) {
		return err
	}
	if op == nil || op.ID != s.ID {
		return fmt.Errorf("Submit has returned %+v, %w", op, err)
	}
	op, err = p.m.Wait(context.Background(), s.ID)
	if err == nil && op.State != task.StateDone {
		err = fmt.Errorf("%s: %s", op.State, op.Error)
	}
	return err
}

// TestSameID: two processes submit the same ID at the same time. One of them runs it,
// and both see its final state.
func TestSameID(t *testing.T) {
	testos.Parallel(t)
	path := testkit.FastPath(t)
	procs := []*testkit.Process{start(t, path), start(t, path)}
	rounds := testos.Size(150, 1000)
	wins := make([]int, len(procs))
	log := path + ".journal"
	for i := range rounds {
		s := submission{fmt.Sprint("id-", i), log}
		n := 0
		for j, won := range testkit.CallAll[bool](t, procs, "SubmitID", s) {
			if won {
				wins[j]++
				n++
			}
		}
		if n != 1 {
			t.Fatalf("round %d: %d processes have submitted it", i, n)
		}
	}
	ran := runs(t, log)
	for id, n := range ran {
		if n != 1 {
			t.Errorf("%s ran %d times", id, n)
		}
	}
	if len(ran) != rounds {
		t.Errorf("%d of %d have run", len(ran), rounds)
	}
	if wins[0] == 0 || wins[1] == 0 {
		t.Errorf("there was no contest: %v", wins)
	}
	t.Logf("wins: %v", wins)
}

// SubmitMany submits IDs one after the other in the background, without an end.
func (p *manager) SubmitMany(s submission, _ *int) error {
	go func() {
		for i := 0; ; i++ {
			id := fmt.Sprintf("%s-%d", s.ID, i)
			_, err := p.m.Submit("by ID", journal(s.Journal, id), task.WithID(id))
			if err != nil && !errors.Is(err, task.ErrExists) {
				panic(err)
			}
		}
	}()
	return nil
}

// TestKilledBetweenCommitAndAnswer kills processes that submit as fast as they can.
// However far a Submit has come, the next process does not run a stored operation
// again, and runs those that were not stored.
func TestKilledBetweenCommitAndAnswer(t *testing.T) {
	testos.Parallel(t)
	path := testkit.FastPath(t)
	log := path + ".journal"
	for range testos.Size(8, 20) {
		p := start(t, path)
		before := len(runs(t, log))
		p.Call("SubmitMany", submission{"id", log}, new(int))
		testkit.Must(t, testkit.Until(func() bool { return len(runs(t, log)) > before+20 }))
		p.Kill()
	}
	p := start(t, path) // recovers the operations of the last one
	p.Call("Close", "", new(string))
	p.End()
	ran := runs(t, log)
	interrupted := 0
	for id, op := range testkit.Stored(t, testkit.OpenSQLite(t, path)) {
		n := ran[id]
		switch {
		case op.Interrupted():
			interrupted++
		case op.State != task.StateDone || n != 1:
			t.Errorf("%s is %s after %d runs", id, op.State, n)
		}
		if n > 1 {
			t.Errorf("%s ran %d times", id, n)
		}
		delete(ran, id)
	}
	if len(ran) > 0 {
		t.Errorf("run, but not stored: %v", ran)
	}
	t.Logf("%d interrupted", interrupted)
}
