//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/mynt-nas/task/taskpg"
)

// startPostgres starts a server in a temporary directory and returns the connection string
// of a database. The server and its directory are removed by stop, or when this process
// ends for any reason.
func startPostgres(ctx context.Context) (dsn string, stop func(), err error) {
	as, err := serverUser()
	if err != nil {
		return "", nil, err
	}
	dir, err := os.MkdirTemp("", "fleet-") // short, as required for the path of a Unix socket
	if err != nil {
		return "", nil, err
	}
	remove := func() { os.RemoveAll(dir) }
	if as != nil {
		err = os.Chown(dir, int(as.Uid), int(as.Gid))
	}
	data := filepath.Join(dir, "data")
	initdb := exec.CommandContext(ctx, binary("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N")
	initdb.Dir, initdb.SysProcAttr = dir, &syscall.SysProcAttr{Credential: as}
	if err == nil {
		var out []byte
		if out, err = initdb.CombinedOutput(); err != nil {
			err = fmt.Errorf("initdb: %w %s", err, out)
		}
	}
	if err != nil {
		remove()
		return "", nil, err
	}
	end, err := serve(dir, data, as)
	if err != nil {
		remove()
		return "", nil, err
	}
	stop = func() { end(); remove() }
	dsn = fmt.Sprintf("host=%s user=postgres dbname=postgres sslmode=disable", dir)
	if err := ready(ctx, dsn); err != nil {
		stop()
		return "", nil, err
	}
	return dsn, stop, nil
}

// serve starts the server through a shell that outlives this process. When the shell's
// standard input ends, the shell stops the server and removes the directory.
func serve(dir, data string, as *syscall.Credential) (end func(), err error) {
	const script = `"$@" </dev/null & cat >/dev/null; kill -INT $!; wait; rm -rf "$0"`
	server := exec.Command("/bin/sh", "-c", script, dir, binary("postgres"), "-D", data, "-k", dir,
		"-c", "listen_addresses=", "-c", "log_min_messages=fatal")
	server.Dir = dir
	server.SysProcAttr = &syscall.SysProcAttr{Credential: as, Setpgid: true} // Ctrl-C must reach the nodes first
	in, err := server.StdinPipe()
	if err == nil {
		err = server.Start()
	}
	return func() { in.Close(); server.Wait() }, err
}

// ready waits until the server accepts connections.
func ready(ctx context.Context, dsn string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		store, err := taskpg.Open(ctx, dsn)
		if err == nil {
			return store.Close()
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// binary returns the path of a PostgreSQL program, or just its name if not found.
func binary(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if len(found) == 0 {
		return name
	}
	return found[len(found)-1]
}

// serverUser returns another user to run the server if this process is root, because
// PostgreSQL refuses to run as root. Otherwise it returns nil.
func serverUser() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(err1, err2)
	}
	return nil, errors.New("it does not run as root, and there is no user postgres or nobody")
}
