package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mynt-nas/task"
)

// A sum is the metadata of an operation: what it does, and how far it has got.
type sum struct {
	Dir   string `json:"dir"`
	Last  string `json:"last,omitempty"`  // the last file read, relative to Dir
	State []byte `json:"state,omitempty"` // state of the SHA-256 after Last
	Files int    `json:"files"`
	Bytes int64  `json:"bytes"`
	Runs  int    `json:"runs"` // number of calls of its function
}

// afterFile is called after each file, once its place is stored or storing it has failed.
var afterFile = func(path string) {}

// run is the [task.Func]. It reads the files after the last one, in the order of
// filepath.WalkDir. The SHA-256 is that of the output of "sha256sum -z" for all files.
func (s sum) run(ctx context.Context, update func(int)) (any, error) {
	tree := sha256.New().(hasher)
	if len(s.State) > 0 {
		if err := tree.UnmarshalBinary(s.State); err != nil {
			return nil, err
		}
	}
	total, err := s.count(ctx)
	if err != nil {
		return nil, err
	}
	s.Runs++
	err = s.walk(ctx, s.Last, func(path, rel string) error {
		if err := task.SetMessage(ctx, rel); err != nil {
			return err
		}
		digest, n, err := digest(ctx, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(tree, "%x  %s\x00", digest, filepath.ToSlash(rel))
		s.Last, s.Files, s.Bytes = rel, s.Files+1, s.Bytes+n
		if s.State, err = tree.MarshalBinary(); err != nil {
			return err
		}
		if err := task.SetMetadata(ctx, s); err != nil {
			return err
		}
		update(100 * s.Files / max(total, s.Files))
		err = task.Checkpoint(ctx) // from here on, the file is not read again
		afterFile(path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return fmt.Sprintf("%x", tree.Sum(nil)), nil
}

// count returns the number of files.
func (s sum) count(ctx context.Context) (n int, err error) {
	err = s.walk(ctx, "", func(string, string) error { n++; return nil })
	return n, err
}

// walk calls visit for each regular file after the last one.
func (s sum) walk(ctx context.Context, last string, visit func(path, rel string) error) error {
	return filepath.WalkDir(s.Dir, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(s.Dir, path)
		if err != nil || last != "" && !behind(rel, last) {
			return err
		}
		return visit(path, rel)
	})
}

// behind reports whether WalkDir visits the path a after b.
func behind(a, b string) bool {
	names := func(path string) []string { return strings.Split(path, string(filepath.Separator)) }
	return slices.Compare(names(a), names(b)) > 0
}

// digest returns the SHA-256 of a file and its length.
func digest(ctx context.Context, path string) ([]byte, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	hash := sha256.New()
	var n int64
	for ctx.Err() == nil {
		m, err := io.CopyN(hash, f, 1<<20)
		n += m
		if err == io.EOF {
			return hash.Sum(nil), n, nil
		}
		if err != nil {
			return nil, 0, err
		}
	}
	return nil, 0, context.Cause(ctx)
}
