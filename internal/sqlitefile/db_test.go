//go:build cgo && !task_nosqlite3

package sqlitefile

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task/internal/hookdriver"
	"github.com/mynt-nas/task/internal/testos"
)

func TestMain(m *testing.M) { os.Exit(testos.Run(m)) }

var table = Schema{
	Table:    "things",
	Required: []string{"id", "name"},
	Added:    []string{"size INTEGER"},
	Create: []string{"CREATE TABLE IF NOT EXISTS things (id TEXT PRIMARY KEY, name TEXT, size INTEGER)",
		"CREATE INDEX IF NOT EXISTS things_size ON things (size)"},
}

// hooked returns a database with one connection, and a function that sets its hook.
func hooked(t *testing.T, dsn string) (*DB, func(hookdriver.Hook)) {
	t.Helper()
	app, set := hookdriver.Open(t, dsn)
	app.SetMaxOpenConns(1)
	d, err := Use(app)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Migrate(table); err != nil {
		t.Fatal(err)
	}
	return d, set
}

// kinds lists the data source names of a database in a file and one in memory.
func kinds(t *testing.T) map[string]string {
	return map[string]string{"file": filepath.Join(t.TempDir(), "x.db") + "?_busy_timeout=0", "memory": ":memory:"}
}

func insert(c *sql.Conn) error { return Exec(c, "INSERT INTO things (name) VALUES ('x')") }

// usable checks that the only connection is not in a transaction, and that the table
// has the given number of rows.
func usable(t *testing.T, d *DB, rows int) {
	t.Helper()
	err := d.Write(d.Deadline(), func(c *sql.Conn) error {
		got, err := Strings(c, "SELECT count(*) FROM things")
		if err == nil && got[0] != fmt.Sprint(rows) {
			t.Errorf("%s rows, want %d", got[0], rows)
		}
		return err
	})
	if err != nil {
		t.Errorf("the next Write: %v", err)
	}
}

// If any statement of a Write finds the database or a table locked, in whatever way,
// Write begins again. It returns any other error at once, and returns a lock's error
// after the time limit. Then the connection is free again.
func TestWrite(t *testing.T) {
	t.Parallel()
	fire := errors.New("the disk is on fire")
	for name, fault := range map[string]struct {
		err  error
		lock bool
	}{
		"busy":              {sqlite3.Error{Code: sqlite3.ErrBusy}, true},
		"table locked":      {sqlite3.Error{Code: sqlite3.ErrLocked}, true},
		"busy snapshot":     {fmt.Errorf("wrapped: %w", coded(517)), true},
		"shared cache":      {coded(262), true},
		"by words":          {errors.New("sqlite3: database table is locked"), true},
		"constraint":        {sqlite3.Error{Code: sqlite3.ErrConstraint}, false},
		"full":              {coded(13), false},
		"error without one": {fire, false},
	} {
		for _, at := range []string{"BEGIN IMMEDIATE", "INSERT", "COMMIT"} {
			for _, kind := range []string{"file", "memory"} {
				for _, times := range []int{3, 1 << 30} {
					t.Run(fmt.Sprint(name, " at ", at, ", ", kind, ", ", times), func(t *testing.T) {
						t.Parallel()
						d, set := hooked(t, kinds(t)[kind])
						if times > 3 {
							d.Timeout = 60 * time.Millisecond
						}
						n, failed := 0, 0
						set(func(query string, run func() error) error {
							if n++; strings.HasPrefix(query, at) && n <= times {
								failed++
								return fault.err
							}
							return run()
						})
						start := time.Now()
						err := d.Write(d.Deadline(), insert)
						slow := time.Since(start) > d.Timeout // the first attempt alone may have taken that long
						set(hookdriver.Run)
						if times == 3 && fault.lock {
							if err != nil {
								t.Error(err)
							}
							usable(t, d, 1)
							return
						}
						if err == nil || err.Error() != fault.err.Error() {
							t.Errorf("error %v, want %v", err, fault.err)
						}
						if fault.lock != (failed > 1) && !(fault.lock && slow) {
							t.Errorf("%d statements failed", failed)
						}
						usable(t, d, 0)
					})
				}
			}
		}
	}
}

// A coded is an error like those of modernc.org/sqlite.
type coded int

func (c coded) Error() string { return fmt.Sprint("code ", int(c)) }
func (c coded) Code() int     { return int(c) }

