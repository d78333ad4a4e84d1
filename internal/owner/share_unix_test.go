//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package owner

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/mynt-nas/task/internal/testos"
)

// Root gives the file the owner and group of the database. Another user stays the
// owner, and gives no right to a group other than the database's.
func TestShareWithOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may give files away")
	}
	const alice, staff = 12345, 12346
	dir := testos.Dir(t)
	database := filepath.Join(dir, "x.db")
	if err := os.WriteFile(database, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(database, alice, staff); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(database, 0o664); err != nil {
		t.Fatal(err)
	}
	stat := func(o *Owner) (uid, gid uint32, mode os.FileMode) {
		t.Helper()
		info, err := os.Stat(o.Path())
		if err != nil {
			t.Fatal(err)
		}
		sys := info.Sys().(*syscall.Stat_t)
		return sys.Uid, sys.Gid, info.Mode()
	}
	if uid, gid, mode := stat(newOwner(t, database)); uid != alice || gid != staff || mode != 0o660 {
		t.Errorf("made by root: %d, %d, %v", uid, gid, mode)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	var o *Owner
	if !testos.Unprivileged(func() { o = newOwner(t, database) }) {
		t.Skip("can't do without root's rights here")
	}
	if uid, gid, mode := stat(o); uid == alice || gid == staff || mode != 0o600 {
		t.Errorf("made by a stranger: %d, %d, %v", uid, gid, mode)
	}
}
