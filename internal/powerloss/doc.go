// Package powerloss tests what a loss of power leaves of what was acknowledged.
//
// A program that uses the package is run with a library preloaded that records
// what it does to its files, and what it syncs. From the record the test then
// makes the directories that a loss of power at some moment may have left, and
// looks for what had been acknowledged by then.
package powerloss
