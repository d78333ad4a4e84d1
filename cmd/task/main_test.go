package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/sqlitefile"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// toolVar is the environment variable that makes the test binary act as this command. Its
// value is how long the command waits for a locked database.
const toolVar = "TASK_TEST_TOOL"

func TestMain(m *testing.M) {
	if text := os.Getenv(toolVar); text != "" {
		var err error
		if sqlitefile.DefaultTimeout, err = time.ParseDuration(text); err != nil {
			panic(err)
		}
		main()
	}
	testkit.Main(m, map[string]func() any{"daemon": func() any { return &daemon{ends: make(map[string]chan string)} }})
}

// A daemon is the role of a process on whose database the tool is used.
type daemon struct {
	store *task.SQLiteStore
	m     *task.Manager

	mu   sync.Mutex             // guards what follows
	ends map[string]chan string // by ID: the error text with which its function should end
}

func (d *daemon) Open(path string, _ *string) (err error) {
	if d.store, err = task.OpenSQLite(path); err != nil {
		return err
	}
	d.m, err = task.New(d.store, testkit.Quiet, task.WithLimit(2))
	return err
}

// Start submits an operation that reports progress and then runs until it is cancelled or
// ended. It returns the ID once all of that is stored or, if two operations are already
// running, once the new one is PENDING.
func (d *daemon) Start(what task.Operation, id *string) error {
	end := make(chan string, 1)
	op, err := d.m.Submit(what.Name, func(ctx context.Context, update func(int)) (any, error) {
		update(what.Progress)
		if err := task.Checkpoint(ctx); err != nil {
			return nil, err
		}
		select {
		case text := <-end:
			if text != "" {
				return "half", errors.New(text)
			}
			return map[string]int{"repaired": 3}, nil
		case <-ctx.Done():
			if what.Name == "stubborn" {
				return nil, nil
			}
			return nil, context.Cause(ctx)
		}
	}, task.WithMetadata(what.Metadata))
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.ends[op.ID] = end
	d.mu.Unlock()
	*id = op.ID
	if what.State == task.StatePending {
		return nil
	}
	return testkit.Until(func() bool {
		row, err := d.store.Get(op.ID)
		return err == nil && row.State == task.StateRunning && row.Progress == what.Progress
	})
}

// End ends an operation with the given error text, or without an error if the text is
// empty.
func (d *daemon) End(what [2]string, state *task.State) error {
	d.mu.Lock()
	d.ends[what[0]] <- what[1]
	d.mu.Unlock()
	op, err := d.m.Wait(context.Background(), what[0])
	if err == nil {
		*state = op.State
	}
	return err
}

func (d *daemon) Close(string, *string) error { return errors.Join(d.m.Close(), d.store.Close()) }

// start starts a daemon on the database.
func start(t *testing.T, path string) *testkit.Process {
	t.Helper()
	p := testkit.StartProcess(t, "daemon")
	p.Call("Open", path, new(string))
	return p
}

// submit makes a daemon run an operation, and returns its ID.
func submit(p *testkit.Process, name string, progress int) (id string) {
	p.Call("Start", task.Operation{Name: name, Progress: progress, Metadata: map[string]string{"pool": "tank"}}, &id)
	return id
}

// pending makes a daemon that already runs two operations accept another one.
func pending(p *testkit.Process, name string) (id string) {
	p.Call("Start", task.Operation{Name: name, State: task.StatePending}, &id)
	return id
}

func end(p *testkit.Process, id, text string) { p.Call("End", [2]string{id, text}, new(task.State)) }

// A process is a run of the tool.
type process struct {
	*exec.Cmd
	out, errs buffer
}

// A buffer can be read while it is being written.
type buffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// begin starts the tool as a process.
func begin(t *testing.T, path string, args ...string) *process {
	t.Helper()
	return beginFor(t, sqlitefile.DefaultTimeout, path, args...)
}

// beginFor starts the tool as a process that waits for locks up to timeout.
func beginFor(t *testing.T, timeout time.Duration, path string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(os.Args[0], append([]string{"-db", path}, args...)...)}
	p.Env = append(os.Environ(), toolVar+"="+timeout.String(), "GORACE=atexit_sleep_ms=0")
	p.Stdout, p.Stderr = &p.out, &p.errs
	testkit.Must(t, p.Start())
	t.Cleanup(func() { p.Process.Kill() })
	return p
}

