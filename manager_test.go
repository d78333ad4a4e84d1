package task_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
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
	"github.com/mynt-nas/task/internal/testkit"
)

func TestMain(m *testing.M) {
	testkit.Main(m, nil)
}

// Short names of helpers for most tests here.
var (
	quiet          = testkit.Quiet
	must           = testkit.Must
	openSQLite     = testkit.OpenSQLite
	sqliteExec     = testkit.Exec
	newManager     = testkit.NewManager
	eachStore      = testkit.EachStore
	submit         = testkit.Submit
	wait           = testkit.Wait
	blocker        = testkit.Blocker
	nothing        = testkit.Nothing
	untilCancelled = testkit.UntilCancelled
	errDisk        = testkit.ErrDisk
	historyOf      = testkit.History
	names          = testkit.Names
)

func cancelSelf(ctx context.Context) {
	op, _ := task.FromContext(ctx)
	op.Cancel()
	<-ctx.Done()
}

type (
	goexitJSON struct{}
	panicError struct{}
)

func (goexitJSON) MarshalJSON() ([]byte, error) { runtime.Goexit(); return nil, nil }

func (panicError) Error() string { panic("no text today") }

var errBoom = errors.New("boom")

// cyclic contains itself.
var cyclic = func() J {
	v := J{}
	v["self"] = v
	return v
}()

type J = map[string]any

// A nestedPanic panics with a value that panics in turn when it is printed, which package
// fmt does not catch.
type nestedPanic struct{}

func (nestedPanic) Error() string { panic(panicError{}) }

// badErrorJSON can't be encoded, for a reason that can't be printed.
type badErrorJSON struct{}

func (badErrorJSON) MarshalJSON() ([]byte, error) { return nil, errors.Join(nestedPanic{}) }

// nestedJSON panics with a value that can't be printed.
type nestedJSON struct{}

func (nestedJSON) MarshalJSON() ([]byte, error) { panic(nestedPanic{}) }

// outcomes lists the ways in which a function can end.
var outcomes = map[string]struct {
	fn       task.Func
	state    task.State
	progress int
	result   any
	err      string // the Error, or its prefix if this ends in "…"
}{
	"nothing": {nothing, task.StateDone, 100, nil, ""},
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
	"error":           {func(context.Context, func(int)) (any, error) { return nil, errBoom }, task.StateFailed, 0, nil, "boom"},
	"empty error":     {func(context.Context, func(int)) (any, error) { return nil, errors.New("") }, task.StateFailed, 0, nil, "…"},
	"value and error": {func(context.Context, func(int)) (any, error) { return "half", errBoom }, task.StateFailed, 0, "half", "boom"},
	"error not UTF-8": {func(context.Context, func(int)) (any, error) { return nil, errors.New("a\xffb") }, task.StateFailed, 0, nil, "a\uFFFDb"},

	"panic":           {func(context.Context, func(int)) (any, error) { panic("oh") }, task.StateFailed, 0, nil, "panic: oh"},
	"panic nil":       {func(context.Context, func(int)) (any, error) { panic(nil) }, task.StateFailed, 0, nil, "panic: …"},
	"panic error":     {func(context.Context, func(int)) (any, error) { panic(errBoom) }, task.StateFailed, 0, nil, "panic: boom"},
	"panic in error":  {func(context.Context, func(int)) (any, error) { return 1, panicError{} }, task.StateFailed, 0, nil, "panic: no text today"},
	"panic nested":    {func(context.Context, func(int)) (any, error) { panic(nestedPanic{}) }, task.StateFailed, 0, nil, "panic: a task_test.nestedPanic that can't be printed"},
	"panic panicking": {func(context.Context, func(int)) (any, error) { panic(panicError{}) }, task.StateFailed, 0, nil, "panic: …"},
	"Goexit":          {func(context.Context, func(int)) (any, error) { runtime.Goexit(); return nil, nil }, task.StateFailed, 0, nil, "the function called runtime.Goexit"},

	"channel":         {func(context.Context, func(int)) (any, error) { return make(chan int), nil }, task.StateDone, 100, nil, "result not kept: json: unsupported type: chan int"},
	"NaN":             {func(context.Context, func(int)) (any, error) { return math.NaN(), nil }, task.StateDone, 100, nil, "result not kept: …"},
	"cycle":           {func(context.Context, func(int)) (any, error) { return cyclic, nil }, task.StateDone, 100, nil, "result not kept: …"},
	"too deep":        {func(context.Context, func(int)) (any, error) { return testkit.Deep(20_000), nil }, task.StateDone, 100, nil, "result not kept: …"},
	"JSON panics":     {func(context.Context, func(int)) (any, error) { return testkit.PanicJSON{}, nil }, task.StateDone, 100, nil, "result not kept: …"},
	"JSON error":      {func(context.Context, func(int)) (any, error) { return badErrorJSON{}, nil }, task.StateDone, 100, nil, "result not kept: …"},
	"JSON nested":     {func(context.Context, func(int)) (any, error) { return nestedJSON{}, nil }, task.StateDone, 100, nil, "result not kept: …"},
	"JSON Goexit":     {func(context.Context, func(int)) (any, error) { return goexitJSON{}, nil }, task.StateDone, 100, nil, "result not kept: …"},
	"error, channel":  {func(context.Context, func(int)) (any, error) { return make(chan int), errBoom }, task.StateFailed, 0, nil, "boom (result not kept: json: unsupported type: chan int)"},
	"not JSON at all": {func(context.Context, func(int)) (any, error) { return json.RawMessage("{"), nil }, task.StateDone, 100, nil, "result not kept: …"},

	"cancelled, nil":   {func(ctx context.Context, _ func(int)) (any, error) { cancelSelf(ctx); return "made it", nil }, task.StateDone, 100, "made it", ""},
	"cancelled, cause": {func(ctx context.Context, _ func(int)) (any, error) { cancelSelf(ctx); return nil, context.Cause(ctx) }, task.StateCancelled, 0, nil, "operation cancelled"},
	"cancelled, error": {func(ctx context.Context, _ func(int)) (any, error) {
		cancelSelf(ctx)
		return "part", errors.New("signal: killed")
	}, task.StateCancelled, 0, "part", "signal: killed"},
	"cancelled, panic": {func(ctx context.Context, _ func(int)) (any, error) { cancelSelf(ctx); panic("oh") }, task.StateFailed, 0, nil, "panic: oh"},

	"progress":        {func(_ context.Context, u func(int)) (any, error) { u(42); return nil, errBoom }, task.StateFailed, 42, nil, "boom"},
	"progress down":   {func(_ context.Context, u func(int)) (any, error) { u(42); u(7); return nil, errBoom }, task.StateFailed, 7, nil, "boom"},
	"progress low":    {func(_ context.Context, u func(int)) (any, error) { u(42); u(-1); return nil, errBoom }, task.StateFailed, 0, nil, "boom"},
	"progress high":   {func(_ context.Context, u func(int)) (any, error) { u(math.MaxInt); return nil, errBoom }, task.StateFailed, 100, nil, "boom"},
	"progress, done":  {func(_ context.Context, u func(int)) (any, error) { u(42); return nil, nil }, task.StateDone, 100, nil, ""},
	"progress, late":  {func(_ context.Context, u func(int)) (any, error) { u(42); defer u(43); return nil, errBoom }, task.StateFailed, 43, nil, "boom"},
	"progress, panic": {func(_ context.Context, u func(int)) (any, error) { u(42); panic("oh") }, task.StateFailed, 42, nil, "panic: oh"},
}

