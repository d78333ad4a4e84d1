package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mynt-nas/task"
)

const (
	// incoming is the directory for incompletely written files.
	incoming = ".incoming"

	chunkSize = 1 << 20 // bytes between two checks of the context

	// tick exceeds the resolution of modification times on Unix file systems: two changes
	// of a file at least tick apart get different times.
	tick = 50 * time.Millisecond

	maxListed = 1000 // paths in one list of a result
)

// A list counts files and names the first of them.
type list struct {
	Count int      `json:"count"`
	Paths []string `json:"paths,omitempty"`
	Error string   `json:"error,omitempty"` // of the first file, if not obvious
}

func (l *list) add(path string) {
	l.Count++
	if len(l.Paths) < maxListed {
		l.Paths = append(l.Paths, path)
	}
}

// addError adds a path and its error.
func (l *list) addError(path string, err error) {
	if l.Count == 0 {
		l.Error = err.Error()
	}
	l.add(path)
}

// why returns a suffix for messages about lists: the first error.
func why(lists ...list) string {
	for _, l := range lists {
		if l.Error != "" {
			return "; the first: " + l.Error
		}
	}
	return ""
}

// A readError is an error from reading a file or a directory.
type readError struct{ error }

func (e readError) Unwrap() error { return e.error }

// addUnreadable adds path to the list if err is a readError, unless the file has just been
// deleted. It returns any other error, which ends the operation.
func (l *list) addUnreadable(ctx context.Context, path string, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !errors.As(err, new(readError)):
		return err
	case !errors.Is(err, fs.ErrNotExist):
		l.addError(path, err)
	}
	return nil
}

// errNoFile is the error for links, devices and the like.
var errNoFile = errors.New("neither a file nor a directory")

// walk calls visit for each file below the directory dir, with an error if the file cannot
// be read or is not a regular file. Paths use slashes. walk does not follow symbolic links.
// Unlike fs.WalkDir, it enters directories whose names are not UTF-8.
func walk(ctx context.Context, root *os.Root, dir string, visit func(path string, err error) error) error {
	entries, err := readDir(root, dir)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == nil:
	case dir == ".":
		return err
	case !errors.Is(err, fs.ErrNotExist): // otherwise it was just deleted
		err = visit(dir, readError{err})
	default:
		err = nil
	}
	for _, e := range entries {
		if err != nil {
			return err
		}
		switch name := path.Join(dir, e.Name()); {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case e.IsDir() && name != incoming:
			err = walk(ctx, root, name, visit)
		case e.Type().IsRegular():
			err = visit(name, nil)
		case !e.IsDir():
			err = visit(name, errNoFile)
		}
	}
	return err
}

func readDir(root *os.Root, dir string) ([]os.DirEntry, error) {
	f, err := root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, err
}

// open opens a regular file for reading. Any later change of the file results in a time or
// size different from those in the FileInfo.
func open(ctx context.Context, root *os.Root, path string) (*os.File, fs.FileInfo, error) {
	for tries := 0; ; tries++ {
		f, info, err := openRegular(root, path)
		if errors.Is(err, errReplaced) && tries < 10 {
			continue
		}
		if err != nil {
			return nil, nil, readError{err}
		}
		if err := settle(ctx, info.ModTime()); err != nil {
			f.Close()
			return nil, nil, err
		}
		return f, info, nil
	}
}

var errReplaced = errors.New("replaced while it was opened")

