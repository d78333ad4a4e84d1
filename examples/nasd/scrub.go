package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mynt-nas/task"
)

// A scrubResult is the result of a scrub.
//
// A file is corrupted if its content has changed but its size and time have not: disks do
// that, programs do not. It is reported until the file is restored or the user accepts its
// content. Any other change counts as intended, and its checksum is recorded. A deleted
// file cannot be distinguished from a lost one, so it is reported once as missing.
type scrubResult struct {
	Files      int   `json:"files"` // files read
	Bytes      int64 `json:"bytes"`
	Others     int   `json:"others,omitempty"` // links, devices and the like, which are not read
	Corrupted  list  `json:"corrupted"`
	Unreadable list  `json:"unreadable"` // files and directories
	Missing    list  `json:"missing,omitzero"`
	New        list  `json:"new,omitzero"`
	Changed    list  `json:"changed,omitzero"`
}

// A place records how far a scrub has got. It is small because lists of operations contain
// it.
type place struct {
	Last    string `json:"last"` // the manifest is up to date up to and including this file
	New     int    `json:"new"`  // files
	Changed int    `json:"changed"`
}

// placeEvery is the time between two records of the place.
var placeEvery = time.Minute

// scrub compares all files with the manifest and records the checksums of new and changed
// files. While it runs, it saves the checksums up to its place. It continues after the
// place in w, if any. If files are corrupted or unreadable, scrub returns an error along
// with the result.
func (p *pool) scrub(ctx context.Context, w *worker, known manifest) (*scrubResult, error) {
	s := &scrub{pool: p, worker: w, known: known, next: make(manifest), saved: time.Now()}
	if at := w.about.Place; at != nil {
		s.from = strings.Split(at.Last, "/")
		s.result.New.Count, s.result.Changed.Count = at.New, at.Changed
	}
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
	known  manifest // the manifest before the scrub
	next   manifest // the manifest after the scrub
	from   []string // path elements of the place to continue after
	saved  time.Time
	result scrubResult
}

func (s *scrub) visit(ctx context.Context, path string, err error) error {
	if e, ok := s.known[path]; ok && err == nil && slices.Compare(strings.Split(path, "/"), s.from) <= 0 {
		s.next[path] = e // read before the interruption
		s.result.Files++
		s.worker.moved(e.size)
		return nil
	}
	if err == nil {
		err = s.check(ctx, path)
	}
	if err == nil {
		err = s.savePlace(ctx, path)
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

// savePlace records that all files up to path have been read. It records no place after a
// corrupted or unreadable file, because a resumed scrub must find that file again.
func (s *scrub) savePlace(ctx context.Context, path string) error {
	r := &s.result
	if s.known == nil || r.Corrupted.Count+r.Unreadable.Count > 0 || time.Since(s.saved) < placeEvery {
		return nil
	}
	m := maps.Clone(s.known)
	maps.Copy(m, s.next)
	if err := s.pool.saveManifest(m); err != nil {
		return err
	}
	s.saved = time.Now()
	s.worker.about.Place = &place{path, r.New.Count, r.Changed.Count}
	task.SetMetadata(ctx, s.worker.about) // fails outside of an operation, as in tests
	return nil
}

// retain copies the entry of an unreadable file to the next manifest, or the entries of all
// files below an unreadable directory: they are not missing.
func (s *scrub) retain(path string) {
	for known, e := range s.known {
		if known == path || strings.HasPrefix(known, path+"/") {
			s.next[known] = e
		}
	}
}
