package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/raftstore/membership"
)

// ask sends a request about the cluster itself, and decodes the answer into out unless
// that is nil.
func (e *env) ask(ctx context.Context, method, path string, query url.Values, in, out any) error {
	cl, err := e.client()
	if err != nil {
		return err
	}
	defer cl.Close()
	var body []byte
	if in != nil {
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	data, err := cl.Raw(ctx, method, "/decree/v1/"+path, query, "application/json", body)
	if err != nil || out == nil {
		return err
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("read the server's answer: %w", err)
	}
	return nil
}

func membersCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "members",
		Short: "Show the servers of the cluster, remove one, or let another one lead",
		Example: `  decree members
  decree members remove s3
  decree members lead s2`,
	}
	list := &cobra.Command{
		Use: "list", Short: "Show the servers: role, site, state, last contact, how far behind", Args: cobra.NoArgs,
		Example: "  decree members list -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			var rows []membership.Server
			if err := e.ask(c.Context(), http.MethodGet, "members", nil, nil, &rows); err != nil {
				return err
			}
			if output == "json" {
				return e.writeJSON(rows)
			}
			return e.printMembers(rows)
		},
	}
	c.RunE = list.RunE
	c.PersistentFlags().StringVarP(&output, "output", "o", "", "json for everything")
	c.AddCommand(list,
		&cobra.Command{
			Use: "remove NAME", Short: "Take a server out of the cluster for good", Args: cobra.ExactArgs(1),
			Long: `Remove takes a server, named by its node or its id, out of the cluster. It cannot
come back by itself: that needs a new token and an empty data folder. A server that
the others need for a majority is not removed.`,
			Example: "  decree members remove s3",
			RunE: func(c *cobra.Command, args []string) error {
				return e.ask(c.Context(), http.MethodDelete, "members/"+url.PathEscape(args[0]), nil, nil, nil)
			},
		},
		&cobra.Command{
			Use: "lead [NAME]", Short: "Let another server lead: the one that is named, or the best one", Args: cobra.MaximumNArgs(1),
			Example: "  decree members lead s2",
			RunE: func(c *cobra.Command, args []string) error {
				q := url.Values{}
				if len(args) > 0 {
					q.Set("to", args[0])
				}
				return e.ask(c.Context(), http.MethodPost, "lead", q, nil, nil)
			},
		})
	return c
}

func (e *env) printMembers(rows []membership.Server) error {
	w := tabwriter.NewWriter(e.Out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "NODE\tROLE\tSITE\tSTATE\tCONTACT\tBEHIND\tADDRESS\tVERSION\tID")
	for _, r := range rows {
		contact := "never"
		if r.ContactMillis >= 0 {
			contact = (time.Duration(r.ContactMillis) * time.Millisecond).String() + " ago"
		}
		if r.Role == "leader" {
			contact = "-"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", r.Node, r.Role, dash(r.Site), r.State, contact, r.Behind, r.Address, dash(r.Version), r.ID)
	}
	return w.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
