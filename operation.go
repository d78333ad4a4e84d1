package task

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// An Operation is a snapshot of a long-running operation: a plain value that later
// changes don't affect, and that its holder may modify. It may be passed between
// goroutines like any other value.
type Operation struct {
	ID       string `json:"id"` // a version 7 UUID, or the ID given with WithID
	Name     string `json:"name"`
	State    State  `json:"state"`
	Progress int    `json:"progress"`          // percent, 0..100; 100 once DONE
	Message  string `json:"message,omitempty"` // what it is doing, in words

	// Metadata and Result are values that have made a round trip through JSON: nil,
	// bool, string, json.Number, []any or map[string]any. They are the same right after
	// the finish as after a restart. DecodeMetadata and DecodeResult give typed access.
	Metadata interface{} `json:"metadata,omitempty"`
	Result   interface{} `json:"result,omitempty"`

	// Error is the text of the error that the function returned, or says what else went
	// wrong. An unfinished operation has one only while its final state can't be stored:
	// it then says which state, and why.
	Error string `json:"error,omitempty"`

	// The times are in UTC, to the microsecond. StartedAt and UpdatedAt are wall clock
	// times, but never earlier than CreatedAt plus the time that has passed on the
	// monotonic clock: setting the clock back makes no duration negative.
	CreatedAt time.Time `json:"created_at"`
	StartedAt time.Time `json:"started_at,omitzero"` // zero if it never started
	UpdatedAt time.Time `json:"updated_at"`          // the finish time, once finished

	// Owner identifies who runs the operation, or ran it: the ID of its manager's store,
	// or of the manager itself if the store has none.
	Owner string `json:"owner,omitempty"`

	// Cancelling is true from a cancel request until the final state.
	Cancelling bool `json:"cancelling,omitempty"`

	// WaitsFor is the ID of the operation that holds the key (see [WithLock]) for which a
	// PENDING operation of this manager waits: the first of its keys that another
	// operation holds. It is empty if the operation waits only for a free slot. It is not
	// stored, and changes that Watch yields do not have it.
	WaitsFor string `json:"waits_for,omitempty"`

	manager *Manager // nil if the operation does not come from a manager
}

// Cancel does what [Manager.Cancel] does with op.ID.
func (op *Operation) Cancel() error {
	if op == nil || op.manager == nil {
		return errors.New("task: cancel: the operation did not come from a Manager")
	}
	return op.manager.Cancel(op.ID)
}

// Interrupted reports whether the operation is FAILED because its process or its
// manager ended, so that it is unknown how far the function got. It looks at the
// beginning of Error: a function should not return an error with such a text.
func (op *Operation) Interrupted() bool {
	return op.State == StateFailed && (strings.HasPrefix(op.Error, errTextRestart) || strings.HasPrefix(op.Error, errTextShutdown))
}

// saved reports whether row was stored by a Save of op, and does not belong to another
// operation with the same ID. The store may not keep the Owner.
func (op *Operation) saved(row *Operation) bool {
	return row.CreatedAt.Equal(op.CreatedAt) && (row.Owner == op.Owner || row.Owner == "")
}

// DecodeResult decodes the result into the value that v points to, as
// [json.Unmarshal] does, and returns its error. A missing result is decoded as null; an
// [Omitted] is an error.
func (op *Operation) DecodeResult(v any) error {
	return convert(op.Result, v)
}

// DecodeMetadata is DecodeResult for the metadata.
func (op *Operation) DecodeMetadata(v any) error {
	return convert(op.Metadata, v)
}

func convert(from, to any) error {
	raw, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, to)
}

// maxValue is the maximum length of metadata and results as JSON, in bytes.
const maxValue = 16 << 20

// valueBytes returns the total length of the encoded metadata and result, in bytes.
func (op *Operation) valueBytes() int {
	metadata, _ := op.Metadata.(json.RawMessage)
	result, _ := op.Result.(json.RawMessage)
	return len(metadata) + len(result)
}

// encode is marshal for a new value: it returns an error if the JSON is too long.
func encode(v any) (any, error) {
	value, err := marshal(v)
	if raw, _ := value.(json.RawMessage); len(raw) > maxValue {
		return nil, fmt.Errorf("%T takes %d bytes as JSON: more than %d are not kept", v, len(raw), maxValue)
	}
	return value, err
}

// marshal returns v as a json.RawMessage, or nil if its JSON is null. It returns an
// error for a value that can't make the round trip, and if MarshalJSON or its error panics.
func marshal(v any) (value any, err error) {
	if v == nil {
		return nil, nil
	}
	defer func() {
		if r := recover(); r != nil {
			value, err = nil, fmt.Errorf("encoding %T as JSON: panic: %s", v, printed(r))
		}
	}()
	raw, err := json.Marshal(v)
	switch {
	case err != nil:
		_ = err.Error() // user code: if it panics, then here
		return nil, err
	case !json.Valid(raw): // Marshal writes deeper nesting than Unmarshal reads
		return nil, fmt.Errorf("encoding %T as JSON: nested too deeply", v)
	case string(raw) == "null":
		return nil, nil
	}
	return json.RawMessage(raw), nil
}

