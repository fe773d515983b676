package compile

import (
	"fmt"
	"slices"
	"strings"

	"cuelang.org/go/cue"
	"cuelang.org/go/cue/errors"

	"decree.dev/decree/schemas/api"
)

// errors converts errors of CUE, without the embedded module's positions.
func (x *explainer) errors(err error, object string) []api.Diagnostic {
	var diags []api.Diagnostic
	for _, e := range errors.Errors(err) {
		if strings.HasSuffix(message(e), "errors in empty disjunction:") && len(errors.Errors(err)) > 1 {
			continue // the errors of the branches follow
		}
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
		found, at := x.constraint(root, e.Path())
		if found == nil {
			found, at = x.errors(e, ""), field
		}
		if len(found) == 0 {
			continue
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
