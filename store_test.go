package task_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/mynt-nas/task"
)

// TestMemoryStoreForgets: of the finished the last 10,000 are kept, and all
// that are not finished.
func TestMemoryStoreForgets(t *testing.T) {
	const n, kept, live = 25_000, 10_000, 5
	store := task.NewMemoryStore()
	id := func(i int) string { return fmt.Sprint("id", i) }
	for i := range n + live {
		if err := store.Save(&task.Operation{ID: id(i), State: task.StateRunning}); err != nil {
			t.Fatal(err)
		}
		if i >= live { // the first ones run all the time
			if err := store.Update(&task.Operation{ID: id(i), State: task.StateDone}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := store.Save(&task.Operation{ID: id(0)}); err == nil {
		t.Error("Save of an ID that is there succeeded")
	}
	if err := store.Save(&task.Operation{ID: "x", Result: make(chan int)}); err == nil {
		t.Error("Save of what JSON can't hold succeeded")
	}
	all, err := store.List(n, 0)
	if err != nil || len(all) != kept+live {
		t.Fatalf("%d operations, %v, want %d", len(all), err, kept+live)
	}
	for i, op := range all {
		want := id(n + live - 1 - i)
		if i >= kept {
			want = id(kept + live - 1 - i)
		}
		if op.ID != want {
			t.Fatalf("number %d is %s, want %s", i, op.ID, want)
		}
	}
	page, err := store.List(10, kept)
	if err != nil || len(page) != live || page[0].ID != id(live-1) {
		t.Errorf("last page: %v, %v", page, err)
	}
	for i, want := range map[int]error{0: nil, live: task.ErrNotFound, n + live - 1: nil} {
		if _, err := store.Get(id(i)); !errors.Is(err, want) {
			t.Errorf("Get(%s): %v, want %v", id(i), err, want)
		}
	}
	if err := store.Update(&task.Operation{ID: id(live)}); !errors.Is(err, task.ErrNotFound) {
		t.Errorf("Update of a forgotten one: %v", err)
	}
}

// A brokenStore can't be read.
type brokenStore struct {
	*task.MemoryStore
	broken bool
}

func (s *brokenStore) Get(id string) (*task.Operation, error) {
	if s.broken {
		return nil, errDisk
	}
	return s.MemoryStore.Get(id)
}

func (s *brokenStore) List(limit, offset int) ([]*task.Operation, error) {
	if s.broken {
		return nil, errDisk
	}
	return s.MemoryStore.List(limit, offset)
}

// TestReadsFail: errors of the store come back, or are logged by Get, which
// can't return them.
func TestReadsFail(t *testing.T) {
	var log bytes.Buffer
	store := &brokenStore{MemoryStore: task.NewMemoryStore()}
	m, err := task.New(store, task.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	op := submit(t, m, func(context.Context, func(int)) (any, error) { return nil, nil })
	wait(t, m, op.ID)
	store.broken = true
	if op, ok := m.Get(op.ID); ok || op != nil {
		t.Errorf("Get: %v", op)
	}
	if !strings.Contains(log.String(), errDisk.Error()) {
		t.Errorf("logged: %s", &log)
	}
	if _, err := m.List(1, 0); !errors.Is(err, errDisk) {
		t.Errorf("List: %v", err)
	}
	if _, err := m.Wait(t.Context(), op.ID); !errors.Is(err, errDisk) {
		t.Errorf("Wait: %v", err)
	}
	if err := m.Cancel(op.ID); !errors.Is(err, errDisk) || errors.Is(err, task.ErrNotFound) {
		t.Errorf("Cancel: %v", err)
	}
}
