package sqlitetest

import (
	"path/filepath"
	"testing"

	"github.com/mynt-nas/task"
)

// By finish, whatever the cells are: numbers before texts before bytes.
func testByFinish(t *testing.T, open Opener) {
	db := open(t, filepath.Join(t.TempDir(), "app.db"))
	_, s := Use(t, db)
	Execute(t, db, `INSERT INTO tasks (id, name, state, updated_at, metadata) VALUES ('text', 'x', 'DONE', '2024-06-01 12:00:00.000000', '{"a":"b"}'),
		('rfc', 'x', 'DONE', '2024-06-02T12:00:00Z', '{'), ('null', 'x', 'DONE', NULL, NULL), ('empty', 'x', 'DONE', '', ''), ('bytes', 'x', 'DONE', '', NULL),
		('no bytes', 'x', 'DONE', '', NULL), ('number', 'x', 'DONE', '', 1), ('real', 'x', 'DONE', '', NULL), ('running', 'x', 'RUNNING', '', NULL)`)
	Execute(t, db, `UPDATE tasks SET updated_at = CASE id WHEN 'bytes' THEN x'ff00' WHEN 'no bytes' THEN x'' WHEN 'number' THEN 17 ELSE 17.5 END
		WHERE id IN ('bytes', 'no bytes', 'number', 'real')`)
	for _, f := range []task.Filter{{ByFinish: true}, {ByFinish: true, Containing: "X"}} {
		var all []*task.Operation
		for {
			ops, err := s.ListFiltered(f, 1, 0)
			if err != nil {
				t.Fatalf("%+v: %v", f, err)
			}
			if len(ops) == 0 {
				break
			}
			all, f.Before = append(all, ops[0]), ops[0].ID
		}
		if got, want := ids(all), "bytes no bytes rfc text empty null real number"; got != want {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
	if ops, err := s.ListFiltered(task.Filter{Metadata: map[string]string{"a": "b"}}, 10, 0); err != nil || ids(ops) != "text" {
		t.Errorf("by metadata: %q, %v", ids(ops), err)
	}
}
