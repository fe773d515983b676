package compile

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/ast"
	"cuelang.org/go/cue/errors"
	"cuelang.org/go/cue/format"
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
}

// side is the state of one walk.
type side struct {
	x      *explainer
	object string
	diags  []api.Diagnostic
	skip   map[string]bool      // fields at the top that are not judged
	isDef  func(token.Pos) bool // whether what is written there belongs to the definition
	secret bool                 // no message may quote a value
	depth  int
}

// maxBranches bounds how many branches of a disjunction are tried.
const maxBranches = 32

func (s *side) report(pos api.Position, field, message, expected, found, hint string) {
	s.diags = append(s.diags, api.Diagnostic{
		Pos: pos, Object: s.object, Field: field, Message: message, Expected: expected, Found: found, Hint: hint,
	})
}

// object explains why v does not fit the definition of its kind; err is what CUE
// says, and is used when the walk finds nothing.
func (x *explainer) object(kind *api.Kind, def *kindDef, v cue.Value, pos api.Position, err error) []api.Diagnostic {
	s := &side{x: x, object: x.objectName(kind, v), secret: kind.Resource == api.Secrets, isDef: isDefinition}
	s.walk("", v, def.value, pos)
	if len(s.diags) > 0 {
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
	if s.ownDisjunction(field, v, pos) {
		return
	}
	for _, d := range s.x.errors(data.Err(), s.object) {
		if d.Pos.File == "" {
			d.Pos = pos
		}
		if d.Field = field; s.secret {
			d.Message = "the value is in conflict with itself"
		}
		s.diags = append(s.diags, d)
	}
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
	s.report(pos, field, "wrong type", expected(def), s.render(data), "")
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

// fieldInfo is a field that a definition has.
type fieldInfo struct {
	name     string
	required bool
}

func fieldsOf(def cue.Value) []fieldInfo {
	it, err := def.Fields(cue.Optional(true))
	if err != nil {
		return nil
	}
	var list []fieldInfo
	for it.Next() {
		sel := it.Selector()
		if sel.LabelType() == cue.StringLabel && sel.ConstraintType() != cue.PatternConstraint {
			list = append(list, fieldInfo{sel.Unquoted(), sel.ConstraintType() == cue.RequiredConstraint})
		}
	}
	return list
}

// attribute returns the text of the attribute @name("text") of v: of its own field or
// declaration, or of the definition it refers to.
func attribute(v cue.Value, name string) string {
	for _, a := range attributes(v, name, 0) {
		if text, err := a.String(0); err == nil {
			return text
		}
	}
	return ""
}

// marked reports whether an attribute @name(a,b,c) of v contains the word.
func marked(v cue.Value, name, word string) bool {
	for _, a := range attributes(v, name, 0) {
		for i := range a.NumArgs() {
			if text, err := a.String(i); err == nil && text == word {
				return true
			}
		}
	}
	return false
}

// attributes collects the attributes with a name along the references of v.
func attributes(v cue.Value, name string, depth int) []cue.Attribute {
	var list []cue.Attribute
	for _, a := range v.Attributes(cue.ValueAttr) {
		if a.Name() == name {
			list = append(list, a)
		}
	}
	if depth > 8 {
		return list
	}
	if _, path := v.ReferencePath(); len(path.Selectors()) > 0 {
		if d := dereference(v); d.Exists() {
			list = append(list, attributes(d, name, depth+1)...)
		}
	}
	if op, args := v.Expr(); op == cue.AndOp || op == cue.OrOp {
		for _, a := range args {
			list = append(list, attributes(a, name, depth+1)...)
		}
	}
	return list
}

// expected says what a definition accepts, in words if it has some.
func expected(def cue.Value) string {
	if text := attribute(def, "expect"); text != "" {
		return text
	}
	if values := enumOf(def); values != nil {
		var quoted []string
		for _, v := range values {
			quoted = append(quoted, fmt.Sprintf("%q", v))
		}
		if len(quoted) == 1 {
			return quoted[0]
		}
		return "one of " + strings.Join(quoted, ", ")
	}
	return kindWords(def.IncompleteKind())
}

// expectedWords is expected, unless that only says struct or list.
func expectedWords(def cue.Value) string {
	if text := expected(def); text != "struct" && text != "list" {
		return text
	}
	return ""
}

// enumOf returns the texts of a disjunction of texts, nil for anything else.
func enumOf(def cue.Value) []string {
	values := map[string]int{}
	for _, leaf := range append([]leaf{{Value: def}}, (&explainer{tree: &tree{}}).leaves(def)...) {
		op, args := leaf.Expr()
		if op != cue.OrOp {
			if s, err := leaf.String(); err == nil {
				values[s] = len(values)
			}
			continue
		}
		for _, a := range args {
			s, err := a.String()
			if err != nil {
				return nil
			}
			if _, ok := values[s]; !ok {
				values[s] = len(values)
			}
		}
	}
	return slices.SortedFunc(maps.Keys(values), func(a, b string) int { return values[a] - values[b] })
}

func enumHint(def, data cue.Value) string {
	s, err := data.String()
	if err != nil {
		return ""
	}
	if n := nearest(s, enumOf(def)); n != "" {
		return fmt.Sprintf("did you mean %q?", n)
	}
	return ""
}

// kindWords names the kinds in a set.
func kindWords(k cue.Kind) string {
	names := []struct {
		kind cue.Kind
		name string
	}{
		{cue.NumberKind, "number"}, {cue.IntKind, "int"}, {cue.FloatKind, "float"}, {cue.StringKind, "string"},
		{cue.BoolKind, "bool"}, {cue.StructKind, "struct"}, {cue.ListKind, "list"}, {cue.BytesKind, "bytes"}, {cue.NullKind, "null"},
	}
	var words []string
	for _, n := range names {
		if k&n.kind == n.kind {
			words = append(words, n.name)
			k &^= n.kind
		}
	}
	return strings.Join(words, " or ")
}

// maxFound is the most characters of a value that a message quotes.
const maxFound = 60

// render prints a value for a message, unless it may be a secret.
func (s *side) render(v cue.Value) string {
	if !s.secret || !v.IsConcrete() {
		return render(v)
	}
	switch v.Kind() {
	case cue.StringKind, cue.BytesKind:
		return "a value that is not shown, because it is in a Secret"
	}
	return "a " + kindWords(v.Kind())
}

// render prints a value as the user would write it, in one short line.
func render(v cue.Value) string {
	switch v.IncompleteKind() {
	case cue.StructKind:
		return "a struct"
	case cue.ListKind:
		return "a list"
	}
	if !v.IsConcrete() {
		return kindWords(v.IncompleteKind()) + ", not a concrete value"
	}
	text, err := format.Node(v.Syntax(cue.Final()))
	if err != nil {
		return kindWords(v.IncompleteKind())
	}
	s := strings.Join(strings.Fields(string(text)), " ")
	if r := []rune(s); len(r) > maxFound {
		s = string(r[:maxFound]) + "…"
	}
	return s
}

// nearest returns the name most like word, if one is near enough to be meant.
func nearest(word string, names []string) string {
	best, name := 3, ""
	for _, n := range names {
		limit := max(1, min(len(word), len(n))/3)
		if d := distance(strings.ToLower(word), strings.ToLower(n)); d < best && d <= limit {
			best, name = d, n
		}
	}
	return name
}

// distance is the number of letters to insert, delete or replace to get from a to b.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
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

// errors converts errors of CUE, without the embedded module's positions.
func (x *explainer) errors(err error, object string) []api.Diagnostic {
	var diags []api.Diagnostic
	for _, e := range errors.Errors(err) {
		d := api.Diagnostic{Object: object, Field: fieldPath(e.Path()), Message: message(e)}
		var places []string
		for _, p := range errors.Positions(e) {
			if !x.isUser(p) {
				continue
			}
			if d.Pos.File == "" {
				d.Pos = place(p)
			} else if at := place(p); at != d.Pos && !slices.Contains(places, at.String()) {
				places = append(places, at.String())
			}
		}
		if len(places) > 0 && len(places) <= 3 {
			d.Hint = "see also " + strings.Join(places, ", ")
		}
		diags = append(diags, d)
	}
	return diags
}

// fieldPath joins the path of an error as messages print it, without definitions.
func fieldPath(path []string) string {
	at := ""
	for _, p := range path {
		switch {
		case strings.HasPrefix(p, "#"):
		case p != "" && strings.Trim(p, "0123456789") == "" && at != "":
			at += "[" + p + "]"
		case at == "":
			at = p
		default:
			at += "." + p
		}
	}
	return at
}

// message is the text of e in one line.
func message(e errors.Error) string {
	f, args := e.Msg()
	s := fmt.Sprintf(f, args...)
	if inner := errors.Unwrap(e); inner != nil && s != "" {
		s += ": " + inner.Error()
	} else if inner != nil {
		s = inner.Error()
	}
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > maxMessage {
		s = string(r[:maxMessage]) + "…"
	}
	return s
}

// maxMessage is the most characters of a message of CUE.
const maxMessage = 300

// rest explains the errors of a package that are not in one of the fields explained
// already.
func (x *explainer) rest(root cue.Value, err error, explained []string, known []api.Diagnostic) []api.Diagnostic {
	var diags []api.Diagnostic
	for _, e := range errors.Errors(err) {
		field := fieldPath(e.Path())
		if slices.ContainsFunc(explained, func(at string) bool { return inField(field, at) }) {
			continue
		}
		found, at := x.disjunction(root, e.Path())
		if found == nil {
			found, at = x.errors(e, ""), field
		}
		explained = append(explained, at)
		for _, d := range found {
			if !slices.ContainsFunc(known, func(k api.Diagnostic) bool { return k.Pos == d.Pos }) {
				diags = append(diags, d)
			}
		}
	}
	return diags
}

// inField reports whether a field is at, or inside of it.
func inField(field, at string) bool {
	return at != "" && (field == at || strings.HasPrefix(field, at+".") || strings.HasPrefix(field, at+"["))
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

// lookup follows the path of an error.
func lookup(v cue.Value, path []string) (cue.Value, bool) {
	for _, p := range path {
		found := false
		for _, c := range children(v) {
			name := c.selector.String()
			if c.selector.LabelType() == cue.StringLabel {
				name = c.selector.Unquoted()
			}
			if name == p || strings.Trim(p, `"`) == name {
				v, found = c.value, true
				break
			}
		}
		if !found {
			return v, false
		}
	}
	return v, true
}
