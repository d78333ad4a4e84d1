package docstest

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
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
)

const root = "../.."

// documents returns the paths of all documents except SPEC.md.
func documents(t *testing.T) []string {
	t.Helper()
	docs, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	return append([]string{root + "/README.md", root + "/CHANGELOG.md"}, docs...)
}

// code is a block of code in one language.
type code struct {
	where string // FILE:LINE
	text  string
}

// blocks returns the code blocks of a document in a language.
func blocks(t *testing.T, file, language string) (all []code) {
	t.Helper()
	text := read(t, file)
	for _, at := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatchIndex(text, -1) {
		line := 1 + strings.Count(text[:at[2]], "\n")
		all = append(all, code{fmt.Sprintf("%s:%d", filepath.Base(file), line), text[at[2]:at[3]]})
	}
	return all
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestSnippets compiles every Go snippet as part of the package itself, because a
// snippet of SPEC.md calls an unexported method. A snippet that declares a function
// must also be in a test file here, and be used there.
func TestSnippets(t *testing.T) {
	tested := testFiles(t)
	for _, file := range append(documents(t), root+"/testdata/SPEC.md") {
		for _, snippet := range blocks(t, file, "go") {
			t.Run(snippet.where, func(t *testing.T) {
				compile(t, snippet.text)
				if err := checkTested(snippet.text, tested); err != nil {
					t.Error(err)
				}
			})
		}
	}
	for _, file := range []string{"README.md", "testdata/SPEC.md", "docs/stores.md", "docs/recipes.md"} {
		if len(blocks(t, filepath.Join(root, file), "go")) == 0 {
			t.Errorf("%s has no Go snippets", file)
		}
	}
}

// testFiles returns the text of all test files of this package.
func testFiles(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, file := range files {
		all.WriteString(read(t, file))
	}
	return all.String()
}

var declaration = regexp.MustCompile(`^func (\w+)\(`)

// checkTested returns an error if a snippet declares a function and is not in the test
// files word for word, or is neither a test nor called there.
func checkTested(snippet, tested string) error {
	m := declaration.FindStringSubmatch(snippet)
	if m == nil {
		return nil
	}
	before, after, found := strings.Cut(tested, "\n"+snippet)
	if !found {
		return fmt.Errorf("no test file of this package contains this %s", m[1])
	}
	if !strings.HasPrefix(m[1], "Test") && !regexp.MustCompile(`\b`+m[1]+`\(`).MatchString(before+after) {
		return fmt.Errorf("no test calls %s", m[1])
	}
	return nil
}

func TestCheckTested(t *testing.T) {
	const f = "func f() {\n}\n"
	tests := []struct {
		name, snippet, tested string
		ok                    bool
	}{
		{"statements", "f()\n", "", true},
		{"method", "func (x) f() {\n}\n", "", true},
		{"absent", f, "\nfunc f() {\n\treturn\n}\n", false},
		{"not called", f, "\n" + f + "\nfunc TestG() { g() }\n", false},
		{"called", f, "\n" + f + "\nfunc TestF() { f() }\n", true},
		{"test", "func TestF() {\n}\n", "\nfunc TestF() {\n}\n", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := checkTested(tt.snippet, tt.tested); (err == nil) != tt.ok {
				t.Errorf("got %v, want ok = %v", err, tt.ok)
			}
		})
	}
}

// surroundings declares the names that a snippet may use if it is not a whole file.
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
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/mynt-nas/task"
	"github.com/mynt-nas/task/taskhttp"
	"github.com/mynt-nas/task/tasktest"
)

func publish(topic string, message any) {}

func createPool() (string, error) { return "", nil }

