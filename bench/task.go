package main

import (
	"context"
	"database/sql"
	"errors"
	"reflect"
	"runtime"

	"github.com/mynt-nas/task"
)

// taskSystem is this library.
var taskSystem = system{
	name:   "task",
	tuning: "OpenSQLite; for NORMAL, NewSQLiteStore on a pool of as many connections",
	batch:  1,
	open:   openTask,
}

type taskSession struct {
	env
	db      *sql.DB
	store   *task.SQLiteStore
	manager *task.Manager
}

func openTask(e env) (session, error) {
	s := &taskSession{env: e}
	var err error
	if e.sync == "FULL" {
		s.store, err = task.OpenSQLite(e.path())
		if err != nil {
			return nil, err
		}
		// The store does not export its pool, whose settings are read here.
		s.db = (*sql.DB)(reflect.ValueOf(s.store).Elem().FieldByName("db").Elem().FieldByName("DB").UnsafePointer())
	} else {
		s.db, err = e.openSQLite(max(4, runtime.NumCPU()))
		if err != nil {
			return nil, err
		}
		s.store, err = task.NewSQLiteStore(s.db)
		if err != nil {
			return nil, err
		}
	}
	s.manager, err = task.New(s.store)
	return s, err
}

func (s *taskSession) submit(int) (string, error) {
	op, err := s.manager.Submit("job", func(context.Context, func(int)) (any, error) {
		s.jobs.run()
		return nil, nil
	})
	if err != nil {
		return "", err
	}
	return op.ID, nil
}

func (s *taskSession) wait(id string) error {
	op, err := s.manager.Wait(context.Background(), id)
	if err == nil && op.State != task.StateDone {
		err = errors.New(op.Error)
	}
	return err
}

func (s *taskSession) drain(int) error { return s.manager.Shutdown(context.Background()) }

func (s *taskSession) settings() (string, error) { return pragmas(s.db) }

func (s *taskSession) finals() (int, error) {
	return s.count(`SELECT count(*) FROM tasks WHERE state = 'DONE'`)
}

func (s *taskSession) close() error {
	return errors.Join(s.manager.Close(), s.store.Close(), s.db.Close())
}
