//go:build linux && cgo

package powerloss

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/mynt-nas/task/internal/testos"
)

var (
	pointsFlag = flag.Int("points", testos.Size(12, 50), "lose power at this many moments of each record")
	seedFlag   = flag.Uint64("seed", rand.Uint64(), "seed of the random choice of moments and of what survives")
)

// configVar names the environment variable that makes the test binary record or
// replay instead of running tests. It holds the config.
const configVar = "TASK_POWERLOSS"

func TestMain(m *testing.M) {
	text := os.Getenv(configVar)
	if text == "" {
		os.Exit(testos.Run(m))
	}
	if err := play(text); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// play plays the role in the config.
func play(text string) error {
	var c config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return err
	}
	if c.Role == "record" {
		return c.record()
	}
	r, err := c.replay()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// compile compiles the library to preload.
func compile(t *testing.T) string {
	cc, err := exec.LookPath(cmp.Or(os.Getenv("CC"), "gcc"))
	if err != nil {
		t.Skipf("needs a C compiler: %v", err)
	}
	path := filepath.Join(t.TempDir(), "shim.so")
	out, err := exec.Command(cc, "-shared", "-fPIC", "-O1", "-o", path, "testdata/shim.c", "-ldl", "-lpthread").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// start makes the test binary play a role with the library preloaded, and returns
// its output.
func start(t *testing.T, shim string, c config, env ...string) ([]byte, error) {
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), "LD_PRELOAD="+shim, configVar+"="+string(text), "GORACE=atexit_sleep_ms=0")
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	return cmd.Output()
}

// processes lists the processes that record and are killed, one after the other, on the
// same files: at their n-th sync while they create the database, while they recover it,
// and later, with and without leaving unfinished operations.
func processes() (all []config) {
	for n := range 10 {
		all = append(all, config{Kill: n + 1})
	}
	all = append(all, config{Kill: 40})
	for n := range 12 {
		all = append(all, config{Kill: 8 + n, Alone: true})
	}
	return all
}

// record returns the path of a new record. It kills that many processes. In the
// last one, each goroutine then runs ops operations.
func record(t *testing.T, shim, settings string, killed, ops int) string {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(recordDir(t), "record")
	for gen, c := range append(processes()[:killed:killed], config{Ops: ops}) {
		c.Role, c.Dir, c.Record, c.Settings, c.Gen = "record", dir, path, settings, gen
		_, err := start(t, shim, c, "SHIM_DIR="+dir, "SHIM_LOG="+path, "SHIM_KILL="+strconv.Itoa(c.Kill))
		if killed := err != nil && err.Error() == "signal: killed"; killed != (c.Kill > 0) || !killed && err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
	}
	return path
}

// recordDir is t.TempDir, but the directory stays if the test fails.
func recordDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "powerloss-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the record is in %s", dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestPowerLoss checks that acknowledged operations survive a loss of power if the
// database is synced before the acknowledgement, and that the replay detects losses
// otherwise.
func TestPowerLoss(t *testing.T) {
	shim := compile(t)
	apps := testos.Size(4, len(processes())) // processes that are killed in an application's database
	for _, test := range []struct {
		name     string
		settings string // of an application's database; "" for OpenSQLite
		lossless bool   // by docs/durability.md and SQLite's documentation
		killed   int    // number of processes; fewer where syncs are rare
		ops      int    // number of operations after that; 100 cause some checkpoints
		ignore   []string
	}{
		// Ignoring syncs shows that the replay detects losses.
		{"OpenSQLite", "", true, len(processes()), 100, []string{"files", "directory"}},
		{"WAL, NORMAL", "_journal_mode=WAL&_synchronous=NORMAL", false, 4, 100, nil},
		{"WAL, FULL", "_journal_mode=WAL&_synchronous=FULL", true, apps, 30, nil},
		{"rollback journal, FULL", "_journal_mode=DELETE&_synchronous=FULL", false, apps, 30, nil},
		{"rollback journal, EXTRA", "_journal_mode=DELETE&_synchronous=EXTRA", true, apps, 30, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			if testing.Short() && test.ops < 100 {
				t.Skip("takes some seconds")
			}
			t.Parallel() // recording waits for the disk
			path := record(t, shim, test.settings, test.killed, test.ops)
			c := config{Role: "replay", Record: path, Settings: test.settings, Dir: t.TempDir(), Points: *pointsFlag, Seed: *seedFlag}
			if test.settings != "" {
				c.Points /= 3
				if !test.lossless {
					c.Points = max(c.Points, min(*pointsFlag, 16)) // fewer might show no loss
				}
			}
			if testing.Short() {
				c.Points /= 3
			}
			c.replayed(t, shim, test.lossless)
			for _, c.Ignore = range test.ignore {
				c.Points = testos.Size(0, 20) // even the moments that are always included show losses
				c.replayed(t, shim, false)
			}
		})
	}
}

// replayed replays a record and checks the report.
func (c config) replayed(t *testing.T, shim string, lossless bool) {
	out, err := start(t, shim, c, "SHIM_NOSYNC=1")
	var r report
	if err == nil {
		err = json.Unmarshal(out, &r)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("ignored syncs %q: %d entries, %d syncs, %d of the database file, %d acknowledgements; %d points, %d images, %d with a loss",
		c.Ignore, r.Entries, r.Syncs, r.DBSyncs, r.Acks, r.Points, r.Images, r.Lossy)
	for _, text := range r.Problems {
		if c.Ignore == "" { // a disk that ignores syncs breaks any database
			t.Error(text)
		}
	}
	switch {
	case r.Syncs == 0 || r.Acks == 0:
		t.Error("nothing was recorded")
	case lossless && r.Lossy > 0:
		t.Error("lost: ", r.Loss)
	case !lossless && r.Lossy == 0 && len(r.Problems) == 0:
		t.Error("the replay has detected no loss")
	}
}
