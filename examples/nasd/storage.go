package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/mynt-nas/task"
)

// A storage is the storage service. Its pools are directories. Whatever takes
// time it submits to the task manager and returns as an operation.
//
// On one pool, one operation runs at a time, in the order of submission: each is
// submitted with the lock of its pool, a replication with those of both.
type storage struct {
	pools *os.Root // nothing that is reached by way of it is outside of it
	tasks *task.Manager
}

// An about is the metadata of an operation.
type about struct {
	Kind string `json:"kind"`           // create, scrub, accept, replicate, snapshot or thin
	Pool string `json:"pool"`           // which it is about
	To   string `json:"to,omitempty"`   // the pool that it writes to, if that is another one
	File string `json:"file,omitempty"` // which it is at
}

// openStorage opens the storage service in the directory data, and removes
// what writers that were killed have left.
func openStorage(data string, m *task.Manager) (*storage, error) {
	dir := filepath.Join(data, "pools")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &storage{pools: root, tasks: m}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		root.Close()
		return nil, err
	}
	for _, e := range entries {
		if !validName.MatchString(e.Name()) {
			continue
		}
		p, err := s.open(e.Name())
		if err == nil {
			err = errors.Join(p.root.RemoveAll(incoming), p.files.RemoveAll(incoming))
			p.close()
		}
		if err != nil { // one pool in trouble must not keep the others away
			slog.Error("pool in trouble", "pool", e.Name(), "err", err)
		}
	}
	return s, nil
}

// create makes a new pool.
func (s *storage) create(name string) (*task.Operation, error) {
	if err := s.mustBeFree(name); err != nil {
		return nil, err
	}
	return s.submit(about{Kind: "create", Pool: name}, func(ctx context.Context, update func(int)) (any, error) {
		return nil, s.makePool(ctx, name, update)
	})
}

// scrub reads all files of a pool and compares them with their checksums.
func (s *storage) scrub(name string) (*task.Operation, error) {
	return s.submitOn(about{Kind: "scrub", Pool: name}, func(ctx context.Context, p *pool, w *worker) (any, error) {
		known, err := p.manifest()
		if err != nil {
			return nil, err
		}
		return p.scrub(ctx, w, known)
	})
}

// accept makes new checksums of all files of a pool, whatever they hold.
func (s *storage) accept(name string) (*task.Operation, error) {
	return s.submitOn(about{Kind: "accept", Pool: name}, func(ctx context.Context, p *pool, w *worker) (any, error) {
		return p.scrub(ctx, w, nil)
	})
}

// replicate copies what has changed in one pool to another.
func (s *storage) replicate(name, to string) (*task.Operation, error) {
	if name == to {
		return nil, inputError("a pool can't be replicated to itself")
	}
	if err := s.mustExist(to); err != nil {
		return nil, err
	}
	return s.submitOn(about{Kind: "replicate", Pool: name, To: to}, func(ctx context.Context, p *pool, w *worker) (any, error) {
		target, err := s.open(to)
		if err != nil {
			return nil, err
		}
		defer target.close()
		return p.replicate(ctx, w, target)
	})
}

// snapshot takes a snapshot of a pool.
func (s *storage) snapshot(name string) (*task.Operation, error) {
	return s.submitOn(about{Kind: "snapshot", Pool: name}, func(ctx context.Context, p *pool, w *worker) (any, error) {
		return p.snapshot(ctx, w)
	})
}

// thin removes the snapshots of a pool that need not be kept.
func (s *storage) thin(name string, keep int) (*task.Operation, error) {
	return s.submitOn(about{Kind: "thin", Pool: name}, func(ctx context.Context, p *pool, w *worker) (any, error) {
		return p.thin(ctx, w, keep)
	})
}

// submitOn submits an operation on a pool that there is.
func (s *storage) submitOn(a about, fn func(context.Context, *pool, *worker) (any, error)) (*task.Operation, error) {
	if err := s.mustExist(a.Pool); err != nil {
		return nil, err
	}
	return s.submit(a, func(ctx context.Context, update func(int)) (any, error) {
		p, err := s.open(a.Pool)
		if err != nil {
			return nil, err
		}
		defer p.close()
		return fn(ctx, p, &worker{about: a, update: update})
	})
}

