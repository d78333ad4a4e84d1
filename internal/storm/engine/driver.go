package engine

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/mynt-nas/task"
)

const (
	slots       = 3  // workers at a time
	roundsPerDB = 25 // rounds on one database: checks of a small one are quick
	patience    = 2 * time.Minute
	maxPause    = 400 * time.Millisecond // between two rounds
)

// A Storm is a run of the driver: it starts the workers, kills them, restarts
// them, and checks the database after each kill.
type Storm struct {
	Backend Backend
	Dir     string // an empty directory
	Seed    uint64
	Kills   int       // ends the storm, once reached
	Until   time.Time // ends the storm
	Resume  bool      // the workers use WithResume

	Total Tally    // what has happened
	Bad   []string // the first violations

	faulty string               // for the workers' config
	tamper func(*checker) error // called between a kill and the check; may be nil

	rng      *rand.Rand
	checker  *checker // of the present database
	workers  [slots]*child
	gen      int // counts the processes
	dead     []process
	starting time.Duration // from the start of a process to the return of its first New, as last measured
}

// A child is the driver's view of a worker's process.
type child struct {
	process
	cmd    *exec.Cmd
	in     io.WriteCloser
	stderr string
	began  time.Time
	after  int           // number of processes that had ended when it was started
	ready  chan struct{} // closed when its first New has returned
	exited chan struct{} // closed when it has ended
	err    error         // why it has ended; set before exited is closed
}

