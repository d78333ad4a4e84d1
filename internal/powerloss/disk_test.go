//go:build linux && cgo

package powerloss

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// An entry is one entry of the record, as testdata/shim.c writes them. Entries of
// the kind ack are written by the program itself.
type entry struct {
	kind byte
	fd   int32
	n    int64
	data []byte
}

const ack = 'A'

// header is the header of an entry in the record.
type header struct {
	Kind, FD int32
	N, Len   int64
}

// appendEntry appends an acknowledgement to the record, in a single write.
func appendEntry(f *os.File, data []byte) error {
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, header{Kind: ack, FD: -1, Len: int64(len(data))}); err != nil {
		return err
	}
	b.Write(data)
	_, err := f.Write(b.Bytes())
	return err
}

func readEntries(path string) ([]entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	var entries []entry
	for {
		var h header
		err := binary.Read(r, binary.NativeEndian, &h)
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		data := make([]byte, h.Len)
		if _, err := io.ReadFull(r, data); err != nil {
			return nil, err
		}
		entries = append(entries, entry{byte(h.Kind), h.FD, h.N, data})
	}
}

// A disk is the state of one directory according to the record: what is certainly on
// the disk, and what may be.
type disk struct {
	fds   map[int32]*file
	syncs map[int64]point // the syncs under way
	dir   file            // stands for the directory
	names map[string]*name
}

// A file is its synced content, and the changes since.
type file struct {
	data    []byte
	pending []change
	past    int // number of synced changes
}

// A change is a write, or a truncation if data is nil. A change of a directory is
// a change of a name.
type change struct {
	at   int64
	data []byte

	name string
	to   *file // nil if unlinked
}

// A name leads to a file, or to nil if it does not exist.
type name struct {
	synced *file // where it certainly leads
	latest *file // where it leads once the directory's pending changes are synced
}

// A point is a moment in the history of a file.
type point struct {
	file *file
	past int // number of earlier changes
}

func newDisk() *disk {
	return &disk{fds: make(map[int32]*file), syncs: make(map[int64]point), names: make(map[string]*name)}
}

// apply applies the next entry of the record.
func (d *disk) apply(e entry) error {
	f := d.fds[e.fd]
	switch e.kind {
	case 'P': // a new process: the old descriptors are closed
		clear(d.fds)
		clear(d.syncs)
	case 'D':
		d.fds[e.fd] = &d.dir
	case 'O':
		d.open(e)
	case 'C':
		delete(d.fds, e.fd)
	case 'W':
		f.pending = append(f.pending, change{at: e.n, data: e.data})
	case 'T':
		f.pending = append(f.pending, change{at: e.n})
	case 'S':
		d.syncs[e.n] = point{f, f.past + len(f.pending)}
	case 'E':
		d.synced(d.syncs[e.n])
		delete(d.syncs, e.n)
	case 'U':
		d.link(filepath.Base(string(e.data)), nil)
	case 'R':
		from, to, _ := strings.Cut(string(e.data), "\x00")
		d.link(filepath.Base(to), d.names[filepath.Base(from)].latest)
		d.link(filepath.Base(from), nil)
	case ack:
	default:
		return fmt.Errorf("unknown entry of kind %c: %s", e.kind, e.data)
	}
	return nil
}

func (d *disk) open(e entry) {
	base := filepath.Base(string(e.data))
	n := d.names[base]
	if n == nil || n.latest == nil {
		d.link(base, new(file))
		n = d.names[base]
	}
	d.fds[e.fd] = n.latest
	if e.n&syscall.O_TRUNC != 0 {
		n.latest.pending = append(n.latest.pending, change{})
	}
}

// link makes a name lead to a file, or to nothing if to is nil.
func (d *disk) link(base string, to *file) {
	n := d.names[base]
	if n == nil {
		n = new(name)
		d.names[base] = n
	}
	n.latest = to
	d.dir.pending = append(d.dir.pending, change{name: base, to: to})
}

// synced records that all changes of a file up to a point are synced.
func (d *disk) synced(p point) {
	f := p.file
	n := p.past - f.past
	if n <= 0 { // another sync has covered them
		return
	}
	for _, c := range f.pending[:n] {
		if f == &d.dir {
			d.names[c.name].synced = c.to
		} else {
			f.data = c.apply(f.data)
		}
	}
	f.past += n
	f.pending = slices.Clone(f.pending[n:])
}

