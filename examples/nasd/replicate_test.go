package main

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// twoPools returns a scrubbed pool with two files, and an empty one.
func twoPools(t *testing.T) (p, to *pool) {
	t.Helper()
	s := newStorage(t, "tank", "backup")
	p, to = openPool(t, s, "tank"), openPool(t, s, "backup")
	write(t, p.files, "a", "a")
	write(t, p.files, "b/c", "ccc")
	_, err := scrubbed(t, p)
	must(t, err)
	return p, to
}

func TestReplicate(t *testing.T) {
	want := map[string]string{"a": "a", "b/c": "ccc"}
	tests := []struct {
		name   string
		change func(t *testing.T, p, to *pool) // between two replications
		want   replicateResult
		err    string
		also   map[string]string // files in which the target differs
	}{
		{
			name:   "nothing changed",
			change: func(t *testing.T, p, to *pool) {},
			want:   replicateResult{Skipped: 2, Bytes: 4},
		},
		{
			name:   "changed",
			change: func(t *testing.T, p, to *pool) { write(t, p.files, "a", "new") },
			want:   replicateResult{Copied: 1, Skipped: 1, Bytes: 6},
			also:   map[string]string{"a": "new"},
		},
		{
			name: "another time",
			change: func(t *testing.T, p, to *pool) {
				must(t, p.files.Chtimes("a", longAgo, longAgo.Add(time.Nanosecond)))
			},
			want: replicateResult{Copied: 1, Skipped: 1, Bytes: 4},
		},
		{
			name: "lost and changed in the target",
			change: func(t *testing.T, p, to *pool) {
				must(t, to.files.RemoveAll("b"))
				must(t, to.files.Chtimes("a", time.Time{}, time.Now()))
			},
			want: replicateResult{Copied: 2, Bytes: 4},
		},
		{
			name:   "only in the target",
			change: func(t *testing.T, p, to *pool) { write(t, to.files, "x/y", "mine") },
			want:   replicateResult{Skipped: 2, Bytes: 4},
			also:   map[string]string{"x/y": "mine"},
		},
		{
			name: "corrupted in the source",
			change: func(t *testing.T, p, to *pool) {
				write(t, p.files, "a", "A") // with unchanged time
				must(t, to.files.Chtimes("a", time.Time{}, time.Now()))
			},
			want: replicateResult{Skipped: 1, Bytes: 4, Corrupted: files("a")},
			err:  "not copied: 1 corrupted, 0 unreadable and 0 blocked files",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, to := twoPools(t)
			r, err := p.replicate(t.Context(), new(worker), to)
			must(t, err)
			if want := (replicateResult{Copied: 2, Bytes: 4}); !reflect.DeepEqual(*r, want) {
				t.Errorf("the first replication returned %+v, want %+v", *r, want)
			}
			tt.change(t, p, to)
			r, err = p.replicate(t.Context(), new(worker), to)
			if !reflect.DeepEqual(*r, tt.want) {
				t.Errorf("got  %+v\nwant %+v", *r, tt.want)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("got error %v, want %q", err, tt.err)
			}
			want := maps.Clone(want)
			maps.Copy(want, tt.also)
			wantTree(t, to.files.Name(), want)
		})
	}
}

func TestReplicateMeta(t *testing.T) {
	p, to := twoPools(t)
	must(t, p.files.Chmod("a", 0o751))
	_, err := p.replicate(t.Context(), new(worker), to)
	must(t, err)
	info, err := to.files.Lstat("a")
	must(t, err)
	if !info.ModTime().Equal(longAgo) || runtime.GOOS != "windows" && info.Mode() != 0o751 {
		t.Errorf("the copy has time %v and mode %v", info.ModTime(), info.Mode())
	}
	// The target has checksums from the start.
	write(t, to.files, "a", "A")
	if r, err := scrubbed(t, to); err == nil || !reflect.DeepEqual(r.Corrupted, files("a")) || r.New.Count > 0 {
		t.Errorf("scrub of the target: %+v, %v", r, err)
	}
}

