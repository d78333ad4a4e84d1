package openapitest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/mynt-nas/task/internal/testkit"
)

func init() {
	// The validator does not support event streams. checkEvents validates the events.
	openapi3filter.RegisterBodyDecoder("text/event-stream", openapi3filter.PlainBodyDecoder)
}

// A checker makes requests, and validates the requests and the responses.
type checker struct {
	t      *testing.T
	doc    *openapi3.T
	router routers.Router
	seen   map[string]bool // responses, such as "GET /{id} 200"
	events map[string]bool // names of events
}

// newChecker loads and validates the description that the server at that URL serves.
func newChecker(t *testing.T, url string) *checker {
	t.Helper()
	r, err := http.Get(url + "/openapi.json")
	testkit.Must(t, err)
	defer r.Body.Close()
	doc, err := openapi3.NewLoader().LoadFromIoReader(r.Body)
	testkit.Must(t, err)
	testkit.Must(t, doc.Validate(t.Context()))
	doc.Servers = nil // the router can't resolve a relative address
	router, err := gorillamux.NewRouter(doc)
	testkit.Must(t, err)
	return &checker{t, doc, router, make(map[string]bool), make(map[string]bool)}
}

// An exchange is a request and its response.
type exchange struct {
	url, route string // the server, and for example "GET /{id}"
	id         string // stands for {id}
	query      string // begins with "?"
	header     []string
	status     int
	invalid    bool   // the description forbids the request
	begun      func() // if not nil, called when the response has begun
}

// ask makes the request, and checks the status, the request and the response.
func (c *checker) ask(e exchange) {
	c.t.Helper()
	method, path, _ := strings.Cut(e.route, " ")
	r, err := http.NewRequestWithContext(c.t.Context(), method, e.url+strings.ReplaceAll(path, "{id}", e.id)+e.query, nil)
	testkit.Must(c.t, err)
	for pair := range slices.Chunk(e.header, 2) {
		r.Header.Set(pair[0], pair[1])
	}
	response, err := http.DefaultTransport.RoundTrip(r) // does not follow redirects
	testkit.Must(c.t, err)
	defer response.Body.Close()
	if e.begun != nil {
		e.begun()
	}
	body, err := io.ReadAll(response.Body)
	testkit.Must(c.t, err)
	name := fmt.Sprint(e.route, " ", response.StatusCode)
	c.seen[name] = true
	if response.StatusCode != e.status {
		c.t.Errorf("%s%s: status %d, want %d: %.300s", e.route, e.query, response.StatusCode, e.status, body)
	}

	in := c.find(r, path)
	if err := openapi3filter.ValidateRequest(c.t.Context(), in); (err != nil) != e.invalid {
		c.t.Errorf("%s%s: the request is invalid: %v, want %v (%v)", name, e.query, err != nil, e.invalid, err)
	}
	if err := c.validate(in, response, body); err != nil {
		c.t.Errorf("%s%s: %v in %.300s", name, e.query, err, body)
	}
}

// find returns what the validator needs to know about a request. A HEAD request counts
// as a GET request.
func (c *checker) find(r *http.Request, path string) *openapi3filter.RequestValidationInput {
	c.t.Helper()
	r = r.Clone(r.Context())
	if r.Method == http.MethodHead {
		r.Method = http.MethodGet
	}
	route, params, err := c.router.FindRoute(r)
	testkit.Must(c.t, err)
	if route.Path != path {
		c.t.Fatalf("%s is %s for the validator, want %s", r.URL.Path, route.Path, path)
	}
	return &openapi3filter.RequestValidationInput{Request: r, Route: route, PathParams: params}
}

