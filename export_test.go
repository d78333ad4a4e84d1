package task

// UpdateProgress is updateProgress for tests outside the package.
func UpdateProgress(m *Manager, id string, progress int) error {
	return m.updateProgress(id, progress)
}

// Subscribers returns how many calls of Watch are under way.
func Subscribers(m *Manager) int { return int(m.hub.watched.Load()) }

// Backlog returns how many events are kept for subscribers.
func Backlog(m *Manager) int {
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
