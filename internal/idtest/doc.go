// Package idtest tests the options WithID and WithUnique: what is submitted
// twice runs once, whatever the store answers and whenever the process ends.
package idtest
