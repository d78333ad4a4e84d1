package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

func files(paths ...string) list { return list{Count: len(paths), Paths: paths} }

// scrubbed scrubs a pool.
func scrubbed(t *testing.T, p *pool) (*scrubResult, error) {
	t.Helper()
	known, err := p.manifest()
	must(t, err)
	return p.scrub(t.Context(), new(worker), known)
}

func TestScrub(t *testing.T) {
	accept := func(t *testing.T, p *pool) {
		if _, err := p.scrub(t.Context(), new(worker), nil); err != nil {
			t.Error(err)
		}
	}
	corrupt := func(t *testing.T, p *pool) { write(t, p.files, "b/c", "CCC") } // with unchanged time
	tests := []struct {
		name  string
		steps []func(t *testing.T, p *pool) // with a scrub between every two
		want  scrubResult
		err   string
	}{
		{
			name: "clean",
			want: scrubResult{Files: 2, Bytes: 4},
		},
		{
			name:  "corrupted",
			steps: []func(*testing.T, *pool){corrupt},
			want:  scrubResult{Files: 2, Bytes: 4, Corrupted: files("b/c")},
			err:   "corrupted: 1, unreadable: 0, of 2 files",
		},
		{
			name:  "still corrupted",
			steps: []func(*testing.T, *pool){corrupt, func(*testing.T, *pool) {}},
			want:  scrubResult{Files: 2, Bytes: 4, Corrupted: files("b/c")},
			err:   "corrupted: 1, unreadable: 0, of 2 files",
		},
		{
			name: "corrupted and restored",
			steps: []func(*testing.T, *pool){
				corrupt, func(t *testing.T, p *pool) { write(t, p.files, "b/c", "ccc") },
			},
			want: scrubResult{Files: 2, Bytes: 4},
		},
		{
			name:  "corrupted and accepted",
			steps: []func(*testing.T, *pool){func(t *testing.T, p *pool) { corrupt(t, p); accept(t, p) }},
			want:  scrubResult{Files: 2, Bytes: 4},
		},
		{
			name: "time changed",
			steps: []func(*testing.T, *pool){func(t *testing.T, p *pool) {
				must(t, p.files.Chtimes("a", longAgo, longAgo.Add(time.Nanosecond)))
			}},
			want: scrubResult{Files: 2, Bytes: 4, Changed: files("a")},
		},
		{
			name:  "size changed",
			steps: []func(*testing.T, *pool){func(t *testing.T, p *pool) { write(t, p.files, "a", "aa") }},
			want:  scrubResult{Files: 2, Bytes: 5, Changed: files("a")},
		},
		{
			name: "changed and then corrupted",
			steps: []func(*testing.T, *pool){
				func(t *testing.T, p *pool) { write(t, p.files, "a", "aa") },
				func(t *testing.T, p *pool) { write(t, p.files, "a", "aA") },
			},
			want: scrubResult{Files: 2, Bytes: 5, Corrupted: files("a")},
			err:  "corrupted: 1, unreadable: 0, of 2 files",
		},
		{
			name: "new and missing",
			steps: []func(*testing.T, *pool){func(t *testing.T, p *pool) {
				must(t, p.files.RemoveAll("b"))
				write(t, p.files, "d", "d")
			}},
			want: scrubResult{Files: 2, Bytes: 2, New: files("d"), Missing: files("b/c")},
		},
		{
			name: "missing, reported once",
			steps: []func(*testing.T, *pool){
				func(t *testing.T, p *pool) { must(t, p.files.RemoveAll("b")) },
				func(*testing.T, *pool) {},
			},
			want: scrubResult{Files: 1, Bytes: 1},
		},
		{
			name: "files being written",
			steps: []func(*testing.T, *pool){func(t *testing.T, p *pool) {
				write(t, p.files, incoming+"/x", "part")
				write(t, p.files, "b/"+incoming, "ordinary file")
			}},
			want: scrubResult{Files: 3, Bytes: 17, New: files("b/" + incoming)},
		},
		{
			name:  "name with special characters",
			steps: []func(*testing.T, *pool){func(t *testing.T, p *pool) { write(t, p.files, "\n \"%ü", "x") }},
			want:  scrubResult{Files: 3, Bytes: 5, New: files("\n \"%ü")},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPool(t)
			write(t, p.files, "a", "a")
			write(t, p.files, "b/c", "ccc")
			r, err := scrubbed(t, p)
			must(t, err)
			if want := (scrubResult{Files: 2, Bytes: 4, New: files("a", "b/c")}); !reflect.DeepEqual(*r, want) {
				t.Fatalf("the first scrub returned %+v, want %+v", *r, want)
			}
			r, err = scrubbed(t, p)
			for _, step := range tt.steps {
				step(t, p)
				r, err = scrubbed(t, p)
			}
			if !reflect.DeepEqual(*r, tt.want) {
				t.Errorf("got  %+v\nwant %+v", *r, tt.want)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("got error %v, want %q", err, tt.err)
			}
		})
	}
}

