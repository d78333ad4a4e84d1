package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mynt-nas/task"
)

// A query holds the options of list.
type query struct {
	states   []task.State
	options  []task.ListOption
	since    moment
	finished bool
	limit    int
}

func list(t *tool, flags *flag.FlagSet) func(context.Context, []string) (int, error) {
	var q query
	add := func(name string, option func(string) task.ListOption) {
		flags.Func(name, "", func(s string) error { q.options = append(q.options, option(s)); return nil })
	}
	add("name", task.ByName)
	add("containing", task.Containing)
	flags.Func("state", "", q.setStates)
	flags.Func("metadata", "", func(s string) error {
		key, value, ok := strings.Cut(s, "=")
		if !ok || key == "" {
			return errors.New("not KEY=VALUE")
		}
		q.options = append(q.options, task.ByMetadata(key, value))
		return nil
	})
	flags.Var(&q.since, "since", "")
	flags.BoolVar(&q.finished, "finished", false, "")
	flags.IntVar(&q.limit, "limit", 50, "")
	return func(_ context.Context, ids []string) (int, error) {
		switch {
		case len(ids) > 0:
			return 0, fmt.Errorf("list takes no %q: use show for one operation: %w", ids[0], errUsage)
		case q.limit < 1:
			return 0, fmt.Errorf("-limit %d: at least 1 is needed", q.limit)
		}
		ops, err := t.query(q)
		if err != nil {
			return 0, err
		}
		return 0, t.write(ops)
	}
}

func (q *query) setStates(text string) error {
	for _, name := range strings.Split(strings.ToUpper(text), ",") {
		if !slices.Contains(states, task.State(name)) {
			return errors.New("no state: PENDING, RUNNING, DONE, FAILED and CANCELLED are")
		}
		q.states = append(q.states, task.State(name))
	}
	return nil
}

var states = []task.State{task.StatePending, task.StateRunning, task.StateDone, task.StateFailed, task.StateCancelled}

// query returns the operations that match q. With -since it combines two lists: first the
// unfinished operations, then those that finished since.
func (t *tool) query(q query) (ops []*task.Operation, err error) {
	add := func(states []task.State, options ...task.ListOption) {
		if err != nil || len(ops) == q.limit {
			return
		}
		options = slices.Concat(q.options, options, []task.ListOption{task.ByState(states...), task.WithoutResults()})
		var page []*task.Operation
		page, err = t.m.Raw().List(q.limit-len(ops), 0, options...)
		ops = append(ops, page...)
	}
	if q.since.IsZero() && !q.finished {
		add(q.states)
		return ops, err
	}
	live, finished := split(q.states)
	if len(live) > 0 && !q.finished {
		add(live)
	}
	if len(finished) > 0 {
		add(finished, task.ByFinish(), task.FinishedAfter(q.since.Time))
	}
	return ops, err
}

// split returns the unfinished and the finished states among the given ones, or among all
// states if none is given.
func split(these []task.State) (live, finished []task.State) {
	if len(these) == 0 {
		these = states
	}
	for _, s := range these {
		if s.Finished() {
			finished = append(finished, s)
		} else {
			live = append(live, s)
		}
	}
	return live, finished
}

// write writes operations in the output's format.
func (t *tool) write(ops []*task.Operation) error {
	if t.out.size != nil && !t.json {
		return t.out.lines(t.table(ops))
	}
	for _, op := range ops {
		if err := t.writeLine(op); err != nil {
			return err
		}
	}
	return nil
}

// writeLine writes an operation as one line.
func (t *tool) writeLine(op *task.Operation) error {
	if t.json {
		return t.writeJSON(op)
	}
	started := ""
	if !op.StartedAt.IsZero() {
		started = op.StartedAt.Local().Format(time.RFC3339)
	}
	cells := []string{op.ID, state(op), fmt.Sprint(op.Progress), op.Name, started, took(op), op.Message, op.Error}
	for i, cell := range cells {
		cells[i] = escape(cell)
	}
	return t.out.lines([]string{strings.Join(cells, "\t")})
}

