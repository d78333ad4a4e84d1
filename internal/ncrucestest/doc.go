// Package ncrucestest tests the SQLite store through
// github.com/ncruces/go-sqlite3. Its driver is called "sqlite3", as the one of
// the root module is, which the build tag task_nosqlite3 leaves out.
package ncrucestest
