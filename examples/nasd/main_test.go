//go:build unix

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// TestMain makes the test binary run the daemon if the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv("NASD_TEST_MAIN") != "" {
		go func() { // end together with the test process, however that ends
			io.Copy(io.Discard, os.Stdin)
			os.Exit(3)
		}()
		main()
		return
	}
	os.Exit(testos.Run(m))
}

// program returns the command that runs the daemon.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Env = append(os.Environ(), "NASD_TEST_MAIN=1",
		"GORACE=atexit_sleep_ms=0") // otherwise -race adds a second to each run
	_, err = cmd.StdinPipe() // closed when this process or cmd ends
	must(t, err)
	return cmd
}

// A daemon is a running daemon.
type daemon struct {
	t        *testing.T
	dir      string
	url      string
	greeting string // its first output
	cmd      *exec.Cmd
	log      bytes.Buffer // to be read only after the daemon has ended
	client   *http.Client
	ended    chan struct{}
}

// start starts the daemon and returns once it listens.
func start(t *testing.T, dir string, args ...string) *daemon {
	t.Helper()
	d := &daemon{t: t, dir: dir, client: &http.Client{Transport: &http.Transport{}}, ended: make(chan struct{})}
	d.cmd = program(t, append([]string{"-data", dir, "-listen", "127.0.0.1:0", "-snapshot-every", "0"}, args...)...)
	d.cmd.Stderr = &d.log
	out, err := d.cmd.StdoutPipe()
	must(t, err)
	must(t, d.cmd.Start())
	t.Cleanup(func() {
		d.end(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", &d.log)
		}
	})
	r := bufio.NewReader(out)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("the daemon does not start: %v, %v", err, d.end(syscall.SIGKILL))
	}
	d.greeting = line
	d.url, _, _ = strings.Cut(strings.TrimPrefix(line, "nasd is at "), ";")
	go func() {
		defer close(d.ended)
		rest, _ := io.ReadAll(r)
		d.greeting += string(rest)
	}()
	return d
}

// end sends the daemon a signal and returns how it ended.
func (d *daemon) end(sig syscall.Signal) error {
	if d.cmd.ProcessState != nil {
		return nil
	}
	d.cmd.Process.Signal(sig)
	if d.url != "" {
		<-d.ended
	}
	err := d.cmd.Wait()
	d.client.CloseIdleConnections()
	return err
}

func (d *daemon) request(method, path string, body io.Reader) *http.Response {
	d.t.Helper()
	req, err := http.NewRequestWithContext(d.t.Context(), method, d.url+path, body)
	must(d.t, err)
	resp, err := d.client.Do(req)
	must(d.t, err)
	return resp
}

// do makes a request, checks the status of the response, and stores its JSON in the value
// that into points to, unless into is nil.
func (d *daemon) do(method, path, body string, status int, into any) {
	d.t.Helper()
	resp := d.request(method, path, strings.NewReader(body))
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	must(d.t, err)
	if resp.StatusCode != status {
		d.t.Fatalf("%s %s: got %s, want %d: %s", method, path, resp.Status, status, got)
	}
	if into != nil {
		must(d.t, json.Unmarshal(got, into))
	}
}

// begin starts an operation.
func (d *daemon) begin(path, body string) (op task.Operation) {
	d.t.Helper()
	d.do("POST", path, body, 202, &op)
	return op
}

func (d *daemon) get(id string) (op task.Operation) {
	d.t.Helper()
	d.do("GET", "/api/tasks/"+id, "", 200, &op)
	return op
}

// finish runs an operation, checks its final state, and stores its result in the value that
// into points to, unless into is nil.
func (d *daemon) finish(path, body string, state task.State, into any) task.Operation {
	d.t.Helper()
	return d.wait(d.begin(path, body).ID, state, into)
}

// wait is finish for an operation that has already been started.
func (d *daemon) wait(id string, state task.State, into any) (op task.Operation) {
	d.t.Helper()
	d.do("GET", "/api/tasks/"+id+"/wait?timeout=5m", "", 200, &op)
	if op.State != state {
		d.t.Fatalf("%s is %s at %d%% (%s), want %s", op.Name, op.State, op.Progress, op.Error, state)
	}
	if into != nil {
		must(d.t, op.DecodeResult(into))
	}
	return op
}

