package modeltest

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// FuzzRoundTrip stores arbitrary values. Reading them gives the result of a round trip
// through JSON, before a restart and after it.
func FuzzRoundTrip(f *testing.F) {
	for _, name := range []string{"", "plain", "\x00", "a\xffb", "日本語 🎉\n", "'; DROP TABLE tasks; --", strings.Repeat("long", 1000)} {
		f.Add(name, "", []byte(nil), []byte(nil), []byte(nil), name)
	}
	for kind := range byte(valueKinds) {
		v := []byte{kind, 3, 'a', 0xff, 'b', 1, 2, 3, 4, 5, 6, 7, 8}
		f.Add("kind", "key", v, []byte(nil), v, "")
		f.Add("nested", "", []byte(nil), append([]byte{valueList, 2}, v...), append([]byte{valueMap, 2}, v...), "error")
	}
	for _, raw := range []string{"null", " null ", "{", `{"a":1,"a":2}`, "1e999", "\"\\ud800\"", "\"\xff\"", `"<>&\u2028"`, "[1,2.50]", "{}{}", " 7 ", "-0", `{"":{"":[]}}`, "\"\x00\""} {
		v := append([]byte{valueRaw, byte(len(raw))}, raw...)
		f.Add("raw", "", v, v, v, "")
	}
	for _, hundreds := range []byte{2, 101} { // the latter deeper than JSON can be read
		v := []byte{valueDeep, hundreds, 0}
		f.Add("deep", "", []byte(nil), v, v, "")
	}

	// All rounds open and close the same file, because creating one takes long.
	path := testkit.FastPath(f)
	f.Fuzz(func(t *testing.T, name, key string, metadata, change, result []byte, failure string) {
		r := &fuzzRound{name: name, key: key, metadata: decodeValue(metadata), result: decodeValue(result), failure: failure}
		if len(change) > 0 {
			r.change = []any{decodeValue(change)}
		}
		memory := task.NewMemoryStore()
		r.check(t, func() (task.Persistence, func() error) { return memory, func() error { return nil } })
		r.check(t, func() (task.Persistence, func() error) {
			s, err := task.OpenSQLite(path)
			testkit.Must(t, err)
			return s, s.Close
		})
	})
}

type fuzzRound struct {
	name, key        string
	metadata, result any
	change           []any // one for SetMetadata, if any
	failure          string
}

