// Command storm tests that crashes lose nothing that was acknowledged.
//
// Three processes use one database as fast as they can. Each records in its own journal
// what was acknowledged: that an operation was submitted, and how it ended. The
// processes are killed with SIGKILL at random moments, together, twice in quick
// succession or while they start, and are restarted. After each kill, storm checks that
// everything in the journals is in the database and never changes again, that no
// unfinished operation belongs to a dead process, and that no operation of a live
// process was modified.
//
//	go run ./internal/storm -for 30s
//	go run ./internal/storm -for 15m -kills 1000
//
// With -resume, the workers resume most of the operations of dead processes, and storm
// checks that each operation is resumed by one process at a time.
//
// At the end, storm prints a line of figures. If it has found violations, it prints
// them, exits with status 1 and keeps the database and the journals. It needs cgo, and
// a system with file locks.
package main

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"time"

	"github.com/mynt-nas/task/internal/storm/engine"
)

func main() {
	engine.Main(engine.SQLite)
	s := engine.Storm{Backend: engine.SQLite}
	length := flag.Duration("for", 30*time.Second, "run for this time at most")
	flag.IntVar(&s.Kills, "kills", math.MaxInt, "kill this many processes at most")
	flag.BoolVar(&s.Resume, "resume", false, "let the workers resume what the dead have left")
	flag.Uint64Var(&s.Seed, "seed", rand.Uint64(), "seed of the random choice of targets and moments")
	flag.StringVar(&s.Dir, "dir", "", "put the databases into this `directory` (default a temporary one)")
	flag.Parse()
	s.Until = time.Now().Add(*length)
	if err := report(&s); err != nil {
		fmt.Fprintln(os.Stderr, "storm:", err)
		os.Exit(1)
	}
}

// report runs a storm and prints the outcome.
func report(s *engine.Storm) error {
	var err error
	if s.Dir == "" {
		s.Dir, err = os.MkdirTemp("", "storm-")
	} else {
		err = os.MkdirAll(s.Dir, 0o700)
	}
	if err != nil {
		return err
	}
	fmt.Printf("storm: seed %d, directory %s\n", s.Seed, s.Dir)
	err = s.Run()
	for _, text := range s.Bad {
		fmt.Println("violation:", text)
	}
	fmt.Println("storm:", s.Total)
	if err != nil {
		return err
	}
	if s.Total.Violations > 0 {
		return fmt.Errorf("%d violations; the database and the journals are in %s", s.Total.Violations, s.Dir)
	}
	return os.Remove(s.Dir) // it is empty
}
