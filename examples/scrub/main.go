// Scrub reads every regular file in a directory tree and computes its SHA-256, as one
// operation of package task.
//
//	scrub [-db FILE] DIR
//	scrub [-db FILE] -history
//
// It shows its progress as a bar on a terminal, and otherwise as a line every ten percent.
// The history shows the file being read, or last read, and the rate. Ctrl-C cancels the
// scrub, and a second Ctrl-C quits at once. Unreadable files are reported and do not make
// the scrub fail.
//
// Every scrub is stored in an SQLite file. If a crash or a kill interrupts a scrub, the
// next run, or -history, marks it as failed.
//
// The exit code is 0 for a scrub that is done, 1 for one that failed, 2 for a
// usage error, and 130 for one that was cancelled.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/mynt-nas/task"
)

func main() {
	db := flag.String("db", "scrub.db", "store the history in this SQLite `FILE`")
	history := flag.Bool("history", false, fmt.Sprintf("print the newest %d scrubs and exit", maxHistory))
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "usage: scrub [-db FILE] DIR\n       scrub [-db FILE] -history\n")
		flag.PrintDefaults()
	}
	flag.Parse()

	var err error
	switch {
	case *history && flag.NArg() == 0:
		err = showHistory(os.Stdout, *db)
	case !*history && flag.NArg() == 1:
		err = scrubDir(os.Stdout, *db, flag.Arg(0))
	default:
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "scrub:", err)
	}
	switch {
	case errors.Is(err, task.ErrCancelled):
		os.Exit(130)
	case err != nil:
		os.Exit(1)
	}
}

// withManager calls use with a manager whose operations are in the file db. It first marks
// interrupted scrubs as failed.
func withManager(db string, use func(*task.Manager) error) error {
	store, err := task.OpenSQLite(db)
	if err != nil {
		return err
	}
	m, err := task.New(store)
	if err != nil {
		return errors.Join(err, store.Close())
	}
	return errors.Join(use(m), m.Close(), store.Close())
}

// scrubDir scrubs a directory and shows the progress. If the user cancels the scrub, the
// error wraps task.ErrCancelled.
func scrubDir(out *os.File, db, dir string) error {
	if _, err := os.ReadDir(dir); err != nil {
		return fmt.Errorf("%w: DIR must be a directory that you may read", err)
	}
	dir, err := realPath(dir)
	if err != nil {
		return err
	}
	return withManager(db, func(m *task.Manager) error {
		db, err := realPath(db) // it exists now
		if err != nil {
			return err
		}
		s := &scrub{dir: dir, db: db}

		signals := make(chan os.Signal, 2)
		signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
		op, err := m.Submit("scrub "+dir, s.run, task.WithMetadata(map[string]string{"dir": dir}))
		if err != nil {
			return err
		}
		go cancelOnSignal(op, signals)

		op, err = follow(m, op.ID, newBar(out, isTerminal(out), s))
		if err != nil {
			return err
		}
		return summarize(out, op, db)
	})
}

// realPath returns the absolute path of an existing file, with all symbolic links resolved.
func realPath(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

// cancelOnSignal cancels op at the first signal and quits at the second.
func cancelOnSignal(op *task.Operation, signals <-chan os.Signal) {
	<-signals
	if op.Cancel() == nil { // otherwise it has just finished
		fmt.Fprintln(os.Stderr, "\nscrub: cancelling; interrupt again to quit at once")
	}
	<-signals
	os.Exit(130)
}

// follow shows the progress of an operation until it has finished.
func follow(m *task.Manager, id string, b *bar) (*task.Operation, error) {
	defer b.end()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		op, err := m.Wait(ctx, id)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
		b.show(op.Progress)
		if err == nil {
			return op, nil
		}
	}
}

// summarize prints the result of a finished operation. It returns an error unless
// the operation is DONE.
func summarize(w io.Writer, op *task.Operation, db string) error {
	var r Result
	if err := op.DecodeResult(&r); err != nil {
		return fmt.Errorf("result of %s: %w", op.ID, err)
	}
	fmt.Fprintf(w, "%s: %s in %.1f s (%s/s), files: %d, unreadable: %d\n",
		op.State, size(r.Bytes), r.Seconds, size(int64(r.BytesPerSecond)), r.Files, r.Unreadable)
	shown := r.Errors[:min(len(r.Errors), 20)]
	for _, u := range shown {
		fmt.Fprintf(w, "  %s: %s\n", oneLine(u.Path), oneLine(u.Error))
	}
	if more := r.Unreadable - len(shown); more > 0 {
		fmt.Fprintf(w, "  and %d more; the history lists up to %d\n", more, maxListed)
	}
	if r.Digest != "" {
		fmt.Fprintf(w, "SHA-256: %s\n", r.Digest)
	}
	fmt.Fprintf(w, "History: %s (print it with -history)\n", db)
	switch op.State {
	case task.StateDone:
		return nil
	case task.StateCancelled:
		return task.ErrCancelled
	default:
		return errors.New(op.Error)
	}
}

const maxHistory = 1000

// showHistory prints the history in the file db.
func showHistory(w io.Writer, db string) error {
	if _, err := os.Stat(db); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no history in %s: scrub a directory first, or name another file with -db", db)
	}
	return withManager(db, func(m *task.Manager) error {
		ops, err := m.List(maxHistory, 0)
		if err != nil {
			return err
		}
		return printTable(w, ops)
	})
}

func printTable(w io.Writer, ops []*task.Operation) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tSTATE\tPROGRESS\tSTARTED\tTOOK\tERROR")
	for _, op := range ops {
		started, took := "-", "-"
		if !op.StartedAt.IsZero() {
			end := op.UpdatedAt
			if !op.State.Finished() {
				end = time.Now()
			}
			started = op.StartedAt.Local().Format(time.DateTime)
			if !op.Interrupted() { // otherwise the finish time is unknown
				took = end.Sub(op.StartedAt).Round(100 * time.Millisecond).String()
			}
		}
		at := op.Error
		if op.Message != "" {
			at = strings.TrimPrefix(at+": ", ": ") + "at " + op.Message
		}
		fmt.Fprintf(tw, "%s\t%s\t%d%%\t%s\t%s\t%s\n",
			oneLine(op.Name), op.State, op.Progress, started, took, oneLine(at))
	}
	return tw.Flush()
}

// oneLine makes s safe for a table and for a terminal, because file names may contain
// anything.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}