func (r *fuzzRound) check(t *testing.T, open func() (task.Persistence, func() error)) {
	db, closeDB := open()
	m, err := task.New(db, testkit.Quiet)
	testkit.Must(t, err)
	id, want := r.run(t, m)
	if id == "" {
		if page, err := m.List(1, 0); err != nil || len(page) > 0 && page[0].Name == r.name && r.name == "" {
			t.Errorf("List: %v, %v", page, err)
		}
		testkit.Must(t, errors.Join(m.Close(), closeDB()))
		return
	}
	waited, err := m.Wait(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	want.ID, want.CreatedAt, want.StartedAt, want.UpdatedAt = id, waited.CreatedAt, waited.StartedAt, waited.UpdatedAt
	r.same(t, "Wait", waited, want)
	r.read(t, "before the restart", m, want)
	testkit.Must(t, m.Close())
	r.read(t, "after Close", m, want)
	testkit.Must(t, closeDB())

	db, closeDB = open()
	m, err = task.New(db, testkit.Quiet)
	testkit.Must(t, err)
	r.read(t, "after the restart", m, want)
	testkit.Must(t, errors.Join(m.Close(), closeDB()))
}

// run submits an operation, and returns its ID and the expected values, or "" if it was
// rightly refused.
func (r *fuzzRound) run(t *testing.T, m *task.Manager) (id string, want task.Operation) {
	t.Helper()
	metadata, badMetadata := valueAsRead(r.metadata)
	result, badResult := valueAsRead(r.result)
	want = task.Operation{Name: strings.ToValidUTF8(r.name, "\uFFFD"), State: task.StateDone, Progress: 100, Metadata: metadata, Result: result}
	if r.failure != "" {
		want.State, want.Progress, want.Error = task.StateFailed, 0, strings.ToValidUTF8(r.failure, "\uFFFD")
	}
	if badResult {
		want.Error += "…result not kept: "
	}

	opts := []task.SubmitOption{task.WithMetadata(r.metadata)}
	if r.key != "" {
		opts = append(opts, task.WithLock(r.key))
	}
	op, err := m.Submit(r.name, func(ctx context.Context, _ func(int)) (any, error) {
		for _, v := range r.change {
			changed, bad := valueAsRead(v)
			if err := task.SetMetadata(ctx, v); (err != nil) != bad || bad && !strings.Contains(err.Error(), "metadata") {
				t.Errorf("SetMetadata: %v", err)
			}
			if !bad {
				want.Metadata = changed
			}
		}
		if r.failure != "" {
			return r.result, errors.New(r.failure)
		}
		return r.result, nil
	}, opts...)
	if err != nil {
		if refused := err.Error(); op != nil || r.name == "" && !strings.Contains(refused, "name is empty") ||
			r.name != "" && !(badMetadata && strings.Contains(refused, "metadata: ")) {
			t.Errorf("Submit: %v, %v", op, err)
		}
		return "", want
	}
	if r.name == "" || badMetadata {
		t.Errorf("Submit took the name %q and the metadata %#v", r.name, r.metadata)
	}
	if _, err := m.Wait(context.Background(), op.ID); err != nil {
		t.Fatal(err)
	}
	return op.ID, want
}

func (r *fuzzRound) read(t *testing.T, when string, m *task.Manager, want task.Operation) {
	t.Helper()
	op, ok := m.Get(want.ID)
	if !ok {
		t.Fatalf("%s: Get doesn't find it", when)
	}
	r.same(t, when+": Get", op, want)
	page, err := m.List(1, 0)
	if err != nil || len(page) != 1 {
		t.Fatalf("%s: List: %v, %v", when, page, err)
	}
	r.same(t, when+": List", page[0], want)
}

func (r *fuzzRound) same(t *testing.T, how string, op *task.Operation, want task.Operation) {
	t.Helper()
	got := *op
	if before, after, ok := strings.Cut(want.Error, "…"); ok {
		if !strings.HasPrefix(got.Error, before) || !strings.Contains(got.Error, after) {
			t.Errorf("%s: error %q, want %q", how, got.Error, want.Error)
		}
		want.Error = got.Error
	}
	testkit.WantSame(t, how, &got, want)
	if !utf8.ValidString(got.Name) || !utf8.ValidString(got.Error) {
		t.Errorf("%s: not UTF-8: %+v", how, got)
	}
	raw, err := json.Marshal(op)
	if err != nil || !utf8.Valid(raw) {
		t.Fatalf("%s: %v", how, err)
	}
	testkit.Received(t, raw)
	for what, decode := range map[*any]func(any) error{&want.Result: op.DecodeResult, &want.Metadata: op.DecodeMetadata} {
		var raw json.RawMessage
		if err := decode(&raw); err != nil || !reflect.DeepEqual(testkit.Parsed(raw), *what) {
			t.Errorf("%s: decoded as %s, %v, want %#v", how, raw, err, *what)
		}
	}
}

// valueAsRead returns the value that should be read, and whether JSON can't hold it.
func valueAsRead(v any) (read any, bad bool) {
	defer func() {
		if recover() != nil {
			read, bad = nil, true
		}
	}()
	raw, err := json.Marshal(v)
	if err != nil || !json.Valid(raw) {
		return nil, true
	}
	return testkit.Parsed(json.RawMessage(raw)), false
}

// The kinds of Go values that decodeValue makes.
const (
	valueNil = iota
	valueBool
	valueInt
	valueUint
	valueFloat
	valueString
	valueBytes
	valueList
	valueMap
	valueIntMap
	valueStruct
	valuePointer
	valueNilPointer
	valueRaw
	valueNumber
	valueTime
	valueMarshaler
	valuePanic
	valueError
	valueChan
	valueFunc
	valueComplex
	valueCycle
	valueDeep
	valueKinds
)

// decodeValue decodes bytes to a Go value, which JSON can hold or not.
func decodeValue(data []byte) any {
	r := &byteReader{data}
	return r.value(8)
}

func (r *byteReader) uint64() (n uint64) {
	for range 8 {
		n = n<<8 | uint64(r.byte())
	}
	return n
}

type (
	valueStructs struct {
		A any            `json:"a"`
		B string         `json:"b,omitempty"`
		C *valueStructs  `json:",omitempty"`
		D float32        `json:"d,string"`
		E map[string]any `json:"-"`
		f int
	}
	valueMarshal struct{ raw []byte }
)

func (m valueMarshal) MarshalJSON() ([]byte, error) { return m.raw, nil }

func (r *byteReader) value(depth int) any {
	kind := r.byte() % valueKinds
	if depth == 0 && (kind == valueList || kind == valueMap || kind == valueStruct || kind == valuePointer) {
		kind = valueInt
	}
	switch kind {
	case valueBool:
		return r.byte()%2 == 1
	case valueInt:
		return int64(r.uint64())
	case valueUint:
		return r.uint64()
	case valueFloat:
		return math.Float64frombits(r.uint64())
	case valueString:
		return string(r.bytes())
	case valueBytes:
		return r.bytes()
	case valueList:
		list := make([]any, 0, 4)
		for range r.byte() % 8 {
			list = append(list, r.value(depth-1))
		}
		return list
	case valueMap:
		m := map[string]any{}
		for range r.byte() % 8 {
			m[string(r.bytes())] = r.value(depth - 1)
		}
		return m
	case valueIntMap:
		return map[int8]string{int8(r.byte()): string(r.bytes()), int8(r.byte()): "x"}
	case valueStruct:
		return valueStructs{A: r.value(depth - 1), B: string(r.bytes()), C: &valueStructs{D: float32(r.byte()) / 3}, f: 1}
	case valuePointer:
		v := r.value(depth - 1)
		return &v
	case valueNilPointer:
		return (*int)(nil)
	default:
		return r.oddValue(kind)
	}
}

// oddValue makes values that encode themselves or can't be encoded.
func (r *byteReader) oddValue(kind byte) any {
	switch kind {
	case valueRaw:
		return json.RawMessage(r.bytes())
	case valueNumber:
		return json.Number(r.bytes())
	case valueTime:
		return time.Unix(int64(r.uint64()), 0).UTC()
	case valueMarshaler:
		return valueMarshal{r.bytes()}
	case valuePanic:
		return []any{1, testkit.PanicJSON{}}
	case valueError:
		return errors.New(string(r.bytes()))
	case valueChan:
		return make(chan int)
	case valueFunc:
		return func() {}
	case valueComplex:
		return complex(1, float64(r.byte()))
	case valueCycle:
		m := map[string]any{"k": string(r.bytes())}
		m["self"] = m
		return m
	case valueDeep:
		return testkit.Deep(100*int(r.byte()) + int(r.byte()) - 10)
	default:
		return nil
	}
}
