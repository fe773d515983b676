package schedule

import (
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
)

// requiredAffinity is the node affinity that a pod insists on, nil for none.
func requiredAffinity(s *corev1.PodSpec) *corev1.NodeSelector {
	if s.Affinity == nil || s.Affinity.NodeAffinity == nil {
		return nil
	}
	return s.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
}

// matchesAny reports whether n satisfies one of the terms; a term without
// requirements matches nothing.
func matchesAny(terms []corev1.NodeSelectorTerm, n *corev1.Node) bool {
	return slices.ContainsFunc(terms, func(t corev1.NodeSelectorTerm) bool {
		if len(t.MatchExpressions)+len(t.MatchFields) == 0 {
			return false
		}
		for i := range t.MatchExpressions {
			value, ok := n.Labels[t.MatchExpressions[i].Key]
			if !matches(&t.MatchExpressions[i], value, ok) {
				return false
			}
		}
		for i := range t.MatchFields {
			if t.MatchFields[i].Key != "metadata.name" || !matches(&t.MatchFields[i], n.Name, true) {
				return false
			}
		}
		return true
	})
}

func matches(r *corev1.NodeSelectorRequirement, value string, present bool) bool {
	switch r.Operator {
	case corev1.NodeSelectorOpIn:
		return present && slices.Contains(r.Values, value)
	case corev1.NodeSelectorOpNotIn:
		return !present || !slices.Contains(r.Values, value)
	case corev1.NodeSelectorOpExists:
		return present
	case corev1.NodeSelectorOpDoesNotExist:
		return !present
	case corev1.NodeSelectorOpGt, corev1.NodeSelectorOpLt:
		have, err1 := strconv.ParseInt(value, 10, 64)
		if !present || err1 != nil || len(r.Values) != 1 {
			return false
		}
		limit, err2 := strconv.ParseInt(r.Values[0], 10, 64)
		if err2 != nil {
			return false
		}
		return r.Operator == corev1.NodeSelectorOpGt && have > limit || r.Operator == corev1.NodeSelectorOpLt && have < limit
	}
	return false
}
