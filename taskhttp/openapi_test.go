package taskhttp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskhttp"
)

// A document is the part of openapi.json that the tests check.
type document struct {
	Paths      map[string]map[string]json.RawMessage
	Components map[string]map[string]json.RawMessage
}

type operationDoc struct {
	Parameters []parameterDoc
	Responses  map[string]responseDoc
}

type parameterDoc struct {
	Ref      string `json:"$ref"`
	Name, In string
}

type responseDoc struct {
	Ref     string `json:"$ref"`
	Content map[string]struct{ Schema json.RawMessage }
}

func readDocument(t *testing.T) *document {
	t.Helper()
	raw, err := os.ReadFile("openapi.json")
	must(t, err)
	var d document
	must(t, json.Unmarshal(raw, &d))
	return &d
}

// lookup stores the target of a reference in v.
func (d *document) lookup(ref string, v any) error {
	parts := strings.Split(ref, "/")
	if len(parts) != 4 || parts[0] != "#" || parts[1] != "components" || d.Components[parts[2]][parts[3]] == nil {
		return fmt.Errorf("%q refers to nothing", ref)
	}
	return json.Unmarshal(d.Components[parts[2]][parts[3]], v)
}

// operations returns the documented operations by "GET /path".
func (d *document) operations(t *testing.T) map[string]operationDoc {
	t.Helper()
	all := make(map[string]operationDoc)
	for path, item := range d.Paths {
		var shared []parameterDoc
		if raw := item["parameters"]; raw != nil {
			must(t, json.Unmarshal(raw, &shared))
		}
		for method, raw := range item {
			if method == "parameters" {
				continue
			}
			var op operationDoc
			must(t, json.Unmarshal(raw, &op))
			op.Parameters = append(op.Parameters, shared...)
			for i, p := range op.Parameters {
				if p.Ref != "" {
					must(t, d.lookup(p.Ref, &op.Parameters[i]))
				}
			}
			for code, r := range op.Responses {
				if r.Ref != "" {
					var full responseDoc
					must(t, d.lookup(r.Ref, &full))
					op.Responses[code] = full
				}
			}
			all[strings.ToUpper(method)+" "+path] = op
		}
	}
	return all
}

// TestOpenAPIRoutes: the document and the handler have the same paths, methods and
// parameters.
func TestOpenAPIRoutes(t *testing.T) {
	documented := readDocument(t).operations(t)
	routes := taskhttp.Routes()
	if got, want := slices.Sorted(maps.Keys(documented)), slices.Sorted(maps.Keys(routes)); !slices.Equal(got, want) {
		t.Errorf("documented:\n%q\nserved:\n%q", got, want)
	}
	for name, op := range documented {
		var query, path []string
		for _, p := range op.Parameters {
			switch p.In {
			case "query":
				query = append(query, p.Name)
			case "path":
				path = append(path, p.Name)
			case "header":
				used := strings.HasSuffix(name, "/events") && p.Name == "Last-Event-ID" ||
					(name == "GET /ui" || name == "GET /openapi.json") && p.Name == "If-None-Match"
				if !used {
					t.Errorf("%s: header %s", name, p.Name)
				}
			}
		}
		if !slices.Equal(query, routes[name]) {
			t.Errorf("%s: parameters %q are documented, %q are known", name, query, routes[name])
		}
		if strings.Contains(name, "{id}") != slices.Equal(path, []string{"id"}) {
			t.Errorf("%s: path parameters %q", name, path)
		}
	}
}

