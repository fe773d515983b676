package compile

import (
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/token"

	"decree.dev/decree/schemas/api"
)

// maxBranches bounds how many branches of a disjunction are tried.
const maxBranches = 32

// branchesOf returns the alternatives of a disjunction that are structs, or nil.
func branchesOf(def cue.Value) []cue.Value {
	op, args := dereference(def).Expr()
	if op != cue.OrOp || len(args) > maxBranches {
		return nil
	}
	return args
}

// branches judges data by the branch of a disjunction that the user meant: the one with
// the fewest objections, where a wrong constant (a discriminator) counts most.
func (s *side) branches(field string, data, def cue.Value, branches []cue.Value, pos api.Position) {
	best, cost := []api.Diagnostic(nil), -1
	for _, b := range branches {
		if b.IncompleteKind()&cue.StructKind == 0 && b.IncompleteKind() != cue.BottomKind {
			continue
		}
		t := &side{x: s.x, object: s.object, isDef: s.isDef, secret: s.secret, depth: s.depth}
		t.walk(field, data, b, pos) // v has no fields when no branch fits
		c := 0
		for _, d := range t.diags {
			switch {
			case isConstant(b, field, d.Field):
				c += 100
			case d.Message == messageMissing:
				c += 2
			default:
				c += 3
			}
		}
		if cost < 0 || c < cost {
			best, cost = t.diags, c
		}
	}
	if cost < 0 {
		s.kindsMeet(field, data, def, pos)
		return
	}
	s.diags = append(s.diags, best...)
}

// isConstant reports whether the branch fixes the field directly below at to one
// value.
func isConstant(branch cue.Value, at, field string) bool {
	rest := strings.TrimPrefix(strings.TrimPrefix(field, at), ".")
	v := branch.LookupPath(cue.MakePath(cue.Str(rest)))
	return v.Exists() && v.IsConcrete() && v.IncompleteKind()&(cue.StructKind|cue.ListKind) == 0
}

// ownDisjunction explains a value that fits no branch of a disjunction in the user's
// own definitions; false if it is something else.
func (s *side) ownDisjunction(field string, v cue.Value, pos api.Position) bool {
	leaves := s.x.leaves(v)
	for i, leaf := range leaves {
		op, branches := leaf.Expr()
		if op != cue.OrOp || len(branches) > maxBranches {
			continue
		}
		var data cue.Value
		for k, other := range leaves {
			if k != i {
				data = data.Unify(other.Value)
			}
		}
		if !data.Exists() {
			return false
		}
		before := len(s.diags)
		t := &side{x: s.x, object: s.object, isDef: func(token.Pos) bool { return false }, secret: s.secret, depth: s.depth + 1}
		if data.IncompleteKind() == cue.StructKind {
			t.branches(field, data, leaf.Value, branches, pos)
		} else {
			t.scalar(field, data, leaf.Value, s.x.placeOf(data, pos))
		}
		s.diags = append(s.diags, t.diags...)
		return len(s.diags) > before
	}
	return false
}

// disjunction explains an error by the outermost value on its path that fits no branch of
// a disjunction, and returns that value's field; nil if there is none.
func (x *explainer) disjunction(root cue.Value, path []string) ([]api.Diagnostic, string) {
	for n := 1; n <= len(path); n++ {
		v, ok := lookup(root, path[:n])
		if !ok {
			return nil, ""
		}
		field := fieldPath(path[:n])
		s := &side{x: x, isDef: func(token.Pos) bool { return false }}
		if v.Err() != nil && s.ownDisjunction(field, v, x.position(v)) {
			return s.diags, field
		}
	}
	return nil, ""
}
