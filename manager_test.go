package task_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// quiet keeps a test's output free of what the manager logs.
var quiet = task.WithLogger(slog.New(slog.DiscardHandler))

// bare hides all abilities of a store but those of Persistence.
type bare struct{ task.Persistence }

// stores are the kinds of store that every behaviour must be the same with.
var stores = map[string]func(t testing.TB) task.Persistence{
	"memory": func(testing.TB) task.Persistence { return task.NewMemoryStore() },
	"bare":   func(testing.TB) task.Persistence { return bare{task.NewMemoryStore()} },
	"sqlite": func(t testing.TB) task.Persistence { return openSQLite(t, filepath.Join(t.TempDir(), "tasks.db")) },
}

func openSQLite(t testing.TB, path string) *task.SQLiteStore {
	t.Helper()
	testos.CheckLeaks(t)
	store, err := task.OpenSQLite(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func newManager(t testing.TB, db task.Persistence, opts ...task.Option) *task.Manager {
	t.Helper()
	testos.CheckLeaks(t)
	m, err := task.New(db, append(opts, quiet)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// eachStore runs a test with a manager on each kind of store.
func eachStore(t *testing.T, test func(t *testing.T, m *task.Manager, db task.Persistence)) {
	for name, open := range stores {
		t.Run(name, func(t *testing.T) {
			db := open(t)
			test(t, newManager(t, db), db)
		})
	}
}

func submit(t testing.TB, m *task.Manager, fn task.Func, opts ...task.SubmitOption) *task.Operation {
	t.Helper()
	op, err := m.Submit("test", fn, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return op
}

func wait(t testing.TB, m *task.Manager, id string) *task.Operation {
	t.Helper()
	op, err := m.Wait(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return op
}

// blocker returns a Func that returns ret once it is released, and a channel
// that is closed when it has started.
func blocker(ret error) (fn task.Func, started chan struct{}, release func()) {
	started = make(chan struct{})
	released := make(chan struct{})
	fn = func(context.Context, func(int)) (any, error) {
		close(started)
		<-released
		return nil, ret
	}
	return fn, started, sync.OnceFunc(func() { close(released) })
}

// untilCancelled is a Func that returns the cause of its cancellation.
func untilCancelled(ctx context.Context, _ func(int)) (any, error) {
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func cancelSelf(ctx context.Context) {
	op, _ := task.FromContext(ctx)
	op.Cancel()
	<-ctx.Done()
}

type (
	panicJSON  struct{}
	goexitJSON struct{}
	panicError struct{}
)

func (panicJSON) MarshalJSON() ([]byte, error)  { panic("no JSON today") }
func (goexitJSON) MarshalJSON() ([]byte, error) { runtime.Goexit(); return nil, nil }
func (panicError) Error() string                { panic("no text today") }

func deep(n int) any {
	var v any = "bottom"
	for range n {
		v = []any{v}
	}
	return v
}

// TestOutcome shows how each way in which a function can end is told: by Wait
// at once, by Get and List afterwards, and after a restart.
func TestOutcome(t *testing.T) {
	type J = map[string]any
	boom := errors.New("boom")
	cyclic := J{}
	cyclic["self"] = cyclic

	tests := map[string]struct {
		fn       task.Func
		state    task.State
		progress int
		result   any
		err      string // a prefix of it if it ends in "…"
	}{
		"nothing": {func(context.Context, func(int)) (any, error) { return nil, nil }, task.StateDone, 100, nil, ""},
		"value": {func(context.Context, func(int)) (any, error) {
			return J{"big": int64(math.MaxInt64), "f": 0.5, "list": []int{1}, "html": "<&>", "nul": "\x00"}, nil
		}, task.StateDone, 100, J{"big": json.Number("9223372036854775807"), "f": json.Number("0.5"),
			"list": []any{json.Number("1")}, "html": "<&>", "nul": "\x00"}, ""},
		"struct": {func(context.Context, func(int)) (any, error) {
			return struct {
				A int `json:"a"`
			}{1}, nil
		}, task.StateDone, 100, J{"a": json.Number("1")}, ""},
		"nil pointer":     {func(context.Context, func(int)) (any, error) { return (*int)(nil), nil }, task.StateDone, 100, nil, ""},
		"zero value":      {func(context.Context, func(int)) (any, error) { return 0, nil }, task.StateDone, 100, json.Number("0"), ""},
		"empty string":    {func(context.Context, func(int)) (any, error) { return "", nil }, task.StateDone, 100, "", ""},
		"raw JSON":        {func(context.Context, func(int)) (any, error) { return json.RawMessage(` {"a" : 1}`), nil }, task.StateDone, 100, J{"a": json.Number("1")}, ""},
		"error":           {func(context.Context, func(int)) (any, error) { return nil, boom }, task.StateFailed, 0, nil, "boom"},
		"empty error":     {func(context.Context, func(int)) (any, error) { return nil, errors.New("") }, task.StateFailed, 0, nil, ""},
		"value and error": {func(context.Context, func(int)) (any, error) { return "half", boom }, task.StateFailed, 0, "half", "boom"},
		"error not UTF-8": {func(context.Context, func(int)) (any, error) { return nil, errors.New("a\xffb") }, task.StateFailed, 0, nil, "a\uFFFDb"},

		"panic":           {func(context.Context, func(int)) (any, error) { panic("oh") }, task.StateFailed, 0, nil, "panic: oh"},
		"panic nil":       {func(context.Context, func(int)) (any, error) { panic(nil) }, task.StateFailed, 0, nil, "panic: …"},
		"panic error":     {func(context.Context, func(int)) (any, error) { panic(boom) }, task.StateFailed, 0, nil, "panic: boom"},
		"panic in error":  {func(context.Context, func(int)) (any, error) { return 1, panicError{} }, task.StateFailed, 0, nil, "panic: no text today"},
		"panic panicking": {func(context.Context, func(int)) (any, error) { panic(panicError{}) }, task.StateFailed, 0, nil, "panic: …"},
		"Goexit":          {func(context.Context, func(int)) (any, error) { runtime.Goexit(); return nil, nil }, task.StateFailed, 0, nil, "the function called runtime.Goexit"},

		"channel":         {func(context.Context, func(int)) (any, error) { return make(chan int), nil }, task.StateDone, 100, nil, "result not kept: json: unsupported type: chan int"},
		"NaN":             {func(context.Context, func(int)) (any, error) { return math.NaN(), nil }, task.StateDone, 100, nil, "result not kept: …"},
		"cycle":           {func(context.Context, func(int)) (any, error) { return cyclic, nil }, task.StateDone, 100, nil, "result not kept: …"},
		"too deep":        {func(context.Context, func(int)) (any, error) { return deep(20_000), nil }, task.StateDone, 100, nil, "result not kept: …"},
		"JSON panics":     {func(context.Context, func(int)) (any, error) { return panicJSON{}, nil }, task.StateDone, 100, nil, "result not kept: …"},
		"JSON Goexit":     {func(context.Context, func(int)) (any, error) { return goexitJSON{}, nil }, task.StateDone, 100, nil, "result not kept: …"},
		"error, channel":  {func(context.Context, func(int)) (any, error) { return make(chan int), boom }, task.StateFailed, 0, nil, "boom (result not kept: json: unsupported type: chan int)"},
		"not JSON at all": {func(context.Context, func(int)) (any, error) { return json.RawMessage("{"), nil }, task.StateDone, 100, nil, "result not kept: …"},

		"cancelled, nil":   {func(ctx context.Context, _ func(int)) (any, error) { cancelSelf(ctx); return "made it", nil }, task.StateDone, 100, "made it", ""},
		"cancelled, cause": {func(ctx context.Context, _ func(int)) (any, error) { cancelSelf(ctx); return nil, context.Cause(ctx) }, task.StateCancelled, 0, nil, "operation cancelled"},
		"cancelled, error": {func(ctx context.Context, _ func(int)) (any, error) {
			cancelSelf(ctx)
			return "part", errors.New("signal: killed")
		}, task.StateCancelled, 0, "part", "signal: killed"},
		"cancelled, panic": {func(ctx context.Context, _ func(int)) (any, error) { cancelSelf(ctx); panic("oh") }, task.StateFailed, 0, nil, "panic: oh"},

		"progress":        {func(_ context.Context, u func(int)) (any, error) { u(42); return nil, boom }, task.StateFailed, 42, nil, "boom"},
		"progress down":   {func(_ context.Context, u func(int)) (any, error) { u(42); u(7); return nil, boom }, task.StateFailed, 7, nil, "boom"},
		"progress low":    {func(_ context.Context, u func(int)) (any, error) { u(42); u(-1); return nil, boom }, task.StateFailed, 0, nil, "boom"},
		"progress high":   {func(_ context.Context, u func(int)) (any, error) { u(math.MaxInt); return nil, boom }, task.StateFailed, 100, nil, "boom"},
		"progress, done":  {func(_ context.Context, u func(int)) (any, error) { u(42); return nil, nil }, task.StateDone, 100, nil, ""},
		"progress, late":  {func(_ context.Context, u func(int)) (any, error) { u(42); defer u(43); return nil, boom }, task.StateFailed, 43, nil, "boom"},
		"progress, panic": {func(_ context.Context, u func(int)) (any, error) { u(42); panic("oh") }, task.StateFailed, 42, nil, "panic: oh"},
	}
	check := func(t *testing.T, how, name string, op *task.Operation) {
		t.Helper()
		want := tests[name]
		if op.Name != name || op.State != want.state || op.Progress != want.progress || !reflect.DeepEqual(op.Result, want.result) {
			t.Errorf("%s: got %s %s %d%% %#v, want %s %s %d%% %#v", how,
				op.Name, op.State, op.Progress, op.Result, name, want.state, want.progress, want.result)
		}
		if prefix, ok := strings.CutSuffix(want.err, "…"); ok && !strings.HasPrefix(op.Error, prefix) || !ok && op.Error != want.err {
			t.Errorf("%s: %s: got error %q, want %q", how, name, op.Error, want.err)
		}
		if op.UpdatedAt.Before(op.StartedAt) || op.StartedAt.Before(op.CreatedAt) {
			t.Errorf("%s: %s: created %v, started %v, finished %v", how, name, op.CreatedAt, op.StartedAt, op.UpdatedAt)
		}
		if _, err := json.Marshal(op); err != nil {
			t.Errorf("%s: %s: %v", how, name, err)
		}
	}
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		finished := make(map[string]*task.Operation)
		for name, test := range tests {
			op, err := m.Submit(name, test.fn)
			if err != nil {
				t.Fatal(err)
			}
			finished[name] = wait(t, m, op.ID)
			check(t, "Wait", name, finished[name])
		}
		history := func(how string, m *task.Manager) {
			for name, op := range finished {
				got, ok := m.Get(op.ID)
				if !ok {
					t.Fatalf("%s: %s is gone", how, name)
				}
				check(t, how, name, got)
				if !got.UpdatedAt.Equal(op.UpdatedAt) || !got.StartedAt.Equal(op.StartedAt) || !got.CreatedAt.Equal(op.CreatedAt) {
					t.Errorf("%s: %s: times differ: %v, want %v", how, name, got, op)
				}
			}
			ops, err := m.List(len(tests)+1, 0)
			if err != nil || len(ops) != len(tests) {
				t.Fatalf("%s: List: %d operations, %v", how, len(ops), err)
			}
			for _, op := range ops {
				check(t, how+", List", op.Name, op)
			}
		}
		history("after eviction", m)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		history("after Close", m)
		history("after a restart", newManager(t, db))
	})
}

func TestSubmitRefuses(t *testing.T) {
	nothing := func(context.Context, func(int)) (any, error) { return nil, nil }
	tests := map[string]struct {
		name string
		fn   task.Func
		opt  task.SubmitOption
		want string
	}{
		"empty name":        {"", nothing, nil, "name is empty"},
		"nil function":      {"x", nil, nil, "function is nil"},
		"metadata channel":  {"x", nothing, task.WithMetadata(make(chan int)), "metadata: json: unsupported type"},
		"metadata panics":   {"x", nothing, task.WithMetadata(panicJSON{}), "no JSON today"},
		"metadata infinite": {"x", nothing, task.WithMetadata(math.Inf(1)), "metadata"},
	}
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				op, err := m.Submit(test.name, test.fn, test.opt)
				if err == nil || op != nil || !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), "task: submit") {
					t.Errorf("got %v, %v, want an error with %q", op, err, test.want)
				}
			})
		}
		if ops, err := db.List(10, 0); len(ops) != 0 || err != nil {
			t.Errorf("stored: %v, %v", ops, err)
		}
	})
}

