package owner

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"github.com/mynt-nas/task/internal/testos"
)

func newOwner(t *testing.T, database string) *Owner {
	t.Helper()
	o, err := New(database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Release() })
	return o
}

// needLocks skips a test on systems without file locks.
func needLocks(t *testing.T) {
	if !canLock {
		t.Skip("this system has no file locks")
	}
}

// leave creates the file of a dead owner, and returns its ID.
func leave(t *testing.T, database string) string {
	t.Helper()
	id := uuid.NewString()
	if err := os.WriteFile(database+"-owner-"+id, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return id
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func wantDead(t *testing.T, o *Owner, id string, want bool) {
	t.Helper()
	done, dead, err := o.Dead(id)
	if dead != want || err != nil {
		t.Errorf("Dead(%q) = %v, %v, want %v", id, dead, err, want)
	}
	if dead {
		done(false)
	}
}

// wantUnknown checks that an owner counts as alive because its file can't be examined.
func wantUnknown(t *testing.T, o *Owner, id string) {
	t.Helper()
	if _, dead, err := o.Dead(id); dead || err == nil || !strings.Contains(err.Error(), "-owner-"+id) {
		t.Errorf("Dead(%q) = %v, %v, want an error that names the file", id, dead, err)
	}
}

func TestNew(t *testing.T) {
	needLocks(t)
	database := filepath.Join(t.TempDir(), "some ?#% name.db")
	a, b := newOwner(t, database), newOwner(t, database)
	if a.ID == b.ID || !valid(a.ID) || !valid(b.ID) {
		t.Errorf("IDs %q and %q, want two UUIDs", a.ID, b.ID)
	}
	for _, o := range []*Owner{a, b} {
		if want := database + "-owner-" + o.ID; o.Path() != want {
			t.Errorf("Path() = %q, want %q", o.Path(), want)
		}
		info, err := os.Lstat(o.Path())
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("mode %v, want 0600", info.Mode())
		}
	}
	if exists(database) {
		t.Error("New has touched the database")
	}
}

// The users who may write the database may use the owner's file.
func TestShare(t *testing.T) {
	needLocks(t)
	for mode, want := range map[os.FileMode]os.FileMode{0o600: 0o600, 0o644: 0o600, 0o664: 0o660, 0o666: 0o666, 0o660: 0o660, 0o640: 0o600, 0o200: 0o600} {
		database := filepath.Join(t.TempDir(), "x.db")
		if err := errors.Join(os.WriteFile(database, nil, 0o600), os.Chmod(database, mode)); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(newOwner(t, database).Path())
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("beside a database of mode %v: %v, want %v", mode, info.Mode(), want)
		}
	}
}

func TestNewFails(t *testing.T) {
	needLocks(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, database := range map[string]string{
		"no directory":        filepath.Join(dir, "none", "x.db"),
		"file for directory":  filepath.Join(dir, "file", "x.db"),
		"name too long":       filepath.Join(dir, strings.Repeat("x", 250)),
		"path with NUL":       filepath.Join(dir, "a\x00b"),
		"directory in limits": filepath.Join(dir, strings.Repeat("x", 300), "x.db"),
	} {
		t.Run(name, func(t *testing.T) {
			if o, err := New(database); err == nil {
				o.Release()
				t.Errorf("New(%q) succeeded", database)
			}
		})
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("New has left something: %v", entries)
	}
}

// An in-memory database has only one owner.
func TestSole(t *testing.T) {
	o := newOwner(t, "")
	if o.Path() != "" || len(o.Others()) != 0 || !valid(o.ID) {
		t.Errorf("Path() = %q, Others() = %v, ID %q", o.Path(), o.Others(), o.ID)
	}
	wantDead(t, o, o.ID, false)
	for _, id := range []string{"", "x", uuid.NewString(), newOwner(t, "").ID} {
		wantDead(t, o, id, true)
	}
	if err := o.Release(); err != nil {
		t.Error(err)
	}
}

func TestRelease(t *testing.T) {
	needLocks(t)
	database := filepath.Join(t.TempDir(), "x.db")
	other := newOwner(t, database)
	for name, before := range map[string]func(path string) error{
		"as it was":              func(string) error { return nil },
		"file removed meanwhile": os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			o := newOwner(t, database)
			wantDead(t, other, o.ID, false)
			if err := before(o.Path()); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := o.Release(); err != nil {
					t.Error(err)
				}
			}
			if exists(o.Path()) {
				t.Error("the file is still there")
			}
			wantDead(t, other, o.ID, true)
		})
	}
}

