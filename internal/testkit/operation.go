package testkit

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"

	"github.com/mynt-nas/task"
)

// JSON returns an operation as JSON, or the error's text. Two operations with the same
// JSON show the same. It omits the Owner, because a manager does not know the Owner
// that a store with four methods keeps, and WaitsFor, which is not stored.
func JSON(op *task.Operation) string {
	c := *op
	c.Owner, c.WaitsFor = "", ""
	raw, err := json.Marshal(&c)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// Same reports whether two operations show the same, apart from their times.
func Same(a, b task.Operation) bool {
	a.CreatedAt, a.StartedAt, a.UpdatedAt = b.CreatedAt, b.StartedAt, b.UpdatedAt
	return JSON(&a) == JSON(&b)
}

// WantSame checks that an operation shows the same as another one, whatever the layout
// of its JSON.
func WantSame(t testing.TB, how string, op *task.Operation, want task.Operation) {
	t.Helper()
	if got := shown(op); !reflect.DeepEqual(got, shown(&want)) {
		t.Errorf("%s: got %#v\nwant %#v", how, got, shown(&want))
	}
}

// shown returns everything that an operation shows, with its JSON parsed.
func shown(op *task.Operation) task.Operation {
	parsed := func(v any) any {
		if raw, ok := v.(json.RawMessage); ok {
			return Parsed(raw)
		}
		return v
	}
	return task.Operation{ID: op.ID, Name: op.Name, State: op.State, Progress: op.Progress, Metadata: parsed(op.Metadata),
		Message: op.Message, Cancelling: op.Cancelling, Result: parsed(op.Result), Error: op.Error, CreatedAt: op.CreatedAt, StartedAt: op.StartedAt, UpdatedAt: op.UpdatedAt}
}

// Parsed returns the value of a json.RawMessage, or nil if that is invalid JSON.
func Parsed(v any) any {
	raw, _ := v.(json.RawMessage)
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var parsed any
	if !json.Valid(raw) || d.Decode(&parsed) != nil {
		return nil
	}
	return parsed
}

// Received decodes an operation as a client does.
func Received(t testing.TB, raw []byte) (op task.Operation) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&op); err != nil {
		t.Errorf("a client can't read it: %v: %.100q", err, raw)
	}
	return op
}

// Deep returns n nested lists.
func Deep(n int) any {
	var v any = "bottom"
	for range n {
		v = []any{v}
	}
	return v
}

// A PanicJSON can't be encoded: its MarshalJSON panics.
type PanicJSON struct{}

// MarshalJSON implements [json.Marshaler].
func (PanicJSON) MarshalJSON() ([]byte, error) { panic("no JSON today") }
