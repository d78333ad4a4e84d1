// Command migrate copies a history from SQLite to PostgreSQL, or back.
//
//	migrate FROM TO
//
// One of FROM and TO is the path of an SQLite database of package task, the other
// a connection string of PostgreSQL: postgres://... or host=... . FROM stays as it
// is. The copy has the order of submission, and all of an operation but its Owner.
// U+FFFD takes the place of invalid UTF-8.
//
// If FROM has an operation that is not finished, nothing is copied: a program may
// be running it. What TO has already is compared, not replaced; so after an
// interruption, run the command again. At the end every row is compared.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskpg"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: migrate FROM TO\nOne is the path of an SQLite database, the other a connection string of PostgreSQL.")
	}
	n, err := migrate(context.Background(), os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal("migrate: ", err)
	}
	log.Printf("TO has all %d operations; all are equal", n)
}

// A store is what both of them can do.
type store interface {
	task.BatchWriter
	ListFiltered(f task.Filter, limit, offset int) ([]*task.Operation, error)
	Close() error
}

func isPostgres(name string) bool {
	return strings.HasPrefix(name, "postgres://") || strings.HasPrefix(name, "postgresql://") || strings.Contains(name, "host=")
}

// open opens a store. sqlite opens those that are files.
func open(ctx context.Context, name string, sqlite func(path string) (*task.SQLiteStore, error)) (store, error) {
	if isPostgres(name) {
		return taskpg.Open(ctx, name)
	}
	return sqlite(name)
}

// migrate copies a history, and returns how many operations it has.
func migrate(ctx context.Context, from, to string) (n int, err error) {
	if isPostgres(from) == isPostgres(to) {
		return 0, errors.New("one of FROM and TO must be a path, and the other a connection string of PostgreSQL")
	}
	src, err := open(ctx, from, task.AttachSQLite) // which changes nothing there
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	dst, err := open(ctx, to, task.OpenSQLite)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	cursors, err := pages(src)
	if err != nil {
		return 0, err
	}
	for i := len(cursors) - 1; i >= 0; i-- { // the oldest first
		if err := copyPage(src, dst, cursors[i]); err != nil {
			return 0, err
		}
		copied(len(cursors) - i)
	}
	return compare(src, dst)
}

// copied is called after each page. It is for tests.
var copied = func(pages int) {}

// pageSize is how many operations are copied at a time.
const pageSize = 200

// pages returns for each page of a history, the newest first, the ID of what comes
// before it in the list, "" for the first. It fails if something is unfinished.
func pages(src store) (cursors []string, err error) {
	unfinished := 0
	for before := ""; ; {
		page, err := src.ListFiltered(task.Filter{Before: before, WithoutResults: true, MaxValue: 1}, pageSize, 0)
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			break
		}
		for _, op := range page {
			if !op.State.Finished() {
				unfinished++
			}
		}
		cursors = append(cursors, before)
		before = page[len(page)-1].ID
	}
	if unfinished > 0 {
		return nil, fmt.Errorf("FROM has %d unfinished operations: wait until the program that runs them has finished them and stop it; "+
			"if it is gone, start and stop it once", unfinished)
	}
	return cursors, nil
}

// copyPage saves the operations of a page in one transaction, the oldest first. An
// interruption leaves no gap.
func copyPage(src, dst store, before string) error {
	page, err := src.ListFiltered(task.Filter{Before: before}, pageSize, 0)
	if err != nil {
		return err
	}
	ops := make([]*task.Operation, len(page))
	for i, op := range page {
		ops[len(page)-1-i] = op
	}
	for i, err := range dst.WriteBatch(ops, nil) {
		if err != nil && !errors.Is(err, task.ErrExists) {
			return fmt.Errorf("%s: %w", ops[i].ID, err)
		}
	}
	return nil
}

// compare returns an error unless dst has all operations of src, in the same
// order. There may be others among them.
func compare(src, dst store) (n int, err error) {
	from, to := &cursor{store: src}, &cursor{store: dst}
	for {
		want, err := from.next()
		if want == nil || err != nil {
			return n, err
		}
		got, err := to.next()
		for err == nil && got != nil && got.ID != valid(want.ID) {
			got, err = to.next()
		}
		if err != nil {
			return n, err
		}
		if got == nil {
			return n, fmt.Errorf("TO lacks operation %q, or has it in another place: run this again if FROM has changed meanwhile", want.ID)
		}
		if what := difference(want, got); what != "" {
			return n, fmt.Errorf("operation %q has another %s in TO", want.ID, what)
		}
		n++
	}
}

// A cursor reads a history, the newest first.
type cursor struct {
	store
	before string
	page   []*task.Operation
}

// next returns nil at the end.
func (c *cursor) next() (op *task.Operation, err error) {
	if len(c.page) == 0 {
		if c.page, err = c.ListFiltered(task.Filter{Before: c.before}, pageSize, 0); err != nil || len(c.page) == 0 {
			return nil, err
		}
	}
	op, c.page = c.page[0], c.page[1:]
	c.before = op.ID
	return op, nil
}

// difference names what is different in two operations, "" if nothing is.
func difference(a, b *task.Operation) string {
	for _, f := range []struct {
		name string
		same bool
	}{
		{"name", valid(a.Name) == valid(b.Name)},
		{"state", a.State == b.State},
		{"progress", a.Progress == b.Progress},
		{"message", valid(a.Message) == valid(b.Message)},
		{"metadata", bytesOf(a.Metadata) == bytesOf(b.Metadata)},
		{"result", bytesOf(a.Result) == bytesOf(b.Result)},
		{"error", valid(a.Error) == valid(b.Error)},
		{"time of creation", sameTime(a.CreatedAt, b.CreatedAt)},
		{"time of start", sameTime(a.StartedAt, b.StartedAt)},
		{"time of finish", sameTime(a.UpdatedAt, b.UpdatedAt)},
	} {
		if !f.same {
			return f.name
		}
	}
	return ""
}

func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func bytesOf(v any) string {
	if v == nil {
		return ""
	}
	raw, ok := v.(json.RawMessage)
	if !ok {
		raw, _ = json.Marshal(v) // what was read from a store has JSON
	}
	return valid(string(raw))
}

func sameTime(a, b time.Time) bool {
	return a.Truncate(time.Microsecond).Equal(b.Truncate(time.Microsecond))
}