// TestOpenAPIResponses: the handler gives every documented response, and every response of
// the handler is as documented.
func TestOpenAPIResponses(t *testing.T) {
	d := readDocument(t)
	documented := d.operations(t)
	seen := make(map[string]bool)
	check := func(t *testing.T, operation string, answer *http.Response) {
		t.Helper()
		name := fmt.Sprint(operation, " ", answer.StatusCode)
		seen[name] = true
		response, ok := documented[operation].Responses[fmt.Sprint(answer.StatusCode)]
		if !ok {
			t.Errorf("%s is not documented", name)
			return
		}
		body, err := io.ReadAll(answer.Body)
		must(t, err)
		contentType, _, _ := mime.ParseMediaType(answer.Header.Get("Content-Type"))
		content, ok := response.Content[contentType]
		if !ok && (len(body) > 0 || len(response.Content) > 0) {
			t.Errorf("%s: content type %q, documented are %v", name, contentType, slices.Collect(maps.Keys(response.Content)))
		}
		if strings.HasSuffix(contentType, "json") {
			var v any
			must(t, json.Unmarshal(body, &v))
			for _, err := range d.validate(content.Schema, v) {
				t.Errorf("%s: %v in %s", name, err, body)
			}
		}
		if contentType == "text/event-stream" {
			d.checkEvents(t, name, string(body))
		}
	}
	synctest.Test(t, func(t *testing.T) { requestAll(t, check) })

	for name, op := range documented {
		for code := range op.Responses {
			if !seen[name+" "+code] {
				t.Errorf("%s: no response with the documented status %s", name, code)
			}
		}
	}
}

// requestAll makes requests that together produce every response of every operation.
func requestAll(t *testing.T, check func(t *testing.T, operation string, answer *http.Response)) {
	store := newBrokenStore()
	m, other := newManager(t, store), newManager(t, store)
	h := mountAgain(m)
	a := asker{newPipeSite(t, h), check}
	done := run(t, m, "done", map[string]any{"disks": 4}, nil).ID
	failed := run(t, m, "failed", []int{1}, errors.New("no")).ID
	a.ask("POST /{id}/again", failed, "")
	run(t, m, "big", strings.Repeat("x", 100_000), errors.New(strings.Repeat("x", 100_000)))
	live := newControlled(t, m, "live", task.WithMetadata("tank")).ID
	others := newControlled(t, other, "another's").ID
	synctest.Wait()

	store.setDeaf(true)
	a.ask("POST /{id}/cancel", others, "")
	store.setDeaf(false)
	a.askHealthy(done, live, others)
	other.Close()
	store.fail(true)
	for _, operation := range []string{"GET /", "GET /{id}", "GET /{id}/result", "GET /{id}/wait", "GET /{id}/events", "POST /{id}/cancel"} {
		a.ask(operation, done, "")
	}
	store.fail(false)
	a.ask("POST /{id}/cancel", live, "")

	time.AfterFunc(time.Second, func() {
		run(t, m, "later", nil, nil)
		newControlled(t, m, "stuck")
		synctest.Wait()
		store.fail(true)
		m.Close()
	})
	a.ask("GET /events", "", "", "Last-Event-ID", "nonsense") // reload, snapshot, operations, closed
	m.Close()
	a.ask("GET /events", "", "")
	for _, op := range list(t, store, m) {
		if !op.State.Finished() {
			a.ask("GET /{id}/wait", op.ID, "")
		}
	}
	a.ask("POST /{id}/again", done, "")

	// A wrapper of the handler hides Flush.
	a.site = newPipeSite(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(unflushable{w}, r) }))
	a.ask("GET /{id}/events", done, "")
	again := newManager(t, nil)
	defer again.Close()
	h = mount(again)
	a.ask("GET /events", "", "")
	a.askBare()
}

// askBare makes requests for which the store lacks an ability.
func (a asker) askBare() {
	bare := testkit.Bare(task.NewMemoryStore())
	m, other := newManager(a.t, bare), newManager(a.t, bare)
	defer other.Close()
	a.site = newPipeSite(a.t, mount(m))
	a.ask("POST /{id}/cancel", newControlled(a.t, other, "another's").ID, "")
	a.ask("POST /{id}/again", run(a.t, m, "done", nil, nil).ID, "")
}

// An asker makes requests to a site and checks the responses.
type asker struct {
	*site
	check func(t *testing.T, operation string, answer *http.Response)
}

func (a asker) ask(operation, id, query string, header ...string) {
	t := a.t.(*testing.T)
	t.Helper()
	method, path, _ := strings.Cut(operation, " ")
	r, err := http.NewRequest(method, a.url+strings.ReplaceAll(path, "{id}", id)+query, nil)
	must(t, err)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := a.client.Transport.RoundTrip(r) // does not follow redirects
	must(t, err)
	a.check(t, operation, answer)
	answer.Body.Close()
}

