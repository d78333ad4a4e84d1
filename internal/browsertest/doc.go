// Package browsertest tests the web pages in a real browser. It is a module of
// its own because of its dependencies.
//
// It needs Chromium or Chrome, and skips its tests where there is none. With
// TASK_SCREENSHOTS=DIR it stores pictures of the pages in DIR.
//
// It tests the page behind nginx, too, and skips that where nginx is not installed.
// With TASK_NGINX=1, these tests fail instead.
package browsertest
