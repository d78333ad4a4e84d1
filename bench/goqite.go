package main

import (
	"context"
	"database/sql"
	"errors"
	"sync/atomic"
	"time"

	"maragu.dev/goqite"
	"maragu.dev/goqite/jobs"
)

// goqiteSystem is goqite with its job runner. Its final state of a job is that
// the row is deleted.
var goqiteSystem = system{
	name:   "goqite",
	tuning: "one connection, as in its README; runner with Limit 1,000, PollInterval 1 ms; completion seen by polling the row every 0.1 ms",
	batch:  1,
	open:   openGoqite,
}

// goqiteSchema is goqite's schema_sqlite.sql, which goqite does not export.
const goqiteSchema = `
create table goqite (
  id text primary key default ('m_' || lower(hex(randomblob(16)))),
  created text not null default (strftime('%Y-%m-%dT%H:%M:%fZ')),
  updated text not null default (strftime('%Y-%m-%dT%H:%M:%fZ')),
  queue text not null,
  body blob not null,
  timeout text not null default (strftime('%Y-%m-%dT%H:%M:%fZ')),
  received integer not null default 0,
  priority integer not null default 0
) strict;

create trigger goqite_updated_timestamp after update on goqite begin
  update goqite set updated = strftime('%Y-%m-%dT%H:%M:%fZ') where id = old.id;
end;

create index goqite_queue_priority_created_idx on goqite (queue, priority desc, created);
`

type goqiteSession struct {
	env
	db, reader *sql.DB
	queue      *goqite.Queue
	submitted  atomic.Int64
	stop       context.CancelFunc
	stopped    chan struct{}
}

func openGoqite(e env) (session, error) {
	db, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	if _, err := db.Exec(goqiteSchema); err != nil {
		return nil, err
	}
	reader, err := e.openSQLite(1)
	if err != nil {
		return nil, err
	}
	// With the default Timeout of 5 s a job could be received twice.
	queue := goqite.New(goqite.NewOpts{DB: db, Name: "jobs", Timeout: patience})
	runner := jobs.NewRunner(jobs.NewRunnerOpts{Queue: queue, Limit: 1000, PollInterval: time.Millisecond, Extend: patience})
	runner.Register("job", func(context.Context, []byte) error {
		e.jobs.run()
		return nil
	})
	ctx, stop := context.WithCancel(context.Background())
	s := &goqiteSession{env: e, db: db, reader: reader, queue: queue, stop: stop, stopped: make(chan struct{})}
	go func() {
		defer close(s.stopped)
		runner.Start(ctx)
	}()
	return s, nil
}

func (s *goqiteSession) submit(int) (string, error) {
	id, err := jobs.Create(context.Background(), s.queue, "job", goqite.Message{})
	s.submitted.Add(1)
	return string(id), err
}

func (s *goqiteSession) wait(id string) error {
	return poll(100*time.Microsecond, func() (done bool, err error) {
		err = s.reader.QueryRow(`SELECT NOT EXISTS (SELECT 1 FROM goqite WHERE id = ?)`, id).Scan(&done)
		return done, err
	})
}

func (s *goqiteSession) drain(n int) error { return s.drainByCount(n, s.done) }

func (s *goqiteSession) done() (left int, err error) {
	err = s.reader.QueryRow(`SELECT count(*) FROM goqite`).Scan(&left)
	return int(s.submitted.Load()) - left, err
}

func (s *goqiteSession) settings() (string, error) { return pragmas(s.db) }

func (s *goqiteSession) finals() (int, error) {
	left, err := s.count(`SELECT count(*) FROM goqite`)
	return int(s.submitted.Load()) - left, err
}

func (s *goqiteSession) close() error {
	s.stop()
	<-s.stopped
	return errors.Join(s.db.Close(), s.reader.Close())
}
