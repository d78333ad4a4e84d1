package task

// UpdateProgress is updateProgress for tests outside the package.
func UpdateProgress(m *Manager, id string, progress int) error {
	return m.updateProgress(id, progress)
}

// Subscribers returns how many calls of Watch are under way.
func Subscribers(m *Manager) int { return m.events.Readers() }
