// Package rules judges what takes more than one field of an object, or arithmetic:
// names that must differ, references inside an object, exactly one of several
// fields, quantities. What one field alone may hold is said by the CUE definitions
// in package schemas; objects that come here fit them.
//
// It is pure. It says what is wrong as data, and does not know where the object is
// written.
package rules

import (
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/schemas/api"
)

// Problem is one thing wrong with an object.
type Problem struct {
	Field    string // "spec.template.spec.containers[0].name"
	Message  string
	Expected string
	Found    string
	Hint     string
}

// Check returns all problems of o, which it does not change, in a fixed order.
func Check(o api.Object) []Problem {
	j := &judge{}
	if k := api.KindOf(o); !k.Namespaced && o.GetNamespace() != "" {
		j.add(Problem{Field: "metadata.namespace", Message: fmt.Sprintf("a %s has no namespace", k.Kind), Hint: "remove the field"})
	}
	switch o := o.(type) {
	case *corev1.Pod:
		j.pod("spec", &o.Spec)
		j.bandwidth("metadata.annotations", o.Annotations)
	case *appsv1.Deployment:
		j.deployment(o)
	case *appsv1.ReplicaSet:
		j.template(&o.Spec.Template, o.Spec.Selector)
	case *corev1.Service:
		j.service(&o.Spec)
		j.scheduler(o.Annotations)
	case *corev1.ConfigMap:
		j.configMap(o)
	case *corev1.Secret:
		j.secret(o)
	case *networkingv1.NetworkPolicy:
		j.networkPolicy(&o.Spec)
	case *networkingv1.Ingress:
		j.ingress(o)
	case *networkingv1.IngressClass:
		j.ingressClass(o)
	case *api.Source:
		j.source(&o.Spec)
	case *api.AddressPool:
		j.pool(&o.Spec)
	}
	return j.problems
}

// judge collects problems.
type judge struct{ problems []Problem }

func (j *judge) add(p Problem) { j.problems = append(j.problems, p) }

// unique reports every name that an earlier one has already. Names that are empty
// are not compared.
func (j *judge) unique(message string, at func(int) string, names []string) {
	first := map[string]int{}
	for i, name := range names {
		if name == "" {
			continue
		}
		if k, ok := first[name]; ok {
			j.add(Problem{Field: at(i), Message: message, Found: fmt.Sprintf("%q, also at %s", name, at(k))})
			continue
		}
		first[name] = i
	}
}

// choice is one of several fields of which one must be there.
type choice struct {
	name string
	set  bool
}

// exactlyOne reports unless one of the choices is made.
func (j *judge) exactlyOne(field, message string, choices ...choice) {
	var all, set []string
	for _, c := range choices {
		all = append(all, c.name)
		if c.set {
			set = append(set, c.name)
		}
	}
	switch {
	case len(set) == 0:
		j.add(Problem{Field: field, Message: message, Expected: "one of " + strings.Join(all, ", "), Found: "none"})
	case len(set) > 1:
		j.add(Problem{Field: field, Message: message, Expected: "one of " + strings.Join(all, ", "), Found: strings.Join(set, " and ")})
	}
}

// oneOf reports a reference to a name that does not exist.
func (j *judge) oneOf(field, message, name string, names []string) {
	if slices.Contains(names, name) {
		return
	}
	expected := ""
	if len(names) > 0 {
		expected = "one of " + strings.Join(quoted(names), ", ")
	}
	j.add(Problem{Field: field, Message: message, Expected: expected, Found: fmt.Sprintf("%q", name)})
}

func quoted(names []string) []string {
	var list []string
	for _, n := range slices.Compact(slices.Sorted(slices.Values(names))) {
		list = append(list, fmt.Sprintf("%q", n))
	}
	return list
}

// item is the path of an element: spec.volumes[3].name.
func item(list string, i int, rest string) string { return fmt.Sprintf("%s[%d]%s", list, i, rest) }