// finish waits until the process ends, and checks its exit status.
func (p *process) finish(t *testing.T, want int) {
	t.Helper()
	timer := time.AfterFunc(time.Minute, func() { p.Process.Kill() })
	defer timer.Stop()
	p.Wait()
	if got := p.ProcessState.ExitCode(); got != want {
		t.Errorf("%q: exit status %d, want %d\noutput: %s\nerrors: %s", p.Args[1:], got, want, p.out.String(), p.errs.String())
	}
}

// tell runs the tool as a process and returns its output and its errors.
func tell(t *testing.T, want int, path string, args ...string) (out, errs string) {
	t.Helper()
	p := begin(t, path, args...)
	p.finish(t, want)
	return p.out.String(), p.errs.String()
}

// until waits until a process has written text.
func (p *process) until(t *testing.T, text string) {
	t.Helper()
	if testkit.Until(func() bool { return strings.Contains(p.out.String()+p.errs.String(), text) }) != nil {
		t.Fatalf("%q does not write %q\noutput: %s\nerrors: %s", p.Args[1:], text, p.out.String(), p.errs.String())
	}
}

// stored returns the rows of a database.
func stored(t *testing.T, path string) testkit.Rows {
	t.Helper()
	store, err := task.AttachSQLite(path)
	testkit.Must(t, err)
	defer store.Close()
	return testkit.Stored(t, store)
}

// untouched checks at the end of the test that the tool has changed nothing apart from the
// rows.
func untouched(t *testing.T, path string) {
	t.Helper()
	before := testkit.Traces(t, path)
	t.Cleanup(func() {
		if after := testkit.Traces(t, path); !slices.Equal(before, after) {
			t.Errorf("the database has changed:\n got %q\nwant %q", after, before)
		}
	})
}

// decode returns operations from lines of JSON.
func decode(t *testing.T, lines string) (ops []task.Operation) {
	t.Helper()
	for line := range strings.Lines(lines) {
		var op task.Operation
		if err := json.Unmarshal([]byte(line), &op); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		ops = append(ops, op)
	}
	return ops
}

