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

// leaf is a part of a value, and where it stands: its own place, or that of the part
// it belongs to (numbers such as the bounds of int32 have none).
type leaf struct {
	cue.Value
	pos token.Pos
}

// leaves returns what v is made of: the conjuncts of its conjunctions, through
// references, those of the user's files first.
func (x *explainer) leaves(v cue.Value) []leaf {
	var own, other []leaf
	var follow func(v cue.Value, around token.Pos, depth int)
	follow = func(v cue.Value, around token.Pos, depth int) {
		if depth > 16 || len(own)+len(other) > maxLeaves {
			return
		}
		if _, path := v.ReferencePath(); len(path.Selectors()) > 0 {
			target := dereference(v)
			if last := path.Selectors()[len(path.Selectors())-1]; last.IsDefinition() && isDefinition(target.Pos()) {
				other = append(other, leaf{target, target.Pos()}) // taking it apart would evaluate it again
				return
			}
			v = target
		}
		pos := v.Pos()
		if !pos.IsValid() {
			pos = around
		}
		if op, args := v.Expr(); op == cue.AndOp {
			for _, a := range args {
				follow(a, pos, depth+1)
			}
			return
		}
		if x.isUser(pos) {
			own = append(own, leaf{v, pos})
		} else {
			other = append(other, leaf{v, pos})
		}
	}
	follow(v, token.NoPos, 0)
	return append(own, other...)
}

// dereference follows a reference. CUE panics on some values whose reference leads into a
// comprehension; they stay as they are.
func dereference(v cue.Value) (target cue.Value) {
	defer func() {
		if recover() != nil {
			target = v
		}
	}()
	return cue.Dereference(v)
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
	return isEmbedded(p) && !strings.HasPrefix(p.Filename(), schemaPrefix+appPackage+"/")
}

// isEmbedded reports whether a position is in the embedded module.
func isEmbedded(p token.Pos) bool { return strings.HasPrefix(p.Filename(), schemaPrefix) }

// position returns where the user wrote v, without File if nowhere.
func (x *explainer) position(v cue.Value) api.Position {
	if p := valuePos(v); x.isUser(p) {
		return place(p)
	}
	for _, leaf := range x.leaves(v) {
		if p := valuePos(leaf.Value); x.isUser(p) {
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

// places finds where the user wrote the object v, and maps every field of it to its
// place. What a definition filled in has the place of the nearest field around it;
// around v is the place given. origin is the text that v comes from through all
// references: two fields that hold the same object have the same.
//
// Taking a value apart evaluates its parts again. So v is taken apart once, and its
// parts are then followed down beside it.
func (x *explainer) places(v cue.Value, around api.Position) (pos, origin api.Position, fields map[string]api.Position) {
	pos, fields = around, map[string]api.Position{}
	sources := x.sources(nil, v)
	for _, s := range sources {
		if p := valuePos(s); p.IsValid() {
			origin = place(p)
			break
		}
	}
	for _, s := range append([]cue.Value{v}, sources...) {
		if p := valuePos(s); x.isUser(p) {
			pos = place(p)
			break
		}
	}
	x.follow(fields, "", v, sources, pos)
	return pos, origin, fields
}

// sources appends the parts of v that do not come from the definition of a kind.
func (x *explainer) sources(list []cue.Value, v cue.Value) []cue.Value {
	for _, leaf := range x.leaves(v) {
		if !isDefinition(leaf.pos) {
			list = append(list, leaf.Value)
		}
	}
	return list
}

func (x *explainer) follow(m map[string]api.Position, at string, v cue.Value, sources []cue.Value, pos api.Position) {
	for _, c := range children(v) {
		field, here, found := join(at, c.selector), pos, false
		look := func(v cue.Value) {
			if p := valuePos(v); !found && x.isUser(p) {
				here, found = place(p), true
			}
		}
		nested := c.value.IncompleteKind()&(cue.StructKind|cue.ListKind) != 0
		if !nested {
			look(c.value) // a scalar knows where it was written, also through references
		}
		var below []cue.Value
		for _, s := range sources {
			if part := s.LookupPath(cue.MakePath(c.selector)); part.Exists() {
				look(part)
				below = append(below, part)
			}
		}
		if !found && nested && len(below) > 0 {
			parts := below
			below = nil
			for _, part := range parts {
				below = x.sources(below, part)
			}
			for _, part := range below {
				look(part)
			}
		}
		m[field] = here
		if nested {
			x.follow(m, field, c.value, below, here)
		}
	}
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
