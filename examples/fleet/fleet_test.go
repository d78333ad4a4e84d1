//go:build unix

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// TestMain makes the test binary run the program, or one of its nodes, if the environment
// says so.
func TestMain(m *testing.M) {
	if os.Getenv("FLEET_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// A running is a running node.
type running struct {
	t    *testing.T
	name string
	pid  int
	url  string // of its operations
}

// start starts the program. It returns the program, its three nodes, and the temporary
// directory that it uses.
func start(t *testing.T, args ...string) (program *exec.Cmd, nodes map[string]*running, dir string) {
	if _, err := exec.LookPath(binary("initdb")); err != nil {
		if os.Getenv("TASKPG_NO_SKIP") != "" {
			t.Fatal("PostgreSQL is not installed")
		}
		t.Skip("PostgreSQL is not installed")
	}
	dir, err := os.MkdirTemp("", "f")
	if err == nil {
		err = os.Chmod(dir, 0o777|os.ModeSticky) // like other temporary directories, because the server may run as another user
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program = exec.Command(os.Args[0], append([]string{"-addr", "127.0.0.1:0", "-lease", "1s"}, args...)...)
	program.Env = append(os.Environ(), "FLEET_MAIN=1", "TMPDIR="+dir)
	program.Stderr = t.Output()
	out, err := program.StdoutPipe()
	if err == nil {
		err = program.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		program.Process.Kill()
		program.Wait()
	})
	nodes = make(map[string]*running)
	for lines := bufio.NewScanner(out); len(nodes) < 3; {
		if !lines.Scan() {
			t.Fatalf("the program ended before its nodes had started: %v", lines.Err())
		}
		n := &running{t: t}
		name, rest, _ := strings.Cut(lines.Text(), ":")
		if _, err := fmt.Sscanf(rest, " process %d, %s", &n.pid, &n.url); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		n.name, n.url = name, n.url+"tasks/"
		nodes[name] = n
	}
	return program, nodes, dir
}

// do sends a request to the node and decodes the response.
func (n *running) do(method, path string, into any) {
	n.t.Helper()
	req, err := http.NewRequest(method, n.url+path, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	client := http.Client{Timeout: time.Minute}
	res, err := client.Do(req)
	if err != nil {
		n.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode >= 300 {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	if err == nil && into != nil {
		err = json.Unmarshal(body, into)
	}
	if err != nil {
		n.t.Fatalf("%s %s of %s: %v", method, path, n.name, err)
	}
}

// operations returns the operations of all nodes, as shown by this node.
func (n *running) operations(query string) []*task.Operation {
	n.t.Helper()
	var list struct{ Tasks []*task.Operation }
	n.do("GET", "?limit=100&"+query, &list)
	return list.Tasks
}

// get returns an operation as shown by the node.
func (n *running) get(id string) *task.Operation {
	n.t.Helper()
	var op task.Operation
	n.do("GET", id, &op)
	return &op
}

// wait waits until an operation has finished, and returns it as shown by the node.
func (n *running) wait(id string) *task.Operation {
	n.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		var op task.Operation
		if n.do("GET", id+"/wait?timeout=10s", &op); op.State.Finished() {
			return &op
		}
	}
	n.t.Fatalf("%s has not ended within a minute: %+v", id, n.get(id))
	return nil
}

// of returns the operations that a node runs.
func of(name string, ops []*task.Operation) (own []*task.Operation) {
	for _, op := range ops {
		if strings.HasPrefix(op.Owner, name+"/") {
			own = append(own, op)
		}
	}
	return own
}

// until waits until so returns true.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !so(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so within a minute: %s", what)
		}
	}
}

// TestFleet checks that each node shows and cancels the operations of all nodes, and that
// the operations of a killed node are found interrupted.
func TestFleet(t *testing.T) {
	t.Parallel()
	program, nodes, dir := start(t, "-work", "1h")
	for _, n := range nodes {
		until(t, n.name+" shows two running operations of each node", func() bool {
			ops := n.operations("state=RUNNING")
			return len(of("node1", ops)) == 2 && len(of("node2", ops)) == 2 && len(of("node3", ops)) == 2
		})
	}
	ops := nodes["node1"].operations("")

	cancelled := of("node3", ops)[0]
	nodes["node2"].do("POST", cancelled.ID+"/cancel", nil)
	for _, n := range nodes {
		if op := n.wait(cancelled.ID); op.State != task.StateCancelled {
			t.Errorf("%s shows as cancelled: %+v", n.name, op)
		}
	}

	kill(t, nodes["node1"].pid)
	for _, name := range []string{"node2", "node3"} {
		for _, op := range of("node1", ops) {
			if op := nodes[name].wait(op.ID); op.State != task.StateFailed || !op.Interrupted() {
				t.Errorf("%s shows of the killed one: %+v", name, op)
			}
		}
	}
	for _, op := range of("node2", ops) {
		if op := nodes["node3"].get(op.ID); op.State != task.StateRunning {
			t.Errorf("of a living node: %+v", op)
		}
	}

	if err := program.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := program.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	gone(t, dir, nodes)
}

// TestResume checks that other nodes continue the operations of a killed node, and that
// nothing is left when the first process is killed.
func TestResume(t *testing.T) {
	t.Parallel()
	program, nodes, dir := start(t, "-work", "10s", "-resume")
	var ops []*task.Operation
	until(t, "the operations of node1 have a place", func() bool {
		ops = of("node1", nodes["node2"].operations("state=RUNNING"))
		return len(ops) == 2 && ops[0].Progress > 0 && ops[1].Progress > 0
	})
	kill(t, nodes["node1"].pid)
	for _, op := range ops {
		switch got := nodes["node2"].wait(op.ID); {
		case got.State != task.StateDone:
			t.Errorf("not resumed: %+v", got)
		case got.Result == "no errors, ended by node1", len(of("node1", []*task.Operation{got})) > 0:
			t.Errorf("it did not go on elsewhere: %+v", got)
		case !got.CreatedAt.Equal(op.CreatedAt):
			t.Errorf("another operation: %+v", got)
		}
	}
	kill(t, program.Process.Pid)
	program.Wait()
	gone(t, dir, nodes)
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// gone waits until the nodes and the database are gone.
func gone(t *testing.T, dir string, nodes map[string]*running) {
	t.Helper()
	for _, n := range nodes {
		until(t, n.name+" has ended", func() bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.pid))
			return syscall.Kill(n.pid, 0) != nil || err == nil && strings.Contains(string(stat), ") Z ") // a zombie has no parent waiting for it
		})
	}
	until(t, "the database has gone", func() bool {
		left, err := filepath.Glob(filepath.Join(dir, "fleet-*"))
		return err == nil && len(left) == 0
	})
}
