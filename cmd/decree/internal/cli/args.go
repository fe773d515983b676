package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/raftstore/client"
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
	for _, name := range args[1:] {
		if strings.Contains(name, "/") {
			return nil, usageError{fmt.Errorf("%q: with KIND/NAME leave out %q before it", name, args[0])}
		}
	}
	words := strings.Split(args[0], ",")
	if len(words) > 1 && len(args) > 1 {
		return nil, usageError{fmt.Errorf("names of which kind? write KIND/NAME, such as %s/%s", words[0], args[1])}
	}
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

// kindNamed finds a kind by plural, singular or short name, and with its group.
func kindNamed(word string) (*api.Kind, error) {
	w := strings.ToLower(word)
	for _, k := range api.Served() {
		if w == k.Plural || w == k.Singular || w == string(k.Resource) || w == singular(k) || slices.Contains(k.ShortNames, w) {
			return k, nil
		}
	}
	return nil, usageError{fmt.Errorf("no kind is called %q; there are: %s", word, strings.Join(plurals(), ", "))}
}

// kindArgs are the arguments of verbs that look at objects: at least a kind.
func kindArgs(_ *cobra.Command, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("which kind? there are: %s", strings.Join(plurals(), ", "))
	}
	return nil
}

func plurals() []string {
	var list []string
	for _, k := range api.Served() {
		list = append(list, k.Plural)
	}
	slices.Sort(list)
	return list
}

type completion = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// completeObjects offers kinds, and then names of that kind, to the shell.
func completeObjects(e *env) completion {
	return func(c *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 0 {
			return startingWith(plurals(), prefix), cobra.ShellCompDirectiveNoFileComp
		}
		k, err := kindNamed(args[0])
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return e.completeNames(c, k, args[1:], prefix)
	}
}

// completePod offers names of pods for the first argument.
func completePod(e *env) completion {
	return func(c *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		k, _ := api.KindFor(api.Pods)
		return e.completeNames(c, k, nil, prefix)
	}
}

// completeNames asks the cluster for names; without one there are none.
func (e *env) completeNames(c *cobra.Command, k *api.Kind, given []string, prefix string) ([]string, cobra.ShellCompDirective) {
	cl, err := e.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(c.Context(), 2*time.Second)
	defer cancel()
	o := client.ListOptions{}
	if k.Namespaced {
		o.Namespace = e.namespace
	}
	objects, _, err := cl.ListObjects(ctx, k, o)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, o := range objects {
		if !slices.Contains(given, o.GetName()) {
			names = append(names, o.GetName())
		}
	}
	return startingWith(names, prefix), cobra.ShellCompDirectiveNoFileComp
}

func startingWith(words []string, prefix string) []string {
	return slices.DeleteFunc(words, func(w string) bool { return !strings.HasPrefix(w, prefix) })
}