func openRegular(root *os.Root, path string) (*os.File, fs.FileInfo, error) {
	found, err := root.Lstat(path)
	if err != nil {
		return nil, nil, err
	}
	// The file may have been replaced by a FIFO: opening must not wait for a writer.
	f, err := root.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || !os.SameFile(found, info)) {
		err = fmt.Errorf("%s: %w", path, errReplaced) // for example, by a symbolic link
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// settle waits until any change of a file results in a time other than t.
func settle(ctx context.Context, t time.Time) error {
	age := time.Since(t)
	if age < 0 || age > tick {
		return nil
	}
	select {
	case <-time.After(tick - age):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// unchanged reports whether a file still has its size and time.
func unchanged(info, was fs.FileInfo) bool {
	return info.Size() == was.Size() && info.ModTime().Equal(was.ModTime())
}

// A worker moves the bytes of one operation and reports its progress. The zero worker
// reports nothing.
type worker struct {
	about  about
	update func(int)
	total  int64 // bytes to be moved
	done   int64
	others int // links, devices and the like
	buf    []byte
}

// each is walk with progress: it first adds up the sizes of all files, and then reports the
// file it is working on.
func (w *worker) each(ctx context.Context, root *os.Root, visit func(path string, err error) error) error {
	err := walk(ctx, root, ".", func(path string, err error) error {
		if err == nil {
			if info, err := root.Lstat(path); err == nil {
				w.total += info.Size()
			}
		}
		return nil // the next walk passes the error to visit
	})
	if err != nil {
		return err
	}
	err = walk(ctx, root, ".", func(path string, err error) error {
		if err == errNoFile {
			w.others++
			return nil
		}
		w.at(ctx, path)
		return visit(path, err)
	})
	if err == nil {
		w.at(ctx, "")
	}
	return err
}

// at reports the current file.
func (w *worker) at(ctx context.Context, path string) {
	task.SetMessage(ctx, path) // fails outside of an operation, as in tests
}

// moved adds n bytes to the progress.
func (w *worker) moved(n int64) {
	w.done += n
	if w.update != nil {
		w.update(int(100 * float64(w.done) / float64(max(w.total, 1))))
	}
}

// copy copies from src to dst and returns the SHA-256 of the content. It checks ctx after
// every chunk.
func (w *worker) copy(ctx context.Context, dst io.Writer, src io.Reader) (sum string, err error) {
	if w.buf == nil {
		w.buf = make([]byte, chunkSize)
	}
	hash := sha256.New()
	for {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := src.Read(w.buf)
		hash.Write(w.buf[:n])
		if _, err := dst.Write(w.buf[:n]); err != nil {
			return "", err
		}
		w.moved(int64(n))
		if err == io.EOF {
			return hex.EncodeToString(hash.Sum(nil)), nil
		}
		if err != nil {
			return "", readError{err}
		}
	}
}

// contents returns a reader of an open file, up to the size it had when it was opened.
// Otherwise, reading a log that grows as fast as it is read would never end.
func contents(f *os.File, info fs.FileInfo) io.Reader {
	return io.LimitReader(f, info.Size())
}

// sparse is a file that stores zeros as holes, so that the copy of a disk image is not
// larger than the original. Call truncate when done.
type sparse struct{ f *os.File }

var zeros [chunkSize]byte

func (s sparse) Write(p []byte) (int, error) {
	if len(p) == 0 || !bytes.Equal(p, zeros[:len(p)]) {
		return s.f.Write(p)
	}
	_, err := s.f.Seek(int64(len(p)), io.SeekCurrent)
	return len(p), err
}

// truncate sets the file size, in case the file ends with a hole.
func (s sparse) truncate() error {
	size, err := s.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	return s.f.Truncate(size)
}

// A meta is the metadata of a new file.
type meta struct {
	perm  fs.FileMode
	mtime time.Time // zero means now
}

// create creates a new file. On success its content is durable, but its name is not. On
// failure the file does not exist.
func create(root *os.Root, path string, m meta, fill func(*os.File) error) (err error) {
	f, err := root.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			root.Remove(path)
		}
	}()
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Chmod(m.perm); err != nil {
		return err
	}
	if err := root.Chtimes(path, time.Time{}, m.mtime); err != nil {
		return err
	}
	return f.Sync()
}

// replace creates a file, or replaces it atomically. It creates missing directories. An
// incomplete file, or directories made for one, are never visible. Use syncParents to make
// the name durable.
func replace(root *os.Root, path string, m meta, fill func(*os.File) error) error {
	if err := checkPlace(root, path); err != nil { // check before doing the work
		return err
	}
	if err := root.Mkdir(incoming, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	temp := incoming + "/" + rand.Text()
	if err := create(root, temp, m, fill); err != nil {
		return err
	}
	err := makePlace(root, path)
	if err == nil {
		err = root.Rename(temp, path)
	}
	if err != nil {
		root.Remove(temp)
	}
	return err
}

// A placeError says why no file can be stored at a path: the path names a directory, it
// leads through a file or outside the pool, or a name is too long.
type placeError struct{ error }

func (e placeError) Unwrap() error { return e.error }

// checkPlace checks whether a file can be stored at path. Directories may be missing.
func checkPlace(root *os.Root, path string) error {
	switch info, err := root.Lstat(path); {
	case err == nil && info.IsDir():
		return placeError{fmt.Errorf("%s: is a directory", path)}
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return placeError{err}
	}
	for dir := filepath.Dir(path); dir != "."; dir = filepath.Dir(dir) {
		info, err := root.Stat(dir)
		_, linkErr := root.Lstat(dir)
		switch {
		case err == nil && info.IsDir():
			return nil
		case err == nil:
			return placeError{fmt.Errorf("%s: is not a directory", dir)}
		case !errors.Is(err, fs.ErrNotExist):
			return placeError{err}
		case linkErr == nil: // a dangling link
			return placeError{err}
		}
	}
	return nil
}

// makePlace creates the directories that lead to a file.
func makePlace(root *os.Root, path string) error {
	err := root.MkdirAll(filepath.Dir(path), 0o755)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTDIR) { // another program has just created something else there
		return placeError{err}
	}
	return err
}

// syncParents makes the names of new files in root durable.
func syncParents(root *os.Root, paths ...string) error {
	synced := make(map[string]bool)
	for _, p := range paths {
		for dir := path.Dir(filepath.ToSlash(p)); !synced[dir]; dir = path.Dir(dir) {
			if err := syncDir(root, dir); err != nil {
				return err
			}
			synced[dir] = true
		}
	}
	return nil
}

func syncDir(root *os.Root, dir string) error {
	if runtime.GOOS == "windows" {
		return nil // Windows can't sync directories
	}
	f, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
