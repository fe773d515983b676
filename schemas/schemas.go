// Package schemas holds the CUE module that users import and that validates what
// they write: the definitions of the served kinds (k8s.io/api/..., decree.dev/v1),
// and the short form of an application (decree.dev/app).
//
// Files named *_gen.cue are generated from the Go types; the others tighten them by
// hand. The package is data: package compile evaluates it.
package schemas

import "embed"

//go:generate go run ./gen

// Module is the file system of the module. A package with the import path P is the
// folder "module/P".
//
//go:embed module
var Module embed.FS
