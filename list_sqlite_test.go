package task

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mynt-nas/task/internal/hookdriver"
)

// Which index answers, before and after ANALYZE, is the same for long histories.
func TestSQLiteListPlan(t *testing.T) {
	at := func(minute int) time.Time { return time.Date(2024, 1, 1, 0, minute, 0, 0, time.UTC) }
	for _, analyze := range []string{"", "; ANALYZE"} {
		t.Run("after "+analyze, func(t *testing.T) {
			s, plan := sqliteHistory(t, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 25000)
				INSERT INTO tasks (id, name, state, updated_at, metadata)
				SELECT i, 'x', CASE WHEN i % 10 = 0 THEN 'FAILED' WHEN i % 100 = 99 THEN 'RUNNING' ELSE 'DONE' END,
					strftime('%F %T.000000', '2024-01-01', (i / 2) || ' minutes'), '{"pool":"tank"}' FROM n`+analyze)
			const (
				cursor   = "INDEX tasks_finished (<expr>=? AND rowid<?)"
				below    = "INDEX tasks_finished (<expr>>? AND <expr><?)"
				byFinish = "INDEX tasks_finished"
				byState  = "INDEX tasks_state_not_done (state=?"
				byRowid  = "INTEGER PRIMARY KEY (rowid>? AND rowid<?)"
				few      = "COVERING INDEX tasks_state_not_done (state=?)"
				sorted   = "TEMP B-TREE"
			)
			failed := []State{StateFailed}
			for _, test := range []struct {
				f           Filter
				limit       int
				want, avoid []string
			}{
				{Filter{ByFinish: true}, 5, []string{"SCAN tasks USING " + byFinish}, []string{sorted}},
				{Filter{ByFinish: true, Before: "10001"}, 5, []string{cursor, "INDEX tasks_finished (<expr><?)", "(id=?)"}, []string{"SCAN tasks"}},
				{Filter{ByFinish: true, Containing: "X"}, 5, []string{cursor}, []string{byRowid}},
				{Filter{ByFinish: true, States: failed}, 200, []string{few, cursor}, []string{byRowid, "INDEX tasks_finished (<expr><?)"}},
				{Filter{ByFinish: true, FinishedBefore: at(100)}, 5, []string{cursor, "INDEX tasks_finished (<expr><?)"}, []string{byRowid}},
				{Filter{ByFinish: true, FinishedAfter: at(5000), FinishedBefore: at(5010)}, 5, []string{cursor, below}, []string{byRowid}},
				{Filter{FinishedAfter: at(5000), FinishedBefore: at(5010)}, 5, []string{below, byRowid}, []string{"SCAN tasks"}},
				{Filter{FinishedAfter: at(100)}, 200, []string{"INDEX tasks_finished (<expr>>?)", byRowid}, nil},
				{Filter{FinishedAfter: at(100), States: failed}, 200, []string{few}, []string{byFinish}},
				{Filter{Containing: "X"}, 5, []string{byRowid}, []string{byFinish}},
				{Filter{Metadata: map[string]string{"pool": "tank"}}, 5, []string{byRowid}, []string{byFinish}},
				{Filter{Metadata: map[string]string{"pool": "tank"}, States: failed}, 5, []string{byState}, []string{byFinish}},
			} {
				got := plan("tasks", func() {
					if ops, err := s.ListFiltered(test.f, test.limit, 0); err != nil || len(ops) != test.limit {
						t.Errorf("%+v: %d operations, %v", test.f, len(ops), err)
					}
				})
				missing := slices.ContainsFunc(test.want, func(part string) bool { return !strings.Contains(got, part) })
				if missing || slices.ContainsFunc(test.avoid, func(part string) bool { return strings.Contains(got, part) }) {
					t.Errorf("%+v:\nplan %q\nwant %q\navoid %q", test.f, got, test.want, test.avoid)
				}
			}
		})
	}
}

// Each step of a search looks at a bounded number of rows, however many have the
// same time, and none follows the end of the context.
func TestSQLiteListSteps(t *testing.T) {
	for name, at := range map[string]string{"different": `strftime('%F %T.000000', '2024-01-01', i || ' seconds')`, "same": `'2024-01-01 00:00:00.000000'`} {
		path := filepath.Join(t.TempDir(), name+".db")
		sqliteOpen(t, path).Close()
		sqliteMake(t, path, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)
			INSERT INTO tasks (id, name, state, updated_at, metadata) SELECT i, 'x', 'DONE', `+at+`, '{"pool":"tank"}' FROM n`)
		db, set := hookdriver.Open(t, path)
		s := sqliteUse(t, db)
		for _, f := range []Filter{{ByFinish: true, Containing: "rare"}, {Metadata: map[string]string{"pool": "rare"}}, {Containing: "rare"},
			{FinishedAfter: time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC), Name: "rare"}} {
			for _, cancelAt := range []int{1, 3, 1000} {
				ctx, cancel := context.WithCancel(t.Context())
				f.Context = ctx
				steps := 0
				set(func(query string, run func() error) error {
					if strings.Contains(query, "message") { // what selects operations
						if steps++; steps == cancelAt {
							cancel()
						}
					}
					return run()
				})
				ops, err := s.ListFiltered(f, 1, 0)
				set(hookdriver.Run)
				cancel()
				if cancelAt == 1000 && (steps < 11 || steps > 24 || err != nil) {
					t.Errorf("%s times, %+v: %d steps, %v, want 11, or twice that and two", name, f, steps, err)
				} else if cancelAt < 1000 && (steps != cancelAt || !errors.Is(err, context.Canceled) || ops != nil) {
					t.Errorf("%s times, %+v: cancelled at step %d: %d steps, %v", name, f, cancelAt, steps, err)
				}
			}
		}
	}
}

