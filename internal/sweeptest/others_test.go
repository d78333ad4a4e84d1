package sweeptest

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
)

// TestSweepResume resumes an operation, and again if its final state could not be
// stored. In each run, another call of the store fails. Finally the operation is DONE.
func TestSweepResume(t *testing.T) {
	sweepAll(t, func(s *sweepRun) {
		var runs atomic.Int64
		resume := task.WithResume(func(op *task.Operation) (task.Func, []task.SubmitOption) {
			return func(ctx context.Context, update func(int)) (any, error) {
				runs.Add(1)
				update(50)
				return "result", errors.Join(task.SetMessage(ctx, "again"), task.SetMetadata(ctx, "place"))
			}, []task.SubmitOption{task.WithLock("k"), task.WithUnique(op.ID)}
		})
		s.restart("first")
		for range 2 {
			m := task.NewManager(s.faulty(), s.log.Option(), resume)
			time.Sleep(time.Second)
			s.saw("Close", m.Close())
			s.close()
			s.db = s.open()
		}
		m, err := task.New(s.db, testkit.Quiet, resume)
		testkit.Must(s.t, err)
		testkit.Must(s.t, m.Shutdown(context.Background()))
		if n := runs.Load(); n < 2 || s.faults.Load() == 0 && n > 2 {
			s.t.Errorf("the functions of two operations ran %d times", n)
		}
		rows := s.stored()
		for _, row := range rows {
			if row.State != task.StateDone || row.Message != "" {
				s.t.Errorf("stored: %+v", row)
			}
		}
		if len(rows) != 3 {
			s.t.Errorf("%d rows, want the 3 of the first process", len(rows))
		}
		s.close()
	})
}

// TestSweepCancel cancels an operation of another manager. In each run, another call of
// the store fails. An acknowledged request is always carried out.
func TestSweepCancel(t *testing.T) {
	sweepAll(t, func(s *sweepRun) {
		other := s.open()
		one := task.NewManager(s.faulty(), testkit.Quiet)
		two := task.NewManager(s.inject(other), testkit.Quiet)
		op, err := one.Submit("x", testkit.UntilCancelled)
		if s.saw("Submit", err); err == nil {
			err = two.Cancel(op.ID)
			if !errors.Is(err, errors.ErrUnsupported) { // a store with four methods
				s.saw("Cancel", err)
			}
			time.Sleep(2 * time.Second)
		}
		s.saw("Close", one.Close())
		s.saw("Close", two.Close())
		if err == nil && s.faults.Load() <= 1 {
			row, err := s.db.Get(op.ID)
			if err != nil || row.State != task.StateCancelled || row.Cancelling {
				s.t.Errorf("stored: %+v, %v", row, err)
			}
		}
		if c, ok := other.(io.Closer); ok && other != s.db {
			testkit.Must(s.t, c.Close())
		}
		s.close()
	})
}
