package testkit

import (
	"io"
	"net/rpc"
	"net/rpc/jsonrpc"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/mynt-nas/task/internal/testos"
)

// roleVar names the environment variable that makes a test binary play a role instead
// of running tests.
const roleVar = "TASK_TEST_ROLE"

// Main is a TestMain. It does the work of [testos.Run]. In a process started by
// [StartProcess], it instead serves the methods of the object that the role's function
// returns, as package net/rpc does.
func Main(m *testing.M, roles map[string]func() any) {
	if role := os.Getenv(roleVar); role != "" {
		serve(roles[role]())
		return
	}
	os.Exit(testos.Run(m))
}

// serve answers calls from standard input until that is closed, which happens when the
// test ends, however it ends.
func serve(role any) {
	server := rpc.NewServer()
	if err := server.RegisterName("role", role); err != nil {
		panic(err)
	}
	server.ServeCodec(jsonrpc.NewServerCodec(pipe{stdin{}, os.Stdout}))
}

// stdin ends the process when standard input ends, even during a call.
type stdin struct{}

func (stdin) Read(p []byte) (int, error) {
	n, err := os.Stdin.Read(p)
	if err != nil {
		os.Exit(0)
	}
	return n, nil
}

func (stdin) Close() error { return nil }

// A pipe is a connection made of two files.
type pipe struct {
	io.ReadCloser
	io.Writer
}

// A Process is a child process that runs the test binary.
type Process struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.Closer // the process's standard input; nil once it has ended
	rpc *rpc.Client
}

// StartProcess starts a process that plays a role of [Main]. The process ends with the
// test at the latest.
func StartProcess(t testing.TB, role string) *Process {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), roleVar+"="+role, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	Must(t, err)
	out, err := cmd.StdoutPipe()
	Must(t, err)
	Must(t, cmd.Start())
	p := &Process{t: t, cmd: cmd, in: in, rpc: jsonrpc.NewClient(pipe{out, in})}
	t.Cleanup(p.End)
	return p
}

// Call calls a method of the process's role.
func (p *Process) Call(method string, args, reply any) {
	p.t.Helper()
	Must(p.t, p.rpc.Call("role."+method, args, reply))
}

// CallAll calls a method of several processes at the same time.
func CallAll[R any](t testing.TB, processes []*Process, method string, args any) []R {
	t.Helper()
	replies := make([]R, len(processes))
	calls := make([]*rpc.Call, len(processes))
	for i, p := range processes {
		calls[i] = p.rpc.Go("role."+method, args, &replies[i], make(chan *rpc.Call, 1))
	}
	for _, call := range calls {
		<-call.Done
		Must(t, call.Error)
	}
	return replies
}

// Kill ends the process with SIGKILL.
func (p *Process) Kill() {
	p.t.Helper()
	Must(p.t, p.cmd.Process.Kill())
	p.in = nil
	p.cmd.Wait() // the error only says that it was killed
	p.rpc.Close()
}

// End ends the process by closing its standard input. Its exit status shows whether
// there was a data race.
func (p *Process) End() {
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

// OwnerFiles returns the number of owner files beside a database.
func OwnerFiles(t testing.TB, path string) int {
	t.Helper()
	files, err := filepath.Glob(path + "-owner-*")
	Must(t, err)
	return len(files)
}

// Signal sends a signal to the process.
func (p *Process) Signal(signal os.Signal) {
	p.t.Helper()
	Must(p.t, p.cmd.Process.Signal(signal))
}