// validate returns how a response differs from its description.
func (c *checker) validate(in *openapi3filter.RequestValidationInput, response *http.Response, body []byte) error {
	documented := in.Route.Operation.Responses.Status(response.StatusCode)
	if documented == nil {
		return fmt.Errorf("status %d is not documented", response.StatusCode)
	}
	head := response.Request.Method == http.MethodHead
	if len(body) > 0 && (head || len(documented.Value.Content) == 0) {
		return fmt.Errorf("an unexpected body")
	}
	contentType := response.Header.Get("Content-Type")
	if len(documented.Value.Content) > 0 && documented.Value.Content.Get(contentType) == nil {
		return fmt.Errorf("content type %q is not documented", contentType)
	}
	if strings.HasSuffix(contentType, "json") && !head && !json.Valid(body) { // the validator ignores what follows a value
		return fmt.Errorf("invalid JSON")
	}
	for name, h := range documented.Value.Headers { // the validator skips those of redirects
		if h.Value.Required && response.Header.Get(name) == "" {
			return fmt.Errorf("header %s is missing", name)
		}
	}
	if contentType == "text/event-stream" && !head {
		if err := c.checkEvents(string(body)); err != nil {
			return err
		}
	}
	return openapi3filter.ValidateResponse(c.t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in,
		Status:                 response.StatusCode,
		Header:                 response.Header,
		Body:                   io.NopCloser(bytes.NewReader(body)),
		Options:                &openapi3filter.Options{IncludeResponseStatus: true, ExcludeResponseBody: head},
	})
}

// matches returns how JSON differs from a schema of the description.
func (c *checker) matches(schema string, data []byte) error {
	ref := c.doc.Components.Schemas[schema]
	if ref == nil {
		return fmt.Errorf("there is no schema %q", schema)
	}
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		return err
	}
	return ref.Value.VisitJSON(v, openapi3.EnableJSONSchema2020())
}

// eventSchemas returns the schemas that the description gives for the data of events.
var eventSchemas = map[string]string{
	"snapshot": "Snapshot", "operation": "Task", "deleted": "Deleted", "reload": "Note", "closed": "Note",
}

// checkEvents validates the events of a stream.
func (c *checker) checkEvents(body string) error {
	for block := range strings.SplitSeq(strings.TrimSuffix(body, "\n\n"), "\n\n") {
		fields := make(map[string]string)
		for line := range strings.SplitSeq(block, "\n") {
			field, value, ok := strings.Cut(line, ": ")
			if !ok || !slices.Contains([]string{"event", "data", "id", "retry"}, field) {
				return fmt.Errorf("line %q of an event", line)
			}
			fields[field] = value
		}
		name, data := fields["event"], fields["data"]
		if name == "" {
			continue // only sets the retry time
		}
		c.events[name] = true
		if name == "heartbeat" && data == "{}" {
			continue
		}
		if err := c.matches(eventSchemas[name], []byte(data)); err != nil {
			return fmt.Errorf("event %q: %w", name, err)
		}
	}
	return nil
}

// askProblem makes a request whose response the description mentions only in its text:
// problem details, or no body for OPTIONS.
func (c *checker) askProblem(url, method, path string, status int, allow string) {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), method, url+path, nil)
	testkit.Must(c.t, err)
	response, err := http.DefaultTransport.RoundTrip(r)
	testkit.Must(c.t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	testkit.Must(c.t, err)
	if response.StatusCode != status || response.Header.Get("Allow") != allow {
		c.t.Errorf("%s %s: status %d, Allow %q, want %d, %q", method, path, response.StatusCode, response.Header.Get("Allow"), status, allow)
	}
	if status == http.StatusNoContent {
		if len(body) > 0 {
			c.t.Errorf("%s %s: body %q", method, path, body)
		}
		return
	}
	if got := response.Header.Get("Content-Type"); got != "application/problem+json" {
		c.t.Errorf("%s %s: content type %q", method, path, got)
	}
	if err := c.matches("Problem", body); err != nil {
		c.t.Errorf("%s %s: %v in %s", method, path, err, body)
	}
}

// complete checks that every documented response and event was seen.
func (c *checker) complete() {
	c.t.Helper()
	for path, item := range c.doc.Paths.Map() {
		for method, operation := range item.Operations() {
			for status := range operation.Responses.Map() {
				if name := method + " " + path + " " + status; !c.seen[name] {
					c.t.Errorf("no response %s", name)
				}
			}
		}
	}
	for name := range eventSchemas {
		if !c.events[name] {
			c.t.Errorf("no event %s", name)
		}
	}
}

// serve serves h until the test ends.
func serve(t *testing.T, h http.Handler) (url string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s.URL
}
