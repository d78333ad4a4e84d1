package main

import (
	"encoding/json"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

// TestUsage checks that the list of pools reflects what the pools hold.
func TestUsage(t *testing.T) {
	s := newStorage(t, "tank", "empty")
	p := openPool(t, s, "tank")
	h := newAPI(s, newLastResults(s.tasks), true)
	// until polls the list until it says that the pools hold these amounts.
	until := func(tank, empty usage) {
		t.Helper()
		for {
			var got struct {
				Pools []struct {
					Name  string
					Usage *usage
					Free  *int64
				}
			}
			r := httptest.NewRequest("GET", "/api/pools", nil)
			r.Host = "localhost"
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			must(t, json.Unmarshal(w.Body.Bytes(), &got))
			if len(got.Pools) != 2 || got.Pools[0].Name != "empty" {
				t.Fatalf("got %s", w.Body)
			}
			if free, err := freeBytes(p.root.Name()); err == nil && free > 0 && (got.Pools[1].Free == nil || *got.Pools[1].Free <= 0) {
				t.Fatalf("no free space in %s", w.Body)
			}
			if e, f := got.Pools[0].Usage, got.Pools[1].Usage; e != nil && f != nil && *e == empty && *f == tank {
				return
			}
			if t.Context().Err() != nil {
				t.Fatal(t.Context().Err())
			}
		}
	}
	until(usage{}, usage{})
	write(t, p.files, "a", "12345")
	write(t, p.files, "dir/b", "678")
	write(t, p.files, incoming+"/c", "incomplete files do not count")
	must(t, os.Symlink("a", filepath.Join(p.files.Name(), "link")))
	until(usage{Files: 2, Bytes: 8}, usage{})
	must(t, p.files.Remove("a"))
	until(usage{Files: 1, Bytes: 3}, usage{})
}
