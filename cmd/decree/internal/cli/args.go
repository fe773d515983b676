package cli

import (
	"fmt"
	"slices"
	"strings"

	"decree.dev/decree/schemas/api"
)

// target is what a looking verb was asked for: a kind, and names of objects (none:
// all of them).
type target struct {
	kind  *api.Kind
	names []string
}

// targets reads the arguments of get and describe as kubectl does: "pods",
// "pods web", "deploy,svc", "deployment/web service/web".
func targets(args []string) ([]target, error) {
	if strings.Contains(args[0], "/") {
		var list []target
		for _, arg := range args {
			word, name, ok := strings.Cut(arg, "/")
			if !ok || name == "" {
				return nil, usageError{fmt.Errorf("%q: expected KIND/NAME like the arguments before it", arg)}
			}
			k, err := kindNamed(word)
			if err != nil {
				return nil, err
			}
			list = append(list, target{k, []string{name}})
		}
		return list, nil
	}
	words := strings.Split(args[0], ",")
	if args[0] == "all" {
		words = []string{"pods", "services", "deployments", "replicasets"}
	}
	var list []target
	for _, word := range words {
		k, err := kindNamed(word)
		if err != nil {
			return nil, err
		}
		list = append(list, target{k, args[1:]})
	}
	return list, nil
}

// kindNamed finds a kind by plural, singular, short name, or plural with group.
func kindNamed(word string) (*api.Kind, error) {
	w := strings.ToLower(word)
	var known []string
	for _, k := range api.Kinds() {
		if w == k.Plural || w == k.Singular || w == string(k.Resource) || slices.Contains(k.ShortNames, w) {
			return k, nil
		}
		known = append(known, k.Plural)
	}
	slices.Sort(known)
	return nil, usageError{fmt.Errorf("no kind is called %q; there are: %s", word, strings.Join(known, ", "))}
}

// completeKinds offers kinds to the shell.
func completeKinds(prefix string) []string {
	var list []string
	for _, k := range api.Kinds() {
		if strings.HasPrefix(k.Plural, prefix) {
			list = append(list, k.Plural)
		}
	}
	return list
}