func TestNames(t *testing.T) {
	nothing := func(context.Context, func(int)) (any, error) { return nil, nil }
	names := map[string]string{
		"plain":                      "plain",
		" ":                          " ",
		"a\x00b":                     "a\x00b",
		"\xff\xfe":                   "\uFFFD",
		"a\xffb":                     "a\uFFFDb",
		"'; DROP TABLE tasks; --":    "'; DROP TABLE tasks; --",
		"日本語 🎉\n\t":                  "日本語 🎉\n\t",
		strings.Repeat("long ", 1e5): strings.Repeat("long ", 1e5),
	}
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		for name, want := range names {
			op, err := m.Submit(name, nothing, task.WithMetadata(name))
			if err != nil {
				t.Fatal(err)
			}
			wait(t, m, op.ID)
			got, _ := m.Get(op.ID)
			if got.Name != want || !utf8.ValidString(got.Metadata.(string)) {
				t.Errorf("%.20q: got %.20q, metadata %.20q", name, got.Name, got.Metadata)
			}
		}
	})
}

func TestMetadata(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		steps := make(chan func(ctx context.Context))
		op := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
			for step := range steps {
				step(ctx)
				steps <- nil
			}
			return nil, nil
		}, task.WithMetadata(map[string]any{"pool": "tank", "disks": 3}))
		do := func(step func(ctx context.Context)) { steps <- step; <-steps }

		var meta struct {
			Pool  string
			Disks int
		}
		if err := op.DecodeMetadata(&meta); err != nil || meta.Pool != "tank" || meta.Disks != 3 {
			t.Errorf("metadata %+v, %v", meta, err)
		}
		var inside context.Context
		do(func(ctx context.Context) {
			inside = ctx
			if op, ok := task.FromContext(ctx); !ok || op.Name != "test" || op.State != task.StateRunning || op.StartedAt.IsZero() {
				t.Errorf("FromContext: %+v, %v", op, ok)
			}
			for _, bad := range []any{make(chan int), panicJSON{}} {
				if err := task.SetMetadata(ctx, bad); err == nil {
					t.Errorf("SetMetadata(%T) returned no error", bad)
				}
			}
			if err := task.SetMetadata(ctx, []string{"new"}); err != nil {
				t.Error(err)
			}
		})
		if got, _ := m.Get(op.ID); !reflect.DeepEqual(got.Metadata, []any{"new"}) {
			t.Errorf("live metadata: %v", got.Metadata)
		}
		close(steps)
		wait(t, m, op.ID)
		if got, _ := m.Get(op.ID); !reflect.DeepEqual(got.Metadata, []any{"new"}) {
			t.Errorf("stored metadata: %v", got.Metadata)
		}
		if err := task.SetMetadata(inside, 1); err == nil {
			t.Error("SetMetadata after the return of the function: no error")
		}
		if op, ok := task.FromContext(inside); !ok || op.State != task.StateDone {
			t.Errorf("FromContext after the finish: %v, %v", op, ok)
		}
	})
	if err := task.SetMetadata(t.Context(), 1); err == nil {
		t.Error("SetMetadata outside a function: no error")
	}
	if op, ok := task.FromContext(t.Context()); ok || op != nil {
		t.Error("FromContext outside a function found something")
	}
}

