package sqlitetest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// While another connection holds a lock, calls wait, with a busy timeout and
// without.
func testLocked(t *testing.T, open Opener) {
	const writing, alone, reading = "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "BEGIN; SELECT * FROM users"
	save := func(s *task.SQLiteStore) error { return s.Save(newOp("late", task.StatePending)) }
	list := func(s *task.SQLiteStore) error { _, err := s.List(10, 0); return err }
	get := func(s *task.SQLiteStore) error { _, err := s.Get("early"); return err }
	prune := func(s *task.SQLiteStore) error { return first(s.Prune(time.Now())) }
	for _, test := range []struct {
		name, journal, hold string
		do                  func(*task.SQLiteStore) error // nil: NewSQLiteStore
	}{
		{"Save beside a writer", "WAL", writing, save},
		{"Save beside a writer with a rollback journal", "DELETE", writing, save},
		{"Save beside a reader with a rollback journal", "DELETE", reading, save},
		{"List beside a writer with a rollback journal", "DELETE", alone, list},
		{"Get beside a writer with a rollback journal", "DELETE", alone, get},
		{"Prune beside a writer", "WAL", writing, prune},
		{"NewSQLiteStore beside a writer", "WAL", writing, nil},
		{"NewSQLiteStore beside a writer with a rollback journal", "DELETE", alone, nil},
	} {
		for _, timeout := range []string{"busy_timeout(0)", "busy_timeout(20)"} {
			t.Run(test.name+", "+timeout, func(t *testing.T) {
				t.Parallel()
				path := filepath.Join(t.TempDir(), "app.db")
				Execute(t, open(t, path), App+"PRAGMA journal_mode = "+test.journal)
				db := open(t, path, timeout)
				do := func() error { s, err := task.NewSQLiteStore(db); t.Cleanup(func() { s.Close() }); return err }
				if test.do != nil {
					_, s := Use(t, db)
					if err := s.Save(newOp("early", task.StateDone)); err != nil {
						t.Fatal(err)
					}
					do = func() error { return test.do(s) }
				}
				waits(t, open(t, path, "busy_timeout(5000)"), test.hold, do)
			})
		}
	}
}

// waits checks that do waits for a transaction of another connection.
func waits(t *testing.T, other *sql.DB, begin string, do func() error) {
	t.Helper()
	c, err := other.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	execute := func(query string) {
		t.Helper()
		if _, err := c.ExecContext(context.Background(), query); err != nil {
			t.Fatalf("%v: %s", err, query)
		}
	}
	if query, ok := strings.CutPrefix(begin, "BEGIN; "); ok {
		execute("BEGIN")
		rows, err := c.QueryContext(t.Context(), query)
		if err != nil || !rows.Next() || rows.Close() != nil {
			t.Fatal(err)
		}
	} else {
		execute(begin)
		execute("INSERT INTO users (name) VALUES ('eve')")
	}
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		t.Errorf("it returned %v while the database was locked", err)
	case <-time.After(80 * time.Millisecond):
	}
	execute("COMMIT")
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("still waiting after 30 s")
	}
}

// first returns the first error of a sequence.
func first[T any](seq iter.Seq2[T, error]) error {
	for _, err := range seq {
		if err != nil {
			return err
		}
	}
	return nil
}