// A connection that can't end its transaction does not return to the pool. One in
// memory is kept until that works.
func TestRollbackFails(t *testing.T) {
	for kind, dsn := range kinds(t) {
		t.Run(kind, func(t *testing.T) {
			d, set := hooked(t, dsn)
			if err := d.Write(d.Deadline(), insert); err != nil {
				t.Fatal(err)
			}
			n := 0
			set(func(query string, run func() error) error {
				if n++; query == "ROLLBACK" && n < 20 {
					return errors.New("no rollback")
				}
				return run()
			})
			fire := errors.New("the disk is on fire")
			err := d.Write(d.Deadline(), func(c *sql.Conn) error { return errors.Join(insert(c), fire) })
			if !errors.Is(err, fire) {
				t.Errorf("error %v", err)
			}
			set(hookdriver.Run)
			usable(t, d, 1)
		})
	}
}

// A trigger or a full disk may end the transaction.
func TestTransactionEnds(t *testing.T) {
	for kind, dsn := range kinds(t) {
		t.Run(kind, func(t *testing.T) {
			d, _ := hooked(t, dsn)
			if err := d.Write(d.Deadline(), insert); err != nil {
				t.Fatal(err)
			}
			err := d.Write(d.Deadline(), func(c *sql.Conn) error { return errors.Join(insert(c), Exec(c, "ROLLBACK"), errors.New("over")) })
			if err == nil {
				t.Error("no error")
			}
			if err := d.Write(d.Deadline(), func(c *sql.Conn) error { return Exec(c, "ROLLBACK") }); err == nil {
				t.Error("COMMIT without a transaction succeeded")
			}
			usable(t, d, 1)
		})
	}
}