// TestReplicateAfterKill: the killed replication has copied files but not stored their
// checksums.
func TestReplicateAfterKill(t *testing.T) {
	p, to := twoPools(t)
	_, err := p.replicate(t.Context(), new(worker), to)
	must(t, err)
	must(t, to.saveManifest(manifest{}))
	r, err := p.replicate(t.Context(), new(worker), to)
	if err != nil || r.Skipped != 2 {
		t.Errorf("got %+v and %v, want both skipped", r, err)
	}
	if r, err := scrubbed(t, to); err != nil || r.New.Count > 0 {
		t.Errorf("scrub of the target: %+v, %v; want nothing new", r, err)
	}
}

func TestReplicateCancel(t *testing.T) {
	p, to := twoPools(t)
	makeHuge(t, filepath.Join(p.files.Name(), "b/huge"))
	ctx, w := cancelled(t)
	update := w.update
	w.update = func(n int) {
		if w.done >= 4+3*chunkSize {
			update(n)
		}
	}
	r, err := p.replicate(ctx, w, to)
	if !errors.Is(err, task.ErrCancelled) || r.Bytes != 4+3*chunkSize || r.Copied != 2 {
		t.Errorf("got %+v and %v, want two files and three chunks copied, and %v", r, err, task.ErrCancelled)
	}
	wantTree(t, to.files.Name(), map[string]string{"a": "a", "b/c": "ccc"})
	if r, err := scrubbed(t, to); err != nil || r.New.Count > 0 {
		t.Errorf("scrub of the target: %+v, %v; want nothing new", r, err)
	}
	must(t, p.files.Remove("b/huge"))
	if r, err := p.replicate(t.Context(), new(worker), to); err != nil || r.Skipped != 2 || r.Copied != 0 {
		t.Errorf("again: got %+v and %v, want both skipped", r, err)
	}
}

// TestReplicateBlocked checks that files whose path is taken in the target are reported,
// and that the others are copied.
func TestReplicateBlocked(t *testing.T) {
	outside := t.TempDir()
	link := func(target string) func(*testing.T, *pool) {
		return func(t *testing.T, to *pool) {
			must(t, to.files.RemoveAll("b"))
			must(t, os.Symlink(target, filepath.Join(to.files.Name(), "b")))
		}
	}
	for _, tt := range []struct {
		name  string
		block func(t *testing.T, to *pool)
		path  string
	}{
		{"directory", func(t *testing.T, to *pool) { must(t, to.files.MkdirAll("a/x", 0o700)) }, "a"},
		{"file in the path", func(t *testing.T, to *pool) { write(t, to.files, "b", "") }, "b/c"},
		{"link to outside", link(outside), "b/c"},
		{"dangling link", link("gone"), "b/c"},
		{"a loop", link("b"), "b/c"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, to := twoPools(t)
			tt.block(t, to)
			r, err := p.replicate(t.Context(), new(worker), to)
			if err == nil || !strings.HasPrefix(err.Error(), "not copied: 0 corrupted, 0 unreadable and 1 blocked files; the first: ") {
				t.Errorf("got %v", err)
			}
			if r.Copied != 1 || r.Blocked.Count != 1 || !slices.Equal(r.Blocked.Paths, []string{tt.path}) {
				t.Errorf("got %+v, want one copied and %s blocked", r, tt.path)
			}
			wantTree(t, outside, nil)
		})
	}
}

// TestReplicateErrors checks that unreadable files are reported and that a failed write
// ends the replication.
func TestReplicateErrors(t *testing.T) {
	p, to := twoPools(t)
	c := &copier{from: p, to: to, worker: new(worker)}
	must(t, c.visit(t.Context(), "dir", readError{syscall.EIO}))
	must(t, c.visit(t.Context(), "deleted", nil))
	if want := (list{1, []string{"dir"}, syscall.EIO.Error()}); !reflect.DeepEqual(c.result.Unreadable, want) {
		t.Errorf("got %+v, want %+v", c.result, want)
	}
	must(t, to.files.RemoveAll(incoming))
	write(t, to.files, incoming, "not a directory")
	if _, err := p.replicate(t.Context(), new(worker), to); err == nil {
		t.Error("no error of a write into a file")
	}
	if _, err := to.files.Lstat("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want %v", err, fs.ErrNotExist)
	}
	for _, damaged := range []*pool{to, p} {
		must(t, damaged.root.WriteFile(manifestFile, nil, 0o600))
		if _, err := p.replicate(t.Context(), new(worker), to); err == nil {
			t.Error("no error for a damaged manifest")
		}
	}
}
