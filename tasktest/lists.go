package tasktest

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mynt-nas/task"
)

// lists checks pages, each a limit and an offset, for every filter.
func (s *session) lists(pages [][2]int, filters ...task.Filter) {
	for _, f := range filters {
		for _, page := range pages {
			want := s.listed(f, page[0], page[1])
			got, err := s.db.(task.FilteredLister).ListFiltered(f, page[0], page[1])
			if err != nil || !samePage(got, want) {
				s.errorf("ListFiltered(%+v, %d, %d) = %s, %v, want %s", f, page[0], page[1], names(got), err, names(want))
				continue
			}
			for i := range got {
				s.same("ListFiltered", got[i], want[i])
			}
		}
	}
}

// listed returns the expected result of ListFiltered.
func (s *session) listed(f task.Filter, limit, offset int) (page []*task.Operation) {
	all := s.page(len(s.want), len(s.want), 0)
	if f.ByFinish {
		all = slices.DeleteFunc(all, func(op *task.Operation) bool { return !op.State.Finished() })
		slices.SortStableFunc(all, func(a, b *task.Operation) int { return b.UpdatedAt.Compare(a.UpdatedAt) })
	}
	if f.Before != "" {
		all = all[1+slices.IndexFunc(all, func(op *task.Operation) bool { return op.ID == f.Before }):]
	}
	for _, op := range all {
		switch {
		case !matches(f, op):
		case offset > 0:
			offset--
		case len(page) < limit:
			page = append(page, op)
		}
	}
	return page
}

// matches reports whether an operation matches the filter, apart from Before. In the texts
// of the checks, only ASCII letters occur in both cases.
func matches(f task.Filter, op *task.Operation) bool {
	if (f.ByFinish || !f.FinishedAfter.IsZero() || !f.FinishedBefore.IsZero()) && !op.State.Finished() {
		return false
	}
	return (f.Name == "" || f.Name == op.Name) &&
		strings.Contains(strings.ToLower(op.Name), strings.ToLower(f.Containing)) &&
		!op.UpdatedAt.Before(f.FinishedAfter) &&
		(f.FinishedBefore.IsZero() || op.UpdatedAt.Before(f.FinishedBefore)) &&
		matchesNow(f, op)
}

// matchesNow reports whether an operation matches the filter's states and metadata. For an
// unfinished operation, Include and Exclude take precedence.
func matchesNow(f task.Filter, op *task.Operation) bool {
	if len(f.States)+len(f.Metadata) > 0 && !op.State.Finished() {
		if slices.Contains(f.Include, op.ID) {
			return true
		}
		if slices.Contains(f.Exclude, op.ID) {
			return false
		}
	}
	raw, _ := op.Metadata.(json.RawMessage)
	var members map[string]any
	json.Unmarshal(raw, &members) // only an object has members
	for key, value := range f.Metadata {
		if members[key] != any(value) {
			return false
		}
	}
	return len(f.States) == 0 || slices.Contains(f.States, op.State)
}

var somePages = [][2]int{{100, 0}, {2, 0}, {2, 1}, {5, 100}}

func containing(s *session) {
	for _, name := range []string{"Scrub TANK", "scrub 100%", "replicate", "a_b", "Ünique", "ünique", "a\"b'c"} {
		s.save(s.new(name))
	}
	for _, text := range []string{"scrub", "B T", "k", "%", "_", "A_B", "IQUE", "Ü", "\"B'", "*", "scrub tank "} {
		want := 0
		for _, op := range s.want {
			if strings.Contains(strings.ToUpper(op.Name), strings.ToUpper(text)) && (text != "Ü" || op.Name[:2] == text) {
				want++
			}
		}
		got, err := s.db.(task.FilteredLister).ListFiltered(task.Filter{Containing: text}, 100, 0)
		if err != nil || len(got) != want {
			s.errorf("ListFiltered of names containing %q = %s, %v, want %d operations", text, names(got), err, want)
		}
	}
	s.lists(somePages, task.Filter{Containing: "SCRUB"}, task.Filter{Containing: "a", Before: s.want[5].ID},
		task.Filter{Containing: "scrub", Name: "scrub 100%"}, task.Filter{Containing: "r", States: []task.State{task.StatePending}})
}

