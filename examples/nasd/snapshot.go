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

// snapshotID is the layout of the names of snapshots: the time in UTC, so that
// names sort by time.
const snapshotID = "20060102T150405.000Z"

// Incomplete snapshots have names that are not IDs.
const (
	partialSnapshot = snapshotsDir + "/.partial"
	removedSnapshot = snapshotsDir + "/.removed"
)

// A snapshotResult is what a snapshot has done.
type snapshotResult struct {
	ID         string `json:"id"`
	Bytes      int64  `json:"bytes"`
	Linked     int    `json:"linked"` // files unchanged since the previous snapshot
	Cloned     int    `json:"cloned"`
	Copied     int    `json:"copied"`
	Others     int    `json:"others,omitempty"` // links, devices and the like, which it omits
	Unreadable list   `json:"unreadable,omitzero"`
}

// snapshot takes a snapshot of the files of p, one file after the other.
//
// No file of the pool is ever linked to a snapshot: a program that changes it
// in place would change the snapshot, too. A file that is unchanged since the
// previous snapshot, by its size and time, is linked to that one, where nothing
// changes it; a disk that corrupts it corrupts both. Any other file is cloned, if
// the file system supports that, or copied.
func (p *pool) snapshot(ctx context.Context, w *worker) (*snapshotResult, error) {
	ids, err := p.snapshots()
	if err != nil {
		return nil, err
	}
	if err := p.root.RemoveAll(partialSnapshot); err != nil { // left by a killed daemon
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

// newSnapshotID returns an ID that sorts after all ids, even if the clock was set
// back.
func newSnapshotID(now time.Time, ids []string) string {
	id := now.UTC().Format(snapshotID)
	if len(ids) > 0 && id <= ids[len(ids)-1] {
		last, _ := time.Parse(snapshotID, ids[len(ids)-1])
		id = last.Add(time.Millisecond).Format(snapshotID)
	}
	return id
}

// snapshots returns the IDs of all snapshots, oldest first.
func (p *pool) snapshots() ([]string, error) {
	ids := []string{}
	entries, err := fs.ReadDir(p.root.FS(), snapshotsDir) // sorted by name
	for _, e := range entries {
		if _, err := time.Parse(snapshotID, e.Name()); err == nil && e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, err
}

// A snapshot is a snapshot that is being taken.
type snapshot struct {
	pool   *pool
	worker *worker
	before string   // the directory of the previous snapshot; "" if there is none
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

// link links a file to the previous snapshot, if it is unchanged since.
func (s *snapshot) link(name, to string, info fs.FileInfo) bool {
	if s.before == "" {
		return false
	}
	was, err := s.pool.root.Lstat(s.before + "/" + name)
	return err == nil && was.Mode().IsRegular() && unchanged(was, info) &&
		s.pool.root.Link(s.before+"/"+name, to) == nil // some file systems have no links
}

// A thinResult is the result of thinning out.
type thinResult struct {
	Kept    int      `json:"kept"`
	Removed []string `json:"removed"`
}

// thin removes the expired snapshots.
func (p *pool) thin(ctx context.Context, w *worker, keep int) (*thinResult, error) {
	r := &thinResult{Removed: []string{}}
	// Rename it first, so that a partly removed snapshot is never visible.
	if err := p.root.RemoveAll(removedSnapshot); err != nil {
		return r, err
	}
	ids, err := p.snapshots()
	if err != nil {
		return r, err
	}
	old := expired(ids, keep)
	w.total = int64(len(old))
	r.Kept = len(ids)
	for _, id := range old {
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

// expired returns the expired snapshots, oldest first. The newest keep snapshots do
// not expire, nor does the last one of each of the latest 24 hours and of each of
// the latest 30 days that have snapshots.
func expired(ids []string, keep int) (old []string) {
	hours := period{length: time.Hour, left: keepHours}
	days := period{length: 24 * time.Hour, left: keepDays}
	for i, id := range slices.Backward(ids) {
		t, _ := time.Parse(snapshotID, id)
		lastOfHour, lastOfDay := hours.begins(t), days.begins(t) // no short-circuit: both count
		if len(ids)-i > keep && !lastOfHour && !lastOfDay {
			old = append(old, id)
		}
	}
	slices.Reverse(old)
	return old
}

// A period steps back in time, from one hour or day with snapshots to the one
// before.
type period struct {
	length time.Duration
	left   int // how many hours or days are left
	at     time.Time
}

// begins reports whether t is in another hour or day than the times before.
func (p *period) begins(t time.Time) bool {
	at := t.Truncate(p.length)
	if at.Equal(p.at) || p.left == 0 {
		return false
	}
	p.at = at
	p.left--
	return true
}

// A scheduler takes snapshots of each pool and thins them out.
type scheduler struct {
	storage *storage
	every   time.Duration
	keep    int

	last map[string]attempt // by pool
}

// An attempt is the last time that operations were submitted for a pool.
type attempt struct {
	at time.Time
	id string // of the last operation
}

// run submits the operations that are due, until ctx is done. It derives the
// schedule from the existing snapshots, so that a restart of the daemon does not
// change it.
func (s *scheduler) run(ctx context.Context) {
	s.last = make(map[string]attempt)
	ticker := time.NewTicker(max(s.every/10, time.Millisecond))
	defer ticker.Stop()
	for {
		names, err := s.storage.names()
		for _, name := range names {
			err = errors.Join(err, s.submitDue(name, time.Now()))
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

// submitDue submits the operations that are due for a pool, at most once in each
// period, even if they fail. It submits nothing while the last ones are
// unfinished, so that they do not accumulate behind a scrub that takes days.
func (s *scheduler) submitDue(name string, now time.Time) error {
	last := s.last[name]
	if op, ok := s.storage.tasks.Get(last.id); ok && !op.State.Finished() || now.Sub(last.at) < s.every {
		return nil
	}
	ids, err := s.storage.snapshots(name)
	if err == nil && len(ids) > 0 {
		latest, _ := time.Parse(snapshotID, ids[len(ids)-1])
		// A snapshot in the future comes from a wrong clock.
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
