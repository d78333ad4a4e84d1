package task_test

import (
	"fmt"
	"io"
	"net/rpc"
	"net/rpc/jsonrpc"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// procRoleVar names the environment variable that has the test binary play a
// role of procRoles instead of running tests.
const procRoleVar = "TASK_TEST_ROLE"

// procRoles are the objects whose methods a process offers to the test that
// started it.
var procRoles = map[string]func() any{
	"manager": func() any { return &procManager{told: make(map[string]chan task.Operation)} },
}

func TestMain(m *testing.M) {
	if role := os.Getenv(procRoleVar); role != "" {
		procServe(procRoles[role]())
		return
	}
	code := m.Run()
	if code == 0 {
		if left := testos.Left(10 * time.Second); left != "" {
			fmt.Fprintf(os.Stderr, "goroutines left by tests:\n\n%s\n", left)
			code = 1
		}
	}
	os.Exit(code)
}

// procServe answers calls that come in by way of standard input until that is
// closed, by whatever end of the test.
func procServe(role any) {
	server := rpc.NewServer()
	if err := server.RegisterName("proc", role); err != nil {
		panic(err)
	}
	server.ServeCodec(jsonrpc.NewServerCodec(procPipe{procStdin{}, os.Stdout}))
}

// procStdin ends the process with its input, also if calls are under way.
type procStdin struct{}

func (procStdin) Read(p []byte) (int, error) {
	n, err := os.Stdin.Read(p)
	if err != nil {
		os.Exit(0)
	}
	return n, nil
}

func (procStdin) Close() error { return nil }

// A procPipe is a connection made of two files.
type procPipe struct {
	io.ReadCloser
	io.Writer
}

// A proc is a process that a test has started.
type proc struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Closer // the process's standard input; nil once it has ended
	rpc *rpc.Client
}

// procStart starts a process, which ends with the test at the latest.
func procStart(t *testing.T, role string) *proc {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), procRoleVar+"="+role, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	recoveryMust(t, err)
	out, err := cmd.StdoutPipe()
	recoveryMust(t, err)
	recoveryMust(t, cmd.Start())
	p := &proc{t: t, cmd: cmd, in: in, rpc: jsonrpc.NewClient(procPipe{out, in})}
	t.Cleanup(p.end)
	return p
}

// call calls a method of the process's role.
func (p *proc) call(method string, args, reply any) {
	p.t.Helper()
	recoveryMust(p.t, p.rpc.Call("proc."+method, args, reply))
}

// procAll calls a method of all processes at the same time.
func procAll[R any](t *testing.T, procs []*proc, method string, args any) []R {
	t.Helper()
	replies := make([]R, len(procs))
	calls := make([]*rpc.Call, len(procs))
	for i, p := range procs {
		calls[i] = p.rpc.Go("proc."+method, args, &replies[i], make(chan *rpc.Call, 1))
	}
	for _, call := range calls {
		<-call.Done
		recoveryMust(t, call.Error)
	}
	return replies
}

// kill ends the process with SIGKILL.
func (p *proc) kill() {
	p.t.Helper()
	recoveryMust(p.t, p.cmd.Process.Kill())
	p.in = nil
	p.cmd.Wait() // which says that it was killed
	p.rpc.Close()
}

// end ends the process by hanging up. Its exit status tells of data races.
func (p *proc) end() {
	if p.in == nil {
		return
	}
	p.in.Close()
	p.in = nil
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("process ended with %v", err)
	}
	p.rpc.Close()
}

// procOwnerFiles returns how many owner files lie beside a database.
func procOwnerFiles(t *testing.T, path string) int {
	t.Helper()
	files, err := filepath.Glob(path + "-owner-*")
	recoveryMust(t, err)
	return len(files)
}
