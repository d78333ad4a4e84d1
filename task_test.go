package task

import (
	"cmp"
	"encoding/json"
	"reflect"
	"testing"
	"time"
)

// UpdateProgress is updateProgress for external tests.
func UpdateProgress(m *Manager, id string, progress int) error {
	return m.updateProgress(id, progress)
}

// Subscribers returns the number of active calls of Watch.
func Subscribers(m *Manager) int { return m.events.Readers() }

func TestStateFinished(t *testing.T) {
	for state, want := range map[State]bool{
		StatePending:   false,
		StateRunning:   false,
		StateDone:      true,
		StateFailed:    true,
		StateCancelled: true,
		"":             false,
		"done":         false,
	} {
		if got := state.Finished(); got != want {
			t.Errorf("State(%q).Finished() = %v, want %v", state, got, want)
		}
	}
}

// TestClock checks the finish time of an operation that was submitted a minute ago by
// the monotonic clock, whatever the wall clock has shown since.
func TestClock(t *testing.T) {
	const passed = time.Minute
	now := wall()
	for _, tt := range []struct {
		name             string
		created, updated time.Time
		want             time.Time
		base             time.Time // if not created
	}{
		{"steady", now.Add(-passed), now.Add(-passed), now, time.Time{}},
		{"started in 1970, then set right", time.Unix(100, 0).UTC(), time.Unix(100, 0).UTC(), now, time.Time{}},
		{"set back by an hour", now.Add(time.Hour - passed), now.Add(time.Hour - passed), now.Add(time.Hour), time.Time{}},
		{"set back after the start", now.Add(-passed), now.Add(time.Hour), now.Add(time.Hour), time.Time{}},
		{"asleep for hours", now.Add(-5 * time.Hour), now.Add(-5 * time.Hour), now, time.Time{}},
		{"resumed, then set back", now.Add(-5 * time.Hour), now.Add(time.Hour - passed), now.Add(time.Hour), now.Add(time.Hour - passed)},
	} {
		op := &Operation{CreatedAt: tt.created, UpdatedAt: tt.updated, State: StateRunning}
		task := &task{created: time.Now().Add(-passed), base: cmp.Or(tt.base, tt.created), life: life{op: op}}
		if !task.finish(outcome{state: StateDone}) {
			t.Fatal("finished already")
		}
		got := task.final.UpdatedAt
		if d := got.Sub(tt.want); d < -time.Millisecond || d > time.Second {
			t.Errorf("%s: finished at %v, want %v", tt.name, got, tt.want)
		}
		if got.Before(tt.created) || got.Before(tt.updated) || got.Before(now) {
			t.Errorf("%s: finished at %v, before it was created, updated, or now", tt.name, got)
		}
	}
}

// TestRetentionAfterClockSetRight: an operation that has just finished is not old, even
// if it was submitted while the clock showed 1970.
func TestRetentionAfterClockSetRight(t *testing.T) {
	store := NewMemoryStore()
	op := &Operation{ID: "x", Name: "x", State: StatePending, CreatedAt: time.Unix(100, 0).UTC(), UpdatedAt: time.Unix(100, 0).UTC()}
	if err := store.Save(op); err != nil {
		t.Fatal(err)
	}
	task := &task{created: time.Now(), life: life{op: op}}
	task.finish(outcome{state: StateDone})
	if err := store.Update(task.final); err != nil {
		t.Fatal(err)
	}
	for n, err := range store.Prune(time.Now().Add(-time.Hour)) {
		if n != 0 || err != nil {
			t.Errorf("Prune took %d, %v", n, err)
		}
	}
}

// TestReport checks which reports must be taken over, and that reports after the
// function has returned are ignored.
func TestReport(t *testing.T) {
	op := &Operation{State: StateRunning}
	task := &task{life: life{op: op}}
	for i, tt := range []struct {
		progress int
		first    bool
		shown    int // after takeOver, if not negative
	}{
		{0, false, -1}, // unchanged
		{-5, false, -1},
		{10, true, -1},
		{20, false, -1},
		{20, false, 20},
		{20, false, 20},
		{300, true, 100},
		{0, true, 0},
	} {
		if first := task.report(tt.progress); first != tt.first {
			t.Errorf("%d: report(%d) = %v, want %v", i, tt.progress, first, tt.first)
		}
		if tt.shown < 0 {
			continue
		}
		if task.takeOver(); task.op.Progress != tt.shown {
			t.Errorf("%d: progress %d, want %d", i, task.op.Progress, tt.shown)
		}
	}
	if op.Progress != 0 {
		t.Error("takeOver has changed an operation that others hold")
	}
	task.report(30)
	task.finish(outcome{state: StateFailed})
	if task.report(40) || task.final.Progress != 30 {
		t.Errorf("finished at %d %%, and a late report counts", task.final.Progress)
	}
}

// A stored value is decoded if it is exactly one JSON value.
func TestDecode(t *testing.T) {
	for raw, want := range map[string]any{
		``: nil, ` `: nil, `null`: nil, `{`: nil, `[1`: nil,
		`"a"`: "a", ` ["a"] `: []any{"a"}, `"a" "b"`: nil, `["a"]]`: nil,
		`1`: json.Number("1"), " [1]\r\n\t ": []any{json.Number("1")}, `1 2`: nil, `[1]]`: nil, "[1]\u00a0": nil, "[1]\x00": nil,
	} {
		if got := decode(json.RawMessage(raw)); !reflect.DeepEqual(got, want) {
			t.Errorf("decode(%q) = %#v, want %#v", raw, got, want)
		}
	}
}
