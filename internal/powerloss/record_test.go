//go:build linux && cgo

package powerloss

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	_ "github.com/mattn/go-sqlite3"

	"github.com/mynt-nas/task"
)

// A config says what a process does.
type config struct {
	Role   string // "record" or "replay"
	Dir    string // for the files
	Record string // the path of the record

	Settings string // of an application's database; "" for OpenSQLite
	Gen      int    // counts the processes that record
	Kill     int    // the sync at which the process is killed; 0 for none
	Ops      int    // how many operations each goroutine submits; 0 for no limit
	Alone    bool   // one goroutine submits, so that a kill may leave nothing to recover

	Points int // at how many moments power is lost
	Seed   uint64
	Ignore string // the syncs that the replay ignores: of "files" or of the "directory"
}

const base = "tasks.db"

// open opens a database in dir with the settings under test.
func (c config) open(dir string) (store *task.SQLiteStore, closeStore func() error, err error) {
	path := filepath.Join(dir, base)
	if c.Settings == "" {
		store, err = task.OpenSQLite(path)
		if err != nil {
			return nil, nil, err
		}
		return store, store.Close, nil
	}
	db, err := sql.Open("sqlite3", "file:"+path+"?"+c.Settings)
	if err != nil {
		return nil, nil, err
	}
	store, err = task.NewSQLiteStore(db)
	if err != nil {
		return nil, nil, errors.Join(err, db.Close())
	}
	return store, func() error { return errors.Join(store.Close(), db.Close()) }, nil
}

// An acknowledgement is a state that the manager has confirmed, as an entry of the
// record.
type acknowledgement struct {
	ID, Name string
	State    task.State // if it was shown as finished; "" if submitted
	Result   json.RawMessage
	Error    string
	Owner    string // the name of the owner's file; the other fields are then empty
}

const submitters = 4

// A recorder is the program whose files are recorded.
type recorder struct {
	config
	record *os.File
}

func (c config) record() error {
	f, err := os.OpenFile(c.Record, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	r := &recorder{c, f}
	for session := range 2 { // closed and opened again
		if err := r.run(session); err != nil {
			return err
		}
	}
	return nil
}

func (r *recorder) run(session int) error {
	store, closeStore, err := r.open(r.Dir)
	if err != nil {
		return err
	}
	m, err := task.New(store, task.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	if err := r.recordPresent(m); err != nil {
		return err
	}
	errs := make([]error, submitters)
	if r.Alone {
		errs = errs[:1]
	}
	var all sync.WaitGroup
	for i := range errs {
		all.Go(func() {
			for n := 0; errs[i] == nil && (r.Ops == 0 || n < r.Ops); n++ {
				errs[i] = r.submit(m, fmt.Sprintf("%d.%d.%d.%d", r.Gen, session, i, n), n)
			}
		})
	}
	all.Wait()
	return errors.Join(errors.Join(errs...), m.Close(), closeStore())
}

// recordPresent records what the manager shows at the start. That is acknowledged,
// too, although another process has stored it.
func (r *recorder) recordPresent(m *task.Manager) error {
	owners, err := filepath.Glob(filepath.Join(r.Dir, base+"-owner-*"))
	if err != nil {
		return err
	}
	for _, path := range owners {
		if err := r.acknowledge(acknowledgement{Owner: filepath.Base(path)}); err != nil {
			return err
		}
	}
	ops, err := m.List(1_000_000, 0)
	if err != nil {
		return err
	}
	for _, op := range ops {
		if err := r.shown(op); err != nil {
			return err
		}
	}
	return nil
}

// shown records the state in which an operation is shown.
func (r *recorder) shown(op *task.Operation) error {
	a := acknowledgement{ID: op.ID, Name: op.Name}
	if op.State.Finished() {
		a.State, a.Error = op.State, op.Error
		if err := op.DecodeResult(&a.Result); err != nil {
			return err
		}
	}
	return r.acknowledge(a)
}

func (r *recorder) acknowledge(a acknowledgement) error {
	line, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return appendEntry(r.record, line)
}

// submit runs an operation and records what is acknowledged.
func (r *recorder) submit(m *task.Manager, name string, n int) error {
	op, err := m.Submit(name, func(ctx context.Context, update func(int)) (any, error) {
		update(50)
		large := strings.Repeat(name, 500) // some pages
		switch n % 4 {
		case 0:
			return large, nil
		case 1:
			return n, errors.New(name)
		case 2:
			<-ctx.Done()
			return nil, ctx.Err()
		default:
			err := task.SetMetadata(ctx, large)
			return name, err
		}
	}, task.WithMetadata(name))
	if err != nil {
		return err
	}
	if err := r.shown(op); err != nil {
		return err
	}
	if n%4 == 2 {
		if err := op.Cancel(); err != nil {
			return err
		}
	}
	op, err = m.Wait(context.Background(), op.ID)
	if err != nil {
		return err
	}
	return r.shown(op)
}
