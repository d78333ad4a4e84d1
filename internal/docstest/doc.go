// Package docstest tests the documents: README.md, docs/, the changelog and the
// specification.
package docstest
