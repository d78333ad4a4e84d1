package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// A manifest holds the expected content of the files of a pool, by path.
//
// It is stored as text: a line with manifestHead and the SHA-256 of the rest, followed by a
// line for each file with its SHA-256, size, time in nanoseconds since 1970, and quoted
// path. A program that changes the format must change the head.
type manifest map[string]entry

type entry struct {
	sum   string
	size  int64
	mtime int64
}

const manifestHead = "nasd manifest 1 "

func newEntry(sum string, info fs.FileInfo) entry {
	return entry{sum: sum, size: info.Size(), mtime: info.ModTime().UnixNano()}
}

// find returns the entry of a file if the file's size and time are unchanged.
func (m manifest) find(path string, info fs.FileInfo) (entry, bool) {
	e, ok := m[path]
	return e, ok && e == newEntry(e.sum, info)
}

// manifest returns the manifest of a pool, or an error if it is damaged and thus useless.
func (p *pool) manifest() (manifest, error) {
	text, err := p.root.ReadFile(manifestFile)
	var m manifest
	if err == nil {
		m, err = parseManifest(string(text))
	}
	if err != nil {
		return nil, fmt.Errorf("the checksums of the pool can't be read; POST to its /accept to replace them by those of the present files: %w", err)
	}
	return m, nil
}

func (p *pool) saveManifest(m manifest) error {
	err := replace(p.root, manifestFile, meta{perm: 0o600}, func(f *os.File) error {
		_, err := f.WriteString(m.text())
		return err
	})
	if err != nil {
		return err
	}
	return syncDir(p.root, ".")
}

func (m manifest) text() string {
	var b strings.Builder
	for _, path := range slices.Sorted(maps.Keys(m)) {
		e := m[path]
		fmt.Fprintf(&b, "%s %d %d %q\n", e.sum, e.size, e.mtime, path)
	}
	return fmt.Sprintf("%s%x\n%s", manifestHead, sha256.Sum256([]byte(b.String())), b.String())
}

func parseManifest(text string) (manifest, error) {
	head, rest, _ := strings.Cut(text, "\n")
	if head != fmt.Sprintf("%s%x", manifestHead, sha256.Sum256([]byte(rest))) {
		return nil, errors.New("the manifest is damaged")
	}
	m := make(manifest)
	for line := range strings.Lines(rest) {
		path, e, err := parseEntry(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return nil, fmt.Errorf("bad line %q in the manifest: %w", line, err)
		}
		m[path] = e
	}
	return m, nil
}

func parseEntry(line string) (path string, e entry, err error) {
	fields := strings.SplitN(line, " ", 4)
	if len(fields) != 4 {
		return "", e, errors.New("want four fields")
	}
	e.sum = fields[0]
	if e.size, err = strconv.ParseInt(fields[1], 10, 64); err != nil {
		return "", e, err
	}
	if e.mtime, err = strconv.ParseInt(fields[2], 10, 64); err != nil {
		return "", e, err
	}
	path, err = strconv.Unquote(fields[3])
	return path, e, err
}
