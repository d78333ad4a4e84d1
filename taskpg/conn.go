package taskpg

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// When a connection breaks, pgx opens another one and asks the server to cancel the
// first one's statement: with synchronous standbys, that ends the wait for them. pgx
// dials the RemoteAddr of the first connection. A writing conn therefore returns an
// address that can't be dialled.

// noCancel is the network of that address.
const noCancel = "taskpg: not to be cancelled"

// A conn is a network connection to the server.
type conn struct {
	net.Conn
	writing atomic.Bool
}

func (c *conn) RemoteAddr() net.Addr {
	if c.writing.Load() {
		return noAddr{}
	}
	return c.Conn.RemoteAddr()
}

type noAddr struct{}

func (noAddr) Network() string { return noCancel }
func (noAddr) String() string  { return noCancel }

// watchDials makes config wrap each connection that it dials in a conn.
func watchDials(config *pgconn.Config) {
	dial := config.DialFunc
	config.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if network == noCancel {
			return nil, errors.New(noCancel)
		}
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &conn{Conn: c}, nil
	}
}

// withConn calls f with a connection, which it closes at the deadline: pgx then
// returns a network error, and the outcome of a commit is unknown.
func withConn(ctx context.Context, pool *pgxpool.Pool, deadline time.Time, f func(*pgxpool.Conn) error) error {
	acquireCtx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	c, err := pool.Acquire(acquireCtx)
	if err != nil {
		return notSent{err}
	}
	defer c.Release()
	socket := c.Conn().PgConn().Conn()
	watched := socket
	if t, ok := socket.(*tls.Conn); ok {
		watched = t.NetConn() // closing the tls.Conn would wait to send an alert
	}
	if w, ok := watched.(*conn); ok {
		w.writing.Store(true)
		defer func() {
			if !c.Conn().IsClosed() { // pgx may still try to cancel on a closed one
				w.writing.Store(false)
			}
		}()
	}
	timer := time.AfterFunc(time.Until(deadline), func() { watched.Close() })
	defer timer.Stop()
	return f(c)
}

// notSent is an error that occurred before anything was sent.
type notSent struct{ error }

func (e notSent) Unwrap() error { return e.error }
