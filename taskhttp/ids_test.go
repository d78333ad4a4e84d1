package taskhttp_test

import (
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskhttp"
)

// TestGivenIDs: an operation is found under every ID that task.WithID allows, at the path
// that Accepted returns. The remaining paths are not valid IDs.
func TestGivenIDs(t *testing.T) {
	m := newManager(t, nil)
	s := newSite(t, mount(m))
	ids := []string{"result", "cancel", "wait", "...", ".x", "{id}", "{$}", "a:b", "tasks", "ui.", "2026-11-25T03:00:00+01:00", strings.Repeat("x", 200)}
	for c := byte('!'); c <= '~'; c++ {
		ids = append(ids, string(c), "x"+string(c)+"y")
	}
	for _, id := range ids {
		op, err := m.Submit("x", testkit.Nothing, task.WithID(id))
		if strings.ContainsAny(id, `/\?#%`) || id == "." {
			if err == nil {
				t.Errorf("Submit of %q = nil", id)
			}
			continue
		}
		must(t, err)
		_, err = m.Wait(t.Context(), id)
		must(t, err)
		rec := httptest.NewRecorder()
		request := httptest.NewRequest("POST", "http://x/a:b", nil)
		taskhttp.Accepted(rec, request, "/", op)
		location, err := request.URL.Parse(rec.Header().Get("Location"))
		must(t, err)
		path := location.EscapedPath()
		for _, way := range []string{path, path + "/wait", "/" + url.PathEscape(id)} {
			var got task.Operation
			s.do("GET", way, 200, &got)
			if got.ID != id {
				t.Errorf("GET %s: the ID is %q, want %q", way, got.ID, id)
			}
		}
		s.fails("GET", path+"/result", 404, "result")
		s.do("POST", path+"/cancel", 200, nil)
	}
	for _, word := range []string{"events", "ui", "openapi.json"} {
		if _, err := m.Submit("x", testkit.Nothing, task.WithID(word)); err == nil {
			t.Errorf("Submit of %q = nil", word)
		}
	}
}
