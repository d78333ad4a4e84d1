package processtest

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// Pid returns the ID of the process.
func (p *manager) Pid(_ string, pid *int) error {
	*pid = os.Getpid()
	return nil
}

// Insist submits operations that ignore their cancellation, and PENDING ones behind
// them. It returns the IDs of a running and of a waiting one.
func (p *manager) Insist(_ string, ids *[2]string) error {
	for i := range ids {
		op, err := p.m.Submit("insists", func(context.Context, func(int)) (any, error) { select {} }, task.WithLock("pool"))
		if err != nil {
			return err
		}
		ids[i] = op.ID
	}
	return nil
}

// TestCancel cancels an operation of another process.
func TestCancel(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	m, _ := testkit.NewLogged(t, testkit.OpenSQLite(t, path))
	slow := 0
	for range 5 {
		var ops []task.Operation
		p.Call("Submit", work[:1], &ops)
		begin := time.Now()
		testkit.Must(t, m.CancelCause(ops[0].ID, "by an administrator"))
		got := testkit.Wait(t, m, ops[0].ID)
		// Its function has returned at once.
		if got.UpdatedAt.Sub(begin) > 200*time.Millisecond {
			slow++
		}
		if got.State != task.StateCancelled {
			t.Errorf("%+v", got)
		}
		if got.Error != "by an administrator" || got.Cancelling {
			t.Errorf("%+v", got)
		}
		if err := m.Cancel(ops[0].ID); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Cancel of a finished one: %v", err)
		}
	}
	if slow > 2 { // a busy machine may delay a few
		t.Errorf("%d of 5 took more than 200 ms", slow)
	}
	var ids [2]string
	p.Call("Insist", "", &ids)
	testkit.Must(t, m.Cancel(ids[1]))
	if got := testkit.Wait(t, m, ids[1]); got.State != task.StateCancelled || !got.StartedAt.IsZero() {
		t.Errorf("PENDING has become %+v", got)
	}
	p.Kill()
}

// TestCancelUnheard: if a process dies before it has read the cancel request, or before
// its function has reacted, the operation becomes FAILED.
func TestCancelUnheard(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	deaf, p := testkit.StartProcess(t, "manager"), start(t, path)
	m, _ := testkit.NewLogged(t, testkit.OpenSQLite(t, path))
	var ids [2]string
	p.Call("Insist", "", &ids)
	var left string
	deaf.Call("Leave", [2]string{path, string(task.StateRunning)}, &left)
	for id, p := range map[string]*testkit.Process{ids[0]: p, left: deaf} {
		testkit.Must(t, m.Cancel(id))
		if got, ok := m.Get(id); !ok || !got.Cancelling || got.State.Finished() {
			t.Errorf("after Cancel: %+v", got)
		}
		waited := make(chan *task.Operation)
		go func() {
			got, err := m.Wait(context.Background(), id)
			if err != nil {
				t.Error(err)
				got = new(task.Operation)
			}
			waited <- got
		}()
		time.Sleep(300 * time.Millisecond) // until it waits
		p.Kill()
		if got := <-waited; got.State != task.StateFailed || got.Error != testkit.RestartText || got.Cancelling {
			t.Errorf("%+v", got)
		}
	}
}

// TestWatchAll watches the operations of other processes, until one dies.
func TestWatchAll(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p, other := start(t, path), start(t, path)
	m, _ := testkit.NewLogged(t, testkit.OpenSQLite(t, path))
	var before, after []task.Operation
	p.Call("Submit", work, &before)
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	present, changes, err := m.Raw().Subscribe(ctx)
	testkit.Must(t, err)
	if len(present) != len(ends) {
		t.Errorf("present: %v", present)
	}
	other.Call("Submit", work, &after)
	p.Kill()
	told := make(map[string][]task.State)
	for op, err := range changes {
		testkit.Must(t, err)
		if told[op.ID] = append(told[op.ID], op.State); op.State.Finished() && len(told) == len(ends)+len(work) {
			time.AfterFunc(500*time.Millisecond, stop) // nothing may be yielded twice
		}
	}
	check := func(id string, want task.State) {
		n := 0
		for _, state := range told[id] {
			if state.Finished() {
				n++
			}
		}
		if states := told[id]; len(states) == 0 || states[len(states)-1] != want || want.Finished() && n != 1 {
			t.Errorf("told %q, want %s", states, want)
		}
	}
	for _, op := range before[:len(ends)] {
		check(op.ID, task.StateFailed)
	}
	for i, op := range after {
		want := task.StateRunning
		if i >= len(ends) {
			want = op.State
		}
		check(op.ID, want)
	}
}
