package browsertest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/security"
	"github.com/chromedp/chromedp"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/internal/testkit"
	"github.com/mynt-nas/task/taskhttp"
)

// subPath is where the location of docs/page.md serves the handler.
const subPath = "/nas/tasks/"

// An nginx is a process of nginx in front of a site.
type nginx struct {
	t       *testing.T
	site    *site
	address string
	client  *http.Client // trusts the certificate of nginx
}

// A setup is what a test adds to the location of docs/page.md.
type setup struct {
	listen   string // parameters of the directive
	server   string // directives
	location string // directives
	without  string // a directive of docs/page.md that is left out
}

// newNginx starts nginx in front of s.
func newNginx(t *testing.T, s *site, c setup) *nginx {
	t.Helper()
	program := findNginx(t)
	dir := t.TempDir()
	n := &nginx{t: t, site: s, client: &http.Client{Timeout: 20 * time.Second, Transport: certificate(t, dir)}}
	t.Cleanup(n.client.CloseIdleConnections)
	location := n.documented(c)
	for range 10 { // another process may take the port before nginx does
		n.address = freeAddress(t)
		config := fmt.Sprintf(`daemon off;
master_process off;
pid nginx.pid;
events {}
http {
access_log off;
client_body_temp_path body;
proxy_temp_path proxy;
fastcgi_temp_path fastcgi;
uwsgi_temp_path uwsgi;
scgi_temp_path scgi;
server {
listen %s %s;
%s
%s
}
}
`, n.address, c.listen, c.server, location)
		must(t, os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(config), 0o600))
		if startNginx(t, program, dir) {
			return n
		}
	}
	log, err := os.ReadFile(filepath.Join(dir, "error.log"))
	t.Fatalf("nginx does not start (%v):\n%s", err, log)
	return nil
}

func findNginx(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"nginx", "/usr/sbin/nginx"} { // PATH may lack sbin
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("TASK_NGINX") != "" {
		t.Fatal("nginx is not installed, but TASK_NGINX is set")
	}
	t.Skip("nginx is not installed")
	return ""
}

