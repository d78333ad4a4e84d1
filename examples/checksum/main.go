// Checksum computes one SHA-256 over all regular files in a directory tree, as one
// operation of package task that survives its process.
//
//	checksum [-db FILE] DIR
//
// Kill it and run it again: it continues after the last file read, with the same ID. The
// tree should not change in the meantime.
package main

import (
	"context"
	"encoding"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/mynt-nas/task"
)

func main() {
	db := flag.String("db", "checksum.db", "keep the operations in this SQLite `FILE`, outside of DIR")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "usage: checksum [-db FILE] DIR\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	if err := checksum(*db, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "checksum:", err)
		os.Exit(1)
	}
}

// checksum runs the operation for a directory, or continues an interrupted one, and prints
// its result.
func checksum(db, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	store, err := task.OpenSQLite(db)
	if err != nil {
		return err
	}
	// Before New, which resumes it: after that, it may finish at any time.
	id, err := unfinished(store, "checksum "+dir)
	if err != nil {
		return errors.Join(err, store.Close())
	}
	m, err := task.New(store, task.WithResume(resume))
	if err != nil {
		return errors.Join(err, store.Close())
	}
	err = wait(m, dir, id)
	// Operations for other directories may have been resumed: wait for them, too.
	return errors.Join(err, m.Shutdown(context.Background()), store.Close())
}

// resume continues an interrupted operation.
func resume(op *task.Operation) (task.Func, []task.SubmitOption) {
	var s sum
	if op.DecodeMetadata(&s) != nil || s.Dir == "" {
		return nil, nil
	}
	return s.run, nil
}

// wait waits for the operation with that ID, or for a new one if it is empty, and prints
// the result.
func wait(m *task.Manager, dir, id string) error {
	if id == "" {
		s := sum{Dir: dir}
		op, err := m.Submit("checksum "+dir, s.run, task.WithMetadata(s))
		if err != nil {
			return err
		}
		id = op.ID
	}
	op, err := m.Wait(context.Background(), id)
	if err != nil {
		return err
	}
	if op.State != task.StateDone {
		return fmt.Errorf("%s: %s: %s", op.ID, op.State, op.Error)
	}
	var s sum
	if err := op.DecodeMetadata(&s); err != nil {
		return err
	}
	fmt.Printf("%s  %s: %d files, %d bytes, in %d runs, operation %s\n", op.Result, s.Dir, s.Files, s.Bytes, s.Runs, op.ID)
	return nil
}

// unfinished returns the ID of the unfinished operation with the given name, which was
// interrupted or is run by another process, or "" if there is none.
func unfinished(store *task.SQLiteStore, name string) (id string, err error) {
	states := []task.State{task.StatePending, task.StateRunning}
	ops, err := store.ListFiltered(task.Filter{Name: name, States: states}, 1, 0)
	if err != nil || len(ops) == 0 {
		return "", err
	}
	return ops[0].ID, nil
}

// A hasher is the type returned by crypto/sha256. Its state can be stored.
type hasher interface {
	Write(p []byte) (int, error)
	Sum(b []byte) []byte
	encoding.BinaryMarshaler
	encoding.BinaryUnmarshaler
}
