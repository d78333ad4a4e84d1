// Package powerloss tests that acknowledged operations survive a loss of power.
//
// It runs a program that uses package task with a preloaded library, which
// records what the program writes to its files and what it syncs. From the
// record, the test reconstructs the directories that a loss of power may leave at
// some moment. It checks that they contain everything that was acknowledged before
// that moment.
package powerloss
