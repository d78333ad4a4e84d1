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

// A storage is the storage service. Its pools are directories. It submits long work to the
// task manager and returns the operation.
//
// Each pool runs one operation at a time, in order of submission: an operation is submitted
// with the lock of its pool, a replication with the locks of both pools. An operation that
// is already waiting or running is not submitted again.
type storage struct {
	pools *os.Root // confines all access to files
	tasks *task.Manager

	uploads uploadSet
}

// An about is the metadata of an operation.
type about struct {
	Kind      string `json:"kind"`                // create, upload, scrub, accept, replicate, snapshot, thin, restore or delete
	Pool      string `json:"pool"`                // the pool it works on
	To        string `json:"to,omitempty"`        // the pool it writes to, if different
	Keep      int    `json:"keep,omitempty"`      // how many snapshots thin keeps
	Place     *place `json:"place,omitempty"`     // how far a scrub has got
	Automatic bool   `json:"automatic,omitempty"` // whether the scheduler takes the snapshot
	Snapshot  string `json:"snapshot,omitempty"`  // the ID of the snapshot that restore reads
	Path      string `json:"path,omitempty"`      // the file that is restored or stored
}

// openStorage opens the storage service in the directory data, removes the incomplete files
// of killed writers and finishes the removal of pools. The caller must then set tasks to a
// manager, which may call resume and run the functions it returns.
func openStorage(data string) (*storage, error) {
	dir := filepath.Join(data, "pools")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &storage{pools: root}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		root.Close()
		return nil, err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), deleting) {
			if err := root.RemoveAll(e.Name()); err != nil {
				slog.Error("deleted pool not removed", "dir", e.Name(), "err", err)
			}
		}
		if !validName.MatchString(e.Name()) {
			continue
		}
		p, err := s.open(e.Name())
		if err == nil {
			err = errors.Join(p.root.RemoveAll(incoming), p.files.RemoveAll(incoming))
			p.close()
		}
		if err != nil { // a broken pool must not affect the others
			slog.Error("pool cannot be opened", "pool", e.Name(), "err", err)
		}
	}
	return s, nil
}

// create creates a new pool.
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
	return s.submitOn(about{Kind: "scrub", Pool: name})
}

// accept records new checksums of all files of a pool, whatever they contain.
func (s *storage) accept(name string) (*task.Operation, error) {
	return s.submitOn(about{Kind: "accept", Pool: name})
}

// replicate copies the changed files of one pool to another.
func (s *storage) replicate(name, to string) (*task.Operation, error) {
	if name == to {
		return nil, inputError("a pool can't be replicated to itself")
	}
	if err := s.mustExist(to); err != nil {
		return nil, err
	}
	return s.submitOn(about{Kind: "replicate", Pool: name, To: to})
}

// snapshot takes a snapshot of a pool.
func (s *storage) snapshot(name string) (*task.Operation, error) {
	return s.submitOn(about{Kind: "snapshot", Pool: name})
}

// autoSnapshot is snapshot for the scheduler.
func (s *storage) autoSnapshot(name, id string) (*task.Operation, error) {
	return s.submitOn(about{Kind: "snapshot", Pool: name, Automatic: true}, task.WithID(id))
}

// restore replaces a file of a pool with the one in a snapshot.
func (s *storage) restore(name, id, path string) (*task.Operation, error) {
	if _, err := localPath(path); err != nil {
		return nil, err
	}
	p, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer p.close()
	if err := p.mustHave(id, path); err != nil {
		return nil, err
	}
	return s.submitOn(about{Kind: "restore", Pool: name, Snapshot: id, Path: path})
}

// thin removes the expired snapshots of a pool.
func (s *storage) thin(name string, keep int) (*task.Operation, error) {
	return s.submitOn(about{Kind: "thin", Pool: name, Keep: keep})
}

// remove deletes a pool and its snapshots, after the operations on it that were submitted
// before. It does not wait for uploads but ends them, so that they fail.
func (s *storage) remove(name string) (*task.Operation, error) {
	if err := s.mustExist(name); err != nil {
		return nil, err
	}
	return s.submit(about{Kind: "delete", Pool: name}, func(ctx context.Context, update func(int)) (any, error) {
		return nil, s.removePool(ctx, name, update)
	})
}

// submitOn submits an operation on an existing pool.
func (s *storage) submitOn(a about, opts ...task.SubmitOption) (*task.Operation, error) {
	if err := s.mustExist(a.Pool); err != nil {
		return nil, err
	}
	return s.submit(a, s.on(a), opts...)
}

// submit submits an operation. If an operation with the same name is unfinished, submit
// returns that operation and an error that wraps task.ErrExists.
func (s *storage) submit(a about, fn task.Func, opts ...task.SubmitOption) (*task.Operation, error) {
	opts = append(opts, task.WithMetadata(a))
	return s.tasks.Submit(a.name(), fn, append(opts, a.keys()...)...)
}

// resume continues an operation that was interrupted because the daemon was killed. It does
// not continue the creation of a pool, an accept or a delete: the user should look at the
// files again. It cannot continue an upload, because the client is gone. A delete that had
// begun is done, because openStorage has finished it.
func (s *storage) resume(op *task.Operation) (task.Func, []task.SubmitOption) {
	var a about
	if op.DecodeMetadata(&a) != nil {
		return nil, nil
	}
	switch a.Kind {
	case "create", "accept", "upload":
		return nil, nil
	case "delete":
		if s.mustBeFree(a.Pool) != nil {
			return nil, nil
		}
		return func(context.Context, func(int)) (any, error) { return nil, nil }, a.keys()
	}
	return s.on(a), a.keys()
}