// Run runs the storm. It ends early when it finds a violation. An error means
// that the storm itself has failed.
func (s *Storm) Run() error {
	s.rng = rand.New(rand.NewPCG(s.Seed, 0))
	for n := 0; !s.over(); n++ {
		dir := filepath.Join(s.Dir, strconv.Itoa(n))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		s.checker = newChecker(s.Backend, dir)
		s.checker.resume = s.Resume
		s.Total.Databases++
		err := s.history()
		for _, c := range s.workers {
			s.kill(c)
		}
		s.Total.add(s.checker.acks)
		s.Bad = append(s.Bad, s.checker.bad...)
		if err != nil {
			return err
		}
		if s.Total.Violations > 0 {
			return nil
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

func (s *Storm) over() bool {
	return s.Total.Violations+s.checker.violations() > 0 || s.Total.Kills >= s.Kills || time.Now().After(s.Until)
}

func (c *checker) violations() int {
	if c == nil {
		return 0
	}
	return c.acks.Violations
}

// history runs the storm on one database.
func (s *Storm) history() error {
	s.dead = nil
	for i := range s.workers {
		if err := s.start(i); err != nil {
			return err
		}
	}
	if err := s.awaitReady(s.workers[:]); err != nil {
		return err
	}
	for n := 0; n < roundsPerDB && !s.over(); n++ {
		s.pause(maxPause)
		if err := s.round(); err != nil {
			return err
		}
	}
	if s.over() && s.checker.violations() > 0 {
		return nil
	}
	return s.end()
}

// pause waits for a random time.
func (s *Storm) pause(atMost time.Duration) {
	if atMost > 0 {
		time.Sleep(time.Duration(s.rng.Int64N(int64(atMost))))
	}
}

// round kills some workers, restarts them, and checks.
func (s *Storm) round() error {
	targets := s.rng.Perm(slots)
	switch s.rng.IntN(6) {
	case 0: // all
	case 1:
		targets = targets[:2]
	default:
		targets = targets[:1]
	}
	if err := s.restart(targets); err != nil {
		return err
	}
	for s.again() { // kill again, while they start and recover
		s.pause(s.starting + s.starting/4)
		if err := s.restart(targets[:1+s.rng.IntN(len(targets))]); err != nil {
			return err
		}
	}
	if s.Backend.Outages && s.rng.IntN(2) == 0 {
		if err := s.Backend.Outage(); err != nil {
			return err
		}
		s.Total.Outages++
	}
	var fresh []*child
	for _, i := range targets {
		fresh = append(fresh, s.workers[i])
	}
	if err := s.awaitReady(fresh); err != nil {
		return err
	}
	if err := s.settle(); err != nil {
		return err
	}
	if s.tamper != nil {
		if err := s.tamper(s.checker); err != nil {
			return err
		}
	}
	err := s.check()
	s.checkOwnerFiles()
	return err
}

// again reports whether the round kills again. If recovery comes late, a round takes
// long and kills more often.
func (s *Storm) again() bool {
	if s.Backend.Late {
		return s.rng.IntN(8) > 0
	}
	return s.rng.IntN(4) == 0
}

// settle waits until the operations of dead processes are recovered, if that comes
// late.
func (s *Storm) settle() error {
	if !s.Backend.Late {
		return nil
	}
	if err := s.checker.check(); err != nil { // which reads whose the owners are
		return err
	}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if n, err := s.checker.left(); err != nil || n == 0 {
			s.markRecovered(len(s.dead))
			return err
		}
	}
	s.markRecovered(len(s.dead)) // so that the next check reports operations that are left
	return nil
}

// restart kills the workers in those slots, and then replaces them.
func (s *Storm) restart(targets []int) error {
	for _, i := range targets {
		s.kill(s.workers[i])
		s.Total.Kills++
	}
	for _, i := range targets {
		if err := s.start(i); err != nil {
			return err
		}
		s.Total.Restarts++
	}
	return nil
}

// start starts a worker.
func (s *Storm) start(slot int) error {
	s.gen++
	p := process{slot, s.gen}
	text, err := json.Marshal(config{Dir: s.checker.dir, Slot: slot, Gen: s.gen, Seed: s.rng.Uint64(), Faulty: s.faulty, Resume: s.Resume})
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c := &child{
		process: p,
		cmd:     exec.Command(self),
		stderr:  filepath.Join(s.checker.dir, fmt.Sprintf("stderr-%d.%d", slot, s.gen)),
		after:   len(s.dead),
		ready:   make(chan struct{}),
		exited:  make(chan struct{}),
	}
	stderr, err := os.Create(c.stderr)
	if err != nil {
		return err
	}
	defer stderr.Close() // the child has its own descriptor
	c.cmd.Env = append(os.Environ(), workerVar+"="+string(text), "GORACE=atexit_sleep_ms=0")
	c.cmd.Stderr = stderr
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	c.began = time.Now()
	if err := c.cmd.Start(); err != nil {
		return err
	}
	s.checker.started(p)
	s.workers[slot] = c
	go c.follow(out)
	return nil
}

// follow waits until a child is ready, and then until it has ended.
func (c *child) follow(out io.Reader) {
	lines := bufio.NewScanner(out)
	if lines.Scan() {
		close(c.ready)
	}
	io.Copy(io.Discard, out)
	c.err = c.cmd.Wait()
	close(c.exited)
}

// kill kills the process and waits until it is dead.
func (s *Storm) kill(c *child) {
	if c == nil || s.checker.statuses[c.process] == nil || s.checker.statuses[c.process].killed {
		return
	}
	select {
	case <-c.exited:
		s.reportEnd(c)
	default:
	}
	s.checker.statuses[c.process].killed = true
	c.cmd.Process.Kill()
	<-c.exited
	c.in.Close()
	s.dead = append(s.dead, c.process)
	s.checkStderr(c)
}

// reportEnd reports that a worker has ended without being killed.
func (s *Storm) reportEnd(c *child) {
	s.checker.violation("worker %d.%d has ended without being killed: %v", c.slot, c.gen, c.err)
}

// checkStderr reports output of a worker to standard error: a crash, or a data race.
func (s *Storm) checkStderr(c *child) {
	text, err := os.ReadFile(c.stderr)
	if err != nil || len(text) > 0 {
		s.checker.violation("worker %d.%d has written to standard error (%v): %.10000s", c.slot, c.gen, err, text)
	}
}

// awaitReady waits until the managers of these children are ready. From then on,
// processes that had died before one of them started own nothing unfinished.
func (s *Storm) awaitReady(children []*child) error {
	for _, c := range children {
		select {
		case <-c.ready:
			s.starting = time.Since(c.began)
		case <-c.exited:
			s.reportEnd(c)
			s.checkStderr(c)
			return nil
		case <-time.After(patience):
			return fmt.Errorf("worker %d.%d is not ready after %v", c.slot, c.gen, patience)
		}
		if !s.Backend.Late {
			s.markRecovered(c.after)
		}
	}
	return nil
}

// markRecovered records that the first n dead processes must not own anything
// unfinished.
func (s *Storm) markRecovered(n int) {
	for _, p := range s.dead[:n] {
		s.checker.statuses[p].recovered = true
	}
}

// check reports all violations at this moment.
func (s *Storm) check() error {
	for _, c := range s.workers {
		select {
		case <-c.exited:
			if !s.checker.statuses[c.process].killed {
				s.reportEnd(c)
				s.checkStderr(c)
			}
		default:
		}
	}
	return s.checker.check()
}

// checkOwnerFiles checks that owner files do not accumulate: at most one for each
// live process, and for each that died after the last New began.
func (s *Storm) checkOwnerFiles() {
	files := s.checker.ownerFiles()
	may := slots
	for _, p := range s.dead {
		if !s.checker.statuses[p].recovered {
			may++
		}
	}
	if len(files) > may {
		s.checker.violation("%d owner files, but at most %d owners: %q", len(files), may, files)
	}
}

// end ends the storm on one database: it kills all workers, or asks them to end, opens
// the database with one more manager, and checks the result.
func (s *Storm) end() error {
	if s.rng.IntN(2) == 0 {
		for _, c := range s.workers {
			io.WriteString(c.in, "stop\n") // fails if the child has died, which check reports
		}
		for _, c := range s.workers {
			select {
			case <-c.exited:
			case <-time.After(patience):
				return fmt.Errorf("worker %d.%d has not ended after %v", c.slot, c.gen, patience)
			}
			if c.err != nil {
				s.reportEnd(c)
			}
			s.checker.statuses[c.process].killed = true // so that it is not killed again
			s.dead = append(s.dead, c.process)
			s.checkStderr(c)
		}
	} else {
		for _, c := range s.workers {
			s.kill(c)
			s.Total.Kills++
		}
	}
	if err := s.checker.check(); err != nil { // which reads whose the owners are
		return err
	}
	if err := s.openAndClose(); err != nil {
		s.checker.violation("the last manager: %v", err)
	}
	s.checker.over = true
	s.markRecovered(len(s.dead))
	if files := s.checker.ownerFiles(); len(files) > 0 {
		s.checker.violation("owner files are left: %q", files)
	}
	return s.checker.check()
}

// openAndClose opens and closes a manager, or several until all operations of dead
// processes are recovered.
func (s *Storm) openAndClose() error {
	store, err := s.Backend.Open(s.checker.dir)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		m, err := task.New(store, task.WithLogger(slog.New(slog.DiscardHandler)))
		if err == nil {
			err = m.Close()
		}
		left := 0
		if err == nil && s.Backend.Late {
			left, err = s.checker.left()
		}
		if err != nil || left == 0 || time.Now().After(deadline) {
			return errors.Join(err, store.Close())
		}
	}
}
