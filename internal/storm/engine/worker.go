package engine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mynt-nas/task"
)

// workerVar names the environment variable that makes a process a worker. Its value is
// the config.
const workerVar = "TASK_STORM_WORKER"

// A config identifies a worker and its files.
type config struct {
	Dir    string // of the database and the journals
	Slot   int    // the worker's number
	Gen    int    // counts the processes in that slot
	Seed   uint64
	Faulty string // the store of faultyStores to use; "" for none
	Resume bool   // resume operations of dead processes
}

func databasePath(dir string) string { return filepath.Join(dir, "tasks.db") }

// faultyStores lists stores with a fault, for tests that the checker finds the fault.
var faultyStores = map[string]func(path string, store *task.SQLiteStore) task.Persistence{}

const (
	submitters   = 6 // goroutines of a worker that submit
	maxWaiting   = 8 // operations of one goroutine that it has not waited for
	maxEndless   = 2 // operations of one goroutine that only Close ends
	maxLifetime  = 3 * time.Second
	retryPause   = 10 * time.Millisecond // while the database is away
	restartError = "Task failed due to system restart"
	closeError   = "Task failed due to system shutdown"
)

// A worker is a process that uses the database until it is killed.
type worker struct {
	config
	backend Backend
	journal *journal
	rng     *rand.Rand
	stop    chan struct{} // closed when the driver asks it to end
}

// Main runs a worker and ends the process, if a storm has started the process as a
// worker. Otherwise it does nothing.
func Main(b Backend) {
	if text := os.Getenv(workerVar); text != "" {
		os.Exit(work(text, b))
	}
}

// work is a worker's main function. It returns the exit status.
func work(text string, b Backend) int {
	w := &worker{backend: b, stop: make(chan struct{})}
	err := json.Unmarshal([]byte(text), &w.config)
	if err == nil {
		w.journal, err = openJournal(journalPath(w.Dir, w.Slot, w.Gen))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "storm:", err)
		return 1
	}
	w.rng = rand.New(rand.NewPCG(w.Seed, uint64(w.Gen)))
	go w.awaitStop()
	for n := 1; ; n++ {
		if err := w.run(n); err != nil {
			fmt.Fprintln(os.Stderr, "storm:", err)
			return 1
		}
		select {
		case <-w.stop:
			return 0
		default:
		}
	}
}

// awaitStop waits until the driver asks the worker to end. It ends the process when
// the driver has ended.
func (w *worker) awaitStop() {
	in := bufio.NewScanner(os.Stdin)
	if in.Scan() {
		close(w.stop)
	}
	in.Scan()
	os.Exit(0)
}

// A session is the time from New to Close of one of a worker's managers.
type session struct {
	*worker
	prefix  string // of the names of its operations
	manager *task.Manager
	closing atomic.Bool // Close may have been called
	quit    atomic.Bool // submit no more operations

	mu      sync.Mutex      // guards what follows
	resumed map[string]*job // by ID
}

func (w *worker) run(n int) error {
	l := &session{worker: w, prefix: fmt.Sprintf("%d.%d.%d.", w.Slot, w.Gen, n), resumed: make(map[string]*job)}
	store, err := l.open()
	for w.backend.Outages && err != nil {
		time.Sleep(retryPause)
		store, err = l.open()
	}
	if err != nil {
		return err
	}
	fmt.Println("ready") // for the driver
	var all sync.WaitGroup
	for i := range submitters {
		rng := rand.New(rand.NewPCG(w.rng.Uint64(), 0))
		all.Go(func() { l.submitAll(i, rng) })
	}
	select {
	case <-w.stop:
	case <-time.After(time.Duration(w.rng.Int64N(int64(maxLifetime)))):
	}
	if w.rng.IntN(2) == 0 { // otherwise Close runs concurrently with Submits
		l.quit.Store(true)
		time.Sleep(10 * time.Millisecond)
	}
	l.closing.Store(true)
	if err := l.manager.Close(); err != nil {
		l.violation("Close: %v", err)
	}
	w.journal.add(record{Kind: closed, Name: l.prefix})
	l.quit.Store(true)
	all.Wait()
	l.waitAll(l.ran())
	if err := store.Close(); !l.accepts(err) {
		return err
	}
	return nil
}

// open opens the store and the manager.
func (l *session) open() (store Store, err error) {
	if store, err = l.backend.Open(l.Dir); err != nil {
		return nil, err
	}
	var db task.Persistence = store
	if l.Faulty != "" {
		db = faultyStores[l.Faulty](databasePath(l.Dir), store.(*task.SQLiteStore))
	}
	l.journal.add(record{Kind: opened, ID: store.Owner(), Name: l.prefix})
	opts := []task.Option{task.WithLogger(slog.New(slog.DiscardHandler))}
	if l.Resume {
		opts = append(opts, task.WithResume(l.resume))
	}
	if l.manager, err = task.New(db, opts...); err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return store, nil
}

