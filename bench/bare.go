package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// bare is SQLite without any library: a loop that inserts that many rows in one
// transaction and updates them in the next.
func bare(rows int) system {
	return system{
		name:   fmt.Sprintf("bare SQLite, %d a commit", rows),
		tuning: "one connection, prepared statements",
		batch:  rows,
		single: true,
		open:   openBare,
	}
}

type bareSession struct {
	env
	db             *sql.DB
	conn           *sql.Conn
	insert, update *sql.Stmt
}

func openBare(e env) (session, error) {
	db, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	if _, err := db.Exec(createTasks); err != nil {
		return nil, err
	}
	s := &bareSession{env: e, db: db}
	if s.conn, err = db.Conn(context.Background()); err != nil {
		return nil, err
	}
	if s.insert, err = s.conn.PrepareContext(context.Background(), insertTask); err != nil {
		return nil, err
	}
	s.update, err = s.conn.PrepareContext(context.Background(), updateTask)
	return s, err
}

func (s *bareSession) submit(n int) (id string, err error) {
	ids := make([]string, n)
	err = s.commit(n, func(i int) error {
		ids[i] = uuid.Must(uuid.NewV7()).String()
		t := now()
		_, err := s.insert.Exec(ids[i], "job", "PENDING", t, t)
		return err
	})
	if err != nil {
		return "", err
	}
	return ids[n-1], s.commit(n, func(i int) error {
		s.jobs.run()
		_, err := s.update.Exec("DONE", 100, now(), ids[i])
		return err
	})
}

// commit calls write n times in one transaction.
func (s *bareSession) commit(n int, write func(i int) error) error {
	if n == 1 {
		return write(0) // a single statement is a transaction
	}
	if _, err := s.conn.ExecContext(context.Background(), "BEGIN IMMEDIATE"); err != nil {
		return err
	}
	for i := range n {
		if err := write(i); err != nil {
			return err
		}
	}
	_, err := s.conn.ExecContext(context.Background(), "COMMIT")
	return err
}

func (s *bareSession) wait(string) error { return nil }

func (s *bareSession) drain(int) error { return nil }

func (s *bareSession) settings() (string, error) {
	if err := s.release(); err != nil {
		return "", err
	}
	return pragmas(s.db)
}

// release gives the connection back to the pool.
func (s *bareSession) release() error {
	return errors.Join(s.insert.Close(), s.update.Close(), s.conn.Close())
}

func (s *bareSession) finals() (int, error) { return s.count(countTasks) }

func (s *bareSession) close() error {
	s.release()
	return s.db.Close()
}
