package task_test

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testos"
)

const recoveryText = "Task failed due to system restart"

func recoveryMust(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// recoveryUntil waits until cond holds, looking again and again.
func recoveryUntil(cond func() bool) error {
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("waited for a minute in vain")
		}
	}
	return nil
}

// A recoveryLog is a slog.Handler that keeps what managers log of recovery.
type recoveryLog struct {
	mu          sync.Mutex // guards what follows
	interrupted []string   // the IDs
	count       int64      // sum of the summaries
	failures    int
	successes   int
}

func (l *recoveryLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *recoveryLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *recoveryLog) WithGroup(string) slog.Handler            { return l }

func (l *recoveryLog) Handle(_ context.Context, r slog.Record) error {
	attrs := make(map[string]slog.Value)
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value
		return true
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	switch r.Message {
	case "task: operation interrupted":
		l.interrupted = append(l.interrupted, attrs["id"].String())
	case "task: recovered interrupted operations":
		l.count += attrs["count"].Int64()
	case "task: recovery failed, will be tried again":
		l.failures++
	case "task: recovery succeeded":
		l.successes++
	}
	return nil
}

// ids returns the IDs of the operations that were logged as interrupted, in
// order, or an error if the summary says another number.
func (l *recoveryLog) ids() ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.count != int64(len(l.interrupted)) {
		return nil, fmt.Errorf("logged %d interrupted operations, but summed up %d", len(l.interrupted), l.count)
	}
	return slices.Sorted(slices.Values(l.interrupted)), nil
}

// want checks which operations were logged as interrupted.
func (l *recoveryLog) want(t *testing.T, want ...string) {
	t.Helper()
	got, err := l.ids()
	recoveryMust(t, err)
	if slices.Sort(want); !slices.Equal(got, want) {
		t.Errorf("recovered %d operations, want %d:\n got %.500q\nwant %.500q", len(got), len(want), got, want)
	}
}

// wantTries checks how many recoveries have failed, and then succeeded.
func (l *recoveryLog) wantTries(t *testing.T, failures, successes int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failures != failures || l.successes != successes {
		t.Errorf("%d recoveries have failed and %d succeeded, want %d and %d", l.failures, l.successes, failures, successes)
	}
}

func (l *recoveryLog) option() task.Option { return task.WithLogger(slog.New(l)) }

// recoveryNew returns a new manager on db and its log.
func recoveryNew(t *testing.T, db task.Persistence) (*task.Manager, *recoveryLog) {
	t.Helper()
	testos.CheckLeaks(t)
	l := new(recoveryLog)
	m, err := task.New(db, l.option())
	recoveryMust(t, err)
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m, l
}

func recoveryOpen(t *testing.T, path string) *task.SQLiteStore {
	t.Helper()
	testos.CheckLeaks(t)
	store, err := task.OpenSQLite(path)
	recoveryMust(t, err)
	t.Cleanup(func() { store.Close() })
	return store
}

func recoveryPath(t *testing.T) string { return filepath.Join(t.TempDir(), "tasks.db") }

// recoveryExec runs a statement on the database behind the stores' backs.
func recoveryExec(t *testing.T, path, stmt string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite3", path)
	recoveryMust(t, err)
	defer db.Close()
	_, err = db.Exec(stmt, args...)
	recoveryMust(t, err)
}

// recoveryInsert adds an unfinished row as another store would have left it.
func recoveryInsert(t *testing.T, path string, owner any) (id string) {
	t.Helper()
	id = uuid.NewString()
	recoveryExec(t, path, `INSERT INTO tasks (id, name, state, progress, created_at, updated_at, owner)
		VALUES (?, 'left', 'PENDING', 7, '2024-01-01 00:00:00.000000', '2024-01-01 00:00:01.000000', ?)`, id, owner)
	return id
}

type recoveryRows map[string]task.Operation // by ID

// recoveryStored returns all that is stored.
func recoveryStored(t *testing.T, db task.Persistence) recoveryRows {
	t.Helper()
	rows := make(recoveryRows)
	for {
		page, err := db.List(10_000, len(rows))
		recoveryMust(t, err)
		if len(page) == 0 {
			return rows
		}
		for _, op := range page {
			row := *op
			row.Metadata, row.Result = recoveryJSON(t, op.Metadata), recoveryJSON(t, op.Result)
			rows[op.ID] = row
		}
	}
}

// recoveryJSON makes values comparable, which stores may hold in any form.
func recoveryJSON(t *testing.T, v any) json.RawMessage {
	t.Helper()
	raw, err := json.Marshal(v)
	recoveryMust(t, err)
	return raw
}

func (rows recoveryRows) unfinished() (ids []string) {
	for id, op := range rows {
		if !op.State.Finished() {
			ids = append(ids, id)
		}
	}
	return ids
}

// wantFailed checks that now differs from before in nothing but that the
// operations with those IDs have failed.
func (before recoveryRows) wantFailed(t *testing.T, now recoveryRows, failed ...string) {
	t.Helper()
	want := maps.Clone(before)
	for _, id := range failed {
		op := want[id]
		op.State, op.Error, op.UpdatedAt = task.StateFailed, recoveryText, now[id].UpdatedAt
		want[id] = op
		if latest := slices.MaxFunc([]time.Time{op.CreatedAt, op.StartedAt, before[id].UpdatedAt}, time.Time.Compare); op.UpdatedAt.Before(latest) {
			t.Errorf("%s: UpdatedAt is %v, before %v", id, op.UpdatedAt, latest)
		}
	}
	if len(now) != len(want) {
		t.Errorf("%d operations are stored, want %d", len(now), len(want))
	}
	for id, op := range want {
		if got := now[id]; !reflect.DeepEqual(got, op) {
			t.Fatalf("stored operation:\n got %+v\nwant %+v", got, op)
		}
	}
}

