package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mynt-nas/task"
)

const (
	chunkSize = 1 << 20 // bytes read between two checks of the context
	maxListed = 1000    // unreadable files that a Result lists
)

// A Result is the result of a scrub, stored in the history even if the scrub was cancelled.
type Result struct {
	Files          int     `json:"files"`
	Bytes          int64   `json:"bytes"`
	Seconds        float64 `json:"seconds"`
	BytesPerSecond float64 `json:"bytes_per_second"`

	// Digest is the digest of the whole tree, or empty if the scrub was cancelled:
	// the SHA-256 of the output of "sha256sum -z" for all files, with paths
	// relative to the tree, in the order of filepath.WalkDir.
	Digest string `json:"digest,omitempty"`

	Unreadable int          `json:"unreadable"`       // number of files and directories
	Errors     []Unreadable `json:"errors,omitempty"` // the first maxListed of them
}

// An Unreadable is a file or directory that could not be read.
type Unreadable struct {
	Path  string `json:"path"`
	Error string `json:"error"`
}

func (r *Result) addUnreadable(path string, err error) {
	r.Unreadable++
	if len(r.Errors) < maxListed {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err // without the path
		}
		r.Errors = append(r.Errors, Unreadable{path, err.Error()})
	}
}

// A scrub is one pass over a directory tree.
type scrub struct {
	dir string // the tree
	db  string // the history database, which is not scrubbed

	// For the progress bar.
	total atomic.Int64 // bytes in the tree counted so far
	done  atomic.Int64 // bytes read; 0 until the count is complete

	// Used only by run, for the message.
	reading time.Time // when reading began
	said    time.Time // when the last message was set
}

// say sets the operation's message: the file being read, and the rate.
func (s *scrub) say(ctx context.Context, path string) {
	s.said = time.Now()
	rate := float64(s.done.Load()) / max(time.Since(s.reading).Seconds(), 1e-3)
	task.SetMessage(ctx, fmt.Sprintf("%s (%s/s)", path, size(int64(rate)))) // fails outside of an operation, as in tests
}

// run is the [task.Func] of a scrub.
func (s *scrub) run(ctx context.Context, update func(progress int)) (any, error) {
	began := time.Now()
	err := s.walk(ctx, func(path string, info fs.FileInfo, err error) error {
		if err == nil {
			s.total.Add(info.Size())
		}
		return nil // the error recurs, and is reported, when the file is read
	})
	var r Result
	if err == nil {
		err = s.readAll(ctx, &r, update)
	}
	r.Bytes = s.done.Load()
	r.Seconds = time.Since(began).Seconds()
	r.BytesPerSecond = float64(r.Bytes) / max(r.Seconds, 1e-9)
	return r, err
}

// readAll reads all files of the tree.
func (s *scrub) readAll(ctx context.Context, r *Result, update func(progress int)) error {
	tree := sha256.New()
	s.reading = time.Now()
	buf := make([]byte, chunkSize)
	err := s.walk(ctx, func(path string, info fs.FileInfo, err error) error {
		var sum []byte
		if err == nil {
			before := s.done.Load()
			s.say(ctx, path)
			sum, err = s.sum(ctx, path, info, buf, update)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			s.total.Add(s.done.Load() - before - info.Size()) // in case its size has changed
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // it was just deleted
		case err != nil:
			r.addUnreadable(path, err)
			return nil
		}
		rel, err := filepath.Rel(s.dir, path)
		if err != nil {
			return err
		}
		r.Files++
		fmt.Fprintf(tree, "%x  %s\x00", sum, filepath.ToSlash(rel))
		return nil
	})
	if err == nil {
		r.Digest = fmt.Sprintf("%x", tree.Sum(nil))
	}
	return err
}

// walk calls visit for each regular file of the tree, and with an error for everything it
// cannot access. It does not follow symbolic links.
func (s *scrub) walk(ctx context.Context, visit func(path string, info fs.FileInfo, err error) error) error {
	return filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			if path == s.dir {
				return err
			}
			return visit(path, nil, err)
		}
		if !d.Type().IsRegular() || s.isHistory(path) {
			return nil
		}
		info, err := d.Info()
		if err == nil && !info.Mode().IsRegular() {
			return nil // it was replaced after its directory was read
		}
		return visit(path, info, err)
	})
}

// isHistory reports whether path belongs to the program's own database. Its files change
// all the time, and opening and closing one would release SQLite's locks on it.
func (s *scrub) isHistory(path string) bool {
	suffix, ok := strings.CutPrefix(path, s.db)
	if !ok {
		return false
	}
	switch suffix {
	case "", "-wal", "-shm", "-journal":
		return true
	}
	return strings.HasPrefix(suffix, "-owner-")
}

// sum returns the SHA-256 of the file that was found at path.
func (s *scrub) sum(ctx context.Context, path string, found fs.FileInfo, buf []byte, update func(progress int)) ([]byte, error) {
	// The file may have been replaced by a FIFO: opening must not wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(found, info) { // for example, a symbolic link
		return nil, errors.New("replaced while it was scrubbed")
	}
	hash := sha256.New()
	// Read only up to the present size. Reading a log that grows as fast as it is read
	// would never end.
	for left := info.Size(); left > 0; {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		n, err := f.Read(buf[:min(left, chunkSize)])
		hash.Write(buf[:n])
		left -= int64(n)
		if time.Since(s.said) > time.Second { // for a long file
			s.say(ctx, path)
		}
		update(int(100 * s.done.Add(int64(n)) / max(s.total.Load(), 1)))
		if err == io.EOF {
			break // it has shrunk
		}
		if err != nil {
			return nil, err
		}
	}
	return hash.Sum(nil), nil
}
