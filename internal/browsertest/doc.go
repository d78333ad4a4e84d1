// Package browsertest tests the web pages in a real browser. It is a module of
// its own because of its dependencies.
//
// It needs Chromium or Chrome, and skips its tests where there is none. With
// TASK_SCREENSHOTS=DIR it stores pictures of the pages in DIR.
package browsertest
