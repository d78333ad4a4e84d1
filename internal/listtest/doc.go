// Package listtest tests the options of List with every kind of store.
package listtest
