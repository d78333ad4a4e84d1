// Command task shows, cancels and deletes the operations in the SQLite database of a
// program that uses package task. It opens the database alongside the running program and
// leaves no trace of its own there.
//
// Run it without arguments for help.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/owner"
	"github.com/mynt-nas/task/internal/sqlitefile"
)

const usage = `Usage: task -db FILE COMMAND [OPTION...] [ID...]

Looks at the operations in the SQLite database of a program that uses package
task, which may be running meanwhile.

  list            lists operations, the newest first
    -state S,...          in one of these states
    -name NAME            with exactly this name
    -containing TEXT      with this text in their name; ASCII letters match in either case
    -metadata KEY=VALUE   with this string in their metadata; may be repeated
    -since AGE|TIME       unfinished, or finished since then
    -finished             only finished ones, the one that finished last first
    -limit N              at most N, 50 by default
  show ID         shows all of one operation, with metadata and result
  follow [ID...]  shows changes until these operations have finished, or without
                  an ID those of all operations until it is interrupted
  cancel ID...    cancels operations, and waits until they have finished
    -reason TEXT          kept in the error of the operation, after USER@HOST
    -no-wait              does not wait
  prune           deletes finished operations, and says how many
    -before AGE|TIME      that have finished before then

All commands take -json, which writes one JSON value per line. Lists have no
results, also as JSON. An AGE is as in 90s, 36h or 30d, a TIME as in 2006-01-02,
"2006-01-02 15:04" (local time) or RFC 3339. An ID made by this package may be
cut off after 8 or more characters, if it is the only one that begins like that.

Exit status:
  0    done; follow: all operations are DONE; cancel: all are CANCELLED
  1    follow: one is FAILED; cancel: one has finished in another state
  2    wrong usage, or the database can't be used
  3    follow: one is CANCELLED
  4    there is no such operation, or none left to cancel
  5    the process that ran one is dead: it finishes when its program starts again
  130  interrupted before the operations had finished
If several apply, the status is the highest of them.
`

const (
	exitFailed      = 1
	exitUsage       = 2
	exitCancelled   = 3
	exitNotFound    = 4
	exitDead        = 5
	exitInterrupted = 130
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], console(os.Stdout), os.Stderr))
}

// A tool is one run of this command.
type tool struct {
	out    screen
	errs   io.Writer
	json   bool
	store  *task.SQLiteStore
	m      *task.Manager
	owners *owner.Owner // observes the owners of operations
}

// A command defines its options and returns the function to call once the database is open,
// with the IDs given.
type command func(t *tool, flags *flag.FlagSet) func(ctx context.Context, ids []string) (exit int, err error)

var commands = map[string]command{"list": list, "show": show, "follow": follow, "cancel": cancel, "prune": prune}

// errUsage is wrapped by errors that should point to the usage.
var errUsage = errors.New("run task without arguments for help")

// run runs the command and returns the exit status.
func run(ctx context.Context, args []string, out screen, errs io.Writer) int {
	t := &tool{out: out, errs: errs}
	exit, err := t.run(ctx, args)
	if err != nil {
		text := strings.ReplaceAll(strings.TrimPrefix(err.Error(), "task: "), "\n", "; ")
		switch {
		case t.m == nil || exit == exitNotFound:
		case sqlitefile.Locked(err):
			text += ": another program keeps the database locked: try again once that has finished"
		case strings.Contains(text, "readonly database"):
			text += ": run this as a user who may write the database"
		}
		t.warn(text)
		if exit == 0 {
			exit = exitUsage
		}
	}
	return exit
}

// warn writes a line about a problem.
func (t *tool) warn(text string) { fmt.Fprintln(t.errs, "task:", escape(text)) }

func (t *tool) run(ctx context.Context, args []string) (exit int, err error) {
	global := flag.NewFlagSet("", flag.ContinueOnError)
	path := global.String("db", "", "")
	rest, err := parse(global, args, 0)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0, t.out.lines([]string{usage})
	case len(args) == 0:
		fmt.Fprint(t.errs, usage)
		return exitUsage, nil
	case err != nil:
		return 0, err
	case len(rest) == 0 || commands[rest[0]] == nil:
		return 0, fmt.Errorf("no command list, show, follow, cancel or prune: %w", errUsage)
	}
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.StringVar(path, "db", *path, "")
	flags.BoolVar(&t.json, "json", false, "")
	do := commands[rest[0]](t, flags)
	ids, err := parse(flags, rest[1:], len(rest))
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0, t.out.lines([]string{usage})
	case err != nil:
		return 0, fmt.Errorf("%s: %w", rest[0], err)
	case *path == "":
		return 0, fmt.Errorf("no -db FILE: %w", errUsage)
	}
	return t.attached(*path, func() (int, error) { return do(ctx, ids) })
}