// TestOutcome checks how each way in which a function can end is reported: by Wait at
// once, by Get and List later, and after a restart.
func TestOutcome(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		finished := make(map[string]*task.Operation)
		for name, test := range outcomes {
			op, err := m.Submit(name, test.fn)
			if err != nil {
				t.Fatal(err)
			}
			finished[name] = wait(t, m, op.ID)
			checkOutcome(t, "Wait", name, finished[name])
		}
		history := func(how string, m *task.Manager) {
			for name, op := range finished {
				got, ok := m.Get(op.ID)
				if !ok {
					t.Fatalf("%s: %s is gone", how, name)
				}
				checkOutcome(t, how, name, got)
				if !got.UpdatedAt.Equal(op.UpdatedAt) || !got.StartedAt.Equal(op.StartedAt) || !got.CreatedAt.Equal(op.CreatedAt) {
					t.Errorf("%s: %s: times differ: %v, want %v", how, name, got, op)
				}
			}
			ops, err := m.List(len(outcomes)+1, 0)
			if err != nil || len(ops) != len(outcomes) {
				t.Fatalf("%s: List: %d operations, %v", how, len(ops), err)
			}
			for _, op := range ops {
				checkOutcome(t, how+", List", op.Name, op)
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

// checkOutcome checks a finished operation that is named after its outcome.
func checkOutcome(t *testing.T, how, name string, op *task.Operation) {
	t.Helper()
	want := outcomes[name]
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

func TestSubmitRefuses(t *testing.T) {
	nothing := nothing
	tests := map[string]struct {
		name string
		fn   task.Func
		opt  task.SubmitOption
		want string
	}{
		"empty name":        {"", nothing, nil, "name is empty"},
		"nil function":      {"x", nil, nil, "function is nil"},
		"metadata channel":  {"x", nothing, task.WithMetadata(make(chan int)), "metadata: json: unsupported type"},
		"metadata panics":   {"x", nothing, task.WithMetadata(testkit.PanicJSON{}), "no JSON today"},
		"metadata's error":  {"x", nothing, task.WithMetadata(badErrorJSON{}), "panic"},
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
	nothing := nothing
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
			for _, bad := range []any{make(chan int), testkit.PanicJSON{}} {
				if err := task.SetMetadata(ctx, bad); err == nil {
					t.Errorf("SetMetadata(%T) returned no error", bad)
				}
			}
			must(t, task.SetMetadata(ctx, []string{"new"}))
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
}

func TestContextOfNoOperation(t *testing.T) {
	if err := task.SetMetadata(t.Context(), 1); err == nil {
		t.Error("SetMetadata outside a function: no error")
	}
	if op, ok := task.FromContext(t.Context()); ok || op != nil {
		t.Error("FromContext outside a function returned an operation")
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
		got.State, got.Progress = "MINE", 99 // callers may modify snapshots
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
			t.Errorf("Wait for a finished operation with a context that is done: %+v, %v", got, err)
		}
	})
}

// TestSnapshotsShareNothing: modifying one caller's snapshot does not change others.
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
			for range 3 { // Cancel may be called again while it is live
				if err := op.Cancel(); err != nil && !errors.Is(err, task.ErrNotFound) {
					t.Fatal(err)
				}
			}
			if op := wait(t, m, op.ID); op.State != task.StateCancelled {
				t.Errorf("%+v", op)
			}
		})
		t.Run("finished", func(t *testing.T) {
			op := submit(t, m, nothing)
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

// TestCancelCause: the text of CancelCause is in the context's cause and in the
// operation.
func TestCancelCause(t *testing.T) {
	const why = "by admin: \x00maintenance \xff"
	const stored = "by admin: \x00maintenance \uFFFD"
	for name, test := range map[string]struct {
		fn    task.Func
		state task.State
		text  string
	}{
		"the context's error": {untilCancelled, task.StateCancelled, stored},
		"the cause": {func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}, task.StateCancelled, stored},
		"an error of its own": {func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			return nil, errDisk
		}, task.StateCancelled, stored + ": disk full"},
		"no error": {func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			return nil, nil
		}, task.StateDone, ""},
		"a cause that is not ErrCancelled": {func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			if cause := context.Cause(ctx); !errors.Is(cause, task.ErrCancelled) || !strings.HasSuffix(cause.Error(), why) {
				t.Errorf("cause: %v", cause)
			}
			return nil, ctx.Err()
		}, task.StateCancelled, stored},
	} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, nil, task.WithLimit(1))
			op := submit(t, m, test.fn)
			waiting := submit(t, m, nothing)
			must(t, m.CancelCause(waiting.ID, why))
			must(t, m.CancelCause(op.ID, why))
			if err := m.CancelCause(op.ID, "another"); err != nil && !errors.Is(err, task.ErrNotFound) {
				t.Error(err)
			}
			if got := wait(t, m, op.ID); got.State != test.state || got.Error != test.text {
				t.Errorf("%+v", got)
			}
			if got := wait(t, m, waiting.ID); got.State != task.StateCancelled || got.Error != stored {
				t.Errorf("%+v", got)
			}
		})
	}
}