// TestScrubUnreadable checks that unreadable files are reported and that their checksums
// are kept.
func TestScrubUnreadable(t *testing.T) {
	p := newPool(t)
	s := &scrub{pool: p, worker: new(worker), next: make(manifest), known: manifest{
		"dir/a": {sum: "a"}, "dir/b/c": {sum: "c"}, "dir2": {sum: "2"},
	}}
	must(t, s.visit(t.Context(), "dir", readError{syscall.EIO}))
	want := manifest{"dir/a": {sum: "a"}, "dir/b/c": {sum: "c"}}
	if !reflect.DeepEqual(s.result.Unreadable, list{1, []string{"dir"}, syscall.EIO.Error()}) || !reflect.DeepEqual(s.next, want) {
		t.Errorf("got %+v and %v, want dir and %v", s.result, s.next, want)
	}
	must(t, s.visit(t.Context(), "deleted", nil))
	if s.result.Unreadable.Count != 1 {
		t.Errorf("a deleted file is reported as unreadable: %+v", s.result)
	}
	must(t, p.root.RemoveAll(filesDir))
	if _, err := scrubbed(t, p); err == nil {
		t.Error("no error without the directory of files")
	}
}

// TestScrubChanging checks that a file that changes while it is read is not reported as
// corrupted.
func TestScrubChanging(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "a", "a")
	_, err := scrubbed(t, p)
	must(t, err)
	known, err := p.manifest()
	must(t, err)
	change := func(int) {
		f, err := p.files.OpenFile("a", os.O_WRONLY, 0)
		must(t, err)
		_, err = f.WriteString("b")
		must(t, errors.Join(err, f.Close()))
	}
	for range 2 { // with the time in the manifest, and with a different one
		r, err := p.scrub(t.Context(), &worker{update: change}, known)
		must(t, err)
		if want := (scrubResult{Files: 1, Bytes: 1, Changed: files("a")}); !reflect.DeepEqual(*r, want) {
			t.Errorf("got %+v, want %+v", *r, want)
		}
	}
	if r, err := scrubbed(t, p); err != nil || !reflect.DeepEqual(r.Changed, files("a")) {
		t.Errorf("got %+v and %v, want a changed file", r, err)
	}
	if r, err := scrubbed(t, p); err != nil || !reflect.DeepEqual(*r, scrubResult{Files: 1, Bytes: 1}) {
		t.Errorf("got %+v and %v, want no change", r, err)
	}
}

func TestScrubCancel(t *testing.T) {
	p := newPool(t)
	makeHuge(t, filepath.Join(p.files.Name(), "huge"))
	before, err := p.manifest()
	must(t, err)
	ctx, w := cancelled(t)
	r, err := p.scrub(ctx, w, before)
	if !errors.Is(err, task.ErrCancelled) || r.Bytes != chunkSize {
		t.Errorf("got %+v and %v, want one chunk read and %v", r, err, task.ErrCancelled)
	}
	if after, err := p.manifest(); err != nil || !reflect.DeepEqual(after, before) {
		t.Errorf("the manifest has become %v, %v", after, err)
	}
}

// corrupt changes the content of a one-byte file, but not its time.
func corrupt(t *testing.T, p *pool, path string) { write(t, p.files, path, "X") }

