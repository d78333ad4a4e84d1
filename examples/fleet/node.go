package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
	"github.com/mynt-nas/task/taskpg"
)

// A node runs its own operations and serves a page with those of all nodes.
type node struct {
	name string
	work time.Duration
	*task.Manager
}

// runNode runs a node until ctx is done.
func runNode(ctx context.Context, name string, c config) error {
	store, err := taskpg.Open(ctx, c.dsn, taskpg.WithNode(name), taskpg.WithLease(c.lease))
	if err != nil {
		return err
	}
	n := &node{name: name, work: c.work}
	opts := []task.Option{task.WithLogger(slog.Default().With("node", name))}
	if c.resume {
		opts = append(opts, task.WithResume(n.resume))
	}
	if n.Manager, err = task.New(store, opts...); err != nil {
		return errors.Join(err, store.Close())
	}
	err = n.serve(ctx, c.addr)
	bounded, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return errors.Join(err, n.CloseContext(bounded), store.Close())
}

// serve submits two operations and serves the page until ctx is done.
func (n *node) serve(ctx context.Context, addr string) error {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for _, pool := range []string{"tank", "backup"} {
		if _, err := n.scrub(fmt.Sprintf("scrub %s of %s", pool, n.name)); err != nil {
			return errors.Join(err, listener.Close())
		}
	}
	go n.follow(ctx)
	mux := http.NewServeMux()
	mux.Handle("/tasks/", http.StripPrefix("/tasks", taskhttp.Handler(n.Manager,
		taskhttp.Title("Tasks, seen by "+n.name),
		taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) { return n.scrub(op.Name) }))))
	mux.Handle("/{$}", http.RedirectHandler("/tasks/ui", http.StatusSeeOther))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	fmt.Printf("%s: process %d, http://%s/\n", n.name, os.Getpid(), listener.Addr())
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// follow watches all operations: while someone does, a manager recovers the operations of
// dead nodes.
func (n *node) follow(ctx context.Context) {
	for range n.Watch(ctx) {
	}
}

// A place is how far a scrub has got. It is the operation's metadata.
type place struct {
	Percent int `json:"percent"`
}

func (n *node) scrub(name string) (*task.Operation, error) {
	return n.Submit(name, n.scrubFrom(0), task.WithMetadata(place{}), task.WithUnique(name))
}

// resume continues from the stored place.
func (n *node) resume(op *task.Operation) (task.Func, []task.SubmitOption) {
	var at place
	if err := op.DecodeMetadata(&at); err != nil {
		return nil, nil
	}
	return n.scrubFrom(at.Percent), nil
}

// scrubFrom returns a function that does the rest of the work, which only waits.
func (n *node) scrubFrom(percent int) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		for at := percent; at < 100; at++ {
			update(at)
			err := errors.Join(task.SetMetadata(ctx, place{at}),
				task.SetMessage(ctx, fmt.Sprintf("block %d of 100, read by %s", at+1, n.name)))
			if err != nil {
				return nil, err
			}
			select {
			case <-time.After(n.work / 100):
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		return "no errors, ended by " + n.name, nil
	}
}
