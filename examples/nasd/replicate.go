package main

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// A replicateResult is the result of a replication.
type replicateResult struct {
	Copied     int   `json:"copied"`           // files
	Skipped    int   `json:"skipped"`          // files already in the target
	Bytes      int64 `json:"bytes"`            // of all these files
	Others     int   `json:"others,omitempty"` // links, devices and the like, which are not copied
	Corrupted  list  `json:"corrupted,omitzero"`
	Unreadable list  `json:"unreadable,omitzero"`
	Blocked    list  `json:"blocked,omitzero"` // files whose paths are taken by something else in the target
}

// replicate copies the files of p to another pool, except those with the same size and time
// there. It thus continues where an earlier replication was interrupted, and does not
// replace a corrupted copy until a user deletes it. It does not touch files that exist only
// in the target, and does not copy symbolic links. A file that is corrupted in p does not
// replace its copy, which may be good.
func (p *pool) replicate(ctx context.Context, w *worker, to *pool) (*replicateResult, error) {
	known, err := p.manifest()
	if err != nil {
		return nil, err
	}
	there, err := to.manifest()
	if err != nil {
		return nil, fmt.Errorf("the target: %w", err)
	}
	c := &copier{from: p, to: to, worker: w, known: known, there: there}
	err = w.each(ctx, p.files, func(path string, err error) error { return c.visit(ctx, path, err) })
	r := &c.result
	r.Bytes, r.Others = w.done, w.others
	// Also after an error: the files copied so far have valid checksums.
	err = errors.Join(err, syncParents(to.files, c.copied...), to.saveManifest(there))
	if err == nil && r.Corrupted.Count+r.Unreadable.Count+r.Blocked.Count > 0 {
		err = fmt.Errorf("not copied: %d corrupted, %d unreadable and %d blocked files%s",
			r.Corrupted.Count, r.Unreadable.Count, r.Blocked.Count, why(r.Unreadable, r.Blocked))
	}
	return r, err
}

// A copier is one replication.
type copier struct {
	from, to *pool
	worker   *worker
	known    manifest // of from
	there    manifest // of to, updated as files are copied
	copied   []string
	result   replicateResult
}

// visit copies a file if necessary. It returns only write errors, such as a full disk,
// which end the replication.
func (c *copier) visit(ctx context.Context, path string, err error) error {
	if err == nil {
		err = c.bring(ctx, path)
	}
	switch {
	case errors.Is(err, errCorrupted):
		c.result.Corrupted.add(path)
		return nil
	case errors.As(err, new(placeError)):
		c.result.Blocked.addError(path, err)
		return nil
	}
	return c.result.Unreadable.addUnreadable(ctx, path, err)
}

var errCorrupted = errors.New("corrupted")

func (c *copier) bring(ctx context.Context, path string) error {
	f, info, err := open(ctx, c.from.files, path)
	if err != nil {
		return err
	}
	defer f.Close()
	old, isKnown := c.known.find(path, info)
	if found, err := c.to.files.Lstat(path); err == nil && found.Mode().IsRegular() && unchanged(found, info) {
		if _, ok := c.there.find(path, info); !ok && isKnown {
			c.there[path] = old // left by a killed replication; the next scrub checks the copy
		}
		c.worker.moved(info.Size())
		c.result.Skipped++
		return nil
	}
	var sum string
	m := meta{perm: info.Mode().Perm(), mtime: info.ModTime()}
	err = replace(c.to.files, path, m, func(dst *os.File) error {
		if sum, err = c.worker.copy(ctx, sparse{dst}, contents(f, info)); err != nil {
			return err
		}
		if isKnown && sum != old.sum {
			return errCorrupted
		}
		return sparse{dst}.truncate()
	})
	if err != nil {
		return err
	}
	c.there[path] = newEntry(sum, info)
	c.copied = append(c.copied, path)
	c.result.Copied++
	return nil
}