func TestDecode(t *testing.T) {
	op := &task.Operation{Result: map[string]any{"n": json.Number("12345678901234567890")}}
	var typed struct{ N uint64 }
	if err := op.DecodeResult(&typed); err != nil || typed.N != 12345678901234567890 {
		t.Errorf("got %v, %v", typed, err)
	}
	if err := op.DecodeResult(typed); err == nil {
		t.Error("decoding into a non-pointer: no error")
	}
	if err := op.DecodeResult(new(int)); err == nil {
		t.Error("decoding an object into an int: no error")
	}
	p := new(int)
	if err := op.DecodeMetadata(&p); err != nil || p != nil {
		t.Errorf("missing metadata: %v, %v", p, err)
	}
}

func TestLive(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		reported := make(chan struct{})
		release := make(chan struct{})
		op := submit(t, m, func(_ context.Context, update func(int)) (any, error) {
			update(30)
			close(reported)
			<-release
			return nil, nil
		})
		<-reported
		got, ok := m.Get(op.ID)
		if !ok || got.State != task.StateRunning || got.Progress != 30 {
			t.Errorf("Get: %+v", got)
		}
		ops, err := m.List(1, 0)
		if err != nil || len(ops) != 1 || ops[0].State != task.StateRunning || ops[0].Progress != 30 {
			t.Errorf("List: %+v, %v", ops, err)
		}
		got.State, got.Progress = "MINE", 99 // a snapshot is its holder's
		if again, _ := m.Get(op.ID); again.State != task.StateRunning || again.Progress != 30 {
			t.Errorf("Get: %+v", again)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := m.Wait(ctx, op.ID); err != context.Canceled || got.State != task.StateRunning || got.Progress != 30 {
			t.Errorf("Wait: %+v, %v", got, err)
		}
		close(release)
		wait(t, m, op.ID)
		if got, err := m.Wait(ctx, op.ID); err != nil || got.State != task.StateDone {
			t.Errorf("Wait for a finished one with a context that is done: %+v, %v", got, err)
		}
	})
}

