package main

import (
	"database/sql"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"
)

// byHand is a program without a library.
var byHand = system{
	name:   "by hand",
	tuning: "a mutex, one INSERT and two UPDATEs per job in commits of their own, prepared, one connection, a goroutine per job",
	batch:  1,
	open:   openByHand,
}

// createTasks creates the table of package task's specification.
const createTasks = `CREATE TABLE tasks (
	id TEXT PRIMARY KEY,
	name TEXT NOT NULL,
	state TEXT NOT NULL,
	progress INTEGER DEFAULT 0,
	metadata TEXT,
	result TEXT,
	error TEXT,
	created_at DATETIME DEFAULT CURRENT_TIMESTAMP,
	updated_at DATETIME DEFAULT CURRENT_TIMESTAMP
)`

const (
	insertTask = `INSERT INTO tasks (id, name, state, created_at, updated_at) VALUES (?, ?, ?, ?, ?)`
	updateTask = `UPDATE tasks SET state = ?, progress = ?, updated_at = ? WHERE id = ?`
	countTasks = `SELECT count(*) FROM tasks WHERE state = 'DONE'`
)

func now() string { return time.Now().UTC().Format("2006-01-02 15:04:05.000000") }

type byHandSession struct {
	env
	running sync.WaitGroup

	mu             sync.Mutex // guards what follows
	db             *sql.DB
	insert, update *sql.Stmt
	err            error // of a job
}

func openByHand(e env) (session, error) {
	db, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	s := &byHandSession{env: e, db: db}
	if _, err := db.Exec(createTasks); err != nil {
		return nil, err
	}
	if s.insert, err = db.Prepare(insertTask); err != nil {
		return nil, err
	}
	s.update, err = db.Prepare(updateTask)
	return s, err
}

func (s *byHandSession) submit(int) (string, error) {
	id := uuid.Must(uuid.NewV7()).String()
	t := now()
	s.mu.Lock()
	_, err := s.insert.Exec(id, "job", "PENDING", t, t)
	s.mu.Unlock()
	if err != nil {
		return "", err
	}
	s.running.Go(func() {
		s.set(id, "RUNNING", 0)
		s.jobs.run()
		s.set(id, "DONE", 100)
	})
	return id, nil
}

func (s *byHandSession) set(id, state string, progress int) {
	t := now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.update.Exec(state, progress, t, id); err != nil {
		s.err = err
	}
}

func (s *byHandSession) wait(string) error { return s.drain(1) }

func (s *byHandSession) drain(int) error {
	s.running.Wait()
	return s.err
}

func (s *byHandSession) settings() (string, error) { return pragmas(s.db) }

func (s *byHandSession) finals() (int, error) { return s.count(countTasks) }

func (s *byHandSession) close() error {
	return errors.Join(s.insert.Close(), s.update.Close(), s.db.Close())
}
