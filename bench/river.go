package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riversqlite"
	"github.com/riverqueue/river/rivermigrate"
)

// riverSystem is River with one Insert per job, or one InsertManyFast per batch,
// tuned for throughput. Each fetch is a commit: fetching as often as River allows
// is slower, and fetching too rarely leaves the workers without jobs.
func riverSystem(batch int) system {
	name, poll := "River", 100*time.Millisecond
	if batch > 1 {
		name, poll = fmt.Sprintf("River, InsertManyFast of %d", batch), 10*time.Millisecond
	}
	return system{
		name: name,
		tuning: fmt.Sprintf("one connection, as riversqlite advises; MaxWorkers 1,000, FetchCooldown and FetchPollInterval %v, "+
			"PollOnly; completion seen by Subscribe", poll),
		batch: batch,
		open:  func(e env) (session, error) { return openRiver(e, poll, false) },
	}
}

// riverTxSystem is River tuned for latency. By default, River stores final states
// every 250 ms, or 100 at a time.
var riverTxSystem = system{
	name: "River, JobCompleteTx",
	tuning: "as River, but FetchCooldown and FetchPollInterval 1 ms, their minimum, and the worker itself completes its job " +
		"in a transaction; completion seen by polling the row every 0.1 ms",
	batch: 1,
	open:  func(e env) (session, error) { return openRiver(e, time.Millisecond, true) },
}

type riverArgs struct{}

func (riverArgs) Kind() string { return "job" }

type riverWorker struct {
	river.WorkerDefaults[riverArgs]
	*riverSession
}

func (w riverWorker) Work(ctx context.Context, job *river.Job[riverArgs]) error {
	w.jobs.run()
	if !w.completes {
		return nil
	}
	tx, err := w.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := river.JobCompleteTx[*riversqlite.Driver](ctx, tx, job); err != nil {
		return err
	}
	return tx.Commit()
}

type riverSession struct {
	env
	completes  bool // its worker completes the jobs
	db, reader *sql.DB
	client     *river.Client[*sql.Tx]
	events     <-chan *river.Event // completed jobs, unless the worker completes them
}

func openRiver(e env, poll time.Duration, completes bool) (session, error) {
	ctx := context.Background()
	db, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	reader, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	s := &riverSession{env: e, completes: completes, db: db, reader: reader}
	driver := riversqlite.New(db)
	migrator, err := rivermigrate.New(driver, nil)
	if err != nil {
		return nil, err
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return nil, err
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, riverWorker{riverSession: s})
	s.client, err = river.NewClient(driver, &river.Config{
		FetchCooldown:     poll,
		FetchPollInterval: poll,
		PollOnly:          true,
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 1000}},
		Workers:           workers,
		Logger:            slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	})
	if err != nil {
		return nil, err
	}
	if !completes {
		// River drops events that do not fit.
		s.events, _ = s.client.SubscribeConfig(&river.SubscribeConfig{
			Kinds:    []river.EventKind{river.EventKindJobCompleted},
			ChanSize: maxJobs,
		})
	}
	return s, s.client.Start(ctx)
}

func (s *riverSession) submit(n int) (string, error) {
	if n == 1 {
		res, err := s.client.Insert(context.Background(), riverArgs{}, nil)
		if err != nil {
			return "", err
		}
		return strconv.FormatInt(res.Job.ID, 10), nil
	}
	params := make([]river.InsertManyParams, n)
	for i := range params {
		params[i].Args = riverArgs{}
	}
	_, err := s.client.InsertManyFast(context.Background(), params)
	return "", err
}

const riverDone = `SELECT count(*) FROM river_job WHERE state = 'completed'`

func (s *riverSession) wait(id string) error {
	if !s.completes {
		return s.drain(1)
	}
	return poll(100*time.Microsecond, func() (done bool, err error) {
		err = s.reader.QueryRow(`SELECT state = 'completed' FROM river_job WHERE id = ?`, id).Scan(&done)
		return done, err
	})
}

func (s *riverSession) drain(n int) error {
	if s.completes {
		return s.drainByCount(n, func() (done int, err error) {
			err = s.reader.QueryRow(riverDone).Scan(&done)
			return done, err
		})
	}
	timeout := time.After(patience)
	for range n {
		select {
		case <-s.events:
		case <-timeout:
			return errPatience
		}
	}
	return nil
}

func (s *riverSession) settings() (string, error) { return pragmas(s.db) }

func (s *riverSession) finals() (int, error) { return s.count(riverDone) }

func (s *riverSession) close() error {
	return errors.Join(s.client.Stop(context.Background()), s.db.Close(), s.reader.Close())
}
