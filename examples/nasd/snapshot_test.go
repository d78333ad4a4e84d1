package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
)

func TestSnapshot(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "a", "a")
	write(t, p.files, "b/c", "ccc")
	write(t, p.root, partialSnapshot+"/x", "left by a killed snapshot")

	first, err := p.snapshot(t.Context(), new(worker))
	must(t, err)
	if first.Linked != 0 || first.Cloned+first.Copied != 2 || first.Bytes != 4 {
		t.Errorf("first snapshot: %+v, want two files cloned or copied", first)
	}
	write(t, p.files, "a", "A") // in place, with unchanged time
	f, err := p.files.OpenFile("b/c", os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("CCC")
	must(t, errors.Join(err, f.Close()))
	write(t, p.files, "d", "")

	second, err := p.snapshot(t.Context(), new(worker))
	must(t, err)
	if second.Linked != 1 || second.Cloned+second.Copied != 2 || second.ID <= first.ID {
		t.Errorf("second snapshot: %+v, want one file linked and two cloned or copied", second)
	}
	dir := filepath.Join(p.root.Name(), snapshotsDir)
	wantTree(t, filepath.Join(dir, first.ID), map[string]string{"a": "a", "b/c": "ccc"})
	// By size and time, a has not changed.
	wantTree(t, filepath.Join(dir, second.ID), map[string]string{"a": "a", "b/c": "CCC", "d": ""})
	ids, err := p.snapshots()
	if want := []string{first.ID, second.ID}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("snapshots are %v, %v; want %v", ids, err, want)
	}
	info, err := os.Lstat(filepath.Join(dir, second.ID, "a"))
	must(t, err)
	if info.Mode().Perm()&0o222 != 0 || !info.ModTime().Equal(longAgo) {
		t.Errorf("the file in the snapshot has mode %v and time %v", info.Mode(), info.ModTime())
	}
	if _, err := p.root.Lstat(partialSnapshot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
}

func TestSnapshotCancel(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "a", "a")
	makeHuge(t, filepath.Join(p.files.Name(), "huge"))
	ctx, w := cancelled(t)
	if r, err := p.snapshot(ctx, w); !errors.Is(err, task.ErrCancelled) {
		t.Errorf("got %+v and %v, want %v", r, err, task.ErrCancelled)
	}
	if left, err := os.ReadDir(filepath.Join(p.root.Name(), snapshotsDir)); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestNewSnapshotID(t *testing.T) {
	for _, tt := range []struct {
		ids  []string
		want string
	}{
		{nil, "20260102T030405.678Z"},
		{[]string{"20260102T030405.677Z"}, "20260102T030405.678Z"},
		{[]string{"20260102T030405.678Z"}, "20260102T030405.679Z"},
		{[]string{"20260102T030405.678Z", "20261231T235959.999Z"}, "20270101T000000.000Z"},
	} {
		if got := newSnapshotID(longAgo.In(time.FixedZone("", 3600)), tt.ids); got != tt.want {
			t.Errorf("after %v: got %s, want %s", tt.ids, got, tt.want)
		}
	}
}

func TestExpired(t *testing.T) {
	now := time.Date(2026, 7, 7, 23, 59, 59, 0, time.UTC)
	every := func(d time.Duration, n int) (ids []string) { // oldest first
		for i := range n {
			ids = append(ids, now.Add(-time.Duration(n-1-i)*d).Format(snapshotID))
		}
		return ids
	}
	tests := []struct {
		name string
		ids  []string
		keep int
		left int
	}{
		{"none", nil, 3, 0},
		{"fewer", every(time.Minute, 2), 3, 2},
		{"one hour", every(time.Minute, 30), 3, 3},
		{"one hour, keep none", every(time.Minute, 30), 0, 1},
		{"12 hours", every(10*time.Minute, 12*6), 3, 3 + 11},
		{"48 hours", every(10*time.Minute, 48*6), 6, 6 + 23 + 1},
		{"100 days", every(time.Hour, 100*24), 12, 24 + 29},
		{"daily", every(24*time.Hour, 100), 2, 30},
		{"yearly", every(365*24*time.Hour, 7), 2, 7},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			expiring := expired(tt.ids, tt.keep)
			if got := len(tt.ids) - len(expiring); got != tt.left {
				t.Errorf("%d left, want %d", got, tt.left)
			}
			if !slices.IsSorted(expiring) {
				t.Errorf("expired snapshots are not oldest first: %v", expiring)
			}
			left := slices.DeleteFunc(slices.Clone(tt.ids), func(id string) bool { return slices.Contains(expiring, id) })
			newest := tt.ids[len(tt.ids)-min(tt.keep, len(tt.ids)):]
			if !slices.Equal(left[len(left)-len(newest):], newest) {
				t.Errorf("left are %v, without some of the newest", left)
			}
			if again := expired(left, tt.keep); len(again) > 0 {
				t.Errorf("a second call expires %v", again)
			}
		})
	}
}

