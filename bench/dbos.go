package main

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/dbos-inc/dbos-transact-golang/dbos"
	_ "github.com/dbos-inc/dbos-transact-golang/dbos/driver/sqlite" // modernc.org/sqlite, as "sqlite"
)

// dbosSystem is DBOS. A job is a workflow without steps.
var dbosSystem = system{
	name: "DBOS",
	tuning: "its own driver, modernc.org/sqlite, on a pool of our own, since the one it opens has synchronous=NORMAL; one connection; " +
		"RunWorkflow of a workflow without steps, without a queue; completion seen by GetResult",
	batch: 1,
	open:  openDBOS,
}

type dbosSession struct {
	env
	db  *sql.DB
	ctx dbos.Context
	job dbos.Workflow[string, string]

	mu      sync.Mutex // guards what follows
	handles []dbos.WorkflowHandle[string]
}

func openDBOS(e env) (session, error) {
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: e.path()}).EscapedPath()+
		"?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous("+e.sync+")&_pragma=foreign_keys(ON)&_txlock=immediate")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	ctx, err := dbos.NewContext(context.Background(), dbos.Config{
		AppName:            "bench",
		ApplicationVersion: "1", // else it hashes the executable
		SQLiteSystemDB:     db,
		Logger:             slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	})
	if err != nil {
		return nil, err
	}
	s := &dbosSession{env: e, db: db, ctx: ctx}
	s.job = func(dbos.Context, string) (string, error) {
		e.jobs.run()
		return "", nil
	}
	dbos.RegisterWorkflow(ctx, s.job, dbos.WithWorkflowName("job"))
	return s, dbos.Launch(ctx)
}

func (s *dbosSession) submit(int) (string, error) {
	h, err := dbos.RunWorkflow(s.ctx, s.job, "")
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handles = append(s.handles, h)
	return h.GetWorkflowID(), nil
}

func (s *dbosSession) wait(string) error {
	_, err := s.handles[len(s.handles)-1].GetResult()
	return err
}

func (s *dbosSession) drain(int) error {
	for _, h := range s.handles {
		if _, err := h.GetResult(); err != nil {
			return err
		}
	}
	return nil
}

func (s *dbosSession) settings() (string, error) { return pragmas(s.db) }

func (s *dbosSession) finals() (int, error) {
	return s.count(`SELECT count(*) FROM workflow_status WHERE status = 'SUCCESS'`)
}

func (s *dbosSession) close() error {
	return errors.Join(dbos.Shutdown(s.ctx, 10*time.Second), s.db.Close())
}
