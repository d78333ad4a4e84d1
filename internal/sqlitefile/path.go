package sqlitefile

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// Resolve returns the absolute path of a database file, with all symbolic links resolved,
// or an error if there can't be a database. For ":memory:" it returns "".
func Resolve(path string) (string, error) {
	if path == ":memory:" {
		return "", nil
	}
	if path == "" || strings.ContainsRune(path, 0) || os.IsPathSeparator(path[len(path)-1]) || filepath.Base(path) == "." {
		return "", errors.New("the path is empty, has a NUL byte, or names a directory: choose a file, or \":memory:\"")
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return "", fmt.Errorf("no directory %s: %w: create it first, or choose another path", filepath.Dir(path), err)
	}
	path = filepath.Join(dir, filepath.Base(path))
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return path, nil
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", fmt.Errorf("%w: make sure that you may use that path, and that a symbolic link leads to a file", err)
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s is not a regular file: choose another path", path)
	case info.Mode().Perm()&0o222 == 0: // root could write it all the same
		return "", fmt.Errorf("%s is read-only: make it writable, or choose another path", path)
	}
	if err := onlyName(path, info); err != nil {
		return "", err
	}
	return path, nil
}

// dsn returns go-sqlite3's data source name for a path. It contains the settings, because a
// PRAGMA reaches only one connection. The busy timeout is short, because Read and Write
// retry. A new file gets the mode and owner of the file modeOf.
func dsn(path, mode, modeOf string) string {
	path = filepath.ToSlash(path)
	if filepath.VolumeName(path) != "" {
		path = "/" + path
	}
	s := "file:" + (&url.URL{Path: path}).EscapedPath() + "?_synchronous=FULL&_stmt_cache_size=32&_busy_timeout=1000&mode=" + mode
	if modeOf != "" {
		s += "&modeof=" + strings.ReplaceAll(url.QueryEscape(modeOf), "+", "%20") // SQLite reads no + as a space
	}
	return s
}