func TestList(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	scrub, done, failed := submitThree(p)
	untouched(t, path)
	before := stored(t, path)
	tomorrow := time.Now().AddDate(0, 0, 1).Format(time.DateOnly)
	testkit.Exec(t, path, `UPDATE tasks SET updated_at = '2020-01-02 03:04:05.000000' WHERE id = ?`, done)
	for name, tt := range map[string]struct {
		args []string
		want []string
	}{
		"all":              {nil, []string{failed, done, scrub}},
		"limit":            {[]string{"-limit", "2"}, []string{failed, done}},
		"state":            {[]string{"-state", "running,DONE"}, []string{done, scrub}},
		"name":             {[]string{"-name", "send b"}, []string{failed}},
		"containing":       {[]string{"-containing", "send"}, []string{failed, done}},
		"metadata":         {[]string{"-metadata", "pool=tank", "-metadata", "x=y"}, nil},
		"metadata, state":  {[]string{"-metadata", "pool=tank", "-state=RUNNING"}, []string{scrub}},
		"age":              {[]string{"-since", "1h"}, []string{scrub, failed}},
		"days":             {[]string{"-since", "0.5d"}, []string{scrub, failed}},
		"long ago":         {[]string{"-since", "2019-12-31"}, []string{scrub, failed, done}},
		"future":           {[]string{"-since", tomorrow}, []string{scrub}},
		"finished":         {[]string{"-finished"}, []string{failed, done}},
		"finished, since":  {[]string{"-finished", "-since", "1h"}, []string{failed}},
		"finished, states": {[]string{"-finished", "-state", "RUNNING,DONE"}, []string{done}},
		"since, limit":     {[]string{"-limit", "1", "-since", "1h"}, []string{scrub}},
		"since, state":     {[]string{"-state", "DONE", "-since", "2020-01-01 10:00"}, []string{done}},
	} {
		t.Run(name, func(t *testing.T) {
			out, _ := tell(t, 0, path, append([]string{"list", "-json"}, tt.args...)...)
			var got []string
			for _, op := range decode(t, out) {
				got = append(got, op.ID)
				if want := before[op.ID]; op.Name != want.Name || op.State != want.State || op.Result != nil {
					t.Errorf("got %+v\nwant %+v", op, want)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// submitThree makes a daemon run an operation and two others that end DONE and FAILED.
func submitThree(p *testkit.Process) (running, done, failed string) {
	running = submit(p, "scrub", 42)
	done = submit(p, "Send\tA", 10)
	end(p, done, "")
	failed = submit(p, "send b", 20)
	end(p, failed, "no such pool\nat all")
	return running, done, failed
}

// TestListLines: if the output is not a terminal, each operation is a line of eight fields.
func TestListLines(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	scrub, done, failed := submitThree(start(t, path))
	out, _ := tell(t, 0, path, "list")
	lines := strings.Split(out, "\n")
	for i, want := range []struct{ start, end string }{
		{failed + "\tFAILED\t20\tsend b\t20", "s\t\tno such pool\\nat all"},
		{done + "\tDONE\t100\tSend\\tA\t20", "s\t\t"},
		{scrub + "\tRUNNING\t42\tscrub\t20", "s\t\t"},
		{},
	} {
		if !strings.HasPrefix(lines[i], want.start) || !strings.HasSuffix(lines[i], want.end) {
			t.Errorf("line %q, want %q", lines[i], want)
		}
		if n := strings.Count(lines[i], "\t"); n != 7 && i < 3 {
			t.Errorf("%q has %d fields", lines[i], n+1)
		}
	}
}

func TestShow(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	id := submit(p, "scrub", 42)
	untouched(t, path)
	out, _ := tell(t, 0, path, "show", id)
	for _, want := range []string{id, "scrub", "RUNNING", "42%", "Process    alive", `  "pool": "tank"`} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	end(p, id, "")
	out, _ = tell(t, 0, path, "show", "-json", strings.ToUpper(id[:20]))
	if op := decode(t, out)[0]; op.ID != id || op.State != task.StateDone || fmt.Sprint(op.Result) != "map[repaired:3]" {
		t.Errorf("got %s", out)
	}
	out, errs := tell(t, exitNotFound, path, "show", "nothing")
	if out != "" || !strings.Contains(errs, "no operation nothing") {
		t.Errorf("output %q, errors %q", out, errs)
	}
	other := submit(p, "scrub", 10)
	if _, errs := tell(t, exitUsage, path, "show", id[:8]); id[:8] == other[:8] && !strings.Contains(errs, "give more of the ID") {
		t.Errorf("errors %q", errs)
	}
	p.Kill()
	if out, _ := tell(t, 0, path, "show", other); !strings.Contains(out, "Process    dead") {
		t.Errorf("no dead process in\n%s", out)
	}
	if _, errs := tell(t, 0, path, "show", other, "-json"); !strings.Contains(errs, "is dead") {
		t.Errorf("no dead process in %q", errs)
	}
}

// TestFollow: follow ends with the operation, and its exit status tells the outcome.
func TestFollow(t *testing.T) {
	testos.Parallel(t)
	for name, tt := range map[string]struct {
		meanwhile func(t *testing.T, path string, p *testkit.Process, id string)
		exit      int
		want      string
	}{
		"done":   {func(_ *testing.T, _ string, p *testkit.Process, id string) { end(p, id, "") }, 0, "\tDONE\t100\t"},
		"failed": {func(_ *testing.T, _ string, p *testkit.Process, id string) { end(p, id, "disk full") }, exitFailed, "\tdisk full\n"},
		"killed": {func(_ *testing.T, _ string, p *testkit.Process, _ string) { p.Kill() }, exitDead, "the process that ran it is dead"},
		"closed": {func(_ *testing.T, _ string, p *testkit.Process, _ string) { p.Call("Close", "", new(string)) }, exitFailed, "system shutdown"},
		"deleted": {func(t *testing.T, path string, _ *testkit.Process, id string) {
			testkit.Exec(t, path, `DELETE FROM tasks WHERE id = ?`, id)
		}, exitNotFound, "was deleted"},
		"cancelled": {func(t *testing.T, path string, _ *testkit.Process, id string) {
			tell(t, 0, path, "cancel", id)
		}, exitCancelled, "\tcancelled by " + caller() + "\n"},
		"interrupted": {nil, exitInterrupted, ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := testkit.Path(t)
			p := start(t, path)
			id, other := submit(p, "scrub", 42), submit(p, "other", 1)
			end(p, other, "")
			before := stored(t, path)
			f := begin(t, path, "follow", id, other)
			f.until(t, id+"\tRUNNING\t42\tscrub\t")
			f.until(t, other+"\tDONE\t100\tother\t")
			if tt.meanwhile == nil {
				testkit.Must(t, f.Process.Signal(os.Interrupt))
			} else {
				tt.meanwhile(t, path, p, id)
			}
			f.finish(t, tt.exit)
			f.until(t, tt.want)
			if tt.exit == exitDead {
				before.WantFailed(t, stored(t, path)) // none
			}
		})
	}
	if _, errs := tell(t, exitNotFound, database(t), "follow", "nothing"); !strings.Contains(errs, "no operation nothing") {
		t.Errorf("errors %q", errs)
	}
}

// database returns the path of a database without operations that no process has open.
func database(t *testing.T) string {
	t.Helper()
	path := testkit.Path(t)
	store, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	testkit.Must(t, store.Close())
	return path
}

// TestFollowAll: without IDs, follow shows the operations of all processes until it is
// interrupted.
func TestFollowAll(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p, q := start(t, path), start(t, path)
	first := submit(p, "first", 42)
	f := begin(t, path, "follow", "-json")
	f.until(t, first)
	second := submit(q, "second", 7)
	f.until(t, second)
	end(q, second, "")
	f.until(t, `"DONE"`)
	deleted := submit(q, "deleted", 1)
	f.until(t, deleted)
	testkit.Exec(t, path, `DELETE FROM tasks WHERE id = ?`, deleted)
	f.until(t, deleted+": was deleted")
	p.Kill()
	f.until(t, "the process that ran it is dead")
	start(t, path) // recovers
	f.until(t, testkit.RestartText)
	testkit.Must(t, f.Process.Signal(os.Interrupt))
	f.finish(t, 0)
	final := make(map[string]int)
	for _, op := range decode(t, f.out.String()) {
		if op.State.Finished() {
			final[op.ID]++
		}
	}
	if len(final) != 2 || final[first] != 1 || final[second] != 1 {
		t.Errorf("final states %v", final)
	}
}

func TestCancel(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	running, stubborn := submit(p, "running", 42), submit(p, "stubborn", 43)
	waiting, later := pending(p, "waiting"), pending(p, "later")
	untouched(t, path)
	want := func(id string, state task.State, text string) {
		t.Helper()
		if got := stored(t, path)[id]; got.State != state || !strings.Contains(got.Error, text) {
			t.Errorf("got %+v, want %s, %q", got, state, text)
		}
	}
	out, _ := tell(t, 0, path, "cancel", waiting, "-reason", "not needed")
	if !strings.Contains(out, "CANCELLED") {
		t.Errorf("output %q", out)
	}
	want(waiting, task.StateCancelled, caller()+": not needed")
	tell(t, exitFailed, path, "cancel", stubborn, running)
	want(running, task.StateCancelled, "cancelled by "+caller())
	want(stubborn, task.StateDone, "")
	for _, id := range []string{waiting, "nothing"} {
		tell(t, exitNotFound, path, "cancel", id)
	}
	if out, errs := tell(t, 0, path, "cancel", "-no-wait", later); out+errs != "" {
		t.Errorf("output %q, errors %q", out, errs)
	}
	testkit.Must(t, testkit.Until(func() bool { return stored(t, path)[later].State == task.StateCancelled }))
}

// TestCancelDead: cancelling an operation left by a dead process is stored, and the tool
// says so.
func TestCancelDead(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	id := submit(p, "scrub", 42)
	p.Kill()
	for _, args := range [][]string{{"-no-wait"}, nil} {
		_, errs := tell(t, exitDead, path, append([]string{"cancel", id}, args...)...)
		if !strings.Contains(errs, "the process that ran it is dead") {
			t.Errorf("errors %q", errs)
		}
	}
	if got := stored(t, path)[id]; got.State != task.StateRunning || !got.Cancelling {
		t.Errorf("got %+v", got)
	}
}

func TestPrune(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	p := start(t, path)
	id := submit(p, "scrub", 42)
	end(p, id, "")
	live := submit(p, "live", 1)
	untouched(t, path)
	tell(t, exitUsage, path, "prune")
	tell(t, exitUsage, path, "prune", "-before", "yesterday")
	if out, _ := tell(t, 0, path, "prune", "-before", "1h"); out != "pruned 0 operations\n" {
		t.Errorf("output %q", out)
	}
	if out, _ := tell(t, 0, path, "prune", "-before", "0s", "-json"); out != "{\"pruned\":1}\n" {
		t.Errorf("output %q", out)
	}
	if rows := stored(t, path); len(rows) != 1 || rows[live].ID == "" {
		t.Errorf("rows %+v", rows)
	}
}

// TestTrouble: an unusable argument or database leads to exit status 2 and one line that
// says what to do.
func TestTrouble(t *testing.T) {
	testos.Parallel(t)
	good := database(t)
	for name, tt := range map[string]struct {
		path string
		args []string
		want string
	}{
		"missing":    {testkit.Path(t), []string{"list"}, "name the file of an existing database"},
		"foreign":    {foreign(t), []string{"list"}, "make sure that it is one"},
		"older":      {made(t, `ALTER TABLE tasks DROP COLUMN message`), []string{"follow"}, "start its program once with this version"},
		"else":       {made(t, `ALTER TABLE tasks RENAME COLUMN name TO title`), []string{"list"}, "has no column name"},
		"no command": {good, nil, "without arguments for help"},
		"command":    {good, []string{"lsit"}, "without arguments for help"},
		"option":     {good, []string{"list", "-x"}, "without arguments for help"},
		"argument":   {good, []string{"list", "x"}, "use show"},
		"no ID":      {good, []string{"cancel"}, "takes the IDs"},
		"two IDs":    {good, []string{"show", "a", "b"}, "takes one ID"},
		"state":      {good, []string{"list", "-state", "NONE"}, "PENDING, RUNNING"},
		"metadata":   {good, []string{"list", "-metadata", "tank"}, "KEY=VALUE"},
		"limit":      {good, []string{"list", "-limit", "0"}, "at least 1"},
		"since":      {good, []string{"list", "-since", "-1h"}, "30d"},
	} {
		t.Run(name, func(t *testing.T) {
			before, _ := filepath.Glob(filepath.Join(filepath.Dir(tt.path), "*"))
			out, errs := tell(t, exitUsage, tt.path, tt.args...)
			if out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, tt.want) {
				t.Errorf("output %q, errors %q, want one line with %q", out, errs, tt.want)
			}
			if after, _ := filepath.Glob(filepath.Join(filepath.Dir(tt.path), "*")); !slices.Equal(before, after) {
				t.Errorf("files %q, before %q", after, before)
			}
		})
	}
	tell(t, 0, made(t, `ALTER TABLE tasks ADD COLUMN newer TEXT`), "list")
}

// made returns the path of a database whose table has been changed by stmt.
func made(t *testing.T, stmt string) string {
	t.Helper()
	path := database(t)
	testkit.Exec(t, path, stmt)
	return path
}

func foreign(t *testing.T) string {
	t.Helper()
	path := testkit.Path(t)
	testkit.Must(t, os.WriteFile(path, []byte(strings.Repeat("not a database\n", 100)), 0o600))
	return path
}

// TestLocked: the tool waits for a locked database, and fails if it stays locked.
func TestLocked(t *testing.T) {
	testos.Parallel(t)
	path := database(t)
	db, err := sql.Open("sqlite3", path+"?_locking_mode=EXCLUSIVE")
	testkit.Must(t, err)
	defer db.Close()
	db.SetMaxOpenConns(1)
	_, err = db.Exec(`CREATE TABLE mine (x)`)
	testkit.Must(t, err)
	written := testkit.Path(t)
	id := submit(start(t, written), "blocked", 1)
	writer, err := sql.Open("sqlite3", written+"?_txlock=immediate")
	testkit.Must(t, err)
	defer writer.Close()
	tx, err := writer.Begin()
	testkit.Must(t, err)
	defer tx.Rollback()
	const soon = time.Second
	impatient := []*process{beginFor(t, soon, path, "list"), beginFor(t, soon, written, "cancel", id),
		beginFor(t, soon, written, "prune", "-before", "1h")}
	tell(t, 0, written, "list")
	for _, p := range impatient {
		p.finish(t, exitUsage)
		errs := p.errs.String()
		if !strings.Contains(errs, "other program") || strings.Count(errs, "\n") != 1 {
			t.Errorf("%q: errors %q", p.Args, errs)
		}
	}
	late := begin(t, path, "list")
	time.AfterFunc(time.Second, func() { db.Close() })
	late.finish(t, 0)
}