func TestClose(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		ops := map[string]*task.Operation{
			testkit.ShutdownText: submit(t, m, untilCancelled),
			"":                   submit(t, m, func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); return nil, nil }),
			"panic: oh":          submit(t, m, func(ctx context.Context, _ func(int)) (any, error) { <-ctx.Done(); panic("oh") }),
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
		afterClose(t, m, ops)
	})
}

// afterClose checks what still works on a closed manager.
func afterClose(t *testing.T, m *task.Manager, ops map[string]*task.Operation) {
	t.Helper()
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
}

// TestCloseAtOnce: Close of a manager whose operations have finished does not wait.
func TestCloseAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, nil)
		wait(t, m, submit(t, m, nothing).ID)
		start := time.Now()
		must(t, m.Close())
		if d := time.Since(start); d > 0 {
			t.Errorf("Close took %v", d)
		}
	})
}

// TestCloseBesideSubmit races Submit against Close: every accepted operation must be
// stored as finished.
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
			if err != nil || op.State != task.StateFailed || !strings.HasPrefix(op.Error, testkit.ShutdownText) {
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
			t.Errorf("after Shutdown has returned its context's error: %+v", got)
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

// TestDrain: running functions go on, waiting ones do not start.
func TestDrain(t *testing.T) {
	eachStore(t, func(t *testing.T, _ *task.Manager, db task.Persistence) {
		m := newManager(t, db, task.WithLimit(1))
		fn, started, release := blocker(nil)
		runs := submit(t, m, fn)
		<-started
		waits := submit(t, m, func(context.Context, func(int)) (any, error) {
			t.Error("started after Drain")
			return nil, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := m.Drain(ctx); err != context.Canceled {
			t.Errorf("Drain with a context that is done: %v", err)
		}
		if _, err := m.Submit("late", fn); !errors.Is(err, task.ErrClosed) {
			t.Errorf("Submit after Drain: %v", err)
		}
		if got := wait(t, m, waits.ID); got.State != task.StateFailed || got.Error != testkit.ShutdownText || !got.StartedAt.IsZero() {
			t.Errorf("what waited: %+v", got)
		}
		if got, _ := m.Get(runs.ID); got.State != task.StateRunning {
			t.Errorf("what ran: %+v", got)
		}
		release()
		must(t, m.Drain(t.Context()))
		if got, _ := m.Get(runs.ID); got.State != task.StateDone {
			t.Errorf("after Drain: %+v", got)
		}
	})
}

// TestCloseContext: functions that do not return delay CloseContext only until its
// context is done. If they return later, their final states are stored.
func TestCloseContext(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		fn, started, release := blocker(nil)
		deaf := submit(t, m, fn)
		<-started
		polite := submit(t, m, untilCancelled)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		err := m.CloseContext(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), deaf.ID) {
			t.Errorf("CloseContext: %v", err)
		}
		if got := wait(t, m, polite.ID); got.State != task.StateFailed || got.Error != testkit.ShutdownText {
			t.Errorf("%+v", got)
		}
		if got, err := db.Get(deaf.ID); err != nil || got.State.Finished() {
			t.Errorf("stored: %+v, %v", got, err)
		}
		release()
		must(t, m.CloseContext(t.Context()))
		if got, err := db.Get(deaf.ID); err != nil || got.State != task.StateDone {
			t.Errorf("stored: %+v, %v", got, err)
		}
		if err := m.CloseContext(ctx); err != nil {
			t.Errorf("CloseContext after Close: %v", err)
		}
	})
}

