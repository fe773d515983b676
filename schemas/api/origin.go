package api

import (
	"fmt"
	"strconv"
	"strings"
)

// The annotations that carry an object's origin in Git. They are set by the plan
// of a commit; a user cannot set them (names under decree.dev/ are refused).
const (
	AnnotationSource = "decree.dev/source" // name of the Source
	AnnotationCommit = "decree.dev/commit" // full hash of the last commit that changed the object
	AnnotationFile   = "decree.dev/file"   // "apps/web.cue:14", relative to the repository's root
)

// Position is a place in a file of a repository. File is slash-separated and
// relative to the root of the repository; Line and Column count from 1, zero means
// unknown.
type Position struct {
	File   string `json:"file"`
	Line   int    `json:"line,omitempty"`
	Column int    `json:"column,omitempty"`
}

// String is file:line:column without the unknown parts.
func (p Position) String() string {
	s := p.File
	if p.Line > 0 {
		s += ":" + strconv.Itoa(p.Line)
		if p.Column > 0 {
			s += ":" + strconv.Itoa(p.Column)
		}
	}
	return s
}

// Origin tells which commit of which source an object comes from.
type Origin struct {
	Source string
	Commit string
	Pos    Position
}

// OriginOf reads the origin of o; ok is false for objects that do not come from Git.
func OriginOf(o Object) (origin Origin, ok bool) {
	a := o.GetAnnotations()
	if a[AnnotationSource] == "" {
		return Origin{}, false
	}
	file, line := a[AnnotationFile], 0
	if i := strings.LastIndexByte(file, ':'); i > 0 {
		if n, err := strconv.Atoi(file[i+1:]); err == nil {
			file, line = file[:i], n
		}
	}
	return Origin{Source: a[AnnotationSource], Commit: a[AnnotationCommit], Pos: Position{File: file, Line: line}}, true
}

// Set writes the origin into the annotations of o, which must not be shared.
func (g Origin) Set(o Object) {
	a := o.GetAnnotations()
	if a == nil {
		a = make(map[string]string, 3)
	}
	a[AnnotationSource], a[AnnotationCommit] = g.Source, g.Commit
	a[AnnotationFile] = Position{File: g.Pos.File, Line: g.Pos.Line}.String()
	o.SetAnnotations(a)
}

// String is the form used in refusals: `source "shop", apps/web.cue:14 at 3f2a1c9`.
func (g Origin) String() string {
	return fmt.Sprintf("source %q, %s at %.7s", g.Source, g.Pos, g.Commit)
}

// Diagnostic is one thing wrong with what a user wrote, with everything needed to
// find and mend it. It is data: the compiler and the plan return lists of them.
type Diagnostic struct {
	Pos      Position `json:"pos"`
	Object   string   `json:"object,omitempty"`   // `deployments.apps "shop/web"`, when known
	Field    string   `json:"field,omitempty"`    // "spec.template.spec.containers[0].image"
	Message  string   `json:"message"`            // one line
	Expected string   `json:"expected,omitempty"` // what would be accepted
	Found    string   `json:"found,omitempty"`    // what stands there
	Hint     string   `json:"hint,omitempty"`     // what to do
}

// Error makes a Diagnostic usable as an error: file:line:col: field: message.
func (d Diagnostic) Error() string {
	var b strings.Builder
	if d.Pos.File != "" {
		b.WriteString(d.Pos.String() + ": ")
	}
	if d.Object != "" {
		b.WriteString(d.Object + ": ")
	}
	if d.Field != "" {
		b.WriteString(d.Field + ": ")
	}
	b.WriteString(d.Message)
	if d.Expected != "" {
		b.WriteString("; expected " + d.Expected)
	}
	if d.Found != "" {
		b.WriteString("; found " + d.Found)
	}
	if d.Hint != "" {
		b.WriteString(" (" + d.Hint + ")")
	}
	return b.String()
}
