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

// An Operation is a snapshot of one long-running piece of work: a plain value
// that later changes of the operation don't affect, and that its holder may
// modify. It may be passed between goroutines like any other value.
type Operation struct {
	ID       string `json:"id"` // a UUID, version 7, or what WithID gave
	Name     string `json:"name"`
	State    State  `json:"state"`
	Progress int    `json:"progress"`          // percent, 0..100; 100 once DONE
	Message  string `json:"message,omitempty"` // what it is doing, in words

	// Metadata and Result are what a round trip through JSON gives: nil, bool,
	// string, json.Number, []any or map[string]any, the same just after the
	// finish as after a restart. DecodeMetadata and DecodeResult give typed
	// access.
	Metadata interface{} `json:"metadata,omitempty"`
	Result   interface{} `json:"result,omitempty"`

	// Error is the text of the error that the function returned, or says what
	// else went wrong. An unfinished operation has one only while its final
	// state can't be stored; it then says which state and why.
	Error string `json:"error,omitempty"`

	// The times are in UTC, to the microsecond. StartedAt and UpdatedAt are
	// those of the wall clock, but never earlier than CreatedAt plus the time
	// that has passed on the monotonic clock: no duration is negative because
	// somebody has set the clock back.
	CreatedAt time.Time `json:"created_at"`
	StartedAt time.Time `json:"started_at,omitzero"` // zero if it never started
	UpdatedAt time.Time `json:"updated_at"`          // the finish time, once finished

	// Owner is who runs it, or has run it: the ID of the store by which it was
	// submitted, or that of the manager, if the store has none.
	Owner string `json:"owner,omitempty"`

	// Cancelling says that somebody has asked for its cancellation, and that its
	// final state is yet to come.
	Cancelling bool `json:"cancelling,omitempty"`

	// WaitsFor is the ID of the operation that holds the key (see [WithLock])
	// which a PENDING one of this process waits for: the first of its keys that
	// another holds. It is empty for one that only waits for a free slot. It is
	// not stored, and the changes that Watch yields do not have it.
	WaitsFor string `json:"waits_for,omitempty"`

	manager *Manager // nil if the operation did not come from one
}

// Cancel does what [Manager.Cancel] does with op.ID.
func (op *Operation) Cancel() error {
	if op == nil || op.manager == nil {
		return errors.New("task: cancel: the operation did not come from a Manager")
	}
	return op.manager.Cancel(op.ID)
}

// Interrupted reports whether the operation is FAILED because its process or its
// manager ended: nobody knows how far its function got. Error says so, and that
// is what Interrupted looks at; a function should not return an error with such
// a text.
func (op *Operation) Interrupted() bool {
	return op.State == StateFailed && (strings.HasPrefix(op.Error, errTextRestart) || strings.HasPrefix(op.Error, errTextShutdown))
}

// saved reports whether row is what a Save of op has stored, and not another
// operation with the same ID. The store may have no place for an Owner.
func (op *Operation) saved(row *Operation) bool {
	return row.CreatedAt.Equal(op.CreatedAt) && (row.Owner == op.Owner || row.Owner == "")
}

// DecodeResult stores the result in the value that v points to, by the rules
// of [json.Unmarshal]. A missing result is decoded as JSON's null.
func (op *Operation) DecodeResult(v any) error {
	return convert(op.Result, v)
}

// DecodeMetadata does for the metadata what DecodeResult does for the result.
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

// maxValue is how long metadata and results may be as JSON.
const maxValue = 16 << 20

// valueBytes returns how many bytes the encoded metadata and result have.
func (op *Operation) valueBytes() int {
	metadata, _ := op.Metadata.(json.RawMessage)
	result, _ := op.Result.(json.RawMessage)
	return len(metadata) + len(result)
}

// encode is marshal for a new value: one that is too long is an error.
func encode(v any) (any, error) {
	value, err := marshal(v)
	if raw, _ := value.(json.RawMessage); len(raw) > maxValue {
		return nil, fmt.Errorf("%T takes %d bytes as JSON: more than %d are not kept", v, len(raw), maxValue)
	}
	return value, err
}

// marshal returns v as a json.RawMessage, or nil for what JSON calls null. It
// returns an error for a value that can't make the round trip, also when
// MarshalJSON panics.
func marshal(v any) (value any, err error) {
	if v == nil {
		return nil, nil
	}
	defer func() {
		if r := recover(); r != nil {
			value, err = nil, fmt.Errorf("encoding %T as JSON: panic: %v", v, r)
		}
	}()
	raw, err := json.Marshal(v)
	switch {
	case err != nil:
		return nil, err
	case !json.Valid(raw): // Marshal nests deeper than Unmarshal reads
		return nil, fmt.Errorf("encoding %T as JSON: nested too deeply", v)
	case string(raw) == "null":
		return nil, nil
	}
	return json.RawMessage(raw), nil
}

