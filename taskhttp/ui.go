package taskhttp

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

//go:embed page.html
var pageSource []byte

//go:embed openapi.json
var openAPI []byte

var (
	pageHTML   = shorten(pageSource)
	openAPITag = etag(openAPI)
	pagePolicy = policy(pageHTML)
)

func etag(body []byte) string {
	return fmt.Sprintf(`"%.12x"`, sha256.Sum256(body))
}

// shorten removes indentation, blank lines, comments, and newlines between tags. They would
// matter only in text that spans lines, which the page does not have. It removes a comment
// after code only if the comment has no quotation marks, so that it never cuts a string. In
// the style element it also removes the space around punctuation.
func shorten(page []byte) []byte {
	page = regexp.MustCompile("(?m)^[ \t]*(//.*)?\n|^[ \t]+|[ \t]+// [^\"'`\n]*$").ReplaceAll(page, nil)
	page = bytes.ReplaceAll(page, []byte(">\n<"), []byte("><"))
	return regexp.MustCompile("(?s)<style>.*?</style>").ReplaceAllFunc(page, func(style []byte) []byte {
		style = regexp.MustCompile(`(?s)/\*.*?\*/`).ReplaceAll(style, nil)
		style = regexp.MustCompile(`\s*([{};,])\s*|(:)\s+`).ReplaceAll(style, []byte("$1$2"))
		return bytes.ReplaceAll(style, []byte(";}"), []byte("}"))
	})
}

// policy returns a Content-Security-Policy that allows the page its own script and style
// and connections to its own origin, and nothing else.
func policy(page []byte) string {
	return strings.Join([]string{
		"default-src 'none'",
		"script-src" + hashes(page, "script"),
		"style-src" + hashes(page, "style"),
		"img-src data:", // its icon
		"connect-src 'self'",
		"frame-ancestors 'none'",
		"base-uri 'none'",
		"form-action 'none'",
		"require-trusted-types-for 'script'", // an assignment to innerHTML throws
		"trusted-types 'none'",
	}, "; ")
}

// hashes returns the policy sources for the inline elements with the given name.
func hashes(page []byte, element string) string {
	var b strings.Builder
	for _, m := range regexp.MustCompile(`(?s)<`+element+`>(.*?)</`+element+`>`).FindAllSubmatch(page, -1) {
		sum := sha256.Sum256(m[1])
		b.WriteString(" 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'")
	}
	return b.String()
}

// renderPage returns the page with the title, the link and the run-again marker of the
// options. They change no script or style, so the policy still matches.
func (h *handler) renderPage() []byte {
	title := html.EscapeString(h.title)
	heading := "<h1>" + title + "</h1>"
	if h.homeURL != "" {
		heading += `<a class="button" href="` + html.EscapeString(h.homeURL) + `">` + html.EscapeString(h.homeText) + "</a>"
	}
	body := "<body>"
	if h.runAgain != nil {
		body = "<body data-again>" // makes the script offer it
	}
	return []byte(strings.NewReplacer("<title>Tasks</title>", "<title>"+title+"</title>", "<body>", body, "<h1>Tasks</h1>", heading).Replace(string(pageHTML)))
}

func (h *handler) serveUI(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	header := w.Header()
	header.Set("Content-Security-Policy", pagePolicy)
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("X-Frame-Options", "DENY")
	serveStatic(w, r, "text/html; charset=utf-8", etag(h.page), h.page)
	return nil
}

// redirectUI redirects to the path without the slash, which the page's relative links
// assume. http.Redirect would lack the prefix.
func redirectUI(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	w.Header().Set("Location", "../ui")
	w.WriteHeader(http.StatusPermanentRedirect)
	return nil
}

func serveOpenAPI(w http.ResponseWriter, r *http.Request, _ url.Values) error {
	serveStatic(w, r, "application/json", openAPITag, openAPI)
	return nil
}

// serveStatic serves a file that changes only with the program.
func serveStatic(w http.ResponseWriter, r *http.Request, contentType, tag string, body []byte) {
	header := w.Header()
	header.Set("Cache-Control", "no-cache")
	header.Set("Content-Type", contentType)
	header.Set("ETag", tag)
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}
