// Package browsertest tests the page of taskhttp in a real browser, which takes
// dependencies that must not become the root module's.
//
// It needs Chromium or Chrome, and skips its tests where there is none. With
// TASK_SCREENSHOTS=DIR it leaves pictures of the page in DIR.
package browsertest
