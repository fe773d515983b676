package cli

import (
	"fmt"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
)

func tokenCmd(e *env) *cobra.Command {
	var output, role, node string
	var ttl time.Duration
	c := &cobra.Command{
		Use: "token", Short: "Make, list and revoke the tokens that machines join with",
		Example: `  decree token create --role agent
  decree token list`,
	}
	c.PersistentFlags().StringVarP(&output, "output", "o", "", "json for everything")
	create := &cobra.Command{
		Use: "create", Short: "Make a token: it is shown once", Args: cobra.NoArgs,
		Long: `Create makes a token that machines join with until it expires. The token carries the
fingerprint of the cluster's CA: a machine that joins checks whom it speaks to before it
sends anything secret. With --node it admits that one name only, and may take the name
over from a machine that lost its disk.`,
		Example: `  decree token create --role server --ttl 15m
  decree token create --role agent --node n3   # n3 has a new disk`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			var t daemon.Token
			if err := e.ask(c.Context(), http.MethodPost, "tokens", nil, daemon.TokenRequest{Role: role, TTL: ttl, Node: node}, &t); err != nil {
				return err
			}
			if output == "json" {
				return e.writeJSON(t)
			}
			_, err := fmt.Fprintln(e.Out, t.Text)
			return err
		},
	}
	create.Flags().StringVar(&role, "role", "", "server or agent")
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it admits")
	create.Flags().StringVar(&node, "node", "", "the only name that it admits")
	_ = create.MarkFlagRequired("role") // the flag exists
	list := &cobra.Command{
		Use: "list", Short: "Show the tokens that admit now, without their secrets", Args: cobra.NoArgs, Example: "  decree token list",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			var rows []daemon.Token
			if err := e.ask(c.Context(), http.MethodGet, "tokens", nil, nil, &rows); err != nil {
				return err
			}
			if output == "json" {
				return e.writeJSON(rows)
			}
			w := tabwriter.NewWriter(e.Out, 0, 0, 3, ' ', 0)
			fmt.Fprintln(w, "ID\tROLE\tNODE\tEXPIRES\tBY")
			for _, t := range rows {
				fmt.Fprintf(w, "%s\t%s\t%s\tin %s\t%s\n", t.ID, t.Role, dash(t.Node), time.Until(t.Expires.Time).Round(time.Second), dash(t.By))
			}
			return w.Flush()
		},
	}
	revoke := &cobra.Command{
		Use: "revoke ID", Short: "End a token at once", Args: cobra.ExactArgs(1), Example: "  decree token revoke 4f2a1c",
		RunE: func(c *cobra.Command, args []string) error {
			return e.ask(c.Context(), http.MethodDelete, "tokens/"+url.PathEscape(args[0]), nil, nil, nil)
		},
	}
	c.AddCommand(create, list, revoke)
	return c
}

func caCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use: "ca", Short: "Show the cluster's certificate authority, or replace it while the cluster runs",
		Example: `  decree ca show
  decree ca rotate`,
	}
	c.PersistentFlags().StringVarP(&output, "output", "o", "", "json for everything")
	verb := func(use, short, long, method string) *cobra.Command {
		return askVerb(e, &output, "ca", use, short, long, method, e.printCA)
	}
	c.AddCommand(
		verb("show", "Show which CAs are trusted, which one signs, and what a rotation waits for", "", http.MethodGet),
		verb("rotate", "Make a new CA and change over to it step by step", `Rotate makes a new CA. The cluster changes over to it by itself: all learn to trust it,
then it signs, then everybody gets a new certificate, and a day later at the earliest
(--ca-overlap of the servers) the old one is given up. Kubeconfigs that were copied to
other machines must be copied again within that day. decree ca show says how far it is.`, http.MethodPost))
	return c
}

func (e *env) printCA(s *daemon.CAStatus) error {
	w := tabwriter.NewWriter(e.Out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "FINGERPRINT\tSIGNS\tSINCE\tMACHINES")
	for _, ca := range s.CAs {
		fmt.Fprintf(w, "%.16s\t%v\t%s\t%d\n", ca.Fingerprint, ca.Active, ca.Since.UTC().Format(time.RFC3339), ca.Machines)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(e.Out, "rotation: %s\n", s.Stage)
	for _, x := range s.Waiting {
		fmt.Fprintf(e.Out, "  waits for %s\n", x)
	}
	return nil
}

func keysCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use: "keys", Short: "Show the keys that the servers' disks are encrypted with, or replace them",
		Example: `  decree keys show
  decree keys rotate`,
	}
	c.PersistentFlags().StringVarP(&output, "output", "o", "", "json for everything")
	verb := func(use, short, long, method string) *cobra.Command {
		return askVerb(e, &output, "keys", use, short, long, method, e.printKeys)
	}
	c.AddCommand(
		verb("show", "Show which key epoch each server writes with", "", http.MethodGet),
		verb("rotate", "Have every server encrypt its disk with a new key", `Rotate asks every server for a new key. What is written from then on, log and snapshots,
is encrypted with it; each server takes a snapshot at once, so that its old log can go.
An old key is forgotten when nothing on the disk needs it any more.`, http.MethodPost))
	return c
}

func (e *env) printKeys(s *daemon.KeyStatus) error {
	w := tabwriter.NewWriter(e.Out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NODE\tEPOCH\tWANTED")
	for _, k := range s.Servers {
		fmt.Fprintf(w, "%s\t%d\t%d\n", k.Node, k.Epoch, s.Epoch)
	}
	return w.Flush()
}

// askVerb is a verb that asks about a part of the cluster, or acts on it, and prints how
// it stands then.
func askVerb[T any](e *env, output *string, part, use, short, long, method string, show func(*T) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.NoArgs, Example: "  decree " + part + " " + use,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(*output, "json"); err != nil {
				return err
			}
			var s T
			if err := e.ask(c.Context(), method, part, nil, nil, &s); err != nil {
				return err
			}
			if *output == "json" {
				return e.writeJSON(s)
			}
			return show(&s)
		},
	}
}
