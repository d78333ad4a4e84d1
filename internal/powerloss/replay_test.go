//go:build linux && cgo

package powerloss

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/mynt-nas/task"
)

// A report is the outcome of a replay.
type report struct {
	Entries  int      // of the record
	Syncs    int      // syncs that have ended
	DBSyncs  int      // those of the database file itself: about two per checkpoint
	Acks     int      // acknowledgements
	Points   int      // moments at which power was lost
	Images   int      // directories reconstructed
	Lossy    int      // images in which something acknowledged is missing
	Loss     string   // the first such loss
	Problems []string // other faults, such as corruption
}

// A replay reconstructs and checks directories that a loss of power may leave.
type replay struct {
	config
	images chan image

	mu     sync.Mutex // guards what follows
	report report
}

// An image is a directory as a loss of power may have left it.
type image struct {
	dir  string
	what string            // which image this is
	acks []acknowledgement // all acknowledgements by then
}

func (c config) replay() (*report, error) {
	entries, err := readEntries(c.Record)
	if err != nil {
		return nil, err
	}
	r := &replay{config: c, images: make(chan image)}
	r.report.Entries = len(entries)
	var checkers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		checkers.Go(func() {
			for i := range r.images {
				lost, err := r.check(i)
				r.note(i, lost, errors.Join(err, os.RemoveAll(i.dir)))
			}
		})
	}
	err = r.make(entries)
	close(r.images)
	checkers.Wait()
	return &r.report, err
}

func (r *replay) note(i image, lost []string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.report.Images++
	if len(lost) > 0 {
		if r.report.Lossy++; r.report.Lossy == 1 {
			r.report.Loss = fmt.Sprintf("%s: %d lost: %s", i.what, len(lost), lost[0])
		}
	}
	if err != nil && len(r.report.Problems) < 10 {
		r.report.Problems = append(r.report.Problems, fmt.Sprintf("%s: %v", i.what, err))
	}
}

// make makes the images.
func (r *replay) make(entries []entry) error {
	rng := rand.New(rand.NewPCG(r.Seed, 0))
	points := r.points(entries, rng)
	d := newDisk()
	var acked acknowledged
	for n := range len(entries) + 1 {
		if len(points) > 0 && points[0] == n {
			points = points[1:]
			r.report.Points++
			for c := range crashes {
				what := fmt.Sprintf("seed %d, crash %d before entry %d", r.Seed, c, n)
				i := image{filepath.Join(r.Dir, fmt.Sprintf("%d-%d", n, c)), what, acked.all}
				if err := i.write(d.after(c, rng), acked.owners, rng); err != nil {
					return err
				}
				r.images <- i
			}
		}
		if n < len(entries) {
			if err := r.take(entries[n], d, &acked); err != nil {
				return err
			}
		}
	}
	return nil
}

// take applies the next entry.
func (r *replay) take(e entry, d *disk, acked *acknowledged) error {
	switch e.kind {
	case ack:
		r.report.Acks++
		return acked.add(e.data)
	case 'E':
		r.report.Syncs++
		f := d.fds[e.fd]
		if n := d.names[base]; n != nil && f == n.latest {
			r.report.DBSyncs++
		}
		if directory := f == &d.dir; directory && r.Ignore == "directory" || !directory && r.Ignore == "files" {
			return nil
		}
	}
	return d.apply(e)
}

// acknowledged collects the acknowledgements up to some moment.
type acknowledged struct {
	all    []acknowledgement // of operations
	owners []string          // the names of owner files
	seen   map[string]bool   // by ID and state: later ones add nothing
}

func (k *acknowledged) add(data []byte) error {
	var a acknowledgement
	if err := json.Unmarshal(data, &a); err != nil {
		return err
	}
	if a.Owner != "" {
		k.owners = append(k.owners, a.Owner)
		return nil
	}
	if k.seen == nil {
		k.seen = make(map[string]bool)
	}
	if key := a.ID + string(a.State); !k.seen[key] {
		k.seen[key] = true
		k.all = append(k.all, a)
	}
	return nil
}

