package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/mynt-nas/task"
)

// A screen is the destination of the output.
type screen struct {
	io.Writer
	size func() (width, height int) // nil unless it is a terminal
}

// lines writes lines in a single write.
func (s screen) lines(lines []string) error {
	if len(lines) == 0 {
		return nil
	}
	_, err := io.WriteString(s, strings.Join(lines, "\n")+"\n")
	return err
}

// escape returns text as a single line that a terminal can only display. Control
// characters, characters that change the text direction, and invalid UTF-8 are escaped as
// in Go literals.
func escape(text string) string {
	var b strings.Builder
	for i, r := range text {
		switch _, size := utf8.DecodeRuneInString(text[i:]); {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case strconv.IsPrint(r):
			b.WriteRune(r)
		default:
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
	}
	return b.String()
}

// escapeJSON is escape for JSON, in which such characters occur only in strings.
func escapeJSON(text string) string {
	var b strings.Builder
	for _, r := range text { // yields U+FFFD for invalid UTF-8
		switch {
		case strconv.IsPrint(r):
			b.WriteRune(r)
		case r > 0xffff:
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// wide holds the characters that take two terminal cells.
var wide = &unicode.RangeTable{
	R16: []unicode.Range16{{0x1100, 0x115f, 1}, {0x2e80, 0x303e, 1}, {0x3041, 0xa4cf, 1}, {0xac00, 0xd7a3, 1},
		{0xf900, 0xfaff, 1}, {0xfe30, 0xfe6f, 1}, {0xff00, 0xff60, 1}, {0xffe0, 0xffe6, 1}},
	R32: []unicode.Range32{{0x1f300, 0x1faff, 1}, {0x20000, 0x3fffd, 1}},
}

func cells(r rune) int {
	switch {
	case unicode.In(r, unicode.Mn, unicode.Me):
		return 0
	case unicode.Is(wide, r):
		return 2
	}
	return 1
}

// width returns how many terminal cells an escaped text takes.
func width(text string) (n int) {
	for _, r := range text {
		n += cells(r)
	}
	return n
}

// cut truncates an escaped text to n cells.
func cut(text string, n int) string {
	if width(text) <= n {
		return text
	}
	used := 1 // for the ellipsis
	for i, r := range text {
		if used += cells(r); used > n {
			return text[:i] + "…"[:min(n, 1)*len("…")]
		}
	}
	return text
}

// Columns of the table, columns whose text may be truncated, and columns to leave out if
// the terminal is too narrow.
var (
	header  = []string{"ID", "STATE", "PROGRESS", "MESSAGE", "NAME", "STARTED", "TOOK", "ERROR"}
	elastic = []int{3, 4, 7}
	minor   = []int{5, 6, 3}
)

const minColumn = 8 // minimum width of an elastic column

// table returns operations as lines that fit the terminal, starting with a header.
func (t *tool) table(ops []*task.Operation) []string {
	columns, _ := t.out.size()
	rows := [][]string{slices.Clone(header)}
	short := shortID(ops)
	for _, op := range ops {
		rows = append(rows, []string{op.ID[:min(short, len(op.ID))], state(op), progress(op),
			op.Message, op.Name, started(op), took(op), t.errorText(op)})
	}
	widths := make([]int, len(header))
	for _, row := range rows {
		for i, cell := range row {
			row[i] = escape(cell)
		}
	}
	for i := range header {
		for _, row := range rows[1:] {
			widths[i] = max(widths[i], width(row[i]))
		}
		if widths[i] > 0 { // otherwise the column is left out
			widths[i] = max(widths[i], len(header[i]))
		}
	}
	widths = fit(widths, columns-1) // a full last column makes some terminals wrap
	var lines []string
	for _, row := range rows {
		line := ""
		for i, cell := range row {
			if widths[i] > 0 {
				cell = cut(cell, widths[i])
				line += cell + strings.Repeat(" ", widths[i]-width(cell)+gap)
			}
		}
		lines = append(lines, cut(strings.TrimRight(line, " "), columns-1))
	}
	return lines
}

const gap = 2 // between columns

// fit narrows the elastic columns, widest first, until all columns take at most limit
// cells. If that is not enough, it leaves out minor columns.
func fit(natural []int, limit int) []int {
	for dropped := 0; ; dropped++ {
		widths := slices.Clone(natural)
		for _, i := range minor[:dropped] {
			widths[i] = 0
		}
		for total(widths) > limit {
			widest := slices.MaxFunc(elastic, func(a, b int) int { return widths[a] - widths[b] })
			if widths[widest] <= minColumn {
				break
			}
			widths[widest]--
		}
		if total(widths) <= limit || dropped == len(minor) {
			return widths
		}
	}
}

// total returns how many cells the columns take.
func total(widths []int) int {
	n := -gap
	for _, w := range widths {
		if w > 0 {
			n += w + gap
		}
	}
	return n
}

// shortID returns how many characters of the IDs distinguish the operations. They include
// the whole timestamp of a UUIDv7.
func shortID(ops []*task.Operation) int {
	for n := 13; ; n++ {
		seen := make(map[string]bool, len(ops))
		for _, op := range ops {
			seen[op.ID[:min(n, len(op.ID))]] = true
		}
		if n >= 200 || len(seen) == len(ops) {
			return n
		}
	}
}

// progress returns a progress bar, or only the percentage for a finished operation.
func progress(op *task.Operation) string {
	percent := fmt.Sprintf("%3d%%", op.Progress)
	if op.State.Finished() {
		return percent
	}
	done := op.Progress / 10
	return "[" + strings.Repeat("#", done) + strings.Repeat(".", 10-done) + "] " + percent
}

// started returns the time at which an operation started, with the date unless it was
// today.
func started(op *task.Operation) string {
	at := op.StartedAt.Local()
	switch {
	case op.StartedAt.IsZero():
		return ""
	case at.Format(time.DateOnly) == time.Now().Format(time.DateOnly):
		return at.Format(time.TimeOnly)
	}
	return at.Format("2006-01-02 15:04")
}

// errorText returns the error of an operation, or a note that its process is dead.
func (t *tool) errorText(op *task.Operation) string {
	if !op.State.Finished() {
		if dead, _ := t.process(op); dead {
			return "its process is dead"
		}
	}
	return op.Error
}
