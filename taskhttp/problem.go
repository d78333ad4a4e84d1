package taskhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/mynt-nas/task"
)

// problemDetails is the JSON body of an error response, as in RFC 9457.
type problemDetails struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Detail   string `json:"detail,omitempty"`
	Instance string `json:"instance,omitempty"`
}

// A badRequest is an error in a request.
type badRequest struct{ error }

func (e badRequest) Unwrap() error { return e.error }

func badParameter(name, format string, args ...any) error {
	return badRequest{fmt.Errorf("parameter "+name+": "+format, args...)}
}

// Error writes err as problem details ([RFC 9457]) with the matching status: 404 for
// [task.ErrNotFound], 409 for [task.ErrExists], 503 for [task.ErrClosed] and
// [task.ErrLagged], 501 for [errors.ErrUnsupported], 504 for [context.DeadlineExceeded],
// 413 for a body that exceeds the limit of [http.MaxBytesReader], and 500 for any other
// error.
//
// The response contains the error's text.
//
// [RFC 9457]: https://www.rfc-editor.org/rfc/rfc9457
func Error(w http.ResponseWriter, r *http.Request, err error) {
	if err == nil {
		err = errors.New("unknown error")
	}
	Problem(w, r, statusOf(err), err)
}

func statusOf(err error) int {
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, new(badRequest)):
		return http.StatusBadRequest
	case errors.As(err, &tooLarge):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, task.ErrNotFound):
		return http.StatusNotFound
	case errors.Is(err, task.ErrExists):
		return http.StatusConflict
	case errors.Is(err, task.ErrClosed), errors.Is(err, task.ErrLagged):
		return http.StatusServiceUnavailable
	case errors.Is(err, errors.ErrUnsupported):
		return http.StatusNotImplemented
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	default:
		return http.StatusInternalServerError
	}
}

// Problem is like [Error], but with the given status.
func Problem(w http.ResponseWriter, r *http.Request, status int, err error) {
	p := problemDetails{
		Type:   "about:blank", // the title is that of the status
		Title:  http.StatusText(status),
		Status: status,
		Detail: err.Error(),
	}
	if r != nil {
		// Not r.URL, from which a prefix may have been stripped. The query is left out
		// because it may hold secrets.
		if u, err := url.ParseRequestURI(r.RequestURI); err == nil {
			p.Instance = u.EscapedPath()
		}
	}
	body, _ := json.Marshal(p) // strings and numbers can't fail
	header := w.Header()
	header.Set("Content-Type", "application/problem+json")
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Del("Content-Length") // set for the intended response
	header.Del("ETag")
	w.WriteHeader(status)
	w.Write(append(body, '\n'))
}
