package compile

import (
	"fmt"
	"slices"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/token"

	"decree.dev/decree/schemas/api"
)

// messageMissing is about a required field.
const messageMissing = "the field is missing"

// explainer turns what CUE finds wrong into diagnostics that a person can act on.
//
// CUE reports a conflict between conjuncts, and stops early in a struct that has one.
// The explainer instead walks the user's value and the definition side by side and
// judges every field on its own, so that all errors are reported, each with what
// the definition expects there and what the user wrote.
type explainer struct {
	defs *definitions
	tree *tree
	// elsewhere are errors in an object whose cause is a value outside of it, which
	// is reported there.
	elsewhere []api.Diagnostic
}

// side is the state of one walk.
type side struct {
	x      *explainer
	object string
	at     string // the path of the object in its package
	diags  []api.Diagnostic
	skip   map[string]bool      // fields at the top that are not judged
	isDef  func(token.Pos) bool // whether what is written there belongs to the definition
	secret bool                 // no message may quote a value
	depth  int
}

func (s *side) report(pos api.Position, field, message, expected, found, hint string) {
	s.diags = append(s.diags, api.Diagnostic{
		Pos: pos, Object: s.object, Field: field, Message: message, Expected: expected, Found: found, Hint: hint,
	})
}

// object explains why v does not fit the definition of its kind; err is what CUE
// says, and is used when the walk finds nothing. There may be no diagnostics, when all
// causes are elsewhere.
func (x *explainer) object(kind *api.Kind, def *kindDef, v cue.Value, pos api.Position, err error) []api.Diagnostic {
	s := &side{x: x, object: x.objectName(kind, v), secret: kind.Resource == api.Secrets, at: valuePath(v), isDef: isDefinition}
	elsewhere := len(x.elsewhere)
	s.walk("", v, def.value, pos)
	if len(s.diags) > 0 || len(x.elsewhere) > elsewhere {
		return s.diags
	}
	diags := x.errors(err, s.object)
	for i := range diags {
		if s.secret {
			diags[i].Message = "the object does not fit its definition"
		}
		if diags[i].Pos.File == "" {
			diags[i].Pos = pos
		}
	}
	return diags
}

// walk judges v, which stands at field, by the definition def.
func (s *side) walk(field string, v, def cue.Value, pos api.Position) {
	data, ok := s.x.data(v, s.isDef)
	if !ok {
		return // nothing but the definition's own
	}
	if s.depth++; s.depth > 64 {
		return
	}
	defer func() { s.depth-- }()
	if p := s.x.position(v); p.File != "" {
		pos = p
	}
	if branches := branchesOf(def); len(branches) > 1 && data.IncompleteKind() == cue.StructKind {
		s.branches(field, data, def, branches, pos)
		return
	}
	switch data.IncompleteKind() {
	case cue.StructKind:
		if s.kindsMeet(field, data, def, pos) {
			s.structs(field, v, def, pos)
		}
	case cue.ListKind:
		if s.kindsMeet(field, data, def, pos) {
			s.lists(field, v, data, def, pos)
		}
	case cue.BottomKind:
		s.bottom(field, v, data, def, pos)
	default:
		s.scalar(field, data, def, pos)
	}
}

// data returns the part of v that does not come from a definition; ok is false if
// there is none.
func (x *explainer) data(v cue.Value, isDef func(token.Pos) bool) (data cue.Value, ok bool) {
	if !v.Exists() {
		return v, false
	}
	for _, leaf := range x.leaves(v) {
		if isDef(leaf.pos) {
			continue
		}
		if !ok {
			data, ok = leaf.Value, true
		} else {
			data = data.Unify(leaf.Value)
		}
	}
	return data, ok
}

// bottom handles a value that is in error without its definition: contents in error, or
// the user's own conflict.
func (s *side) bottom(field string, v, data, def cue.Value, pos api.Position) {
	if len(children(v)) > 0 && def.Exists() {
		before := len(s.diags)
		if def.IncompleteKind() == cue.ListKind {
			s.lists(field, v, data, def, pos)
		} else {
			s.structs(field, v, def, pos)
		}
		if len(s.diags) > before {
			return
		}
	}
	if s.ownConstraint(field, v, pos) {
		return
	}
	for _, d := range s.x.errors(data.Err(), s.object) {
		if d.Pos.File == "" {
			d.Pos = pos
		}
		if d.Field != "" && s.at != "" && !inField(d.Field, s.at) && !inField(s.at, d.Field) {
			s.x.elsewhere = append(s.x.elsewhere, d)
			continue
		}
		if d.Field = field; s.secret {
			d.Message = "the value is in conflict with itself"
		}
		s.diags = append(s.diags, d)
	}
}

// placeOf is where the user wrote v, or else around.
func (x *explainer) placeOf(v cue.Value, around api.Position) api.Position {
	if p := x.position(v); p.File != "" {
		return p
	}
	return around
}

func (s *side) kindsMeet(field string, data, def cue.Value, pos api.Position) bool {
	if def.IncompleteKind()&data.IncompleteKind() != 0 {
		return true
	}
	want := expected(def)
	if k := kindWords(def.IncompleteKind()); (k == "list" || k == "struct") && want != k {
		want = "a " + k + ", " + want
	}
	s.report(pos, field, "wrong type", want, s.render(data), "")
	return false
}

