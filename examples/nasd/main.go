// Nasd is a small NAS daemon. It shows how package task connects four parts of an
// appliance.
//
//	nasd -data DIR [-listen ADDR]
//
// The storage service (storage.go, scrub.go, replicate.go) has pools, which are
// directories. It scrubs them, replicates them to each other and restores files from
// snapshots. The snapshot scheduler (snapshot.go) takes snapshots of each pool and thins
// them out. All long work is done by operations of one task.Manager. Its events go to an
// event bus (bus.go), and the REST API (api.go) serves the operations under /api/tasks. The
// page at / (page.html) lets a user try all of this.
//
// Uploads are operations, too (upload.go). Anyone may watch and cancel them. The uploaded
// file appears only when it is complete.
//
// Each pool runs one operation at a time, not counting uploads. A replication occupies two
// pools. Deleting a pool ends its uploads. After a kill, the next nasd resumes the
// interrupted scrubs, replications, snapshots and restores. A scrub continues from its last
// recorded place.
//
// DIR holds all data:
//
//	tasks.db                   past and present operations
//	lock                       locked while a nasd serves DIR
//	pools/NAME/files/          the files of a pool, for you to read and write;
//	                           .incoming holds files that are being written
//	pools/NAME/manifest        the checksums of the files
//	pools/NAME/snapshots/ID/   snapshots of the files, for reading only; the IDs of
//	                           automatic ones end with -auto
//
// nasd has no users: every client that can connect may do everything. By default it listens
// on 127.0.0.1, so that only programs on this machine can connect. To admit others, put an
// authenticating proxy in front of it. The proxy must send the Host header 127.0.0.1. Names
// other than localhost are rejected, because a page of another site may have made them
// resolve to this machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/mynt-nas/task"
)

type config struct {
	data    string
	listen  string
	limit   int
	history time.Duration
	every   time.Duration
	keep    int
}

func main() {
	var c config
	flag.StringVar(&c.data, "data", "", "store all data in this `DIR`")
	flag.StringVar(&c.listen, "listen", "127.0.0.1:8080", "listen on this `ADDR`; port 0 chooses a free port")
	flag.IntVar(&c.limit, "limit", 16, "run at most `N` operations at once, uploads included; 0 for no limit")
	flag.DurationVar(&c.history, "keep-history", 30*24*time.Hour, "delete operations that finished longer ago; 0 for never")
	flag.DurationVar(&c.every, "snapshot-every", 10*time.Minute, "take a snapshot of each pool at this interval; 0 for never")
	flag.IntVar(&c.keep, "keep-snapshots", 12, fmt.Sprintf(
		"keep the newest `N` snapshots of each pool, and the last one of each of %d hours and %d days", keepHours, keepDays))
	flag.Parse()
	if c.data == "" || flag.NArg() > 0 || min(c.limit, c.keep) < 0 || min(c.history, c.every) < 0 {
		flag.Usage()
		os.Exit(2)
	}

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	if err := run(ctx, c, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "nasd:", err)
		os.Exit(1)
	}
}

// run runs the daemon until ctx is done.
func run(ctx context.Context, c config, out io.Writer) (err error) {
	if err := os.MkdirAll(c.data, 0o700); err != nil {
		return err
	}
	// The locks of package task work within one Manager, not between two daemons.
	lock, err := lockFile(filepath.Join(c.data, "lock"))
	if err != nil {
		return fmt.Errorf("%s: %w", c.data, err)
	}
	defer lock.Close()
	store, err := task.OpenSQLite(filepath.Join(c.data, "tasks.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	s, err := openStorage(c.data)
	if err != nil {
		return err
	}
	defer s.pools.Close()
	s.tasks, err = task.New(store, task.WithLimit(c.limit), task.WithRetention(c.history), task.WithResume(s.resume))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.tasks.Close()) }()
	ln, err := net.Listen("tcp", c.listen)
	if err != nil {
		return err
	}
	return serve(ctx, c, s, ln, out)
}

// serve runs the parts of the daemon until ctx is done. It then stops them in an order in
// which each part still receives the last events of those it depends on.
func serve(ctx context.Context, c config, s *storage, ln net.Listener, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var parts sync.WaitGroup

	bus := new(bus)
	changes := s.tasks.Watch(context.Background()) // before reading the history, so that no event is missed
	last := newLastResults(s.tasks)
	toLog, toLast := bus.subscribe(1000), bus.subscribe(1000)
	parts.Go(func() { logFinished(toLog) })
	parts.Go(func() { last.follow(toLast) })
	parts.Go(func() { feed(bus, changes) })
	if c.every > 0 {
		sched := &scheduler{storage: s, every: c.every, keep: c.keep}
		parts.Go(func() { sched.run(ctx) })
	}
	srv := &http.Server{
		Handler: newAPI(s, last, isLoopback(ln.Addr())),
		// ReadTimeout and WriteTimeout are not set, because they would end event streams.
		// Handlers that read bodies set their own deadlines.
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
	}
	var served error
	parts.Go(func() {
		defer cancel()
		served = srv.Serve(ln)
	})
	greet(out, "http://"+ln.Addr().String(), s)

	<-ctx.Done()
	slog.Info("shutting down")
	// The server stops last: it still has to send clients the final states of operations,
	// which end the event streams.
	err := s.tasks.Close()
	grace, end := context.WithTimeout(context.Background(), 3*time.Second)
	defer end()
	if srv.Shutdown(grace) != nil {
		srv.Close() // for example, during a slow upload
	}
	parts.Wait()
	if !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(served, err)
	}
	return err
}

// greet prints the daemon's address and how to get started.
func greet(out io.Writer, url string, s *storage) {
	names, err := s.names()
	fmt.Fprintf(out, "nasd is at %s; stop it with Ctrl-C or kill %d\n", url, os.Getpid())
	if err != nil || len(names) > 0 {
		return
	}
	fmt.Fprintf(out, `
There is no pool yet. Open that in a browser, or make one, put a file into it,
and scrub it:

  curl %[1]s/api/pools -d '{"name":"tank"}'
  echo hello, world | curl %[1]s/api/pools/tank/files/hello.txt -T -
  curl %[1]s/api/pools/tank/scrub -X POST
`, url)
}

func isLoopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}