// put stores a file.
func (d *daemon) put(path, content string) {
	d.t.Helper()
	d.do("PUT", path, content, 204, nil)
}

// file returns the path of a file in a pool.
func (d *daemon) file(pool, name string) string {
	return filepath.Join(d.dir, "pools", pool, filesDir, name)
}

// A stream is a stream of server-sent events.
type stream struct {
	t    *testing.T
	body io.ReadCloser
	r    *bufio.Reader
}

func (d *daemon) stream(path string) *stream {
	d.t.Helper()
	resp := d.request("GET", path, nil)
	d.t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != 200 {
		d.t.Fatalf("GET %s: %s", path, resp.Status)
	}
	return &stream{d.t, resp.Body, bufio.NewReader(resp.Body)}
}

// next returns the next event, or io.EOF.
func (s *stream) next() (name string, data []byte, err error) {
	for {
		line, err := s.r.ReadString('\n')
		if err != nil {
			return "", nil, err
		}
		field, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch {
		case field == "event":
			name = value
		case field == "data":
			data = []byte(value)
		case line == "\n" && name != "":
			return name, data, nil
		}
	}
}

// until reads events until wanted accepts an operation.
func (s *stream) until(what string, wanted func(op *task.Operation) bool) *task.Operation {
	s.t.Helper()
	for {
		name, data, err := s.next()
		if err != nil {
			s.t.Fatalf("waiting for %s: %v", what, err)
		}
		op := new(task.Operation)
		if name != "operation" {
			continue
		}
		must(s.t, json.Unmarshal(data, op))
		if wanted(op) {
			return op
		}
	}
}

// untilAt waits until an operation is working on a file.
func (d *daemon) untilAt(id, file string) {
	d.t.Helper()
	s := d.stream("/api/tasks/" + id + "/events")
	defer s.body.Close()
	s.until("work on "+file, func(op *task.Operation) bool {
		return op.Message == file
	})
}

func TestProgram(t *testing.T) {
	for _, tt := range []struct {
		name   string
		args   []string
		code   int
		stderr string
	}{
		{"no directory", nil, 2, "-data DIR"},
		{"argument", []string{"-data", t.TempDir(), "x"}, 2, "-data DIR"},
		{"negative limit", []string{"-data", t.TempDir(), "-limit", "-1"}, 2, "-data DIR"},
		{"negative number of snapshots", []string{"-data", t.TempDir(), "-keep-snapshots", "-1"}, 2, "-data DIR"},
		{"negative history", []string{"-data", t.TempDir(), "-keep-history", "-1s"}, 2, "-data DIR"},
		{"negative period", []string{"-data", t.TempDir(), "-snapshot-every", "-1s"}, 2, "-data DIR"},
		{"bad address", []string{"-data", t.TempDir(), "-listen", "256.0.0.1:0"}, 1, "nasd: listen"},
		{"bad directory", []string{"-data", os.Args[0]}, 1, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cmd := program(t, tt.args...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Run(); !errors.As(err, new(*exec.ExitError)) || cmd.ProcessState.ExitCode() != tt.code ||
				!strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("got %v and %q, want exit code %d and %q", err, stderr.String(), tt.code, tt.stderr)
			}
		})
	}
}

