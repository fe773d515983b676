package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/jsonpath"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// getter is one `decree get`.
type getter struct {
	env           *env
	client        *client.Client
	output        string
	all, watch    bool
	noHeaders     bool
	labels, field string
}

func getCmd(e *env) *cobra.Command {
	g := &getter{env: e}
	c := &cobra.Command{
		Use:   "get KIND [NAME...]",
		Short: "List objects",
		Example: `  decree get pods
  decree get deploy,svc -n shop -o wide
  decree get pod web-7d4b9c-x2x5k -o yaml
  decree get service hello -o jsonpath={.spec.clusterIP}
  decree get pods -A --watch
  decree get revisions                # who changed what, and what was refused`,
		Args:              kindArgs,
		ValidArgsFunction: completeObjects(e),
		RunE:              func(c *cobra.Command, args []string) error { return g.start(c.Context(), args) },
	}
	namespaceFlag(e, c)
	f := c.Flags()
	f.StringVarP(&g.output, "output", "o", "", "wide, name, json, yaml or jsonpath=TEMPLATE")
	f.BoolVarP(&g.all, "all-namespaces", "A", false, "objects of all namespaces")
	f.BoolVarP(&g.watch, "watch", "w", false, "print changes as they happen")
	f.BoolVar(&g.noHeaders, "no-headers", false, "no line of headers")
	f.BoolVar(&e.stale, "stale", false, "read what the server has at hand, also without a leader; says how old that may be")
	f.StringVarP(&g.labels, "selector", "l", "", "label selector, such as app=web")
	f.StringVar(&g.field, "field-selector", "", "field selector, such as status.phase=Running")
	return c
}

// start checks the command line, connects and prints.
func (g *getter) start(ctx context.Context, args []string) (err error) {
	ts, err := targets(args)
	if err != nil {
		return err
	}
	if err := g.check(ts); err != nil {
		return err
	}
	if g.client, err = g.env.client(); err != nil {
		return err
	}
	defer g.client.Close()
	if e := g.env; e.stale {
		defer func() {
			if lag := g.client.Lag(); lag != "" {
				fmt.Fprintf(e.Err, "decree: stale read: %s\n", lag)
			}
		}()
	}
	if g.output == "" || g.output == "wide" {
		return g.tables(ctx, ts)
	}
	return g.objects(ctx, ts)
}

// check finds what is wrong with the command line before a server is asked.
func (g *getter) check(ts []target) error {
	template, isPath := strings.CutPrefix(g.output, "jsonpath=")
	if isPath {
		if err := jsonpath.New("output").Parse(template); err != nil {
			return usageError{fmt.Errorf("-o %s: %w", g.output, err)}
		}
	} else if err := checkOutput(g.output, "wide", "name", "json", "yaml", "jsonpath=TEMPLATE"); err != nil {
		return err
	}
	named := len(ts[0].names) > 0
	namespaced := slices.ContainsFunc(ts, func(t target) bool { return t.kind.Namespaced })
	switch {
	case g.watch && (len(ts) > 1 || len(ts[0].names) > 1):
		return usageError{errors.New("--watch takes one kind and at most one name")}
	case g.watch && g.output != "" && g.output != "wide":
		return usageError{fmt.Errorf("--watch prints tables: leave out -o %s", g.output)}
	case named && g.all && namespaced:
		return usageError{errors.New("an object cannot be named across all namespaces: give its namespace with -n, not -A")}
	case named && (g.labels != "" || g.field != ""):
		return usageError{errors.New("names and selectors exclude each other")}
	}
	return nil
}

func (g *getter) options(k *api.Kind) client.ListOptions {
	o := client.ListOptions{LabelSelector: g.labels, FieldSelector: g.field}
	if k.Namespaced && !g.all {
		o.Namespace = g.env.namespace
	}
	return o
}

