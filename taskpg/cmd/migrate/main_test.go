//go:build unix

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

// TestMain is also a migration that stops after two pages, to be killed.
func TestMain(m *testing.M) {
	if from := os.Getenv("MIGRATE_FROM"); from != "" {
		copied = func(pages int) {
			if pages == 2 {
				fmt.Println("half")
				select {}
			}
		}
		_, err := migrate(context.Background(), from, os.Getenv("MIGRATE_TO"))
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// history makes finished operations with odd values.
func history(t *testing.T, name string, n int) {
	s, err := open(t.Context(), name, task.OpenSQLite)
	testkit.Must(t, err)
	created := time.Date(2024, 2, 29, 23, 59, 59, 123456000, time.UTC)
	var ops []*task.Operation
	for i := range n {
		op := &task.Operation{ID: "id" + strconv.Itoa((i*7919)%n), Name: "scrub", State: task.StateDone, Progress: 100,
			CreatedAt: created, StartedAt: created.Add(time.Microsecond), UpdatedAt: created.Add(time.Duration(i) * time.Microsecond),
			Metadata: json.RawMessage(`{ "n":` + strconv.Itoa(i) + ` }`), Result: json.RawMessage(`"\u0000 é"`)}
		switch i % 4 {
		case 1:
			op.ID, op.Name = op.ID+"\x00\uFFFF", "a\x00b\uFFFF0"
		case 2:
			op.State, op.Error, op.Progress, op.Result = task.StateFailed, "no\nspace", 7, nil
		case 3:
			op.State, op.Message, op.Metadata, op.StartedAt = task.StateCancelled, "halfway", nil, time.Time{}
		}
		ops = append(ops, op)
	}
	for _, err := range s.WriteBatch(ops, nil) {
		testkit.Must(t, err)
	}
	testkit.Must(t, s.Close())
}

// migrateKilled kills a migration in the middle.
func migrateKilled(t *testing.T, from, to string) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "MIGRATE_FROM="+from, "MIGRATE_TO="+to)
	out, err := cmd.StdoutPipe()
	testkit.Must(t, err)
	testkit.Must(t, cmd.Start())
	line, _ := bufio.NewReader(out).ReadString('\n')
	testkit.Must(t, cmd.Process.Kill())
	cmd.Wait() // its exit status is that of a killed program
	if line != "half\n" {
		t.Fatalf("the migration says %q", line)
	}
}

func TestMigrate(t *testing.T) {
	n := 5*pageSize + 1
	if text := os.Getenv("MIGRATE_ROWS"); text != "" {
		var err error
		n, err = strconv.Atoi(text)
		testkit.Must(t, err)
	}
	path, back, dsn := filepath.Join(t.TempDir(), "a.db"), filepath.Join(t.TempDir(), "b.db"), pgtest.Database(t)
	history(t, path, n)
	for _, way := range [][2]string{{path, dsn}, {dsn, back}} {
		migrateKilled(t, way[0], way[1])
		for range 2 { // the second finds everything there
			began := time.Now()
			got, err := migrate(t.Context(), way[0], way[1])
			if err != nil || got != n {
				t.Fatalf("migrate = %d, %v, want %d", got, err, n)
			}
			t.Logf("%d operations in %v", n, time.Since(began))
		}
	}
	a, err := open(t.Context(), path, task.OpenSQLite)
	testkit.Must(t, err)
	defer a.Close()
	b, err := open(t.Context(), back, task.OpenSQLite)
	testkit.Must(t, err)
	defer b.Close()
	if got, err := compare(a, b); err != nil || got != n {
		t.Errorf("there and back: %d, %v, want %d", got, err, n)
	}
}

// TestMigrateInvalid has a cell that is not UTF-8.
func TestMigrateInvalid(t *testing.T) {
	path, dsn := filepath.Join(t.TempDir(), "a.db"), pgtest.Database(t)
	s, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	testkit.Must(t, s.Save(&task.Operation{ID: "a", Name: "b\xff\xfec", State: task.StateDone, CreatedAt: time.Now(), UpdatedAt: time.Now()}))
	testkit.Must(t, s.Close())
	if n, err := migrate(t.Context(), path, dsn); n != 1 || err != nil {
		t.Errorf("migrate = %d, %v", n, err)
	}
}

// TestMigrateUnfinished leaves alone what a living program runs.
func TestMigrateUnfinished(t *testing.T) {
	path, dsn := filepath.Join(t.TempDir(), "a.db"), pgtest.Database(t)
	s, err := task.OpenSQLite(path)
	testkit.Must(t, err)
	defer s.Close()
	m, err := task.New(s, testkit.Quiet)
	testkit.Must(t, err)
	defer m.Close()
	op, err := m.Submit("scrub", testkit.UntilCancelled)
	testkit.Must(t, err)
	if _, err := migrate(t.Context(), path, dsn); err == nil || !strings.Contains(err.Error(), "1 unfinished") {
		t.Errorf("migrate = %v", err)
	}
	if op, ok := m.Get(op.ID); !ok || op.State.Finished() {
		t.Errorf("the operation is %v", op)
	}
	if n := pgtest.Value[int64](t, dsn, `SELECT count(*) FROM tasks`); n != 0 {
		t.Errorf("%d operations were copied", n)
	}
}

// TestCompare finds each difference.
func TestCompare(t *testing.T) {
	path, dsn := filepath.Join(t.TempDir(), "a.db"), pgtest.Database(t)
	history(t, path, 10)
	_, err := migrate(t.Context(), path, dsn)
	testkit.Must(t, err)
	for _, change := range []string{"name = 'x'", "state = 'LOST'", "progress = 3", "message = 'x'", "metadata = '1'", "result = '1'",
		"error = 'x'", "created_at = now()", "started_at = now()", "updated_at = now()", "id = 'x'"} {
		other := pgtest.Database(t)
		_, err := migrate(t.Context(), path, other)
		testkit.Must(t, err)
		pgtest.Exec(t, other, `UPDATE tasks SET `+change+` WHERE id = 'id0'`)
		if _, err := migrate(t.Context(), path, other); err == nil || !strings.Contains(err.Error(), `"id0"`) {
			t.Errorf("%s: %v", change, err)
		}
	}
}

// TestFromStays checks that FROM stays as it is, also where it can't be copied.
func TestFromStays(t *testing.T) {
	to := pgtest.Database(t)
	older := filepath.Join(t.TempDir(), "older.db")
	testkit.Exec(t, older, `CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, progress INTEGER DEFAULT 0,
		metadata TEXT, result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME)`)
	before := testkit.Traces(t, older)
	if _, err := migrate(t.Context(), older, to); err == nil {
		t.Error("a table of an earlier version was copied")
	}
	if after := testkit.Traces(t, older); !slices.Equal(before, after) {
		t.Errorf("it was %v, and is %v", before, after)
	}
	missing := filepath.Join(t.TempDir(), "missing.db")
	if _, err := migrate(t.Context(), missing, to); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := os.Stat(missing); err == nil {
		t.Error("a missing file was made")
	}
}