// declined reports whether no worker resumes the operation with that ID.
func declined(id string) bool { return strings.HasSuffix(id, "0") }

// resume is the function of WithResume.
func (l *session) resume(op *task.Operation) (task.Func, []task.SubmitOption) {
	if declined(op.ID) {
		return nil, nil
	}
	j := &job{session: l, name: op.Name, kind: "value", sleep: 5 * time.Millisecond, id: op.ID}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resumed[op.ID] = j
	return func(ctx context.Context, update func(int)) (any, error) {
		l.journal.add(record{Kind: resumed, ID: op.ID, Name: l.prefix})
		if now, ok := task.FromContext(ctx); !ok || now.ID != op.ID || now.Name != op.Name || !sameJSON(now.Metadata, op.Metadata) {
			l.violation("%+v was resumed as %+v", op, now)
		}
		return j.run(ctx, update)
	}, []task.SubmitOption{task.WithLock(op.ID[len(op.ID)-1:])}
}

// ran returns the resumed jobs that have run. Another worker may have the others.
func (l *session) ran() (jobs []*job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, j := range l.resumed {
		if j.began.Load() {
			jobs = append(jobs, j)
		}
	}
	return jobs
}

// accepts reports whether an error of the database is acceptable: nil, or any error
// while its server crashes.
func (l *session) accepts(err error) bool { return err == nil || l.backend.Outages }

func (l *session) violation(format string, args ...any) {
	l.journal.add(record{Kind: violation, Text: "worker " + l.prefix + " " + fmt.Sprintf(format, args...)})
}

// submitAll is one of the goroutines that submit operations.
func (l *session) submitAll(i int, rng *rand.Rand) {
	var waiting, endless []*job
	for n := 0; !l.quit.Load(); n++ {
		j := l.newJob(fmt.Sprintf("%s%d.%d", l.prefix, i, n), rng)
		if j.kind == "endless" && len(endless) == maxEndless {
			continue
		}
		if !l.submit(j, rng) {
			if !l.backend.Outages || l.closing.Load() {
				break
			}
			time.Sleep(retryPause)
			continue
		}
		if j.kind == "endless" {
			endless = append(endless, j)
			continue
		}
		waiting = append(waiting, j)
		if rng.IntN(3) == 0 || len(waiting) == maxWaiting {
			l.waitAll(waiting)
			waiting = nil
		}
		if rng.IntN(20) == 0 {
			l.readOthers(rng)
		}
	}
	for !l.closing.Load() { // only Close, and other workers, end the endless operations
		time.Sleep(time.Millisecond)
	}
	l.waitAll(append(waiting, endless...))
}

// submit reports whether Submit has accepted the job.
func (l *session) submit(j *job, rng *rand.Rand) bool {
	op, err := l.manager.Submit(j.name, j.run, task.WithMetadata(map[string]string{"of": j.name}))
	if err != nil {
		if !l.accepts(err) && (!errors.Is(err, task.ErrClosed) || !l.closing.Load()) {
			l.violation("Submit of %s: %v", j.name, err)
		}
		j.refused.Store(true)
		if j.began.Load() {
			l.violation("%s has run, but Submit returned %v", j.name, err)
		}
		return false
	}
	j.id = op.ID
	l.journal.add(record{Kind: submitted, ID: op.ID, Name: op.Name})
	if j.kind == "cancelled" || rng.IntN(20) == 0 {
		if rng.IntN(2) == 0 {
			time.Sleep(time.Duration(rng.Int64N(int64(5 * time.Millisecond))))
		}
		j.cancelled.Store(true)
		if err := l.manager.Cancel(j.id); !l.accepts(err) && !errors.Is(err, task.ErrNotFound) {
			l.violation("Cancel of %s: %v", j.name, err)
		}
	}
	return true
}

func (l *session) waitAll(jobs []*job) {
	for _, j := range jobs {
		op, err := l.manager.Wait(context.Background(), j.id)
		for deadline := time.Now().Add(patience); err != nil && l.accepts(err) && time.Now().Before(deadline); {
			time.Sleep(retryPause)
			op, err = l.manager.Wait(context.Background(), j.id)
		}
		if err != nil {
			l.violation("Wait for %s: %v", j.name, err)
			continue
		}
		l.journal.add(record{Kind: finished, Op: op})
		if err := j.check(op); err != nil {
			l.violation("%s ended as %s, result %v, error %q: %v", j.name, op.State, op.Result, op.Error, err)
		}
	}
}

