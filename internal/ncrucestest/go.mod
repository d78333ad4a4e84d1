module github.com/mynt-nas/task/internal/ncrucestest

go 1.26.0

require (
	github.com/mynt-nas/task v0.0.0
	github.com/ncruces/go-sqlite3 v0.37.0
)

require (
	github.com/google/uuid v1.6.0 // indirect
	github.com/mattn/go-sqlite3 v1.14.53 // indirect
	github.com/ncruces/go-sqlite3-wasm/v6 v6.5.35401 // indirect
	github.com/ncruces/julianday v1.0.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

replace github.com/mynt-nas/task => ../..
