package taskhttp

import "strings"

// Routes returns what the handler serves and the query parameters it knows, by
// "GET /path".
func Routes() map[string][]string {
	all := make(map[string][]string)
	for _, rt := range new(handler).routes() {
		all[rt.method+" "+strings.TrimSuffix(rt.path, "{$}")] = rt.query
	}
	return all
}
