package task

// UpdateProgress is updateProgress for tests outside the package.
func UpdateProgress(m *Manager, id string, progress int) error {
	return m.updateProgress(id, progress)
}

// OnlyLive returns the ID of the only live operation.
func OnlyLive(m *Manager) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.tasks {
		return id
	}
	return ""
}
