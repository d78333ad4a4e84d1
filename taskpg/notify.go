package taskpg

// changed tells other stores of what was written.
func (s *Store) changed(all []*write) {}
