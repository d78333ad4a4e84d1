//go:build unix

package bench

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

// conns is the size of a peer's pool.
const conns = " pool_max_conns=64"

type riverArgs struct{}

func (riverArgs) Kind() string { return "job" }

// A riverWorker does nothing. With a pool, it completes the job itself, in the
// transaction in which it could have worked.
type riverWorker struct {
	river.WorkerDefaults[riverArgs]
	pool *pgxpool.Pool
	done chan struct{}
}

func (w riverWorker) Work(ctx context.Context, job *river.Job[riverArgs]) error {
	if w.pool == nil {
		return nil
	}
	err := pgx.BeginFunc(ctx, w.pool, func(tx pgx.Tx) error {
		_, err := river.JobCompleteTx[*riverpgxv5.Driver](ctx, tx, job)
		return err
	})
	if err == nil {
		w.done <- struct{}{}
	}
	return err
}

// openRiver opens River, tuned for throughput: it fetches up to 1,000 jobs at a
// time, at most once in a cooldown.
func openRiver(cooldown time.Duration) func(*testing.B, string) session {
	return func(b *testing.B, dsn string) session { return startRiver(b, dsn, cooldown, false) }
}

func openRiverTx(b *testing.B, dsn string) session {
	return startRiver(b, dsn, 10*time.Millisecond, true)
}

func startRiver(b *testing.B, dsn string, cooldown time.Duration, completes bool) session {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, dsn+conns)
	testkit.Must(b, err)
	b.Cleanup(pool.Close)
	driver := riverpgxv5.New(pool)
	migrator, err := rivermigrate.New(driver, nil)
	testkit.Must(b, err)
	_, err = migrator.Migrate(ctx, rivermigrate.DirectionUp, nil)
	testkit.Must(b, err)
	worker := riverWorker{done: make(chan struct{}, b.N)}
	if completes {
		worker.pool = pool
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, worker)
	client, err := river.NewClient(driver, &river.Config{
		FetchCooldown:     cooldown,
		FetchPollInterval: 2 * cooldown, // must not be less than the cooldown
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 1000}},
		Workers:           workers,
		Logger:            slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	})
	testkit.Must(b, err)
	events, _ := client.SubscribeConfig(&river.SubscribeConfig{
		Kinds: []river.EventKind{river.EventKindJobCompleted}, ChanSize: b.N + 1}) // it drops what does not fit
	testkit.Must(b, client.Start(ctx))
	b.Cleanup(func() { testkit.Must(b, client.Stop(ctx)) })
	return session{
		submit: func(n int) { insertRiver(b, client, n) },
		wait: func(n int) {
			for range n {
				if completes {
					<-worker.done
				} else {
					<-events
				}
			}
		},
	}
}

func insertRiver(b *testing.B, client *river.Client[pgx.Tx], n int) {
	var err error
	if n == 1 {
		_, err = client.Insert(context.Background(), riverArgs{}, nil)
	} else {
		params := make([]river.InsertManyParams, n)
		for i := range params {
			params[i].Args = riverArgs{}
		}
		_, err = client.InsertManyFast(context.Background(), params)
	}
	if err != nil {
		b.Error(err)
	}
}

// openByHand opens a program without a library: one INSERT and two UPDATEs per
// job in commits of their own, and a goroutine per job.
func openByHand(b *testing.B, dsn string) session {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, dsn+conns)
	testkit.Must(b, err)
	b.Cleanup(pool.Close)
	_, err = pool.Exec(ctx, `CREATE TABLE tasks (id text PRIMARY KEY, name text NOT NULL, state text NOT NULL,
		progress integer DEFAULT 0, metadata text, result text, error text,
		created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now())`)
	testkit.Must(b, err)
	exec := func(sql string, args ...any) {
		if _, err := pool.Exec(ctx, sql, args...); err != nil {
			b.Error(err)
		}
	}
	var running sync.WaitGroup
	const update = `UPDATE tasks SET state = $1, progress = $2, updated_at = now() WHERE id = $3`
	return session{
		submit: func(int) {
			id := uuid.Must(uuid.NewV7()).String()
			exec(`INSERT INTO tasks (id, name, state) VALUES ($1, 'job', 'PENDING')`, id)
			running.Go(func() {
				exec(update, "RUNNING", 0, id)
				exec(update, "DONE", 100, id)
			})
		},
		wait: func(int) { running.Wait() },
	}
}
