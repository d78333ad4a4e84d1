// Package modeltest shows that the API does what a small model of it does: it
// plays scripts of calls, written by hand or by the fuzzer, on one or two
// managers and several kinds of store, and sends arbitrary values through a
// round trip.
package modeltest