// recoverySame compares how far operations have come.
func recoverySame(t *testing.T, got *task.Operation, want task.Operation) {
	t.Helper()
	if got.ID != want.ID || got.State != want.State || got.Progress != want.Progress || got.Result != want.Result || got.Error != want.Error {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

// A procManager is the role of a process with a manager. Its methods are
// called by the test.
type procManager struct {
	store *task.SQLiteStore
	m     *task.Manager

	mu   sync.Mutex                     // guards what follows
	told map[string]chan task.Operation // by ID: what the function is to do next
}

// procOpened is what a process finds when it has started its manager.
type procOpened = struct {
	Recovered  []string // by this manager
	Unfinished []string // that are left
}

func (p *procManager) Open(path string, found *procOpened) (err error) {
	if p.store, err = task.OpenSQLite(path); err != nil {
		return err
	}
	l := new(recoveryLog)
	if p.m, err = task.New(p.store, l.option()); err != nil {
		return err
	}
	if found.Recovered, err = l.ids(); err != nil {
		return err
	}
	ops, err := p.m.List(100_000, 0)
	for _, op := range ops {
		if !op.State.Finished() {
			found.Unfinished = append(found.Unfinished, op.ID)
		}
	}
	return err
}

// Submit submits operations with those names, metadata and progress, which run
// until they are told to end. It returns them once all that is stored, and
// those that have a final state have reached it.
func (p *procManager) Submit(wants []task.Operation, got *[]task.Operation) error {
	ids := make([]string, len(wants))
	for i, want := range wants {
		told := make(chan task.Operation, 1)
		op, err := p.m.Submit(want.Name, func(ctx context.Context, update func(int)) (any, error) {
			update(want.Progress)
			if err := task.SetMetadata(ctx, want.Metadata); err != nil {
				return nil, err
			}
			for {
				select {
				case op := <-told:
					switch op.State {
					case task.StateDone:
						return op.Result, nil
					case task.StateFailed:
						return op.Result, errors.New(op.Error)
					}
					update(op.Progress)
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
			}
		})
		if err != nil {
			return err
		}
		ids[i] = op.ID
		p.mu.Lock()
		p.told[op.ID] = told
		p.mu.Unlock()
	}
	for i, want := range wants {
		op, err := p.stored(ids[i], want)
		if err == nil && want.State.Finished() {
			want.ID = op.ID
			err = p.End(want, op)
		}
		if err != nil {
			return err
		}
		*got = append(*got, *op)
	}
	return nil
}

// stored returns a running operation once its row shows what is wanted.
func (p *procManager) stored(id string, want task.Operation) (op *task.Operation, err error) {
	late := recoveryUntil(func() bool {
		op, err = p.store.Get(id)
		var metadata any
		return err != nil || op.State == task.StateRunning && op.Progress == want.Progress &&
			op.DecodeMetadata(&metadata) == nil && metadata == want.Metadata
	})
	return op, cmp.Or(err, late)
}

// Report has an operation report progress, and returns it once that is stored.
func (p *procManager) Report(want task.Operation, got *task.Operation) error {
	p.tell(want)
	op, err := p.stored(want.ID, want)
	if err == nil {
		*got = *op
	}
	return err
}

func (p *procManager) tell(want task.Operation) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told[want.ID] <- want
}

// End ends an operation in the way that want says, and returns it.
func (p *procManager) End(want task.Operation, got *task.Operation) error {
	if want.State == task.StateCancelled {
		if err := p.m.Cancel(want.ID); err != nil {
			return err
		}
	} else {
		p.tell(want)
	}
	op, err := p.m.Wait(context.Background(), want.ID)
	if err == nil {
		*got = *op
	}
	return err
}

// Leave stores an operation, and starts no manager that would recover those of
// others. It takes a path and a state, and returns the ID.
func (p *procManager) Leave(what [2]string, id *string) error {
	store, err := task.OpenSQLite(what[0])
	if err != nil {
		return err
	}
	*id = uuid.NewString()
	return store.Save(&task.Operation{ID: *id, Name: "left", State: task.State(what[1])})
}

func (p *procManager) Close(string, *string) error {
	return errors.Join(p.m.Close(), p.store.Close())
}

// procOpen starts a process with a manager on the database.
func procOpen(t *testing.T, path string) *proc {
	t.Helper()
	p := procStart(t, "manager")
	p.call("Open", path, new(procOpened))
	return p
}

func (p *proc) submit(wants ...task.Operation) (got []task.Operation) {
	p.t.Helper()
	p.call("Submit", wants, &got)
	return got
}

func (p *proc) close() {
	p.t.Helper()
	p.call("Close", "", new(string))
	p.end()
}

// procWork is what the processes of a test do: three operations that go on,
// and one for each final state.
var procWork = []task.Operation{
	{Name: "scrub", Progress: 40, Metadata: "tank"},
	{Name: "send", Progress: 99, Metadata: "tank@monday"},
	{Name: "idle"},
	{Name: "done", Progress: 5, State: task.StateDone, Result: "all is well"},
	{Name: "failed", Progress: 5, State: task.StateFailed, Error: "no such pool", Result: "half"},
	{Name: "cancelled", Progress: 5, Metadata: "by hand", State: task.StateCancelled},
}

// procEnds is how the three that go on are to end.
var procEnds = []task.Operation{
	{State: task.StateDone, Progress: 100, Result: "sent"},
	{State: task.StateFailed, Progress: 99, Error: "disk full"},
	{State: task.StateCancelled, Error: task.ErrCancelled.Error()},
}

func TestRecoveryOfKilledProcess(t *testing.T) {
	path := recoveryPath(t)
	procs := []*proc{procOpen(t, path), procOpen(t, path), procOpen(t, path)}
	work := procAll[[]task.Operation](t, procs, "Submit", procWork)
	const victim = 1
	var dead []string
	for _, op := range work[victim][:len(procEnds)] {
		dead = append(dead, op.ID)
	}
	store := recoveryOpen(t, path)
	before := recoveryStored(t, store)
	if got, want := len(before), len(procs)*len(procWork); got != want {
		t.Fatalf("%d operations are stored, want %d", got, want)
	}
	procs[victim].kill()
	before.wantFailed(t, recoveryStored(t, store)) // nothing happens by itself
	m, l := recoveryNew(t, store)

	t.Run("OnlyItsOperationsFail", func(t *testing.T) {
		before.wantFailed(t, recoveryStored(t, store), dead...)
		l.want(t, dead...)
		if got := procOwnerFiles(t, path); got != 3 {
			t.Errorf("%d owner files, want those of two processes and this one", got)
		}
	})
	t.Run("OthersFinish", func(t *testing.T) {
		for i, p := range procs {
			if i == victim {
				continue
			}
			for j, want := range procEnds {
				var told task.Operation
				want.ID = work[i][j].ID
				p.call("End", want, &told)
				got, err := m.Wait(t.Context(), want.ID)
				recoveryMust(t, err)
				recoverySame(t, got, want)
				if told.State != got.State || !told.UpdatedAt.Equal(got.UpdatedAt) {
					t.Errorf("its own process was told %+v\nhere it is %+v", told, got)
				}
			}
			p.close()
		}
		l.want(t, dead...)
		recoveryMust(t, m.Close())
		recoveryMust(t, store.Close())
		if got := procOwnerFiles(t, path); got != 0 {
			t.Errorf("%d owner files are left", got)
		}
	})
}

func TestRecoveryOwnerFilesDoNotPileUp(t *testing.T) {
	path := recoveryPath(t)
	const kills = 50
	var dead []string
	for i := range kills { // every other one leaves nothing but its file
		state := []task.State{task.StatePending, task.StateDone}[i%2]
		var id string
		p := procStart(t, "manager")
		p.call("Leave", [2]string{path, string(state)}, &id)
		p.kill()
		if !state.Finished() {
			dead = append(dead, id)
		}
	}
	if got := procOwnerFiles(t, path); got != kills {
		t.Errorf("%d owner files, want those of %d killed processes", got, kills)
	}
	_, l := recoveryNew(t, recoveryOpen(t, path))
	l.want(t, dead...)
	if got := procOwnerFiles(t, path); got != 1 {
		t.Errorf("%d owner files after recovery, want that of the living", got)
	}
}

// TestRecoveryOfStores has several stores in one process. One dies: it is
// closed under its manager, whose operation goes on as if nothing was.
func TestRecoveryOfStores(t *testing.T) {
	path := recoveryPath(t)
	living := recoveryOpen(t, path)
	moving := &recoverySwitch{db: recoveryOpen(t, path)}
	alive, _ := recoveryNew(t, living)
	dying, _ := recoveryNew(t, moving)
	release := make(chan struct{})
	blocked := func(ctx context.Context, update func(int)) (any, error) {
		update(30)
		<-release
		return "finished", nil
	}
	ids := make([]string, 2)
	for i, m := range []*task.Manager{alive, dying} {
		op, err := m.Submit("blocked", blocked)
		recoveryMust(t, err)
		ids[i] = op.ID
	}
	recoveryMust(t, recoveryUntil(func() bool {
		a, errA := living.Get(ids[0])
		b, errB := living.Get(ids[1])
		return errA != nil || errB != nil || a.Progress == 30 && b.Progress == 30
	}))
	recoveryMust(t, moving.move(living))

	locked := recoveryOpen(t, path) // alive, without a manager
	recoveryMust(t, locked.Save(&task.Operation{ID: "of a living store", State: task.StatePending}))
	unlocked, directory := uuid.NewString(), uuid.NewString()
	recoveryMust(t, os.WriteFile(path+"-owner-"+unlocked, nil, 0o600))
	recoveryMust(t, os.Mkdir(path+"-owner-"+directory, 0o700))
	outside := filepath.Join(filepath.Dir(filepath.Dir(path)), "x")
	recoveryMust(t, os.WriteFile(outside, nil, 0o600))

	dead := []string{ids[1]}
	for _, owner := range []any{
		nil, "", "garbage", "../../x", "/../../x", []byte("\x00\xff"), 42, uuid.NewString(), unlocked,
		strings.ToUpper(unlocked), "urn:uuid:" + unlocked,
	} {
		dead = append(dead, recoveryInsert(t, path, owner))
	}
	doubtful := recoveryInsert(t, path, directory)

	fresh := recoveryOpen(t, path)
	before := recoveryStored(t, fresh)
	m, l := recoveryNew(t, fresh)

	t.Run("OnlyTheDeadFail", func(t *testing.T) {
		before.wantFailed(t, recoveryStored(t, fresh), dead...)
		l.want(t, dead...)
	})
	t.Run("NotTwice", func(t *testing.T) {
		for _, store := range []*task.SQLiteStore{living, fresh, recoveryOpen(t, path)} {
			_, l := recoveryNew(t, store)
			l.want(t)
		}
	})
	t.Run("OnlyOwnerFilesOfTheDeadGo", func(t *testing.T) {
		if _, err := os.Stat(outside); err != nil {
			t.Error(err)
		}
		if got := procOwnerFiles(t, path); got != 4 {
			t.Errorf("%d owner files, want those of living, locked and fresh, and a directory", got)
		}
		if _, err := os.Stat(path + "-owner-" + unlocked); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("stat of the file of a dead owner: %v", err)
		}
	})
	t.Run("InDoubtAlive", func(t *testing.T) {
		recoveryMust(t, os.Remove(path+"-owner-"+directory))
		_, l := recoveryNew(t, recoveryOpen(t, path))
		l.want(t, doubtful)
	})
	t.Run("FinishedOnce", func(t *testing.T) {
		close(release)
		for i, want := range []task.State{task.StateDone, task.StateFailed} {
			for _, m := range []*task.Manager{alive, dying, m} {
				op, err := m.Wait(t.Context(), ids[i])
				recoveryMust(t, err)
				if op.State != want || (op.Error == recoveryText) != (want == task.StateFailed) {
					t.Errorf("operation %d is %+v, want it %s", i, op, want)
				}
			}
		}
	})
}

// TestRecoveryOfOneStore has several managers on a store that nobody else can
// open.
func TestRecoveryOfOneStore(t *testing.T) {
	store := recoveryOpen(t, ":memory:")
	for range 2 {
		m, l := recoveryNew(t, store)
		l.want(t)
		_, err := m.Submit("lasting", func(ctx context.Context, _ func(int)) (any, error) {
			<-ctx.Done()
			return nil, nil
		})
		recoveryMust(t, err)
	}
	if got := len(recoveryStored(t, store).unfinished()); got != 2 {
		t.Errorf("%d operations go on, want 2", got)
	}
}

// A recoverySwitch has a store that can be replaced under a running manager,
// as if one that was taken for dead came back.
type recoverySwitch struct {
	mu sync.RWMutex // guards what follows
	db *task.SQLiteStore
}

func (s *recoverySwitch) now() *task.SQLiteStore {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.db
}

// move closes the store and goes on with another one.
func (s *recoverySwitch) move(to *task.SQLiteStore) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.db.Close()
	s.db = to
	return err
}