// decode is the other half of the round trip. Invalid JSON decodes as nil: a bad cell
// in a database must not hide the rest of its row.
func decode(raw json.RawMessage) (v any) {
	if !bytes.ContainsAny(raw, "0123456789") { // no numbers: twice as fast
		_ = json.Unmarshal(raw, &v)
		return v
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if d.Decode(&v) != nil || len(bytes.TrimLeft(raw[d.InputOffset():], " \t\r\n")) > 0 {
		return nil
	}
	return v
}

// roundTrip returns a copy of v that has made a round trip through JSON.
func roundTrip(v any) any {
	if v == nil { // the usual case; a decoder takes a microsecond
		return nil
	}
	if _, ok := v.(Omitted); ok {
		return v
	}
	return decode(rawJSON(v))
}

// stored returns a value of an operation as passed to stores: nil or a
// json.RawMessage. A json.RawMessage is encoded already.
func stored(v any) (any, error) {
	if raw, ok := v.(json.RawMessage); ok && len(raw) > 0 {
		return raw, nil
	} else if ok {
		return nil, nil
	}
	return marshal(v)
}

// rawJSON returns a value of an operation as JSON, or nil if there is none.
func rawJSON(v any) json.RawMessage {
	value, _ := stored(v)
	raw, _ := value.(json.RawMessage)
	return raw
}

// An Omitted stands for metadata or a result that a list has left out: see [MaxValue].
// It is the length of the value's JSON in bytes.
type Omitted int

// MarshalJSON returns an error: an omitted value can't be encoded or stored.
func (o Omitted) MarshalJSON() ([]byte, error) {
	return nil, fmt.Errorf("a value of %d bytes was left out of the list", int(o))
}

// bound replaces metadata and a result of more than max bytes by an Omitted, unless max
// is 0.
func (op *Operation) bound(max int) {
	for _, v := range []*any{&op.Metadata, &op.Result} {
		if raw, ok := (*v).(json.RawMessage); ok && max > 0 && len(raw) > max {
			*v = Omitted(len(raw))
		}
	}
}

// rawValue returns a value of an operation in the form of [Raw].
func rawValue(v any) any {
	if _, ok := v.(Omitted); ok {
		return v
	}
	raw := rawJSON(v)
	if !json.Valid(raw) {
		return nil
	}
	if !utf8.Valid(raw) { // only within strings
		return json.RawMessage(bytes.ToValidUTF8(raw, []byte("\uFFFD")))
	}
	return raw
}

// values returns Metadata and Result as passed to stores.
func (op *Operation) values() (metadata, result any, err error) {
	if metadata, err = stored(op.Metadata); err != nil {
		return nil, nil, fmt.Errorf("metadata: %w", err)
	}
	if result, err = stored(op.Result); err != nil {
		return nil, nil, fmt.Errorf("result: %w", err)
	}
	return metadata, result, nil
}

// encode replaces Metadata and Result by their form for stores.
func (op *Operation) encode() (err error) {
	op.Metadata, op.Result, err = op.values()
	return err
}

// validUTF8 replaces invalid UTF-8, which a database and JSON return differently.
func validUTF8(s string) string {
	return strings.ToValidUTF8(s, "\uFFFD")
}

// contextKey is the key of a running in the context of a Func.
type contextKey struct{}

// FromContext returns a snapshot of the operation whose [Func] received ctx, or a
// context derived from it. It reports false for any other context.
func FromContext(ctx context.Context) (*Operation, bool) {
	r, ok := ctx.Value(contextKey{}).(running)
	if !ok {
		return nil, false
	}
	return r.snapshot(), true
}

// inFunc calls f for the Func that received ctx. what describes f in errors.
func inFunc(ctx context.Context, what string, f func(r running) error) error {
	r, ok := ctx.Value(contextKey{}).(running)
	if !ok {
		return fmt.Errorf("task: %s: the context is not that of an operation", what)
	}
	return wrap(f(r), "%s of %s", what, r.t.id)
}

// errReturned is the error of changing an operation after its function has returned.
var errReturned = errors.New("its function has returned")

// Checkpoint stores the present progress, message and metadata of the operation whose
// [Func] received ctx, and returns once they are committed. Before and after a step that
// must not happen twice, a function records that in its metadata and calls Checkpoint:
// if the process dies, the operation is found RUNNING with that metadata. While the store
// fails, Checkpoint retries.
//
// If ctx is done first, Checkpoint returns its cause. It returns an error if ctx is not
// the context of a Func, if the function returns meanwhile, or if the operation has been
// deleted, which wraps [ErrNotFound]. To store something after ctx is done, pass
// [context.WithoutCancel] of it with a timeout: otherwise, while the store fails, the
// function waits for the store, and Close for the function.
func Checkpoint(ctx context.Context) error {
	return inFunc(ctx, "checkpoint", func(r running) error {
		select {
		case err := <-r.checkpoint():
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
}

// SetMetadata replaces the metadata of the operation whose [Func] received ctx. Like
// progress, it is visible at once and stored soon after; see [Checkpoint]. SetMetadata
// returns an error if ctx is not the context of a Func, if JSON can't hold v in 16 MiB,
// or if the function has returned.
func SetMetadata(ctx context.Context, v any) error {
	return inFunc(ctx, "set metadata", func(r running) error {
		metadata, err := encode(v)
		if err != nil {
			return err
		}
		return r.change(func(op *Operation) bool { op.Metadata = metadata; return true })
	})
}

// maxMessage is the maximum length of a message, in characters.
const maxMessage = 1000

// SetMessage sets the [Operation.Message] of the operation whose [Func] received ctx:
// what it is doing, in words, such as the name of the current file. Like progress, the
// message is visible at once and stored soon after. At most 1,000 characters are kept,
// and an unchanged text does nothing. A FAILED or CANCELLED operation keeps its last
// message; DONE clears it. SetMessage never waits for the database. It returns an error
// if ctx is not the context of a Func, or if the function has returned.
func SetMessage(ctx context.Context, text string) error {
	text = validUTF8(text)
	if len(text) > maxMessage {
		runes := []rune(text)
		text = string(runes[:min(len(runes), maxMessage)])
	}
	return inFunc(ctx, "set message", func(r running) error {
		return r.change(func(op *Operation) (changed bool) {
			changed = op.Message != text
			op.Message = text
			return changed
		})
	})
}
