package main

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// must ends the test if its setup fails.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newStorage returns a storage service with some pools.
func newStorage(t *testing.T, pools ...string) *storage {
	t.Helper()
	s, err := openStorage(t.TempDir())
	must(t, err)
	s.tasks, err = task.New(nil)
	must(t, err)
	t.Cleanup(func() {
		must(t, s.tasks.Close())
		must(t, s.pools.Close())
	})
	for _, name := range pools {
		must(t, s.makePool(t.Context(), name, func(int) {}))
	}
	return s
}

// openPool opens a pool until the test ends.
func openPool(t *testing.T, s *storage, name string) *pool {
	t.Helper()
	p, err := s.open(name)
	must(t, err)
	t.Cleanup(p.close)
	return p
}

func newPool(t *testing.T) *pool {
	return openPool(t, newStorage(t, "tank"), "tank")
}

// longAgo is the time of files for which settle does not wait.
var longAgo = time.Date(2026, 1, 2, 3, 4, 5, 678_901_000, time.UTC)

// write writes a file and sets its time to longAgo.
func write(t *testing.T, root *os.Root, name, content string) {
	t.Helper()
	must(t, root.MkdirAll(filepath.Dir(name), 0o700))
	must(t, root.WriteFile(name, []byte(content), 0o640))
	must(t, root.Chtimes(name, longAgo, longAgo))
}

// makeHuge creates a file that takes no space but hours to read.
func makeHuge(t *testing.T, path string) {
	t.Helper()
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, 10<<40))
}

// tree returns the contents of all files in a directory, by path.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		files[filepath.ToSlash(rel)] = string(content)
		return err
	}))
	return files
}

func wantTree(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	if got := tree(t, dir); !maps.Equal(got, want) {
		t.Errorf("%s contains %v, want %v", dir, got, want)
	}
}

// cancelled returns a context and a worker that cancels it after its first chunk.
func cancelled(t *testing.T) (context.Context, *worker) {
	ctx, cancel := context.WithCancelCause(t.Context())
	return ctx, &worker{update: func(int) { cancel(task.ErrCancelled) }}
}

func TestNames(t *testing.T) {
	s := newStorage(t, "tank")
	for _, name := range []string{
		"", ".", "..", "../tank", "/tank", "tank/", "a/b", `a\b`, "Tank", "tänk", "-a", "_a", ".a", "a.b", "a b", "a\x00", "a\n",
		strings.Repeat("a", 64),
	} {
		if _, err := s.create(name); !errors.As(err, new(inputError)) {
			t.Errorf("create %q: got %v, want an inputError", name, err)
		}
		if _, err := s.scrub(name); !errors.As(err, new(inputError)) {
			t.Errorf("scrub %q: got %v, want an inputError", name, err)
		}
	}
	if _, err := s.create("tank"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create an existing pool: got %v, want %v", err, fs.ErrExist)
	}
	if _, err := s.scrub("gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("scrub a missing pool: got %v, want %v", err, fs.ErrNotExist)
	}
	if _, err := s.replicate("tank", "gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("replicate to a missing pool: got %v, want %v", err, fs.ErrNotExist)
	}
	if _, err := s.replicate("tank", "tank"); !errors.As(err, new(inputError)) {
		t.Errorf("replicate to itself: got %v, want an inputError", err)
	}

	p := openPool(t, s, "tank")
	for _, name := range []string{
		"", ".", "..", "../x", "/x", "a/../b", "a//b", "a/", "./a", "a\x00", incoming, incoming + "/a",
	} {
		if err := p.put(t.Context(), new(worker), name, strings.NewReader("x")); !errors.As(err, new(inputError)) {
			t.Errorf("put %q: got %v, want an inputError", name, err)
		}
	}
}

