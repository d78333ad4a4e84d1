// Package scheduletest shows that promises hold in every order of events: it
// runs small scenarios, such as Cancel against the finish of a function, in
// thousands of different orders of calls, store writes and returns.
package scheduletest