func TestThin(t *testing.T) {
	p := newPool(t)
	ids := []string{"20260102T030405.001Z", "20260102T030405.002Z", "20260102T030405.003Z"}
	for _, id := range append(ids, ".removed", "other") {
		write(t, p.root, snapshotsDir+"/"+id+"/a", id)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(task.ErrCancelled)
	if _, err := p.thin(ctx, new(worker), 1); !errors.Is(err, task.ErrCancelled) {
		t.Errorf("got %v, want %v", err, task.ErrCancelled)
	}
	r, err := p.thin(t.Context(), new(worker), 1)
	if want := (&thinResult{Kept: 1, Removed: ids[:2]}); err != nil || !reflect.DeepEqual(r, want) {
		t.Errorf("got %+v and %v, want %+v", r, err, want)
	}
	wantTree(t, filepath.Join(p.root.Name(), snapshotsDir), map[string]string{ids[2] + "/a": ids[2], "other/a": "other"})
}

// TestScheduler checks that snapshots are taken on time, but not while the last ones are
// waiting.
func TestScheduler(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		m := task.NewManager(nil)
		s, err := openStorage(dir)
		must(t, err)
		s.tasks = m
		must(t, s.makePool(t.Context(), "tank", func(int) {}))
		wants := func(when string, names ...string) {
			t.Helper()
			synctest.Wait()
			ops, err := m.List(100, 0)
			must(t, err)
			var got []string
			for _, op := range slices.Backward(ops) {
				got = append(got, strings.TrimPrefix(op.Name+" "+string(op.State), "snapshot "))
			}
			if !slices.Equal(got, names) {
				t.Errorf("%s: got %v, want %v", when, got, names)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			(&scheduler{storage: s, every: time.Hour, keep: 1}).run(ctx)
		}()

		// The first is taken at once, the others in each hour of the clock.
		wants("at once", "tank DONE")
		time.Sleep(59 * time.Minute)
		wants("after 59 minutes", "tank DONE")
		release := make(chan struct{})
		_, err = s.submit(about{Kind: "hold", Pool: "tank"}, func(context.Context, func(int)) (any, error) {
			<-release
			return nil, nil
		})
		must(t, err)
		time.Sleep(10 * time.Hour)
		wants("while the pool is busy", "tank DONE", "hold tank RUNNING", "tank PENDING")
		close(release)
		synctest.Wait()
		time.Sleep(30 * time.Minute)
		wants("after the pool is free", "tank DONE", "hold tank DONE", "tank DONE", "tank DONE")

		// The schedule survives a restart of the daemon.
		cancel()
		<-ended
		sched := &scheduler{storage: s, every: time.Hour, keep: 1}
		must(t, sched.submitDue("tank", time.Now()))
		wants("after a restart", "tank DONE", "hold tank DONE", "tank DONE", "tank DONE")
		if err := sched.submitDue("gone", time.Now()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want %v", err, os.ErrNotExist)
		}
		must(t, m.Close())
		if err := sched.submitDue("tank", time.Now().Add(2*time.Hour)); !errors.Is(err, task.ErrClosed) {
			t.Errorf("got %v, want %v", err, task.ErrClosed)
		}
		must(t, s.pools.Close())
	})
}