func (s *recoverySwitch) Save(op *task.Operation) error          { return s.now().Save(op) }
func (s *recoverySwitch) Update(op *task.Operation) error        { return s.now().Update(op) }
func (s *recoverySwitch) Get(id string) (*task.Operation, error) { return s.now().Get(id) }
func (s *recoverySwitch) List(n, offset int) ([]*task.Operation, error) {
	return s.now().List(n, offset)
}
func (s *recoverySwitch) Recover(reason string) iter.Seq2[*task.Operation, error] {
	return s.now().Recover(reason)
}

// recoveryFill adds n unfinished rows of one owner. Their times are ahead of
// now by as much as SQLite's modifier ahead says.
func recoveryFill(t *testing.T, path string, n int, owner any, ahead string) {
	t.Helper()
	recoveryExec(t, path, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
		INSERT INTO tasks (id, name, state, progress, created_at, started_at, updated_at, owner)
		SELECT printf('%s-%05d', ?2, i), 'left', iif(i % 2, 'PENDING', 'RUNNING'), i % 100,
			strftime('%F %T.000000', 'now', ?3), strftime('%F %T.000001', 'now', ?3), strftime('%F %T.000002', 'now', ?3), ?2
		FROM n`, n, owner, ahead)
}

func TestRecoveryStartedAtOnce(t *testing.T) {
	path := recoveryPath(t)
	store := recoveryOpen(t, path)
	recoveryFill(t, path, 2500, uuid.NewString(), "-1 hour") // some chunks
	for range 20 {
		recoveryFill(t, path, 10, uuid.NewString(), "-1 hour")
	}
	recoveryFill(t, path, 100, "garbage", "-1 hour")
	before := recoveryStored(t, store)
	procs := make([]*proc, 4)
	for i := range procs {
		procs[i] = procStart(t, "manager")
	}
	var recovered []string
	for i, found := range procAll[procOpened](t, procs, "Open", path) {
		recovered = append(recovered, found.Recovered...)
		if n := len(found.Unfinished); n > 0 {
			t.Errorf("process %d: New has returned with %d operations unfinished", i, n)
		}
	}
	slices.Sort(recovered)
	if want := slices.Sorted(maps.Keys(before)); !slices.Equal(recovered, want) {
		t.Errorf("recovered %d operations, %d different ones; want %d", len(recovered), len(slices.Compact(recovered)), len(want))
	}
	before.wantFailed(t, recoveryStored(t, store), slices.Collect(maps.Keys(before))...)
}

// TestRecoveryBesideRecovery stops one recovery between two chunks, as if its
// process was slow or about to be killed.
func TestRecoveryBesideRecovery(t *testing.T) {
	path := recoveryPath(t)
	slow, store := recoveryOpen(t, path), recoveryOpen(t, path)
	owner := uuid.NewString()
	recoveryMust(t, os.WriteFile(path+"-owner-"+owner, nil, 0o600))
	recoveryFill(t, path, 2500, owner, "-1 hour")
	for _, err := range slow.Recover(recoveryText) {
		recoveryMust(t, err)
		recoveryNew(t, store)
		if left := recoveryStored(t, store).unfinished(); len(left) > 0 {
			t.Errorf("New has returned with %d operations unfinished", len(left))
		}
		break
	}
	recoveryNew(t, store)
	if got := procOwnerFiles(t, path); got != 2 {
		t.Errorf("%d owner files, want those of two stores", got)
	}
}

func TestRecoveryOfNewFile(t *testing.T) {
	for round := range 3 {
		path := recoveryPath(t)
		procs := make([]*proc, 5)
		for i := range procs {
			procs[i] = procStart(t, "manager")
		}
		for _, found := range procAll[procOpened](t, procs, "Open", path) {
			if len(found.Recovered) > 0 {
				t.Errorf("round %d: recovered %q", round, found.Recovered)
			}
		}
		procAll[[]task.Operation](t, procs, "Submit", procWork[len(procEnds):])
		procAll[string](t, procs, "Close", "")
		for _, p := range procs {
			p.end()
		}
		if got := procOwnerFiles(t, path); got != 0 {
			t.Errorf("%d owner files are left", got)
		}
		rows := recoveryStored(t, recoveryOpen(t, path))
		if got, want := len(rows), len(procs)*len(procEnds); got != want {
			t.Errorf("%d operations are stored, want %d", got, want)
		}
		for _, op := range rows {
			if !strings.EqualFold(op.Name, string(op.State)) {
				t.Errorf("round %d: %+v, want the state that is its name", round, op)
			}
		}
	}
}

func TestRecoveryOfMany(t *testing.T) {
	const n = 20_000
	for _, ahead := range []string{"-1 hour", "+10 years"} {
		t.Run(ahead, func(t *testing.T) {
			path := recoveryPath(t)
			store := recoveryOpen(t, path)
			recoveryFill(t, path, n, uuid.NewString(), ahead)
			before := recoveryStored(t, store)
			ids := slices.Collect(maps.Keys(before))
			_, l := recoveryNew(t, store)
			before.wantFailed(t, recoveryStored(t, store), ids...)
			l.want(t, ids...)
		})
	}
}

// TestRecoveryClock has rows from the future, in the forms of other code too.
func TestRecoveryClock(t *testing.T) {
	for _, updated := range []any{
		"2126-01-02 03:04:05.678901", "2126-01-02 03:04:05", "2126-01-02T03:04:05Z", "2126-01-02 03:04:05.6 +0000 UTC", "", nil,
		"2024-01-02 03:04:05.678901",
	} {
		t.Run(fmt.Sprint(updated), func(t *testing.T) {
			path := recoveryPath(t)
			store := recoveryOpen(t, path)
			recoveryExec(t, path, `INSERT INTO tasks (id, name, state, created_at, updated_at, started_at) VALUES
				('a', 'a', 'RUNNING', '2126-01-02T03:04:00Z', ?1, NULL),
				('b', 'b', 'RUNNING', '2024-01-01 00:00:00', ?1, '2126-01-02 03:04:01.000000'),
				('c', 'c', 'RUNNING', NULL, ?1, NULL)`, updated)
			before := recoveryStored(t, store)
			recoveryNew(t, store)
			before.wantFailed(t, recoveryStored(t, store), "a", "b", "c")
		})
	}
}

// TestRecoveryPaths opens one database by different names. Whoever does not
// see that it is the same takes the living for dead.
func TestRecoveryPaths(t *testing.T) {
	root := t.TempDir()
	dir, link := filepath.Join(root, "a dir?#%20"), filepath.Join(root, "link")
	recoveryMust(t, os.Mkdir(dir, 0o700))
	recoveryMust(t, os.Symlink(dir, link))
	t.Chdir(root)
	path := filepath.Join(dir, "tasks.db")
	living, _ := recoveryNew(t, recoveryOpen(t, path))
	recoveryMust(t, os.Symlink("tasks.db", filepath.Join(dir, "alias.db")))
	op, err := living.Submit("living", func(ctx context.Context, _ func(int)) (any, error) {
		<-ctx.Done()
		return nil, nil
	})
	recoveryMust(t, err)
	for _, path := range []string{
		path, filepath.Join(dir, "alias.db"), filepath.Join(link, "tasks.db"), filepath.Join(link, "alias.db"),
		"link/tasks.db", "./link/../link/alias.db",
	} {
		t.Run(path, func(t *testing.T) {
			db, err := sql.Open("sqlite3", "file:"+(&url.URL{Path: path}).EscapedPath())
			recoveryMust(t, err)
			defer db.Close()
			inside, err := task.NewSQLiteStore(db)
			recoveryMust(t, err)
			defer inside.Close()
			for _, store := range []*task.SQLiteStore{inside, recoveryOpen(t, path)} {
				m, l := recoveryNew(t, store)
				l.want(t)
				if got, ok := m.Get(op.ID); !ok || got.State.Finished() {
					t.Errorf("Get: %+v, %v", got, ok)
				}
				recoveryMust(t, m.Close())
			}
		})
	}
}

// TestRecoveryOfWaitedFor waits here for an operation that another process
// runs, and has various things happen to it meanwhile.
func TestRecoveryOfWaitedFor(t *testing.T) {
	path := recoveryPath(t)
	end := func(want task.Operation) func(*proc, task.Operation) {
		return func(p *proc, op task.Operation) {
			want.ID = op.ID
			p.call("End", want, new(task.Operation))
		}
	}
	for _, tt := range []struct {
		name      string
		meanwhile func(*proc, task.Operation)
		want      task.Operation
		err       error
	}{
		{"Done", end(procEnds[0]), procEnds[0], nil},
		{"Failed", end(procEnds[1]), task.Operation{State: task.StateFailed, Progress: 40, Error: "disk full"}, nil},
		{"Cancelled", end(procEnds[2]), task.Operation{State: task.StateCancelled, Progress: 40, Error: "operation cancelled"}, nil},
		{"Killed", func(p *proc, _ task.Operation) { p.kill() },
			task.Operation{State: task.StateFailed, Progress: 40, Error: recoveryText}, nil},
		{"Deleted", func(p *proc, op task.Operation) { recoveryExec(t, path, `DELETE FROM tasks WHERE id = ?`, op.ID) },
			task.Operation{}, task.ErrNotFound},
		{"ContextDone", nil, task.Operation{State: task.StateRunning, Progress: 70}, context.Canceled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := procOpen(t, path)
			op := p.submit(procWork[0])[0]
			db := &recoveryLook{SQLiteStore: recoveryOpen(t, path), looked: make(chan struct{}, 1)}
			m, l := recoveryNew(t, db)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan struct{})
			var got *task.Operation
			var err error
			go func() {
				defer close(done)
				got, err = m.Wait(ctx, op.ID)
			}()
			<-db.looked // Wait has seen it running
			if tt.meanwhile != nil {
				tt.meanwhile(p, op)
			} else {
				op.Progress = 70
				p.call("Report", op, new(task.Operation))
				cancel()
			}
			<-done
			if !errors.Is(err, tt.err) {
				t.Fatalf("Wait: error %v, want %v", err, tt.err)
			}
			if errors.Is(tt.err, task.ErrNotFound) {
				if got != nil {
					t.Errorf("Wait returned %+v", got)
				}
				return
			}
			tt.want.ID = op.ID
			recoverySame(t, got, tt.want)
			if got.Error == recoveryText {
				l.want(t, op.ID)
			} else {
				l.want(t)
			}
		})
	}
}

// A recoveryLook tells when somebody has got an operation.
type recoveryLook struct {
	*task.SQLiteStore
	looked chan struct{}
}

func (s *recoveryLook) Get(id string) (*task.Operation, error) {
	defer func() {
		select {
		case s.looked <- struct{}{}:
		default:
		}
	}()
	return s.SQLiteStore.Get(id)
}

// TestRecoveryWaitEnds closes manager and store while somebody waits for an
// operation of another manager.
func TestRecoveryWaitEnds(t *testing.T) {
	path := recoveryPath(t)
	other := recoveryOpen(t, path)
	recoveryMust(t, other.Save(&task.Operation{ID: "other's", State: task.StateRunning}))
	db := &recoveryLook{SQLiteStore: recoveryOpen(t, path), looked: make(chan struct{}, 1)}
	m, _ := recoveryNew(t, db)
	done := make(chan error)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	go func() {
		_, err := m.Wait(ctx, "other's")
		done <- err
	}()
	<-db.looked
	recoveryMust(t, m.Close())
	recoveryMust(t, db.Close())
	if err := <-done; !errors.Is(err, task.ErrClosed) {
		t.Errorf("Wait: %v, want %v", err, task.ErrClosed)
	}
}

func TestRecoveryOthersOperations(t *testing.T) {
	path := recoveryPath(t)
	p := procOpen(t, path)
	work := p.submit(procWork...)
	m, _ := recoveryNew(t, recoveryOpen(t, path))

	t.Run("Get", func(t *testing.T) {
		for _, want := range work {
			got, ok := m.Get(want.ID)
			if !ok {
				t.Fatalf("no operation %+v", want)
			}
			recoverySame(t, got, want)
		}
	})
	t.Run("List", func(t *testing.T) {
		own, err := m.Submit("own", func(context.Context, func(int)) (any, error) { return nil, nil })
		recoveryMust(t, err)
		ops, err := m.List(100, 0)
		recoveryMust(t, err)
		want := []string{own.ID}
		for _, op := range slices.Backward(work) {
			want = append(want, op.ID)
		}
		var got []string
		for _, op := range ops {
			got = append(got, op.ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %q\nwant %q", got, want)
		}
	})
	t.Run("Cancel", func(t *testing.T) {
		for _, op := range work {
			got, _ := m.Get(op.ID)
			for _, err := range []error{m.Cancel(op.ID), got.Cancel()} {
				want, not := errors.ErrUnsupported, task.ErrNotFound
				if op.State.Finished() {
					want, not = not, want
				}
				if !errors.Is(err, want) || errors.Is(err, not) {
					t.Errorf("%s: %v, want %v", op.State, err, want)
				}
			}
		}
	})
	t.Run("WaitWithContextDone", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), -1)
		defer cancel()
		op, err := m.Wait(ctx, work[0].ID)
		if err != ctx.Err() || op == nil || op.State != task.StateRunning || op.Progress != procWork[0].Progress {
			t.Errorf("got %+v, %v", op, err)
		}
	})
}

// A mapStore is a store as a caller may write it: the four methods, a map and
// a mutex.
type mapStore struct {
	mu    sync.Mutex // guards what follows
	rows  map[string]task.Operation
	order []string // the IDs by order of Save
}

func newMapStore() *mapStore { return &mapStore{rows: make(map[string]task.Operation)} }

func (s *mapStore) Save(op *task.Operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.rows[op.ID]; ok {
		return errors.New("stored already")
	}
	s.rows[op.ID] = *op
	s.order = append(s.order, op.ID)
	return nil
}

func (s *mapStore) Update(op *task.Operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if row, ok := s.rows[op.ID]; !ok || row.State.Finished() {
		return task.ErrNotFound
	}
	s.rows[op.ID] = *op
	return nil
}

func (s *mapStore) List(limit, offset int) (ops []*task.Operation, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := len(s.order) - 1 - offset; i >= 0 && len(ops) < limit; i-- {
		op := s.rows[s.order[i]]
		ops = append(ops, &op)
	}
	return ops, nil
}

func (s *mapStore) Get(id string) (*task.Operation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if op, ok := s.rows[id]; ok {
		return &op, nil
	}
	return nil, task.ErrNotFound
}

func (s *mapStore) delete(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.rows, id)
	s.order = slices.DeleteFunc(s.order, func(other string) bool { return other == id })
}

// left adds an operation that a dead process has left.
func (s *mapStore) left(t *testing.T, id string, state task.State) {
	t.Helper()
	at := time.Now().UTC().Add(-time.Hour)
	recoveryMust(t, s.Save(&task.Operation{ID: id, Name: "left", State: state, Progress: 60, Metadata: "tank", CreatedAt: at, UpdatedAt: at}))
}

// A recoveryHooks is a four-method store that behaves in ways of its own.
type recoveryHooks struct {
	*mapStore
	hook   func(method, id string) error // called by List, Get and Update, if not nil
	page   int                           // List returns no more, if not 0
	nilNil bool                          // Get returns nil, nil for what is missing
}

func (s *recoveryHooks) call(method, id string) error {
	if s.hook == nil {
		return nil
	}
	return s.hook(method, id)
}

func (s *recoveryHooks) List(limit, offset int) ([]*task.Operation, error) {
	if s.page > 0 {
		limit = min(limit, s.page)
	}
	ops, err := s.mapStore.List(limit, offset)
	return ops, cmp.Or(s.call("List", ""), err) // the hook comes after the page is read
}

func (s *recoveryHooks) Get(id string) (*task.Operation, error) {
	if err := s.call("Get", id); err != nil {
		return nil, err
	}
	op, err := s.mapStore.Get(id)
	if s.nilNil && errors.Is(err, task.ErrNotFound) {
		return nil, nil
	}
	return op, err
}

func (s *recoveryHooks) Update(op *task.Operation) error {
	if err := s.call("Update", op.ID); err != nil {
		return err
	}
	return s.mapStore.Update(op)
}

func TestRecoveryOfOwnStore(t *testing.T) {
	const n = 25_000
	for _, page := range []int{0, 100, 1} {
		t.Run(fmt.Sprintf("Page%d", page), func(t *testing.T) {
			db := &recoveryHooks{mapStore: newMapStore(), page: page}
			var dead []string
			for i := range n {
				id, state := fmt.Sprint(i), task.StateDone
				switch i {
				case 0, 1, 999, 1000, n / 2, n - 2:
					state = task.StateRunning
				case 2, n/2 + 1, n - 1:
					state = task.StatePending
				}
				if !state.Finished() {
					dead = append(dead, id)
				}
				db.left(t, id, state)
			}
			before := recoveryStored(t, db)
			m, l := recoveryNew(t, db)
			before.wantFailed(t, recoveryStored(t, db), dead...)
			l.want(t, dead...)
			if op, ok := m.Get(dead[0]); !ok || op.Error != recoveryText || op.Metadata != "tank" {
				t.Errorf("Get: %+v", op)
			}
		})
	}
}

// TestRecoveryOvertaken has somebody else finish or delete an operation while
// it is recovered.
func TestRecoveryOvertaken(t *testing.T) {
	for _, method := range []string{"Get", "Update"} {
		for _, deletes := range []bool{false, true} {
			for _, nilNil := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/deletes=%v/nilNil=%v", method, deletes, nilNil), func(t *testing.T) {
					db := &recoveryHooks{mapStore: newMapStore(), nilNil: nilNil}
					db.left(t, "before", task.StatePending)
					db.left(t, "taken", task.StateRunning)
					db.left(t, "after", task.StateRunning)
					before := recoveryStored(t, db)
					taken := before["taken"]
					taken.State = task.StateDone
					db.hook = func(called, id string) error {
						if called != method || id != "taken" || before["taken"].State != task.StateRunning {
							return nil
						}
						if deletes {
							db.delete("taken")
							delete(before, "taken")
							return nil
						}
						before["taken"] = taken
						return db.mapStore.Update(&taken)
					}
					_, l := recoveryNew(t, db)
					l.want(t, "before", "after")
					before.wantFailed(t, recoveryStored(t, db.mapStore), "before", "after")
				})
			}
		}
	}
}

func TestRecoveryMissing(t *testing.T) {
	for _, nilNil := range []bool{false, true} {
		m, _ := recoveryNew(t, &recoveryHooks{mapStore: newMapStore(), nilNil: nilNil})
		if op, ok := m.Get("missing"); ok || op != nil {
			t.Errorf("Get: %+v, %v", op, ok)
		}
		if err := m.Cancel("missing"); !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Cancel: %v", err)
		}
		if op, err := m.Wait(t.Context(), "missing"); op != nil || !errors.Is(err, task.ErrNotFound) {
			t.Errorf("Wait: %+v, %v", op, err)
		}
	}
}

var errRecoveryTest = errors.New("the store is on strike")

func TestRecoveryFails(t *testing.T) {
	for _, method := range []string{"List", "Get", "Update"} {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // which fails if goroutines are left
				db := &recoveryHooks{mapStore: newMapStore(), hook: func(called, _ string) error {
					if called == method {
						return errRecoveryTest
					}
					return nil
				}}
				db.left(t, "left", task.StateRunning)
				before := recoveryStored(t, db.mapStore)
				if m, err := task.New(db); m != nil || !errors.Is(err, errRecoveryTest) {
					t.Errorf("New: %v, %v", m, err)
				}
				before.wantFailed(t, recoveryStored(t, db.mapStore))
			})
		})
	}
	t.Run("SQLite", func(t *testing.T) {
		store := recoveryOpen(t, recoveryPath(t))
		recoveryMust(t, store.Close())
		if m, err := task.New(store); m != nil || err == nil {
			t.Errorf("New on a closed store: %v, %v", m, err)
		}
	})
}

// TestRecoveryInBackground has the first recoveries fail. Operations of the
// manager itself are live then, or end while recovery looks at them.
func TestRecoveryInBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const failures = 6
		db := &recoveryHooks{mapStore: newMapStore()}
		db.left(t, "left", task.StateRunning)
		release, releaseSlow := make(chan struct{}), make(chan struct{})
		var quick *task.Operation
		var m *task.Manager
		lists := 0
		db.hook = func(method, _ string) error {
			if method != "List" {
				return nil
			}
			if lists++; lists <= failures {
				return errRecoveryTest
			}
			if lists == failures+1 { // the page has been read
				close(release)
				m.Wait(context.Background(), quick.ID)
			}
			return nil
		}
		l := new(recoveryLog)
		m = task.NewManager(db, l.option())
		defer m.Close()
		submit := func(release chan struct{}) *task.Operation {
			op, err := m.Submit("own", func(context.Context, func(int)) (any, error) {
				<-release
				return "own", nil
			})
			recoveryMust(t, err)
			return op
		}
		quick = submit(release)
		slow := submit(releaseSlow)
		time.Sleep(5 * time.Second) // six failures take 100+200+400+800+1600 ms, the seventh 3200 more
		l.want(t)
		l.wantTries(t, failures, 0)
		time.Sleep(time.Minute)
		l.want(t, "left")
		l.wantTries(t, failures, 1)
		close(releaseSlow)
		for _, op := range []*task.Operation{quick, slow} {
			if got, err := m.Wait(t.Context(), op.ID); err != nil || got.State != task.StateDone || got.Result != "own" {
				t.Errorf("Wait: %+v, %v", got, err)
			}
		}
	})
	t.Run("Close", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m := task.NewManager(&recoveryHooks{mapStore: newMapStore(), hook: func(string, string) error { return errRecoveryTest }},
				new(recoveryLog).option())
			time.Sleep(time.Hour)
			recoveryMust(t, m.Close())
		})
	})
}

func TestRecoveryOfMemoryStore(t *testing.T) {
	store := task.NewMemoryStore()
	save := func(id string) {
		recoveryMust(t, store.Save(&task.Operation{ID: id, Name: "left", State: task.StateRunning, Progress: 60, Metadata: "tank"}))
	}
	first, _ := recoveryNew(t, store)
	release := make(chan struct{})
	op, err := first.Submit("first", func(ctx context.Context, _ func(int)) (any, error) {
		select {
		case <-release:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	recoveryMust(t, err)
	for _, id := range []string{"", "saved", "saved later"} { // what other code saves
		if id != "" {
			save(id)
		}
		before := recoveryStored(t, store)
		m, l := recoveryNew(t, store)
		if id == "" {
			l.want(t)
		} else {
			l.want(t, id)
			before.wantFailed(t, recoveryStored(t, store), id)
		}
		if got, ok := m.Get(op.ID); !ok || got.State.Finished() {
			t.Errorf("the operation of the first manager: %+v", got)
		}
		if err := m.Cancel(op.ID); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Cancel: %v", err)
		}
	}
	// What Close ends has failed by shutdown, and stays so.
	recoveryMust(t, first.Close())
	before := recoveryStored(t, store)
	if got := before[op.ID]; !strings.HasPrefix(got.Error, "Task failed due to system shutdown") {
		t.Errorf("after Close: %+v", got)
	}
	_, l := recoveryNew(t, store)
	l.want(t)
	before.wantFailed(t, recoveryStored(t, store))
}

// A recoveryMemory is a MemoryStore that counts, and fails now and then.
type recoveryMemory struct {
	*task.MemoryStore
	mu    sync.Mutex // guards what follows
	gets  int
	fails bool
}

func (s *recoveryMemory) state() (gets int, fails bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gets, s.fails
}

func (s *recoveryMemory) setFails(fails bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails = fails
}

func (s *recoveryMemory) Get(id string) (*task.Operation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gets++; s.fails {
		return nil, errRecoveryTest
	}
	return s.MemoryStore.Get(id)
}

func (s *recoveryMemory) Recover(reason string) iter.Seq2[*task.Operation, error] {
	if _, fails := s.state(); fails {
		return func(yield func(*task.Operation, error) bool) { yield(nil, errRecoveryTest) }
	}
	return s.MemoryStore.Recover(reason)
}

// TestRecoveryPoll has many calls of Wait for an operation of another manager.
func TestRecoveryPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := &recoveryMemory{MemoryStore: task.NewMemoryStore()}
		m, _ := recoveryNew(t, db)
		other, _ := recoveryNew(t, db.MemoryStore)
		release := make(chan struct{})
		op, err := other.Submit("other's", func(context.Context, func(int)) (any, error) {
			<-release
			return "result", nil
		})
		recoveryMust(t, err)
		// getsIn returns how often the store is asked in 10 seconds.
		getsIn := func() int {
			synctest.Wait()
			before, _ := db.state()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			after, _ := db.state()
			return after - before
		}
		const waiters = 50
		var wg sync.WaitGroup
		wait := func(ctx context.Context, want task.State, wantErr error) {
			for range waiters {
				wg.Go(func() {
					got, err := m.Wait(ctx, op.ID)
					if err != wantErr || got.State != want {
						t.Errorf("Wait: %+v, %v; want %s, %v", got, err, want, wantErr)
					}
				})
			}
		}
		for range 2 { // all leave, and others come
			ctx, cancel := context.WithCancel(t.Context())
			wait(ctx, task.StateRunning, context.Canceled)
			if got := getsIn(); got < 95 || got > 105 {
				t.Errorf("%d gets in 10 seconds, want 100 for any number of waiters", got)
			}
			cancel()
			wg.Wait()
			if got := getsIn(); got > 0 {
				t.Errorf("%d gets while nobody waits", got)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		wait(ctx, task.StateRunning, context.Canceled)
		wait(t.Context(), task.StateDone, nil)
		synctest.Wait()
		cancel() // some leave, some stay
		synctest.Wait()
		db.setFails(true)
		close(release)
		getsIn()
		db.setFails(false)
		wg.Wait()
		if got := getsIn(); got > 0 {
			t.Errorf("%d gets after all have returned", got)
		}
	})
}

func ExampleNew_recovery() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "tasks.db")

	// This is what a program leaves that crashes in the middle of its work.
	store, err := task.OpenSQLite(path)
	if err != nil {
		log.Fatal(err)
	}
	err = store.Save(&task.Operation{ID: uuid.NewString(), Name: "scrub tank", State: task.StateRunning, Progress: 40})
	if err != nil {
		log.Fatal(err)
	}
	store.Close()

	// The next one to start finds it.
	store, err = task.OpenSQLite(path)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	manager, err := task.New(store, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	ops, err := manager.List(10, 0)
	if err != nil {
		log.Fatal(err)
	}
	for _, op := range ops {
		fmt.Printf("%s: %s at %d%%: %s\n", op.Name, op.State, op.Progress, op.Error)
	}
	// Output:
	// scrub tank: FAILED at 40%: Task failed due to system restart
}