// TestSnapshotsShareNothing changes what callers hold.
func TestSnapshotsShareNothing(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		given := map[string]any{"k": "v"}
		fn, _, release := blocker(nil)
		op := submit(t, m, fn, task.WithMetadata(given))
		given["k"] = "changed"
		for range 2 {
			for range 2 {
				got, _ := m.Get(op.ID)
				if v := got.Metadata.(map[string]any)["k"]; v != "v" {
					t.Errorf("metadata %v", v)
				}
				got.Metadata.(map[string]any)["k"] = "changed"
			}
			release()
			wait(t, m, op.ID)
		}
	})
}

func TestCancel(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		t.Run("running", func(t *testing.T) {
			op := submit(t, m, untilCancelled)
			for range 3 { // more than once is fine while it is live
				if err := op.Cancel(); err != nil && !errors.Is(err, task.ErrNotFound) {
					t.Fatal(err)
				}
			}
			if op := wait(t, m, op.ID); op.State != task.StateCancelled {
				t.Errorf("%+v", op)
			}
		})
		t.Run("finished", func(t *testing.T) {
			op := submit(t, m, func(context.Context, func(int)) (any, error) { return nil, nil })
			wait(t, m, op.ID)
			if err := m.Cancel(op.ID); !errors.Is(err, task.ErrNotFound) {
				t.Error(err)
			}
		})
		t.Run("unknown", func(t *testing.T) {
			for _, id := range []string{"", "no such", "\x00", strings.Repeat("x", 1e6)} {
				if err := m.Cancel(id); !errors.Is(err, task.ErrNotFound) || errors.Is(err, errors.ErrUnsupported) {
					t.Error(err)
				}
				if op, ok := m.Get(id); ok || op != nil {
					t.Errorf("Get: %v", op)
				}
				if _, err := m.Wait(t.Context(), id); !errors.Is(err, task.ErrNotFound) {
					t.Error(err)
				}
			}
		})
	})
	for _, op := range []*task.Operation{nil, {}, {ID: "x"}} {
		if err := op.Cancel(); err == nil {
			t.Errorf("Cancel of %v: no error", op)
		}
	}
}