// points chooses the moments at which power is lost: all moments at the beginning, then
// mostly moments just before the end of a sync, when as much as possible depends on the
// previous sync, and a few others. For each process it includes the moment before its
// first sync after it has read what another process has left.
func (r *replay) points(entries []entry, rng *rand.Rand) []int {
	var ends, points []int
	shown := 0 // acknowledgements of the process before its first sync; -1 after that
	for n, e := range entries {
		switch {
		case e.kind == 'P':
			shown = 0
		case e.kind == ack && shown >= 0:
			shown++
		case e.kind == 'E':
			ends = append(ends, n)
			if shown > 0 {
				points = append(points, n)
				shown = -1
			}
		}
	}
	rng.Shuffle(len(ends), func(i, j int) { ends[i], ends[j] = ends[j], ends[i] })
	points = append(points, ends[:min(len(ends), r.Points*2/3)]...)
	for n := range min(r.Points/6, len(entries)) {
		points = append(points, n)
	}
	for range r.Points / 6 {
		points = append(points, rng.IntN(len(entries)+1))
	}
	points = append(points, len(entries))
	slices.Sort(points)
	return slices.Compact(points)
}

// write creates the directory. Owner files need no sync: each is there or not.
func (i image) write(files map[string][]byte, owners []string, rng *rand.Rand) error {
	if err := os.Mkdir(i.dir, 0o700); err != nil {
		return err
	}
	for _, base := range owners {
		if rng.IntN(4) == 0 {
			files[base] = nil
		}
	}
	for base, data := range files {
		if err := os.WriteFile(filepath.Join(i.dir, base), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// check starts a manager on an image. It returns the losses, and an error for any
// other fault.
func (r *replay) check(i image) (lost []string, err error) {
	store, closeStore, err := r.open(i.dir)
	if err != nil {
		return nil, err
	}
	m, err := task.New(store, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, errors.Join(err, closeStore())
	}
	lost, err = i.compare()
	err = errors.Join(err, m.Close(), closeStore())
	if files, _ := filepath.Glob(filepath.Join(i.dir, base+"-owner-*")); len(files) > 0 {
		err = errors.Join(err, fmt.Errorf("owner files are left: %q", files))
	}
	return lost, err
}

// compare compares the acknowledgements with the database.
func (i image) compare() (lost []string, err error) {
	db, err := sql.Open("sqlite3", "file:"+filepath.Join(i.dir, base)+"?mode=ro")
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var result string
	if err := db.QueryRow(`PRAGMA integrity_check`).Scan(&result); err != nil {
		return nil, err
	}
	if result != "ok" {
		return nil, fmt.Errorf("integrity check: %s", result)
	}
	stored, err := read(db)
	if err != nil {
		return nil, err
	}
	for _, a := range i.acks {
		got, ok := stored[a.ID]
		switch {
		case !ok:
			lost = append(lost, fmt.Sprintf("no row for %s %+v", a.ID, a.row()))
		case got.Name != a.Name:
			return nil, fmt.Errorf("%s was acknowledged as %+v, and is stored as %+v", a.ID, a.row(), got)
		case a.State == "" || got == a.row():
		case got.State == task.StateFailed && got.Error == "Task failed due to system restart":
			lost = append(lost, fmt.Sprintf("%s is interrupted, but was acknowledged as %+v", a.ID, a.row()))
		default:
			return nil, fmt.Errorf("%s was acknowledged as %+v, and is stored as %+v", a.ID, a.row(), got)
		}
	}
	return lost, nil
}

// A row holds the compared columns of a row of the database.
type row struct {
	Name   string
	State  task.State
	Result string
	Error  string
}

func (a acknowledgement) row() row {
	r := row{a.Name, a.State, string(a.Result), a.Error}
	if r.Result == "null" {
		r.Result = ""
	}
	return r
}

// read returns all rows by ID, or an error if one is not finished. SQLite joins
// them into one text, which is much faster than reading row by row.
func read(db *sql.DB) (map[string]row, error) {
	var text string
	err := db.QueryRow(`SELECT coalesce(group_concat(concat_ws(char(31), id, name, state, coalesce(result, ''), coalesce(error, '')), char(30)), '')
		FROM tasks`).Scan(&text)
	if err != nil {
		return nil, err
	}
	stored := make(map[string]row)
	for line := range strings.SplitSeq(text, "\x1e") {
		cells := strings.Split(line, "\x1f")
		if len(cells) != 5 {
			if text == "" {
				break
			}
			return nil, fmt.Errorf("a row that no program has written: %q", line)
		}
		r := row{cells[1], task.State(cells[2]), cells[3], cells[4]}
		if !r.State.Finished() {
			return nil, fmt.Errorf("New has left %s unfinished: %+v", cells[0], r)
		}
		stored[cells[0]] = r
	}
	return stored, nil
}
