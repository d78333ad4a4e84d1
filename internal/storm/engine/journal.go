package engine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/mynt-nas/task"
)

// A record is an acknowledgement that a worker has received: a line of its journal.
type record struct {
	Kind string          // one of the kinds below
	Name string          `json:",omitempty"` // of the submitted operation, or the prefix of a session
	ID   string          `json:",omitempty"` // of the operation
	Op   *task.Operation `json:",omitempty"` // as shown
	Text string          `json:",omitempty"` // describes the violation
}

// The kinds of records.
const (
	submitted = "submitted" // Submit has returned an operation
	finished  = "finished"  // an operation was shown in a final state
	opened    = "opened"    // a session has begun; ID is its owner
	resumed   = "resumed"   // this session runs an operation that another has left
	closed    = "closed"    // Close has returned: nothing of this session is unfinished
	violation = "violation" // the worker itself has found a violation
)

// A journal is the file of a worker's records. Each record is synced before the
// worker continues.
type journal struct {
	file *os.File
	wake chan struct{} // holds a token when there are lines to write

	mu    sync.Mutex // guards what follows
	lines []byte
	done  chan struct{} // closed once lines are synced
}

func journalPath(dir string, slot, gen int) string {
	return filepath.Join(dir, fmt.Sprintf("journal-%d.%d", slot, gen))
}

func openJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	j := &journal{file: f, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go j.run()
	return j, nil
}

// add returns once r is synced. Records that arrive during a sync share the next
// one.
func (j *journal) add(r record) {
	line, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	j.mu.Lock()
	j.lines = append(append(j.lines, line...), '\n')
	done := j.done
	j.mu.Unlock()
	select {
	case j.wake <- struct{}{}:
	default:
	}
	<-done
}

func (j *journal) run() {
	for range j.wake {
		j.mu.Lock()
		lines, done := j.lines, j.done
		j.lines, j.done = nil, make(chan struct{})
		j.mu.Unlock()
		_, err := j.file.Write(lines)
		if err := errors.Join(err, j.file.Sync()); err != nil {
			panic(err)
		}
		close(done)
	}
}

// A reader reads a journal while it is being written.
type reader struct {
	path   string
	offset int64 // where the unread part begins
}

// read returns the records since the last call, without an incomplete line, which was
// not acknowledged.
func (r *reader) read() ([]record, error) {
	f, err := os.Open(r.path)
	if errors.Is(err, fs.ErrNotExist) { // the worker was killed before it began
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.NewSectionReader(f, r.offset, 1<<62))
	if err != nil {
		return nil, err
	}
	text = text[:bytes.LastIndexByte(text, '\n')+1]
	r.offset += int64(len(text))
	var records []record
	for line := range bytes.Lines(text) {
		var rec record
		d := json.NewDecoder(bytes.NewReader(line))
		d.UseNumber()
		if err := d.Decode(&rec); err != nil {
			return nil, fmt.Errorf("%s: %w", r.path, err)
		}
		records = append(records, rec)
	}
	return records, nil
}
