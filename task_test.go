package task_test

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/mynt-nas/task"
)

func TestStateFinished(t *testing.T) {
	for state, want := range map[task.State]bool{
		task.StatePending:   false,
		task.StateRunning:   false,
		task.StateDone:      true,
		task.StateFailed:    true,
		task.StateCancelled: true,
		"":                  false,
		"done":              false,
	} {
		if got := state.Finished(); got != want {
			t.Errorf("State(%q).Finished() = %v, want %v", state, got, want)
		}
	}
}

// TestSnippets compiles every Go snippet of the specification and of the
// README, as part of the package itself: one calls an unexported method.
func TestSnippets(t *testing.T) {
	tested, err := os.ReadFile("recipe_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"testdata/SPEC.md", "README.md"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		snippets := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllSubmatchIndex(text, -1)
		if len(snippets) == 0 {
			t.Errorf("%s has no Go snippets", file)
		}
		for _, at := range snippets {
			line := 1 + bytes.Count(text[:at[2]], []byte("\n"))
			t.Run(fmt.Sprintf("%s:%d", file, line), func(t *testing.T) {
				snippet := text[at[2]:at[3]]
				compile(t, string(snippet))
				if recipe.Match(snippet) && !bytes.Contains(tested, snippet) {
					t.Error("recipe_test.go has not the same")
				}
			})
		}
	}
}

// recipe is what begins a snippet that is tested in recipe_test.go.
var recipe = regexp.MustCompile(`^func [a-z]`)

// surroundings are what a snippet that is no whole file may take for granted.
const surroundings = `package snippet

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
	"github.com/mynt-nas/task/tasktest"
)

func publish(topic string, message any) {}

func createPool() (string, error) { return "", nil }

func _(ctx context.Context, db task.Persistence, appDB *sql.DB, manager *task.Manager, fn task.Func, id, taskID string, op *task.Operation) error {
	{
%s
	}
	return nil
}
`

func compile(t *testing.T, snippet string) {
	t.Helper()
	fset := token.NewFileSet()
	isFile := regexp.MustCompile(`(?m)^package `).MatchString(snippet)
	if !isFile && regexp.MustCompile(`(?m)^(func|type) `).MatchString(snippet) {
		head, _, _ := strings.Cut(surroundings, "func _(")
		snippet = head + snippet
	} else if !isFile {
		snippet = fmt.Sprintf(surroundings, snippet)
	}
	file, err := parser.ParseFile(fset, "snippet.go", snippet, 0)
	if err != nil {
		t.Fatal(err)
	}
	config := types.Config{
		Importer: importer.ForCompiler(fset, "gc", exports()),
		Error: func(err error) {
			if e := err.(types.Error); !e.Soft { // soft: something is not used
				t.Error(e)
			}
		},
	}
	config.Check("github.com/mynt-nas/task", fset, []*ast.File{file}, nil)
}

// exports finds the compiled form of the package and of what snippets import.
var exports = sync.OnceValue(func() importer.Lookup {
	list := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}",
		".", "./taskhttp", "./tasktest", "context", "database/sql", "encoding/json", "errors", "fmt", "log", "log/slog",
		"net/http", "os", "os/signal", "path/filepath", "testing", "time")
	out, err := list.Output()
	files := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		files[path] = file
	}
	return func(path string) (io.ReadCloser, error) {
		if files[path] == "" {
			return nil, errors.Join(fmt.Errorf("no export data for %s", path), err)
		}
		return os.Open(files[path])
	}
})
