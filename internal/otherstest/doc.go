// Package otherstest shows what managers on one database learn of each other:
// cancel requests, the present states of all live operations, and their changes.
// Package processtest does the same with processes.
package otherstest
