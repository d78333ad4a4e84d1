package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/mynt-nas/task"
)

// snapshotID is the layout of snapshot names: the time in UTC, so that names sort by time.
// The names of automatic snapshots have a suffix.
const (
	snapshotID = "20060102T150405.000Z"
	autoSuffix = "-auto"
)

// Incomplete snapshots have names that are not IDs.
const (
	partialSnapshot = snapshotsDir + "/.partial"
	removedSnapshot = snapshotsDir + "/.removed"
)

// A snapshotResult is the result of a snapshot.
type snapshotResult struct {
	ID         string `json:"id"`
	Bytes      int64  `json:"bytes"`
	Linked     int    `json:"linked"` // files unchanged since the previous snapshot
	Cloned     int    `json:"cloned"`
	Copied     int    `json:"copied"`
	Others     int    `json:"others,omitempty"` // links, devices and the like, which are omitted
	Unreadable list   `json:"unreadable,omitzero"`
}

// snapshot takes a snapshot of the files of p, one file after another.
//
// A file of the pool is never linked to a snapshot, because a program that changes it in
// place would change the snapshot, too. A file that is unchanged since the previous
// snapshot, by its size and time, is linked to that snapshot, where nothing changes it; if
// a disk corrupts it, both snapshots are affected. Any other file is cloned if the file
// system supports that, or copied.
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
	if w.about.Automatic {
		s.result.ID += autoSuffix
	}
	s.result.Bytes, s.result.Others = w.done, w.others
	if err := p.root.Rename(partialSnapshot, snapshotsDir+"/"+s.result.ID); err != nil {
		return nil, err
	}
	if n := s.result.Unreadable.Count; n > 0 {
		err = fmt.Errorf("%d unreadable files are not in the snapshot%s", n, why(s.result.Unreadable))
	}
	return &s.result, errors.Join(err, syncDir(p.root, snapshotsDir))
}

// newSnapshotID returns an ID that sorts after all ids, even if the clock was set back.
func newSnapshotID(now time.Time, ids []string) string {
	id := now.UTC().Format(snapshotID)
	if len(ids) == 0 {
		return id
	}
	last, _ := snapshotTime(ids[len(ids)-1]) // all ids are valid
	if id <= last.Format(snapshotID) {
		id = last.Add(time.Millisecond).Format(snapshotID)
	}
	return id
}

// snapshotTime returns the time of a snapshot, or an error if id is not a valid ID.
func snapshotTime(id string) (time.Time, error) {
	return time.Parse(snapshotID, strings.TrimSuffix(id, autoSuffix))
}

// snapshots returns the IDs of all snapshots, oldest first.
func (p *pool) snapshots() ([]string, error) {
	ids := []string{}
	entries, err := fs.ReadDir(p.root.FS(), snapshotsDir) // sorted by name
	for _, e := range entries {
		if _, err := snapshotTime(e.Name()); err == nil && e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	return ids, err
}

// A snapshot is a snapshot in progress.
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

// take adds one file to the snapshot.
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

// link links a file to the previous snapshot if it is unchanged since then. It reports
// whether it did.
func (s *snapshot) link(name, to string, info fs.FileInfo) bool {
	if s.before == "" {
		return false
	}
	was, err := s.pool.root.Lstat(s.before + "/" + name)
	return err == nil && was.Mode().IsRegular() && unchanged(was, info) &&
		s.pool.root.Link(s.before+"/"+name, to) == nil // some file systems have no links
}

// A snapshotInfo describes a snapshot to clients.
type snapshotInfo struct {
	ID        string    `json:"id"`
	Time      time.Time `json:"time"`
	Automatic bool      `json:"automatic"` // taken by the scheduler
}

func newSnapshotInfo(id string) snapshotInfo {
	t, _ := snapshotTime(id)
	return snapshotInfo{ID: id, Time: t, Automatic: strings.HasSuffix(id, autoSuffix)}
}

// openSnapshot returns the directory of a snapshot as a separate root, so that no path
// leads out of it. The caller must close it.
func (p *pool) openSnapshot(id string) (*os.Root, error) {
	if _, err := snapshotTime(id); err != nil {
		return nil, inputError(fmt.Sprintf("%q is not the ID of a snapshot", id))
	}
	root, err := p.root.OpenRoot(snapshotsDir + "/" + id)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	return root, nil
}

// mustHave checks that a snapshot has a file.
func (p *pool) mustHave(id, path string) error {
	from, err := p.openSnapshot(id)
	if err != nil {
		return err
	}
	defer from.Close()
	f, _, err := openRegular(from, path)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("snapshot %s: %w", id, err)
	default: // for example, a directory
		return placeError{fmt.Errorf("snapshot %s: %w", id, err)}
	}
}

// A fileInfo describes a file in a snapshot to clients.
type fileInfo struct {
	Path string    `json:"path"`
	Size int64     `json:"size"` // in bytes
	Time time.Time `json:"time"` // of the last change

	// NotUTF8 means that Path differs from the file's real path: JSON cannot hold that
	// path, so the API cannot restore the file.
	NotUTF8 bool `json:"not_utf8,omitempty"`
}

var errEnough = errors.New("enough files")