// startNginx starts nginx and reports whether it listens; otherwise it has exited.
func startNginx(t *testing.T, program, dir string) bool {
	t.Helper()
	cmd := exec.Command(program, "-p", dir, "-c", "nginx.conf", "-e", "error.log")
	must(t, cmd.Start())
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }() // returns that it was killed
	t.Cleanup(func() { cmd.Process.Kill(); <-exited })
	for {
		select {
		case <-exited:
			return false
		case <-time.After(10 * time.Millisecond):
			if _, err := os.Stat(filepath.Join(dir, "nginx.pid")); err == nil { // nginx writes it once it listens
				return true
			}
		}
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

// documented returns the location of docs/page.md with the address of the site.
func (n *nginx) documented(c setup) string {
	n.t.Helper()
	text, err := os.ReadFile("../../docs/page.md")
	must(n.t, err)
	block := regexp.MustCompile("(?s)```nginx\n(.*?)\n}\n```").FindSubmatch(text)
	if block == nil {
		n.t.Fatal("docs/page.md has no configuration of nginx")
	}
	location := string(block[1])
	for _, part := range []string{"127.0.0.1:8080", c.without} {
		if !strings.Contains(location, part) {
			n.t.Fatalf("the configuration in docs/page.md lacks %q", part)
		}
	}
	backend := strings.TrimSuffix(strings.TrimPrefix(n.site.url, "http://"), prefix+"/ui")
	location = strings.Replace(location, "127.0.0.1:8080", backend, 1)
	if c.without != "" {
		location = strings.Replace(location, c.without, "", 1)
	}
	return location + "\n" + c.location + "\n}"
}

// certificate stores a certificate for 127.0.0.1 and its key in dir, and returns a
// transport that trusts it.
func certificate(t *testing.T, dir string) *http.Transport {
	t.Helper()
	s := httptest.NewTLSServer(http.NotFoundHandler()) // has made one
	defer s.Close()
	key, err := x509.MarshalPKCS8PrivateKey(s.TLS.Certificates[0].PrivateKey)
	must(t, err)
	for name, block := range map[string]*pem.Block{
		"cert.pem": {Type: "CERTIFICATE", Bytes: s.Certificate().Raw},
		"key.pem":  {Type: "PRIVATE KEY", Bytes: key},
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
}

// do makes a request with a header and returns the response, whose body the test's
// end closes.
func (n *nginx) do(ctx context.Context, method, url string, header http.Header) *http.Response {
	n.t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, url, nil)
	must(n.t, err)
	if header != nil {
		r.Header, r.Host = header, header.Get("Host")
	}
	response, err := n.client.Do(r)
	must(n.t, err)
	n.t.Cleanup(func() { response.Body.Close() })
	return response
}

// status checks the status of the response to a request.
func (n *nginx) status(want int, method, url string, header http.Header) {
	n.t.Helper()
	if r := n.do(n.t.Context(), method, url, header); r.StatusCode != want {
		body, _ := io.ReadAll(r.Body)
		n.t.Errorf("%s %s with %v: %s, want %d\n%s", method, url, header, r.Status, want, body)
	}
}

// use uses the page at a URL: it checks that the page shows running operations and
// those that start later, and cancels one.
func (n *nginx) use(b *tab, url, connection string) {
	n.t.Helper()
	first, _ := n.site.start("Scrub tank")
	b.do(chromedp.Navigate(url))
	b.show(first, "RUNNING", "Scrub tank")
	b.until(`$("connection").innerText === "` + connection + `"`)
	b.do(chromedp.Evaluate("TIMES.poll = 500", nil)) // speeds up the tests if the page polls
	next, end := n.site.start("Resilver tank")
	b.show(next, "RUNNING", "Resilver tank")
	end(nil, nil)
	b.show(next, "DONE", "Resilver tank")
	b.click(`li[data-id="` + first + `"] .cancel`)
	b.until(`$("confirm").open`)
	b.click("#confirm-yes")
	b.show(first, "CANCELLED", "Scrub tank")
}

const (
	http11       = "proxy_http_version 1.1;"
	http10       = "proxy_http_version 1.0;"
	ignoreHeader = "proxy_ignore_headers X-Accel-Buffering;"
)

// TestNginxLive: the page is live behind nginx with the configuration of docs/page.md,
// and with variants of it.
func TestNginxLive(t *testing.T) {
	for name, c := range map[string]setup{
		"as documented":  {},
		"HTTP 1.0":       {without: http11, location: http10},
		"header ignored": {location: ignoreHeader},
		"buffering off":  {without: http11, location: http10 + ignoreHeader + "proxy_buffering off;"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNginx(t, newSite(t, nil), c)
			n.use(newTab(t), "http://"+n.address+subPath+"ui", "Live")
		})
	}
}

// TestNginxHeld: if nginx holds events back, the page says so and polls.
func TestNginxHeld(t *testing.T) {
	n := newNginx(t, newSite(t, nil), setup{without: http11, location: http10 + ignoreHeader})
	n.use(newTab(t), "http://"+n.address+subPath+"ui", "No live updates, refreshed every 5 s")
}

// TestNginxGzip: nginx compresses the list and the page, and they stay readable.
func TestNginxGzip(t *testing.T) {
	n := newNginx(t, newSite(t, nil, past(50, "Scrub tank")...), setup{})
	for path, want := range map[string]string{"": `"Scrub tank 49"`, "ui": "<title>Tasks</title>"} {
		// With its own header, the client leaves the body compressed.
		r := n.do(t.Context(), "GET", "http://"+n.address+subPath+path, http.Header{"Accept-Encoding": {"gzip"}})
		if got := r.Header.Get("Content-Encoding"); r.StatusCode != http.StatusOK || got != "gzip" {
			t.Fatalf("GET %q: %s, encoding %q", path, r.Status, got)
		}
		compressed, err := io.ReadAll(r.Body)
		must(t, err)
		z, err := gzip.NewReader(bytes.NewReader(compressed))
		must(t, err)
		text, err := io.ReadAll(z)
		must(t, err)
		if !strings.Contains(string(text), want) || len(compressed) > len(text)/2 {
			t.Errorf("GET %q: %d bytes, of which nginx makes %d, and which should contain %s:\n%.2000s", path, len(text), len(compressed), want, text)
		}
	}
}

