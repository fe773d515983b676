package compile

import (
	"strconv"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/token"

	"decree.dev/decree/schemas/api"
)

// maxLeaves bounds how far leaves follows conjunctions and references.
const maxLeaves = 64

// leaves returns what v is made of: the conjuncts of its conjunctions, through
// references, those of the user's files first.
func (x *explainer) leaves(v cue.Value) []cue.Value {
	var own, other []cue.Value
	var follow func(v cue.Value, depth int)
	follow = func(v cue.Value, depth int) {
		if depth > 16 || len(own)+len(other) > maxLeaves {
			return
		}
		v = cue.Dereference(v)
		if op, args := v.Expr(); op == cue.AndOp {
			for _, a := range args {
				follow(a, depth+1)
			}
			return
		}
		if x.isUser(v.Pos()) {
			own = append(own, v)
		} else {
			other = append(other, v)
		}
	}
	follow(v, 0)
	return append(own, other...)
}

// isUser reports whether a position is in a file of the tree.
func (x *explainer) isUser(p token.Pos) bool {
	if !p.IsValid() {
		return false
	}
	_, ok := x.tree.files[p.Filename()]
	return ok
}

// isDefinition reports whether a position is in the definitions of a kind, as
// opposed to the user's files and the short form, which makes objects.
func isDefinition(p token.Pos) bool {
	return strings.HasPrefix(p.Filename(), schemaPrefix) && !strings.HasPrefix(p.Filename(), schemaPrefix+"decree.dev/app/")
}

// position returns where the user wrote v, without File if nowhere.
func (x *explainer) position(v cue.Value) api.Position {
	if op, args := v.Expr(); op == cue.AndOp {
		for _, a := range args {
			if p := valuePos(a); x.isUser(p) {
				return place(p)
			}
		}
	}
	if p := valuePos(v); x.isUser(p) {
		return place(p)
	}
	for _, leaf := range x.leaves(v) {
		if p := valuePos(leaf); x.isUser(p) {
			return place(p)
		}
	}
	return api.Position{}
}

// valuePos is the position of the value when it is written as a scalar, otherwise that
// of its field: where a person would look.
func valuePos(v cue.Value) token.Pos {
	if f, ok := v.Source().(*ast.Field); ok {
		switch f.Value.(type) {
		case *ast.StructLit, *ast.ListLit:
			return f.Pos()
		}
		return f.Value.Pos()
	}
	return v.Pos()
}

func place(p token.Pos) api.Position {
	return api.Position{File: p.Filename(), Line: p.Line(), Column: p.Column()}
}

// fields maps every field of v to the place where the user wrote it; what a
// definition filled in has the place of the nearest field around it.
func (x *explainer) fields(v cue.Value, pos api.Position) map[string]api.Position {
	m := map[string]api.Position{}
	var walk func(v cue.Value, at string, pos api.Position)
	walk = func(v cue.Value, at string, pos api.Position) {
		if at != "" {
			if p := x.position(v); p.File != "" {
				pos = p
			}
			m[at] = pos
		}
		switch v.IncompleteKind() {
		case cue.StructKind, cue.ListKind, cue.BottomKind:
			for _, c := range children(v) {
				walk(c.value, join(at, c.selector), pos)
			}
		}
	}
	walk(v, "", pos)
	return m
}

// join appends a selector to a field path as messages print it:
// spec.containers[0].env, metadata.labels["a/b"].
func join(at string, sel cue.Selector) string {
	switch {
	case sel.LabelType() == cue.IndexLabel:
		return at + "[" + strconv.Itoa(sel.Index()) + "]"
	case at == "":
		return sel.String()
	}
	if s := sel.String(); strings.HasPrefix(s, `"`) {
		return at + "[" + s + "]"
	}
	return at + "." + sel.String()
}
