package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// A scrubResult is what a scrub has found.
//
// A file is corrupted if its content has changed but its size and time have not:
// disks do that, programs do not. It is reported until the file is restored or
// the user accepts its content. Any other change counts as intended, and its
// checksum is recorded. A deleted file can't be distinguished from a lost one: it
// is reported once as missing.
type scrubResult struct {
	Files      int   `json:"files"` // read
	Bytes      int64 `json:"bytes"`
	Others     int   `json:"others,omitempty"` // links, devices and the like, which are not read
	Corrupted  list  `json:"corrupted"`
	Unreadable list  `json:"unreadable"` // files and directories
	Missing    list  `json:"missing,omitzero"`
	New        list  `json:"new,omitzero"`
	Changed    list  `json:"changed,omitzero"`
}

// scrub compares all files with the manifest, and records the checksums of new and
// changed files. A cancelled scrub records nothing. If files are corrupted or
// unreadable, scrub returns an error beside the result.
func (p *pool) scrub(ctx context.Context, w *worker, known manifest) (*scrubResult, error) {
	s := &scrub{pool: p, worker: w, known: known, next: make(manifest)}
	err := w.each(ctx, p.files, func(path string, err error) error { return s.visit(ctx, path, err) })
	r := &s.result
	r.Bytes, r.Others = w.done, w.others
	if err != nil {
		return r, err
	}
	for _, path := range slices.Sorted(maps.Keys(known)) {
		if _, ok := s.next[path]; !ok {
			r.Missing.add(path)
		}
	}
	if known == nil || !maps.Equal(known, s.next) {
		if err := p.saveManifest(s.next); err != nil {
			return r, err
		}
	}
	if r.Corrupted.Count+r.Unreadable.Count > 0 {
		return r, fmt.Errorf("corrupted: %d, unreadable: %d, of %d files%s",
			r.Corrupted.Count, r.Unreadable.Count, r.Files+r.Unreadable.Count, why(r.Unreadable))
	}
	return r, nil
}

// A scrub is one pass over the files of a pool.
type scrub struct {
	pool   *pool
	worker *worker
	known  manifest // as it was
	next   manifest // as it will be
	result scrubResult
}

func (s *scrub) visit(ctx context.Context, path string, err error) error {
	if err == nil {
		err = s.check(ctx, path)
	}
	if errors.As(err, new(readError)) {
		s.retain(path)
	}
	return s.result.Unreadable.addUnreadable(ctx, path, err)
}

// check reads one file and compares it with its manifest entry.
func (s *scrub) check(ctx context.Context, path string) error {
	f, info, err := open(ctx, s.pool.files, path)
	if err != nil {
		return err
	}
	defer f.Close()
	sum, err := s.worker.copy(ctx, io.Discard, contents(f, info))
	if err != nil {
		return err
	}
	now, err := f.Stat()
	if err != nil {
		return readError{err}
	}
	r := &s.result
	r.Files++
	old, ok := s.known[path]
	_, same := s.known.find(path, info)
	s.next[path] = newEntry(sum, info)
	switch {
	case !ok:
		r.New.add(path)
	case !unchanged(now, info) || !same:
		r.Changed.add(path)
	case sum != old.sum:
		r.Corrupted.add(path)
		s.next[path] = old
	}
	return nil
}

// retain copies the entry of an unreadable file to the next manifest, or those of
// all files below an unreadable directory: they are not missing.
func (s *scrub) retain(path string) {
	for known, e := range s.known {
		if known == path || strings.HasPrefix(known, path+"/") {
			s.next[known] = e
		}
	}
}
