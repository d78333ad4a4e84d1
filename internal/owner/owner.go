// Package owner determines which of the processes that share a database are alive.
//
// Each opener of the database is an [Owner]: it has an ID, and holds an operating-system
// lock on a file beside the database that is named after the ID. The kernel drops the lock
// when the process ends, however it ends: there are no leases to renew and no heartbeats
// to miss.
package owner

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
)

// errLocked is returned by lock if another owner holds the lock.
var errLocked = errors.New("locked by another owner")

// An Owner is one opener of a database. Its methods may be called
// concurrently, but none except Release after Release.
type Owner struct {
	ID string // a UUID

	prefix string   // of the paths of owner files; "" for a sole owner
	file   *os.File // locked
}

// New returns a new owner of the database file with that path, which need not exist. With
// an empty path, and on systems without file locks, the new owner assumes that it is the
// only one.
//
// The owner's file gets the owner and group of the database file, as far as this process
// may set them, and is readable and writable by the classes of users that may write the
// database: they must be able to tell whether the owner is alive. Nobody else should be
// able to lock the file, which would keep a dead owner alive.
func New(database string) (*Owner, error) {
	if database == "" || !canLock {
		return &Owner{ID: uuid.NewString()}, nil
	}
	prefix := database + "-owner-"
	for {
		o := &Owner{ID: uuid.NewString(), prefix: prefix}
		f, err := os.OpenFile(o.Path(), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		err = lock(f, false)
		if err == nil && names(o.Path(), f) {
			o.file = f
			if info, err := os.Stat(database); err == nil {
				share(f, info)
			}
			return o, nil
		}
		// Another owner has found the file before it was locked, and taken its owner for dead.
		f.Close()
		if err != nil && !errors.Is(err, errLocked) {
			os.Remove(f.Name())
			return nil, err
		}
	}
}

// Observer returns an Owner without ID and file, which owns nothing in the database file
// with that path and only looks at the owners with Dead.
func Observer(database string) *Owner { return &Owner{prefix: database + "-owner-"} }

// Path returns the path of the owner's file, "" without one.
func (o *Owner) Path() string {
	if o.prefix == "" || o.ID == "" {
		return ""
	}
	return o.prefix + o.ID
}

// Release ends the ownership: from now on the owner counts as dead. Further calls do
// nothing.
func (o *Owner) Release() error {
	if o.file == nil {
		return nil
	}
	err := errors.Join(os.Remove(o.Path()), o.file.Close())
	o.file = nil
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Others returns the IDs of the other owners that have a file beside the database. It
// returns none if the directory can't be read.
func (o *Owner) Others() []string {
	if o.prefix == "" {
		return nil
	}
	entries, _ := os.ReadDir(filepath.Dir(o.prefix))
	var ids []string
	for _, e := range entries {
		id, ok := strings.CutPrefix(e.Name(), filepath.Base(o.prefix))
		if ok && valid(id) && id != o.ID {
			ids = append(ids, id)
		}
	}
	return ids
}

// Dead reports whether the owner with that ID is dead. If it is, the caller holds a shared
// lock on its file until it calls done: done(true), when nothing refers to the owner any
// longer, removes the file.
//
// The lock is shared because several processes may find the same owner dead at the same
// time, and none of them may mistake another one's lock for the owner's.
//
// An invalid ID is that of a dead owner; o itself is alive. An owner whose file can't be
// examined counts as alive, and err names the file. So does every owner for an observer on
// a system without file locks.
func (o *Owner) Dead(id string) (done func(forget bool), dead bool, err error) {
	if o.ID == "" && !canLock {
		return nil, false, errors.ErrUnsupported
	}
	if id == o.ID && id != "" {
		return nil, false, nil
	}
	nothing := func(bool) {}
	if o.prefix == "" || !valid(id) {
		return nothing, true, nil
	}
	path := o.prefix + id
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nothing, true, nil
	}
	if err != nil {
		return nil, false, err
	}
	if err := lock(f, true); err != nil {
		f.Close()
		if errors.Is(err, errLocked) {
			err = nil
		}
		return nil, false, err
	}
	return func(forget bool) {
		if forget && names(path, f) {
			os.Remove(path)
		}
		f.Close()
	}, true, nil
}

// valid reports whether id has the form of New's IDs. Only such an ID may become part of a
// path.
func valid(id string) bool {
	u, err := uuid.Parse(id)
	return err == nil && u.String() == id
}

// names reports whether path is still the path of f.
func names(path string, f *os.File) bool {
	at, err := os.Lstat(path)
	if err != nil {
		return false
	}
	is, err := f.Stat()
	return err == nil && os.SameFile(at, is)
}
