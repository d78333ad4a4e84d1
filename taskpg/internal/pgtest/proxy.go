//go:build unix

package pgtest

import (
	"bytes"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// A Proxy passes connections on to a server, until it is told otherwise.
type Proxy struct {
	network, address string // of the server
	listener         net.Listener
	dsn              string

	mu     sync.Mutex // guards what follows
	change *sync.Cond // of stalled
	stall  bool
	refuse bool
	delay  time.Duration
	open   map[net.Conn]bool
	rules  []*Rule
	all    sync.WaitGroup
}

// A Rule is what happens, once, to the first piece of data that contains a text.
type Rule struct {
	FromServer bool
	Text       string
	Late       time.Duration // if not 0: the data still reaches the server, so much later
	Hold       bool          // the data is passed on, and nothing after it; the server's connection stays open until Cut
	Met        chan struct{} // closed when it has happened
}

// NewProxy starts a proxy in front of the server of a DSN.
func NewProxy(t testing.TB, dsn string) *Proxy {
	t.Helper()
	config, err := pgx.ParseConfig(dsn)
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p := &Proxy{listener: l, open: make(map[net.Conn]bool), network: "unix",
		address: fmt.Sprintf("%s/.s.PGSQL.%d", config.Host, config.Port)}
	p.change = sync.NewCond(&p.mu)
	p.dsn = fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=%s sslmode=disable",
		l.Addr().(*net.TCPAddr).Port, config.Database)
	p.all.Go(p.accept)
	t.Cleanup(func() {
		l.Close()
		p.Cut()
		p.all.Wait()
	})
	return p
}

// DSN returns the connection string that goes through the proxy.
func (p *Proxy) DSN() string { return p.dsn }

// Cut closes all connections and refuses new ones.
func (p *Proxy) Cut() { p.set(true, false) }

// Stall passes nothing on, and keeps all connections open.
func (p *Proxy) Stall() { p.set(false, true) }

// Resume passes everything on again, what was stalled included.
func (p *Proxy) Resume() { p.set(false, false) }

// CutConnections closes all connections and accepts new ones.
func (p *Proxy) CutConnections() {
	p.Cut()
	p.Resume()
}

// Delay delays each piece of data.
func (p *Proxy) Delay(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = d
}

func (p *Proxy) set(refuse, stall bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse, p.stall = refuse, stall
	if refuse {
		for c := range p.open {
			c.Close()
		}
		clear(p.open)
	}
	p.change.Broadcast()
}

// Once breaks a connection when a piece of data contains a text, in place of
// passing it on.
func (p *Proxy) Once(r Rule) (met <-chan struct{}) {
	r.Met = make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rules = append(p.rules, &r)
	return r.Met
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial(p.network, p.address)
		p.mu.Lock()
		if err != nil || p.refuse {
			client.Close()
			if err == nil {
				server.Close()
			}
		} else {
			p.open[client], p.open[server] = true, true
			p.all.Go(func() { p.pass(server, client, false) })
			p.all.Go(func() { p.pass(client, server, true) })
		}
		p.mu.Unlock()
	}
}

// pass copies data from one connection to the other.
func (p *Proxy) pass(to, from net.Conn, fromServer bool) {
	defer p.close(to, from)
	buf := make([]byte, 1<<16)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		for p.stall {
			p.change.Wait()
		}
		delay := p.delay
		rule := p.match(buf[:n], fromServer)
		p.mu.Unlock()
		if rule != nil && rule.Hold {
			to.Write(buf[:n])
			close(rule.Met)
			p.mu.Lock()
			for !p.refuse {
				p.change.Wait()
			}
			p.mu.Unlock()
			return
		}
		if rule != nil {
			from.Close()
			time.Sleep(rule.Late)
			if rule.Late > 0 {
				to.Write(buf[:n])
			}
			close(rule.Met)
			time.Sleep(rule.Late)
			return
		}
		time.Sleep(delay)
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// match takes out a rule that is for some data. The caller holds p.mu.
func (p *Proxy) match(data []byte, fromServer bool) *Rule {
	for i, r := range p.rules {
		if r.FromServer == fromServer && bytes.Contains(data, []byte(r.Text)) {
			p.rules = append(p.rules[:i:i], p.rules[i+1:]...)
			return r
		}
	}
	return nil
}

func (p *Proxy) close(conns ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		c.Close()
		delete(p.open, c)
	}
}