func (s *storage) submit(a about, fn task.Func) (*task.Operation, error) {
	name := a.Kind + " " + a.Pool
	opts := []task.SubmitOption{task.WithMetadata(a), task.WithLock("pool:" + a.Pool)}
	if a.To != "" {
		name += " to " + a.To
		opts = append(opts, task.WithLock("pool:"+a.To))
	}
	return s.tasks.Submit(name, fn, opts...)
}

// A pool is an open pool.
type pool struct {
	root  *os.Root
	files *os.Root // another one: no link among the files leads to the manifest
}

const (
	filesDir     = "files"
	snapshotsDir = "snapshots"
	manifestFile = "manifest"
)

// validName is for names that every file system keeps apart.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return inputError(fmt.Sprintf("pool name %q: it must have 1 to 63 of a-z, 0-9, _ and -, a letter or digit first", name))
	}
	return nil
}

// open opens a pool. Close it.
func (s *storage) open(name string) (*pool, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	root, err := s.pools.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("pool %q: %w", name, err)
	}
	files, err := root.OpenRoot(filesDir)
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("pool %q: %w", name, err)
	}
	return &pool{root: root, files: files}, nil
}

func (p *pool) close() {
	p.files.Close()
	p.root.Close()
}

func (s *storage) mustExist(name string) error {
	p, err := s.open(name)
	if err != nil {
		return err
	}
	p.close()
	return nil
}

// mustBeFree checks that a new pool may get a name.
func (s *storage) mustBeFree(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	_, err := s.pools.Lstat(name)
	switch {
	case err == nil:
		return alreadyError(name)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	default:
		return nil
	}
}

// An alreadyError is a name that something has, be it a pool or not.
type alreadyError string

func (e alreadyError) Error() string        { return "there is already something called " + string(e) }
func (e alreadyError) Is(target error) bool { return target == fs.ErrExist }

// names returns the names of all pools. What else is among them is none.
func (s *storage) names() ([]string, error) {
	names := []string{}
	entries, err := fs.ReadDir(s.pools.FS(), ".")
	for _, e := range entries {
		if e.IsDir() && s.mustExist(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// makePool makes a pool under another name first, so that none is ever seen
// half made.
func (s *storage) makePool(ctx context.Context, name string, update func(int)) error {
	temp := ".creating-" + name
	if err := s.pools.RemoveAll(temp); err != nil { // by one that was killed
		return err
	}
	defer s.pools.RemoveAll(temp)
	for _, dir := range []string{temp, temp + "/" + filesDir, temp + "/" + snapshotsDir} {
		if err := s.pools.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	update(30)
	root, err := s.pools.OpenRoot(temp)
	if err != nil {
		return err
	}
	err = (&pool{root: root}).saveManifest(manifest{})
	root.Close()
	if err != nil {
		return err
	}
	update(60)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := s.mustBeFree(name); err != nil { // since it was asked for
		return err
	}
	if err := s.pools.Rename(temp, name); err != nil {
		return err
	}
	return syncDir(s.pools, ".")
}

// snapshots returns the IDs of all snapshots of a pool, the oldest first.
func (s *storage) snapshots(name string) ([]string, error) {
	p, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer p.close()
	return p.snapshots()
}

// put stores what r gives as a file of the pool: all of it or nothing. As with
// any other program that writes there, operations may run on the pool.
func (p *pool) put(ctx context.Context, name string, r io.Reader) error {
	path, err := localPath(name)
	if err != nil {
		return err
	}
	if info, err := p.files.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s: no file, and yet %w", name, fs.ErrExist)
	}
	w := new(worker)
	err = replace(p.files, path, meta{perm: 0o644}, func(f *os.File) error {
		_, err := w.copy(ctx, f, r)
		return err
	})
	if err != nil {
		return err
	}
	return syncParents(p.files, path)
}

// localPath returns the path of a file in a pool as this system writes it. What
// it can't rule out here, links to elsewhere, os.Root does.
func localPath(name string) (string, error) {
	path, err := filepath.Localize(name)
	if err != nil || name == "." || name == incoming || strings.HasPrefix(name, incoming+"/") {
		return "", inputError(fmt.Sprintf("%q is no name for a file in a pool", name))
	}
	return path, nil
}

// An inputError is about what a client asked for.
type inputError string

func (e inputError) Error() string { return string(e) }
