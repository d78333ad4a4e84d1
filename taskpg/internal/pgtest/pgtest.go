//go:build unix

// Package pgtest starts PostgreSQL servers, poolers and proxies for tests. What it
// starts ends with the test, and with the test's process, whatever ends that.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// A Server is a PostgreSQL server in a temporary directory, which is reached by a
// Unix socket there.
type Server struct {
	t     testing.TB
	dir   string
	keep  bool // the process's own server: it outlives the test
	watch *process
}

// port is the same everywhere, since each socket has a directory of its own.
const port = "5432"

// Binary returns the path of a program of PostgreSQL, or "".
func Binary(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		if path := filepath.Join(strings.TrimSpace(string(out)), name); executable(path) {
			return path
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	for _, path := range append(found, "/usr/sbin/"+name, "/usr/local/pgsql/bin/"+name) {
		if executable(path) {
			return path
		}
	}
	return ""
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// need skips the test if a program is not installed, unless the environment
// says that nothing may be skipped.
func need(t testing.TB, name string) string {
	t.Helper()
	path := Binary(name)
	if path == "" && os.Getenv("TASKPG_NO_SKIP") != "" {
		t.Fatalf("%s is not installed", name)
	}
	if path == "" {
		t.Skipf("%s is not installed", name)
	}
	return path
}

// credential is that of another user where the test runs as root, which
// PostgreSQL refuses, and else nil.
var credential = sync.OnceValue(func() *syscall.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if errors.Join(err1, err2) == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	return nil
})

// tempDir makes a directory for that user. Its path is short, as that of a Unix
// socket must be.
func tempDir() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "pgtest-")
	if err == nil && credential() != nil {
		err = os.Chown(dir, int(credential().Uid), int(credential().Gid))
	}
	return dir, err
}

// A process runs until its standard input is closed, which it is when this
// process ends.
type process struct {
	cmd *exec.Cmd
	in  io.Closer
	log string // a file
}

// start runs a program under a shell that ends it with a signal once its own
// standard input ends, and then removes a directory, if that is not "".
func start(dir, signal, remove string, args ...string) (*process, error) {
	p := &process{log: dir + "/log"}
	script := `"$@" </dev/null & p=$!; cat >/dev/null; kill -` + signal + ` $p 2>/dev/null; wait $p; rm -rf "$0"`
	p.cmd = exec.Command("/bin/sh", append([]string{"-c", script, remove}, args...)...)
	p.cmd.Dir = dir
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential(), Setpgid: true}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return p, p.cmd.Start()
}

// end ends the program and waits for it.
func (p *process) end() {
	p.in.Close()
	p.cmd.Wait() // its exit status is that of a program that was ended
}

// run runs a program of PostgreSQL to its end.
func run(dir string, args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: credential()}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", args, err, out)
	}
	return nil
}

// newServer makes the files of a server, whose superuser is called postgres.
func newServer(t testing.TB) *Server {
	t.Helper()
	initdb := need(t, "initdb")
	need(t, "postgres")
	dir, err := tempDir()
	must(t, err)
	must(t, run(dir, initdb, "-D", dir+"/data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"))
	return &Server{t: t, dir: dir}
}

// New starts a server of the test's own. Each setting is a NAME=VALUE.
func New(t testing.TB, settings ...string) *Server {
	t.Helper()
	s := newServer(t)
	t.Cleanup(s.remove)
	s.Start(settings...)
	return s
}

func (s *Server) remove() {
	if s.watch != nil {
		s.watch.end()
	}
	os.RemoveAll(s.dir)
}

var (
	sharedMu sync.Mutex
	shared   *Server
	dbs      int
)

// Database returns the DSN of a new database on a server that the tests of this
// process share.
func Database(t testing.TB) string {
	t.Helper()
	sharedMu.Lock()
	defer sharedMu.Unlock()
	if shared == nil {
		s := newServer(t)
		s.keep = true
		s.Start("max_connections=200")
		shared = s
	}
	shared.t = t
	dbs++
	return shared.Database(fmt.Sprintf("test%d", dbs))
}

// Start starts the server, and waits until it accepts connections.
func (s *Server) Start(settings ...string) {
	s.t.Helper()
	args := []string{Binary("postgres"), "-D", s.dir + "/data", "-k", s.dir, "-p", port}
	for _, setting := range append([]string{"listen_addresses=", "fsync=off", "shared_buffers=32MB",
		"timezone=Asia/Kathmandu", "log_min_messages=warning"}, settings...) {
		args = append(args, "-c", setting)
	}
	remove := ""
	if s.keep {
		remove = s.dir
	}
	var err error
	s.watch, err = start(s.dir, "QUIT", remove, args...)
	must(s.t, err)
	if err := s.ready("template1"); err != nil {
		log, _ := os.ReadFile(s.watch.log)
		s.Stop("QUIT")
		s.t.Fatalf("PostgreSQL does not start: %v\n%s", err, log)
	}
}