// A call returns any error but that of a lock at once.
func testRealErrors(t *testing.T, open Opener) {
	save := func(s *task.SQLiteStore) error { return s.Save(newOp("old", task.StatePending)) }
	for _, test := range []struct {
		name   string
		break_ func(t *testing.T, db *sql.DB)
		do     func(*task.SQLiteStore) error
	}{
		{"Save, no table", drop, save},
		{"Update, no table", drop, func(s *task.SQLiteStore) error { return s.Update(newOp("old", task.StateDone)) }},
		{"List, no table", drop, func(s *task.SQLiteStore) error { _, err := s.List(10, 0); return err }},
		{"Get, no table", drop, func(s *task.SQLiteStore) error { _, err := s.Get("old"); return err }},
		{"Prune, no table", drop, func(s *task.SQLiteStore) error { return first(s.Prune(time.Now())) }},
		{"Recover, no table", drop, func(s *task.SQLiteStore) error { return first(s.Recover("", nil)) }},
		{"Save twice", func(*testing.T, *sql.DB) {}, save},
		{"Save, trigger", func(t *testing.T, db *sql.DB) {
			Execute(t, db, "CREATE TRIGGER no BEFORE INSERT ON tasks BEGIN SELECT RAISE(ROLLBACK, 'no'); END")
		}, func(s *task.SQLiteStore) error { return s.Save(newOp("new", task.StatePending)) }},
		{"Save, closed", shut, save},
		{"List, closed", shut, func(s *task.SQLiteStore) error { _, err := s.List(10, 0); return err }},
	} {
		t.Run(test.name, func(t *testing.T) {
			db := open(t, filepath.Join(t.TempDir(), "app.db"))
			_, s := Use(t, db)
			if err := s.Save(newOp("old", task.StateRunning)); err != nil {
				t.Fatal(err)
			}
			test.break_(t, db)
			start := time.Now()
			if err := test.do(s); err == nil || errors.Is(err, task.ErrNotFound) {
				t.Errorf("error %v, want the real one", err)
			}
			if took := time.Since(start); took > soon {
				t.Errorf("it took %v", took)
			}
		})
	}
}

func drop(t *testing.T, db *sql.DB) { Execute(t, db, "DROP TABLE tasks") }

