//go:build !newcore

package testkit

// NewCore is whether the tests are to expect the behavior of the redesigned
// core. It goes, together with the build tag newcore, once that is there.
const NewCore = false

// ClosedText is Operation.Error if a function returns the cause of its context
// when the manager is closed.
const ClosedText = ShutdownText + ": manager closed"
