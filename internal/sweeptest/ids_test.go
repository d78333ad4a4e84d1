package sweeptest

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestSweepIDs submits one ID again and again, before and after a restart. In each run,
// another call of the store fails. Whichever it is, the function is called once if a
// Submit has succeeded, and otherwise never.
func TestSweepIDs(t *testing.T) {
	sweepAll(t, sweepIDs)
}

func sweepIDs(s *sweepRun) {
	var runs, submitted atomic.Int64
	submit := func(m *task.Manager) {
		op, err := m.Submit("x", func(context.Context, func(int)) (any, error) {
			runs.Add(1)
			return nil, nil
		}, task.WithID("a"), task.WithUnique("k"))
		switch {
		case err == nil:
			submitted.Add(1)
		case errors.Is(err, task.ErrExists):
			if op == nil || op.ID != "a" {
				s.t.Errorf("Submit = %+v, %v", op, err)
			}
		default:
			s.saw("Submit", err)
		}
	}
	for range 2 {
		m := task.NewManager(s.faulty(), testkit.Quiet)
		for range 2 {
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() { submit(m) })
			}
			all.Wait()
			time.Sleep(time.Second)
			submit(m)
		}
		s.saw("Close", m.Close())
		s.close()
		s.db = s.open()
	}
	m, err := task.New(s.db, testkit.Quiet)
	testkit.Must(s.t, err)
	submit(m)
	testkit.Must(s.t, m.Close())
	if n := submitted.Load(); n > 1 || runs.Load() != n {
		s.t.Errorf("%d Submits have succeeded, and %d functions were called", n, runs.Load())
	}
	ops := s.stored()
	if len(ops) != 1 || !ops[0].State.Finished() || submitted.Load() == 0 && ops[0].State != task.StateFailed {
		s.t.Errorf("stored: %+v", ops)
	}
	s.close()
}
