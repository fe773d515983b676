package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// follow prints one line for every change after table, until the user has seen
// enough.
func (g *getter) follow(ctx context.Context, t target, p *tablePrinter, table *metav1.Table) error {
	after, err := strconv.ParseUint(table.ResourceVersion, 10, 64)
	if err != nil {
		return fmt.Errorf("watch: revision of the table: %w", err)
	}
	o := g.options(t.kind)
	if len(t.names) > 0 {
		o.FieldSelector = "metadata.name=" + t.names[0]
	}
	defs := table.ColumnDefinitions
	return g.env.changes(ctx, g.client, t.kind, client.WatchOptions{ListOptions: o, After: after}, func(ev client.Event) error {
		if ev.Type == watch.Deleted {
			_, err := fmt.Fprintf(g.env.Out, "%s deleted\n", api.KeyOf(ev.Object))
			return err
		}
		row := tableRow(t.kind, defs, ev.Object, now())
		return p.print(&metav1.Table{ColumnDefinitions: defs, Rows: []metav1.TableRow{row}})
	})
}

// changes hands every change behind o.After to f, over the ends of connections,
// until ctx ends (no error), f fails or the server stays away.
func (e *env) changes(ctx context.Context, c *client.Client, k *api.Kind, o client.WatchOptions, f func(client.Event) error) error {
	const patience = 5
	failures := 0
	for {
		var broken error
		for ev, err := range c.WatchObjects(ctx, k, o) {
			if ctx.Err() != nil {
				return nil
			}
			if broken = err; err != nil {
				break
			}
			failures, o.After = 0, max(o.After, ev.Revision)
			if ev.Type == watch.Bookmark {
				continue
			}
			if err := f(ev); err != nil {
				return err
			}
		}
		if errors.Is(broken, client.ErrExpired) {
			return fmt.Errorf("changes were missed, start again: %w", broken)
		}
		if failures++; broken != nil && failures > patience {
			return broken
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Duration(failures) * 200 * time.Millisecond):
		}
	}
}

// tableRow renders an object as the server would, in the server's columns.
func tableRow(k *api.Kind, defs []metav1.TableColumnDefinition, o api.Object, now time.Time) metav1.TableRow {
	var row metav1.TableRow
	for _, d := range defs {
		i := slices.IndexFunc(k.Columns, func(c api.Column) bool { return c.Name == d.Name })
		switch {
		case i >= 0:
			row.Cells = append(row.Cells, k.Columns[i].Value(o, now))
		case d.Format == "name":
			row.Cells = append(row.Cells, o.GetName())
		default:
			row.Cells = append(row.Cells, "<unknown>")
		}
	}
	row.Object.Object = o
	return row
}