// askHealthy makes the requests that need a working store.
func (a asker) askHealthy(done, live, others string) {
	a.ask("GET /", "", "?state=DONE,FAILED&state=RUNNING&limit=2&name=")
	a.ask("GET /", "", "?limit=none")
	a.ask("GET /{id}", done, "")
	a.ask("GET /{id}", live, "")
	a.ask("GET /{id}", "nonsense", "")
	a.ask("GET /{id}/result", done, "")
	a.ask("GET /{id}/result", live, "")
	a.ask("GET /{id}/result", "nonsense", "")
	a.ask("GET /{id}/wait", done, "?timeout=1s")
	a.ask("GET /{id}/wait", live, "?timeout=1s")
	a.ask("GET /{id}/wait", live, "?timeout=soon")
	a.ask("GET /{id}/wait", "nonsense", "")
	a.ask("GET /{id}/events", done, "")
	a.ask("GET /{id}/events", done, "", "Last-Event-ID", "DONE")
	a.ask("GET /{id}/events", "nonsense", "")
	a.ask("POST /{id}/again", done, "")
	a.ask("POST /{id}/again", live, "")
	a.ask("POST /{id}/again", "nonsense", "")
	a.ask("POST /{id}/again", done, "", "Origin", "https://evil.example")
	a.ask("POST /{id}/cancel", done, "")
	a.ask("POST /{id}/cancel", live, "?reason="+strings.Repeat("x", 1001))
	a.ask("POST /{id}/cancel", "nonsense", "")
	a.ask("POST /{id}/cancel", others, "")
	a.ask("POST /{id}/cancel", live, "", "Origin", "https://evil.example")
	a.ask("GET /ui", "", "")
	a.ask("GET /ui", "", "", "If-None-Match", a.do("GET", "/ui", 200, nil).Header.Get("ETag"))
	a.ask("GET /ui/", "", "")
	a.ask("GET /openapi.json", "", "")
	a.ask("GET /openapi.json", "", "", "If-None-Match", a.do("GET", "/openapi.json", 200, nil).Header.Get("ETag"))
}

// list makes the store work again and returns all operations.
func list(t *testing.T, store *brokenStore, m *task.Manager) []*task.Operation {
	t.Helper()
	store.fail(false)
	ops, err := m.List(100, 0)
	must(t, err)
	return ops
}

// checkEvents validates the data of events.
func (d *document) checkEvents(t *testing.T, name, body string) {
	t.Helper()
	schemas := map[string]string{"snapshot": "Snapshot", "operation": "Task", "deleted": "Deleted", "reload": "Note", "closed": "Note"}
	r := &reader{t: t, lines: bufio.NewReader(strings.NewReader(body))}
	for {
		e, err := r.next()
		if err == io.EOF {
			return
		}
		must(t, err)
		var v any
		must(t, json.Unmarshal([]byte(e.data), &v))
		schema := fmt.Sprintf(`{"$ref": "#/components/schemas/%s"}`, schemas[e.name])
		for _, err := range d.validate([]byte(schema), v) {
			t.Errorf("%s: event %s: %v in %s", name, e.name, err, e.data)
		}
	}
}

// A schema is the part of JSON Schema that the document uses.
type schema struct {
	Ref                  string `json:"$ref"`
	Type, Format         string
	Enum                 []any
	Minimum, Maximum     *float64
	Required             []string
	Properties           map[string]json.RawMessage
	AdditionalProperties *bool
	Items                json.RawMessage
	Description          string
	Default              any
}

// validate returns the differences between a value and the schema.
func (d *document) validate(raw json.RawMessage, v any) (errs []error) {
	var s schema
	decoder := json.NewDecoder(strings.NewReader(string(raw)))
	decoder.DisallowUnknownFields() // an unknown keyword is an error
	if err := decoder.Decode(&s); err != nil {
		return []error{fmt.Errorf("schema %s: %w", raw, err)}
	}
	if s.Ref != "" {
		var to json.RawMessage
		if err := d.lookup(s.Ref, &to); err != nil {
			return []error{err}
		}
		return d.validate(to, v)
	}
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Type != "" && s.Type != typeOf(v) && (s.Type != "number" || typeOf(v) != "integer") {
		wrong("%v is %s, not %s", v, typeOf(v), s.Type)
	}
	if s.Enum != nil && !slices.Contains(s.Enum, v) {
		wrong("%v is not one of %v", v, s.Enum)
	}
	switch v := v.(type) {
	case float64:
		if s.Minimum != nil && v < *s.Minimum || s.Maximum != nil && v > *s.Maximum {
			wrong("%v is out of bounds", v)
		}
	case string:
		if _, err := time.Parse(time.RFC3339Nano, v); s.Format == "date-time" && err != nil {
			wrong("%v", err)
		}
	case []any:
		for _, item := range v {
			if s.Items != nil {
				errs = append(errs, d.validate(s.Items, item)...)
			}
		}
	case map[string]any:
		errs = append(errs, d.validateObject(s, v)...)
	}
	return errs
}

