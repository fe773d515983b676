package compile

import (
	"slices"

	"cuelang.org/go/cue"

	"decree.dev/decree/schemas/api"
)

var (
	pathAPIVersion = cue.ParsePath("apiVersion")
	pathKind       = cue.ParsePath("kind")
)

// found is a struct with a concrete apiVersion and kind.
type found struct {
	value            cue.Value
	apiVersion, kind string
	around           api.Position // where the user wrote it, or what is around it
}

// walker discovers the objects of a package: any struct with apiVersion and kind, at
// any depth. Hidden fields, definitions and optional fields are not looked into, nor
// are objects.
type walker struct {
	e     *evaluator
	visit func(found) []api.Diagnostic
	diags []api.Diagnostic
	// explained are the paths of the values whose errors are all in diagnostics.
	explained []string
}

// walk visits the objects in v in the order of the source. pos is the place of what
// is around v.
func (w *walker) walk(v cue.Value, pos api.Position) {
	if p := valuePos(v); w.e.explain.isUser(p) {
		pos = place(p)
	}
	switch v.IncompleteKind() {
	case cue.StructKind, cue.BottomKind: // an error inside does not hide the rest
		if f, ok := asObject(v); ok {
			f.around = pos
			w.diags = append(w.diags, w.visit(f)...)
			w.explained = append(w.explained, valuePath(v))
			return
		}
	case cue.ListKind:
	default:
		return
	}
	before := len(w.diags)
	for _, c := range children(v) {
		w.walk(c.value, pos)
	}
	if len(w.diags) == before && v.Err() == nil {
		return
	}
	// What an application in error makes is in error for the same reasons: say those.
	if diags := w.e.explain.shortForm(v, pos); len(diags) > 0 {
		own := slices.DeleteFunc(slices.Clone(w.diags[before:]), func(d api.Diagnostic) bool {
			return d.Pos == pos || slices.ContainsFunc(diags, func(known api.Diagnostic) bool { return known.Pos == d.Pos })
		})
		w.diags = append(append(w.diags[:before], own...), diags...)
		w.explained = append(w.explained, valuePath(v))
	}
}

// valuePath is the path of v in its package as messages print it.
func valuePath(v cue.Value) string {
	at := ""
	for _, sel := range v.Path().Selectors() {
		at = join(at, sel)
	}
	return at
}

// asObject reports whether v has a concrete apiVersion and kind.
func asObject(v cue.Value) (found, bool) {
	apiVersion, err1 := v.LookupPath(pathAPIVersion).String()
	kind, err2 := v.LookupPath(pathKind).String()
	return found{value: v, apiVersion: apiVersion, kind: kind}, err1 == nil && err2 == nil
}

// child is a regular field or a list element.
type child struct {
	selector cue.Selector
	value    cue.Value
}

// children returns the regular fields of a struct or the elements of a list, also
// when some of them are in error.
func children(v cue.Value) []child {
	var list []child
	it, err := v.Fields()
	if err != nil {
		if elements, err := v.List(); err == nil {
			for i := 0; elements.Next(); i++ {
				list = append(list, child{cue.Index(i), elements.Value()})
			}
		}
		return list
	}
	for it.Next() {
		list = append(list, child{it.Selector(), it.Value()})
	}
	return list
}
