package compile

import (
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile/rules"
)

// checkRules judges what takes more than one field, and finds the places.
func checkRules(o Object, name string) []api.Diagnostic {
	var diags []api.Diagnostic
	for _, p := range rules.Check(o.Object) {
		diags = append(diags, api.Diagnostic{
			Pos: o.place(p.Field), Object: name, Field: p.Field, Message: p.Message,
			Expected: p.Expected, Found: p.Found, Hint: p.Hint,
		})
	}
	return diags
}

// place returns where a field is written, or the nearest field around it.
func (o Object) place(field string) api.Position {
	for field != "" {
		if p, ok := o.Fields[field]; ok {
			return p
		}
		field = parent(field)
	}
	return o.Pos
}

// parent cuts the last part off a field path.
func parent(field string) string {
	for i := len(field) - 1; i > 0; i-- {
		if field[i] == '.' || field[i] == '[' {
			return field[:i]
		}
	}
	return ""
}
