package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/mynt-nas/task"
)

// idleBody is how long a handler waits for the next bytes of a body.
const idleBody = 30 * time.Second

// An upload is a request that stores a file of a pool.
//
// It is an operation without keys: like any other program that writes to the files, it does
// not wait for a scrub of the pool, nor does a scrub wait for it. Two uploads to the same
// path may run at the same time: each stores a whole file, and the file of the upload that
// ends last remains. Deleting a pool ends its uploads.
type upload struct {
	pool, path string
	size       int64 // in bytes, negative if unknown
	body       io.Reader

	// setReadDeadline sets the time after which reading the body fails, like that of
	// http.ResponseController.
	setReadDeadline func(time.Time) error
}

// An uploadResult describes the file that an upload has stored.
type uploadResult struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"`
}

// A turn holds the arguments that the manager passes to the function of an upload.
type turn struct {
	ctx    context.Context
	update func(int)
}

// An outcome holds the return values of the function of an upload.
type outcome struct {
	result any
	err    error
}

// errAbandoned is the error of an upload whose handler has returned.
var errAbandoned = errors.New("the client has broken off the upload")

// upload runs an upload as an operation. It returns when the operation has finished or when
// ctx, the request's context, is done. The caller's goroutine reads the body, and the
// operation's function waits for it, so that nothing uses the request after its handler has
// returned.
func (s *storage) upload(ctx context.Context, u *upload) error {
	if err := s.mustAccept(u); err != nil {
		return err
	}
	turns, abandoned, outcomes := make(chan turn), make(chan struct{}), make(chan outcome, 1)
	defer close(abandoned)
	op, err := s.submit(about{Kind: "upload", Pool: u.pool, Path: u.path}, func(ctx context.Context, update func(int)) (any, error) {
		select {
		case turns <- turn{ctx, update}:
			o := <-outcomes
			return o.result, o.err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-abandoned:
			return nil, errAbandoned
		}
	})
	if err != nil {
		return err
	}
	finished := make(chan error, 1)
	go func() { finished <- s.waitFor(ctx, op.ID) }()
	select {
	case t := <-turns:
		if err := s.take(t, u, outcomes); err != nil {
			<-finished
			return err
		}
		return <-finished
	case err := <-finished: // for example, cancelled while waiting
		return err
	}
}

// waitFor waits until an operation has finished, and returns an error unless it is DONE.
func (s *storage) waitFor(ctx context.Context, id string) error {
	op, err := s.tasks.Wait(ctx, id)
	switch {
	case err != nil:
		return err
	case op.State == task.StateCancelled:
		return fmt.Errorf("%w: %s", task.ErrCancelled, op.Error)
	case op.State == task.StateFailed:
		return errors.New(op.Error)
	}
	return nil
}

// take stores the file of an upload and sends the outcome to the operation's function, even
// if storing panics.
func (s *storage) take(t turn, u *upload, outcomes chan<- outcome) error {
	o := outcome{err: errAbandoned}
	defer func() { outcomes <- o }()
	o.result, o.err = s.store(t, u)
	return o.err
}

// store stores the file of an upload.
func (s *storage) store(t turn, u *upload) (any, error) {
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	if err := s.uploads.add(u, cancel); err != nil {
		return nil, err
	}
	defer s.uploads.remove(u)
	p, err := s.open(u.pool) // not earlier, because the upload may have waited
	if err != nil {
		return nil, err
	}
	defer p.close()
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { // ends a read that waits for data
		defer close(interrupted)
		u.setReadDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-interrupted
		}
	}()
	w := new(worker)
	if u.size > 0 {
		w.total, w.update = u.size, t.update
	}
	err = p.put(ctx, w, u.path, u.reader(ctx, w))
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, err
	}
	return uploadResult{u.path, w.done}, nil
}

// reader returns a reader of the body that reports how much w has received.
func (u *upload) reader(ctx context.Context, w *worker) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		if err := u.setReadDeadline(time.Now().Add(idleBody)); err != nil {
			return 0, err
		}
		if ctx.Err() != nil { // check after setting the deadline, because a cancel sets another one
			return 0, context.Cause(ctx)
		}
		received := formatBytes(w.done)
		if u.size > 0 {
			received += " of " + formatBytes(u.size)
		}
		task.SetMessage(ctx, received) // fails outside of an operation, as in tests
		n, err := u.body.Read(p)
		switch {
		case err == nil || err == io.EOF:
			return n, err
		case errors.Is(err, os.ErrDeadlineExceeded):
			return n, fmt.Errorf("the client has sent nothing for %v", idleBody)
		default:
			return n, fmt.Errorf("%w: %w", errAbandoned, err)
		}
	})
}

// formatBytes returns a human-readable number of bytes.
func formatBytes(n int64) string {
	if n < 1000 {
		return fmt.Sprintf("%d bytes", n)
	}
	f, unit := float64(n)/1000, 0
	for ; f >= 999.95 && unit < 5; unit++ {
		f /= 1000
	}
	return fmt.Sprintf("%.1f %cB", f, "kMGTPE"[unit])
}

// mustAccept checks whether the file of an upload can be stored, before the operation
// begins.
func (s *storage) mustAccept(u *upload) error {
	p, err := s.open(u.pool)
	if err != nil {
		return err
	}
	defer p.close()
	_, err = p.mayPut(u.path)
	return err
}

// An uploadSet holds the uploads in progress. The zero uploadSet is ready to use.
type uploadSet struct {
	mu       sync.Mutex // guards what follows
	cancels  map[*upload]context.CancelCauseFunc
	deleting map[string]bool // pools being deleted
	removed  chan struct{}   // closed when an upload ends; nil unless end is waiting for that
}

// A deletedError is the error of uploads to a pool that is being deleted.
type deletedError struct{}

func (deletedError) Error() string        { return "the pool has been deleted" }
func (deletedError) Is(target error) bool { return target == fs.ErrNotExist }

// add adds an upload, unless its pool is being deleted.
func (s *uploadSet) add(u *upload, cancel context.CancelCauseFunc) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deleting[u.pool] {
		return deletedError{}
	}
	if s.cancels == nil {
		s.cancels = make(map[*upload]context.CancelCauseFunc)
	}
	s.cancels[u] = cancel
	return nil
}

// remove removes an upload that has ended.
func (s *uploadSet) remove(u *upload) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.cancels, u)
	if s.removed != nil {
		close(s.removed)
		s.removed = nil
	}
}

// end ends all uploads to a pool, waits until they have ended, and prevents new ones until
// allow is called.
func (s *uploadSet) end(ctx context.Context, pool string) error {
	for {
		removed := s.cancel(pool)
		if removed == nil {
			return nil
		}
		select {
		case <-removed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// cancel cancels all uploads to a pool and prevents new ones. If there are any uploads, it
// returns a channel that is closed when one ends.
func (s *uploadSet) cancel(pool string) (removed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deleting == nil {
		s.deleting = make(map[string]bool)
	}
	s.deleting[pool] = true
	for u, cancel := range s.cancels {
		if u.pool != pool {
			continue
		}
		cancel(deletedError{})
		if s.removed == nil {
			s.removed = make(chan struct{})
		}
		removed = s.removed
	}
	return removed
}

// allow allows uploads to a pool again.
func (s *uploadSet) allow(pool string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.deleting, pool)
}
