package testos

import (
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

var checked sync.Map // the names of the tests that CheckLeaks was called for

// CheckLeaks fails the test if it leaves open files, or goroutines of this module or of
// database/sql. Call it before registering cleanups that close things. Further calls,
// even in subtests, do nothing. It does not work in parallel tests, which see each
// other's goroutines and files: see [Parallel].
func CheckLeaks(t testing.TB) {
	t.Helper()
	for name := t.Name(); name != "."; name = path.Dir(name) {
		if _, again := checked.Load(name); again { // this test or an enclosing one has called it
			return
		}
	}
	checked.Store(t.Name(), true)
	goroutines, files := Goroutines(), openFiles()
	t.Cleanup(func() {
		checked.Delete(t.Name())
		if t.Failed() {
			return
		}
		var left []string
		var open int
		for wait := time.Millisecond; wait < 8*time.Second; wait *= 2 {
			left, open = Goroutines(), openFiles()
			if len(left) <= len(goroutines) && open <= files {
				return
			}
			time.Sleep(wait)
		}
		t.Errorf("%d files are open, %d were before; %d goroutines run, %d did before:\n\n%s",
			open, files, len(left), len(goroutines), strings.Join(left, "\n\n"))
	})
}

// Parallel makes a test run in parallel with others that call it, for tests that mostly
// wait. [CheckLeaks] does nothing in such a test: TestMain finds its leaks.
func Parallel(t *testing.T) {
	checked.Store(t.Name(), true)
	t.Cleanup(func() { checked.Delete(t.Name()) })
	t.Parallel()
}

// Goroutines returns the stacks of the goroutines of this module and of
// database/sql.
func Goroutines() (own []string) {
	for _, stack := range others() {
		if !strings.Contains(stack, "testing.(*T)") &&
			(strings.Contains(stack, "mynt-nas/task.") || strings.Contains(stack, "database/sql.")) {
			own = append(own, stack)
		}
	}
	return own
}

// Run runs the tests and returns the exit code, for TestMain. The tests fail if they
// leave goroutines or open files. Parallel tests mostly wait, so eight of them run at a
// time unless the user says otherwise.
//
// All temporary directories are in memory if that has space and allows programs to run:
// otherwise most tests would spend most of their time waiting for a disk to sync. If
// the environment variable TASK_LONG is set they are not, so that the tests also run on
// a disk.
func Run(m *testing.M) (code int) {
	if os.Getenv(longVar) == "" && fits(memoryDir) {
		os.Setenv("TMPDIR", memoryDir)
	}
	flag.Parse()
	if given := flag.Lookup("test.parallel"); given.Value.String() == given.DefValue {
		flag.Set("test.parallel", "8")
	}
	files := openFiles() // the caller may have redirected output to a temporary file
	if code = m.Run(); code == 0 {
		if what := left(10*time.Second, files); what != "" {
			fmt.Fprintf(os.Stderr, "left by tests:\n\n%s\n", what)
			code = 1
		}
	}
	return code
}

// left returns what tests have left: the stacks of goroutines, and how many more files
// are open than before. It waits up to wait for them to end, and returns "" once
// nothing is left.
func left(wait time.Duration, before int) string {
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		all := others()
		if files := openFiles() - before; files > 0 {
			all = append(all, fmt.Sprintf("%d open files", files))
		}
		if len(all) == 0 || time.Now().After(deadline) {
			return strings.Join(all, "\n\n")
		}
	}
}

// others returns the stacks of all goroutines, except the caller's and those of every
// test program.
func others() (stacks []string) {
	buf := make([]byte, 1<<16)
	n := runtime.Stack(buf, true)
	for n == len(buf) {
		buf = make([]byte, 2*len(buf))
		n = runtime.Stack(buf, true)
	}
	for i, stack := range strings.Split(string(buf[:n]), "\n\n") {
		// The first one is the caller's.
		if i > 0 && !strings.Contains(stack, "testing.(*M)") && !strings.Contains(stack, "os/signal.") {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

// openFiles returns the number of open temporary files, or 0 without /proc.
func openFiles() (n int) {
	links, _ := filepath.Glob("/proc/self/fd/*")
	for _, link := range links {
		if file, err := os.Readlink(link); err == nil && strings.HasPrefix(file, os.TempDir()) {
			n++
		}
	}
	return n
}