// TestNginxGzipEvents: if nginx compresses events, it still does not hold them back.
func TestNginxGzipEvents(t *testing.T) {
	s := newSite(t, nil)
	n := newNginx(t, s, setup{without: "gzip_types application/json;", location: "gzip_types *;"})
	r := n.do(t.Context(), "GET", "http://"+n.address+subPath+"events", http.Header{"Accept-Encoding": {"gzip"}})
	if got := r.Header.Get("Content-Encoding"); got != "gzip" {
		t.Fatalf("the events have the encoding %q", got)
	}
	z, err := gzip.NewReader(r.Body)
	must(t, err)
	lines := bufio.NewScanner(z)
	awaitLine(t, lines, "event: snapshot")
	op, end := s.start("Scrub tank")
	awaitLine(t, lines, op)
	end(nil, nil)
	awaitLine(t, lines, string(task.StateDone))
}

// TestNginxWait: nginx lets a request wait as long as docs/page.md says, and not longer.
func TestNginxWait(t *testing.T) {
	const documented = "proxy_read_timeout 11m;"
	s := newSite(t, nil)
	op, end := s.start("Scrub tank")
	wait := subPath + op + "/wait?timeout=10m"
	short := newNginx(t, s, setup{without: documented, location: "proxy_read_timeout 1s;"})
	short.status(http.StatusGatewayTimeout, "GET", "http://"+short.address+wait, nil)

	n := newNginx(t, s, setup{})
	ended := make(chan struct{})
	go func() { end(nil, nil); close(ended) }()
	n.status(http.StatusOK, "GET", "http://"+n.address+wait, nil)
	<-ended
}

// TestNginxPassword: behind Basic authentication, the page works with the password, and
// nothing works without it.
func TestNginxPassword(t *testing.T) {
	s := newSite(t, nil)
	passwords := filepath.Join(t.TempDir(), "passwords")
	must(t, os.WriteFile(passwords, []byte("owner:{PLAIN}secret\n"), 0o600))
	n := newNginx(t, s, setup{location: `auth_basic "NAS"; auth_basic_user_file "` + passwords + `";`})
	op, _ := s.start("Scrub tank")
	base := "http://" + n.address + subPath
	for path, method := range map[string]string{"": "GET", "ui": "GET", "events": "GET", op + "/cancel": "POST"} {
		n.status(http.StatusUnauthorized, method, base+path, nil)
	}
	if op, ok := s.m.Get(op); !ok || op.State != task.StateRunning {
		t.Errorf("a cancel without a password: %v, found %t", op, ok)
	}
	b := newTab(t)
	n.use(b, "http://owner:secret@"+n.address+subPath+"ui", "Live")
	n.use(b, base+"ui", "Live") // the browser knows the password now
}

// TestNginxHTTP2: over HTTP/2 with TLS, events stream, and the page works.
func TestNginxHTTP2(t *testing.T) {
	var streams atomic.Int32
	s := newSite(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/events") {
				streams.Add(1)
				defer streams.Add(-1)
			}
			h.ServeHTTP(w, r)
		})
	})
	n := newNginx(t, s, setup{listen: "ssl http2", server: "ssl_certificate cert.pem; ssl_certificate_key key.pem;"})
	base := "https://" + n.address + subPath
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events := n.do(ctx, "GET", base+"events", nil)
	if events.Proto != "HTTP/2.0" || events.StatusCode != http.StatusOK {
		t.Fatalf("GET events: %s, %s", events.Proto, events.Status)
	}
	lines := bufio.NewScanner(events.Body)
	awaitLine(t, lines, "event: snapshot")
	op, _ := s.start("Scrub tank")
	awaitLine(t, lines, op)

	list := n.do(ctx, "GET", base, nil)
	var page struct{ Tasks []task.Operation }
	must(t, json.NewDecoder(list.Body).Decode(&page))
	if list.Proto != "HTTP/2.0" || len(page.Tasks) != 1 || page.Tasks[0].ID != op {
		t.Errorf("the list over %s: %v", list.Proto, page.Tasks)
	}
	n.status(http.StatusAccepted, "POST", base+op+"/cancel", http.Header{"Origin": {"https://" + n.address}})
	awaitLine(t, lines, string(task.StateCancelled))
	cancel()
	must(t, testkit.Until(func() bool { return streams.Load() == 0 }))

	b := newTab(t)
	b.do(security.SetIgnoreCertificateErrors(true))
	n.use(b, base+"ui", "Live")
	if got := eval[string](b, `performance.getEntriesByType("navigation")[0].nextHopProtocol`); got != "h2" {
		t.Errorf("the browser speaks %q, want h2", got)
	}
}

