package cli

import (
	"context"

	"github.com/spf13/cobra"

	"decree.dev/decree/raftstore/client"
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
	var output string
	list := &cobra.Command{
		Use: "list", Short: "List the repositories that this cluster follows", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			g := &getter{env: e, output: output}
			ts, err := targets([]string{"sources"})
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
	list.Flags().StringVarP(&output, "output", "o", "", "wide, name, json or yaml")
	var reason string
	suspend := sourceAction(e, "suspend", "Stop following a source; what runs goes on", func(ctx context.Context, c *client.Client, name string) error {
		return c.SuspendSource(ctx, name, reason)
	})
	suspend.Flags().StringVar(&reason, "reason", "", "why, for others to read")
	c.AddCommand(list, suspend,
		sourceAction(e, "sync", "Fetch a source now, ahead of its interval", func(ctx context.Context, c *client.Client, name string) error {
			return c.SyncSource(ctx, name)
		}),
		sourceAction(e, "resume", "Follow a suspended source again", func(ctx context.Context, c *client.Client, name string) error {
			return c.ResumeSource(ctx, name)
		}))
	return c
}

// sourceAction is one of the operator's verbs on a source.
func sourceAction(e *env, verb, short string, act func(context.Context, *client.Client, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb + " SOURCE", Short: short, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			defer cl.Close()
			return act(c.Context(), cl, args[0])
		},
	}
}