// apply returns data with the change applied.
func (c change) apply(data []byte) []byte {
	if c.data == nil {
		return resize(data, int(c.at))
	}
	end := int(c.at) + len(c.data)
	if len(data) < end {
		data = resize(data, end)
	}
	copy(data[c.at:], c.data)
	return data
}

func resize(data []byte, size int) []byte {
	if size <= len(data) {
		return data[:size]
	}
	old := len(data)
	data = slices.Grow(data, size-old)[:size]
	clear(data[old:])
	return data
}

// sector is the unit that a disk writes atomically.
const sector = 512

// A crash says how much of the unsynced changes survives a loss of power.
type crash int

const (
	none    crash       = iota // nothing
	all                        // everything
	mixed                      // a random part of each file and each name
	crashes = mixed + 3        // the number to try; mixed is tried several times
)

// after returns the files after a crash.
func (d *disk) after(c crash, rng *rand.Rand) map[string][]byte {
	files := make(map[string][]byte)
	for base, n := range d.names {
		f := n.latest
		switch {
		case c == none:
			f = n.synced
		case c >= mixed:
			f = d.either(base, rng)
		}
		if f == nil {
			continue
		}
		if strings.HasSuffix(base, "-shm") {
			// The file is written through a memory map, which the record doesn't show.
			files[base] = garbage(rng.IntN(3)*32<<10, rng)
			continue
		}
		files[base] = f.after(c, rng)
	}
	return files
}

// either returns at random one of the files to which a name may lead.
func (d *disk) either(base string, rng *rand.Rand) *file {
	may := []*file{d.names[base].synced}
	for _, c := range d.dir.pending {
		if c.name == base {
			may = append(may, c.to)
		}
	}
	return may[rng.IntN(len(may))]
}

// after returns the content of a file after a crash. The caller must not modify
// it.
func (f *file) after(c crash, rng *rand.Rand) []byte {
	if c == none || len(f.pending) == 0 {
		return f.data
	}
	var survives func(change) []change // the parts of a change that survive
	whole := func(c change) []change { return []change{c} }
	switch way := rng.IntN(5); {
	case c == all:
		survives = whole
	case way == 0:
		return f.data
	case way == 1: // the first changes
		n := rng.IntN(len(f.pending) + 1)
		survives = func(c change) []change {
			if n--; n < 0 {
				return nil
			}
			return whole(c)
		}
	case way == 2: // any changes, so that a later one may survive without an earlier one
		survives = func(c change) []change {
			if rng.IntN(2) == 0 {
				return nil
			}
			return whole(c)
		}
	default: // any sectors of them, most or few
		likely := []int{1, 5, 9}[rng.IntN(3)]
		stale := way == 4
		survives = func(c change) []change { return tear(c, likely, stale, len(f.data), rng) }
	}
	data := slices.Clone(f.data)
	for _, c := range f.pending {
		for _, part := range survives(c) {
			data = part.apply(data)
		}
	}
	return data
}

// tear returns the sectors of a write that have reached the disk, on average
// likely of ten. If stale, other sectors beyond size, that of the synced file,
// hold what was at that place of the disk before.
func tear(c change, likely int, stale bool, size int, rng *rand.Rand) (parts []change) {
	if c.data == nil {
		if rng.IntN(10) < likely {
			parts = append(parts, c)
		}
		return parts
	}
	for at, data := c.at, c.data; len(data) > 0; {
		n := min(sector-int(at%sector), len(data))
		switch {
		case rng.IntN(10) < likely:
			parts = append(parts, change{at: at, data: data[:n]})
		case stale && int(at) >= size:
			parts = append(parts, change{at: at, data: garbage(n, rng)})
		}
		at, data = at+int64(n), data[n:]
	}
	return parts
}

// noise is not valid text, so that tests recognize it.
var noise = sync.OnceValue(func() []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 256<<10)
	for i := range data {
		data[i] = byte(rng.Uint32()) | 0x80
	}
	return data
})

// garbage returns bytes that no program has written. The caller must not modify
// them.
func garbage(n int, rng *rand.Rand) []byte {
	all := noise()
	at := rng.IntN(len(all) - n)
	return all[at : at+n]
}

