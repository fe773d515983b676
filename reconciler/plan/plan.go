// Package plan compares what a commit wants with what is in force and returns the
// difference as data. It is pure.
package plan

import (
	"decree.dev/decree/schemas/api"
)

// Desired is one object of a commit, with where it is written.
type Desired struct {
	Object api.Object
	Pos    api.Position
	Fields map[string]api.Position
}

// Input is everything a plan depends on.
type Input struct {
	Source  *api.Source
	Commit  string // full hash
	Desired []Desired
	Current api.Reader
}

// ChangeSet is the whole effect of one commit, or the reasons for refusing it.
type ChangeSet struct {
	// Mutations carry out the plan, in dependency order (namespaces first, deleted
	// last). Empty when Refusals is not.
	Mutations []api.Mutation
	// Changes describes them for people and for the Revision record.
	Changes []api.Change
	// Unchanged counts objects that are already as the commit wants them.
	Unchanged int
	// Refusals say why the commit must not be applied.
	Refusals []api.Diagnostic
}
