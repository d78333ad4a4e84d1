package taskhttp

import "strings"

// Routes returns the query parameters of each route, by "GET /path".
func Routes() map[string][]string {
	all := make(map[string][]string)
	for _, rt := range new(handler).routes() {
		all[rt.method+" "+strings.TrimSuffix(rt.path, "{$}")] = rt.query
	}
	return all
}