func metadata(s *session) {
	for i, text := range []string{`{"pool":"tank"}`, `{"pool":"tank","user":"root"}`, `{"pool":"\u0074ank"}`, `{"pool":["tank"]}`,
		`{"a":{"pool":"tank"}}`, `["pool","tank"]`, `"tank"`, `{"pool":"Tank"}`, `{"pool":1}`, `{"user":"tank"}`, `{"a.b":"tank","$":"x","":"y","q\"":"z"}`, ``} {
		op := s.new(fmt.Sprintf("%d %s", i, text))
		if text != "" {
			op.Metadata = json.RawMessage(text)
		}
		s.save(op)
	}
	s.update(in(task.StateDone, s.want[0]))
	ids := []string{s.want[0].ID, s.want[1].ID, s.want[4].ID}
	slices.Sort(ids)
	tank := map[string]string{"pool": "tank"}
	for _, f := range []task.Filter{
		{Metadata: tank},
		{Metadata: map[string]string{"pool": "tank", "user": "root"}},
		{Metadata: map[string]string{"pool": "1"}},
		{Metadata: map[string]string{"a.b": "tank", "$": "x", "": "y", `q"`: "z"}},
		{Metadata: map[string]string{"0": "pool"}},
		{Metadata: map[string]string{"none": ""}},
		{Metadata: tank, Include: ids},
		{Metadata: tank, Exclude: ids},
		{Metadata: tank, States: []task.State{task.StateDone, task.StateRunning}, Include: ids[:1], Exclude: ids[1:]},
		{Metadata: tank, Before: s.want[1].ID},
		{Metadata: tank, ByFinish: true, Include: ids},
	} {
		s.lists(somePages, f)
	}
}

// finishes saves operations that finish at different times, two at a time and not in the
// order of Save, and some that do not finish.
func (s *session) finishes() {
	for i, second := range []int{3, 1, 4, 1, 5, 9, 2, 6, 5, 3} {
		op := s.saved(fmt.Sprint(i))
		op = in(states[i%len(states)], op)
		op.UpdatedAt = noon.Add(time.Duration(second) * time.Second)
		s.update(op)
	}
}

func finishedWithin(s *session) {
	s.finishes()
	for _, after := range []time.Duration{-1, 1e9, 2e9, 2e9 + 1, 3e9 - 1000, 5e9, 6e9} {
		for _, before := range []time.Duration{0, 1e9, 3e9, 5e9 + 1, 5e9 + 1000, 10e9} {
			f := task.Filter{FinishedAfter: noon.Add(after), FinishedBefore: noon.Add(before)}
			if before == 0 {
				f.FinishedBefore = time.Time{}
			}
			if after < 0 {
				f.FinishedAfter = time.Time{}
			}
			s.lists(somePages, f)
			f.States = []task.State{task.StateRunning, task.StateFailed}
			s.lists(somePages, f)
		}
	}
}

func listsByFinish(s *session) {
	s.finishes()
	s.lists(somePages, task.Filter{ByFinish: true})
	for _, op := range s.want {
		f := task.Filter{ByFinish: true, Before: op.ID}
		if !op.State.Finished() {
			got, err := s.db.(task.FilteredLister).ListFiltered(f, 10, 0)
			s.answer(fmt.Sprintf("ListFiltered by finish before an unfinished operation, %s,", names(got)), err, task.ErrNotFound)
			continue
		}
		s.lists(somePages, f)
		f.FinishedAfter = noon.Add(2 * time.Second)
		s.lists(somePages, f)
		f.States = []task.State{task.StateFailed, task.StateCancelled, task.StatePending}
		s.lists(somePages, f)
	}
	for _, unknown := range []string{"unknown", s.new("never saved").ID} {
		_, err := s.db.(task.FilteredLister).ListFiltered(task.Filter{ByFinish: true, Before: unknown}, 10, 0)
		s.answer("ListFiltered by finish before an unknown ID", err, task.ErrNotFound)
	}
}

func withoutResults(s *session) {
	for range 2 {
		s.update(in(task.StateDone, s.saved("result")))
	}
	for _, f := range []task.Filter{{}, {States: []task.State{task.StateDone}}, {MaxValue: 1}, {ByFinish: true}} {
		f.WithoutResults = true
		got, err := s.db.(task.FilteredLister).ListFiltered(f, 10, 0)
		if err != nil || len(got) != 2 || got[0].Result != nil || got[1].Result != nil {
			s.errorf("ListFiltered(%+v) = %s, %v, want 2 operations without results", f, names(got), err)
		}
	}
}
