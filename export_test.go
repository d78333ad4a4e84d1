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

// Watchers returns how many calls of Watch are under way.
func Watchers(m *Manager) int { return int(m.hub.watched.Load()) }

// News returns how many news are kept for watchers.
func News(m *Manager) int {
	h := m.hub
	h.listeners.Lock()
	defer h.listeners.Unlock()
	h.mu.Lock()
	n := len(h.feed.queue)
	h.mu.Unlock()
	for w := range h.all {
		w.mu.Lock()
		n += len(w.feed.queue)
		w.mu.Unlock()
	}
	return n
}