var placeTests = []struct {
	name          string
	before, after func(t *testing.T, p *pool) // the interruption
	place         place
	want          scrubResult
	err           string
}{
	{
		name:  "not read again",
		after: func(t *testing.T, p *pool) { corrupt(t, p, "a"); must(t, p.files.Remove("b/c")) },
		place: place{Last: "b.old", New: 3},
		want:  scrubResult{Files: 3, Bytes: 3, New: list{Count: 4, Paths: []string{"z"}}, Missing: files("b/c")},
	},
	{
		name: "corrupted before",
		before: func(t *testing.T, p *pool) {
			_, err := scrubbed(t, p)
			must(t, err)
			corrupt(t, p, "b/c")
		},
		place: place{Last: "a"},
		want:  scrubResult{Files: 4, Bytes: 4, Corrupted: files("b/c")},
		err:   "corrupted: 1, unreadable: 0, of 4 files",
	},
}

// TestScrubPlace checks that a resumed scrub does not read the files before its place
// again, but finds a corrupted one again.
func TestScrubPlace(t *testing.T) {
	defer func(every time.Duration) { placeEvery = every }(placeEvery)
	placeEvery = 0
	for _, tt := range placeTests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPool(t)
			for _, path := range []string{"a", "b/c", "b.old", "z"} {
				write(t, p.files, path, "1")
			}
			if tt.before != nil {
				tt.before(t, p)
			}
			at := interrupted(t, p)
			if at == nil || *at != tt.place {
				t.Fatalf("the place is %+v, want %+v", at, tt.place)
			}
			if tt.after != nil {
				tt.after(t, p)
			}
			known, err := p.manifest()
			must(t, err)
			r, err := p.scrub(t.Context(), &worker{about: about{Place: at}}, known)
			if !reflect.DeepEqual(*r, tt.want) {
				t.Errorf("got  %+v\nwant %+v", *r, tt.want)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("got error %v, want %q", err, tt.err)
			}
		})
	}
}

// interrupted scrubs a pool until the scrub reaches a huge file, and returns its place.
func interrupted(t *testing.T, p *pool) *place {
	t.Helper()
	huge := filepath.Join(p.files.Name(), "huge")
	makeHuge(t, huge)
	known, err := p.manifest()
	must(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	w := new(worker)
	w.update = func(int) {
		if w.done >= chunkSize {
			cancel(task.ErrCancelled)
		}
	}
	if _, err := p.scrub(ctx, w, known); !errors.Is(err, task.ErrCancelled) {
		t.Fatalf("got %v, want %v", err, task.ErrCancelled)
	}
	must(t, os.Remove(huge))
	return w.about.Place
}

// TestManifestDamaged checks that any damage to the manifest is detected, and repaired by
// accepting the files.
func TestManifestDamaged(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "a", "a")
	write(t, p.files, "bad\xffname", "b") // if the file system allows it
	_, err := scrubbed(t, p)
	must(t, err)
	good, err := p.root.ReadFile(manifestFile)
	must(t, err)
	known, err := parseManifest(string(good))
	must(t, err)
	if got := known.text(); got != string(good) {
		t.Errorf("parsed and written again, %q becomes %q", good, got)
	}
	for i := range good {
		if _, err := parseManifest(string(good[:i])); err == nil {
			t.Errorf("no error for the first %d bytes", i)
		}
		bad := []byte(string(good))
		bad[i] ^= 1
		if _, err := parseManifest(string(bad)); err == nil {
			t.Errorf("no error with byte %d flipped", i)
		}
	}
	for _, line := range []string{"", "a 1 2", "a x 2 \"a\"", "a 1 x \"a\"", "a 1 2 a"} {
		if _, _, err := parseEntry(line); err == nil {
			t.Errorf("no error for the line %q", line)
		}
	}

	must(t, p.root.WriteFile(manifestFile, good[1:], 0o600))
	if _, err := p.manifest(); err == nil || !strings.Contains(err.Error(), "/accept") {
		t.Errorf("got %v, want it to say what to do", err)
	}
	must(t, p.root.Remove(manifestFile))
	if _, err := p.manifest(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
	_, err = p.scrub(t.Context(), new(worker), nil)
	must(t, err)
	if r, err := scrubbed(t, p); err != nil || r.New.Count+r.Changed.Count+r.Missing.Count != 0 {
		t.Errorf("got %+v and %v, want no change", r, err)
	}
}
