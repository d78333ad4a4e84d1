//go:build unix

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
)

// A sending is an upload request in progress.
type sending struct {
	t      *testing.T
	body   *io.PipeWriter
	cancel context.CancelFunc
	answer chan *http.Response // receives nil if there was no response
}

// send begins an upload. The client announces its size, unless that is negative.
func send(t *testing.T, client *http.Client, url string, size int64) *sending {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	s := &sending{t, w, cancel, make(chan *http.Response, 1)}
	req, err := http.NewRequestWithContext(ctx, "PUT", url, r)
	must(t, err)
	req.ContentLength = size
	go func() {
		resp, err := client.Do(req)
		r.CloseWithError(errors.New("no longer read")) // otherwise a writer would block
		if err != nil {
			resp = nil
		}
		s.answer <- resp
	}()
	return s
}

// want checks the response to an upload. It returns the detail of a problem.
func (s *sending) want(status int) (detail string) {
	s.t.Helper()
	resp := <-s.answer
	if resp == nil {
		s.t.Fatal("the upload has no answer")
	}
	defer resp.Body.Close()
	var p struct{ Detail string }
	body, err := io.ReadAll(resp.Body)
	must(s.t, err)
	if resp.StatusCode != status {
		s.t.Fatalf("the answer is %s, want %d: %s", resp.Status, status, body)
	}
	if status >= 400 {
		must(s.t, json.Unmarshal(body, &p))
	}
	return p.Detail
}

// untilListed waits until an unfinished operation is as wanted.
func (d *daemon) untilListed(what string, wanted func(op *task.Operation) bool) *task.Operation {
	d.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var page struct{ Tasks []*task.Operation }
		d.do("GET", "/api/tasks/?state=PENDING,RUNNING", "", 200, &page)
		if i := slices.IndexFunc(page.Tasks, wanted); i >= 0 {
			return page.Tasks[i]
		}
	}
	d.t.Fatalf("there is no %s", what)
	return nil
}

// uploading waits for a running upload with the given message and progress.
func (d *daemon) uploading(name, message string, progress int) *task.Operation {
	d.t.Helper()
	return d.untilListed(name+" with "+message, func(op *task.Operation) bool {
		return op.Name == name && op.State == task.StateRunning && op.Message == message && op.Progress == progress
	})
}

// fewBytes are sent at the start of an upload.
var fewBytes = make([]byte, 3000)

// beginUpload begins an upload to the pool tank and waits until the daemon has received a
// third of its bytes.
func (d *daemon) beginUpload(name string) (*sending, *task.Operation) {
	d.t.Helper()
	s := send(d.t, d.client, d.url+"/api/pools/tank/files/"+name, 9000)
	_, err := s.body.Write(fewBytes)
	must(d.t, err)
	return s, d.uploading("upload tank/"+name, "3.0 kB of 9.0 kB", 33)
}

// withTank starts a daemon with a pool.
func withTank(t *testing.T) *daemon {
	t.Helper()
	d := start(t, t.TempDir())
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	return d
}

func TestUpload(t *testing.T) {
	d := withTank(t)
	s, op := d.beginUpload("dir/a")
	unknown := send(t, d.client, d.url+"/api/pools/tank/files/b", -1)
	_, err := unknown.body.Write(fewBytes)
	must(t, err)
	d.uploading("upload tank/b", "3.0 kB", 0)

	var r scrubResult
	d.finish("/api/pools/tank/scrub", "", task.StateDone, &r) // does not wait for uploads
	if r.Files != 0 {
		t.Errorf("a scrub has found %d files", r.Files)
	}
	if _, err := os.Lstat(d.file("tank", "dir")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of an unfinished upload is there: %v", err)
	}
	_, err = s.body.Write(make([]byte, 6000))
	must(t, err)
	s.body.Close()
	s.want(204)
	unknown.body.Close()
	unknown.want(204)
	var got uploadResult
	done := d.wait(op.ID, task.StateDone, &got)
	if got != (uploadResult{"dir/a", 9000}) || done.Message != "" || done.Progress != 100 {
		t.Errorf("the upload is %+v with the result %+v", done, got)
	}
	wantTree(t, d.file("tank", ""), map[string]string{"dir/a": string(make([]byte, 9000)), "b": string(fewBytes)})
}

// TestUploadEnds ends uploads halfway and checks that nothing of their files remains.
func TestUploadEnds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		end    func(d *daemon, s *sending, id string)
		status int // 0 if nobody waits for the response
		state  task.State
		err    string // part of the operation's error
		pool   bool   // whether the pool remains
	}{
		{"cancel", func(d *daemon, _ *sending, id string) {
			d.do("POST", "/api/tasks/"+id+"/cancel", "", 202, nil)
		}, 409, task.StateCancelled, "cancelled over HTTP", true},
		{"the client disconnects", func(_ *daemon, s *sending, _ string) {
			s.cancel()
		}, 0, task.StateFailed, "the client has broken off the upload", true},
		{"the pool is deleted", func(d *daemon, _ *sending, _ string) {
			d.wait(d.remove("tank").ID, task.StateDone, nil)
		}, 404, task.StateFailed, "the pool has been deleted", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := withTank(t)
			pools := filepath.Join(d.dir, "pools")
			want := tree(t, pools)
			if !tt.pool {
				clear(want)
			}
			s, op := d.beginUpload("dir/a")
			tt.end(d, s, op.ID)
			if got := d.wait(op.ID, tt.state, nil); !strings.Contains(got.Error, tt.err) {
				t.Errorf("the error is %q, want %q", got.Error, tt.err)
			}
			if tt.status != 0 {
				if detail := s.want(tt.status); !strings.Contains(detail, tt.err) {
					t.Errorf("the answer is %q, want %q", detail, tt.err)
				}
			}
			wantTree(t, pools, want)
			must(t, d.end(syscall.SIGTERM))
		})
	}
}