// on returns the function of an operation on an existing pool.
func (s *storage) on(a about) task.Func {
	return func(ctx context.Context, update func(int)) (any, error) {
		p, err := s.open(a.Pool)
		if err != nil {
			return nil, err
		}
		defer p.close()
		w := &worker{about: a, update: update}
		switch a.Kind {
		case "scrub":
			known, err := p.manifest()
			if err != nil {
				return nil, err
			}
			return p.scrub(ctx, w, known)
		case "accept":
			return p.scrub(ctx, w, nil)
		case "replicate":
			to, err := s.open(a.To)
			if err != nil {
				return nil, err
			}
			defer to.close()
			return p.replicate(ctx, w, to)
		case "snapshot":
			return p.snapshot(ctx, w)
		case "thin":
			return p.thin(ctx, w, a.Keep)
		case "restore":
			return p.restore(ctx, w, a.Snapshot, a.Path)
		}
		return nil, fmt.Errorf("unknown kind of operation %q", a.Kind)
	}
}

// name returns the name of an operation. Operations that do different work have different
// names.
func (a about) name() string {
	switch {
	case a.To != "":
		return a.Kind + " " + a.Pool + " to " + a.To
	case a.Kind == "upload":
		return a.Kind + " " + a.Pool + "/" + a.Path
	case a.Kind == "restore":
		return a.Kind + " " + a.Pool + "/" + a.Path + " from " + a.Snapshot
	}
	return a.Kind + " " + a.Pool
}

// keys returns the options for the unique key and the locks of an operation. Uploads have
// none.
func (a about) keys() []task.SubmitOption {
	if a.Kind == "upload" {
		return nil
	}
	opts := []task.SubmitOption{task.WithUnique(a.name()), task.WithLock("pool:" + a.Pool)}
	if a.To != "" {
		opts = append(opts, task.WithLock("pool:"+a.To))
	}
	return opts
}

// A pool is an open pool.
type pool struct {
	root  *os.Root
	files *os.Root // a separate root, so that no link among the files can lead to the manifest
}

const (
	filesDir     = "files"
	snapshotsDir = "snapshots"
	manifestFile = "manifest"
)

// validName matches names that are distinct on every file system.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

func checkName(name string) error {
	if !validName.MatchString(name) {
		return inputError(fmt.Sprintf("pool name %q: use 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit", name))
	}
	return nil
}

// open opens a pool. The caller must close it.
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

// mustBeFree checks that a name is free for a new pool.
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

// An alreadyError is the error for a name that is already taken, by a pool or by something
// else.
type alreadyError string

func (e alreadyError) Error() string        { return "the name " + string(e) + " is already taken" }
func (e alreadyError) Is(target error) bool { return target == fs.ErrExist }

// names returns the names of all pools. It skips other entries.
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

// makePool creates a pool under a temporary name first, so that an incomplete pool is never
// visible.
func (s *storage) makePool(ctx context.Context, name string, update func(int)) error {
	temp := ".creating-" + name
	if err := s.pools.RemoveAll(temp); err != nil { // left by a killed daemon
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
	if err := s.mustBeFree(name); err != nil { // it may have been taken in the meantime
		return err
	}
	if err := s.pools.Rename(temp, name); err != nil {
		return err
	}
	return syncDir(s.pools, ".")
}

// deleting is the name prefix of pools that are being removed. No pool has such a name.
const deleting = ".deleting-"

// removePool renames the pool before removing it, so that a partly removed pool is never
// visible. Before that it ends all uploads, because an upload must not report a file as
// stored that is then removed.
func (s *storage) removePool(ctx context.Context, name string, update func(int)) error {
	defer s.uploads.allow(name)
	if err := s.uploads.end(ctx, name); err != nil {
		return err
	}
	temp := deleting + name
	if err := s.pools.RemoveAll(temp); err != nil { // left by a failed removal
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := s.pools.Rename(name, temp); err != nil {
		return err
	}
	if err := syncDir(s.pools, "."); err != nil {
		return err
	}
	update(10)
	return s.pools.RemoveAll(temp)
}

// snapshots returns the IDs of the snapshots of a pool, oldest first.
func (s *storage) snapshots(name string) ([]string, error) {
	p, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer p.close()
	return p.snapshots()
}

// put stores the content of r as a file of the pool, completely or not at all. Like any
// other program that writes to the pool, it does not wait for operations on it.
func (p *pool) put(ctx context.Context, w *worker, name string, r io.Reader) error {
	path, err := p.mayPut(name)
	if err != nil {
		return err
	}
	err = replace(p.files, path, meta{perm: 0o644}, func(f *os.File) error {
		_, err := w.copy(ctx, f, r)
		return err
	})
	if err != nil {
		return err
	}
	return syncParents(p.files, path)
}

// mayPut returns the path of a file in a pool, or an error if no file can be stored there.
func (p *pool) mayPut(name string) (path string, err error) {
	path, err = localPath(name)
	if err != nil {
		return "", err
	}
	if info, err := p.files.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s: not a file: %w", name, fs.ErrExist)
	}
	return path, checkPlace(p.files, path)
}

// localPath returns the path of a file in a pool in the syntax of this system. Links that
// lead outside are rejected later by os.Root.
func localPath(name string) (string, error) {
	path, err := filepath.Localize(name)
	if err != nil || name == "." || name == incoming || strings.HasPrefix(name, incoming+"/") {
		return "", inputError(fmt.Sprintf("%q is not a valid name for a file in a pool", name))
	}
	return path, nil
}

// An inputError is an error in a client's request.
type inputError string

func (e inputError) Error() string { return string(e) }
