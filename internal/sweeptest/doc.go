// Package sweeptest shows that no failure of the store loses an acknowledged
// operation: it runs one scenario as many times as that calls the store, each
// time with another call failing.
package sweeptest
