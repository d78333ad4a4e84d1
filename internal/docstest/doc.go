// Package docstest holds the tests of the documents: README.md, docs/, the
// changelog and the specification.
package docstest