func TestDead(t *testing.T) {
	needLocks(t)
	dir := t.TempDir()
	database := filepath.Join(dir, "x.db")
	o, living := newOwner(t, database), newOwner(t, database)
	elsewhere := newOwner(t, filepath.Join(dir, "y.db"))
	folder := uuid.NewString()
	if err := os.Mkdir(database+"-owner-"+folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, id string
		want     bool
	}{
		{"itself", o.ID, false},
		{"living, in the same process", living.ID, false},
		{"file without a lock", leave(t, database), true},
		{"no file", uuid.NewString(), true},
		{"owner of another database", elsewhere.ID, true},
	} {
		t.Run(test.name, func(t *testing.T) { wantDead(t, o, test.id, test.want) })
	}
	wantUnknown(t, o, folder)
	if !exists(living.Path()) || !exists(o.Path()) || !exists(elsewhere.Path()) {
		t.Error("the file of an owner that lives is gone")
	}
}

// An invalid ID must never become part of a path, wherever that would lead.
func TestDeadIsNoPath(t *testing.T) {
	needLocks(t)
	dir := t.TempDir()
	database := filepath.Join(dir, "x.db")
	o, living := newOwner(t, database), newOwner(t, database)
	id := living.ID
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	// With this directory, PREFIX/../victim leads to the victim.
	if err := os.Mkdir(database+"-owner-", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{
		"", ".", "..", "/", "/../victim", "../../etc/passwd", "../victim", "\x00", id + "\x00", id + "/../victim",
		" " + id, id + "\n", strings.ToUpper(id), "urn:uuid:" + id, "{" + id + "}", strings.ReplaceAll(id, "-", ""),
		id[:35], id + "0", "x" + id[1:],
	} {
		t.Run(id, func(t *testing.T) {
			done, dead, _ := o.Dead(id)
			if !dead {
				t.Fatalf("Dead(%q) = false", id)
			}
			done(true)
		})
	}
	if !exists(victim) || !exists(living.Path()) {
		t.Error("a file was removed")
	}
	wantDead(t, o, id, false)
}

func TestForget(t *testing.T) {
	needLocks(t)
	database := filepath.Join(t.TempDir(), "x.db")
	o := newOwner(t, database)
	for _, forget := range []bool{false, true} {
		id := leave(t, database)
		done, dead, _ := o.Dead(id)
		if !dead {
			t.Fatal("alive")
		}
		done(forget)
		if got := !exists(database + "-owner-" + id); got != forget {
			t.Errorf("done(%v): file removed = %v", forget, got)
		}
	}

	t.Run("another file by now", func(t *testing.T) {
		id := leave(t, database)
		path := database + "-owner-" + id
		done, dead, _ := o.Dead(id)
		if !dead {
			t.Fatal("alive")
		}
		if err := os.Rename(path, path+".old"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		done(true)
		if !exists(path) {
			t.Error("removed a file that it had not locked")
		}
	})
}

func TestOthers(t *testing.T) {
	needLocks(t)
	dir := t.TempDir()
	database := filepath.Join(dir, "x.db")
	o, living := newOwner(t, database), newOwner(t, database)
	newOwner(t, filepath.Join(dir, "xx.db"))
	newOwner(t, filepath.Join(dir, "x.db-owner-"))
	want := []string{living.ID, leave(t, database)}
	for _, name := range []string{"", "-wal", "-owner-", "-owner-x", "-owner-" + strings.ToUpper(living.ID), "-owner-" + living.ID + "~"} {
		if err := os.WriteFile(database+name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got := o.Others()
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("Others() = %v, want %v", got, want)
	}

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if got := o.Others(); len(got) != 0 {
		t.Errorf("Others() = %v in a directory that is gone", got)
	}
}

// A file that was unlinked before it was locked tells other owners nothing.
func TestNames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	step := func(what string, want bool, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if got := names(path, f); got != want {
			t.Errorf("%s: names = %v, want %v", what, got, want)
		}
	}
	step("as created", true, nil)
	step("renamed", false, os.Rename(path, path+"2"))
	step("symbolic link to it", false, os.Symlink(path+"2", path))
	step("link gone", false, os.Remove(path))
	step("another file", false, os.WriteFile(path, nil, 0o600))
	f.Close()
	step("closed", false, nil)
}

// New must never return an owner whose file others can't see, however eagerly they
// remove files of dead owners.
func TestNewBesideRecovery(t *testing.T) {
	needLocks(t)
	database := filepath.Join(t.TempDir(), "x.db")
	var stop atomic.Bool
	var reapers sync.WaitGroup
	for range 2 {
		o := newOwner(t, database)
		reapers.Go(func() {
			for !stop.Load() {
				for _, id := range o.Others() {
					if done, dead, _ := o.Dead(id); dead {
						done(true)
					}
				}
			}
		})
	}
	var makers sync.WaitGroup
	for range 4 {
		makers.Go(func() {
			for range 100 {
				o, err := New(database)
				if err != nil {
					t.Error(err)
					return
				}
				if !names(o.Path(), o.file) {
					t.Error("New returned an owner whose file is gone")
				}
				if err := o.Release(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	makers.Wait()
	stop.Store(true)
	reapers.Wait()
	entries, err := os.ReadDir(filepath.Dir(database))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 {
		t.Errorf("%d owner files, want those of the two that live", len(entries))
	}
}

// However many processes examine an owner at the same time, none mistakes another one's
// lock for the owner's.
func TestDeadToAll(t *testing.T) {
	needLocks(t)
	database := filepath.Join(t.TempDir(), "x.db")
	id := leave(t, database)
	alive := newOwner(t, database)
	var all sync.WaitGroup
	for range 8 {
		o := newOwner(t, database)
		all.Go(func() {
			for range 200 {
				done, dead, _ := o.Dead(id)
				if !dead {
					t.Error("the dead is alive")
					return
				}
				wantDead(t, o, alive.ID, false)
				done(false)
			}
		})
	}
	all.Wait()
}

func TestWithoutPermission(t *testing.T) {
	needLocks(t)
	dir := testos.Dir(t)
	database := filepath.Join(dir, "x.db")
	o := newOwner(t, database)
	locked := leave(t, database)
	if err := os.Chmod(database+"-owner-"+locked, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, 0o755)
	could := testos.Unprivileged(func() {
		wantUnknown(t, o, locked)
		wantDead(t, o, uuid.NewString(), true)
		if n, err := New(database); err == nil {
			n.Release()
			t.Error("New succeeded in a directory that can't be written")
		}
	})
	if !could {
		t.Skip("can't do without root's rights here")
	}
}

func TestReleaseReportsErrors(t *testing.T) {
	needLocks(t)
	dir := testos.Dir(t)
	o, other := newOwner(t, filepath.Join(dir, "x.db")), newOwner(t, filepath.Join(dir, "x.db"))
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(dir, 0o755)
	could := testos.Unprivileged(func() {
		if err := o.Release(); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("Release() = %v, want a permission error", err)
		}
	})
	if !could {
		t.Skip("can't do without root's rights here")
	}
	wantDead(t, other, o.ID, true)
}

// An observer has no file, but distinguishes live and dead owners.
func TestObserver(t *testing.T) {
	needLocks(t)
	database := filepath.Join(t.TempDir(), "x.db")
	living, o := newOwner(t, database), Observer(database)
	if o.Path() != "" || len(o.Others()) != 1 {
		t.Errorf("Path() = %q, Others() = %q", o.Path(), o.Others())
	}
	wantDead(t, o, living.ID, false)
	for _, id := range []string{"", "x", uuid.NewString(), leave(t, database)} {
		wantDead(t, o, id, true)
	}
	if err := o.Release(); err != nil {
		t.Error(err)
	}
	if !exists(living.Path()) {
		t.Error("the file of an owner that lives is gone")
	}
}
