package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/mikestefanello/backlite"
)

// backliteSystem is backlite with one Save per job, or one per batch. Backlite
// takes as many jobs from the queue at once as it has idle workers, with a query
// that scans the whole queue.
func backliteSystem(batch int) system {
	name, workers := "backlite", 250
	if batch > 1 {
		name, workers = fmt.Sprintf("backlite, Save of %d", batch), 500
	}
	return system{
		name: name,
		tuning: fmt.Sprintf("one connection; NumWorkers %d; done jobs are retained, without their payload; "+
			"completion seen by polling Status every 0.1 ms", workers),
		batch: batch,
		open:  func(e env) (session, error) { return openBacklite(e, workers) },
	}
}

type backliteTask struct{}

func (backliteTask) Config() backlite.QueueConfig {
	return backlite.QueueConfig{Name: "jobs", MaxAttempts: 1, Retention: &backlite.Retention{}}
}

type backliteSession struct {
	env
	db, reader *sql.DB
	client     *backlite.Client
}

func openBacklite(e env, workers int) (session, error) {
	db, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	reader, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	client, err := backlite.NewClient(backlite.ClientConfig{DB: db, NumWorkers: workers, ReleaseAfter: patience})
	if err != nil {
		return nil, err
	}
	if err := client.Install(); err != nil {
		return nil, err
	}
	client.Register(backlite.NewQueue(func(context.Context, backliteTask) error {
		e.jobs.run()
		return nil
	}))
	client.Start(context.Background())
	return &backliteSession{env: e, db: db, reader: reader, client: client}, nil
}

func (s *backliteSession) submit(n int) (string, error) {
	tasks := make([]backlite.Task, n)
	for i := range tasks {
		tasks[i] = backliteTask{}
	}
	ids, err := s.client.Add(tasks...).Save()
	if err != nil {
		return "", err
	}
	return ids[n-1], nil
}

func (s *backliteSession) wait(id string) error {
	return poll(100*time.Microsecond, func() (bool, error) {
		status, err := s.client.Status(context.Background(), id)
		return status == backlite.TaskStatusSuccess, err
	})
}

const backliteDone = `SELECT count(*) FROM backlite_tasks_completed WHERE succeeded`

func (s *backliteSession) drain(n int) error {
	return s.drainByCount(n, func() (done int, err error) {
		err = s.reader.QueryRow(backliteDone).Scan(&done)
		return done, err
	})
}

func (s *backliteSession) settings() (string, error) { return pragmas(s.db) }

func (s *backliteSession) finals() (int, error) { return s.count(backliteDone) }

func (s *backliteSession) close() error {
	if !s.client.Stop(context.Background()) {
		return errors.New("the workers did not stop")
	}
	return errors.Join(s.db.Close(), s.reader.Close())
}
