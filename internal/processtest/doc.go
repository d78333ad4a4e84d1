// Package processtest shows how several processes on one database affect each other:
// each runs its own operations and sees those of all. The operations of a killed
// process are recovered once, by the next manager or by one that waits for them.
//
// The test binary runs itself as a child process. The test drives the child's manager
// call by call.
package processtest
