package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/apimachinery/pkg/watch"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

// now is the clock of everything that prints ages.
func now() time.Time { return time.Now() }

func eventsCmd(e *env) *cobra.Command {
	var all, follow bool
	var output string
	c := &cobra.Command{
		Use:   "events",
		Short: "Show what happened in the last hour, oldest first",
		Example: `  decree events
  decree events -A --watch
  decree events -o json | jq '.items[] | select(.type == "Warning")'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output, "json", "yaml"); err != nil {
				return err
			}
			if follow && output != "" {
				return usageError{fmt.Errorf("--watch prints lines: leave out -o %s", output)}
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			return e.events(c.Context(), cl, all, follow, output)
		},
	}
	namespaceFlag(e, c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "events of all namespaces")
	c.Flags().BoolVarP(&follow, "watch", "w", false, "go on and print what happens")
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml")
	return c
}

func (e *env) events(ctx context.Context, cl *client.Client, all, follow bool, output string) error {
	o := client.ListOptions{Namespace: e.namespace}
	if all {
		o.Namespace = ""
	}
	list, revision, err := client.List[*corev1.Event](ctx, cl, o)
	if err != nil {
		return err
	}
	sortEvents(list)
	if output != "" {
		objects := make([]api.Object, len(list))
		for i := range list {
			objects[i] = list[i]
		}
		return e.writeValue(listOf(objects), output)
	}
	p := &tablePrinter{out: e.Out, namespace: all}
	if len(list) > 0 {
		if err := p.print(eventTable(list)); err != nil {
			return err
		}
	} else if !follow {
		e.nothing("events", !all)
	}
	if !follow {
		return nil
	}
	kind, _ := api.KindFor(api.Events)
	return e.changes(ctx, cl, kind, client.WatchOptions{ListOptions: o, After: revision}, func(ev client.Event) error {
		if ev.Type == watch.Deleted {
			return nil // an hour has passed
		}
		return p.print(eventTable([]*corev1.Event{ev.Object.(*corev1.Event)}))
	})
}

// eventTable is the table of events, with how often each happened.
func eventTable(list []*corev1.Event) *metav1.Table {
	t := &metav1.Table{}
	for _, name := range []string{"Last Seen", "Type", "Reason", "Object", "Message"} {
		t.ColumnDefinitions = append(t.ColumnDefinitions, metav1.TableColumnDefinition{Name: name, Type: "string"})
	}
	for _, ev := range list {
		row := metav1.TableRow{Cells: []any{
			eventAge(ev, now()), ev.Type, ev.Reason,
			strings.ToLower(ev.InvolvedObject.Kind) + "/" + ev.InvolvedObject.Name, strings.TrimSpace(ev.Message),
		}}
		row.Object.Object = ev
		t.Rows = append(t.Rows, row)
	}
	return t
}

// eventAge is "5s", or "5s (x3 over 2m)" for what happened more than once.
func eventAge(ev *corev1.Event, now time.Time) string {
	text := age(lastSeen(ev), now)
	if ev.Count > 1 {
		text += fmt.Sprintf(" (x%d over %s)", ev.Count, age(ev.FirstTimestamp.Time, now))
	}
	return text
}

// age is how long ago t was.
func age(t, now time.Time) string {
	if t.IsZero() {
		return "<unknown>"
	}
	return duration.HumanDuration(max(0, now.Sub(t)))
}

// sortEvents puts the oldest first; what happened in the same second is told in the
// order in which it became known.
func sortEvents(list []*corev1.Event) {
	slices.SortStableFunc(list, func(a, b *corev1.Event) int {
		return cmp.Or(lastSeen(a).Compare(lastSeen(b)), cmp.Compare(api.RevisionOf(a), api.RevisionOf(b)))
	})
}

func lastSeen(ev *corev1.Event) time.Time {
	switch {
	case !ev.LastTimestamp.IsZero():
		return ev.LastTimestamp.Time
	case !ev.EventTime.IsZero():
		return ev.EventTime.Time
	}
	return ev.CreationTimestamp.Time
}

func eventSource(ev *corev1.Event) string {
	if ev.Source.Component != "" {
		return ev.Source.Component
	}
	return ev.ReportingController
}