// TestUploadTerm checks that an upload does not delay the end of the daemon.
func TestUploadTerm(t *testing.T) {
	t.Parallel()
	d := withTank(t)
	s, op := d.beginUpload("a")
	must(t, d.end(syscall.SIGTERM))
	s.want(503)
	d = start(t, d.dir)
	if got := d.wait(op.ID, task.StateFailed, nil); !strings.HasPrefix(got.Error, "Task failed due to system shutdown") {
		t.Errorf("the error is %q", got.Error)
	}
	wantTree(t, d.file("tank", ""), map[string]string{})
}

// TestUploadKill checks that after a kill the next daemon marks the upload as failed and
// removes its partial file.
func TestUploadKill(t *testing.T) {
	d := withTank(t)
	d.put("/api/pools/tank/files/a", "old")
	_, op := d.beginUpload("a")
	d.end(syscall.SIGKILL)
	parts := func() int {
		left, err := filepath.Glob(filepath.Join(d.file("tank", incoming), "*"))
		must(t, err)
		return len(left)
	}
	if parts() != 1 {
		t.Fatalf("%d parts of files, want 1", parts())
	}
	d = start(t, d.dir)
	if got := d.wait(op.ID, task.StateFailed, nil); !got.Interrupted() {
		t.Errorf("the upload is %+v", got)
	}
	if parts() != 0 {
		t.Errorf("%d parts of files are left", parts())
	}
	wantTree(t, d.file("tank", ""), map[string]string{"a": "old"})
}

// TestUploadTwice checks that of two uploads to the same path, the one that ends last
// remains.
func TestUploadTwice(t *testing.T) {
	d := withTank(t)
	first, _ := d.beginUpload("a")
	d.put("/api/pools/tank/files/a", "second")
	if got, err := os.ReadFile(d.file("tank", "a")); err != nil || string(got) != "second" {
		t.Errorf("the file is %q, %v", got, err)
	}
	_, err := first.body.Write(make([]byte, 6000))
	must(t, err)
	first.body.Close()
	first.want(204)
	wantTree(t, d.file("tank", ""), map[string]string{"a": string(make([]byte, 9000))})
}

// TestUploadWaits checks that an upload waiting for a slot can be cancelled.
func TestUploadWaits(t *testing.T) {
	t.Parallel()
	d := start(t, t.TempDir(), "-limit", "1")
	d.finish("/api/pools", `{"name":"tank"}`, task.StateDone, nil)
	running, op := d.beginUpload("a")
	waiting := send(t, d.client, d.url+"/api/pools/tank/files/b", 9000)
	pending := d.untilListed("upload that waits", func(op *task.Operation) bool { return op.State == task.StatePending })
	d.do("POST", "/api/tasks/"+pending.ID+"/cancel", "", 202, nil)
	waiting.want(409)
	d.do("POST", "/api/tasks/"+op.ID+"/cancel", "", 202, nil)
	running.want(409)
}

// TestUploadPanics checks that the operation of an upload that panics ends.
func TestUploadPanics(t *testing.T) {
	s := newStorage(t, "tank")
	func() {
		defer func() {
			if recover() == nil {
				t.Error("no panic")
			}
		}()
		s.upload(t.Context(), &upload{pool: "tank", path: "a", setReadDeadline: deadlines{}.SetReadDeadline,
			body: readerFunc(func([]byte) (int, error) { panic("broken") })})
	}()
	ops, err := s.tasks.List(1, 0)
	must(t, err)
	op, err := s.tasks.Wait(t.Context(), ops[0].ID)
	if err != nil || op.State != task.StateFailed || op.Error != errAbandoned.Error() {
		t.Errorf("the upload is %+v, %v", op, err)
	}
}

// TestUploadSilent checks the error of a client that sends nothing for too long.
func TestUploadSilent(t *testing.T) {
	s := newStorage(t, "tank")
	body := readerFunc(func([]byte) (int, error) { return 0, fmt.Errorf("read: %w", os.ErrDeadlineExceeded) })
	r := httptest.NewRequest("PUT", "/api/pools/tank/files/a", body)
	r.Host = "localhost"
	w := httptest.NewRecorder()
	newAPI(s, newLastResults(s.tasks), true).ServeHTTP(deadlines{w}, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "the client has sent nothing for 30s") {
		t.Errorf("the answer is %d %s", w.Code, w.Body)
	}
}

func TestFormatBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB",
		1_500_000_000: "1.5 GB", 1<<63 - 1: "9.2 EB",
	} {
		if got := formatBytes(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}