func _(ctx context.Context, db task.Persistence, store *task.SQLiteStore, appDB *sql.DB, manager *task.Manager, fn task.Func, id, taskID string, op *task.Operation) error {
	{
%s
	}
	return nil
}
`

func compile(t *testing.T, snippet string) {
	t.Helper()
	if runtime.GOOS != "linux" && strings.Contains(snippet, "Pdeathsig") {
		t.Skip("only Linux has Pdeathsig")
	}
	isFile := regexp.MustCompile(`(?m)^package `).MatchString(snippet)
	if !isFile && regexp.MustCompile(`(?m)^(func|type) `).MatchString(snippet) {
		head, _, _ := strings.Cut(surroundings, "func _(")
		snippet = head + snippet
	} else if !isFile {
		snippet = fmt.Sprintf(surroundings, snippet)
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "snippet.go", snippet, 0)
	if err != nil {
		t.Fatal(err)
	}
	config := types.Config{
		Importer: importer.ForCompiler(fset, "gc", exports()),
		Error: func(err error) {
			if e := err.(types.Error); !e.Soft { // soft errors are unused variables and the like
				t.Error(e)
			}
		},
	}
	config.Check("github.com/mynt-nas/task", fset, []*ast.File{file}, nil)
}

// exports finds the export data of the package and of all imports of the snippets.
var exports = sync.OnceValue(func() importer.Lookup {
	list := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}")
	for _, m := range regexp.MustCompile(`(?m)^\t"(.+)"$`).FindAllStringSubmatch(surroundings, -1) {
		list.Args = append(list.Args, m[1])
	}
	list.Dir = root
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

// TestFirstProgram builds and runs the program in the README, and compares its output
// with the comment that states it.
func TestFirstProgram(t *testing.T) {
	programs := 0
	for _, snippet := range blocks(t, root+"/README.md", "go") {
		if !strings.HasPrefix(snippet.text, "package main\n") {
			continue
		}
		programs++
		comment := regexp.MustCompile(`fmt\.Println\(.*// (.*)\n`).FindStringSubmatch(snippet.text)
		if comment == nil {
			t.Fatal("no comment states the output")
		}
		dir := t.TempDir()
		source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "first.exe")
		if err := os.WriteFile(source, []byte(snippet.text), 0o600); err != nil {
			t.Fatal(err)
		}
		build := exec.Command("go", "build", "-o", program, source)
		build.Dir = root
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		run := exec.Command(program)
		run.Dir = dir
		if out, err := run.CombinedOutput(); err != nil || string(out) != comment[1]+"\n" {
			t.Errorf("printed %q, %v; want %q", out, err, comment[1])
		}
	}
	if programs != 1 {
		t.Errorf("%d whole programs, want 1", programs)
	}
}

func TestReadmeSize(t *testing.T) {
	const most = 8 << 10
	if n := len(read(t, root+"/README.md")); n > most {
		t.Errorf("README.md has %d bytes, at most %d are wanted", n, most)
	}
}

// TestLinks checks that every relative link leads to a file, and every fragment
// to a heading.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, file := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(read(t, file), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			path, fragment, _ := strings.Cut(m[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %v", file, err)
			} else if fragment != "" && !bytes.Contains(headings(read(t, target)), []byte("#"+fragment+"\n")) {
				t.Errorf("%s: %s has no heading for #%s", file, target, fragment)
			}
		}
	}
}

// headings returns a line "#FRAGMENT" for each heading of a document.
func headings(text string) []byte {
	var b bytes.Buffer
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		fragment := regexp.MustCompile(`[^\w -]`).ReplaceAllString(strings.ToLower(m[1]), "")
		fmt.Fprintf(&b, "#%s\n", strings.ReplaceAll(fragment, " ", "-"))
	}
	return b.Bytes()
}

// TestCommands checks that the packages exist that the documents say to run.
func TestCommands(t *testing.T) {
	command := regexp.MustCompile(`(?:cd (\w+) && )?go (?:run|test) (\./\w[\w/]*)`)
	found := 0
	for _, file := range documents(t) {
		for _, m := range command.FindAllStringSubmatch(read(t, file), -1) {
			found++
			if _, err := os.Stat(filepath.Join(root, m[1], m[2])); err != nil {
				t.Errorf("%s: %s: %v", file, m[0], err)
			}
		}
	}
	if found < 5 {
		t.Errorf("found %d commands, want at least 5", found)
	}
}