// filesOf lists the files of a snapshot whose paths begin with prefix, at most maxListed,
// in the order in which walk visits them. more reports whether there are others.
func (p *pool) filesOf(ctx context.Context, id, prefix string) (files []fileInfo, more bool, err error) {
	root, err := p.openSnapshot(id)
	if err != nil {
		return nil, false, err
	}
	defer root.Close()
	files = []fileInfo{}
	dir := "." // other directories cannot have such files
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		if dir = prefix[:i]; !filepath.IsLocal(dir) {
			return files, false, nil
		}
	}
	err = walk(ctx, root, dir, func(path string, err error) error {
		if err != nil || !strings.HasPrefix(path, prefix) {
			return nil // a snapshot contains only files
		}
		info, err := root.Lstat(path)
		switch {
		case err != nil: // the snapshot has just expired
			return nil
		case len(files) == maxListed:
			return errEnough
		}
		files = append(files, fileInfo{path, info.Size(), info.ModTime(), !utf8.ValidString(path)})
		return nil
	})
	if errors.Is(err, errEnough) {
		return files, true, nil
	}
	return files, false, err
}

// A restoreResult is the result of a restore.
type restoreResult struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"`
}

// restore atomically replaces a file with the one in a snapshot. It keeps the file's time:
// if a disk has corrupted the file, the next scrub then compares the restored file with the
// old checksum.
func (p *pool) restore(ctx context.Context, w *worker, id, name string) (*restoreResult, error) {
	path, err := localPath(name)
	if err != nil {
		return nil, err
	}
	from, err := p.openSnapshot(id)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	src, info, err := open(ctx, from, path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	if old, err := p.files.Lstat(path); err == nil && !old.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a file: %w", name, fs.ErrExist)
	}
	w.total = info.Size()
	w.at(ctx, name)
	m := meta{perm: info.Mode().Perm() | 0o200, mtime: info.ModTime()} // the snapshot removed the write permission
	err = replace(p.files, path, m, func(dst *os.File) error {
		if _, err := w.copy(ctx, sparse{dst}, contents(src, info)); err != nil {
			return err
		}
		return sparse{dst}.truncate()
	})
	if err != nil {
		return nil, err
	}
	w.at(ctx, "")
	return &restoreResult{Path: name, Bytes: w.done}, syncParents(p.files, path)
}

// A thinResult is the result of thinning out.
type thinResult struct {
	Kept    int      `json:"kept"`
	Removed []string `json:"removed"`
}

// thin removes the expired snapshots.
func (p *pool) thin(ctx context.Context, w *worker, keep int) (*thinResult, error) {
	r := &thinResult{Removed: []string{}}
	// Rename each snapshot first, so that a partly removed one is never visible.
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

// expired returns the expired snapshots, oldest first. The newest keep snapshots do not
// expire, nor does the last snapshot of each of the latest 24 hours and 30 days that have
// snapshots.
func expired(ids []string, keep int) (old []string) {
	hours := period{length: time.Hour, left: keepHours}
	days := period{length: 24 * time.Hour, left: keepDays}
	for i, id := range slices.Backward(ids) {
		t, _ := snapshotTime(id)
		lastOfHour, lastOfDay := hours.begins(t), days.begins(t) // no short-circuit: both count
		if len(ids)-i > keep && !lastOfHour && !lastOfDay {
			old = append(old, id)
		}
	}
	slices.Reverse(old)
	return old
}

// A period steps back in time from one hour or day with snapshots to the previous one.
type period struct {
	length time.Duration
	left   int // number of hours or days left
	at     time.Time
}

// begins reports whether t is in another hour or day than the previous times.
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
}

// run submits the operations that are due, until ctx is done.
func (s *scheduler) run(ctx context.Context) {
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

// submitDue submits the operations that are due for a pool. The ID of the snapshot
// operation is that of the period, so that the snapshot is taken at most once, even if it
// fails or the daemon is restarted, unless it was interrupted or belonged to an earlier
// pool with that name. Nothing is submitted while the last snapshot is unfinished, so that
// snapshots do not pile up behind a scrub that takes days.
func (s *scheduler) submitDue(name string, now time.Time) error {
	ids, listErr := s.storage.snapshots(name)
	period := "auto-" + name + "-" + now.UTC().Truncate(s.every).Format(snapshotID)
	op, err := s.storage.autoSnapshot(name, period)
	for try := 2; errors.Is(err, task.ErrExists) && (op.Interrupted() || s.storage.ofEarlier(name, op)); try++ {
		op, err = s.storage.autoSnapshot(name, fmt.Sprintf("%s.%d", period, try))
	}
	if err == nil {
		err = listErr
	}
	if err == nil && len(expired(append(ids, newSnapshotID(now, ids)), s.keep)) > 0 {
		_, err = s.storage.thin(name, s.keep)
	}
	if errors.Is(err, task.ErrExists) {
		return nil
	}
	return err
}

// ofEarlier reports whether a finished operation belonged to an earlier pool with that
// name, because it was submitted before the present pool was created.
func (s *storage) ofEarlier(name string, op *task.Operation) bool {
	created, err := s.tasks.List(1, 0, task.ByName(about{Kind: "create", Pool: name}.name()))
	return err == nil && len(created) > 0 && op.State.Finished() && op.CreatedAt.Before(created[0].CreatedAt)
}