// ready waits until the server accepts connections.
func (s *Server) ready(database string) (err error) {
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var c *pgx.Conn
		if c, err = pgx.Connect(context.Background(), s.DSN(database)); err == nil {
			return c.Close(context.Background())
		}
	}
	return err
}

// Signal sends a signal to the server's main process.
func (s *Server) Signal(signal syscall.Signal) {
	s.t.Helper()
	raw, err := os.ReadFile(s.dir + "/data/postmaster.pid")
	must(s.t, err)
	pid, err := strconv.Atoi(strings.SplitN(string(raw), "\n", 2)[0])
	must(s.t, err)
	must(s.t, syscall.Kill(pid, signal))
}

// Stop ends the server: INT closes connections, QUIT does what a crash does.
func (s *Server) Stop(signal string) {
	s.t.Helper()
	if signal == "INT" {
		must(s.t, run(s.dir, Binary("pg_ctl"), "-D", s.dir+"/data", "-m", "fast", "-w", "stop"))
	}
	s.watch.end() // by QUIT
	s.watch = nil
}

// DSN returns the connection string of a database.
func (s *Server) DSN(database string) string {
	return fmt.Sprintf("host=%s port=%s user=postgres dbname=%s sslmode=disable", s.dir, port, database)
}

// Database makes a database and returns its DSN.
func (s *Server) Database(name string, options ...string) string {
	s.t.Helper()
	Exec(s.t, s.DSN("template1"), "CREATE DATABASE "+name+" "+strings.Join(options, " "))
	return s.DSN(name)
}

// Exec runs statements on a connection of its own.
func Exec(t testing.TB, dsn string, stmts ...string) {
	t.Helper()
	c, err := pgx.Connect(context.Background(), dsn)
	must(t, err)
	defer c.Close(context.Background())
	for _, stmt := range stmts {
		_, err = c.Exec(context.Background(), stmt)
		must(t, err)
	}
}

// Value returns the value that a query selects.
func Value[T any](t testing.TB, dsn, query string, args ...any) (v T) {
	t.Helper()
	c, err := pgx.Connect(context.Background(), dsn)
	must(t, err)
	defer c.Close(context.Background())
	must(t, c.QueryRow(context.Background(), query, args...).Scan(&v))
	return v
}

// Pooler starts pgbouncer in a pool mode, session or transaction, in front of a
// database. It returns the DSN.
func Pooler(t testing.TB, dsn, mode string) string {
	t.Helper()
	bouncer := need(t, "pgbouncer")
	config, err := pgx.ParseConfig(dsn)
	must(t, err)
	dir, err := tempDir()
	must(t, err)
	ini := fmt.Sprintf(`[databases]
%s = host=%s port=%d user=postgres
[pgbouncer]
listen_addr =
listen_port = %s
unix_socket_dir = %s
auth_type = any
pool_mode = %s
max_client_conn = 200
default_pool_size = 30
ignore_startup_parameters = extra_float_digits
`, config.Database, config.Host, config.Port, port, dir, mode)
	must(t, os.WriteFile(dir+"/pgbouncer.ini", []byte(ini), 0o644))
	p, err := start(dir, "KILL", "", bouncer, dir+"/pgbouncer.ini")
	must(t, err)
	t.Cleanup(func() {
		p.end()
		if log, _ := os.ReadFile(p.log); t.Failed() {
			t.Logf("the pooler's log ends with\n%s", log[max(0, len(log)-2000):])
		}
		os.RemoveAll(dir)
	})
	s := &Server{t: t, dir: dir}
	if err := s.ready(config.Database); err != nil {
		t.Fatalf("pgbouncer does not start: %v", err)
	}
	return s.DSN(config.Database)
}

// Standby starts a copy of the server that follows it, under an application
// name by which synchronous_standby_names can call it.
func (s *Server) Standby(name string, settings ...string) *Server {
	s.t.Helper()
	dir, err := tempDir()
	must(s.t, err)
	standby := &Server{t: s.t, dir: dir}
	s.t.Cleanup(standby.remove)
	primary := fmt.Sprintf("host=%s port=%s user=postgres application_name=%s", s.dir, port, name)
	must(s.t, run(dir, Binary("pg_basebackup"), "-D", dir+"/data", "-d", primary, "-R", "-X", "stream", "-c", "fast"))
	standby.Start(slices.Concat([]string{"hot_standby=on"}, settings)...)
	return standby
}

// Promote makes a standby a primary.
func (s *Server) Promote() {
	s.t.Helper()
	must(s.t, run(s.dir, Binary("pg_ctl"), "-D", s.dir+"/data", "-w", "promote"))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Dir returns the directory that has the server's socket.
func (s *Server) Dir() string { return s.dir }
