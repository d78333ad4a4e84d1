// Package moderntest tests the SQLite store through modernc.org/sqlite, a
// driver other than the one of the root module, whose dependencies these must
// not become.
package moderntest
