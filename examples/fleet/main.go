// Fleet runs three nodes on this machine, each in its own process, with a shared history in
// a PostgreSQL database.
//
//	fleet [-dsn DSN] [-addr HOST:PORT] [-lease DURATION] [-work DURATION] [-resume]
//
// Without -dsn it starts its own PostgreSQL, if one is installed, and removes it when done.
// Each node prints its process ID and the address of its web page, which shows and cancels
// the operations of all nodes. Kill a node with kill -9 and watch the page of another one:
// after 1 to 1 1/3 leases, plus up to a second, its operations are FAILED or, with -resume,
// continue on other nodes from the place they have stored.
//
// Ctrl-C ends all nodes. They also end when the first process ends for any reason.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// A config holds the configuration that the nodes share.
type config struct {
	dsn, addr   string
	lease, work time.Duration
	resume      bool
}

func main() {
	var c config
	flag.StringVar(&c.dsn, "dsn", "", "use the PostgreSQL database with this connection `string`")
	flag.StringVar(&c.addr, "addr", "127.0.0.1:8080", "`address` of the first node's page; the others have the next ports, or with port 0 any")
	flag.DurationVar(&c.lease, "lease", 3*time.Second, "a dead node is noticed after this time, at least 1s")
	flag.DurationVar(&c.work, "work", time.Minute, "each operation takes this time")
	flag.BoolVar(&c.resume, "resume", false, "go on with the operations of a dead node")
	node := flag.String("node", "", "run only the node with this `name`, until standard input ends; needs -dsn")
	flag.Parse()
	err := errors.New("no arguments are expected beside flags, and -node needs -dsn")
	if flag.NArg() == 0 && (*node == "" || c.dsn != "") {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		if *node == "" {
			err = fleet(ctx, c)
		} else {
			err = runNode(endWith(ctx, os.Stdin), *node, c)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// endWith returns a context that is also done when r ends.
func endWith(ctx context.Context, r io.Reader) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		io.Copy(io.Discard, r)
	}()
	return ctx
}

// fleet runs three nodes until ctx is done or all have ended.
func fleet(ctx context.Context, c config) error {
	if c.dsn == "" {
		dsn, stop, err := startPostgres(ctx)
		if err != nil {
			return fmt.Errorf("no PostgreSQL: %w; name one with -dsn", err)
		}
		defer stop() // after the nodes
		c.dsn = dsn
	}
	var nodes sync.WaitGroup
	defer nodes.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range 3 {
		addr, err := nextPort(c.addr, i)
		if err != nil {
			return err
		}
		if err := startNode(ctx, &nodes, fmt.Sprint("node", i+1), addr, c); err != nil {
			return err
		}
	}
	nodes.Wait()
	return nil
}

// startNode starts the process of a node. It ends when its standard input does, that is,
// with ctx or with this process.
func startNode(ctx context.Context, nodes *sync.WaitGroup, name, addr string, c config) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "-node", name, "-addr", addr, "-dsn", c.dsn,
		"-lease", c.lease.String(), "-work", c.work.String(), fmt.Sprint("-resume=", c.resume))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	cmd.Cancel, cmd.WaitDelay = in.Close, 30*time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	nodes.Go(func() {
		err := cmd.Wait()
		if ctx.Err() == nil {
			fmt.Fprintf(os.Stderr, "fleet: %s has ended: %v\n", name, err)
		}
	})
	return nil
}

// nextPort returns addr with n added to its port, unless the port is 0.
func nextPort(addr string, n int) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", fmt.Errorf("the port of %s: %w", addr, err)
	}
	if p > 0 {
		p += uint64(n)
	}
	return net.JoinHostPort(host, strconv.FormatUint(p, 10)), nil
}
