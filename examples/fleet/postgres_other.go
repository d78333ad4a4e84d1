//go:build !unix

package main

import (
	"context"
	"errors"
)

func startPostgres(context.Context) (dsn string, stop func(), err error) {
	return "", nil, errors.ErrUnsupported
}