// Operations that have finished at the same time are listed page by page like
// others, also more of them than one step looks at.
func TestSQLiteListSameTime(t *testing.T) {
	const rows = 2*maxStep + 10
	s := sqliteOpen(t, filepath.Join(t.TempDir(), "x.db"))
	sqliteExecute(t, s.db, fmt.Sprintf(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		INSERT INTO tasks (id, name, state, updated_at) SELECT i, iif(i IN (3, 5, 7000), 'rare', 'x'), 'DONE',
			iif(i BETWEEN 5 AND %d, '2024-01-02 00:00:00.000000', '2024-01-01 00:00:00.000000') FROM n`, rows, rows-5))
	var want []string // the middle before both ends
	for _, r := range [][2]int{{rows - 5, 5}, {rows, rows - 4}, {4, 1}} {
		for i := r[0]; i >= r[1]; i-- {
			want = append(want, fmt.Sprint(i))
		}
	}
	for _, f := range []Filter{{ByFinish: true}, {ByFinish: true, Containing: "X"}, {ByFinish: true, FinishedAfter: time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)}} {
		var got []string
		for {
			ops, err := s.ListFiltered(f, 3000, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, op := range ops {
				got = append(got, op.ID)
			}
			if len(ops) < 3000 {
				break
			}
			f.Before = got[len(got)-1]
		}
		want := want
		if f.Containing != "" {
			want = slices.DeleteFunc(slices.Clone(want), func(id string) bool { return id == "3" || id == "5" || id == "7000" })
		}
		if !slices.Equal(got, want) {
			t.Errorf("%+v: %d operations, want %d in order", f, len(got), len(want))
		}
	}
}

const foreignRows = `INSERT INTO tasks (id, name, state, updated_at, metadata) VALUES
		('ours', 'x', 'DONE', '2024-06-01 12:00:00.000000', '{"pool":"tank"}'),
		('current', 'x', 'DONE', '2024-06-01 12:00:00', '{bad json'),
		('rfc', 'x', 'DONE', '2024-06-01T12:00:00Z', '{"pool":"tank"'),
		('zone', 'x', 'DONE', '2024-06-02T02:00:00+14:00', CAST('{"pool":"tank"}' AS BLOB)),
		('west', 'x', 'DONE', '2024-06-01T00:00:00-12:00', x'00ff'),
		('string', 'x', 'DONE', '2024-06-01 14:00:00.000000000 +0200 CEST m=+1.5', 17),
		('later', 'x', 'DONE', '2024-06-01T12:00:01Z', '"tank"'),
		('nanosecond', 'x', 'DONE', '2024-06-01 12:00:00.000000001 +0000 UTC', '[{"pool":"tank"}]'),
		('odd', 'x', 'DONE', '2024 or so', '{"pool":{"pool":"tank"}}'),
		('shaped', 'x', 'DONE', '2024-06-01 12:00:70.000000', ''),
		('number', 'x', 'DONE', NULL, NULL), ('real', 'x', 'DONE', NULL, 1.5), ('bytes', 'x', 'DONE', NULL, '{}'),
		('null', 'x', 'DONE', NULL, 'null'), ('empty', 'x', 'DONE', '', '{"pool":1}'),
		('running', 'x', 'RUNNING', '2024-06-01 12:00:00.000000', NULL), ('paused', 'x', 'PAUSED', '2024-06-01 12:00:00.000000', NULL);
		UPDATE tasks SET updated_at = 1717243200 WHERE id = 'number';
		UPDATE tasks SET updated_at = 1717243200.5 WHERE id = 'real';
		UPDATE tasks SET updated_at = x'ff00' WHERE id = 'bytes'`

// Rows of other writers: whatever a cell is, it hides no other row, and texts of
// times in the layouts that are read are in a range of time exactly.
func TestSQLiteListForeign(t *testing.T) {
	s := sqliteOpen(t, filepath.Join(t.TempDir(), "x.db"))
	sqliteExecute(t, s.db, foreignRows)
	noon := time.Date(2024, 6, 1, 12, 0, 0, 0, time.UTC)
	list := func(f Filter) string {
		t.Helper()
		var ids []string
		for { // one by one, through all places
			ops, err := s.ListFiltered(f, 1, 0)
			if err != nil {
				t.Fatalf("%+v: %v", f, err)
			}
			if len(ops) == 0 {
				slices.Sort(ids)
				return strings.Join(ids, " ")
			}
			f.Before = ops[0].ID
			ids = append(ids, f.Before)
		}
	}
	same := []string{"current", "ours", "rfc", "string", "west", "zone"}
	for _, byFinish := range []bool{false, true} {
		for _, test := range []struct {
			after, before time.Time
			want          string
		}{
			{noon, noon.Add(1), strings.Join(same, " ")},
			{noon, noon.Add(2), "current nanosecond ours rfc string west zone"},
			{noon.Add(1), noon.Add(time.Second), "nanosecond"},
			{noon.Add(-time.Microsecond), noon, ""},
			{noon.Add(time.Second), time.Time{}, "later"},
			{time.Time{}, noon, ""},
			{time.Time{}, time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC), "current later nanosecond ours rfc string west zone"},
			{time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC), time.Time{}, ""},
			{time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC), time.Unix(1<<62, 0), "current later nanosecond ours rfc string west zone"},
			{time.Unix(1<<62, 0), time.Unix(-1<<62, 0), ""},
		} {
			got := list(Filter{ByFinish: byFinish, FinishedAfter: test.after, FinishedBefore: test.before})
			if got != test.want {
				t.Errorf("by finish %t, from %v to %v: %q, want %q", byFinish, test.after, test.before, got, test.want)
			}
		}
		if got, want := list(Filter{ByFinish: byFinish, Metadata: map[string]string{"pool": "tank"}}), "ours zone"; got != want {
			t.Errorf("by finish %t, by metadata: %q, want %q", byFinish, got, want)
		}
	}
	all := "bytes current empty later nanosecond null number odd ours real rfc shaped string west zone"
	for _, f := range []Filter{{ByFinish: true}, {ByFinish: true, Containing: "X"}, {ByFinish: true, States: []State{StateDone, StatePending}}} {
		if got := list(f); got != all {
			t.Errorf("%+v: %q, want %q", f, got, all)
		}
	}
}