// TestShutdownBound: the contexts of Shutdown and Drain also bound the closing of a
// manager whose store hangs.
func TestShutdownBound(t *testing.T) {
	for name, end := range map[string]func(*task.Manager, context.Context) error{
		"Shutdown": (*task.Manager).Shutdown,
		"Drain":    (*task.Manager).Drain,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				db.Before(func(c *testkit.Call) error {
					if c.Method == "Prune" {
						time.Sleep(20 * time.Second)
					}
					return nil
				})
				m := newManager(t, db, task.WithRetention(time.Hour))
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if err := end(m, ctx); err != context.DeadlineExceeded || time.Since(start) != time.Second {
					t.Errorf("after %v: %v", time.Since(start), err)
				}
				must(t, m.Close())
			})
		})
	}
}

// TestCloseContextError: the error of CloseContext wraps that of its context, even if
// the context has a cause, and does not name operations that have not started.
func TestCloseContextError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db)
		stored := make(chan struct{})
		db.Before(func(c *testkit.Call) error {
			if c.Method == "WriteBatch" {
				<-stored
			}
			return nil
		})
		go m.Submit("not started", nothing)
		synctest.Wait()
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errDisk)
		defer cancel()
		err := m.CloseContext(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "not started") {
			t.Errorf("CloseContext: %v", err)
		}
		close(stored)
		must(t, m.Close())
	})
}

// TestFailedOpen: with the nil store of a failed open, every method that needs the store
// returns an error that says so.
func TestFailedOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // Close retries for a few seconds
		store, err := task.OpenSQLite(t.TempDir())
		if err == nil {
			t.Fatal("opened a directory")
		}
		if m, err := task.New(store); m != nil || err == nil || !strings.Contains(err.Error(), "OpenSQLite") {
			t.Errorf("New: %v", err)
		}
		m := task.NewManager(store, testkit.Quiet)
		if _, err := m.Submit("x", nothing); err == nil || !strings.Contains(err.Error(), "OpenSQLite") {
			t.Errorf("Submit: %v", err)
		}
		if _, err := m.List(1, 0); err == nil {
			t.Error("List: no error")
		}
		if _, ok := m.Get("x"); ok {
			t.Error("Get found something")
		}
		must(t, errors.Join(m.Close(), store.Close()))
	})
}

// TestCrowd uses one manager from 3,000 goroutines.
func TestCrowd(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		const n = 3000
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

// TestPanicIsLogged: the stack of a panic is only in the log.
func TestPanicIsLogged(t *testing.T) {
	log := new(testkit.Log)
	m := newManager(t, nil, log.Option())
	op := submit(t, m, func(context.Context, func(int)) (any, error) { panic("find me") })
	op = wait(t, m, op.ID)
	if op.Error != "panic: find me" {
		t.Errorf("Error is %q", op.Error)
	}
	m.Close() // then everything has been logged
	if got := log.String(); !strings.Contains(got, "manager_test.go") || !strings.Contains(got, op.ID) {
		t.Errorf("logged: %s", got)
	}
}

// TestUpdateProgress calls the method named in SPEC.md.
func TestUpdateProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, task.WithLimit(1))
		c.do("+running")
		c.do("+pending")
		for _, tt := range []struct {
			name           string
			progress, want int
		}{{"running", 60, 60}, {"running", -1, 0}, {"pending", 150, 100}} {
			must(t, task.UpdateProgress(c.m, c.ids[tt.name], tt.progress))
			if op, _ := c.m.Get(c.ids[tt.name]); op.Progress != tt.want {
				t.Errorf("UpdateProgress(%s, %d): %d%%, want %d%%", tt.name, tt.progress, op.Progress, tt.want)
			}
		}
		c.do("-running")
		for _, id := range []string{c.ids["running"], "unknown", ""} {
			if err := task.UpdateProgress(c.m, id, 70); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("UpdateProgress of %q: %v, want ErrNotFound", id, err)
			}
		}
		c.do("close")
		if op, _ := c.m.Get(c.ids["running"]); op.Progress != 100 || op.State != task.StateDone {
			t.Errorf("%+v", op)
		}
	})
}