// TestDisk checks that a crash leaves what was synced, and any part of the rest.
func TestDisk(t *testing.T) {
	const dir, a = 3, 4
	created := []entry{
		{kind: 'D', fd: dir},
		{kind: 'O', fd: a, data: []byte("/d/a")},
		{kind: 'W', fd: a, n: 0, data: []byte("x")},
	}
	synced := append(slices.Clone(created),
		entry{kind: 'S', fd: a, n: 1}, entry{kind: 'E', fd: a, n: 1},
		entry{kind: 'S', fd: dir, n: 2}, entry{kind: 'E', fd: dir, n: 2})
	with := func(entries []entry, more ...entry) []entry { return append(slices.Clone(entries), more...) }
	for _, test := range []struct {
		name      string
		entries   []entry
		none, all string
		may       []string // "-" stands for no file, "?" for a byte that no program has written
	}{
		{"created", created, "-", "x", []string{"-", "", "x", "?"}},
		{
			"file synced", with(created, entry{kind: 'S', fd: a}, entry{kind: 'E', fd: a}),
			"-", "x", []string{"-", "x"},
		},
		{
			"directory synced", with(created, entry{kind: 'S', fd: dir}, entry{kind: 'E', fd: dir}),
			"", "x", []string{"", "x", "?"},
		},
		{"both synced", synced, "x", "x", []string{"x"}},
		{
			"sync that does not end", with(created, entry{kind: 'S', fd: dir}, entry{kind: 'E', fd: dir}, entry{kind: 'S', fd: a}),
			"", "x", []string{"", "x", "?"},
		},
		{
			"written during the sync",
			with(synced, entry{kind: 'S', fd: a}, entry{kind: 'W', fd: a, n: 0, data: []byte("y")}, entry{kind: 'E', fd: a}),
			"x", "y", []string{"x", "y"},
		},
		{
			"written twice",
			with(synced, entry{kind: 'W', fd: a, n: 0, data: []byte("y")}, entry{kind: 'W', fd: a, n: 2, data: []byte("z")}),
			"x", "y\x00z", []string{"x", "y", "x\x00z", "y\x00z", "x\x00?", "y\x00?"},
		},
		{"truncated", with(synced, entry{kind: 'T', fd: a}), "x", "", []string{"x", ""}},
		{"unlinked", with(synced, entry{kind: 'U', data: []byte("/d/a")}), "x", "-", []string{"x", "-"}},
		{
			"unlinked and created again",
			with(synced, entry{kind: 'U', data: []byte("/d/a")}, entry{kind: 'O', fd: 5, data: []byte("/d/a")},
				entry{kind: 'W', fd: 5, data: []byte("n")}),
			"x", "n", []string{"x", "-", "", "n", "?"},
		},
		{
			"synced by a process that died during the sync",
			with(created, entry{kind: 'S', fd: dir}, entry{kind: 'P'}, entry{kind: 'D', fd: a}),
			"-", "x", []string{"-", "", "x", "?"},
		},
		{
			"renamed", with(synced, entry{kind: 'R', data: []byte("/d/a\x00/d/b")}),
			"x", "-", []string{"x", "-"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDisk()
			for _, e := range test.entries {
				if err := d.apply(e); err != nil {
					t.Fatal(err)
				}
			}
			rng := rand.New(rand.NewPCG(1, 2))
			content := func(c crash) string {
				data, ok := d.after(c, rng)["a"]
				if !ok {
					return "-"
				}
				return strings.Map(func(r rune) rune {
					if r > 0 && !strings.ContainsRune("xyzn", r) {
						return '?'
					}
					return r
				}, string(data))
			}
			if got := content(none); got != test.none {
				t.Errorf("with nothing unsynced: %q, want %q", got, test.none)
			}
			if got := content(all); got != test.all {
				t.Errorf("with everything unsynced: %q, want %q", got, test.all)
			}
			seen := make(map[string]bool)
			for range 2000 {
				seen[content(mixed)] = true
			}
			got := slices.Sorted(maps.Keys(seen))
			if want := slices.Sorted(slices.Values(test.may)); !slices.Equal(got, want) {
				t.Errorf("possible contents %q, want %q", got, want)
			}
		})
	}
}

// TestTear checks that a torn write leaves whole sectors.
func TestTear(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	write := change{at: sector - 1, data: bytes.Repeat([]byte("x"), 2*sector)}
	seen := make(map[string]bool)
	for range 1000 {
		var what string
		for _, part := range tear(write, 5, false, 0, rng) {
			what += fmt.Sprintf("%d+%d ", part.at, len(part.data))
		}
		seen[what] = true
	}
	want := []string{
		"", "1024+511 ", "511+1 ", "511+1 1024+511 ", "511+1 512+512 ", "511+1 512+512 1024+511 ", "512+512 ", "512+512 1024+511 ",
	}
	if got := slices.Sorted(maps.Keys(seen)); !slices.Equal(got, want) {
		t.Errorf("torn into %q, want %q", got, want)
	}
}
