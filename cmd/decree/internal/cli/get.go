package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
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
  decree get pods -A --watch`,
		Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: func(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return completeKinds(prefix), cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) (err error) {
			ts, err := targets(args)
			if err != nil {
				return err
			}
			if g.client, err = e.client(); err != nil {
				return err
			}
			defer g.client.Close()
			return g.run(c.Context(), ts)
		},
	}
	namespaceFlag(e, c)
	f := c.Flags()
	f.StringVarP(&g.output, "output", "o", "", "wide, name, json, yaml or jsonpath=TEMPLATE")
	f.BoolVarP(&g.all, "all-namespaces", "A", false, "objects of all namespaces")
	f.BoolVarP(&g.watch, "watch", "w", false, "print changes as they happen")
	f.BoolVar(&g.noHeaders, "no-headers", false, "no line of headers")
	f.StringVarP(&g.labels, "selector", "l", "", "label selector, such as app=web")
	f.StringVar(&g.field, "field-selector", "", "field selector, such as status.phase=Running")
	return c
}

func (g *getter) run(ctx context.Context, ts []target) error {
	if g.watch && (len(ts) > 1 || len(ts[0].names) > 1) {
		return usageError{fmt.Errorf("--watch takes one kind and at most one name")}
	}
	switch {
	case g.output == "" || g.output == "wide":
		return g.tables(ctx, ts)
	case g.output == "name" || g.output == "json" || g.output == "yaml" || strings.HasPrefix(g.output, "jsonpath="):
		return g.objects(ctx, ts)
	}
	return usageError{fmt.Errorf("-o %q: expected wide, name, json, yaml or jsonpath=TEMPLATE", g.output)}
}

func (g *getter) options(k *api.Kind) client.ListOptions {
	o := client.ListOptions{LabelSelector: g.labels, FieldSelector: g.field}
	if k.Namespaced && !g.all {
		o.Namespace = g.env.namespace
	}
	return o
}

// tables prints what the server renders, one table for each kind.
func (g *getter) tables(ctx context.Context, ts []target) error {
	empty := true
	for i, t := range ts {
		p := g.printer(t.kind)
		if len(ts) > 1 {
			p.prefix = strings.ToLower(t.kind.Kind) + "/"
			if t.kind.Group != "" {
				p.prefix = strings.ToLower(t.kind.Kind) + "." + t.kind.Group + "/"
			}
		}
		rows, err := g.table(ctx, t, p, i > 0 && !empty)
		if err != nil {
			return err
		}
		empty = empty && rows == 0
	}
	if empty && !g.watch {
		where := "in namespace " + g.env.namespace
		if g.all || !ts[0].kind.Namespaced {
			where = "in the cluster"
		}
		fmt.Fprintf(g.env.Err, "none %s\n", where)
	}
	if g.watch {
		return g.follow(ctx, ts[0])
	}
	return nil
}

func (g *getter) printer(k *api.Kind) *tablePrinter {
	return &tablePrinter{out: g.env.Out, wide: g.output == "wide", namespace: g.all && k.Namespaced, noHeaders: g.noHeaders}
}

func (g *getter) table(ctx context.Context, t target, p *tablePrinter, blank bool) (rows int, err error) {
	names := t.names
	if len(names) == 0 {
		names = []string{""}
	}
	for _, name := range names {
		table, err := g.client.Table(ctx, t.kind, name, g.options(t.kind), metav1.IncludeMetadata)
		if err != nil {
			return rows, err
		}
		if len(table.Rows) == 0 {
			continue
		}
		if blank {
			fmt.Fprintln(g.env.Out)
			blank = false
		}
		rows += len(table.Rows)
		if err := p.print(table); err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// follow prints one line for every change until the user has seen enough.
func (g *getter) follow(ctx context.Context, t target) error {
	p := g.printer(t.kind)
	p.headed = true
	o := client.WatchOptions{ListOptions: g.options(t.kind)}
	for ev, err := range g.client.WatchObjects(ctx, t.kind, o) {
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if ev.Initial || ev.Type == watch.Bookmark || (len(t.names) > 0 && ev.Object.GetName() != t.names[0]) {
			continue
		}
		if ev.Type == watch.Deleted {
			fmt.Fprintf(g.env.Out, "%s deleted\n", api.KeyOf(ev.Object))
			continue
		}
		o := g.options(t.kind)
		o.Namespace = ev.Object.GetNamespace()
		table, err := g.client.Table(ctx, t.kind, ev.Object.GetName(), o, metav1.IncludeMetadata)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		if err := p.print(table); err != nil {
			return err
		}
	}
	return nil
}

// objects prints whole objects.
func (g *getter) objects(ctx context.Context, ts []target) error {
	if g.watch {
		return usageError{fmt.Errorf("--watch prints tables: leave out -o %s", g.output)}
	}
	var list []api.Object
	single := len(ts) == 1 && len(ts[0].names) == 1
	for _, t := range ts {
		found, err := g.fetch(ctx, t)
		if err != nil {
			return err
		}
		list = append(list, found...)
	}
	switch {
	case g.output == "name":
		for _, o := range list {
			fmt.Fprintf(g.env.Out, "%s/%s\n", singular(api.KindOf(o)), o.GetName())
		}
		return nil
	case strings.HasPrefix(g.output, "jsonpath="):
		return g.jsonpath(list, single)
	case single:
		return g.env.writeObjects(list, g.output)
	case g.output == "json":
		enc := json.NewEncoder(g.env.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(map[string]any{"apiVersion": "v1", "kind": "List", "items": slices.Concat([]api.Object{}, list)})
	}
	return g.env.writeObjects(list, g.output)
}

// singular is a kind as kubectl prints it before a name: "deployment.apps".
func singular(k *api.Kind) string {
	if k.Group == "" {
		return k.Singular
	}
	return k.Singular + "." + k.Group
}

func (g *getter) fetch(ctx context.Context, t target) ([]api.Object, error) {
	o := g.options(t.kind)
	if len(t.names) == 0 {
		list, _, err := g.client.ListObjects(ctx, t.kind, o)
		return list, err
	}
	var list []api.Object
	for _, name := range t.names {
		obj, err := g.client.GetObject(ctx, t.kind, o.Namespace, name)
		if err != nil {
			return nil, err
		}
		list = append(list, obj)
	}
	return list, nil
}

func (g *getter) jsonpath(list []api.Object, single bool) error {
	template := strings.TrimPrefix(g.output, "jsonpath=")
	jp := jsonpath.New("output").AllowMissingKeys(true)
	if err := jp.Parse(template); err != nil {
		return usageError{fmt.Errorf("-o %s: %w", g.output, err)}
	}
	var data any
	raw, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": list})
	if single {
		raw, err = json.Marshal(list[0])
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &data); err != nil {
		return err
	}
	return jp.Execute(g.env.Out, data)
}

func describeCmd(e *env) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:   "describe KIND [NAME...]",
		Short: "Show objects with their origin in Git, their state and what happened to them",
		Example: `  decree describe pod web-7d4b9c-x2x5k
  decree describe deployments -n shop`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			ts, err := targets(args)
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			g := &getter{env: e, client: cl, all: all}
			return g.describe(c.Context(), ts)
		},
	}
	namespaceFlag(e, c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "objects of all namespaces")
	return c
}

func (g *getter) describe(ctx context.Context, ts []target) error {
	first := true
	for _, t := range ts {
		list, err := g.fetch(ctx, t)
		if err != nil {
			return err
		}
		for _, o := range list {
			events, err := eventsOf(ctx, g.client, o)
			if err != nil {
				return err
			}
			if !first {
				fmt.Fprintln(g.env.Out)
			}
			first = false
			if err := describe(g.env.Out, o, events, now()); err != nil {
				return err
			}
		}
	}
	if first {
		fmt.Fprintln(g.env.Err, "none")
	}
	return nil
}

// eventsOf returns what happened to one object, oldest first.
func eventsOf(ctx context.Context, c *client.Client, o api.Object) ([]*corev1.Event, error) {
	ns := cmp.Or(o.GetNamespace(), "default")
	list, _, err := client.List[*corev1.Event](ctx, c, client.ListOptions{
		Namespace:     ns,
		FieldSelector: "involvedObject.kind=" + api.KindOf(o).Kind + ",involvedObject.name=" + o.GetName(),
	})
	if err != nil {
		return nil, err
	}
	sortEvents(list)
	return list, nil
}

func sortEvents(list []*corev1.Event) {
	slices.SortStableFunc(list, func(a, b *corev1.Event) int { return lastSeen(a).Compare(lastSeen(b)) })
}