// TestClock: the times read back equal those shown right after the finish, in UTC, to
// the microsecond.
func TestClock(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		before := time.Now().Add(-time.Microsecond)
		op := submit(t, m, nothing)
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

// TestGoroutineNamesTask: a goroutine dump names the operation that is stuck.
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

// A crew is a set of operations whose functions record when they start, and return on
// demand.
type crew struct {
	t    *testing.T
	m    *task.Manager
	ids  map[string]string
	ends map[string]chan struct{}

	mu      sync.Mutex // guards what follows
	started []string
}

func newCrew(t *testing.T, opts ...task.Option) *crew {
	t.Helper()
	return &crew{t: t, m: newManager(t, nil, opts...), ids: make(map[string]string), ends: make(map[string]chan struct{})}
}

// submit submits an operation with a lock for each of the keys.
func (c *crew) submit(name string, keys ...string) {
	c.t.Helper()
	var opts []task.SubmitOption
	for _, key := range keys {
		opts = append(opts, task.WithLock(key))
	}
	end := make(chan struct{})
	c.ends[name] = end
	op, err := c.m.Submit(name, func(ctx context.Context, _ func(int)) (any, error) {
		c.mu.Lock()
		c.started = append(c.started, name)
		c.mu.Unlock()
		select {
		case <-end:
			return nil, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}, opts...)
	must(c.t, err)
	c.ids[name] = op.ID
}

// do executes one step of a script: "+NAME KEY..." submits, "-NAME" makes the function
// return, "!NAME" cancels, "?NAME STATE" checks a state, and "close" closes the
// manager.
func (c *crew) do(step string) {
	c.t.Helper()
	name, rest, _ := strings.Cut(step[1:], " ")
	switch step[0] {
	case '+':
		c.submit(name, strings.Fields(rest)...)
	case '-':
		close(c.ends[name])
	case '!':
		must(c.t, c.m.Cancel(c.ids[name]))
	case '?':
		if op, ok := c.m.Get(c.ids[name]); !ok || string(op.State) != rest {
			c.t.Errorf("%s is %+v, want %s", name, op, rest)
		}
	default:
		must(c.t, c.m.Close())
	}
	synctest.Wait()
}

func (c *crew) wantStarted(when, want string) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if got := strings.Join(c.started, " "); got != want {
		c.t.Fatalf("after %q, started %q, want %q", when, got, want)
	}
}

// queueScripts check which operations start when: see WithLimit and WithLock.
var queueScripts = []struct {
	name  string
	limit int
	steps [][2]string // a step for crew.do, and the operations started by then
}{
	{"limit 1", 1, [][2]string{
		{"+a", "a"}, {"+b", "a"}, {"+c", "a"}, {"-a", "a b"}, {"-b", "a b c"}, {"-c", "a b c"},
	}},
	{"limit 3", 3, [][2]string{
		{"+a", "a"}, {"+b", "a b"}, {"+c", "a b c"}, {"+d", "a b c"}, {"-b", "a b c d"}, {"-a", "a b c d"},
	}},
	{"lock", 0, [][2]string{
		{"+a1 a", "a1"}, {"+a2 a", "a1"}, {"+b1 b", "a1 b1"}, {"+free", "a1 b1 free"}, {"+b2 b", "a1 b1 free"}, {"+a3 a", "a1 b1 free"},
		{"?a2 PENDING", "a1 b1 free"},
		{"-b1", "a1 b1 free b2"}, {"-free", "a1 b1 free b2"}, {"-a1", "a1 b1 free b2 a2"}, {"-a2", "a1 b1 free b2 a2 a3"},
	}},
	{"a free slot goes to the oldest operation whose key is free", 2, [][2]string{
		{"+a1 a", "a1"}, {"+a2 a", "a1"}, {"+a3 a", "a1"}, {"+b1 b", "a1 b1"}, {"+x", "a1 b1"}, {"+b2 b", "a1 b1"}, {"+c1 c", "a1 b1"},
		{"-b1", "a1 b1 x"},             // a2 is older, but a is taken; x is older than b2
		{"-a1", "a1 b1 x a2"},          // older than b2
		{"-x", "a1 b1 x a2 b2"},        // a3 waits for a2
		{"-b2", "a1 b1 x a2 b2 c1"},    // and still waits
		{"-c1", "a1 b1 x a2 b2 c1"},    // a slot is free, but the key is not
		{"-a2", "a1 b1 x a2 b2 c1 a3"}, // now the key is free
	}},
	{"cancel", 1, [][2]string{
		{"+first a", "first"}, {"+second a", "first"}, {"+third a", "first"}, {"+fourth b", "first"}, {"+fifth b", "first"}, {"+sixth", "first"},
		{"!second", "first"}, // waits for its key
		{"!fourth", "first"}, // is ready, and passes its key on
		{"?second CANCELLED", "first"}, {"?fourth CANCELLED", "first"},
		{"!first", "first third"}, // runs
		{"-third", "first third fifth"}, {"-fifth", "first third fifth sixth"},
	}},
	{"several keys", 3, [][2]string{
		{"+a a", "a"}, {"+b b", "a b"},
		{"+ab a b a", "a b"}, // the same key twice counts once
		{"+ba b a", "a b"}, {"+bc c b", "a b"}, {"+c c", "a b"}, {"+d d", "a b d"}, {"+cd c d", "a b d"},
		{"+free", "a b d"}, // waits for a slot
		{"-a", "a b d free"}, {"-free", "a b d free"}, {"-b", "a b d free ab"}, {"-ab", "a b d free ab ba"},
		{"!bc", "a b d free ab ba c"}, // has one key and waits for the other
		{"-c", "a b d free ab ba c"}, {"-d", "a b d free ab ba c cd"},
		{"+ad a d", "a b d free ab ba c cd"}, {"+da d a", "a b d free ab ba c cd"},
		{"close", "a b d free ab ba c cd"},
		{"?ba FAILED", "a b d free ab ba c cd"}, {"?cd FAILED", "a b d free ab ba c cd"},
		{"?ad FAILED", "a b d free ab ba c cd"}, {"?da FAILED", "a b d free ab ba c cd"},
	}},
}

func TestQueue(t *testing.T) {
	for _, tt := range queueScripts {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCrew(t, task.WithLimit(tt.limit))
				for _, step := range tt.steps {
					c.do(step[0])
					c.wantStarted(step[0], step[1])
				}
				c.do("close")
			})
		})
	}
}

