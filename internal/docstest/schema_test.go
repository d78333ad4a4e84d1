package docstest

import (
	"database/sql"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	_ "github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task"
)

// TestSchema checks that docs/schema.md contains every statement with which a store
// creates its table and indexes.
func TestSchema(t *testing.T) {
	var documented strings.Builder
	for _, block := range blocks(t, root+"/docs/schema.md", "sql") {
		documented.WriteString(block.text)
	}
	path := filepath.Join(t.TempDir(), "tasks.db")
	store, err := task.OpenSQLite(path)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	created := schema(t, path)
	if len(created) < 2 {
		t.Errorf("the store has created %q, want a table and an index", created)
	}
	for _, statement := range created {
		if !strings.Contains(normalize(documented.String()), normalize(statement)) {
			t.Errorf("docs/schema.md lacks\n%s", statement)
		}
	}
}

// schema returns the statements that create the schema of a database.
func schema(t *testing.T, path string) (statements []string) {
	t.Helper()
	db := openDB(t, path)
	rows, err := db.Query(`SELECT sql FROM sqlite_master WHERE sql IS NOT NULL`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var statement string
		if err := rows.Scan(&statement); err != nil {
			t.Fatal(err)
		}
		statements = append(statements, statement)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return statements
}

func openDB(t *testing.T, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite3", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// normalize removes comments, line breaks and everything that SQLite itself removes.
func normalize(statements string) string {
	statements = regexp.MustCompile(`--.*`).ReplaceAllString(statements, "")
	statements = strings.ReplaceAll(statements, "IF NOT EXISTS ", "")
	return regexp.MustCompile(`\s+`).ReplaceAllString(statements, "")
}