func TestList(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		const n = 25
		for i := range n {
			fn := func(context.Context, func(int)) (any, error) { return i, nil }
			if i%5 == 0 {
				fn = untilCancelled // live ones in between
			}
			op, err := m.Submit(fmt.Sprint(i), fn)
			if err != nil {
				t.Fatal(err)
			}
			if i%5 != 0 {
				wait(t, m, op.ID)
			}
		}
		for _, page := range []struct{ limit, offset, first, len int }{
			{0, 0, 0, 0}, {1, 0, 24, 1}, {10, 0, 24, 10}, {10, 10, 14, 10}, {10, 20, 4, 5}, {10, 25, 0, 0},
			{1000, 0, 24, 25}, {math.MaxInt, 0, 24, 25}, {10, math.MaxInt, 0, 0},
		} {
			ops, err := m.List(page.limit, page.offset)
			if err != nil || len(ops) != page.len || ops == nil {
				t.Errorf("List(%d, %d): %d operations (%v), want %d", page.limit, page.offset, len(ops), err, page.len)
			}
			for i, op := range ops {
				if op.Name != fmt.Sprint(page.first-i) {
					t.Errorf("List(%d, %d)[%d] is %s, want %d", page.limit, page.offset, i, op.Name, page.first-i)
				}
			}
		}
		for _, bad := range [][2]int{{-1, 0}, {0, -1}, {math.MinInt, math.MinInt}} {
			if ops, err := m.List(bad[0], bad[1]); err == nil || ops != nil {
				t.Errorf("List%v: %v, %v", bad, ops, err)
			}
		}
	})
}

func TestClose(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		ops := map[string]*task.Operation{
			"Task failed due to system shutdown: manager closed": submit(t, m, untilCancelled),
			"":          submit(t, m, func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return nil, nil }),
			"panic: oh": submit(t, m, func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); panic("oh") }),
		}
		for _, op := range ops {
			for op.State != task.StateRunning {
				op, _ = m.Get(op.ID)
				runtime.Gosched()
			}
		}
		var closers sync.WaitGroup
		for range 3 {
			closers.Go(func() {
				if err := m.Close(); err != nil {
					t.Error(err)
				}
				for want, op := range ops {
					got, err := db.Get(op.ID)
					state := task.StateFailed
					if want == "" {
						state = task.StateDone
					}
					if err != nil || got.State != state || got.Error != want {
						t.Errorf("%v: %+v, want %s %q", err, got, state, want)
					}
				}
			})
		}
		closers.Wait()
		if _, err := m.Submit("late", untilCancelled); !errors.Is(err, task.ErrClosed) {
			t.Errorf("Submit after Close: %v", err)
		}
		if err := m.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown after Close: %v", err)
		}
		if page, err := m.List(10, 0); err != nil || len(page) != len(ops) {
			t.Errorf("List after Close: %v, %v", page, err)
		}
		for _, op := range ops {
			if got := wait(t, m, op.ID); !got.State.Finished() {
				t.Errorf("Wait after Close: %+v", got)
			}
			if err := m.Cancel(op.ID); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Cancel after Close: %v", err)
			}
		}
	})
}

