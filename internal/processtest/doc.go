// Package processtest shows what several processes on one database do to each
// other: each runs its own operations and sees those of all, and what a killed
// one leaves is recovered once, by the next manager or by whoever waits for it.
//
// The test binary runs itself as a child process; the child's manager is driven
// from the test, call by call.
package processtest