func (d *document) validateObject(s schema, object map[string]any) (errs []error) {
	for _, name := range s.Required {
		if _, ok := object[name]; !ok {
			errs = append(errs, fmt.Errorf("%q is missing", name))
		}
	}
	for name, value := range object {
		if property, ok := s.Properties[name]; ok {
			errs = append(errs, d.validate(property, value)...)
		} else if s.AdditionalProperties != nil && !*s.AdditionalProperties {
			errs = append(errs, fmt.Errorf("unexpected property %q", name))
		}
	}
	return errs
}

func typeOf(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return "boolean"
	case string:
		return "string"
	case []any:
		return "array"
	case map[string]any:
		return "object"
	case float64:
		if v == float64(int64(v)) {
			return "integer"
		}
	}
	return "number"
}

// TestOpenAPIValidate: validate finds differences.
func TestOpenAPIValidate(t *testing.T) {
	d := readDocument(t)
	const good = `{"id":"1","name":"n","state":"DONE","progress":100,"created_at":"2026-01-01T00:00:00Z","updated_at":"2026-01-01T00:00:00.5Z"}`
	for edit, want := range map[string]string{
		"":                     "",
		`"DONE"|"WELL"`:        "not one of",
		`100|101`:              "out of bounds",
		`100|1.5`:              "not integer",
		`"id":"1",|`:           `"id" is missing`,
		`"id"|"colour":1,"id"`: `unexpected property "colour"`,
		`00.5Z|00.5`:           "parsing time",
		`"n"|null`:             "not string",
	} {
		from, to, _ := strings.Cut(edit, "|")
		var v any
		must(t, json.Unmarshal([]byte(strings.Replace(good, from, to, 1)), &v))
		errs := d.validate([]byte(`{"$ref": "#/components/schemas/Task"}`), v)
		if want == "" && len(errs) > 0 || want != "" && (len(errs) != 1 || !strings.Contains(errs[0].Error(), want)) {
			t.Errorf("%s: %v, want %q", edit, errs, want)
		}
	}
	if errs := d.validate([]byte(`{"pattern": "x"}`), context.Canceled); len(errs) != 1 {
		t.Errorf("an unknown rule: %v", errs)
	}
}

func TestStatic(t *testing.T) {
	s := newSite(t, mount(newManager(t, nil)))
	answer := s.do("GET", "/ui", 200, nil)
	for name, want := range map[string]string{
		"Content-Type":           "text/html; charset=utf-8",
		"Cache-Control":          "no-cache",
		"X-Content-Type-Options": "nosniff",
		"Referrer-Policy":        "no-referrer",
		"X-Frame-Options":        "DENY",
	} {
		if got := answer.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	policy := answer.Header.Get("Content-Security-Policy")
	for _, want := range []string{"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("policy %q, want %q", policy, want)
		}
	}
	s.do("GET", "/ui", 304, nil, "If-None-Match", answer.Header.Get("ETag"))
	answer = s.do("GET", "/ui/", 200, nil)
	if got := answer.Request.URL.Path; got != prefix+"/ui" {
		t.Errorf("/ui/ leads to %s", got)
	}
	page, err := os.ReadFile("page.html")
	must(t, err)
	for _, bad := range []string{"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style=", " onclick=", "src=", "http://", "https://"} {
		if strings.Contains(strings.Replace(string(page), "xmlns='http://www.w3.org/2000/svg'", "", 1), bad) {
			t.Errorf("the page contains %q", bad)
		}
	}
}