// readOthers reads operations of other workers. A final state that it reads is an
// acknowledgement, too.
func (l *session) readOthers(rng *rand.Rand) {
	ops, err := l.manager.List(30, rng.IntN(30))
	if !l.accepts(err) {
		l.violation("List: %v", err)
	}
	if len(ops) == 0 {
		return
	}
	op := ops[rng.IntN(len(ops))]
	if strings.HasPrefix(op.Name, l.prefix) {
		if op, ok := l.manager.Get(op.ID); !ok && !l.backend.Outages || ok && op.Error == restartError {
			l.violation("Get of its own operation: %v %v", op, ok)
		}
		return
	}
	if err := l.manager.Cancel(op.ID); !l.accepts(err) && !errors.Is(err, task.ErrNotFound) {
		l.violation("Cancel of another's operation %s: %v", op.Name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.Int64N(int64(300*time.Millisecond))))
	defer cancel()
	op, err = l.manager.Wait(ctx, op.ID)
	if !l.accepts(err) && ctx.Err() == nil {
		l.violation("Wait for another's operation: %v", err)
	}
	if err == nil {
		l.journal.add(record{Kind: finished, Op: op})
	}
}

// A job is an operation with a known outcome.
type job struct {
	session *session
	name    string
	kind    string
	sleep   time.Duration
	id      string // once submitted

	began, cancelled, refused atomic.Bool
}

// The kinds of jobs. Frequent ones are listed more than once.
var kinds = []string{"value", "value", "value", "value", "number", "error", "both", "panic", "goexit", "cancelled", "ignores cancel", "endless"}

func (l *session) newJob(name string, rng *rand.Rand) *job {
	j := &job{session: l, name: name, kind: kinds[rng.IntN(len(kinds))]}
	if rng.IntN(3) > 0 {
		j.sleep = time.Duration(rng.Int64N(int64(20 * time.Millisecond)))
	}
	return j
}

// run is the job's function.
func (j *job) run(ctx context.Context, update func(int)) (any, error) {
	j.began.Store(true)
	if j.refused.Load() {
		j.session.violation("%s runs although Submit has returned an error", j.name)
	}
	if j.kind == "endless" {
		for n := 0; ctx.Err() == nil; n++ {
			update(n % 101)
			if err := task.SetMetadata(ctx, map[string]any{"of": j.name, "n": n}); err != nil {
				j.session.violation("SetMetadata of %s: %v", j.name, err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	for n := range 4 {
		update(25 * n)
		time.Sleep(j.sleep / 4)
	}
	switch j.kind {
	case "panic":
		panic(j.name)
	case "cancelled":
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
		if ctx.Err() == nil {
			return j.result(), nil
		}
	case "ignores cancel": // ignores a cancel
		return j.result(), nil
	case "goexit":
		runtime.Goexit()
	}
	if ctx.Err() != nil && j.kind != "error" && j.kind != "both" {
		return nil, errors.New("stopped: " + j.name)
	}
	switch j.kind {
	case "error":
		return nil, errors.New(j.name)
	case "both":
		return j.result(), errors.New(j.name)
	}
	return j.result(), nil
}

func (j *job) result() any {
	if j.kind == "number" {
		return len(j.name)
	}
	return map[string]any{"for": j.name, "list": []string{"ä", "<&>", "\x00"}, "none": nil}
}

// check returns an error unless op is a possible outcome of the job.
func (j *job) check(op *task.Operation) error {
	if op.State == task.StateCancelled { // if not by this worker, then by another one
		j.cancelled.Store(true)
	}
	for _, end := range j.ends() {
		if op.State == end.state && op.Error == end.err && sameJSON(op.Result, end.result) {
			return nil
		}
	}
	return fmt.Errorf("expected one of %v", j.ends())
}

// An end is a final state.
type end struct {
	state  task.State
	err    string
	result any
}

// ends returns the possible outcomes of the job.
func (j *job) ends() (ends []end) {
	cancelled, closing := j.cancelled.Load(), j.session.closing.Load()
	if !j.began.Load() {
		if cancelled {
			ends = append(ends, end{state: task.StateCancelled})
		}
		if closing {
			ends = append(ends, end{state: task.StateFailed, err: closeError})
		}
		return ends
	}
	// The function saw its context end only after Cancel or Close was called,
	// but may also have returned before it.
	failed := func(text string, result any) {
		ends = append(ends, end{task.StateFailed, text, result})
		if cancelled {
			ends = append(ends, end{task.StateCancelled, text, result})
		}
		if closing {
			ends = append(ends, end{task.StateFailed, closeError + ": " + text, result})
		}
	}
	switch j.kind {
	case "panic":
		return []end{{task.StateFailed, "panic: " + j.name, nil}}
	case "goexit":
		return []end{{task.StateFailed, "the function called runtime.Goexit", nil}}
	case "error":
		failed(j.name, nil)
		return ends
	case "both":
		failed(j.name, j.result())
		return ends
	case "ignores cancel":
		return []end{{task.StateDone, "", j.result()}}
	}
	if j.kind != "endless" {
		ends = append(ends, end{task.StateDone, "", j.result()})
	}
	text := "stopped: " + j.name
	if cancelled {
		ends = append(ends, end{task.StateCancelled, text, nil})
	}
	if closing {
		ends = append(ends, end{task.StateFailed, closeError + ": " + text, nil})
	}
	return ends
}

func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}