func TestCreate(t *testing.T) {
	s := newStorage(t)
	long := strings.Repeat("a", 63)
	var ops []*task.Operation
	for _, name := range []string{"tank", long, "0-_"} {
		op, err := s.create(name)
		must(t, err)
		ops = append(ops, op)
	}
	for _, op := range ops {
		op, err := s.tasks.Wait(t.Context(), op.ID)
		must(t, err)
		if op.State != task.StateDone {
			t.Errorf("%s: %s %s", op.Name, op.State, op.Error)
		}
	}
	// Entries that are not pools are not listed, but their names are taken.
	must(t, s.pools.Mkdir(".creating-x", 0o700))
	must(t, s.pools.Mkdir("half", 0o700))
	write(t, s.pools, "stray", "")
	for _, name := range []string{"half", "stray", "tank"} {
		want := "the name " + name + " is already taken"
		if _, err := s.create(name); err == nil || err.Error() != want || !errors.Is(err, fs.ErrExist) {
			t.Errorf("create %s: got %v, want %q", name, err, want)
		}
	}
	names, err := s.names()
	if want := []string{"0-_", long, "tank"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("got %v and %v, want %v", names, err, want)
	}
	// A killed create does not block the name.
	must(t, s.makePool(t.Context(), "x", func(int) {}))
	if _, err := openPool(t, s, "x").manifest(); err != nil {
		t.Error(err)
	}
	if err := s.makePool(t.Context(), "tank", func(int) {}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create a pool that exists meanwhile: got %v, want %v", err, fs.ErrExist)
	}
}

func TestPut(t *testing.T) {
	p := newPool(t)
	dir := p.files.Name()
	must(t, p.put(t.Context(), new(worker), "a", strings.NewReader("one")))
	must(t, p.put(t.Context(), new(worker), "a", strings.NewReader("two")))
	must(t, p.put(t.Context(), new(worker), "b/c/d", strings.NewReader("")))
	want := map[string]string{"a": "two", "b/c/d": ""}
	wantTree(t, dir, want)

	if err := p.put(t.Context(), new(worker), "b/c", strings.NewReader("x")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("put over a directory: got %v, want %v", err, fs.ErrExist)
	}
	if err := p.put(t.Context(), new(worker), "a/x", strings.NewReader("x")); err == nil {
		t.Error("put below a file: no error")
	}
	broken := readerFunc(func(b []byte) (int, error) { return copy(b, "part"), errors.New("broken") })
	if err := p.put(t.Context(), new(worker), "a", broken); !errors.As(err, new(readError)) {
		t.Errorf("got %v, want a readError", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	endless := readerFunc(func(b []byte) (int, error) {
		cancel(task.ErrClosed)
		return len(b), nil
	})
	if err := p.put(ctx, new(worker), "a", endless); !errors.Is(err, task.ErrClosed) {
		t.Errorf("got %v, want %v", err, task.ErrClosed)
	}
	wantTree(t, dir, want) // and nothing in .incoming
}

// TestEscape checks that no link leads reads or writes out of a pool.
func TestEscape(t *testing.T) {
	s := newStorage(t, "tank", "backup")
	p, to := openPool(t, s, "tank"), openPool(t, s, "backup")
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600))
	for name, target := range map[string]string{
		"dir": outside, "file": filepath.Join(outside, "secret"), "up": "../../..", "manifest": "../manifest", "loop": "loop",
	} {
		must(t, os.Symlink(target, filepath.Join(p.files.Name(), name)))
		must(t, os.Symlink(target, filepath.Join(to.files.Name(), name)))
	}
	write(t, p.files, "a", "a")
	for _, name := range []string{"dir/secret", "dir/new", "file", "up/x", "manifest", "loop"} {
		if err := p.put(t.Context(), new(worker), name, strings.NewReader("x")); err == nil {
			t.Errorf("put through the link %s: no error", name)
		}
	}
	r, err := p.scrub(t.Context(), new(worker), manifest{})
	must(t, err)
	if r.Files != 1 || r.Others != 5 {
		t.Errorf("scrub: %+v, want one file read and 5 links skipped", r)
	}
	snap, err := p.snapshot(t.Context(), new(worker))
	must(t, err)
	wantTree(t, filepath.Join(p.root.Name(), snapshotsDir, snap.ID), map[string]string{"a": "a"})
	if r, err := p.replicate(t.Context(), new(worker), to); err != nil || r.Copied != 1 {
		t.Errorf("replicate: %+v, %v, want the one file copied", r, err)
	}
	// These are files in the source, but links to the outside in the target.
	must(t, p.files.Remove("dir"))
	write(t, p.files, "dir/secret", "x")
	if r, err := p.replicate(t.Context(), new(worker), to); err == nil || r.Blocked.Count != 1 {
		t.Errorf("replicate to outside: %+v, %v", r, err)
	}
	wantTree(t, outside, map[string]string{"secret": "secret"})

	must(t, os.Symlink(outside, filepath.Join(s.pools.Name(), "out")))
	if _, err := s.scrub("out"); err == nil {
		t.Error("no error for a pool that is a link to outside")
	}
	must(t, p.root.Remove(manifestFile))
	must(t, os.Symlink(filepath.Join(outside, "secret"), filepath.Join(p.root.Name(), manifestFile)))
	if _, err := p.manifest(); err == nil {
		t.Error("no error for a manifest that is a link to outside")
	}
}

