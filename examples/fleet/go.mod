module github.com/mynt-nas/task/examples/fleet

go 1.25.0

replace (
	github.com/mynt-nas/task => ../..
	github.com/mynt-nas/task/taskpg => ../../taskpg
)

require (
	github.com/mynt-nas/task v0.0.0
	github.com/mynt-nas/task/taskpg v0.0.0
)

require (
	github.com/google/uuid v1.6.0 // indirect
	github.com/jackc/pgpassfile v1.0.0 // indirect
	github.com/jackc/pgservicefile v0.0.0-20240606120523-5a60cdf6a761 // indirect
	github.com/jackc/pgx/v5 v5.12.0 // indirect
	github.com/jackc/puddle/v2 v2.2.3 // indirect
	github.com/mattn/go-sqlite3 v1.14.53 // indirect
	golang.org/x/sync v0.22.0 // indirect
	golang.org/x/text v0.41.0 // indirect
)
