package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"decree.dev/decree/raftstore/client"
	"decree.dev/decree/schemas/api"
)

func sourceCmd(e *env) *cobra.Command {
	c := &cobra.Command{
		Use:   "source",
		Short: "Look at sources, fetch one now, or hold it back",
		Example: `  decree source list
  decree source sync shop
  decree source suspend shop --reason 'migration until noon'
  decree source resume shop`,
	}
	g := &getter{env: e}
	list := &cobra.Command{
		Use: "list", Short: "List the repositories that this cluster follows", Args: cobra.NoArgs,
		Example: "  decree source list\n  decree source list -o json | jq -r '.items[].status.applied'",
		RunE:    func(c *cobra.Command, _ []string) error { return g.start(c.Context(), []string{"sources"}) },
	}
	list.Flags().StringVarP(&g.output, "output", "o", "", "wide, name, json, yaml or jsonpath=TEMPLATE")
	var reason string
	suspend := sourceAction(e, "suspend", "is suspended", "Stop following a source, and refuse pushes to it; what runs goes on", func(ctx context.Context, c *client.Client, name string) error {
		return c.SuspendSource(ctx, name, reason)
	})
	suspend.Flags().StringVar(&reason, "reason", "", "why, for others to read")
	c.AddCommand(list, suspend,
		sourceAction(e, "sync", "is fetched now: see decree status", "Fetch a source now, ahead of its interval", func(ctx context.Context, c *client.Client, name string) error {
			return c.SyncSource(ctx, name)
		}),
		sourceAction(e, "resume", "is followed again", "Follow a suspended source again", func(ctx context.Context, c *client.Client, name string) error {
			return c.ResumeSource(ctx, name)
		}))
	return c
}

// sourceAction is one of the operator's verbs on a source.
func sourceAction(e *env, verb, said, short string, act func(context.Context, *client.Client, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " SOURCE", Short: short, Args: cobra.ExactArgs(1),
		Example: "  decree source " + verb + " shop",
		ValidArgsFunction: func(c *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			k, _ := api.KindFor(api.Sources)
			return e.completeNames(c, k, nil, prefix)
		},
		RunE: func(c *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			if err := act(c.Context(), cl, args[0]); err != nil {
				return err
			}
			_, err = fmt.Fprintf(e.Out, "source %q %s\n", args[0], said)
			return err
		},
	}
}
