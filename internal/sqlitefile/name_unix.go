//go:build unix

package sqlitefile

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// onlyName returns an error if the file at a resolved path has another name: a hard link,
// or, if path is a mount point, the path of the file that is mounted there. SQLite's
// journal and the owner files are named after the path, so that programs that use different
// names do not see each other's commits and locks. Mounts are checked on Linux, if /proc is
// mounted.
func onlyName(path string, info os.FileInfo) error {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Nlink > 1 {
		return fmt.Errorf("%s is one of %d hard links to the same file, and what is written under one name gets lost under another: "+
			"remove the other links, or use a copy of the file", path, stat.Nlink)
	}
	escaped := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`).Replace(path)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.SplitN(line, " ", 6); len(fields) == 6 && fields[4] == escaped {
			return fmt.Errorf("%s is a mount point, and what is written under one name of a file gets lost under another: "+
				"mount the directory that the file is in, instead of the file", path)
		}
	}
	return nil
}