// TestDaemon uses the daemon over HTTP as a user does.
func TestDaemon(t *testing.T) {
	d := start(t, t.TempDir())
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	d.finish("/api/pools", `{"name":"backup"}`, task.StateDone, nil)
	d.do("POST", "/api/pools", `{"name":"tank"}`, 409, nil)
	want := map[string]string{"a.txt": "one", "dir/b.txt": "two", "dir/dir/empty": ""}
	for name, content := range want {
		d.put("/api/pools/tank/files/"+name, content)
	}

	t.Run("scrub", func(t *testing.T) {
		var r scrubResult
		d.finish("/api/pools/tank/scrub", "", task.StateDone, &r)
		if want := (scrubResult{Files: 3, Bytes: 6, New: files("a.txt", "dir/b.txt", "dir/dir/empty")}); !reflect.DeepEqual(r, want) {
			t.Errorf("got %+v, want %+v", r, want)
		}
	})
	t.Run("corruption", func(t *testing.T) {
		path := d.file("tank", "dir/b.txt")
		info, err := os.Stat(path)
		must(t, err)
		must(t, os.WriteFile(path, []byte("tvo"), 0o600))
		must(t, os.Chtimes(path, time.Time{}, info.ModTime()))
		var r scrubResult
		op := d.finish("/api/pools/tank/scrub", "", task.StateFailed, &r)
		if want := (scrubResult{Files: 3, Bytes: 6, Corrupted: files("dir/b.txt")}); !reflect.DeepEqual(r, want) {
			t.Errorf("got %+v, want %+v", r, want)
		}
		d.untilLast("tank", "scrub", op.ID)
		r = scrubResult{}
		d.finish("/api/pools/tank/accept", "", task.StateDone, nil)
		d.finish("/api/pools/tank/scrub", "", task.StateDone, nil)
		d.put("/api/pools/tank/files/dir/b.txt", "two")
		d.finish("/api/pools/tank/scrub", "", task.StateDone, &r)
		if want := (scrubResult{Files: 3, Bytes: 6, Changed: files("dir/b.txt")}); !reflect.DeepEqual(r, want) {
			t.Errorf("restored: got %+v, want %+v", r, want)
		}
	})
	t.Run("replicate", func(t *testing.T) {
		var r replicateResult
		d.finish("/api/pools/tank/replicate", `{"to":"backup"}`, task.StateDone, &r)
		if want := (replicateResult{Copied: 3, Bytes: 6}); !reflect.DeepEqual(r, want) {
			t.Errorf("got %+v, want %+v", r, want)
		}
		wantTree(t, d.file("tank", ""), want)
		wantTree(t, d.file("backup", ""), want)
	})
	t.Run("snapshot", func(t *testing.T) {
		var first, second snapshotResult
		d.finish("/api/pools/tank/snapshot", "", task.StateDone, &first)
		d.put("/api/pools/tank/files/a.txt", "three")
		d.finish("/api/pools/tank/snapshot", "", task.StateDone, &second)
		if got := d.snapshots("tank", false); !slices.Equal(got, []string{first.ID, second.ID}) || second.Linked != 2 {
			t.Errorf("the list is %v after taking %+v and %+v", got, first, second)
		}
		wantTree(t, filepath.Join(d.dir, "pools/tank/snapshots", first.ID), want)
	})
	t.Run("one at a time", func(t *testing.T) {
		makeHuge(t, d.file("tank", "huge"))
		first := d.begin("/api/pools/tank/scrub", "")
		second := d.begin("/api/pools/tank/snapshot", "")
		d.untilAt(first.ID, "huge") // takes hours
		for path, op := range map[string]task.Operation{"scrub": first, "snapshot": second} {
			if again := d.begin("/api/pools/tank/"+path, ""); again.ID != op.ID {
				t.Errorf("a second request has started %+v beside %+v", again, op)
			}
		}
		d.finish("/api/pools/backup/scrub", "", task.StateDone, nil)
		if op := d.get(second.ID); op.State != task.StatePending {
			t.Errorf("the second is %s, want %s", op.State, task.StatePending)
		}
		for _, id := range []string{second.ID, first.ID} {
			d.do("POST", "/api/tasks/"+id+"/cancel", "", 202, nil)
			var op task.Operation
			d.do("GET", "/api/tasks/"+id+"/wait?timeout=5m", "", 200, &op)
			if op.State != task.StateCancelled {
				t.Errorf("%s is %s, want %s", op.Name, op.State, task.StateCancelled)
			}
		}
		must(t, os.Remove(d.file("tank", "huge")))
		d.finish("/api/pools/tank/scrub", "", task.StateDone, nil)
	})
}

