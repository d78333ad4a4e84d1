// Package resumetest tests the option WithResume with every kind of store.
package resumetest