// TestCloseBesideSubmit has Submit and Close race: what was accepted must be
// finished in the store.
func TestCloseBesideSubmit(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		var submitters sync.WaitGroup
		var mu sync.Mutex
		var ids []string
		for range 8 {
			submitters.Go(func() {
				for {
					op, err := m.Submit("race", untilCancelled)
					if errors.Is(err, task.ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					ids = append(ids, op.ID)
					mu.Unlock()
				}
			})
		}
		for enough := false; !enough; runtime.Gosched() {
			mu.Lock()
			enough = len(ids) > 20
			mu.Unlock()
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		submitters.Wait()
		for _, id := range ids {
			op, err := db.Get(id)
			if err != nil || op.State != task.StateFailed || !strings.HasPrefix(op.Error, "Task failed due to system shutdown") {
				t.Fatalf("%v: %+v", err, op)
			}
		}
	})
}

func TestShutdown(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		fn, started, release := blocker(nil)
		op := submit(t, m, fn)
		<-started
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := m.Shutdown(ctx); err != context.Canceled {
			t.Errorf("Shutdown with a context that is done: %v", err)
		}
		if got, _ := m.Get(op.ID); got.State != task.StateRunning {
			t.Errorf("after Shutdown has given up: %+v", got)
		}
		if _, err := m.Submit("late", fn); !errors.Is(err, task.ErrClosed) {
			t.Errorf("Submit after Shutdown: %v", err)
		}
		release()
		if err := m.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if got, _ := m.Get(op.ID); got.State != task.StateDone {
			t.Errorf("after Shutdown: %+v", got)
		}
	})
}

// TestCrowd has ten thousand goroutines use one manager.
func TestCrowd(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		const n = 10_000
		var crowd sync.WaitGroup
		var mu sync.Mutex
		ids := make(map[string]bool)
		for i := range n {
			crowd.Go(func() {
				op, err := m.Submit("crowd", func(_ context.Context, update func(int)) (any, error) {
					update(i % 100)
					return i, nil
				})
				if err != nil {
					t.Error(err)
					return
				}
				done, err := m.Wait(t.Context(), op.ID)
				if err != nil || done.State != task.StateDone || done.Result != json.Number(fmt.Sprint(i)) {
					t.Errorf("%+v, %v", done, err)
				}
				if i%100 == 0 {
					if _, err := m.List(3, i/100); err != nil {
						t.Error(err)
					}
				}
				mu.Lock()
				ids[op.ID] = true
				mu.Unlock()
			})
		}
		crowd.Wait()
		if len(ids) != n {
			t.Errorf("%d IDs, want %d", len(ids), n)
		}
	})
}

func TestNilArguments(t *testing.T) {
	m, err := task.New(nil, nil, task.WithLogger(nil), quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	op, err := m.Submit("x", untilCancelled, nil)
	if err != nil {
		t.Fatal(err)
	}
	op.Cancel()
	wait(t, m, op.ID)
}

// TestPanicIsLogged: the stack goes to the log and nowhere else.
func TestPanicIsLogged(t *testing.T) {
	var log bytes.Buffer
	m := task.NewManager(nil, task.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	op := submit(t, m, func(context.Context, func(int)) (any, error) { panic("find me") })
	op = wait(t, m, op.ID)
	m.Close()
	if op.Error != "panic: find me" {
		t.Errorf("Error is %q", op.Error)
	}
	if got := log.String(); !strings.Contains(got, "manager_test.go") || !strings.Contains(got, op.ID) {
		t.Errorf("logged: %s", got)
	}
}

// TestClock: what is shown just after the finish and what is read back are the
// same instants, in UTC, to the microsecond.
func TestClock(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		before := time.Now().Add(-time.Microsecond)
		op := submit(t, m, func(context.Context, func(int)) (any, error) { return nil, nil })
		first := wait(t, m, op.ID)
		again, _ := m.Get(op.ID)
		if !reflect.DeepEqual(first, again) {
			t.Errorf("got %+v, then %+v", first, again)
		}
		for _, at := range []time.Time{first.CreatedAt, first.StartedAt, first.UpdatedAt} {
			if at.Location() != time.UTC || at.Nanosecond()%1000 != 0 || at.Before(before) || at.After(time.Now()) {
				t.Errorf("time %v", at)
			}
		}
	})
}

// TestGoroutineNamesTask: a dump of goroutines tells which operation is stuck.
func TestGoroutineNamesTask(t *testing.T) {
	m := newManager(t, nil)
	fn, started, release := blocker(nil)
	defer release()
	op := submit(t, m, fn)
	<-started
	var dump bytes.Buffer
	pprof.Lookup("goroutine").WriteTo(&dump, 1)
	if want := fmt.Sprintf(`"task":"test", "task_id":"%s"`, op.ID); !strings.Contains(dump.String(), want) {
		t.Errorf("no %s in %s", want, &dump)
	}
}

