package testos

import (
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

// CheckLeaks fails the test if it leaves goroutines of this module, or of a
// database, or open files. Call it before whatever has to be closed in the end
// registers its own cleanup; to call it again, also in a subtest, changes
// nothing. Tests that run in parallel take each other's for their own.
func CheckLeaks(t testing.TB) {
	t.Helper()
	for name := t.Name(); name != "."; name = path.Dir(name) {
		if _, again := checked.Load(name); again { // or a test around this one will see to it
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
		t.Errorf("%d files are open, %d were; goroutines, of which there were %d:\n\n%s",
			open, files, len(goroutines), strings.Join(left, "\n\n"))
	})
}

// Goroutines returns the stacks of the goroutines that are this module's own
// or belong to a database.
func Goroutines() (own []string) {
	for _, stack := range others() {
		if !strings.Contains(stack, "testing.(*T)") &&
			(strings.Contains(stack, "mynt-nas/task.") || strings.Contains(stack, "database/sql.")) {
			own = append(own, stack)
		}
	}
	return own
}

// Left returns the stacks of the goroutines that tests have left, "" as soon
// as there are none. It is for TestMain.
func Left(wait time.Duration) string {
	for deadline := time.Now().Add(wait); ; time.Sleep(time.Millisecond) {
		left := others()
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, "\n\n")
		}
	}
}

// others returns the stacks of all goroutines but the caller's and those that
// every test program has.
func others() (stacks []string) {
	buf := make([]byte, 1<<16)
	n := runtime.Stack(buf, true)
	for n == len(buf) {
		buf = make([]byte, 2*len(buf))
		n = runtime.Stack(buf, true)
	}
	for i, stack := range strings.Split(string(buf[:n]), "\n\n") {
		// The first is this one.
		if i > 0 && !strings.Contains(stack, "testing.(*M)") && !strings.Contains(stack, "os/signal.") {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

// openFiles returns how many temporary files are open, 0 where nobody tells.
func openFiles() (n int) {
	links, _ := filepath.Glob("/proc/self/fd/*")
	for _, link := range links {
		if file, err := os.Readlink(link); err == nil && strings.HasPrefix(file, os.TempDir()) {
			n++
		}
	}
	return n
}
