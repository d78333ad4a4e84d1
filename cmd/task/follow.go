package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"os/user"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mynt-nas/task"
)

func follow(t *tool, _ *flag.FlagSet) func(context.Context, []string) (int, error) {
	return func(ctx context.Context, ids []string) (int, error) {
		all, exit, err := t.findAll(ids)
		if err != nil {
			return exit, err
		}
		return t.follow(ctx, all, followStatus)
	}
}

func cancel(t *tool, flags *flag.FlagSet) func(context.Context, []string) (int, error) {
	reason := flags.String("reason", "", "")
	noWait := flags.Bool("no-wait", false, "")
	return func(ctx context.Context, ids []string) (int, error) {
		if len(ids) == 0 {
			return 0, fmt.Errorf("cancel takes the IDs of operations: %w", errUsage)
		}
		all, exit, err := t.findAll(ids)
		if err != nil {
			return exit, err
		}
		text := "cancelled by " + caller()
		if *reason != "" {
			text += ": " + *reason
		}
		var asked []string
		for _, id := range all {
			switch err := t.m.CancelCause(id, text); {
			case err == nil:
				asked = append(asked, id)
			case !errors.Is(err, task.ErrNotFound):
				return 0, err
			default:
				exit = exitNotFound
				t.warn(id + ": has finished already")
			}
		}
		if len(asked) == 0 {
			return exit, nil
		}
		end := t.asked
		if !*noWait {
			end = func(ids []string) (int, error) { return t.follow(ctx, ids, cancelStatus) }
		}
		last, err := end(asked)
		return max(exit, last), err
	}
}

// cancelStatus returns the exit status of cancel for an operation's final state.
func cancelStatus(s task.State) int {
	if s == task.StateCancelled {
		return 0
	}
	return exitFailed
}

// followStatus returns the exit status of follow for an operation's final state.
func followStatus(s task.State) int {
	switch s {
	case task.StateDone:
		return 0
	case task.StateCancelled:
		return exitCancelled
	}
	return exitFailed
}

// caller returns the user who runs this command, as USER@HOST.
func caller() string {
	name, host := "unknown", "localhost"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return name + "@" + host
}

// asked warns about the cancelled operations that no living process runs.
func (t *tool) asked(ids []string) (exit int, err error) {
	for _, id := range ids {
		op, err := t.store.Get(id)
		if err != nil {
			return exitOf(err), fmt.Errorf("%s: %w", id, err)
		}
		if t.json {
			if err := t.writeJSON(op); err != nil {
				return 0, err
			}
		}
		if dead, _ := t.process(op); dead && !op.State.Finished() {
			exit = exitDead
			t.warn(deadText(op))
		}
	}
	return exit, nil
}

func deadText(op *task.Operation) string {
	return fmt.Sprintf("%s (%s): the process that ran it is dead: it finishes when its program starts again", op.ID, op.Name)
}

// A follower shows the progress and outcome of operations.
type follower struct {
	*tool
	all    bool                       // no IDs were given
	status func(task.State) int       // the exit status for a final state
	open   map[string]*task.Operation // unfinished operations, by ID
	dead   map[string]string          // the owner that was found dead, by operation ID
	asked  map[string]bool            // owners of unknown state that have been reported
	done   []*task.Operation          // finished operations, not yet drawn
	notes  []string                   // notes not yet drawn
	drawn  []string                   // lines on the terminal that the next draw replaces
	exit   int
}

// A change is what Subscribe yields.
type change struct {
	op  *task.Operation
	err error
}

// follow shows operations until they have finished. Without IDs, it shows all operations
// until ctx is done or the command is interrupted.
func (t *tool) follow(ctx context.Context, ids []string, status func(task.State) int) (exit int, err error) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // the next signal kills the process
	f := &follower{tool: t, all: len(ids) == 0, status: status, open: make(map[string]*task.Operation),
		dead: make(map[string]string), asked: make(map[string]bool)}
	for _, id := range ids {
		f.open[id] = &task.Operation{ID: id}
	}
	for f.all || len(f.open) > 0 {
		if err = f.watch(ctx); err != nil || ctx.Err() != nil {
			break
		}
	}
	if drawErr := f.draw(); err == nil {
		err = drawErr
	}
	switch {
	case err != nil:
		return 0, err
	case f.all:
		return 0, nil
	case len(f.open) > 0:
		return exitInterrupted, nil
	}
	return f.exit, nil
}