// parse parses options and returns the other arguments. Options may follow up to max of
// these arguments.
func parse(flags *flag.FlagSet, args []string, max int) (others []string, err error) {
	flags.SetOutput(io.Discard)
	var last []string // after --, not options
	if i := slices.Index(args, "--"); i >= 0 && max > 0 {
		args, last = args[:i], args[i+1:]
	}
	for {
		if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
			return nil, err
		} else if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errUsage)
		}
		if args = flags.Args(); len(args) == 0 || max == 0 {
			return append(append(others, args...), last...), nil
		}
		others, args = append(others, args[0]), args[1:]
	}
}

// attached calls do while the database at path is attached.
func (t *tool) attached(path string, do func() (int, error)) (exit int, err error) {
	if t.store, err = task.AttachSQLite(path); err != nil {
		return 0, err
	}
	defer t.store.Close()
	file, err := sqlitefile.Resolve(path)
	if err != nil {
		return 0, err
	}
	t.owners = owner.Observer(file)
	if t.m, err = task.New(t.store, task.WithLogger(slog.New(slog.DiscardHandler))); err != nil {
		return 0, err
	}
	defer t.m.Close()
	return do()
}

// find returns the operation with the given ID, or the only one whose ID begins with it.
func (t *tool) find(id string) (*task.Operation, error) {
	op, err := t.store.Get(id)
	if err == nil || !errors.Is(err, task.ErrNotFound) {
		return op, err
	}
	const last = "ffffffff-ffff-7fff-bfff-ffffffffffff" // the last UUID of version 7
	var found []*task.Operation
	if prefix := strings.ToLower(id); len(prefix) >= 8 && len(prefix) < len(last) {
		ops, err := t.m.List(100, 0, task.Before(prefix+last[len(prefix):]), task.WithoutResults())
		if err != nil && !errors.Is(err, task.ErrNotFound) {
			return nil, err
		}
		for _, op := range ops {
			if strings.HasPrefix(op.ID, prefix) {
				found = append(found, op)
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no operation %s: %w", id, task.ErrNotFound)
	case 1:
		return t.store.Get(found[0].ID)
	}
	return nil, fmt.Errorf("several operations begin with %s, as %s and %s: give more of the ID", id, found[0].ID, found[1].ID)
}

// findAll returns the IDs of operations, each once.
func (t *tool) findAll(ids []string) (all []string, exit int, err error) {
	for _, id := range ids {
		op, err := t.find(id)
		if err != nil {
			return nil, exitOf(err), err
		}
		if !slices.Contains(all, op.ID) {
			all = append(all, op.ID)
		}
	}
	return all, 0, nil
}

// exitOf returns the exit status for an error.
func exitOf(err error) int {
	if errors.Is(err, task.ErrNotFound) {
		return exitNotFound
	}
	return exitUsage
}

// process reports whether the process that runs an operation is dead, or why that is
// unknown.
func (t *tool) process(op *task.Operation) (dead bool, unknown error) {
	done, dead, err := t.owners.Dead(op.Owner)
	if dead {
		done(false)
	}
	if err != nil {
		err = fmt.Errorf("%s: can't tell whether the process that runs it is alive: %w", op.ID, err)
	}
	return dead, err
}

// A moment is an option for a point in time, given as an age or a time.
type moment struct{ time.Time }

func (m *moment) String() string { return "" }

func (m *moment) Set(text string) (err error) {
	age := text
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n float64
		if _, err := fmt.Sscanf(days+" ", "%g ", &n); err == nil {
			age = fmt.Sprintf("%gh", 24*n)
		}
	}
	if d, err := time.ParseDuration(age); err == nil && d >= 0 {
		m.Time = time.Now().Add(-d)
		return nil
	}
	for _, layout := range []string{"2006-01-02", "2006-01-02 15:04", "2006-01-02 15:04:05", time.RFC3339} {
		if m.Time, err = time.ParseInLocation(layout, text, time.Local); err == nil {
			return nil
		}
	}
	return errors.New("an age as in 90s, 36h or 30d, or a time as in 2006-01-02")
}