// awaitLine reads lines until one contains a text.
func awaitLine(t *testing.T, lines *bufio.Scanner, text string) {
	t.Helper()
	for lines.Scan() {
		if strings.Contains(lines.Text(), text) {
			return
		}
	}
	t.Fatalf("the stream ends before %q: %v", text, lines.Err())
}

// TestNginxHost: cancels pass the origin check if nginx passes on the Host header with
// the port, or if the origin is trusted.
func TestNginxHost(t *testing.T) {
	const documented = "proxy_set_header Host $http_host;"
	trust := []taskhttp.Option{taskhttp.TrustedOrigin("http://nas.example:8080")}
	for name, c := range map[string]struct {
		setup
		opts []taskhttp.Option
		want int
	}{
		"as documented":          {setup{}, nil, http.StatusAccepted},
		"not passed on":          {setup{without: documented}, nil, http.StatusForbidden},
		"without the port":       {setup{without: documented, location: "proxy_set_header Host $host;"}, nil, http.StatusForbidden},
		"not passed on, trusted": {setup{without: documented}, trust, http.StatusAccepted},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSiteWith(t, c.opts, nil)
			n := newNginx(t, s, c.setup)
			op, _ := s.start("Scrub tank")
			cancel := "http://" + n.address + subPath + op + "/cancel"
			n.status(c.want, "POST", cancel, http.Header{"Host": {"nas.example:8080"}, "Origin": {"http://nas.example:8080"}})
			n.status(http.StatusForbidden, "POST", cancel, http.Header{"Host": {"nas.example:8080"}, "Origin": {"http://evil.example"}})
		})
	}
}

// TestNginxLocation: Location leads to the right address under nginx's path.
func TestNginxLocation(t *testing.T) {
	var s *site
	s = newSiteWith(t, []taskhttp.Option{taskhttp.RunAgain(func(op *task.Operation) (*task.Operation, error) {
		return s.m.Submit(op.Name, func(context.Context, func(int)) (any, error) { return nil, nil })
	})}, nil, past(1, "Scrub tank")...)
	n := newNginx(t, s, setup{})
	base := "http://" + n.address + subPath
	r := n.do(t.Context(), "POST", base+past(1, "")[0].ID+"/again", nil)
	var op task.Operation
	must(t, json.NewDecoder(r.Body).Decode(&op))
	location, err := r.Location()
	must(t, err)
	if want := base + op.ID; location.String() != want {
		t.Errorf("Location of a task: %s, want %s", location, want)
	}
	n.status(http.StatusOK, "GET", location.String(), nil)
	for _, path := range []string{"ui/", "ui"} {
		r := n.do(t.Context(), "GET", base+path, nil)
		if got := r.Request.URL.String(); got != base+"ui" || r.StatusCode != http.StatusOK {
			t.Errorf("GET %s leads to %s, %s", path, got, r.Status)
		}
	}
	r = n.do(t.Context(), "GET", strings.TrimSuffix(base, "/"), nil)
	if got := r.Request.URL.String(); got != base || r.StatusCode != http.StatusOK {
		t.Errorf("the path without the slash leads to %s, %s", got, r.Status)
	}
}
