// Package bench measures taskpg beside River and a program without a library, all
// on one PostgreSQL server that it starts itself, with fsync:
//
//	go test -run '^$' -bench . -timeout 10m
package bench
