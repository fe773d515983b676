package compile

import (
	"slices"
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
		t := &side{x: s.x, object: s.object, isDef: s.isDef, secret: s.secret, at: s.at, depth: s.depth}
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

// ownConstraint explains a value that does not fit what the user's own definitions say
// about it: a disjunction, a type, a bound. It is false if the conflict is another one.
func (s *side) ownConstraint(field string, v cue.Value, pos api.Position) bool {
	leaves := slices.DeleteFunc(s.x.leaves(v), func(l leaf) bool { return isEmbedded(l.pos) })
	for i, constraint := range leaves {
		op, args := constraint.Expr()
		open := len(args) == 1 && !args[0].IsConcrete() // also *8080 | int, which is concrete by its default
		if op != cue.OrOp && !open || len(args) > maxBranches {
			continue
		}
		var data cue.Value
		for k, other := range leaves {
			if k != i {
				data = data.Unify(other.Value)
			}
		}
		if !data.Exists() || data.Err() != nil {
			continue
		}
		t := &side{x: s.x, object: s.object, isDef: func(token.Pos) bool { return false }, secret: s.secret, at: s.at, depth: s.depth + 1}
		if data.IncompleteKind() == cue.StructKind && op == cue.OrOp {
			t.branches(field, data, constraint.Value, args, pos)
		} else if data.IncompleteKind() != cue.StructKind {
			t.scalar(field, data, constraint.Value, s.x.placeOf(data, pos))
		}
		if len(t.diags) > 0 {
			s.diags = append(s.diags, t.diags...)
			return true
		}
	}
	return false
}

// constraint explains an error by the outermost value on its path that does not fit what
// the user's definitions say, and returns that value's field; nil if there is none.
func (x *explainer) constraint(root cue.Value, path []string) ([]api.Diagnostic, string) {
	for n := 1; n <= len(path); n++ {
		v, ok := lookup(root, path[:n])
		if !ok {
			return nil, ""
		}
		field := fieldPath(path[:n])
		s := &side{x: x, isDef: func(token.Pos) bool { return false }}
		if v.Err() != nil && s.ownConstraint(field, v, x.position(v)) {
			return s.diags, field
		}
	}
	return nil, ""
}
