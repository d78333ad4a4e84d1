package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"slices"
	"time"

	"github.com/mynt-nas/task"
)

// snapshotID is the layout of the names of snapshots: the time in UTC. Their
// order is that of time.
const snapshotID = "20060102T150405.000Z"

// What goes on in the directory of snapshots has names that are no IDs.
const (
	partialSnapshot = snapshotsDir + "/.partial"
	removedSnapshot = snapshotsDir + "/.removed"
)

// A snapshotResult is what a snapshot has done.
type snapshotResult struct {
	ID         string `json:"id"`
	Bytes      int64  `json:"bytes"`
	Linked     int    `json:"linked"` // files that are as in the snapshot before
	Cloned     int    `json:"cloned"`
	Copied     int    `json:"copied"`
	Others     int    `json:"others,omitempty"` // links and such, which are not in it
	Unreadable list   `json:"unreadable,omitzero"`
}

// snapshot takes a snapshot of the files of p, one file after the other.
//
// No file of the pool is ever linked to a snapshot: a program that changes it
// in place would change the snapshot as well. A file that is as in the snapshot
// before, by its size and time, is linked to that, in which nobody changes
// anything; so a disk that corrupts it corrupts it in both. Any other is
// cloned, where the file system can, or else copied.
func (p *pool) snapshot(ctx context.Context, w *worker) (*snapshotResult, error) {
	ids, err := p.snapshots()
	if err != nil {
		return nil, err
	}
	if err := p.root.RemoveAll(partialSnapshot); err != nil { // of one that was killed
		return nil, err
	}
	defer p.root.RemoveAll(partialSnapshot)
	if err := p.root.Mkdir(partialSnapshot, 0o700); err != nil {
		return nil, err
	}
	s := &snapshot{pool: p, worker: w}
	if len(ids) > 0 {
		s.before = snapshotsDir + "/" + ids[len(ids)-1]
	}
	err = w.each(ctx, p.files, func(path string, err error) error { return s.visit(ctx, path, err) })
	if err == nil {
		err = syncParents(p.root, append(s.paths, partialSnapshot+"/.")...)
	}
	if err != nil {
		return nil, err
	}
	s.result.ID = newSnapshotID(time.Now(), ids)
	s.result.Bytes, s.result.Others = w.done, w.others
	if err := p.root.Rename(partialSnapshot, snapshotsDir+"/"+s.result.ID); err != nil {
		return nil, err
	}
	if n := s.result.Unreadable.Count; n > 0 {
		err = fmt.Errorf("%d unreadable files are not in the snapshot%s", n, why(s.result.Unreadable))
	}
	return &s.result, errors.Join(err, syncDir(p.root, snapshotsDir))
}

// newSnapshotID returns one that comes after all ids, also if the clock was set
// back.
func newSnapshotID(now time.Time, ids []string) string {
	id := now.UTC().Format(snapshotID)
	if len(ids) > 0 && id <= ids[len(ids)-1] {
		last, _ := time.Parse(snapshotID, ids[len(ids)-1])
		id = last.Add(time.Millisecond).Format(snapshotID)
	}
	return id
}

