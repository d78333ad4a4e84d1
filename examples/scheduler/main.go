// Scheduler copies a directory at regular times, each copy as one operation of package
// task.
//
//	scheduler [-db FILE] [-every DURATION] DIR SNAPSHOTS
//
// A snapshot is named after its time, and its operation after the snapshot. WithID thus
// lets it run at most once, however often the program is started, even twice at the same
// time. A snapshot interrupted by a kill -9 or a power failure is taken again under another
// ID when the program is next started. Snapshots that were due while the program was not
// running are skipped.
//
// Ctrl-C ends the program. A snapshot interrupted by it is also taken again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/mynt-nas/task"
)

func main() {
	db := flag.String("db", "scheduler.db", "keep the operations in this SQLite `FILE`")
	every := flag.Duration("every", time.Hour, "take a snapshot each time this has passed, at least 1ms")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "usage: scheduler [-db FILE] [-every DURATION] DIR SNAPSHOTS\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 2 || *every < time.Millisecond {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := schedule(ctx, *db, *every, flag.Arg(0), flag.Arg(1)); err != nil {
		fmt.Fprintln(os.Stderr, "scheduler:", err)
		os.Exit(1)
	}
}

// schedule takes snapshots until ctx is done.
func schedule(ctx context.Context, db string, every time.Duration, dir, snapshots string) error {
	if err := os.MkdirAll(snapshots, 0o700); err != nil {
		return err
	}
	store, err := task.OpenSQLite(db)
	if err != nil {
		return err
	}
	m, err := task.New(store) // finds interrupted operations
	if err != nil {
		return errors.Join(err, store.Close())
	}
	s := &scheduler{m, dir, snapshots}
	err = s.run(ctx, every)
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		err = nil
	}
	return errors.Join(err, m.Close(), store.Close())
}

type scheduler struct {
	m              *task.Manager
	dir, snapshots string
}

func (s *scheduler) run(ctx context.Context, every time.Duration) error {
	newest, err := s.m.List(1, 0)
	if err != nil {
		return err
	}
	for _, op := range newest { // the newest one may have been interrupted
		var slot time.Time
		if err := op.DecodeMetadata(&slot); err != nil {
			return err
		}
		if err := s.take(ctx, slot); err != nil {
			return err
		}
	}
	for {
		slot := time.Now().UTC().Truncate(every)
		if err := s.take(ctx, slot); err != nil {
			return err
		}
		select {
		case <-time.After(time.Until(slot.Add(every))):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// take waits until the snapshot for a time has been taken or has failed. An interrupted
// attempt is followed by another one with a new ID.
func (s *scheduler) take(ctx context.Context, slot time.Time) error {
	name := slot.Format("20060102T150405.000Z")
	for try := 1; ; try++ {
		id := fmt.Sprintf("%s.%d", name, try)
		op, err := s.m.Submit("snapshot "+name, s.snapshot(name, id), task.WithID(id), task.WithMetadata(slot))
		if err != nil && !errors.Is(err, task.ErrExists) {
			return err
		}
		ours := err == nil
		if op, err = s.m.Wait(ctx, op.ID); err != nil {
			return err
		}
		if ours {
			fmt.Println(op.ID, op.State, op.Error)
		}
		if !op.Interrupted() {
			return nil
		}
	}
}

// snapshot returns a Func that copies the directory. An incomplete copy is never visible as
// a snapshot.
func (s *scheduler) snapshot(name, id string) task.Func {
	return func(ctx context.Context, _ func(int)) (any, error) {
		final, partial := filepath.Join(s.snapshots, name), filepath.Join(s.snapshots, "partial-"+id)
		if _, err := os.Stat(final); err == nil {
			return "the interrupted try had taken it", nil
		}
		if err := os.CopyFS(partial, cancelFS{ctx, os.DirFS(s.dir)}); err != nil {
			return nil, errors.Join(err, os.RemoveAll(partial))
		}
		if err := os.Rename(partial, final); err != nil {
			return nil, err
		}
		return "taken", s.clean(name)
	}
}

// clean removes what interrupted attempts have left.
func (s *scheduler) clean(name string) error {
	left, err := filepath.Glob(filepath.Join(s.snapshots, "partial-"+name+".*"))
	for _, path := range left {
		err = errors.Join(err, os.RemoveAll(path))
	}
	return err
}

// A cancelFS opens no more files once its context is done.
type cancelFS struct {
	ctx context.Context
	fs.FS
}

func (f cancelFS) Open(name string) (fs.File, error) {
	if f.ctx.Err() != nil {
		return nil, context.Cause(f.ctx)
	}
	return f.FS.Open(name)
}
