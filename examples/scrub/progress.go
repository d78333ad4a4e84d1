package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// A bar shows the progress of a scrub: on a terminal in a line that it rewrites, elsewhere
// in a new line every ten percent.
type bar struct {
	w     io.Writer
	live  bool // w is a terminal
	scrub *scrub

	began time.Time // when the scrub began to read
	tens  int       // lines printed, unless live
}

func newBar(w io.Writer, live bool, s *scrub) *bar {
	return &bar{w: w, live: live, scrub: s, began: time.Now()}
}

// show shows the progress in percent.
func (b *bar) show(progress int) {
	done, total := b.scrub.done.Load(), b.scrub.total.Load()
	line := fmt.Sprintf("counting: %s", size(total))
	if done == 0 {
		b.began = time.Now()
	} else {
		line = progressLine(progress, done, total, time.Since(b.began))
	}
	switch {
	case b.live:
		fmt.Fprintf(b.w, "\r%.79s\x1b[K", line) // \x1b[K erases the rest of the line
	case done > 0 && progress/10 >= b.tens:
		fmt.Fprintln(b.w, line)
		b.tens = progress/10 + 1
	}
}

// end ends the bar's line.
func (b *bar) end() {
	if b.live {
		fmt.Fprintln(b.w)
	}
}

func progressLine(progress int, done, total int64, took time.Duration) string {
	const width = 20
	speed := float64(done) / max(took.Seconds(), 1e-3)
	left := int64(float64(max(total-done, 0)) / speed) // seconds
	return fmt.Sprintf("%3d%% [%-*s] %s of %s  %s/s  ETA %d:%02d:%02d",
		progress, width, strings.Repeat("#", progress*width/100), size(done), size(total), size(int64(speed)),
		left/3600, left/60%60, left%60)
}

// size formats a number of bytes for people to read.
func size(n int64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f := float64(n) / 1000
	unit := 0
	for f >= 999.95 { // would print as 1000.0
		f /= 1000
		unit++
	}
	return fmt.Sprintf("%.1f %cB", f, "kMGTPE"[unit])
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
