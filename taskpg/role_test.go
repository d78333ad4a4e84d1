//go:build unix

package taskpg

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/mynt-nas/task"
)

// A role serves a store in a child process.
type role struct{ s *Store }

// A Reply is the answer to a call of a role.
type Reply struct {
	Owner string
	ID    string
	Lost  bool
	Err   string
}

func (r *role) answer(to *Reply, err error) error {
	to.Owner, to.Lost = r.s.Owner(), errors.Is(err, task.ErrLost)
	if err != nil {
		to.Err = err.Error()
	}
	return nil
}

// Open opens a store with a lease of a second, and saves an operation.
func (r *role) Open(dsn string, to *Reply) (err error) {
	if r.s, err = Open(context.Background(), dsn, WithLease(time.Second)); err != nil {
		return err
	}
	op := newOp(r.s, task.StateRunning)
	to.ID = op.ID
	return r.answer(to, r.s.Save(op))
}

// Finish updates an operation to DONE.
func (r *role) Finish(was Reply, to *Reply) error {
	op := &task.Operation{ID: was.ID, Owner: was.Owner, State: task.StateDone, Progress: 100, UpdatedAt: time.Now()}
	return r.answer(to, r.s.Update(op))
}

// Save saves another operation.
func (r *role) Save(_ int, to *Reply) error {
	op := newOp(r.s, task.StateRunning)
	to.ID = op.ID
	return r.answer(to, r.s.Save(op))
}

// newOp returns an operation such as a manager on the store would save.
func newOp(s *Store, state task.State) *task.Operation {
	now := time.Now().UTC().Truncate(time.Microsecond)
	return &task.Operation{ID: uuid.Must(uuid.NewV7()).String(), Name: "test", State: state, CreatedAt: now, UpdatedAt: now, Owner: s.Owner()}
}
