package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/internal/testos"
)

// terminal runs the tool as if on a terminal with the given number of columns, and returns
// its output.
func terminal(t *testing.T, columns int, path string, args ...string) string {
	t.Helper()
	var out, errs buffer
	exit := run(t.Context(), append([]string{"-db", path}, args...), screen{&out, func() (int, int) { return columns, 10 }}, &errs)
	if exit != 0 || errs.String() != "" {
		t.Errorf("%q: exit status %d, errors %q", args, exit, errs.String())
	}
	return out.String()
}

// hostile are texts that must not reach a terminal unescaped.
var hostile = []string{"\x1b[2J\x1b]0;title\x07", "a\u202etxt.exe", "\u009b31m", "line\nline\r\t", "\xff\xfe", "\x7f\u200b\u2028", "\u2066x\u2069\ufeff"}

// safe checks that a text can move the cursor only to the next line.
func safe(t *testing.T, text string) {
	t.Helper()
	if !utf8.ValidString(text) {
		t.Errorf("invalid UTF-8 in %q", text)
	}
	for _, r := range text {
		if r != '\n' && r != ' ' && !unicode.IsGraphic(r) {
			t.Errorf("%U in %q", r, text)
			return
		}
	}
}

// save stores operations that appear to be run by this process.
func save(t *testing.T, path string, ops ...task.Operation) {
	t.Helper()
	store := testkit.OpenSQLite(t, path)
	for i, op := range ops {
		if op.ID == "" {
			id, err := uuid.NewV7()
			testkit.Must(t, err)
			op.ID = id.String()
		}
		op.CreatedAt = time.Now().Add(time.Duration(i) * time.Millisecond)
		testkit.Must(t, store.Save(&op))
	}
}