func shut(t *testing.T, db *sql.DB) {
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// A full disk, which a limit of pages stands for, is an error at once. What
// fits is stored.
func testFull(t *testing.T, open Opener) {
	db := open(t, filepath.Join(t.TempDir(), "app.db"), "journal_mode(WAL)")
	db.SetMaxOpenConns(1) // which the limit is set for
	_, s := Use(t, db)
	var pages int
	if err := db.QueryRow("PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	Execute(t, db, fmt.Sprintf("PRAGMA max_page_count = %d", pages+20))
	var ops []*task.Operation
	for i := range 100 {
		op := newOp(fmt.Sprint(i), task.StatePending)
		op.Metadata = strings.Repeat("large ", 1000)
		ops = append(ops, op)
	}
	start := time.Now()
	errs := s.WriteBatch(ops, nil)
	if took := time.Since(start); took > soon {
		t.Errorf("it took %v", took)
	}
	stored := 0
	for i, err := range errs {
		switch _, got := s.Get(ops[i].ID); {
		case err == nil && got == nil:
			stored++
		case err == nil || got == nil:
			t.Errorf("WriteBatch of %d: %v, Get: %v", i, err, got)
		case !strings.Contains(err.Error(), "full"):
			t.Errorf("error %v", err)
		}
	}
	if stored == len(ops) {
		t.Error("the disk was not full")
	}
	Execute(t, db, "PRAGMA max_page_count = 1000000")
	if err := s.Save(newOp("room again", task.StatePending)); err != nil {
		t.Error(err)
	}
}

type ops = []*task.Operation

func pending(id string) *task.Operation { return newOp(id, task.StatePending) }
func running(id string) *task.Operation { return newOp(id, task.StateRunning) }

func bad(id string) *task.Operation { op := pending(id); op.Name = "bad"; return op }

func with(id string, v any) *task.Operation { op := pending(id); op.Metadata = v; return op }

func done(id string, v any) *task.Operation {
	op := newOp(id, task.StateDone)
	op.Result = v
	return op
}

// batches are written to a store that has the operations old and older.
var batches = []struct {
	name, raise    string // of a trigger against bad ones
	saves, updates ops
	want           string // the outcome of each: + stored, - error, ? ErrNotFound
}{
	{"nothing", "", nil, nil, ""},
	{"all good", "", ops{pending("a"), pending("b")}, ops{done("old", 1)}, "+++"},
	{"twice the same", "", ops{pending("a"), pending("b"), bad("a"), pending("c")}, ops{done("old", 1)}, "++-++"},
	{"there already", "", ops{pending("a"), pending("old"), pending("b")}, nil, "+-+"},
	{"metadata that is not JSON", "", ops{with("a", 1), with("b", make(chan int)), with("c", "x")}, nil, "+-+"},
	{"result that is not JSON", "", ops{pending("a")}, ops{done("old", math.NaN()), done("older", 1)}, "+-+"},
	{"unknown", "", ops{pending("a")}, ops{done("nobody", 1), done("old", 1)}, "+?+"},
	{"unknown and bad", "", ops{pending("a"), pending("old")}, ops{done("nobody", 1), done("old", 1)}, "+-?+"},
	{"saved and finished", "", ops{pending("a")}, ops{running("a"), done("a", 1)}, "+++"},
	{"updated twice", "", nil, ops{running("old"), done("older", 1), done("old", 1)}, "+++"},
	{"unknown updated twice", "", nil, ops{running("nobody"), done("old", 1), done("nobody", 1)}, "?+?"},
	{"only bad ones", "", ops{pending("old"), pending("older")}, nil, "--"},
	{"trigger that aborts", "ABORT, 'no'", ops{pending("a"), bad("b"), pending("c")}, ops{done("old", "bad"), done("older", 1)}, "+-+-+"},
	{"trigger that rolls back", "ROLLBACK, 'no'", ops{pending("a"), bad("b"), bad("x"), pending("c")}, ops{done("old", "bad"), done("older", 1)}, "+--+-+"},
	{"trigger that fails", "FAIL, 'no'", ops{pending("a"), bad("b"), pending("c")}, ops{done("old", "bad"), done("older", 1)}, "+-+-+"},
	{"trigger that ignores", "IGNORE", ops{pending("a"), bad("b"), pending("c")}, ops{done("older", 1)}, "+-++"},
	{"a single one rolled back", "ROLLBACK, 'no'", ops{bad("b")}, nil, "-"},
}

// One bad row fails alone, wherever it is and however it fails.
func testBatch(t *testing.T, open Opener) {
	for _, test := range batches {
		t.Run(test.name, func(t *testing.T) {
			db := open(t, filepath.Join(t.TempDir(), "app.db"))
			db.SetMaxOpenConns(1)
			_, s := Use(t, db)
			if err := errors.Join(s.Save(pending("old")), s.Save(pending("older"))); err != nil {
				t.Fatal(err)
			}
			if test.raise != "" {
				Execute(t, db, fmt.Sprintf(`CREATE TRIGGER t1 BEFORE INSERT ON tasks WHEN NEW.name = 'bad' BEGIN SELECT RAISE(%s); END;
					CREATE TRIGGER t2 BEFORE UPDATE ON tasks WHEN NEW.result LIKE '%%bad%%' BEGIN SELECT RAISE(%[1]s); END`, test.raise))
			}
			outcome(t, s, test.saves, test.updates, test.want)
			if err := s.Save(pending("one more")); err != nil {
				t.Errorf("Save after that: %v", err)
			}
		})
	}
}

// outcome checks what WriteBatch returns and stores.
func outcome(t *testing.T, s *task.SQLiteStore, saves, updates []*task.Operation, want string) {
	t.Helper()
	errs := s.WriteBatch(saves, updates)
	var got strings.Builder
	for i, op := range slices.Concat(saves, updates) {
		switch {
		case errs[i] == nil:
			got.WriteByte('+')
		case errors.Is(errs[i], task.ErrNotFound):
			got.WriteByte('?')
		default:
			got.WriteByte('-')
		}
		stored, err := s.Get(op.ID)
		if errs[i] == nil && (err != nil || i >= len(saves) && op.State.Finished() && stored.State != op.State) {
			t.Errorf("%s: no error, but in the database is %s, %v", op.ID, show(stored), err)
		}
		if errs[i] == nil && i < len(saves) && stored.Name != op.Name {
			t.Errorf("%s: saved is %q, want the first, %q", op.ID, stored.Name, op.Name)
		}
	}
	if len(errs) != len(saves)+len(updates) || got.String() != want {
		t.Errorf("errors %q, want %s", errs, want)
	}
}

// Prune deletes what finished before, in whatever layout that is written.
func testPrune(t *testing.T, open Opener) {
	db := open(t, filepath.Join(t.TempDir(), "app.db"))
	_, s := Use(t, db)
	for i, test := range []string{"2024-01-01 00:00:00.000000", "2024-01-01T11:00:00Z", "2024-01-01 12:30:00+02:00",
		"2024-01-01 23:30:00.5 +1300 NZDT m=+0.1", "2024-01-01 11:59:59"} {
		Execute(t, db, `INSERT INTO tasks (id, name, state, updated_at) VALUES (?, 'old', 'DONE', ?)`, fmt.Sprint("old", i), test)
	}
	for i, test := range []any{"2024-01-01 12:00:00.000000", "2024-01-01T13:00:00+00:30", "2024-01-02 00:30:00+01:00", nil, "", 0, "now"} {
		Execute(t, db, `INSERT INTO tasks (id, name, state, updated_at) VALUES (?, 'new', 'FAILED', ?)`, fmt.Sprint("new", i), test)
	}
	Execute(t, db, `INSERT INTO tasks (id, name, state, updated_at) VALUES ('live', 'live', 'RUNNING', '2020-01-01'), ('odd', 'odd', 'PAUSED', '2020-01-01')`)
	n := 0
	for some, err := range s.Prune(time.Date(2024, 1, 1, 12, 0, 0, 0, time.UTC)) {
		if n += some; err != nil {
			t.Fatal(err)
		}
	}
	left, err := s.List(100, 0)
	if err != nil || n != 5 || ids(left) != "odd live new6 new5 new4 new3 new2 new1 new0" {
		t.Errorf("deleted %d, left %q, %v", n, ids(left), err)
	}
}

// Include and Exclude correct stored states that are not the present ones.
func testFilter(t *testing.T, open Opener) {
	_, s := Use(t, open(t, filepath.Join(t.TempDir(), "app.db")))
	for i, state := range []task.State{task.StatePending, task.StateRunning, task.StateDone, task.StateFailed, task.StatePending, task.StateRunning} {
		if err := s.Save(newOp(fmt.Sprint(i), state)); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		f             task.Filter
		limit, offset int
		want          string
	}{
		{task.Filter{States: []task.State{task.StateRunning}}, 10, 0, "5 1"},
		{task.Filter{States: []task.State{task.StateRunning}, Include: []string{"0", "2", "3", "4"}}, 10, 0, "5 4 1 0"},
		{task.Filter{States: []task.State{task.StateRunning}, Include: []string{"0", "4"}, Exclude: []string{"1", "5"}}, 10, 0, "4 0"},
		{task.Filter{States: []task.State{task.StateRunning}, Include: []string{"0", "1"}}, 2, 1, "1 0"},
		{task.Filter{States: []task.State{task.StateRunning, task.StateDone}, Include: []string{"0"}, Before: "4"}, 10, 0, "2 1 0"},
		{task.Filter{States: []task.State{task.StateRunning}, Include: []string{"0", "4"}, Name: "4"}, 10, 0, "4"},
		{task.Filter{States: []task.State{task.StateDone}, Include: []string{"0"}, Exclude: []string{"2"}}, 10, 0, "2 0"},
		{task.Filter{States: []task.State{task.StatePending}, Exclude: []string{`"`, "0", "[]"}}, 10, 0, "4"},
		{task.Filter{Include: []string{"0"}, Exclude: []string{"1"}}, 3, 0, "5 4 3"},
	} {
		ops, err := s.ListFiltered(test.f, test.limit, test.offset)
		if err != nil || ids(ops) != test.want {
			t.Errorf("%+v, %d, %d: %q, %v, want %q", test.f, test.limit, test.offset, ids(ops), err, test.want)
		}
	}
}
