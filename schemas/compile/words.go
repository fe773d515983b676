package compile

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/format"
)

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
	return kindWords(v.Kind())
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
	if len(word) < 3 {
		return ""
	}
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
