// Package engine runs a storm: workers that use one database and are killed at random,
// and a driver that compares what was acknowledged to them with what is stored.
package engine

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mynt-nas/task"
)

// A process identifies a worker's process. The names of its operations contain it.
type process struct{ slot, gen int }

// A status is what the driver knows about a process.
type status struct {
	killed    bool // the process may be dead
	recovered bool // a New that began after its death has returned
}

// A row is a row of the database, as text.
type row struct {
	id, name, state, progress, metadata, result, err string
	created, updated, started                        string
	owner                                            string
	cancelling                                       bool // a cancel was requested
}

func (r row) unfinished() bool { return r.state == "PENDING" || r.state == "RUNNING" }

// A checker compares one database with the workers' journals, through
// connections of its own. It closes them after each check: otherwise SQLite would
// never have to recover the write-ahead log that dead processes have left.
type checker struct {
	backend  Backend
	dir      string
	readers  map[process]*reader
	statuses map[process]*status

	rows       map[string]row      // as of the last check
	unfinished map[string]bool     // IDs of the rows that were unfinished
	owners     map[string]string   // the session of each owner, as a prefix of names
	closed     map[string]bool     // the prefixes of the closed sessions
	resume     bool                // the workers resume operations of dead processes
	over       bool                // the last manager, which resumes nothing, has run
	resumers   map[string][]string // by the ID of an operation: the sessions that have resumed it

	acks Tally // acknowledgements
	bad  []string
}

// A Tally holds the counts of the summary.
type Tally struct {
	Kills, Outages, Restarts, Submitted, Finished, Recovered, Resumed, Checks, Databases, Violations int
}

func (t *Tally) add(u Tally) {
	t.Kills += u.Kills
	t.Outages += u.Outages
	t.Restarts += u.Restarts
	t.Submitted += u.Submitted
	t.Finished += u.Finished
	t.Recovered += u.Recovered
	t.Resumed += u.Resumed
	t.Checks += u.Checks
	t.Databases += u.Databases
	t.Violations += u.Violations
}

func (t Tally) String() string {
	return fmt.Sprintf("%d kills, %d crashes of the server, %d restarts, %d operations acknowledged, %d finals acknowledged, %d recovered, %d resumed, %d checks, %d databases, violations = %d",
		t.Kills, t.Outages, t.Restarts, t.Submitted, t.Finished, t.Recovered, t.Resumed, t.Checks, t.Databases, t.Violations)
}

func newChecker(b Backend, dir string) *checker {
	return &checker{
		backend:    b,
		dir:        dir,
		readers:    make(map[process]*reader),
		statuses:   make(map[process]*status),
		rows:       make(map[string]row),
		unfinished: make(map[string]bool),
		owners:     make(map[string]string),
		closed:     make(map[string]bool),
		resumers:   make(map[string][]string),
	}
}

// started begins to check the journal of a new process.
func (c *checker) started(p process) {
	c.readers[p] = &reader{path: journalPath(c.dir, p.slot, p.gen)}
	c.statuses[p] = new(status)
}

func (c *checker) violation(format string, args ...any) {
	c.acks.Violations++
	if len(c.bad) < 20 {
		c.bad = append(c.bad, fmt.Sprintf(format, args...))
	}
}

// check compares the acknowledgements since the last check with the database,
// the database with its state at the last check, and checks its structure.
//
// It reads the journals before the database, so that the database must contain
// everything that they record.
func (c *checker) check() error {
	c.acks.Checks++
	var added []record
	for p, r := range c.readers {
		records, err := r.read()
		if err != nil {
			return err
		}
		added = append(added, records...)
		if c.statuses[p].recovered { // its journal is complete
			delete(c.readers, p)
		}
	}
	for _, r := range added {
		switch r.Kind {
		case closed:
			c.closed[r.Name] = true
		case opened:
			c.owners[r.ID] = r.Name
		}
	}
	if err := c.readRows(); err != nil {
		return err
	}
	for _, r := range added {
		c.compare(r)
	}
	for id := range c.unfinished {
		c.checkUnfinished(c.rows[id])
	}
	return nil
}

// readRows updates c.rows.
func (c *checker) readRows() error {
	n := 0
	problem, err := c.backend.Rows(c.dir, func(scan func(...any) error) error {
		r, err := scanRow(scan)
		if err == nil {
			c.checkRow(r)
			n++
		}
		return err
	})
	if err != nil {
		return err
	}
	if problem != "" {
		c.violation("integrity check: %s", problem)
	}
	if n != len(c.rows) {
		c.violation("of %d rows, %d are left", len(c.rows), n)
	}
	return nil
}

func scanRow(scan func(...any) error) (r row, err error) {
	err = scan(&r.id, &r.name, &r.state, &r.progress, &r.metadata, &r.result,
		&r.err, &r.created, &r.updated, &r.started, &r.owner, &r.cancelling)
	return r, err
}

// left returns how many unfinished operations belong to killed processes.
func (c *checker) left() (n int, err error) {
	_, err = c.backend.Rows(c.dir, func(scan func(...any) error) error {
		r, err := scanRow(scan)
		p, _, known := c.runs(r)
		if status := c.statuses[p]; err == nil && known && r.unfinished() && status != nil && status.killed {
			n++
		}
		return err
	})
	return n, err
}