// watch watches the operations until they have finished, an error occurs, or they must be
// read again.
func (f *follower) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changes := f.changes(ctx)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for n := 0; f.all || len(f.open) > 0; {
		var err error
		select {
		case c, ok := <-changes:
			switch {
			case !ok:
				return nil
			case c.op != nil && c.err != nil: // only without IDs
				f.end(c.op.ID, exitNotFound, c.op.ID+": was deleted")
				continue
			case errors.Is(c.err, task.ErrNotFound), errors.Is(c.err, task.ErrLagged):
				return f.reread()
			case c.err != nil:
				return c.err
			}
			err = f.take(c.op)
		case <-tick.C:
			if n%10 == 0 {
				err = f.look()
			}
			n++
			err = cmp.Or(err, f.draw())
		case <-ctx.Done():
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// changes sends what Subscribe yields, until ctx is done.
func (f *follower) changes(ctx context.Context) <-chan change {
	var ids []string // nil for all
	if !f.all {
		ids = slices.Collect(maps.Keys(f.open))
	}
	changes := make(chan change)
	go func() {
		defer close(changes)
		pass := func(op *task.Operation, err error) bool {
			select {
			case changes <- change{op, err}:
				return true
			case <-ctx.Done():
				return false
			}
		}
		present, later, err := f.m.Raw().Subscribe(ctx, ids...)
		if err != nil {
			pass(nil, err)
			return
		}
		for _, op := range present {
			pass(op, nil)
		}
		later(pass)
	}()
	return changes
}

// take shows the new state of an operation.
func (f *follower) take(op *task.Operation) error {
	owner, lost := f.dead[op.ID]
	if f.open[op.ID] == nil && !f.all || lost && owner == op.Owner && !op.State.Finished() {
		return nil
	}
	f.open[op.ID] = op
	if op.State.Finished() {
		delete(f.open, op.ID)
		delete(f.dead, op.ID)
		f.done = append(f.done, op)
		f.exit = max(f.exit, f.status(op.State))
	}
	if f.live() {
		return nil // draw shows it
	}
	return f.writeLine(op)
}

// live reports whether the output is redrawn in place.
func (f *follower) live() bool { return f.out.size != nil && !f.json }

// reread reads the unfinished operations again.
func (f *follower) reread() error {
	for id := range f.open {
		op, err := f.store.Get(id)
		switch {
		case errors.Is(err, task.ErrNotFound):
			f.end(id, exitNotFound, id+": was deleted")
		case err != nil:
			return err
		default:
			if err := f.take(op); err != nil {
				return err
			}
		}
	}
	return nil
}

// end stops following an unfinished operation.
func (f *follower) end(id string, exit int, note string) {
	delete(f.open, id)
	f.exit = max(f.exit, exit)
	f.note(note)
}

func (f *follower) note(text string) {
	if f.live() {
		f.notes = append(f.notes, escape(text))
	} else {
		f.warn(text)
	}
}

// look checks that the database can be read and that the processes running the operations
// are alive.
func (f *follower) look() error {
	if _, err := f.store.Get(""); err != nil && !errors.Is(err, task.ErrNotFound) {
		return err
	}
	owners := make(map[string]bool) // whether each is dead
	for _, op := range f.open {
		if op.State == "" { // its state is not known yet
			continue
		}
		dead, known := owners[op.Owner]
		if !known {
			var unknown error
			if dead, unknown = f.process(op); unknown != nil && !f.asked[op.Owner] {
				f.asked[op.Owner] = true
				f.note(unknown.Error())
			}
			owners[op.Owner] = dead
		}
		if dead {
			if err := f.orphan(op); err != nil {
				return err
			}
		}
	}
	return nil
}

// orphan stops following an operation of a dead process, unless it has finished or another
// process has taken it over.
func (f *follower) orphan(op *task.Operation) error {
	now, err := f.store.Get(op.ID)
	switch {
	case errors.Is(err, task.ErrNotFound):
		f.end(op.ID, exitNotFound, op.ID+": was deleted")
		return nil
	case err != nil:
		return err
	case now.State.Finished():
		return f.take(now)
	case now.Owner != op.Owner:
		return nil // a change event will follow
	}
	f.dead[op.ID] = op.Owner
	f.end(op.ID, exitDead, deadText(now))
	return nil
}

// draw replaces the lines drawn last. It writes the operations that have ended since, which
// stay, and the table of those that have not.
func (f *follower) draw() error {
	if !f.live() {
		return nil
	}
	open, more := f.shown()
	table := f.table(slices.Concat(f.done, open)) // begins with a header
	ended := table[1 : 1+len(f.done)]
	stay := slices.Concat(ended, f.notes)
	var lines []string // the lines to redraw next time
	switch {
	case len(open) > 0:
		lines = append(table[:1:1], table[1+len(f.done):]...)
	case f.all:
		lines = []string{"No operation is unfinished. Ctrl-C ends."}
	}
	if more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	if len(stay) == 0 && slices.Equal(lines, f.drawn) {
		return nil
	}
	text := ""
	if len(f.drawn) > 0 {
		text = fmt.Sprintf("\r\x1b[%dA\x1b[J", len(f.drawn)) // the cursor is below the lines; after Ctrl-C it is not in the first column
	}
	for _, line := range slices.Concat(stay, lines) {
		text += line + "\n"
	}
	f.done, f.notes, f.drawn = nil, nil, lines
	_, err := io.WriteString(f.out, text)
	return err
}

// shown returns the unfinished operations, oldest first, as many as the terminal has room
// for, and how many more there are.
func (f *follower) shown() (ops []*task.Operation, more int) {
	for _, op := range f.open {
		if op.State != "" { // otherwise its state is not known yet
			ops = append(ops, op)
		}
	}
	slices.SortFunc(ops, func(a, b *task.Operation) int { return strings.Compare(a.ID, b.ID) })
	_, height := f.out.size()
	n := min(len(ops), max(height-4, 1))
	return ops[:n], len(ops) - n
}
