package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// TestFullAndReadOnly fills a small disk and then makes it read-only. It runs in a process
// that is allowed to mount one, because root ignores read-only directories.
func TestFullAndReadOnly(t *testing.T) {
	if dir := os.Getenv("NASD_TEST_DISK"); dir != "" {
		fullAndReadOnly(t, dir)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFullAndReadOnly$", "-test.v")
	cmd.Env = append(os.Environ(), "NASD_TEST_DISK="+t.TempDir(), "GORACE=atexit_sleep_ms=0")
	testos.RunMounting(t, cmd)
}

func fullAndReadOnly(t *testing.T, dir string) {
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skip(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	s := newStorage(t, "tank")
	p := openPool(t, s, "tank")
	small, err := openStorage(dir)
	must(t, err)
	small.tasks = s.tasks
	defer small.pools.Close()
	must(t, small.makePool(t.Context(), "small", func(int) {}))
	disk, err := small.open("small")
	must(t, err)
	defer disk.close()

	write(t, p.files, "a", strings.Repeat("a", 1<<20))
	write(t, p.files, "b", strings.Repeat("b", 1<<20))
	full := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s: got %v, want %v", what, err, syscall.ENOSPC)
		}
		if left := tree(t, filepath.Join(disk.files.Name(), incoming)); len(left) > 0 {
			t.Errorf("%s: left are %v", what, left)
		}
	}
	r, err := p.replicate(t.Context(), new(worker), disk)
	full("replicate", err)
	if r.Copied != 1 {
		t.Errorf("%d files are copied, want 1", r.Copied)
	}
	full("put", disk.put(t.Context(), new(worker), "b", strings.NewReader(strings.Repeat("b", 1<<20))))
	upload := &upload{pool: "small", path: "b", size: 1 << 20, body: strings.NewReader(strings.Repeat("b", 1<<20)),
		setReadDeadline: deadlines{}.SetReadDeadline}
	full("upload", small.upload(t.Context(), upload))
	ops, err := small.tasks.List(1, 0)
	must(t, err)
	if len(ops) != 1 || ops[0].State != task.StateFailed || !strings.Contains(ops[0].Error, syscall.ENOSPC.Error()) {
		t.Errorf("the upload is %v", ops)
	}
	_, err = disk.snapshot(t.Context(), new(worker))
	full("snapshot", err)
	if ids, err := disk.snapshots(); err != nil || len(ids) > 0 {
		t.Errorf("snapshots are %v, %v", ids, err)
	}
	if got := tree(t, disk.files.Name()); len(got) != 1 || len(got["a"]) != 1<<20 {
		t.Errorf("there are %d files", len(got))
	}
	if _, err := scrubbed(t, disk); err != nil {
		t.Errorf("copied file: %v", err)
	}
	must(t, p.files.Remove("b"))
	if r, err := p.replicate(t.Context(), new(worker), disk); err != nil || r.Skipped != 1 {
		t.Errorf("again: %+v, %v", r, err)
	}

	must(t, syscall.Mount("none", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	readOnly := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: got %v, want %v", what, err, syscall.EROFS)
		}
	}
	write(t, p.files, "c", "c")
	_, err = p.replicate(t.Context(), new(worker), disk)
	readOnly("replicate", err)
	readOnly("put", disk.put(t.Context(), new(worker), "c", strings.NewReader("c")))
	_, err = disk.snapshot(t.Context(), new(worker))
	readOnly("snapshot", err)
	readOnly("create", small.makePool(t.Context(), "more", func(int) {}))
	if _, err := scrubbed(t, disk); err != nil { // needs to write nothing new
		t.Error(err)
	}
}

// TestSparse checks that a copy of a sparse file takes no more space than the original.
func TestSparse(t *testing.T) {
	s := newStorage(t, "tank", "backup")
	p, to := openPool(t, s, "tank"), openPool(t, s, "backup")
	const size = 64<<20 + 1
	write(t, p.files, "disk.img", "")
	must(t, os.Truncate(filepath.Join(p.files.Name(), "disk.img"), size))
	_, err := p.replicate(t.Context(), new(worker), to)
	must(t, err)
	r, err := p.snapshot(t.Context(), new(worker))
	must(t, err)
	for _, path := range []string{
		filepath.Join(to.files.Name(), "disk.img"),
		filepath.Join(p.root.Name(), snapshotsDir, r.ID, "disk.img"),
	} {
		info, err := os.Stat(path)
		must(t, err)
		if blocks := info.Sys().(*syscall.Stat_t).Blocks; info.Size() != size || blocks*512 > size/2 {
			t.Errorf("%s has %d bytes and takes %d", path, info.Size(), blocks*512)
		}
	}
}

// TestClone checks that a clone takes no space, if the file system supports clones.
func TestClone(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "a", "a")
	write(t, p.files, "b", "")
	src, err := p.files.Open("a")
	must(t, err)
	defer src.Close()
	dst, err := p.files.OpenFile("b", os.O_WRONLY, 0)
	must(t, err)
	defer dst.Close()
	if err := clone(dst, src); err != nil {
		t.Skip("this file system has no clones:", err)
	}
	wantTree(t, p.files.Name(), map[string]string{"a": "a", "b": "a"})
}

// TestReplaced checks that only regular files are read, whatever replaces a file at the
// last moment.
func TestReplaced(t *testing.T) {
	p := newPool(t)
	write(t, p.files, "a", "a")
	must(t, os.Symlink("a", filepath.Join(p.files.Name(), "link")))
	must(t, syscall.Mkfifo(filepath.Join(p.files.Name(), "fifo"), 0o600)) // without a writer
	for _, name := range []string{"link", "fifo"} {
		if _, _, err := open(t.Context(), p.files, name); !errors.Is(err, errReplaced) || !errors.As(err, new(readError)) {
			t.Errorf("open %s: got %v, want %v", name, err, errReplaced)
		}
	}
	if r, err := scrubbed(t, p); err != nil || r.Files != 1 {
		t.Errorf("scrub: %+v, %v; want one file read", r, err)
	}
	if err := p.put(t.Context(), new(worker), "fifo", strings.NewReader("x")); !errors.Is(err, os.ErrExist) {
		t.Errorf("put: got %v, want %v", err, os.ErrExist)
	}
}

// TestBadNames checks that directories are entered regardless of their names.
func TestBadNames(t *testing.T) {
	s := newStorage(t, "tank", "backup")
	p, to := openPool(t, s, "tank"), openPool(t, s, "backup")
	write(t, p.files, "bad\xffdir/b\xfed/\n", "x")
	if r, err := scrubbed(t, p); err != nil || r.Files != 1 {
		t.Errorf("scrub: %+v, %v; want one file read", r, err)
	}
	if r, err := p.replicate(t.Context(), new(worker), to); err != nil || r.Copied != 1 {
		t.Errorf("replicate: %+v, %v; want one file copied", r, err)
	}
	wantTree(t, to.files.Name(), map[string]string{"bad\xffdir/b\xfed/\n": "x"})
	r, err := p.snapshot(t.Context(), new(worker))
	must(t, err)
	if files, _, err := p.filesOf(t.Context(), r.ID, "bad\xff"); err != nil || len(files) != 1 || !files[0].NotUTF8 || files[0].Size != 1 {
		t.Errorf("files of the snapshot: %+v, %v; want one that says that its name is not UTF-8", files, err)
	}
}
