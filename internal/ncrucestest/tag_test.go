//go:build !task_nosqlite3

package ncrucestest

import "testing"

func Test(t *testing.T) {
	t.Fatal("run these tests with -tags task_nosqlite3: without it, two drivers are called sqlite3")
}
