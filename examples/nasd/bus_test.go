package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

func TestBus(t *testing.T) {
	b := new(bus)
	b.publish(&task.Operation{ID: "no subscriber"})
	slow, quick := b.subscribe(2), b.subscribe(10)
	for _, id := range []string{"1", "2", "3", "4"} {
		b.publish(&task.Operation{ID: id}) // never blocks
	}
	want := func(name string, events <-chan event, id string, missed int) {
		t.Helper()
		if e := <-events; e.op == nil || e.op.ID != id || e.missed != missed {
			t.Errorf("%s got %+v, want %s after %d missed", name, e, id, missed)
		}
	}
	want("slow", slow, "1", 0)
	want("slow", slow, "2", 0)
	b.markLoss()
	b.publish(&task.Operation{ID: "5"})
	b.publish(&task.Operation{ID: "6"})
	b.close()
	b.publish(&task.Operation{ID: "7"})
	want("slow", slow, "5", 3)
	want("slow", slow, "6", 0)
	for _, id := range []string{"1", "2", "3", "4"} {
		want("quick", quick, id, 0)
	}
	want("quick", quick, "5", 1)
	want("quick", quick, "6", 0)
	for name, events := range map[string]<-chan event{"slow": slow, "quick": quick, "late": b.subscribe(1)} {
		if e, ok := <-events; ok {
			t.Errorf("%s got %+v after close", name, e)
		}
	}
}

// TestFeed checks that the bus gets the events of operations and is closed with the
// manager.
func TestFeed(t *testing.T) {
	s := newStorage(t, "tank")
	running, end := make(chan struct{}), make(chan struct{})
	op, err := s.submit(about{Kind: "work", Pool: "tank"}, func(context.Context, func(int)) (any, error) {
		close(running)
		<-end
		return nil, errors.New("broken")
	})
	must(t, err)
	<-running
	b := new(bus)
	events := b.subscribe(100)
	go feed(b, s.tasks.Watch(context.Background()))
	if e := <-events; e.op.ID != op.ID || e.op.State != task.StateRunning {
		t.Errorf("first event %+v, want the present state", e.op)
	}
	close(end)
	if e := <-events; e.op.ID != op.ID || e.op.State != task.StateFailed || e.op.Error != "broken" {
		t.Errorf("second event %+v, want the final state", e.op)
	}
	must(t, s.tasks.Close())
	if e, ok := <-events; ok {
		t.Errorf("event %+v after the final state", e.op)
	}
}

func TestLastResults(t *testing.T) {
	s := newStorage(t, "tank", "backup")
	do := func(start func() (*task.Operation, error)) *task.Operation {
		op, err := start()
		if err == nil {
			op, err = s.tasks.Wait(t.Context(), op.ID)
		}
		if err != nil {
			t.Error(err)
		}
		return op
	}
	scrub := func() (*task.Operation, error) { return s.scrub("tank") }
	do(scrub)
	second := do(scrub)
	l := newLastResults(s.tasks)
	check := func(when string, want ...*task.Operation) {
		t.Helper()
		got := l.of("tank")
		if len(got) != len(want) || len(l.of("backup")) != 0 {
			t.Errorf("%s: got %v, want %v", when, got, want)
		}
		for _, op := range want {
			var a about
			must(t, op.DecodeMetadata(&a))
			if got[a.Kind] == nil || got[a.Kind].ID != op.ID {
				t.Errorf("%s: the last %s is %+v, want %s", when, a.Kind, got[a.Kind], op.ID)
			}
		}
	}
	check("from the history", second)

	third := do(func() (*task.Operation, error) { return s.replicate("tank", "backup") })
	events := make(chan event, 10)
	events <- event{op: third}
	late := *second
	late.ID, late.UpdatedAt = "earlier", second.UpdatedAt.Add(-time.Second)
	events <- event{op: &late}
	running := *second
	running.ID, running.State = "running", task.StateRunning
	events <- event{op: &running}
	events <- event{op: &task.Operation{ID: "not ours", State: task.StateDone}}
	close(events)
	l.follow(events)
	check("from events", second, third)

	var fourth *task.Operation
	events = make(chan event)
	go func() {
		defer close(events)
		events <- event{op: third}
		fourth = do(scrub)
		events <- event{op: third, missed: 1}
	}()
	l.follow(events)
	check("after a loss", fourth, third)
}

// TestLastResultsFarBack checks that the last operation of a kind is found even if many
// operations of other kinds followed.
func TestLastResultsFarBack(t *testing.T) {
	s := newStorage(t, "tank")
	op, err := s.scrub("tank")
	must(t, err)
	_, err = s.tasks.Wait(t.Context(), op.ID)
	must(t, err)
	var last *task.Operation
	for range 2500 {
		last, err = s.submit(about{Kind: "snapshot", Pool: "tank"}, func(context.Context, func(int)) (any, error) { return nil, nil })
		must(t, err)
		_, err = s.tasks.Wait(t.Context(), last.ID)
		must(t, err)
	}
	got := newLastResults(s.tasks).of("tank")
	if len(got) != 2 || got["scrub"].ID != op.ID || got["snapshot"].ID != last.ID {
		t.Errorf("got %+v", got)
	}
}

func TestTook(t *testing.T) {
	op := &task.Operation{CreatedAt: longAgo, UpdatedAt: longAgo.Add(time.Hour)}
	if got := took(op); got != 0 {
		t.Errorf("never started: took %v", got)
	}
	op.StartedAt = longAgo.Add(59 * time.Minute)
	if got := took(op); got != time.Minute {
		t.Errorf("took %v, want a minute", got)
	}
}

// TestFeedLagged checks that feed continues after ErrLagged and reports that events were
// lost.
func TestFeedLagged(t *testing.T) {
	b := new(bus)
	events := b.subscribe(1)
	watched := 0
	feed(b, func(yield func(*task.Operation, error) bool) {
		if watched++; watched == 1 {
			yield(nil, task.ErrLagged)
		} else if yield(&task.Operation{ID: "1"}, nil) {
			yield(nil, task.ErrClosed)
		}
	})
	if e := <-events; e.op.ID != "1" || e.missed == 0 {
		t.Errorf("got %+v, want missed events", e)
	}
}