// historyOf submits operations with those names, one after the other, that end
// in the state that begins like the name.
func historyOf(t *testing.T, m *task.Manager, names ...string) {
	t.Helper()
	for _, name := range names {
		op, err := m.Submit(name, func(ctx context.Context, update func(int)) (any, error) {
			switch name[0] {
			case 'D':
				return nil, nil
			case 'F':
				return nil, errors.New("broken")
			case 'C':
				cancelSelf(ctx)
			}
			<-ctx.Done()
			return nil, ctx.Err()
		})
		if err != nil {
			t.Fatal(err)
		}
		if strings.ContainsAny(name[:1], "DFC") {
			wait(t, m, op.ID)
		}
	}
}

func names(ops []*task.Operation) string {
	var names []string
	for _, op := range ops {
		names = append(names, op.Name)
	}
	return strings.Join(names, " ")
}

func TestListFiltered(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		historyOf(t, m, "D1", "F1", "R1", "C1", "D2", "F2", "D1", "R2", "F1", "D3")
		all, err := m.List(100, 0)
		if err != nil {
			t.Fatal(err)
		}
		cursor := func(name string) task.ListOption {
			i := slices.IndexFunc(all, func(op *task.Operation) bool { return op.Name == name })
			return task.Before(all[i].ID)
		}
		const done, failed, cancelled, running, pending = task.StateDone, task.StateFailed, task.StateCancelled, task.StateRunning, task.StatePending
		for _, tt := range []struct {
			want          string
			limit, offset int
			opts          []task.ListOption
		}{
			{"D3 F1 R2 D1 F2 D2 C1 R1 F1 D1", 100, 0, []task.ListOption{nil, task.ByState(), task.ByName(""), task.Before("")}},
			{"D3 D1 D2 D1", 100, 0, []task.ListOption{task.ByState(done)}},
			{"R2 R1", 100, 0, []task.ListOption{task.ByState(running)}},
			{"R2", 1, 0, []task.ListOption{task.ByState(running)}},
			{"R1", 1, 1, []task.ListOption{task.ByState(running, running)}},
			{"", 100, 0, []task.ListOption{task.ByState(pending)}},
			{"", 100, 0, []task.ListOption{task.ByState("NONSENSE' OR 1=1 --")}},
			{"R2 C1 R1", 100, 0, []task.ListOption{task.ByState(running, cancelled)}},
			{"F1 D1 F2", 3, 1, []task.ListOption{task.ByState(failed, done)}},
			{"C1", 100, 0, []task.ListOption{task.ByState(failed), task.ByState(cancelled)}},
			{"D1 D1", 100, 0, []task.ListOption{task.ByName("D1")}},
			{"", 100, 0, []task.ListOption{task.ByName("D")}},
			{"", 100, 0, []task.ListOption{task.ByName("D1"), task.ByState(failed)}},
			{"F1", 100, 0, []task.ListOption{task.ByName("F1"), task.ByState(failed, done), cursor("F2")}},
			{"F2 D2", 2, 0, []task.ListOption{cursor("D1")}},
			{"D2 C1", 2, 1, []task.ListOption{cursor("D1")}},
			{"", 100, 0, []task.ListOption{task.Before(all[9].ID)}},
			{"", 0, 0, []task.ListOption{cursor("D1")}},
			{"", 100, math.MaxInt, []task.ListOption{task.ByState(done)}},
			{"D3 D1 D2 D1", math.MaxInt, 0, []task.ListOption{task.ByState(done)}},
		} {
			got, err := m.List(tt.limit, tt.offset, tt.opts...)
			if err != nil || got == nil || names(got) != tt.want {
				t.Errorf("List(%d, %d, ...) = %q, %v, want %q", tt.limit, tt.offset, names(got), err, tt.want)
			}
		}
		for _, opts := range [][]task.ListOption{
			{task.Before("unknown")},
			{task.Before("unknown"), task.ByState(done), task.ByName("D1")},
		} {
			if got, err := m.List(10, 0, opts...); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Before an unknown operation: %v, %v, want ErrNotFound", got, err)
			}
		}
	})
}

// TestListByStateNow: what has changed a moment ago is neither missed nor
// shown in the state that it was in.
func TestListByStateNow(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for range 20 {
			started := make(chan struct{})
			op := submit(t, m, func(ctx context.Context, update func(int)) (any, error) {
				close(started)
				return untilCancelled(ctx, update)
			})
			<-started
			running, err := m.List(100, 0, task.ByState(task.StateRunning))
			if err != nil || len(running) != 1 || running[0].ID != op.ID {
				t.Fatalf("running: %v, %v", running, err)
			}
			if waiting, err := m.List(100, 0, task.ByState(task.StatePending)); err != nil || len(waiting) > 0 {
				t.Fatalf("pending: %v, %v", waiting, err)
			}
			op.Cancel()
			wait(t, m, op.ID)
		}
		m.Close()
		if running, err := m.List(100, 0, task.ByState(task.StateRunning)); err != nil || len(running) > 0 {
			t.Errorf("after Close: %v, %v", running, err)
		}
	})
}

