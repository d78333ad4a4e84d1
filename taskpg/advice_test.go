//go:build unix

package taskpg

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskpg/internal/pgtest"
)

const secret = "hunter2"

// wantAdvice opens a database, which must fail with an error of one line that
// contains a text and no password.
func wantAdvice(t *testing.T, dsn, want string) {
	t.Helper()
	s, err := Open(t.Context(), dsn)
	if err == nil {
		s.Close()
		t.Fatal("Open succeeds")
	}
	t.Log(err)
	text := err.Error()
	if !strings.HasPrefix(text, "taskpg: open: ") || !strings.Contains(text, want) || strings.ContainsAny(text, "\n\t") || strings.Contains(text, secret) {
		t.Errorf("the error is %q, want %q in it", text, want)
	}
}

func TestAdviceNoServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testkit.Must(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	testkit.Must(t, l.Close())
	wantAdvice(t, fmt.Sprintf("postgres://a:%s@127.0.0.1:%d/tasks?sslmode=disable", secret, port), "look at host and port")
	wantAdvice(t, "postgres://a:"+secret+"@nowhere.invalid/tasks", "look at host in")
	wantAdvice(t, "host=/nowhere user=a password="+secret, "look at host and port")
}

func TestAdvicePassword(t *testing.T) {
	server := pgtest.New(t)
	dsn := server.Database("tasks")
	pgtest.Exec(t, dsn, `CREATE ROLE guest LOGIN PASSWORD 'other'`)
	testkit.Must(t, os.WriteFile(filepath.Join(server.Dir(), "data", "pg_hba.conf"),
		[]byte("local all guest scram-sha-256\nlocal all postgres trust\n"), 0o600))
	pgtest.Exec(t, dsn, `SELECT pg_reload_conf()`)
	guest := strings.Replace(dsn, "user=postgres", "user=guest password="+secret, 1)
	testkit.Must(t, testkit.Until(func() bool { // the server takes a while to reload the file
		c, err := pgx.Connect(t.Context(), guest)
		if err == nil {
			c.Close(t.Context())
		}
		return err != nil
	}))
	wantAdvice(t, guest, "wrong user or password")
	wantAdvice(t, strings.Replace(dsn, "user=postgres", "user=stranger password="+secret, 1), "pg_hba.conf")
}

// TestAdviceFull opens a store while all of a server's connections are in use.
func TestAdviceFull(t *testing.T) {
	server := pgtest.New(t, "max_connections=5", "superuser_reserved_connections=1", "max_wal_senders=0")
	dsn := server.Database("tasks")
	for range 10 {
		c, err := pgx.Connect(t.Context(), dsn)
		if err != nil {
			wantAdvice(t, dsn+" password="+secret, "max_connections")
			return
		}
		defer c.Close(t.Context())
	}
	t.Error("the server takes more connections than max_connections")
}

func TestAdviceStandby(t *testing.T) {
	server := pgtest.New(t)
	server.Database("tasks")
	standby := server.Standby("other")
	wantAdvice(t, standby.DSN("tasks")+" password="+secret, "target_session_attrs=read-write")
}

// TestAdviceOtherTable opens a database in which an application has its own table tasks.
func TestAdviceOtherTable(t *testing.T) {
	dsn := pgtest.Database(t)
	pgtest.Exec(t, dsn, `CREATE TABLE tasks (id text PRIMARY KEY, title text)`)
	wantAdvice(t, dsn+" password="+secret, "taskpg.WithSchema")
	if n := pgtest.Value[int64](t, dsn, `SELECT count(*) FROM pg_attribute WHERE attrelid = 'tasks'::regclass AND attnum > 0`); n != 2 {
		t.Errorf("the application's table has %d columns, want 2", n)
	}
}

// TestTLS reaches the server through a proxy that speaks TLS.
func TestTLS(t *testing.T) {
	certificate, root := newCertificate(t)
	_, wrong := newCertificate(t)
	dsn := pgtest.Database(t)
	config, err := pgx.ParseConfig(dsn)
	testkit.Must(t, err)
	port := serveTLS(t, certificate, fmt.Sprintf("%s/.s.PGSQL.%d", config.Host, config.Port))
	secure := func(host, root string) string {
		return fmt.Sprintf("host=%s port=%d user=postgres password=%s dbname=%s sslmode=verify-full sslrootcert=%s",
			host, port, secret, config.Database, root)
	}
	s := open(t, secure("127.0.0.1", root))
	save(t, s, task.StateDone)
	testkit.Must(t, s.Close())
	wantAdvice(t, secure("127.0.0.1", wrong), "sslrootcert")
	wantAdvice(t, secure("localhost", root), "a name that the certificate has")
}

// newCertificate returns a new self-signed certificate for 127.0.0.1, and the path
// of a file that contains it.
func newCertificate(t *testing.T) (tls.Certificate, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	testkit.Must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	testkit.Must(t, err)
	file := filepath.Join(t.TempDir(), "root.pem")
	testkit.Must(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file
}

// serveTLS forwards TLS connections to the server's Unix socket, and returns its own
// port. The server doesn't support TLS on such a socket, so the proxy terminates it.
func serveTLS(t *testing.T, certificate tls.Certificate, socket string) int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	testkit.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go passTLS(c, certificate, socket)
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func passTLS(c net.Conn, certificate tls.Certificate, socket string) {
	defer c.Close()
	request := make([]byte, 8) // SSLRequest: a length and a code
	if _, err := io.ReadFull(c, request); err != nil {
		return
	}
	if _, err := c.Write([]byte("S")); err != nil {
		return
	}
	client := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{certificate}})
	if client.Handshake() != nil {
		return
	}
	server, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		io.Copy(server, client)
		server.Close()
	}()
	io.Copy(client, server)
}
