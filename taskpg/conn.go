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

// When a connection breaks, pgx asks the server by another one to cancel what
// the first one does: with synchronous standbys that ends the wait for them. To
// make such a connection it dials the RemoteAddr of the first one. That of a
// writing conn is an address that cannot be dialled.

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

// watchDials makes a configuration dial conns.
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
// returns an error of the network, and nobody knows what became of a commit.
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
		watched = t.NetConn() // closing the other would wait to send a goodbye
	}
	if w, ok := watched.(*conn); ok {
		w.writing.Store(true)
		defer func() {
			if !c.Conn().IsClosed() { // else it is not to be cancelled later, either
				w.writing.Store(false)
			}
		}()
	}
	timer := time.AfterFunc(time.Until(deadline), func() { watched.Close() })
	defer timer.Stop()
	return f(c)
}

// notSent is an error before anything was sent.
type notSent struct{ error }

func (e notSent) Unwrap() error { return e.error }