func TestTable(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	now := time.Now()
	ops := []task.Operation{
		{Name: "scrub", State: task.StateRunning, Progress: 42, Message: "reading tank/home", StartedAt: now.Add(-50*time.Hour - 30*time.Minute)},
		{Name: "wait", State: task.StatePending, Cancelling: true},
		{Name: strings.Repeat("long ", 50), State: task.StateFailed, Progress: 7, Error: strings.Repeat("disk full ", 30),
			StartedAt: now.Add(-3 * time.Hour), UpdatedAt: now.Add(-time.Hour)},
		{Name: strings.Repeat("漢字", 40), State: task.StateDone, StartedAt: now.Add(-time.Hour), UpdatedAt: now},
	}
	for _, text := range hostile {
		ops = append(ops, task.Operation{Name: "x" + text, State: task.StateFailed, Message: text, Error: text, Metadata: json.RawMessage(`{"a":"\u001b"}`)})
	}
	save(t, path, ops...)
	for _, columns := range []int{20, 60, 80, 120, 400} {
		t.Run(fmt.Sprint(columns), func(t *testing.T) {
			out := terminal(t, columns, path, "list")
			lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
			if len(lines) != len(ops)+1 {
				t.Errorf("%d lines, want %d:\n%s", len(lines), len(ops)+1, out)
			}
			for _, line := range lines {
				if w := width(line); w >= columns {
					t.Errorf("%q takes %d cells of %d", line, w, columns)
				}
			}
			safe(t, out)
			if columns >= 80 && !strings.Contains(lines[0], "ERROR") {
				t.Errorf("no errors in\n%s", out)
			}
			if columns < 120 {
				return
			}
			for _, want := range []string{"STATE", "[####......]  42%", "CANCELLING", "50h30m", "2h0m0s", "disk", "reading"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			if columns == 400 && !strings.Contains(out, `x\x1b[2J\x1b]0;title\a`) {
				t.Errorf("no escaped name in\n%s", out)
			}
		})
	}
	if out := terminal(t, 80, path, "list", "-name", "wait"); strings.Contains(out, "ERROR") || strings.Contains(out, "STARTED") {
		t.Errorf("empty columns in\n%s", out)
	}
}

// TestHostile: every form of output is escaped.
func TestHostile(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	for i, text := range hostile {
		raw, err := json.Marshal(map[string]string{"x" + text: text})
		testkit.Must(t, err)
		save(t, path, task.Operation{ID: fmt.Sprint("id", i), Name: "x" + text, State: task.StateFailed, Message: text, Error: text,
			Metadata: json.RawMessage(raw), Result: json.RawMessage(`"` + "\u009b31m\u202e" + `"`)})
	}
	testkit.Exec(t, path, `UPDATE tasks SET id = 'id' || char(27) || '[2J', metadata = '"' || CAST(x'c328' AS TEXT) || '"' WHERE id = 'id0'`)
	for _, args := range [][]string{{"list"}, {"list", "-json"}, {"show", "id1"}, {"show", "id2"}, {"show", "-json", "id2"}, {"show", "id\x1b[2J"}, {"show", "-json", "id\x1b[2J"}} {
		out := terminal(t, 200, path, args...)
		safe(t, out)
		if args[len(args)-1] == "-json" {
			for i, op := range decode(t, out) { // newest first
				if want := "x" + strings.ToValidUTF8(hostile[len(hostile)-1-i], "\ufffd"); op.Name != want && !strings.Contains(want, "\ufffd") {
					t.Errorf("name %q, want %q", op.Name, want)
				}
			}
		}
	}
	var errs buffer
	if exit := run(t.Context(), []string{"-db", path, "show", hostile[0]}, screen{Writer: &errs}, &errs); exit != exitNotFound {
		t.Errorf("exit status %d", exit)
	}
	safe(t, errs.String())
}

func TestCut(t *testing.T) {
	testos.Parallel(t)
	for _, tt := range []struct {
		text string
		n    int
		want string
	}{
		{"abc", 3, "abc"}, {"abcd", 3, "ab…"}, {"abc", 1, "…"}, {"abc", 0, ""}, {"", 0, ""},
		{"漢字", 4, "漢字"}, {"漢字", 3, "漢…"}, {"漢字", 2, "…"}, {"e\u0301e\u0301", 2, "e\u0301e\u0301"},
	} {
		if got := cut(tt.text, tt.n); got != tt.want {
			t.Errorf("cut(%q, %d) = %q, want %q", tt.text, tt.n, got, tt.want)
		}
	}
}

// TestShortID: IDs are shortened as long as they differ.
func TestShortID(t *testing.T) {
	testos.Parallel(t)
	a, b := "01a215c9-fe1e-7e43-8375-d63a9b06c494", "01a215c9-fe1e-7e43-8375-d63a9b06c4ff"
	for want, ids := range map[int][]string{13: {a, "x"}, 35: {a, b}, 14: {a[:13], a}} {
		var ops []*task.Operation
		for _, id := range ids {
			ops = append(ops, &task.Operation{ID: id})
		}
		if got := shortID(ops); got != want {
			t.Errorf("%q: %d, want %d", ids, got, want)
		}
	}
}

// TestFollowOnTerminal: on a terminal, follow redraws the table in place and finally leaves
// the outcome of the operation.
func TestFollowOnTerminal(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	fn, started, release := testkit.Blocker(nil)
	defer release()
	op := testkit.Submit(t, m, fn)
	<-started
	var out, errs buffer
	done := make(chan int)
	go func() {
		done <- run(t.Context(), []string{"-db", path, "follow", op.ID}, screen{&out, func() (int, int) { return 80, 10 }}, &errs)
	}()
	testkit.Must(t, testkit.Until(func() bool { return strings.Count(out.String(), "\r\x1b[2A\x1b[J") > 3 }))
	release()
	if exit := <-done; exit != 0 {
		t.Errorf("exit status %d, errors %q", exit, errs.String())
	}
	frames := strings.Split(out.String(), "\r\x1b[2A\x1b[J")
	if !strings.Contains(frames[0], "[..........]   0%") || strings.Count(frames[0], "\n") != 2 {
		t.Errorf("first %q", frames[0])
	}
	last := frames[len(frames)-1]
	if !strings.Contains(last, "DONE") || strings.Count(last, "\n") != 1 || strings.Contains(last, "\x1b") {
		t.Errorf("last %q", last)
	}
	safe(t, strings.Join(frames, ""))
}

// TestFollowInterruptedOnTerminal: an interrupted follow leaves the cursor at the start of
// a line, below a table that fits the terminal.
func TestFollowInterruptedOnTerminal(t *testing.T) {
	testos.Parallel(t)
	path := testkit.Path(t)
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	args := []string{"-db", path, "follow"}
	for range 30 {
		args = append(args, testkit.Submit(t, m, testkit.UntilCancelled).ID)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var out, errs buffer
	done := make(chan int)
	go func() { done <- run(ctx, args, screen{&out, func() (int, int) { return 80, 10 }}, &errs) }()
	testkit.Must(t, testkit.Until(func() bool { return strings.Contains(out.String(), "and 24 more") }))
	cancel()
	if exit := <-done; exit != exitInterrupted {
		t.Errorf("exit status %d, errors %q", exit, errs.String())
	}
	frames := strings.Split(out.String(), "\r\x1b[8A\x1b[J")
	last := frames[len(frames)-1]
	if !strings.HasSuffix(last, "\n") || strings.Count(last, "\n") != 8 {
		t.Errorf("last %q", last)
	}
	safe(t, strings.Join(frames, ""))
}

// TestWithoutPermission: the tool reports that it may not open the owner's file, or may not
// read or write the database.
func TestWithoutPermission(t *testing.T) {
	testos.Parallel(t)
	path := filepath.Join(testos.Dir(t), "tasks.db")
	m := testkit.NewManager(t, testkit.OpenSQLite(t, path))
	fn, started, release := testkit.Blocker(nil)
	defer release()
	op := testkit.Submit(t, m, fn)
	<-started
	files, err := filepath.Glob(path + "*")
	testkit.Must(t, err)
	for _, file := range files {
		if !strings.Contains(file, "-owner-") {
			testkit.Must(t, os.Chmod(file, 0o666))
		}
	}
	tell := func(args ...string) (out, errs buffer, exit int) {
		could := testos.Unprivileged(func() {
			exit = run(t.Context(), append([]string{"-db", path}, args...), screen{Writer: &out}, &errs)
		})
		if !could {
			t.Skip("can't do without root's rights here")
		}
		return
	}
	if out, errs, exit := tell("show", op.ID); exit != 0 || !strings.Contains(out.String(), "can't tell whether the process that runs it is alive") {
		t.Errorf("exit status %d, output %q, errors %q", exit, out.String(), errs.String())
	}
	for _, file := range files {
		testkit.Must(t, os.Chmod(file, 0o644))
	}
	if _, errs, exit := tell("cancel", op.ID); exit != exitUsage || !strings.Contains(errs.String(), "run this as a user who may write") {
		t.Errorf("cancel: exit status %d, errors %q", exit, errs.String())
	}
	time.AfterFunc(time.Second, release)
	if out, errs, exit := tell("follow", op.ID); exit != 0 || strings.Count(errs.String(), "can't tell") != 1 {
		t.Errorf("exit status %d, output %q, errors %q", exit, out.String(), errs.String())
	}
	for _, file := range files {
		testkit.Must(t, os.Chmod(file, 0o600))
	}
	if out, errs, exit := tell("list"); exit != exitUsage || !strings.Contains(errs.String(), "make sure") || strings.Count(errs.String(), "\n") != 1 {
		t.Errorf("exit status %d, output %q, errors %q", exit, out.String(), errs.String())
	}
}