// TestOpenStorage checks that opening removes incomplete files of a killed daemon.
func TestOpenStorage(t *testing.T) {
	s := newStorage(t, "tank")
	p := openPool(t, s, "tank")
	write(t, p.files, "a", "a")
	write(t, p.files, incoming+"/X", "part")
	write(t, p.root, incoming+"/X", "part")
	// Broken pools don't affect the others.
	must(t, s.pools.Mkdir("half", 0o700))
	must(t, os.Symlink("loop", filepath.Join(s.pools.Name(), "loop")))
	again, err := openStorage(filepath.Dir(s.pools.Name()))
	must(t, err)
	must(t, again.pools.Close())
	wantTree(t, p.files.Name(), map[string]string{"a": "a"})
	if got := slices.Sorted(maps.Keys(tree(t, p.root.Name()))); !slices.Equal(got, []string{"files/a", "manifest"}) {
		t.Errorf("left are %v", got)
	}
}

// TestLock checks that operations on one pool run one at a time and do not delay those on
// other pools.
func TestLock(t *testing.T) {
	s := newStorage(t, "tank", "backup", "other", "free")
	running, end := make(chan string), make(chan struct{})
	hold := func(a about) *task.Operation {
		op, err := s.submit(a, func(context.Context, func(int)) (any, error) {
			running <- a.Kind
			<-end
			return nil, nil
		})
		must(t, err)
		return op
	}
	wantNext := func(want string) {
		t.Helper()
		if got := <-running; got != want {
			t.Fatalf("the next to run is %q, want %q", got, want)
		}
	}
	hold(about{Kind: "first", Pool: "tank"})
	wantNext("first")
	to := hold(about{Kind: "to tank", Pool: "other", To: "tank"})
	from := hold(about{Kind: "from tank", Pool: "tank", To: "backup"})
	hold(about{Kind: "elsewhere", Pool: "free"})
	wantNext("elsewhere")
	for _, op := range []*task.Operation{to, from} {
		if op, _ := s.tasks.Get(op.ID); op.State != task.StatePending {
			t.Errorf("%s is %s, want %s", op.Name, op.State, task.StatePending)
		}
	}
	close(end)
	wantNext("to tank")
	wantNext("from tank")
}

func TestMetadata(t *testing.T) {
	s := newStorage(t, "tank")
	write(t, openPool(t, s, "tank").files, "a", "a")
	op, err := s.scrub("tank")
	must(t, err)
	op, err = s.tasks.Wait(t.Context(), op.ID)
	must(t, err)
	var a about
	must(t, op.DecodeMetadata(&a))
	if want := (about{Kind: "scrub", Pool: "tank"}); a != want || op.Name != "scrub tank" {
		t.Errorf("got %q with %+v, want %+v", op.Name, a, want)
	}
	var r scrubResult
	must(t, op.DecodeResult(&r))
	if want := (scrubResult{Files: 1, Bytes: 1, New: files("a")}); !reflect.DeepEqual(r, want) {
		t.Errorf("got %+v, want %+v", r, want)
	}
}

func TestSettle(t *testing.T) {
	began := time.Now()
	must(t, settle(t.Context(), began))
	if age := time.Since(began); age < tick {
		t.Errorf("returned after %v, want %v at least", age, tick)
	}
	must(t, settle(t.Context(), longAgo))
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(task.ErrCancelled)
	must(t, settle(ctx, time.Now().Add(time.Hour))) // the time is in the future, as if set by hand: do not wait
	if err := settle(ctx, time.Now()); err != nil && !errors.Is(err, task.ErrCancelled) {
		t.Errorf("got %v, want %v", err, task.ErrCancelled)
	}
}

func TestListBounded(t *testing.T) {
	var l list
	for range 3 * maxListed {
		l.add("a")
	}
	if l.Count != 3*maxListed || len(l.Paths) != maxListed {
		t.Errorf("the list counts %d and names %d", l.Count, len(l.Paths))
	}
}