func TestNoLimit(t *testing.T) {
	for _, limit := range []int{0, -1} {
		synctest.Test(t, func(t *testing.T) {
			c := newCrew(t, task.WithLimit(limit))
			for i := range 100 {
				c.submit(fmt.Sprint(i))
			}
			synctest.Wait()
			if len(c.started) != 100 {
				t.Errorf("limit %d: %d of 100 started", limit, len(c.started))
			}
			c.do("close")
		})
	}
}

// TestSlotFreeBeforeStored: once a function has returned, its slot is free, even while
// the final state can't be stored.
func TestSlotFreeBeforeStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		db.Before(testkit.FailFinals)
		m := newManager(t, testkit.Bare(db), task.WithLimit(1))
		first := submit(t, m, nothing, task.WithLock("key"))
		second := submit(t, m, untilCancelled, task.WithLock("key"))
		time.Sleep(time.Second)
		for _, op := range []*task.Operation{first, second} {
			now, _ := m.Get(op.ID)
			if now.State != task.StateRunning || (now.Error == "") != (op == second) {
				t.Errorf("%+v", now)
			}
		}
		db.Before(nil)
	})
}

func TestCloseWithWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrew(t, task.WithLimit(1))
		for _, step := range []string{"+running a", "+ready", "+locked a", "close"} {
			c.do(step)
			c.wantStarted(step, "running")
		}
		for _, name := range []string{"ready", "locked"} {
			op, _ := c.m.Get(c.ids[name])
			if op.State != task.StateFailed || op.Error != testkit.ShutdownText || !op.StartedAt.IsZero() {
				t.Errorf("%s is %+v", name, op)
			}
			if err := c.m.Cancel(c.ids[name]); !errors.Is(err, task.ErrNotFound) {
				t.Errorf("Cancel of %s after Close: %v", name, err)
			}
		}
	})
}

// slowWrites slows down every write.
func slowWrites(delay time.Duration) func(*testkit.Call) error {
	return func(c *testkit.Call) error {
		if c.Method == "WriteBatch" {
			time.Sleep(delay)
		}
		return nil
	}
}

// TestCancelWhileClosing: Cancel does not change the outcome that Close has given
// waiting operations.
func TestCancelWhileClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db, task.WithLimit(1))
		submit(t, m, untilCancelled)
		op := submit(t, m, untilCancelled)
		db.Before(slowWrites(time.Second))
		go m.Close()
		synctest.Wait()
		if err := m.Cancel(op.ID); err != nil {
			t.Errorf("Cancel: %v, want nil, because the final state is not stored yet", err)
		}
		if got := wait(t, m, op.ID); got.State != task.StateFailed {
			t.Errorf("it is %s", got.State)
		}
	})
}

// TestCloseWithManyWaiting: Close does not give up while it makes progress.
func TestCloseWithManyWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := testkit.NewFake(nil)
		m := newManager(t, db, task.WithLimit(1))
		const n = 10_000 // ten writes
		var all sync.WaitGroup
		for range n {
			all.Go(func() { submit(t, m, untilCancelled) })
		}
		all.Wait()
		db.Before(slowWrites(2 * time.Second))
		if err := m.Close(); err != nil {
			t.Errorf("Close: %.200v", err)
		}
	})
}

func TestShutdownRunsWaiting(t *testing.T) {
	m := newManager(t, nil, task.WithLimit(2))
	var mu sync.Mutex
	var order []int
	for i := range 100 {
		_, err := m.Submit("op", func(context.Context, func(int)) (any, error) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, i)
			return nil, nil
		}, task.WithLock("key"))
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(order) != 100 || !slices.IsSorted(order) {
		t.Errorf("ran %v, want 0 to 99 in order", order)
	}
}

func TestLockArguments(t *testing.T) {
	m := newManager(t, nil)
	for _, tt := range []struct {
		opts []task.SubmitOption
		want string
	}{
		{[]task.SubmitOption{task.WithLock("")}, "key is empty"},
		{[]task.SubmitOption{task.WithLock("a"), task.WithLock("")}, "key is empty"},
	} {
		_, err := m.Submit("op", nothing, tt.opts...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Submit returned %v, want an error with %q", err, tt.want)
		}
	}
	if ops, err := m.List(10, 0); err != nil || len(ops) > 0 {
		t.Errorf("stored %v, %v", ops, err)
	}
}

