package cli

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
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
  decree events -A --watch`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			o := client.ListOptions{Namespace: e.namespace}
			if all {
				o.Namespace = ""
			}
			list, revision, err := client.List[*corev1.Event](c.Context(), cl, o)
			if err != nil {
				return err
			}
			sortEvents(list)
			if output != "" {
				if output != "json" && output != "yaml" {
					return usageError{fmt.Errorf("-o %q: expected json or yaml", output)}
				}
				objects := make([]api.Object, len(list))
				for i := range list {
					objects[i] = list[i]
				}
				return e.writeObjects(objects, output)
			}
			w := tabwriter.NewWriter(e.Out, 6, 8, 3, ' ', 0)
			fmt.Fprintln(w, "LAST SEEN\tTYPE\tREASON\tOBJECT\tMESSAGE")
			for _, ev := range list {
				eventLine(w, ev)
			}
			if err := w.Flush(); err != nil || !follow {
				return err
			}
			kind, _ := api.KindFor(api.Events)
			for ev, err := range cl.WatchObjects(c.Context(), kind, client.WatchOptions{ListOptions: o, After: revision}) {
				if c.Context().Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				if ev.Type == watch.Added || ev.Type == watch.Modified {
					eventLine(w, ev.Object.(*corev1.Event))
					if err := w.Flush(); err != nil {
						return err
					}
				}
			}
			return nil
		},
	}
	namespaceFlag(e, c)
	c.Flags().BoolVarP(&all, "all-namespaces", "A", false, "events of all namespaces")
	c.Flags().BoolVarP(&follow, "watch", "w", false, "go on and print what happens")
	c.Flags().StringVarP(&output, "output", "o", "", "json or yaml")
	return c
}

func eventLine(w *tabwriter.Writer, ev *corev1.Event) {
	seen := duration.HumanDuration(now().Sub(lastSeen(ev)))
	if ev.Count > 1 {
		seen += fmt.Sprintf(" (x%d)", ev.Count)
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s/%s\t%s\n", seen, ev.Type, ev.Reason,
		strings.ToLower(ev.InvolvedObject.Kind), ev.InvolvedObject.Name, strings.TrimSpace(ev.Message))
}