// decode is the other half of the round trip. Invalid JSON decodes as nil: a
// bad cell in a database must not hide the rest of the row.
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

// roundTrip returns a copy of v, as JSON makes it.
func roundTrip(v any) any {
	if v == nil { // most often, and a decoder takes a microsecond
		return nil
	}
	if _, ok := v.(Omitted); ok {
		return v
	}
	return decode(rawJSON(v))
}

// stored returns a value of an operation as stores are given it: nil or a
// json.RawMessage, which is encoded already.
func stored(v any) (any, error) {
	if raw, ok := v.(json.RawMessage); ok && len(raw) > 0 {
		return raw, nil
	} else if ok {
		return nil, nil
	}
	return marshal(v)
}

// rawJSON returns a value of an operation as JSON, nil for none.
func rawJSON(v any) json.RawMessage {
	value, _ := stored(v)
	raw, _ := value.(json.RawMessage)
	return raw
}

// An Omitted stands for metadata or a result that was left out of a list: see
// [MaxValue]. It is the length of the value's JSON in bytes.
type Omitted int

// MarshalJSON returns an error: what was left out can't be encoded, nor be
// stored again.
func (o Omitted) MarshalJSON() ([]byte, error) {
	return nil, fmt.Errorf("a value of %d bytes was left out of the list", int(o))
}

// bound puts an Omitted in the place of metadata and a result of more than max
// bytes, unless max is 0.
func (op *Operation) bound(max int) {
	for _, v := range []*any{&op.Metadata, &op.Result} {
		if raw, ok := (*v).(json.RawMessage); ok && max > 0 && len(raw) > max {
			*v = Omitted(len(raw))
		}
	}
}

// rawValue returns a value of an operation as [Raw] does.
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

// values returns Metadata and Result as stores are given them.
func (op *Operation) values() (metadata, result any, err error) {
	if metadata, err = stored(op.Metadata); err != nil {
		return nil, nil, fmt.Errorf("metadata: %w", err)
	}
	if result, err = stored(op.Result); err != nil {
		return nil, nil, fmt.Errorf("result: %w", err)
	}
	return metadata, result, nil
}

// encode turns Metadata and Result into what stores are given.
func (op *Operation) encode() (err error) {
	op.Metadata, op.Result, err = op.values()
	return err
}

// validUTF8 replaces what a database and JSON would not both return as it is.
func validUTF8(s string) string {
	return strings.ToValidUTF8(s, "\uFFFD")
}

// contextKey finds the running of a Func in its context.
type contextKey struct{}

// FromContext returns a snapshot of the operation whose [Func] was given ctx,
// or a context derived from it. It reports false for any other context.
func FromContext(ctx context.Context) (*Operation, bool) {
	r, ok := ctx.Value(contextKey{}).(running)
	if !ok {
		return nil, false
	}
	return r.snapshot(), true
}

// inFunc calls f for the Func that was given ctx. What says what f does.
func inFunc(ctx context.Context, what string, f func(r running) error) error {
	r, ok := ctx.Value(contextKey{}).(running)
	if !ok {
		return fmt.Errorf("task: %s: the context is not that of an operation", what)
	}
	return wrap(f(r), "%s of %s", what, r.t.id)
}

// errReturned is why a function's context is of no use any more.
var errReturned = errors.New("its function has returned")

// Checkpoint stores the progress, message and metadata of the operation whose [Func] was
// given ctx, as they are now, and returns once they are committed: a function
// that is about to do what must not be done twice, or has done it, notes that
// in its metadata and calls Checkpoint. The operation is then found as RUNNING
// with them, should the process die. While the store fails it is tried again.
//
// Checkpoint returns the cause of ctx's end if that comes first, and an error
// if ctx is no such context, if the function returns meanwhile, or if the
// operation has been deleted, which wraps [ErrNotFound]. To store something
// after ctx has ended, pass [context.WithoutCancel] of it, with a timeout: while
// the store fails, the function would wait, and Close for the function.
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

// SetMetadata replaces the metadata of the operation whose [Func] was given
// ctx. Like progress it is seen at once and stored soon after; see [Checkpoint].
// It returns an error if ctx is no such context, if JSON can't hold v in 16 MiB,
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

// maxMessage is how many characters of a message are kept.
const maxMessage = 1000

// SetMessage says in words what the operation whose [Func] was given ctx is
// doing, such as the name of the file it is at: [Operation.Message]. Like progress
// it is seen at once and stored soon after, at most 1,000 characters of it, and
// an unchanged text does nothing. The last message stays with a FAILED or
// CANCELLED operation, as what it was doing; DONE clears it. SetMessage never
// waits for the database. It returns an error if ctx is no such context, or if the
// function has returned.
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
