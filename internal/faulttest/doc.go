// Package faulttest shows what happens when the system fails a program or gets
// in its way: a full disk, a locked database, a file that is deleted, replaced
// or mounted, missing permissions, a clock that is wrong, a signal. The rules
// are the same everywhere: the program lives, what was acknowledged is kept, and
// what can't be stored is an error or is shown as waiting.
//
// Some tests run themselves again in a child process, which may mount file
// systems or has another user.
package faulttest
