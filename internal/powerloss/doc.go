// Package powerloss tests that acknowledged operations survive a loss of power.
//
// It runs a program that uses package task with a preloaded library, which
// records what the program writes to its files and what it syncs. From the
// record, the test reconstructs directories as a loss of power at some moment may
// have left them, and looks for what had been acknowledged by then.
package powerloss
