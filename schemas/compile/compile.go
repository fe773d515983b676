// Package compile turns a tree of CUE files into objects that know the file and
// line of every field, or into a list of everything that is wrong with them.
package compile

import (
	"context"
	"io/fs"
	"time"

	"decree.dev/decree/schemas/api"
)

// Options bound one evaluation. Zero values take the defaults.
type Options struct {
	Path     string        // folder inside the tree; "." when empty
	Timeout  time.Duration // wall time of the child process; 20 s
	Memory   int64         // bytes the child may use; 1 GiB
	MaxFile  int64         // bytes of one file; 4 MiB
	MaxFiles int           // files in the tree that are read; 10,000
	MaxTotal int64         // bytes of all files that are read; 64 MiB
}

// Result is what a tree means. Objects is nil when there are diagnostics: a tree
// is good as a whole or not at all.
type Result struct {
	Objects     []Object
	Diagnostics []api.Diagnostic // ordered by file, line, column
	// Files is how many files were read; Cached how many packages came from the
	// cache, Evaluated how many did not.
	Files, Cached, Evaluated int
}

// Object is one object with the places where it is written.
type Object struct {
	api.Object
	// Pos is where the object begins.
	Pos api.Position
	// Fields maps a field path ("spec.replicas", "spec.template.spec.containers[0].image")
	// to where it is written by the user.
	Fields map[string]api.Position

	origin api.Position // the text it comes from, through references
}

// Compiler evaluates trees in bounded child processes and caches the result of
// every package by the hash of its import closure. It is safe for concurrent use.
type Compiler interface {
	// Compile evaluates tree. The error is about the evaluation itself (no process,
	// context done); everything wrong with the tree is in Result.Diagnostics.
	Compile(ctx context.Context, tree fs.FS, opts Options) (*Result, error)
}