// checkRow compares a row with its state at the last check.
func (c *checker) checkRow(r row) {
	before, known := c.rows[r.id]
	c.rows[r.id] = r
	if known {
		if !before.unfinished() && before != r {
			c.violation("a finished row has changed:\n\t%+v\n\t%+v", before, r)
		}
		if before.name != r.name || before.created != r.created || before.owner != r.owner && c.alive(c.owners[before.owner]) ||
			before.owner == r.owner && before.state == "RUNNING" && r.state == "PENDING" {
			c.violation("a row has changed in a forbidden way:\n\t%+v\n\t%+v", before, r)
		}
	}
	if r.unfinished() {
		c.unfinished[r.id] = true
		return
	}
	if known && !before.unfinished() {
		return
	}
	delete(c.unfinished, r.id)
	if !task.State(r.state).Finished() {
		c.violation("a row has an unknown state: %+v", r)
	}
	if r.err == restartError {
		c.acks.Recovered++
		c.checkRecovered(r)
	}
}

// checkRecovered checks a row that has been marked as interrupted.
func (c *checker) checkRecovered(r row) {
	p, session, known := c.runs(r)
	switch status := c.statuses[p]; {
	case !known:
	case status == nil:
		c.violation("no worker has submitted %+v", r)
	case c.resume && !c.over && !declined(r.id) && !r.cancelling:
		c.violation("an interrupted operation was not resumed: %+v", r)
	case c.resume && c.closed[session]: // taken over while that manager was closing
	case !status.killed:
		c.violation("an operation of a live process was marked as interrupted: %+v", r)
	case c.closed[session]:
		c.violation("an operation of a closed manager was marked as interrupted: %+v", r)
	}
	if r.state != "FAILED" {
		c.violation("an interrupted operation has not failed: %+v", r)
	}
}

// checkUnfinished checks an unfinished row.
func (c *checker) checkUnfinished(r row) {
	p, session, known := c.runs(r)
	switch status := c.statuses[p]; {
	case !known:
	case status == nil:
		c.violation("no worker has submitted %+v", r)
	case c.resume && c.closed[session] && r.state == "PENDING": // taken over while that manager was closing
	case status.recovered:
		c.violation("an unfinished operation belongs to a dead process: %+v", r)
	case c.closed[session]:
		c.violation("an unfinished operation belongs to a closed manager: %+v", r)
	}
	if owner := c.owners[r.owner]; r.owner == "" || owner != "" && owner != session {
		c.violation("an operation has the owner of another manager: %+v", r)
	}
}

// runs returns the process and the session that run an operation, or have left it. They
// are unknown if that session has begun after the journals were read.
func (c *checker) runs(r row) (p process, session string, known bool) {
	if !c.resume {
		p, session = submitter(r.name)
		return p, session, true
	}
	session = c.owners[r.owner]
	p, _ = submitter(session + "x")
	return p, session, session != ""
}

// alive reports whether a session has been neither closed nor killed.
func (c *checker) alive(session string) bool {
	p, _ := submitter(session + "x")
	status := c.statuses[p]
	return status != nil && !status.killed && !c.closed[session]
}

// resumedBy checks that at most one of the sessions that have resumed an operation is
// alive.
func (c *checker) resumedBy(id, session string) {
	c.acks.Resumed++
	alive := 0
	c.resumers[id] = append(c.resumers[id], session)
	for _, session := range c.resumers[id] {
		if c.alive(session) {
			alive++
		}
	}
	if got := c.rows[id]; alive > 1 || got.id == "" {
		c.violation("resumed by %q: %+v", c.resumers[id], got)
	}
}

// submitter returns the process and the session that have submitted the operation with
// that name.
func submitter(name string) (p process, session string) {
	var n int
	if _, err := fmt.Sscanf(name, "%d.%d.%d.", &p.slot, &p.gen, &n); err != nil {
		return process{-1, -1}, ""
	}
	return p, strings.Join(strings.Split(name, ".")[:3], ".") + "."
}

// compare checks that an acknowledgement is stored.
func (c *checker) compare(r record) {
	switch r.Kind {
	case violation:
		c.violation("%s", r.Text)
	case resumed:
		c.resumedBy(r.ID, r.Name)
	case submitted:
		c.acks.Submitted++
		if got, ok := c.rows[r.ID]; !ok {
			c.violation("Submit of %s (%s) was acknowledged, but there is no row", r.ID, r.Name)
		} else if got.name != r.Name {
			c.violation("submitted as %q: %+v", r.Name, got)
		}
	case finished:
		c.acks.Finished++
		want, err := rowOf(r.Op)
		got, ok := c.rows[r.Op.ID]
		want.owner, want.cancelling = got.owner, got.cancelling
		if err != nil || !ok || want != got {
			c.violation("shown as finished (%v):\n\t%+v\nstored (%v):\n\t%+v", err, want, ok, got)
		}
	}
}

// rowOf returns the row that an operation should have, without the owner.
func rowOf(op *task.Operation) (row, error) {
	metadata, err := json.Marshal(op.Metadata)
	if err != nil {
		return row{}, err
	}
	result, err := json.Marshal(op.Result)
	if err != nil {
		return row{}, err
	}
	return row{
		id: op.ID, name: op.Name, state: string(op.State), progress: fmt.Sprint(op.Progress),
		metadata: cell(metadata), result: cell(result), err: op.Error,
		created: timeCell(op.CreatedAt), updated: timeCell(op.UpdatedAt), started: timeCell(op.StartedAt),
	}, nil
}

func cell(raw []byte) string {
	if string(raw) == "null" {
		return ""
	}
	return string(raw)
}

func timeCell(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05.000000")
}

// ownerFiles returns the owner files beside the database.
func (c *checker) ownerFiles() []string {
	files, _ := filepath.Glob(filepath.Join(c.dir, "*-owner-*")) // Glob fails only for a bad pattern
	slices.Sort(files)
	return files
}
