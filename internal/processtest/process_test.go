package processtest

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// work lists the operations of a test's processes: three that keep running, and one for
// each final state.
var work = []task.Operation{
	{Name: "scrub", Progress: 40, Metadata: "tank"},
	{Name: "send", Progress: 99, Metadata: "tank@monday"},
	{Name: "idle"},
	{Name: "done", Progress: 5, State: task.StateDone, Result: "all is well"},
	{Name: "failed", Progress: 5, State: task.StateFailed, Error: "no such pool", Result: "half"},
	{Name: "cancelled", Progress: 5, Metadata: "by hand", State: task.StateCancelled},
}

// ends lists how the three running operations are to end.
var ends = []task.Operation{
	{State: task.StateDone, Progress: 100, Result: "sent"},
	{State: task.StateFailed, Progress: 99, Error: "disk full"},
	{State: task.StateCancelled, Error: task.ErrCancelled.Error()},
}

// wantSame compares two operations, apart from their times.
func wantSame(t *testing.T, got *task.Operation, want task.Operation) {
	t.Helper()
	if got.ID != want.ID || got.State != want.State || got.Progress != want.Progress || got.Result != want.Result || got.Error != want.Error {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func wantOwnerFiles(t *testing.T, path string, want int) {
	t.Helper()
	if got := testkit.OwnerFiles(t, path); got != want {
		t.Errorf("%d owner files, want %d", got, want)
	}
}

// TestKilled kills one of three processes. Only its operations fail; those of
// the others finish.
func TestKilled(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	procs := []*testkit.Process{start(t, path), start(t, path), start(t, path)}
	works := testkit.CallAll[[]task.Operation](t, procs, "Submit", work)
	const victim = 1
	var dead []string
	for _, op := range works[victim][:len(ends)] {
		dead = append(dead, op.ID)
	}
	store := testkit.OpenSQLite(t, path)
	before := testkit.Stored(t, store)
	if len(before) != len(procs)*len(work) {
		t.Fatalf("%d operations are stored", len(before))
	}
	procs[victim].Kill()
	before.WantFailed(t, testkit.Stored(t, store)) // nothing changes before the next New
	m, l := testkit.NewLogged(t, store)

	t.Run("only its operations fail", func(t *testing.T) {
		before.WantFailed(t, testkit.Stored(t, store), dead...)
		l.WantRecovered(t, dead...)
		wantOwnerFiles(t, path, 3) // of two processes and this one
	})
	t.Run("others finish", func(t *testing.T) {
		for i, p := range procs {
			if i == victim {
				continue
			}
			for j, want := range ends {
				var told task.Operation
				want.ID = works[i][j].ID
				p.Call("End", want, &told)
				got, err := m.Wait(t.Context(), want.ID)
				testkit.Must(t, err)
				wantSame(t, got, want)
				if told.State != got.State || !told.UpdatedAt.Equal(got.UpdatedAt) {
					t.Errorf("its own process got %+v\nthis one %+v", told, got)
				}
			}
			p.Call("Close", "", new(string))
			p.End()
		}
		l.WantRecovered(t, dead...)
		testkit.Must(t, m.Close())
		testkit.Must(t, store.Close())
		wantOwnerFiles(t, path, 0)
	})
}

func TestOwnerFilesDoNotPileUp(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	const kills = 20
	var dead []string
	for i := range kills { // every other process leaves only its file
		state := []task.State{task.StatePending, task.StateDone}[i%2]
		var id string
		p := testkit.StartProcess(t, "manager")
		p.Call("Leave", [2]string{path, string(state)}, &id)
		p.Kill()
		if !state.Finished() {
			dead = append(dead, id)
		}
	}
	wantOwnerFiles(t, path, kills)
	_, l := testkit.NewLogged(t, testkit.OpenSQLite(t, path))
	l.WantRecovered(t, dead...)
	wantOwnerFiles(t, path, 1)
}

// TestStartedAtOnce makes several processes recover at the same time.
func TestStartedAtOnce(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	store := testkit.OpenSQLite(t, path)
	testkit.Fill(t, path, 2500, uuid.NewString(), "-1 hour") // recovered in several steps
	for range 20 {
		testkit.Fill(t, path, 10, uuid.NewString(), "-1 hour")
	}
	testkit.Fill(t, path, 100, "garbage", "-1 hour")
	before := testkit.Stored(t, store)
	procs := make([]*testkit.Process, 4)
	for i := range procs {
		procs[i] = testkit.StartProcess(t, "manager")
	}
	recovered, n := make(map[string]bool), 0
	for i, found := range testkit.CallAll[opened](t, procs, "Open", path) {
		n += found.N
		for _, id := range found.Recovered {
			if recovered[id] {
				t.Errorf("%s was recovered twice", id)
			}
			recovered[id] = true
		}
		if found.Unfinished > 0 {
			t.Errorf("process %d: New has returned with %d operations unfinished", i, found.Unfinished)
		}
	}
	if n != len(before) {
		t.Errorf("recovered %d operations, want %d", n, len(before))
	}
	before.WantFailed(t, testkit.Stored(t, store), slices.Collect(maps.Keys(before))...)
}

// TestNewFile makes several processes create the database at the same time.
func TestNewFile(t *testing.T) {
	testos.Parallel(t)
	for round := range 3 {
		path := testkit.Path(t)
		procs := make([]*testkit.Process, 5)
		for i := range procs {
			procs[i] = testkit.StartProcess(t, "manager")
		}
		for _, found := range testkit.CallAll[opened](t, procs, "Open", path) {
			if found.N > 0 {
				t.Errorf("round %d: recovered %q", round, found.Recovered)
			}
		}
		testkit.CallAll[[]task.Operation](t, procs, "Submit", work[len(ends):])
		testkit.CallAll[string](t, procs, "Close", "")
		for _, p := range procs {
			p.End()
		}
		wantOwnerFiles(t, path, 0)
		rows := testkit.Stored(t, testkit.OpenSQLite(t, path))
		if got, want := len(rows), len(procs)*len(ends); got != want {
			t.Errorf("%d operations are stored, want %d", got, want)
		}
		for _, op := range rows {
			if !strings.EqualFold(op.Name, string(op.State)) {
				t.Errorf("round %d: %+v, want the state that its name says", round, op)
			}
		}
	}
}

// TestWait waits in this process for an operation of another one, to which various
// things happen meanwhile.
func TestWait(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	end := func(want task.Operation) func(*testkit.Process, task.Operation) {
		return func(p *testkit.Process, op task.Operation) {
			want.ID = op.ID
			p.Call("End", want, new(task.Operation))
		}
	}
	for _, tt := range []struct {
		name      string
		meanwhile func(*testkit.Process, task.Operation)
		want      task.Operation
		err       error
	}{
		{"done", end(ends[0]), ends[0], nil},
		{"failed", end(ends[1]), task.Operation{State: task.StateFailed, Progress: 40, Error: "disk full"}, nil},
		{"cancelled", end(ends[2]), task.Operation{State: task.StateCancelled, Progress: 40, Error: "operation cancelled"}, nil},
		{"killed", func(p *testkit.Process, _ task.Operation) { p.Kill() },
			task.Operation{State: task.StateFailed, Progress: 40, Error: testkit.RestartText}, nil},
		{"deleted", func(_ *testkit.Process, op task.Operation) {
			testkit.Exec(t, path, `DELETE FROM tasks WHERE id = ?`, op.ID)
		}, task.Operation{}, task.ErrNotFound},
		{"context done", nil, task.Operation{State: task.StateRunning, Progress: 70}, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			waitWhile(t, path, tt.meanwhile, tt.want, tt.err)
		})
	}
}

// waitWhile waits for an operation of another process and calls meanwhile. If meanwhile
// is nil, the context is done instead.
func waitWhile(t *testing.T, path string, meanwhile func(*testkit.Process, task.Operation), want task.Operation, wantErr error) {
	t.Helper()
	p := start(t, path)
	var ops []task.Operation
	p.Call("Submit", work[:1], &ops)
	op := ops[0]
	db, looked := testkit.NewFake(testkit.OpenSQLite(t, path)), make(chan struct{}, 1)
	db.After(func(c *testkit.Call) {
		if c.Method == "Get" && c.N == 0 {
			looked <- struct{}{}
		}
	})
	m, l := testkit.NewLogged(t, db)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan struct{})
	var got *task.Operation
	var err error
	go func() {
		defer close(done)
		got, err = m.Wait(ctx, op.ID)
	}()
	<-looked // Wait has seen it running
	if meanwhile != nil {
		meanwhile(p, op)
	} else {
		op.Progress = 70
		p.Call("Report", op, new(task.Operation))
		cancel()
	}
	<-done
	if !errors.Is(err, wantErr) {
		t.Fatalf("Wait: error %v, want %v", err, wantErr)
	}
	if errors.Is(wantErr, task.ErrNotFound) {
		if got != nil {
			t.Errorf("Wait returned %+v", got)
		}
		return
	}
	want.ID = op.ID
	wantSame(t, got, want)
	if got.Error == testkit.RestartText {
		l.WantRecovered(t, op.ID)
	} else {
		l.WantRecovered(t)
	}
}

// TestOthers checks what a manager reports about operations of another process.
func TestOthers(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	var ops []task.Operation
	p.Call("Submit", work, &ops)
	m, _ := testkit.NewLogged(t, testkit.OpenSQLite(t, path))

	t.Run("Get", func(t *testing.T) {
		for _, want := range ops {
			got, ok := m.Get(want.ID)
			if !ok {
				t.Fatalf("no operation %+v", want)
			}
			wantSame(t, got, want)
		}
	})
	t.Run("List", func(t *testing.T) {
		own, err := m.Submit("own", testkit.Nothing)
		testkit.Must(t, err)
		page, err := m.List(100, 0)
		testkit.Must(t, err)
		want := []string{own.ID}
		for _, op := range slices.Backward(ops) {
			want = append(want, op.ID)
		}
		var got []string
		for _, op := range page {
			got = append(got, op.ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q\nwant %q", got, want)
		}
	})
	t.Run("Wait with a context that is done", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), -1)
		defer cancel()
		op, err := m.Wait(ctx, ops[0].ID)
		if err != ctx.Err() || op == nil || op.State != task.StateRunning || op.Progress != work[0].Progress {
			t.Errorf("got %+v, %v", op, err)
		}
	})
}