// snapshots returns the IDs of all snapshots, the oldest first.
func (p *pool) snapshots() ([]string, error) {
	ids := []string{}
	entries, err := fs.ReadDir(p.root.FS(), snapshotsDir) // which sorts them
	for _, e := range entries {
		if _, err := time.Parse(snapshotID, e.Name()); err == nil && e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, err
}

// A snapshot is one that is being taken.
type snapshot struct {
	pool   *pool
	worker *worker
	before string   // the directory of the snapshot before; "" if there is none
	paths  []string // of the files in it
	result snapshotResult
}

func (s *snapshot) visit(ctx context.Context, path string, err error) error {
	if err == nil {
		err = s.take(ctx, path)
	}
	return s.result.Unreadable.addUnreadable(ctx, path, err)
}

// take puts one file into the snapshot.
func (s *snapshot) take(ctx context.Context, name string) error {
	f, info, err := open(ctx, s.pool.files, name)
	if err != nil {
		return err
	}
	defer f.Close()
	to := partialSnapshot + "/" + name
	if err := s.pool.root.MkdirAll(path.Dir(to), 0o700); err != nil {
		return err
	}
	s.paths = append(s.paths, to)
	if s.link(name, to, info) {
		s.result.Linked++
		s.worker.moved(info.Size())
		return nil
	}
	m := meta{perm: info.Mode().Perm() &^ 0o222, mtime: info.ModTime()}
	return create(s.pool.root, to, m, func(dst *os.File) error {
		if clone(dst, f) == nil {
			s.result.Cloned++
			s.worker.moved(info.Size())
			return nil
		}
		s.result.Copied++
		if _, err := s.worker.copy(ctx, sparse{dst}, contents(f, info)); err != nil {
			return err
		}
		return sparse{dst}.truncate()
	})
}

// link links a file to the snapshot before, if it is the same in there.
func (s *snapshot) link(name, to string, info fs.FileInfo) bool {
	if s.before == "" {
		return false
	}
	was, err := s.pool.root.Lstat(s.before + "/" + name)
	return err == nil && was.Mode().IsRegular() && unchanged(was, info) &&
		s.pool.root.Link(s.before+"/"+name, to) == nil // some file systems have no links
}

// A thinResult is what thinning out has done.
type thinResult struct {
	Kept    int      `json:"kept"`
	Removed []string `json:"removed"`
}

// thin removes the snapshots that need not be kept.
func (p *pool) thin(ctx context.Context, w *worker, keep int) (*thinResult, error) {
	r := &thinResult{Removed: []string{}}
	// It is renamed first: none that is half removed is ever seen.
	if err := p.root.RemoveAll(removedSnapshot); err != nil {
		return r, err
	}
	ids, err := p.snapshots()
	if err != nil {
		return r, err
	}
	doomed := expired(ids, keep)
	w.total = int64(len(doomed))
	r.Kept = len(ids)
	for _, id := range doomed {
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		w.at(ctx, id)
		if err := p.root.Rename(snapshotsDir+"/"+id, removedSnapshot); err != nil {
			return r, err
		}
		r.Kept--
		r.Removed = append(r.Removed, id)
		if err := p.root.RemoveAll(removedSnapshot); err != nil {
			return r, err
		}
		w.moved(1)
	}
	w.at(ctx, "")
	return r, nil
}

const (
	keepHours = 24
	keepDays  = 30
)

// expired returns which of the snapshots need not be kept, the oldest first.
// To be kept are the newest, as many as keep says, and the last one of each of
// the 24 latest hours, and of each of the 30 latest days, that have any.
func expired(ids []string, keep int) (doomed []string) {
	hours := period{length: time.Hour, left: keepHours}
	days := period{length: 24 * time.Hour, left: keepDays}
	for i, id := range slices.Backward(ids) {
		t, _ := time.Parse(snapshotID, id)
		lastOfHour, lastOfDay := hours.begins(t), days.begins(t) // both have to see it
		if len(ids)-i > keep && !lastOfHour && !lastOfDay {
			doomed = append(doomed, id)
		}
	}
	slices.Reverse(doomed)
	return doomed
}

// A period goes back in time, from one hour or day that has a snapshot to the
// one before.
type period struct {
	length time.Duration
	left   int // how many are left
	at     time.Time
}

// begins reports whether t is in another one than the times before.
func (p *period) begins(t time.Time) bool {
	at := t.Truncate(p.length)
	if at.Equal(p.at) || p.left == 0 {
		return false
	}
	p.at = at
	p.left--
	return true
}

// A scheduler has snapshots taken of each pool, and thinned out after that.
type scheduler struct {
	storage *storage
	every   time.Duration
	keep    int

	last map[string]attempt // by pool
}

// An attempt is when it submitted what, the last time.
type attempt struct {
	at time.Time
	id string // of the operation that comes last
}

// run looks for pools whose turn it is, until ctx is done. What it goes by are
// the snapshots that there are, so that the schedule survives the daemon.
func (s *scheduler) run(ctx context.Context) {
	s.last = make(map[string]attempt)
	ticker := time.NewTicker(max(s.every/10, time.Millisecond))
	defer ticker.Stop()
	for {
		names, err := s.storage.names()
		for _, name := range names {
			err = errors.Join(err, s.tend(name, time.Now()))
		}
		if err != nil && !errors.Is(err, task.ErrClosed) {
			slog.Error("snapshots not scheduled", "err", err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// tend submits what is due for a pool. It doesn't while its last operations
// still wait, say for a scrub that takes days: they must not pile up. And it
// does at most once in each period, also if that fails.
func (s *scheduler) tend(name string, now time.Time) error {
	last := s.last[name]
	if op, ok := s.storage.tasks.Get(last.id); ok && !op.State.Finished() || now.Sub(last.at) < s.every {
		return nil
	}
	ids, err := s.storage.snapshots(name)
	if err == nil && len(ids) > 0 {
		latest, _ := time.Parse(snapshotID, ids[len(ids)-1])
		// One of the future is of a time when the clock was wrong.
		if age := now.Sub(latest); 0 <= age && age < s.every {
			return nil
		}
	}
	s.last[name] = attempt{at: now}
	if err != nil {
		return err
	}
	op, err := s.storage.snapshot(name)
	if err == nil && len(expired(append(ids, newSnapshotID(now, ids)), s.keep)) > 0 {
		op, err = s.storage.thin(name, s.keep)
	}
	if err != nil {
		return err
	}
	s.last[name] = attempt{at: now, id: op.ID}
	return nil
}