func TestPrune(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		historyOf(t, m, "D1", "F1", "R1", "C1")
		time.Sleep(time.Millisecond)
		cut := time.Now()
		time.Sleep(time.Millisecond)
		historyOf(t, m, "D2", "R2")
		want := "R2 D2 R1"
		n, err := m.Prune(cut)
		if _, ok := db.(task.Pruner); !ok {
			if !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("Prune: %v, want ErrUnsupported", err)
			}
			return
		}
		if n != 3 || err != nil {
			t.Errorf("Prune = %d, %v, want 3", n, err)
		}
		if ops, err := m.List(10, 0); err != nil || names(ops) != want {
			t.Errorf("%q is left, %v, want %q", names(ops), err, want)
		}
		if n, err := m.Prune(time.Time{}); n != 0 || err != nil {
			t.Errorf("Prune of nothing = %d, %v", n, err)
		}
		m.Close()
		if n, err := m.Prune(time.Now().Add(time.Hour)); n != 3 || err != nil {
			t.Errorf("Prune of all = %d, %v, want 3", n, err)
		}
	})
}

func TestRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil, task.WithRetention(time.Hour))
		historyOf(t, m, "D1", "R1")
		time.Sleep(30 * time.Minute)
		historyOf(t, m, "D2")
		time.Sleep(29 * time.Minute)
		if ops, _ := m.List(10, 0); names(ops) != "D2 R1 D1" {
			t.Errorf("before: %s", names(ops))
		}
		time.Sleep(8 * time.Minute)
		if ops, _ := m.List(10, 0); names(ops) != "D2 R1" {
			t.Errorf("after: %s", names(ops))
		}
		m.Close()
		newManager(t, bare{task.NewMemoryStore()}, task.WithRetention(time.Hour)).Close()
	})
}

// TestListOddRows: rows that only other code could write don't lead a list in
// circles, nor keep the others from being pruned.
func TestListOddRows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tasks.db")
	sqliteExec(t, path, `CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT, state TEXT, progress INTEGER, metadata TEXT,
			result TEXT, error TEXT, created_at DATETIME, updated_at DATETIME);
		INSERT INTO tasks (id, name, state, updated_at) VALUES ('', 'x', 'DONE', '2020-01-01'), (NULL, 'x', 'DONE', '2020-01-01'),
			('a', 'x', 'DONE', '2020-01-01'), (CAST('b' AS BLOB), 'x', 'DONE', '2020-01-01'), ('c', 'x', NULL, '2020-01-01')`)
	m := newManager(t, openSQLite(t, path))
	for _, tt := range []struct {
		opts []task.ListOption
		want []string
	}{
		{[]task.ListOption{task.ByState(task.StateDone)}, []string{"b", "a", "", ""}},
		{[]task.ListOption{task.ByName("x")}, []string{"c", "b", "a", "", ""}},
		{[]task.ListOption{task.Before("b")}, []string{"a", "", ""}},
	} {
		ops, err := m.List(1000, 0, tt.opts...)
		var ids []string
		for _, op := range ops {
			ids = append(ids, op.ID)
		}
		if err != nil || !slices.Equal(ids, tt.want) {
			t.Errorf("listed %q, %v, want %q", ids, err, tt.want)
		}
	}
	if n, err := m.Prune(time.Now()); err != nil || n == 0 {
		t.Errorf("Prune: %d, %v", n, err)
	}
	if op, ok := m.Get("c"); !ok {
		t.Errorf("what has no state is gone: %+v", op)
	}
}

// A growingStore has more operations after each page.
type growingStore struct {
	task.Persistence
	grow func()
}

func (s growingStore) List(limit, offset int) ([]*task.Operation, error) {
	ops, err := s.Persistence.List(limit, offset)
	s.grow()
	return ops, err
}

func TestListBeforeGrowing(t *testing.T) {
	memory, n := task.NewMemoryStore(), 0
	save := func() {
		n++
		err := memory.Save(&task.Operation{ID: fmt.Sprint(n), Name: "x", State: task.StateDone, CreatedAt: time.Now(), UpdatedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 2000 {
		save()
	}
	grow := func() {}
	m := newManager(t, growingStore{memory, func() { grow() }})
	grow = func() { save(); save() }
	ops, err := m.List(3, 0, task.Before("1001")) // the last of the first page of a thousand
	var ids []string
	for _, op := range ops {
		ids = append(ids, op.ID)
	}
	if want := []string{"1000", "999", "998"}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("listed %q, %v, want %q", ids, err, want)
	}
}
