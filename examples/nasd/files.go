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
	// incoming is the directory where files are until all of them is written.
	incoming = ".incoming"

	chunkSize = 1 << 20 // bytes between two looks at the context

	// tick is longer than file systems take for two changes of a file to be
	// sure to differ in time, those of Unix at least.
	tick = 50 * time.Millisecond

	maxListed = 1000 // paths in one list of a result
)

// A list counts files, and names the first of them.
type list struct {
	Count int      `json:"count"`
	Paths []string `json:"paths,omitempty"`
	Error string   `json:"error,omitempty"` // what is wrong with the very first, if it isn't clear
}

func (l *list) add(path string) {
	l.Count++
	if len(l.Paths) < maxListed {
		l.Paths = append(l.Paths, path)
	}
}

// addError adds path, and why.
func (l *list) addError(path string, err error) {
	if l.Count == 0 {
		l.Error = err.Error()
	}
	l.add(path)
}

// why ends a message about lists.
func why(lists ...list) string {
	for _, l := range lists {
		if l.Error != "" {
			return "; the first: " + l.Error
		}
	}
	return ""
}

// A readError is an error of what is read, be it a file or a directory.
type readError struct{ error }

func (e readError) Unwrap() error { return e.error }

// addUnreadable adds path to the list if err is about reading that, and it
// hasn't just been deleted. What it returns is why the operation can't go on.
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

// errNoFile is for what is neither a directory nor a regular file.
var errNoFile = errors.New("neither a file nor a directory")

// walk calls visit for each file below the directory dir, with an error for
// what it can't read and for what is no file. Paths have slashes. It follows no
// symbolic links. fs.WalkDir wouldn't enter a directory whose name is not UTF-8.
func walk(ctx context.Context, root *os.Root, dir string, visit func(path string, err error) error) error {
	entries, err := readDir(root, dir)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err == nil:
	case dir == ".":
		return err
	case !errors.Is(err, fs.ErrNotExist): // or else it was deleted meanwhile
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

// open opens a regular file for reading. No later change of it will leave the
// file with the time and the size in the FileInfo.
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

var errReplaced = errors.New("replaced just now")

func openRegular(root *os.Root, path string) (*os.File, fs.FileInfo, error) {
	found, err := root.Lstat(path)
	if err != nil {
		return nil, nil, err
	}
	// Should there be a FIFO by now, opening it must not wait for a writer.
	f, err := root.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || !os.SameFile(found, info)) {
		err = fmt.Errorf("%s: %w", path, errReplaced) // say, by a symbolic link
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// settle waits until a change of a file gives it another time than t.
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

// unchanged reports whether a file has the size and the time that it had.
func unchanged(info, was fs.FileInfo) bool {
	return info.Size() == was.Size() && info.ModTime().Equal(was.ModTime())
}

// A worker moves the bytes of one operation and shows how far it is. The zero
// worker shows it to nobody.
type worker struct {
	about  about
	update func(int)
	total  int64 // bytes to be moved
	done   int64
	others int // what is no file
	buf    []byte
}

// each is walk that first adds up the sizes of all files, and then shows which
// one it is at.
func (w *worker) each(ctx context.Context, root *os.Root, visit func(path string, err error) error) error {
	err := walk(ctx, root, ".", func(path string, err error) error {
		if err == nil {
			if info, err := root.Lstat(path); err == nil {
				w.total += info.Size()
			}
		}
		return nil // visit will see
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

// at shows which file it is at.
func (w *worker) at(ctx context.Context, path string) {
	w.about.File = path
	task.SetMetadata(ctx, w.about) // fails outside of an operation: in tests
}

// moved adds n bytes to what is done.
func (w *worker) moved(n int64) {
	w.done += n
	if w.update != nil {
		w.update(int(100 * float64(w.done) / float64(max(w.total, 1))))
	}
}

// copy copies from src to dst and returns the SHA-256 of that. It looks at ctx
// every so often.
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

// contents returns a reader of an open file. A log that grows as fast as it is
// read must not keep it for ever: what counts is its size when it was opened.
func contents(f *os.File, info fs.FileInfo) io.Reader {
	return io.LimitReader(f, info.Size())
}

// sparse is a file in which zeros are written by leaving a hole, so that the
// copy of a disk image is not larger than the original. End it with truncate.
type sparse struct{ f *os.File }

var zeros [chunkSize]byte

func (s sparse) Write(p []byte) (int, error) {
	if len(p) == 0 || !bytes.Equal(p, zeros[:len(p)]) {
		return s.f.Write(p)
	}
	_, err := s.f.Seek(int64(len(p)), io.SeekCurrent)
	return len(p), err
}

// truncate makes a hole at the end part of the file.
func (s sparse) truncate() error {
	size, err := s.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	return s.f.Truncate(size)
}

// A meta is what a new file has besides its content.
type meta struct {
	perm  fs.FileMode
	mtime time.Time // zero for now
}

// create makes a new file. On return it is durable, but for its name, or it
// isn't there.
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

// replace makes a new file, or has it take the place of another one: nobody
// ever sees a part of it. The directories in between are made if need be.
// Until syncParents its name is not durable.
func replace(root *os.Root, path string, m meta, fill func(*os.File) error) error {
	if err := makePlace(root, path); err != nil {
		return err
	}
	if err := root.Mkdir(incoming, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	temp := incoming + "/" + rand.Text()
	if err := create(root, temp, m, fill); err != nil {
		return err
	}
	err := root.Rename(temp, path)
	if err != nil {
		root.Remove(temp)
	}
	return err
}

// A placeError says that there can be no file at a path: there is a directory,
// or a file or a link to elsewhere on the way, or the name is too long.
type placeError struct{ error }

func (e placeError) Unwrap() error { return e.error }

// makePlace makes the directories that lead to a file.
func makePlace(root *os.Root, path string) error {
	switch info, err := root.Lstat(path); {
	case err == nil && info.IsDir():
		return placeError{fmt.Errorf("%s: there is a directory", path)}
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return placeError{err}
	}
	err := root.MkdirAll(filepath.Dir(path), 0o755)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTDIR) { // a link to nowhere
		return placeError{err}
	}
	return err
}

// syncParents makes the names of files durable that are new in root.
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
		return nil // which has no such thing
	}
	f, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