// structs judges the fields of v, then those that are missing.
func (s *side) structs(field string, v, def cue.Value, pos api.Position) {
	present := map[string]bool{}
	for _, c := range children(v) {
		name := c.selector.Unquoted()
		if field == "" && s.skip[name] {
			continue
		}
		present[name] = true
		sub := def.LookupPath(cue.MakePath(c.selector.Optional()))
		at := join(field, c.selector)
		if !sub.Exists() {
			s.notAllowed(at, name, c.value, def, pos)
			continue
		}
		s.walk(at, c.value, sub, pos)
	}
	for _, f := range fieldsOf(def) {
		if f.required && !present[f.name] || present[f.name] && f.required && !s.given(v, f.name) {
			sub := def.LookupPath(cue.MakePath(cue.Str(f.name).Optional()))
			s.report(pos, join(field, cue.Str(f.name)), messageMissing, expectedWords(sub), "", "")
		}
	}
}

// given reports whether a required field has a value that the user, or a default,
// provides.
func (s *side) given(v cue.Value, name string) bool {
	_, ok := s.x.data(v.LookupPath(cue.MakePath(cue.Str(name))), s.isDef)
	return ok
}

// lists judges the elements of v, then its length.
func (s *side) lists(field string, v, data, def cue.Value, pos api.Position) {
	list := children(v)
	for i, c := range list {
		elem := def.LookupPath(cue.MakePath(cue.AnyIndex))
		if !elem.Exists() {
			elem = def.LookupPath(cue.MakePath(cue.Index(i)))
		}
		if elem.Exists() {
			s.walk(join(field, c.selector), c.value, elem, pos)
		}
	}
	if len(list) == 0 && def.Unify(data).Err() != nil {
		s.report(pos, field, "the list is empty", expected(def), "", "")
	}
}

// scalar judges a number, text, boolean, null or bytes.
func (s *side) scalar(field string, data, def cue.Value, pos api.Position) {
	if !s.kindsMeet(field, data, def, pos) {
		return
	}
	if value, ok := data.Default(); ok {
		data = value
	}
	if !data.IsConcrete() {
		s.report(pos, field, "the value is not known", expected(def), s.render(data), "")
		return
	}
	if err := def.Unify(data).Validate(cue.Concrete(true)); err != nil {
		s.report(pos, field, "the value is not allowed", expected(def), s.render(data), enumHint(def, data))
	}
}

// notAllowed says why a field that the definition does not have is refused.
func (s *side) notAllowed(field, name string, v, def cue.Value, pos api.Position) {
	if p := s.x.labelPos(v); p.File != "" {
		pos = p
	}
	if keys := attribute(def, "keys"); keys != "" {
		s.report(pos, field, "the key is not allowed", keys, fmt.Sprintf("%q", name), "")
		return
	}
	switch {
	case marked(def, "unimplemented", name):
		s.report(pos, field, "not implemented by Decree", "", "", "remove the field")
	case marked(def, "cluster", name):
		s.report(pos, field, "the field is set by Decree, not in Git", "", "", "remove the field")
	default:
		var names []string
		for _, f := range fieldsOf(def) {
			names = append(names, f.name)
		}
		hint := ""
		if n := nearest(name, names); n != "" {
			hint = fmt.Sprintf("did you mean %s?", n)
		} else if len(names) > 0 && len(names) <= 12 {
			slices.Sort(names)
			hint = "fields here: " + strings.Join(names, ", ")
		}
		s.report(pos, field, "there is no such field", "", "", hint)
	}
}

// labelPos is where the user wrote the name of the field v.
func (x *explainer) labelPos(v cue.Value) api.Position {
	_, args := v.Expr()
	for _, leaf := range append([]cue.Value{v}, args...) {
		p := leaf.Pos()
		if f, ok := leaf.Source().(*ast.Field); ok {
			p = f.Label.Pos()
		}
		if x.isUser(p) {
			return place(p)
		}
	}
	return x.position(v)
}

// shortForm explains an application (app.#App) that is in error, by what the user
// wrote in it and not by the objects it makes; nil if v is none, or that is in order.
func (x *explainer) shortForm(v cue.Value, pos api.Position) []api.Diagnostic {
	for _, leaf := range x.leaves(v) {
		path := leaf.Path().Selectors()
		if len(path) != 1 || !path[0].IsDefinition() || !strings.HasPrefix(leaf.pos.Filename(), schemaPrefix+appPackage+"/") {
			continue
		}
		s := &side{x: x, object: "app", isDef: isEmbedded, skip: map[string]bool{}}
		if data, ok := x.data(v.LookupPath(cue.ParsePath("name")), isEmbedded); ok {
			if name, err := data.String(); err == nil {
				s.object = fmt.Sprintf("app %q", name)
			}
		}
		for _, c := range children(leaf.Value) {
			if _, ok := asObject(c.value); ok {
				s.skip[c.selector.Unquoted()] = true
			}
		}
		s.walk("", v, leaf.Value, pos)
		return s.diags
	}
	return nil
}