// untilLast waits until the list of pools shows an operation as the last of its kind. The
// event bus reports it some time after it has finished.
func (d *daemon) untilLast(pool, kind, id string) {
	d.t.Helper()
	for {
		var got struct {
			Pools []struct {
				Name string
				Last map[string]task.Operation
			}
		}
		d.do("GET", "/api/pools", "", 200, &got)
		for _, p := range got.Pools {
			if p.Name == pool && p.Last[kind].ID == id {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// snapshots returns the IDs of the snapshots of a pool and checks whether they were taken
// automatically.
func (d *daemon) snapshots(pool string, automatic bool) (ids []string) {
	d.t.Helper()
	var got struct{ Snapshots []snapshotInfo }
	d.do("GET", "/api/pools/"+pool+"/snapshots", "", 200, &got)
	for _, s := range got.Snapshots {
		if s.Automatic != automatic || s.Time.IsZero() {
			d.t.Errorf("got %+v, want automatic: %v", s, automatic)
		}
		ids = append(ids, s.ID)
	}
	return ids
}

func TestGreeting(t *testing.T) {
	dir := t.TempDir()
	for _, want := range []bool{true, false} {
		d := start(t, dir)
		if want {
			d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
		}
		if out, err := program(t, "-data", dir, "-listen", "127.0.0.1:0").CombinedOutput(); err == nil ||
			!strings.Contains(string(out), "another nasd serves") {
			t.Errorf("a second daemon returned %v, %s", err, out)
		}
		must(t, d.end(syscall.SIGINT))
		if got := strings.Contains(d.greeting, d.url+"/api/pools/tank/scrub"); got != want {
			t.Errorf("it greeting with %q, with advice: %v, want %v", d.greeting, got, want)
		}
		if want := fmt.Sprintf("kill %d\n", d.cmd.Process.Pid); !strings.Contains(d.greeting, want) {
			t.Errorf("it greeting with %q, want %q in it", d.greeting, want)
		}
	}
}

// TestTerm checks that on SIGTERM the operations end, event streams report their final
// states, and the daemon exits.
func TestTerm(t *testing.T) {
	d := start(t, t.TempDir())
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	makeHuge(t, d.file("tank", "huge"))
	running := d.begin("/api/pools/tank/scrub", "")
	waiting := d.begin("/api/pools/tank/snapshot", "")
	all := d.stream("/api/tasks/events")
	if name, data, err := all.next(); name != "snapshot" || !bytes.Contains(data, []byte(running.ID)) {
		t.Errorf("the first event is %s %s, %v", name, data, err)
	}
	d.untilAt(running.ID, "huge")

	ended := make(chan error, 1)
	go func() { ended <- d.end(syscall.SIGTERM) }()
	failed := make(map[string]string) // errors by ID, as reported by the stream
	for {
		name, data, err := all.next()
		if err == io.EOF {
			break
		}
		must(t, err)
		var op task.Operation
		must(t, json.Unmarshal(data, &op))
		if name == "operation" && op.State.Finished() {
			failed[op.ID] = op.Error
		}
	}
	must(t, <-ended)

	d = start(t, d.dir)
	for _, id := range []string{running.ID, waiting.ID} {
		op := d.get(id)
		if op.State != task.StateFailed || !strings.HasPrefix(op.Error, "Task failed due to system shutdown") {
			t.Errorf("%s is %s %q", op.Name, op.State, op.Error)
		}
		if failed[id] != op.Error {
			t.Errorf("%s: the stream reported %q, stored is %q", op.Name, failed[id], op.Error)
		}
	}
	must(t, os.Remove(d.file("tank", "huge")))
	d.finish("/api/pools/tank/scrub", "", task.StateDone, nil)
	must(t, d.end(syscall.SIGTERM))
}

// TestKill checks that after a kill the next daemon resumes a replication and a scrub under
// their IDs, but not an accept.
func TestKill(t *testing.T) {
	t.Parallel()
	d := start(t, t.TempDir())
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	for _, name := range []string{"backup", "scrubbed", "accepted"} {
		d.finish("/api/pools", `{"name":"`+name+`"}`, task.StateDone, nil)
	}
	for _, pool := range []string{"tank", "scrubbed", "accepted"} {
		d.put("/api/pools/"+pool+"/files/a", "a")
		d.put("/api/pools/"+pool+"/files/z", "z")
		makeHuge(t, d.file(pool, "huge"))
	}
	replicate := d.begin("/api/pools/tank/replicate", `{"to":"backup"}`)
	scrub := d.begin("/api/pools/scrubbed/scrub", "")
	accept := d.begin("/api/pools/accepted/accept", "")
	for _, op := range []task.Operation{replicate, scrub, accept} {
		d.untilAt(op.ID, "huge")
	}
	if err := d.end(syscall.SIGKILL); err == nil {
		t.Error("no error of a killed daemon")
	}

	for _, pool := range []string{"tank", "scrubbed", "accepted"} {
		must(t, os.Remove(d.file(pool, "huge")))
	}
	d = start(t, d.dir)
	if op := d.get(accept.ID); op.State != task.StateFailed || op.Error != "Task failed due to system restart" {
		t.Errorf("the accept is %s %q", op.State, op.Error)
	}
	var copied replicateResult
	d.wait(replicate.ID, task.StateDone, &copied)
	if want := (replicateResult{Copied: 1, Skipped: 1, Bytes: 2}); !reflect.DeepEqual(copied, want) {
		t.Errorf("got %+v, want %+v", copied, want)
	}
	var read scrubResult
	d.wait(scrub.ID, task.StateDone, &read)
	if want := (scrubResult{Files: 2, Bytes: 2, New: files("a", "z")}); !reflect.DeepEqual(read, want) {
		t.Errorf("got %+v, want %+v", read, want)
	}
	wantTree(t, d.file("backup", ""), map[string]string{"a": "a", "z": "z"})
	d.finish("/api/pools/backup/scrub", "", task.StateDone, nil)
}

// TestKillRestore checks that a kill leaves the old file in place and that the next daemon
// resumes the restore.
func TestKillRestore(t *testing.T) {
	d := start(t, t.TempDir())
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	d.put("/api/pools/tank/files/a", "old")
	var snap snapshotResult
	d.finish("/api/pools/tank/snapshot", "", task.StateDone, &snap)
	d.put("/api/pools/tank/files/a", "new")
	in := filepath.Join(d.dir, "pools/tank/snapshots", snap.ID, "a")
	must(t, os.Rename(in, in+".kept"))
	makeHuge(t, in)
	op := d.begin("/api/pools/tank/snapshots/"+snap.ID+"/restore", `{"path":"a"}`)
	d.untilAt(op.ID, "a")
	d.end(syscall.SIGKILL)
	wantTree(t, d.file("tank", "a"), map[string]string{".": "new"})

	must(t, os.Rename(in+".kept", in))
	d = start(t, d.dir)
	var r restoreResult
	d.wait(op.ID, task.StateDone, &r)
	if want := (restoreResult{Path: "a", Bytes: 3}); r != want {
		t.Errorf("got %+v, want %+v", r, want)
	}
	wantTree(t, d.file("tank", ""), map[string]string{"a": "old"})
}

// remove starts the deletion of a pool.
func (d *daemon) remove(pool string) (op task.Operation) {
	d.t.Helper()
	d.do("DELETE", "/api/pools/"+pool+"?confirm="+pool, "", 202, &op)
	return op
}

// TestDelete checks that a pool is deleted after the operations submitted before, and that
// a new pool with that name has nothing of the old one.
func TestDelete(t *testing.T) {
	d := start(t, t.TempDir())
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	d.put("/api/pools/tank/files/dir/a", "a")
	d.finish("/api/pools/tank/snapshot", "", task.StateDone, nil)
	makeHuge(t, d.file("tank", "huge"))
	scrub := d.begin("/api/pools/tank/scrub", "")
	d.untilAt(scrub.ID, "huge")
	op := d.remove("tank")
	if again := d.remove("tank"); again.ID != op.ID {
		t.Errorf("a second request has started %+v beside %+v", again, op)
	}
	d.put("/api/pools/tank/files/b", "an upload does not wait")
	if op := d.get(op.ID); op.State != task.StatePending {
		t.Errorf("during a scrub the delete is %s", op.State)
	}
	d.do("POST", "/api/tasks/"+scrub.ID+"/cancel", "", 202, nil)
	d.wait(op.ID, task.StateDone, nil)
	wantTree(t, filepath.Join(d.dir, "pools"), map[string]string{})
	d.do("POST", "/api/pools/tank/scrub", "", 404, nil)

	created := d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	d.untilLast("tank", "create", created.ID)
	for range 2 { // from events, then from the history
		var got struct {
			Pools []struct{ Last map[string]task.Operation }
		}
		d.do("GET", "/api/pools", "", 200, &got)
		if len(got.Pools) != 1 || len(got.Pools[0].Last) != 2 || got.Pools[0].Last["delete"].ID != op.ID {
			t.Errorf("the pools are %+v", got)
		}
		must(t, d.end(syscall.SIGTERM))
		d = start(t, d.dir)
	}
	wantTree(t, d.file("tank", ""), map[string]string{})
}

// TestKillDelete checks that a kill leaves no partial pool. The next daemon finishes a
// removal that had begun, but does not begin one that was waiting.
func TestKillDelete(t *testing.T) {
	t.Parallel()
	d := start(t, t.TempDir(), "-limit", "0")
	ops := make(map[string]task.Operation)
	for _, pool := range []string{"begun", "waiting"} {
		d.finish("/api/pools", `{"name":"`+pool+`"}`, task.StateDone, nil)
		makeHuge(t, d.file(pool, "huge"))
		d.untilAt(d.begin("/api/pools/"+pool+"/scrub", "").ID, "huge")
		ops[pool] = d.remove(pool)
	}
	d.end(syscall.SIGKILL)
	// This is the state after a kill in the middle of the removal.
	must(t, os.Rename(filepath.Join(d.dir, "pools/begun"), filepath.Join(d.dir, "pools", deleting+"begun")))
	must(t, os.Remove(filepath.Join(d.dir, "pools", deleting+"begun", manifestFile)))
	must(t, os.Remove(d.file("waiting", "huge")))

	d = start(t, d.dir)
	d.wait(ops["begun"].ID, task.StateDone, nil)
	if op := d.wait(ops["waiting"].ID, task.StateFailed, nil); !op.Interrupted() {
		t.Errorf("the delete that had to wait is %+v", op)
	}
	entries, err := os.ReadDir(filepath.Join(d.dir, "pools"))
	if err != nil || len(entries) != 1 || entries[0].Name() != "waiting" {
		t.Errorf("left are %v, %v", entries, err)
	}
	d.finish("/api/pools", `{"name":"begun"}`, task.StateDone, nil)
	d.finish("/api/pools/waiting/scrub", "", task.StateDone, nil)
}

// TestKillDuringDelete kills daemons that are removing many files, and checks that the pool
// is either complete or gone.
func TestKillDuringDelete(t *testing.T) {
	t.Parallel()
	for round := range 5 {
		d := start(t, t.TempDir())
		d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
		for i := range 300 {
			must(t, os.WriteFile(d.file("tank", fmt.Sprint(i)), nil, 0o600))
		}
		op := d.remove("tank")
		if round > 0 {
			time.Sleep(time.Duration(round) * time.Millisecond) // any moment will do
		}
		d.end(syscall.SIGKILL)
		d = start(t, d.dir)
		d.do("GET", "/api/tasks/"+op.ID+"/wait?timeout=5m", "", 200, &op)
		files, err := os.ReadDir(d.file("tank", ""))
		switch {
		case op.State == task.StateDone && !errors.Is(err, os.ErrNotExist):
			t.Errorf("the delete is done, and there are %d files, %v", len(files), err)
		case op.State == task.StateFailed && len(files) != 300:
			t.Errorf("the delete is %s, and there are %d files, %v", op.Error, len(files), err)
		case op.State != task.StateDone && op.State != task.StateFailed:
			t.Errorf("the delete is %s", op.State)
		}
		if _, err := os.Stat(filepath.Join(d.dir, "pools", deleting+"tank")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("what was being removed is still there: %v", err)
		}
	}
}

// TestSchedule checks that the scheduler takes snapshots and thins them out, each by an
// operation.
func TestSchedule(t *testing.T) {
	d := start(t, t.TempDir(), "-snapshot-every", "10ms", "-keep-snapshots", "2")
	all := d.stream("/api/tasks/events")
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	d.put("/api/pools/tank/files/a", "a")
	all.until("snapshots removed", func(op *task.Operation) bool {
		var r thinResult
		must(t, op.DecodeResult(&r))
		return op.Name == "thin tank" && op.State == task.StateDone && len(r.Removed) > 0
	})
	must(t, d.end(syscall.SIGTERM))

	d = start(t, d.dir)
	var want []string
	for cursor := ""; ; {
		var page struct {
			Tasks      []task.Operation
			NextCursor string `json:"next_cursor"`
		}
		d.do("GET", "/api/tasks/?limit=500&state=DONE&cursor="+cursor, "", 200, &page)
		for _, op := range page.Tasks { // newest first
			var r struct{ ID string }
			if op.Name == "snapshot tank" {
				must(t, op.DecodeResult(&r))
				want = append(want, r.ID)
			}
		}
		if cursor = page.NextCursor; cursor == "" {
			break
		}
	}
	got := d.snapshots("tank", true)
	slices.Reverse(got)
	if len(got) < 2 || len(got) >= len(want) || !slices.Equal(got, want[:len(got)]) {
		t.Errorf("the snapshots are %v, want some of the newest of %v", got, want)
	}
}
