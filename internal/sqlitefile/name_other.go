//go:build !unix

package sqlitefile

import "os"

func onlyName(string, os.FileInfo) error { return nil }
