// Command storm shows that crashes lose nothing that was acknowledged.
//
// Three processes use one database as hard as they can, each writing down in a
// journal of its own what it was told: that an operation was submitted, how
// one ended. They are killed with SIGKILL at random moments, together, twice
// in quick succession or while they start, and are started again. After each
// strike it is checked that all that is in the journals is in the database and
// never changes again, that nothing unfinished belongs to the dead, and that
// nothing of the living was touched.
//
//	go run ./internal/storm -for 30s
//	go run ./internal/storm -for 15m -kills 1000
//
// It ends with a line of figures. If anything was wrong it says what, exits
// with status 1 and keeps what there is to look at. It needs cgo, and a system
// that locks files.
package main

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"time"
)

func main() {
	if text := os.Getenv(workerVar); text != "" {
		os.Exit(work(text))
	}
	var s storm
	length := flag.Duration("for", 30*time.Second, "how long at most")
	flag.IntVar(&s.kills, "kills", math.MaxInt, "how many kills at most")
	flag.Uint64Var(&s.seed, "seed", rand.Uint64(), "what decides who is killed when, as far as that can be decided")
	flag.StringVar(&s.dir, "dir", "", "where to put the databases (default a temporary directory)")
	flag.Parse()
	s.until = time.Now().Add(*length)
	if err := report(&s); err != nil {
		fmt.Fprintln(os.Stderr, "storm:", err)
		os.Exit(1)
	}
}

// report runs a storm and prints what comes of it.
func report(s *storm) error {
	var err error
	if s.dir == "" {
		s.dir, err = os.MkdirTemp("", "storm-")
	} else {
		err = os.MkdirAll(s.dir, 0o700)
	}
	if err != nil {
		return err
	}
	fmt.Printf("storm: seed %d, directory %s\n", s.seed, s.dir)
	err = s.run()
	for _, text := range s.bad {
		fmt.Println("violation:", text)
	}
	fmt.Println("storm:", s.total)
	if err != nil {
		return err
	}
	if s.total.violations > 0 {
		return fmt.Errorf("%d violations; the database and the journals are kept in %s", s.total.violations, s.dir)
	}
	return os.Remove(s.dir) // which is empty
}