// TestManyWaiting: a waiting operation has no goroutine, and cancelling it is fast.
func TestManyWaiting(t *testing.T) {
	c := newCrew(t, task.WithLimit(1))
	c.submit("running")
	before := runtime.NumGoroutine()
	const n = 10_000
	for i := range n {
		c.submit(fmt.Sprint(i), fmt.Sprint("key", i%3))
	}
	if after := runtime.NumGoroutine(); after > before+10 {
		t.Errorf("%d goroutines, %d before", after, before)
	}
	var all sync.WaitGroup
	for g := range 10 {
		all.Go(func() {
			for i := g; i < n; i += 10 {
				if err := c.m.Cancel(c.ids[fmt.Sprint(i)]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	c.submit("last", "key1")
	must(t, c.m.Cancel(c.ids["running"]))
	if _, err := c.m.Wait(t.Context(), c.ids["running"]); err != nil {
		t.Fatal(err)
	}
	close(c.ends["last"])
	if op, err := c.m.Wait(t.Context(), c.ids["last"]); err != nil || op.State != task.StateDone {
		t.Errorf("the last one is %+v, %v", op, err)
	}
	if got := strings.Join(c.started, " "); got != "running last" {
		t.Errorf("started %s", got)
	}
}

// TestLargeValues: metadata and results are kept up to 16 MiB as JSON.
func TestLargeValues(t *testing.T) {
	const limit = 16 << 20
	quoted := func(n int) any { return strings.Repeat("x", n-2) } // n bytes with the quotes
	for _, tt := range []struct {
		name  string
		value any
		kept  bool
	}{
		{"at the limit", quoted(limit), true},
		{"over the limit", quoted(limit + 1), false},
		{"encoded, over the limit", json.RawMessage(fmt.Sprintf(`"%s"`, quoted(limit+1))), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var db task.Persistence
			if tt.kept { // otherwise no store sees it
				db = openSQLite(t, testkit.FastPath(t))
			}
			m := newManager(t, db)
			if op, err := m.Submit("x", nothing, task.WithMetadata(tt.value)); (err == nil) != tt.kept || (op == nil) == tt.kept {
				t.Errorf("Submit with metadata: %v", err)
			}
			var set error
			result := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
				set = task.SetMetadata(ctx, tt.value)
				return tt.value, nil
			}, task.WithMetadata("first"))
			got := waitRaw(t, m, result.ID)
			if (set == nil) != tt.kept {
				t.Errorf("SetMetadata: %v", set)
			}
			if got.State != task.StateDone || (got.Result != nil) != tt.kept || (string(got.Metadata.(json.RawMessage)) == `"first"`) == tt.kept ||
				strings.HasPrefix(got.Error, "result not kept: ") == tt.kept {
				t.Errorf("%s, kept %v, error %q", got.State, got.Result != nil, got.Error)
			}
			if tt.kept {
				return // results returned with an error: see TestOutcome
			}
			failing := submit(t, m, func(context.Context, func(int)) (any, error) { return tt.value, errDisk })
			got = wait(t, m, failing.ID)
			if got.State != task.StateFailed || got.Result != nil || !strings.HasPrefix(got.Error, "disk full") ||
				!strings.Contains(got.Error, "result not kept: ") {
				t.Errorf("%s, kept %v, error %q", got.State, got.Result != nil, got.Error)
			}
		})
	}
}

// waitRaw is wait without decoding values.
func waitRaw(t *testing.T, m *task.Manager, id string) *task.Operation {
	t.Helper()
	op, err := m.Raw().Wait(t.Context(), id)
	must(t, err)
	return op
}

// TestEmptyError: the Error of a FAILED operation is not empty, even if the function's
// error has no text.
func TestEmptyError(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, db task.Persistence) {
		for name, value := range map[string]any{"no value": nil, "value": 1, "bad value": make(chan int)} {
			op := submit(t, m, func(context.Context, func(int)) (any, error) { return value, errors.New("") })
			got := wait(t, m, op.ID)
			if got.State != task.StateFailed || strings.TrimSpace(got.Error) == "" || strings.HasPrefix(got.Error, " ") {
				t.Errorf("%s: %s %q", name, got.State, got.Error)
			}
			if stored, err := db.Get(op.ID); err != nil || stored.Error != got.Error {
				t.Errorf("%s: stored %+v, %v", name, stored, err)
			}
		}
	})
}

// TestShutdownText: Error does not repeat the cause of the context.
func TestShutdownText(t *testing.T) {
	for name, tt := range map[string]struct {
		err  func(ctx context.Context) error
		want string
	}{
		"cause":       {context.Cause, testkit.ShutdownText},
		"ctx.Err":     {context.Context.Err, testkit.ShutdownText},
		"other error": {func(context.Context) error { return errors.New("signal: killed") }, testkit.ShutdownText + ": signal: killed"},
		"empty error": {func(context.Context) error { return errors.New("") }, testkit.ShutdownText},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newManager(t, nil)
				op := submit(t, m, func(ctx context.Context, _ func(int)) (any, error) {
					<-ctx.Done()
					return nil, tt.err(ctx)
				})
				synctest.Wait()
				must(t, m.Close())
				if got := wait(t, m, op.ID); got.State != task.StateFailed || got.Error != tt.want {
					t.Errorf("%s %q, want %q", got.State, got.Error, tt.want)
				}
			})
		})
	}
}

