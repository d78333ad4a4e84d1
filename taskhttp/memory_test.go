package taskhttp_test

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"sync"
	"testing"
	"time"

	_ "github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

// peakHeap returns by how many bytes the heap grows at most while f runs.
func peakHeap(f func()) (peak uint64) {
	const name = "/memory/classes/heap/objects:bytes"
	sample := []metrics.Sample{{Name: name}}
	size := func() uint64 { metrics.Read(sample); return sample[0].Value.Uint64() }
	runtime.GC()
	base := size()
	done, sampled := make(chan bool), make(chan bool)
	go func() {
		defer close(sampled)
		for tick := time.Tick(2 * time.Millisecond); ; {
			if now := size(); now > base {
				peak = max(peak, now-base)
			}
			select {
			case <-done:
				return
			case <-tick:
			}
		}
	}()
	f()
	close(done)
	<-sampled
	return peak
}

// fill adds finished operations, each with a result of the given size, to a database.
func fill(t *testing.T, path string, count, bytes int) {
	t.Helper()
	db, err := sql.Open("sqlite3", "file:"+path+"?_synchronous=OFF&_journal_mode=WAL")
	must(t, err)
	_, err = db.Exec(`WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
		INSERT INTO tasks (id, name, state, progress, result, created_at, updated_at)
		SELECT printf('op-%05d', i), 'big', 'DONE', 100, '"' || hex(zeroblob(?)) || '"', '2026-01-01 00:00:00', '2026-01-01 00:00:00'
		FROM n`, count, bytes/2)
	must(t, errors.Join(err, db.Close()))
}

// TestListMemory: four lists of hundreds of operations, each with a result of 256 KB, need
// little memory.
func TestListMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 50 to 130 MB")
	}
	count := testos.Size(200, 500) // a single list with its results would take at least twice the memory allowed
	path := filepath.Join(t.TempDir(), "tasks.db")
	store, err := task.OpenSQLite(path)
	must(t, err)
	defer store.Close()
	fill(t, path, count+4, 256<<10)
	s := newSite(t, mount(newManager(t, store)))
	list := func() {
		answer, err := s.client.Get(fmt.Sprintf("%s/?limit=%d", s.url, count))
		if err != nil {
			t.Error(err)
			return
		}
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		if n := bytes.Count(body, []byte(`"result_omitted":true`)); n != count || err != nil {
			t.Errorf("%d results are omitted, want %d; error %v", n, count, err)
		}
	}
	start := time.Now()
	peak := peakHeap(func() {
		var all sync.WaitGroup
		for range 4 {
			all.Go(list)
		}
		all.Wait()
	})
	t.Logf("the heap grew by %d MB in %v", peak>>20, time.Since(start))
	if peak > 25<<20 {
		t.Errorf("the heap grew by %d MB, want at most 25", peak>>20)
	}
}
