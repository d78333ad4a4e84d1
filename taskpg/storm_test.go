//go:build unix

package taskpg

import (
	"cmp"
	"context"
	"flag"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/mynt-nas/task/internal/storm/engine"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

var stormKills = flag.Int("storm.kills", 0, "TestStorm kills as many processes (default: it takes about 10 s)")

// stormDSN names the environment variable with the DSN for a storm's workers.
const stormDSN = "TASKPG_STORM_DSN"

// stormLease is long enough for processes to beat in time on a busy machine.
const stormLease = 2 * time.Second

var stormBackend = engine.Backend{Outages: true, Late: true, Rows: stormRows,
	Open: func(dir string) (engine.Store, error) {
		return Open(context.Background(), os.Getenv(stormDSN), WithLease(stormLease), WithSchema(stormSchema(dir)))
	}}

// stormSchema returns the name of the schema for a directory of a storm.
func stormSchema(dir string) string { return "storm" + filepath.Base(dir) }

func stormRows(dir string, row func(scan func(dest ...any) error) error) (problem string, err error) {
	ctx := context.Background()
	c, err := pgx.Connect(ctx, os.Getenv(stormDSN))
	if err != nil {
		return "", err
	}
	defer c.Close(ctx)
	cell := func(column string) string {
		return `coalesce(to_char(` + column + ` AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), '')`
	}
	rows, err := c.Query(ctx, `SELECT id, name, state, progress::text, coalesce(metadata, ''), coalesce(result, ''),
		coalesce(error, ''), `+cell("created_at")+`, `+cell("updated_at")+`, `+cell("started_at")+`, owner,
		cancel_requested_at IS NOT NULL FROM `+stormSchema(dir)+`.tasks`)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return "", err
		}
	}
	return "", rows.Err()
}

// TestStorm repeatedly kills processes that use one database, and its server.
func TestStorm(t *testing.T) {
	for name, resume := range map[string]bool{"failing": false, "resuming": true} {
		t.Run(name, func(t *testing.T) { testStorm(t, resume) })
	}
}

func testStorm(t *testing.T, resume bool) {
	server := pgtest.New(t, "max_connections=100")
	t.Setenv(stormDSN, server.Database("storm"))
	s := &engine.Storm{Backend: stormBackend, Dir: t.TempDir(), Seed: rand.Uint64(), Resume: resume,
		Kills: cmp.Or(*stormKills, math.MaxInt), Until: time.Now().Add(5 * time.Second)}
	if *stormKills > 0 {
		s.Until = time.Now().Add(time.Hour)
	}
	s.Backend.Outage = func() error {
		server.Stop("QUIT")
		server.Start("max_connections=100")
		return nil
	}
	began := time.Now()
	testkit.Must(t, s.Run())
	t.Logf("seed %d: %v in %v", s.Seed, s.Total, time.Since(began).Round(time.Second))
	for _, text := range s.Bad {
		t.Error(text)
	}
	if s.Total.Kills == 0 || s.Total.Submitted == 0 || s.Total.Finished == 0 || s.Total.Checks == 0 {
		t.Error("the storm has done nothing")
	}
}