// TestCancelPendingAtOnce: Cancel of a PENDING operation waits for no write. The
// operation never runs, and is shown CANCELLED once that is stored.
func TestCancelPendingAtOnce(t *testing.T) {
	for _, fault := range []string{"writes hang", "writes fail"} {
		t.Run(fault, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hang := make(chan struct{})
				db := testkit.NewFake(nil)
				m := newManager(t, testkit.Bare(db), task.WithLimit(1))
				c := &crew{t: t, m: m, ids: make(map[string]string), ends: make(map[string]chan struct{})}
				c.do("+running key")
				c.do("+waiting key")
				c.do("+next key")
				db.Before(func(c *testkit.Call) error {
					if c.Method != "Update" {
						return nil
					}
					if fault == "writes fail" {
						return errDisk
					}
					<-hang
					return nil
				})
				for range 2 {
					must(t, m.Cancel(c.ids["waiting"])) // waiting would deadlock
					c.do("?waiting PENDING")
				}
				waited := make(chan string)
				go func() {
					op, err := m.Wait(context.Background(), c.ids["waiting"])
					waited <- fmt.Sprint(op.State, err)
				}()
				c.do("-running") // its slot and its key go to the next operation
				c.wantStarted("-running", "running next")
				select {
				case got := <-waited:
					t.Errorf("Wait returned %s before that was stored", got)
				default:
				}
				db.Before(nil)
				close(hang)
				if got := <-waited; got != "CANCELLED<nil>" {
					t.Errorf("Wait: %s", got)
				}
				c.do("close")
				c.wantStarted("close", "running next")
			})
		})
	}
}

// TestCancelBeforeSubmitReturns cancels an operation while its first row is
// being stored.
func TestCancelBeforeSubmitReturns(t *testing.T) {
	for name, answer := range map[string]error{"stored": nil, "not stored": errDisk} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db := testkit.NewFake(nil)
				ids, stored := make(chan string), make(chan struct{})
				db.Before(func(c *testkit.Call) error {
					if c.Method != "Save" {
						return nil
					}
					ids <- c.ID
					<-stored
					return answer
				})
				m := newManager(t, testkit.Bare(db))
				submitted := make(chan error)
				go func() {
					_, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
						t.Error("the function was called")
						return nil, nil
					})
					submitted <- err
				}()
				id := <-ids
				must(t, m.Cancel(id)) // waiting would deadlock
				close(stored)
				if err := <-submitted; !errors.Is(err, answer) {
					t.Errorf("Submit: %v, want %v", err, answer)
				}
				op, err := m.Wait(t.Context(), id)
				if answer == nil && (err != nil || op.State != task.StateCancelled) || answer != nil && !errors.Is(err, task.ErrNotFound) {
					t.Errorf("Wait: %+v, %v", op, err)
				}
				must(t, m.Close())
			})
		})
	}
}

// TestRaw: Raw returns values as valid JSON, not decoded.
func TestRaw(t *testing.T) {
	eachStore(t, func(t *testing.T, m *task.Manager, _ task.Persistence) {
		op := submit(t, m, func(context.Context, func(int)) (any, error) { return []int{1, 2}, nil },
			task.WithMetadata(map[string]int{"b": 1, "a": 2}))
		wait(t, m, op.ID)
		none := submit(t, m, nothing)
		wait(t, m, none.ID)
		byList, err := m.Raw().List(10, 0)
		must(t, err)
		byWait, err := m.Raw().Wait(t.Context(), op.ID)
		must(t, err)
		for _, got := range []*task.Operation{byList[1], byWait} {
			metadata, _ := got.Metadata.(json.RawMessage)
			result, _ := got.Result.(json.RawMessage)
			if string(metadata) != `{"a":2,"b":1}` || string(result) != `[1,2]` {
				t.Errorf("metadata %T %v, result %T %v", got.Metadata, got.Metadata, got.Result, got.Result)
			}
		}
		if got := byList[0]; got.ID != none.ID || got.Metadata != nil || got.Result != nil {
			t.Errorf("without values: %+v", got)
		}
		if op, err := m.Raw().Wait(t.Context(), "unknown"); op != nil || !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Wait for an unknown operation: %v, %v", op, err)
		}
	})
}

// TestRawForeign: a value that other code has stored is valid JSON in valid UTF-8, or nil.
func TestRawForeign(t *testing.T) {
	for cell, want := range map[string]any{
		`CAST(x'22FF22' AS TEXT)`: json.RawMessage(`"` + "\uFFFD" + `"`),
		`'{"a": '`:                nil,
		`'null'`:                  nil,
		`5`:                       json.RawMessage(`5`),
		`' [1] '`:                 json.RawMessage(` [1] `),
	} {
		path := testkit.Path(t)
		m := newManager(t, openSQLite(t, path))
		sqliteExec(t, path, `INSERT INTO tasks (id, name, state, result) VALUES ('1', 'foreign', 'DONE', `+cell+`)`)
		op, err := m.Raw().Wait(t.Context(), "1")
		must(t, err)
		if !reflect.DeepEqual(op.Result, want) {
			t.Errorf("%s: %T %s, want %s", cell, op.Result, op.Result, want)
		}
	}
}

// TestRawInvalid: a value of a store that is invalid JSON is nil.
func TestRawInvalid(t *testing.T) {
	db := task.NewMemoryStore()
	must(t, db.Save(&task.Operation{ID: "1", Name: "n", State: task.StateDone, Metadata: json.RawMessage(`{"a":`), Result: json.RawMessage(`1`)}))
	ops, err := newManager(t, db).Raw().List(10, 0)
	must(t, err)
	if ops[0].Metadata != nil || !reflect.DeepEqual(ops[0].Result, json.RawMessage(`1`)) {
		t.Errorf("metadata %v, result %v", ops[0].Metadata, ops[0].Result)
	}
}
