package compile

import (
	"cuelang.org/go/cue"

	"decree.dev/decree/schemas/api"
)

// checkRules evaluates the rules over several fields that stand beside a definition.
func (e *evaluator) checkRules(def *kindDef, v cue.Value, o Object, name string) []api.Diagnostic {
	return nil
}

// checkDecoded checks what CUE cannot compute.
func (e *evaluator) checkDecoded(kind *api.Kind, o Object) []api.Diagnostic {
	return nil
}

var _ cue.Value
