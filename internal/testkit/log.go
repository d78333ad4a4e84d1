package testkit

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/mynt-nas/task"
)

// A Log is a slog.Handler that keeps the records of managers.
type Log struct {
	mu      sync.Mutex // guards records
	records []slog.Record
}

// Option makes a manager log to l.
func (l *Log) Option() task.Option { return task.WithLogger(slog.New(l)) }

// Enabled implements [slog.Handler].
func (l *Log) Enabled(context.Context, slog.Level) bool { return true }

// WithAttrs implements [slog.Handler].
func (l *Log) WithAttrs([]slog.Attr) slog.Handler { return l }

// WithGroup implements [slog.Handler].
func (l *Log) WithGroup(string) slog.Handler { return l }

// Handle implements [slog.Handler].
func (l *Log) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, r)
	return nil
}

// Values returns the values of an attribute in all records with a message.
func (l *Log) Values(message, key string) (values []slog.Value) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		if r.Message != message {
			continue
		}
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == key {
				values = append(values, a.Value)
			}
			return true
		})
	}
	return values
}

// Count returns the number of records with a message.
func (l *Log) Count(message string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.records {
		if r.Message == message {
			n++
		}
	}
	return n
}

// String returns all messages with their attributes.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b strings.Builder
	for _, r := range l.records {
		b.WriteString(r.Message)
		r.Attrs(func(a slog.Attr) bool {
			fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
			return true
		})
		b.WriteByte('\n')
	}
	return b.String()
}

// Recovered returns the IDs of the operations that were logged as interrupted, sorted,
// and the total number: only the first 100 are logged individually.
func (l *Log) Recovered() (ids []string, n int) {
	for _, id := range l.Values("task: operation interrupted", "id") {
		ids = append(ids, id.String())
	}
	for _, count := range l.Values("task: recovered interrupted operations", "count") {
		n += int(count.Int64())
	}
	slices.Sort(ids)
	return ids, n
}

// WantRecovered checks which operations were logged as interrupted.
func (l *Log) WantRecovered(t testing.TB, want ...string) {
	t.Helper()
	Until(func() bool { _, n := l.Recovered(); return n >= len(want) }) // another goroutine logs it
	got, n := l.Recovered()
	slices.Sort(want)
	known := func(id string) bool { _, ok := slices.BinarySearch(want, id); return ok }
	if n != len(want) || len(got) < min(n, 100) || len(slices.Compact(slices.Clone(got))) != len(got) ||
		slices.ContainsFunc(got, func(id string) bool { return !known(id) }) {
		t.Errorf("recovered %d operations, want %d:\n got %.500q\nwant %.500q", n, len(want), got, want)
	}
}
