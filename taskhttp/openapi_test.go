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
	"github.com/mynt-nas/task/taskhttp"
)

// The document, as far as the tests look at it.
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

// lookup stores in v what a reference refers to.
func (d *document) lookup(ref string, v any) error {
	parts := strings.Split(ref, "/")
	if len(parts) != 4 || parts[0] != "#" || parts[1] != "components" || d.Components[parts[2]][parts[3]] == nil {
		return fmt.Errorf("%q refers to nothing", ref)
	}
	return json.Unmarshal(d.Components[parts[2]][parts[3]], v)
}

// operations returns what the document describes, by "GET /path".
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

// Every path, method and parameter of the document is one of the handler, and
// the other way round.
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
				if p.Name != "Last-Event-ID" || !strings.HasSuffix(name, "/events") {
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

// Every response of the document can be had, and every response that can be
// had is as in the document.
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
	synctest.Test(t, func(t *testing.T) { askForEverything(t, check) })

	for name, op := range documented {
		for code := range op.Responses {
			if !seen[name+" "+code] {
				t.Errorf("%s is answered with %s in the document only", name, code)
			}
		}
	}
}

// askForEverything has every operation give each answer that it has.
func askForEverything(t *testing.T, check func(t *testing.T, operation string, answer *http.Response)) {
	store := newBrokenStore()
	m, other := newManager(t, store), newManager(t, store)
	h := mount(m)
	s := newPipeSite(t, h)
	ask := func(operation, id, query string, header ...string) {
		t.Helper()
		method, path, _ := strings.Cut(operation, " ")
		r, err := http.NewRequest(method, s.url+strings.ReplaceAll(path, "{id}", id)+query, nil)
		must(t, err)
		for i := 0; i+1 < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		answer, err := s.client.Transport.RoundTrip(r) // which follows no redirect
		must(t, err)
		check(t, operation, answer)
		answer.Body.Close()
	}
	done := run(t, m, "done", map[string]any{"disks": 4}, nil).ID
	run(t, m, "failed", []int{1}, errors.New("no"))
	live := newPuppet(t, m, "live", task.WithMetadata("tank"))
	others := newPuppet(t, other, "another's")
	synctest.Wait()

	ask("GET /", "", "?state=DONE,FAILED&state=RUNNING&limit=2&name=")
	ask("GET /", "", "?limit=none")
	ask("GET /{id}", done, "")
	ask("GET /{id}", live.ID, "")
	ask("GET /{id}", "nonsense", "")
	ask("GET /{id}/wait", done, "?timeout=1s")
	ask("GET /{id}/wait", live.ID, "?timeout=1s")
	ask("GET /{id}/wait", live.ID, "?timeout=soon")
	ask("GET /{id}/wait", "nonsense", "")
	ask("GET /{id}/events", done, "")
	ask("GET /{id}/events", done, "", "Last-Event-ID", "DONE")
	ask("GET /{id}/events", "nonsense", "")
	ask("POST /{id}/cancel", done, "")
	ask("POST /{id}/cancel", "nonsense", "")
	ask("POST /{id}/cancel", others.ID, "")
	ask("POST /{id}/cancel", live.ID, "", "Origin", "https://evil.example")
	ask("GET /ui", "", "")
	ask("GET /ui", "", "", "If-None-Match", s.do("GET", "/ui", 200, nil).Header.Get("ETag"))
	ask("GET /ui/", "", "")
	ask("GET /openapi.json", "", "")
	ask("GET /openapi.json", "", "", "If-None-Match", s.do("GET", "/openapi.json", 200, nil).Header.Get("ETag"))

	other.Close()
	store.fail(true)
	ask("GET /", "", "")
	ask("GET /{id}", done, "")
	ask("GET /{id}/wait", done, "")
	ask("GET /{id}/events", done, "")
	ask("POST /{id}/cancel", done, "")
	store.fail(false)
	ask("POST /{id}/cancel", live.ID, "")

	time.AfterFunc(time.Second, func() {
		run(t, m, "later", nil, nil)
		newPuppet(t, m, "stuck")
		synctest.Wait()
		store.fail(true)
		m.Close()
	})
	ask("GET /events", "", "", "Last-Event-ID", "nonsense") // reload, snapshot, operations, closed
	m.Close()
	ask("GET /events", "", "")
	for _, op := range list(t, store, m) {
		if !op.State.Finished() {
			ask("GET /{id}/wait", op.ID, "")
		}
	}

	// What is around the handler hides that it could flush.
	s = newPipeSite(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(unflushable{w}, r) }))
	ask("GET /{id}/events", done, "")
	again := newManager(t, nil)
	defer again.Close()
	h = mount(again)
	ask("GET /events", "", "")
}

// list returns all operations of a store that can be read again.
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
	schemas := map[string]string{"snapshot": "Snapshot", "operation": "Task", "reload": "Note", "closed": "Note"}
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

// validate returns what is not as the schema says.
func (d *document) validate(raw json.RawMessage, v any) (errs []error) {
	var s schema
	decoder := json.NewDecoder(strings.NewReader(string(raw)))
	decoder.DisallowUnknownFields() // rather than ignore a rule
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
		wrong("%v is none of %v", v, s.Enum)
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
		for _, name := range s.Required {
			if _, ok := v[name]; !ok {
				wrong("%q is missing", name)
			}
		}
		for name, value := range v {
			if property, ok := s.Properties[name]; ok {
				errs = append(errs, d.validate(property, value)...)
			} else if s.AdditionalProperties != nil && !*s.AdditionalProperties {
				wrong("%q is too much", name)
			}
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

// The checker itself finds what is wrong.
func TestOpenAPIValidate(t *testing.T) {
	d := readDocument(t)
	const good = `{"id":"1","name":"n","state":"DONE","progress":100,"created_at":"2026-01-01T00:00:00Z","updated_at":"2026-01-01T00:00:00.5Z"}`
	for edit, want := range map[string]string{
		"":                     "",
		`"DONE"|"WELL"`:        "none of",
		`100|101`:              "out of bounds",
		`100|1.5`:              "not integer",
		`"id":"1",|`:           `"id" is missing`,
		`"id"|"colour":1,"id"`: `"colour" is too much`,
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