// writeJSON writes a value as one line, without characters that a terminal might interpret.
func (t *tool) writeJSON(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	return t.out.lines([]string{escapeJSON(strings.TrimSuffix(b.String(), "\n"))})
}

// state returns the state to show for an operation.
func state(op *task.Operation) string {
	if op.Cancelling {
		return "CANCELLING"
	}
	return string(op.State)
}

// took returns how long an operation has been running, or "" if unknown.
func took(op *task.Operation) string {
	end := op.UpdatedAt
	switch {
	case op.StartedAt.IsZero() || op.Interrupted():
		return ""
	case !op.State.Finished():
		end = time.Now()
	}
	d := max(end.Sub(op.StartedAt), 0)
	if d < time.Minute {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

func show(t *tool, _ *flag.FlagSet) func(context.Context, []string) (int, error) {
	return func(_ context.Context, ids []string) (int, error) {
		if len(ids) != 1 {
			return 0, fmt.Errorf("show takes one ID: %w", errUsage)
		}
		op, err := t.find(ids[0])
		if err != nil {
			return exitOf(err), err
		}
		if !t.json {
			return 0, t.out.lines(t.details(op))
		}
		if dead, unknown := t.process(op); dead && !op.State.Finished() {
			t.warn(deadText(op))
		} else if unknown != nil && !op.State.Finished() {
			t.warn(unknown.Error())
		}
		return 0, t.writeJSON(op)
	}
}

// details returns everything about an operation, as lines.
func (t *tool) details(op *task.Operation) (lines []string) {
	add := func(name, text string) {
		for i, line := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
			if i > 0 {
				name = ""
			} else if line == "" {
				return
			}
			lines = append(lines, fmt.Sprintf("%-9s  %s", name, escape(line)))
		}
	}
	when := func(name string, at time.Time) {
		if !at.IsZero() {
			add(name, at.Local().Format("2006-01-02 15:04:05.000 -0700"))
		}
	}
	add("ID", op.ID)
	add("Name", op.Name)
	add("State", state(op))
	add("Progress", fmt.Sprintf("%d%%", op.Progress))
	add("Message", op.Message)
	add("Error", op.Error)
	when("Created", op.CreatedAt)
	when("Started", op.StartedAt)
	if op.State.Finished() {
		when("Finished", op.UpdatedAt)
	} else {
		when("Updated", op.UpdatedAt)
	}
	add("Took", took(op))
	add("Owner", op.Owner)
	if !op.State.Finished() {
		add("Process", t.processText(op))
	}
	add("Metadata", indented(op.Metadata))
	add("Result", indented(op.Result))
	return lines
}

// processText describes the result of process in words.
func (t *tool) processText(op *task.Operation) string {
	dead, unknown := t.process(op)
	switch {
	case unknown != nil:
		return strings.TrimPrefix(unknown.Error(), op.ID+": ")
	case dead:
		return "dead: the operation becomes FAILED, or is resumed, when its program starts again"
	}
	return "alive"
}

func indented(v any) string {
	raw, ok := v.(json.RawMessage)
	if !ok {
		return ""
	}
	var b bytes.Buffer
	if json.Indent(&b, raw, "", "  ") != nil {
		return string(raw)
	}
	return b.String()
}

func prune(t *tool, flags *flag.FlagSet) func(context.Context, []string) (int, error) {
	var before moment
	flags.Var(&before, "before", "")
	return func(_ context.Context, ids []string) (int, error) {
		switch {
		case len(ids) > 0:
			return 0, fmt.Errorf("prune takes no %q: %w", ids[0], errUsage)
		case before.IsZero():
			return 0, fmt.Errorf("no -before AGE|TIME: %w", errUsage)
		}
		n, err := t.m.Prune(before.Time)
		if t.json {
			return 0, cmp.Or(err, t.writeJSON(map[string]int{"pruned": n}))
		}
		return 0, cmp.Or(err, t.out.lines([]string{fmt.Sprintf("pruned %d operations", n)}))
	}
}