// tables prints what the server renders, one table for each kind. What cannot be
// read does not hide the rest.
func (g *getter) tables(ctx context.Context, ts []target) error {
	var errs []error
	printed := false
	for _, t := range ts {
		p := g.printer(t.kind)
		if len(ts) > 1 {
			p.prefix = singular(t.kind) + "/"
		}
		table, err := g.table(ctx, t)
		if err != nil {
			errs = append(errs, err)
		}
		if table != nil && len(table.Rows) > 0 {
			if printed {
				fmt.Fprintln(g.env.Out)
			}
			printed = true
			if err := p.print(table); err != nil {
				return err
			}
		}
		if g.watch && err == nil {
			return g.follow(ctx, t, p, table)
		}
	}
	if !printed && len(errs) == 0 {
		g.env.nothing("resources", ts[0].kind.Namespaced && !g.all)
	}
	return errors.Join(errs...)
}

// nothing says that nothing was found, in kubectl's words.
func (e *env) nothing(what string, namespaced bool) {
	if namespaced {
		fmt.Fprintf(e.Err, "No %s found in %s namespace.\n", what, e.namespace)
		return
	}
	fmt.Fprintf(e.Err, "No %s found.\n", what)
}

func (g *getter) printer(k *api.Kind) *tablePrinter {
	return &tablePrinter{out: g.env.Out, wide: g.output == "wide", namespace: g.all && k.Namespaced, noHeaders: g.noHeaders}
}

// table reads what a target asks for as one table; with an error, the part that
// could be read.
func (g *getter) table(ctx context.Context, t target) (*metav1.Table, error) {
	if len(t.names) == 0 {
		return g.client.Table(ctx, t.kind, "", g.options(t.kind), metav1.IncludeMetadata)
	}
	var all *metav1.Table
	var errs []error
	for _, name := range t.names {
		table, err := g.client.Table(ctx, t.kind, name, g.options(t.kind), metav1.IncludeMetadata)
		switch {
		case err != nil:
			errs = append(errs, err)
		case all == nil:
			all = table
		default:
			all.Rows = append(all.Rows, table.Rows...)
		}
	}
	return all, errors.Join(errs...)
}

// objects prints whole objects.
func (g *getter) objects(ctx context.Context, ts []target) error {
	var list []api.Object
	var errs []error
	for _, t := range ts {
		found, err := g.fetch(ctx, t)
		list, errs = append(list, found...), append(errs, err)
	}
	err := errors.Join(errs...)
	if single := len(ts) == 1 && len(ts[0].names) == 1; single {
		if err != nil {
			return err
		}
		return g.write(list, list[0])
	}
	return errors.Join(g.write(list, listOf(list)), err)
}

// write prints list by name, or value in another form.
func (g *getter) write(list []api.Object, value any) error {
	if g.output == "name" {
		for _, o := range list {
			fmt.Fprintf(g.env.Out, "%s/%s\n", singular(api.KindOf(o)), o.GetName())
		}
		return nil
	}
	template, ok := strings.CutPrefix(g.output, "jsonpath=")
	if !ok {
		return g.env.writeValue(value, g.output)
	}
	raw, err := json.Marshal(value)
	if err != nil {
		return err
	}
	var data any
	if err := json.Unmarshal(raw, &data); err != nil {
		return err
	}
	jp := jsonpath.New("output").AllowMissingKeys(true)
	if err := jp.Parse(template); err != nil {
		return err
	}
	return jp.Execute(g.env.Out, data)
}

// singular is a kind as kubectl prints it before a name: "deployment.apps".
func singular(k *api.Kind) string {
	if k.Group == "" {
		return k.Singular
	}
	return k.Singular + "." + k.Group
}

// fetch reads what a target asks for; with an error, the part that could be read.
func (g *getter) fetch(ctx context.Context, t target) ([]api.Object, error) {
	o := g.options(t.kind)
	if len(t.names) == 0 {
		list, _, err := g.client.ListObjects(ctx, t.kind, o)
		return list, err
	}
	var list []api.Object
	var errs []error
	for _, name := range t.names {
		obj, err := g.client.GetObject(ctx, t.kind, o.Namespace, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, obj)
	}
	return list, errors.Join(errs...)
}