// The time limit also covers the wait for a connection.
func TestConnectionInUse(t *testing.T) {
	d, _ := hooked(t, ":memory:")
	c, err := d.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d.Timeout = 50 * time.Millisecond
	start := time.Now()
	for what, err := range map[string]error{
		"Read":  d.Read(t.Context(), func(*sql.Conn) error { return nil }),
		"Write": d.Write(d.Deadline(), insert),
	} {
		if err == nil || !strings.Contains(err.Error(), "timed out waiting for a connection") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
	c.Close()
	usable(t, d, 0)
}

// A write gets a connection at once, however many readers there are. A reader waits for
// one until its time limit has passed or its context is done.
func TestReadersLeaveWriter(t *testing.T) {
	d, err := Open(filepath.Join(t.TempDir(), "x.db"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Migrate(table); err != nil {
		t.Fatal(err)
	}
	d.Timeout = 200 * time.Millisecond
	var beside func(readers int)
	beside = func(readers int) {
		err := d.Read(t.Context(), func(c *sql.Conn) error {
			if _, err := Strings(c, "SELECT id FROM things"); err != nil || readers > 1 {
				beside(readers - 1)
				return err
			}
			if err := d.Write(d.Deadline(), insert); err != nil {
				t.Errorf("Write beside %d readers: %v", readConns, err)
			}
			if err := d.Read(t.Context(), func(*sql.Conn) error { return nil }); err == nil || !strings.Contains(err.Error(), "timed out waiting") {
				t.Errorf("one more Read: %v", err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, cancel)
			start := time.Now()
			err := d.Read(ctx, func(*sql.Conn) error { return nil })
			if took := time.Since(start); !errors.Is(err, context.Canceled) || took > 150*time.Millisecond {
				t.Errorf("one more Read, cancelled: %v after %v", err, took)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	beside(readConns)
	usable(t, d, 1)
}

// When a reader's context is done, its wait for a lock ends, too.
func TestReadLocked(t *testing.T) {
	d, set := hooked(t, ":memory:")
	set(func(string, func() error) error { return coded(busy) })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	err := d.Read(ctx, func(c *sql.Conn) error { return Exec(c, "SELECT 1") })
	if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took > time.Second {
		t.Errorf("Read: %v after %v", err, took)
	}
	set(hookdriver.Run)
	usable(t, d, 0)
}

// In a shared cache, any statement may find tables locked, not only BEGIN and COMMIT.
func TestSharedCache(t *testing.T) {
	dsn := "file:" + filepath.ToSlash(filepath.Join(t.TempDir(), "x.db")) + "?cache=shared&_busy_timeout=0"
	app, err := sql.Open("sqlite3", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	own, err := sql.Open("sqlite3", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	own.SetMaxOpenConns(1)
	d, err := Use(own)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Migrate(table); err != nil {
		t.Fatal(err)
	}
	c, err := app.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := errors.Join(Exec(c, "BEGIN IMMEDIATE"), insert(c)); err != nil {
		t.Fatal(err)
	}
	read := func() error {
		return d.Read(t.Context(), func(c *sql.Conn) error { _, err := Strings(c, "SELECT count(*) FROM things"); return err })
	}
	done := make(chan error, 2)
	go func() { done <- read() }()
	go func() { done <- d.Write(d.Deadline(), insert) }()
	select {
	case err := <-done:
		t.Errorf("returned %v while the table was locked", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := Exec(c, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// To find out whether its connections share a cache, Use needs two of them. It does not
// change their settings, and does not wait long for them.
func TestUseFindsSharedCache(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		cache  string
		held   int // number of connections in use, of three
		shared bool
	}{
		{"shared", 0, true},
		{"shared", 1, true},
		{"shared", 2, false}, // can't be detected
		{"private", 0, false},
		{"private", 2, false},
	} {
		t.Run(fmt.Sprint(test.cache, ", ", test.held, " in use"), func(t *testing.T) {
			t.Parallel()
			app, err := sql.Open("sqlite3", "file:"+filepath.ToSlash(filepath.Join(t.TempDir(), "x.db"))+"?_cache_size=-321&cache="+test.cache)
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			app.SetMaxOpenConns(3)
			for range test.held {
				c, err := app.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
			}
			start := time.Now()
			if _, err := Use(app); (err != nil) != test.shared {
				t.Errorf("Use: %v", err)
			}
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("it took %v", took)
			}
			for range 3 - test.held {
				c, err := app.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if size, err := Strings(c, "PRAGMA cache_size"); err != nil || size[0] != "-321" {
					t.Errorf("cache_size is %v, %v", size, err)
				}
			}
		})
	}
}

// A fakeDriver is the driver of another kind of database.
type fakeDriver struct{}

func (fakeDriver) Connect(context.Context) (driver.Conn, error) { return fakeDriver{}, nil }
func (fakeDriver) Driver() driver.Driver                        { return nil }
func (fakeDriver) Begin() (driver.Tx, error)                    { return nil, errors.New("syntax error") }
func (fakeDriver) Close() error                                 { return nil }
func (fakeDriver) Prepare(string) (driver.Stmt, error)          { return nil, errors.New("syntax error") }

func TestUseRefuses(t *testing.T) {
	pool := func(dsn string) *sql.DB {
		db, err := sql.Open("sqlite3", dsn)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { db.Close() })
		return db
	}
	closed := pool(filepath.Join(t.TempDir(), "x.db"))
	closed.Close()
	other := sql.OpenDB(fakeDriver{})
	defer other.Close()
	old, set := hookdriver.Open(t, filepath.Join(t.TempDir(), "old.db"))
	set(func(query string, run func() error) error {
		if strings.Contains(query, "CREATE") || strings.Contains(query, "BEGIN") {
			t.Errorf("it executed %s", query)
		}
		return run()
	})
	for _, test := range []struct {
		name string
		db   *sql.DB
		want string
	}{
		{"nil", nil, "nil"},
		{"of another kind", other, "make sure that it is one"},
		{"closed", closed, "closed"},
		{"in memory", pool(":memory:"), "SetMaxOpenConns(1)"},
		{"in memory, shared cache", pool("file:x?mode=memory&cache=shared"), "SetMaxOpenConns(1)"},
		{"temporary", pool(""), "SetMaxOpenConns(1)"},
		{"journal_mode=OFF", pool(filepath.Join(t.TempDir(), "x.db") + "?_journal_mode=OFF"), "use another journal_mode"},
	} {
		t.Run(test.name, func(t *testing.T) {
			start := time.Now()
			d, err := Use(test.db)
			if err == nil || d != nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Use = %v, %v, want %q", d, err, test.want)
			}
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
	if _, err := Use(old); err != nil {
		t.Error(err)
	}
}

func TestTooOld(t *testing.T) {
	for version, want := range map[string]bool{"3.38.0": true, "3.38": true, "3.54.1": true, "4.0.0": true, "3.100.2.1": true,
		"3.37.9": false, "3.9.1": false, "2.99.99": false, "": false, "new": false} {
		if got := tooOld(version); got == want {
			t.Errorf("tooOld(%q) = %v", version, got)
		}
	}
}

// Migrate adds what a table lacks and changes nothing else, however many processes do
// that at once. It leaves any other object of that name as it is.
func TestMigrate(t *testing.T) {
	const all = "id TEXT,name TEXT,size INTEGER"
	for _, test := range []struct{ name, script, want, refused string }{
		{"no table", "CREATE TABLE other (id); PRAGMA user_version = 7", all, ""},
		{"complete", strings.Join(table.Create, ";"), all, ""},
		{"columns to add", "CREATE TABLE Things (ID TEXT PRIMARY KEY, more, Name TEXT)", "ID TEXT,more ,Name TEXT,size INTEGER", ""},
		{"index to add", table.Create[0], all, ""},
		{"view", "CREATE VIEW Things AS SELECT 1 AS id", "", "there is a view called things in it where a table should be: use another database, or rename it"},
		{"no name", "CREATE TABLE things (id TEXT PRIMARY KEY)", "", "no column name"},
		{"no key", "CREATE TABLE things (id TEXT, name TEXT)", "", "primary key is not id"},
		{"another key", "CREATE TABLE things (id TEXT, name TEXT PRIMARY KEY)", "", "primary key is not id"},
		{"two keys", "CREATE TABLE things (id TEXT, name TEXT, PRIMARY KEY (id, name))", "", "primary key is not id"},
		{"WITHOUT ROWID", "CREATE TABLE things (id TEXT PRIMARY KEY, name TEXT) WITHOUT ROWID", "", "without a rowid"},
		{"WITHOUT ROWID, but a column of that name", "CREATE TABLE things (id TEXT PRIMARY KEY, name TEXT, rowid TEXT) WITHOUT ROWID", "", "without a rowid"},
		{"column rowid", "CREATE TABLE things (id TEXT PRIMARY KEY, name TEXT, RowID TEXT)", "", "without a rowid"},
		{"virtual table", "CREATE VIRTUAL TABLE things USING rtree(id, x0, x1)", "", "no column name"},
	} {
		t.Run(test.name, func(t *testing.T) {
			app, err := sql.Open("sqlite3", filepath.Join(t.TempDir(), "x.db"))
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			if _, err := app.Exec(test.script); err != nil {
				t.Fatal(err)
			}
			d, err := Use(app)
			if err != nil {
				t.Fatal(err)
			}
			before := describe(t, d)
			var wait sync.WaitGroup
			for range 8 {
				wait.Go(func() {
					if err := d.Migrate(table); (err != nil) != (test.refused != "") || err != nil && !strings.Contains(err.Error(), test.refused) {
						t.Errorf("Migrate = %v, want %q", err, test.refused)
					}
				})
			}
			wait.Wait()
			after := describe(t, d)
			if test.refused != "" && after != before {
				t.Errorf("the database is %s, was %s", after, before)
			}
			if test.refused == "" && !strings.HasSuffix(after, test.want+" things_size") {
				t.Errorf("the database is %s, want %s", after, test.want)
			}
			if strings.Contains(before, "other") && !strings.HasPrefix(after, "7 other") {
				t.Errorf("the database is %s, was %s", after, before)
			}
		})
	}
}

// describe summarizes the schema of a database.
func describe(t *testing.T, d *DB) (all string) {
	t.Helper()
	err := d.QueryRow(`SELECT (SELECT user_version FROM pragma_user_version) || ' '
		|| coalesce((SELECT group_concat(name) FROM sqlite_master WHERE lower(name) NOT LIKE '%things%'), '') || ' '
		|| coalesce((SELECT group_concat(name || ' ' || type) FROM pragma_table_info('things')), '') || ' '
		|| coalesce((SELECT group_concat(name) FROM pragma_index_list('things') WHERE origin = 'c'), '')`).Scan(&all)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// The next call detects that the file was deleted or replaced.
func TestCheckFile(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("this system keeps open files")
	}
	for name, take := range map[string]func(path string) error{
		"deleted":  os.Remove,
		"replaced": func(path string) error { return errors.Join(os.Rename(path, path+"2"), os.WriteFile(path, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.db")
			d, _ := hooked(t, path)
			if err := take(path); err != nil {
				t.Fatal(err)
			}
			for what, err := range map[string]error{
				"Read":  d.Read(t.Context(), func(*sql.Conn) error { return nil }),
				"Write": d.Write(d.Deadline(), insert),
			} {
				if err == nil || !strings.Contains(err.Error(), "while it was open") {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

// A long reader makes the WAL grow. Afterwards it shrinks again.
func TestWALShrinks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	d, err := Open(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Migrate(table); err != nil {
		t.Fatal(err)
	}
	reader, err := d.reads.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	if err := Exec(reader, "BEGIN"); err != nil {
		t.Fatal(err)
	}
	if _, err := Strings(reader, "SELECT id FROM things"); err != nil {
		t.Fatal(err)
	}
	write := func(mb int) int64 {
		t.Helper()
		err := d.Write(d.Deadline(), func(c *sql.Conn) error {
			return Exec(c, fmt.Sprintf("INSERT INTO things (name) VALUES (zeroblob(%d << 20))", mb))
		})
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path + "-wal")
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	const limit = 64 << 20
	if size := write(80); size < limit {
		t.Errorf("the WAL has %d bytes beside a reader", size)
	}
	if err := Exec(reader, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	write(1) // also checkpoints, so that the next write begins at the start of the WAL
	if size := write(1); size > limit {
		t.Errorf("the WAL has %d bytes without one", size)
	}
}

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	if err := errors.Join(os.Mkdir("d", 0o700), os.WriteFile("file", nil, 0o600), os.WriteFile("ro", nil, 0o444),
		os.Symlink("file", "link"), os.Symlink("link", "link2"), os.Symlink("d", "dlink"), os.Symlink("gone", "dangling"),
		os.Symlink("loop", "loop"), os.WriteFile("twice", nil, 0o600), os.Link("twice", "thrice"), os.Symlink("thrice", "link3")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ path, want, fails string }{
		{":memory:", "", ""},
		{"new", "new", ""},
		{"file", "file", ""},
		{filepath.Join(dir, "file"), "file", ""},
		{"d/../d/./x", "d/x", ""},
		{"link", "file", ""},
		{"link2", "file", ""},
		{"dlink/x", "d/x", ""},
		{"./:memory:", ":memory:", ""},
		{"", "", "the path is empty"},
		{"a\x00b", "", "NUL byte"},
		{"d", "", "not a regular file: choose"},
		{"d/", "", "names a directory: choose"},
		{".", "", "names a directory: choose"},
		{"none/x", "", "no directory"},
		{"none/none/x", "", "create it first, or choose"},
		{"file/x", "", "not a directory"},
		{"dangling", "", "link"},
		{"loop", "", "link"},
		{"ro", "", "make it writable"},
		{"twice", "", "remove the other links"},
		{"link3", "", "thrice is one of 2 hard links"},
	} {
		got, err := Resolve(test.path)
		want := test.want
		if want != "" {
			want = filepath.Join(dir, want)
		}
		if got != want || (err == nil) != (test.fails == "") || err != nil && !strings.Contains(err.Error(), test.fails) {
			t.Errorf("Resolve(%q) = %q, %v, want %q, %q", test.path, got, err, want, test.fails)
		}
	}
}

// The database may be closed while Changes reads the version.
func TestCloseDuringChanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	for range 100 {
		d, err := Open(path, "")
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		started := make(chan struct{}, 4)
		for range cap(started) - 1 {
			all.Go(func() {
				for range d.Changes(t.Context(), 0) {
					started <- struct{}{}
				}
			})
			<-started
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		all.Wait() // Changes ends
	}
}

// Any number of callers of Changes keep one connection, and none that others need. They
// see every commit with and without it.
func TestChangesKeepOne(t *testing.T) {
	for max, want := range map[int]int{1: 0, 2: 1, 4: 1, 0: 1} {
		t.Run(fmt.Sprint(max, " connections"), func(t *testing.T) {
			app, err := sql.Open("sqlite3", filepath.Join(t.TempDir(), "x.db")+"?_journal_mode=WAL")
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			app.SetMaxOpenConns(max)
			d, err := Use(app)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Migrate(table); err != nil {
				t.Fatal(err)
			}
			var all sync.WaitGroup
			defer all.Wait()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var seen [5]atomic.Int64
			for i := range seen {
				all.Go(func() {
					for err := range d.Changes(ctx, time.Millisecond) {
						if err != nil {
							t.Error(err)
						}
						seen[i].Add(1)
					}
				})
			}
			eventually := func(what string, f func() bool) {
				t.Helper()
				for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("%s: never", what)
					}
				}
			}
			write := func() {
				t.Helper()
				var before [len(seen)]int64
				for i := range seen {
					before[i] = seen[i].Load()
				}
				if err := d.Write(d.Deadline(), insert); err != nil {
					t.Error(err)
				}
				for i := range seen {
					eventually("a commit is seen", func() bool { return seen[i].Load() > before[i] })
				}
			}
			eventually("connections are kept", func() bool { return app.Stats().InUse == want })
			write()
			for range max - 1 { // the application leaves one
				c, err := app.Conn(ctx)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
			}
			write()
		})
	}
}