// TestSchedulerErrors checks that neither a clock that was once ahead nor a broken pool
// stops the schedule or causes more than one attempt per period.
func TestSchedulerErrors(t *testing.T) {
	s := newStorage(t, "tank")
	p := openPool(t, s, "tank")
	write(t, p.root, snapshotsDir+"/29990102T030405.001Z/a", "")
	sched := &scheduler{storage: s, every: time.Hour, keep: 1}
	now := time.Now().Truncate(time.Hour)
	for _, tt := range []struct {
		after time.Duration
		want  int // number of operations; if a snapshot makes another one expire, thinning out follows
	}{{0, 2}, {59 * time.Minute, 2}, {time.Hour, 4}, {61 * time.Minute, 4}} {
		must(t, sched.submitDue("tank", now.Add(tt.after)))
		ops, err := s.tasks.List(10, 0)
		if err != nil || len(ops) != tt.want {
			t.Errorf("after %v: %d operations (%v), want %d", tt.after, len(ops), err, tt.want)
		}
		for _, op := range ops {
			if op, err := s.tasks.Wait(t.Context(), op.ID); err != nil || op.State != task.StateDone {
				t.Errorf("%+v, %v", op, err)
			}
		}
	}
	if ids, err := p.snapshots(); err != nil || len(ids) != 1 || ids[0] != "29990102T030405.003Z-auto" {
		t.Errorf("snapshots are %v, %v", ids, err)
	}
	must(t, p.root.RemoveAll(snapshotsDir))
	if err := sched.submitDue("tank", now.Add(2*time.Hour)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
	must(t, sched.submitDue("tank", now.Add(2*time.Hour+time.Minute))) // no second error in the same period
}

// TestSchedulerInterrupted checks that an interrupted snapshot is taken again, at most once
// after a restart, and that a failed one is not.
func TestSchedulerInterrupted(t *testing.T) {
	s := newStorage(t, "tank")
	store := task.NewMemoryStore()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	wants := []string{
		"auto-tank-20260102T030000.000Z FAILED",   // interrupted
		"auto-tank-20260102T030000.000Z.2 FAILED", // failed by itself
	}
	must(t, store.Save(&task.Operation{
		ID: "auto-tank-20260102T030000.000Z", Name: "snapshot tank", State: task.StateRunning, CreatedAt: now, UpdatedAt: now,
	}))
	must(t, openPool(t, s, "tank").root.RemoveAll(snapshotsDir)) // makes it fail
	for range 2 {
		m, err := task.New(store)
		must(t, err)
		restarted := &storage{pools: s.pools, tasks: m}
		sched := &scheduler{storage: restarted, every: time.Hour, keep: 1}
		for range 2 {
			if err := sched.submitDue("tank", now); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
			_, err = m.Wait(t.Context(), "auto-tank-20260102T030000.000Z.2")
			must(t, err)
		}
		ops, err := m.List(10, 0)
		must(t, err)
		var got []string
		for _, op := range slices.Backward(ops) {
			got = append(got, op.ID+" "+string(op.State))
		}
		if !slices.Equal(got, wants) {
			t.Errorf("got %v, want %v", got, wants)
		}
		must(t, m.Close())
	}
}

func TestRestore(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "dir/a", "old")
	write(t, p.files, "b", "untouched")
	snap, err := p.snapshot(t.Context(), new(worker))
	must(t, err)
	restore := func() {
		t.Helper()
		r, err := p.restore(t.Context(), new(worker), snap.ID, "dir/a")
		if want := (restoreResult{Path: "dir/a", Bytes: 3}); err != nil || *r != want {
			t.Fatalf("got %+v, %v, want %+v", r, err, want)
		}
		wantTree(t, p.files.Name(), map[string]string{"dir/a": "old", "b": "untouched"})
		info, err := p.files.Stat("dir/a")
		if err != nil || info.Mode().Perm() != 0o640 || !info.ModTime().Equal(longAgo) {
			t.Errorf("got %v, %v", info, err)
		}
	}
	write(t, p.files, "dir/a", "changed")
	restore()
	must(t, p.files.RemoveAll("dir"))
	restore()

	must(t, p.files.Remove("dir/a"))
	must(t, p.files.Mkdir("dir/a", 0o700))
	if r, err := p.restore(t.Context(), new(worker), snap.ID, "dir/a"); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a directory: got %+v, %v", r, err)
	}
	must(t, p.files.Remove("dir/a"))
	ctx, w := cancelled(t)
	if r, err := p.restore(ctx, w, snap.ID, "dir/a"); !errors.Is(err, task.ErrCancelled) {
		t.Errorf("cancelled: got %+v, %v", r, err)
	}
	wantTree(t, p.files.Name(), map[string]string{"b": "untouched"})
}

// TestAutomatic checks that the names of snapshots tell automatic ones apart and sort by
// time.
func TestAutomatic(t *testing.T) {
	p := newPool(t)
	var want []string
	for _, automatic := range []bool{true, false, false, true, true} {
		r, err := p.snapshot(t.Context(), &worker{about: about{Automatic: automatic}})
		must(t, err)
		if got := newSnapshotInfo(r.ID); got.Automatic != automatic || got.Time.Year() < 2000 {
			t.Errorf("got %+v, want automatic: %v", got, automatic)
		}
		want = append(want, r.ID)
	}
	if got, err := p.snapshots(); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

// TestSchedulerRecreated checks that a new pool gets exactly one snapshot in a period in
// which an earlier pool with that name already got one.
func TestSchedulerRecreated(t *testing.T) {
	s := newStorage(t)
	sched := &scheduler{storage: s, every: time.Hour, keep: 10}
	now := time.Now()
	finish := func(op *task.Operation, err error) {
		t.Helper()
		must(t, err)
		if op, err := s.tasks.Wait(t.Context(), op.ID); err != nil || op.State != task.StateDone {
			t.Fatalf("%+v, %v", op, err)
		}
	}
	for range 3 {
		finish(s.create("tank"))
		for range 2 {
			must(t, sched.submitDue("tank", now))
			finish(s.scrub("tank")) // after the snapshot
		}
		if ids, err := s.snapshots("tank"); err != nil || len(ids) != 1 {
			t.Errorf("the snapshots are %v, %v, want one", ids, err)
		}
		finish(s.remove("tank"))
	}
}

// TestFilesOf checks the list of files in a snapshot.
func TestFilesOf(t *testing.T) {
	p := newPool(t)
	const id = "20260102T030405.000Z"
	for i := range maxListed {
		write(t, p.root, fmt.Sprintf("%s/%s/many/%04d", snapshotsDir, id, i), "")
	}
	for _, name := range []string{"a", "dir/b", "dir/c/d", "dirt", "z"} {
		write(t, p.root, snapshotsDir+"/"+id+"/"+name, name)
	}
	for _, tt := range []struct {
		prefix, want string
		more         bool
	}{
		{"a", "a", false},
		{"dir", "dir/b dir/c/d dirt", false},
		{"dir/", "dir/b dir/c/d", false},
		{"dir/c/", "dir/c/d", false},
		{"dir/c/e", "", false},
		{"none/x", "", false},
		{"a/x", "", false},
		{"../", "", false},
		{"/", "", false},
		{"dir/../a", "", false},
	} {
		files, more, err := p.filesOf(t.Context(), id, tt.prefix)
		must(t, err)
		var paths []string
		for _, f := range files {
			paths = append(paths, f.Path)
			if f.Size != int64(len(f.Path)) || f.Time.IsZero() || f.NotUTF8 {
				t.Errorf("%q: got %+v", tt.prefix, f)
			}
		}
		if got := strings.Join(paths, " "); got != tt.want || more != tt.more || files == nil {
			t.Errorf("%q: got %q, %v, want %q, %v", tt.prefix, got, more, tt.want, tt.more)
		}
	}
	for prefix, wantMore := range map[string]bool{"": true, "many/": false} {
		if files, more, err := p.filesOf(t.Context(), id, prefix); err != nil || len(files) != maxListed || more != wantMore {
			t.Errorf("%q: got %d files, %v, %v", prefix, len(files), more, err)
		}
	}
}
