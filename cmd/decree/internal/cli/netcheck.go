package cli

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/netplane/netcheck"
)

func netcheckCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "netcheck",
		Short: "Check the cluster's network: nodes, pods, services, DNS, from every node",
		Long: `Netcheck has the agents of all nodes try to reach each other, now: node to node, node
to pod, pod to pod, pod to service, and cluster DNS from nodes and pods. It prints who
reaches whom in what time, and what to look at where somebody does not; exit status 1
means that something failed.

On each node one ready pod that no NetworkPolicy isolates lends its network; where there is
none, the agent attaches a network namespace like a pod's for the moment. Nothing is run
in pods, and no image is needed. Nodes and pods are sent ICMP echoes, small ones and one of
the largest size that the way is said to take; services get a TCP connection. Those that take
UDP get a DNS query if their port is 53 or called dns, and an empty datagram else: of that it
can be known that it was refused, which is a failure, or answered. "not refused" says that
nothing came back, as from most services that are well, and as if it had been lost. In
clusters of more than 17 nodes each node tries 16 others. It is for administrators, and the
servers' logs say who asked.`,
		Example: `  decree netcheck
  decree netcheck -o json | jq '.checks[] | select(.error)'`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output, "json"); err != nil {
				return err
			}
			var r netcheck.Report
			done := e.progress("the nodes try to reach each other")
			err := e.ask(c.Context(), http.MethodPost, "netcheck", nil, nil, &r)
			done()
			if err != nil {
				return err
			}
			if output == "json" {
				err = e.writeJSON(r)
			} else {
				err = writeNetcheck(e.Out, &r)
			}
			if err == nil && !r.OK {
				return exitCode(1)
			}
			return err
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "json for everything")
	return c
}

// maxColumns is how many nodes or services a table shows side by side.
const maxColumns = 12

// netcheckTables are the tables, with the kinds of checks in them.
var netcheckTables = []struct {
	title string
	kinds []netcheck.Kind
}{
	{"NODE TO NODE", []netcheck.Kind{netcheck.NodeToNode}},
	{"NODE TO POD ON", []netcheck.Kind{netcheck.NodeToPod}},
	{"POD TO POD ON", []netcheck.Kind{netcheck.PodToPod}},
	{"POD TO SERVICE", []netcheck.Kind{netcheck.PodToService, netcheck.PodToUDP}},
	{"DNS FROM", []netcheck.Kind{netcheck.NodeToDNS, netcheck.PodToDNS}},
}

// writeNetcheck is for people.
func writeNetcheck(w io.Writer, r *netcheck.Report) error {
	failed, silent := 0, 0
	for _, t := range netcheckTables {
		checks := slices.DeleteFunc(slices.Clone(r.Checks), func(c netcheck.Check) bool { return !slices.Contains(t.kinds, c.Kind) })
		if len(checks) == 0 {
			continue
		}
		if err := writeMatrix(w, t.title, r.Nodes, checks); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	for _, s := range r.Skipped {
		fmt.Fprintf(w, "Not tried: %s\n", s)
	}
	for _, c := range r.Checks {
		if c.Silent {
			silent++
		}
		if c.Error != "" {
			if failed++; failed == 1 {
				fmt.Fprintln(w, "Failed:")
			}
			fmt.Fprintf(w, "  %s: %s to %s at %s: %s\n", titleOf(c.Kind), c.From, c.To, c.Address, printable(c.Error))
		}
	}
	if len(r.Advice) > 0 {
		fmt.Fprintln(w, "Look at:")
	}
	for _, a := range r.Advice {
		fmt.Fprintf(w, "  %s\n", printable(a))
	}
	verdict := "all well"
	switch {
	case !r.OK:
		verdict = fmt.Sprintf("%d failed", failed)
	case silent > 0: // nobody knows whether these are
		verdict = fmt.Sprintf("none failed, %d neither refused nor answered", silent)
	}
	_, err := fmt.Fprintf(w, "%s, %s: %s\n", count(len(r.Nodes), "node"), count(len(r.Checks), "check"), verdict)
	return err
}

func titleOf(k netcheck.Kind) string {
	switch k {
	case netcheck.NodeToDNS:
		return "node to DNS"
	case netcheck.PodToDNS:
		return "pod to DNS"
	}
	for _, t := range netcheckTables {
		if slices.Contains(t.kinds, k) {
			return strings.TrimSuffix(strings.ToLower(t.title), " on")
		}
	}
	return string(k)
}

// columnOf is where a check stands in the row of its node.
func columnOf(c netcheck.Check) string {
	switch c.Kind {
	case netcheck.NodeToDNS:
		return "node"
	case netcheck.PodToDNS:
		return "pod"
	}
	return c.To
}

// writeMatrix prints who reaches whom, or, when that is too wide, how many do.
func writeMatrix(w io.Writer, title string, nodes []netcheck.Node, checks []netcheck.Check) error {
	cells := map[[2]string][]netcheck.Check{}
	var columns []string
	for _, c := range checks {
		to := columnOf(c)
		cells[[2]string{c.From, to}] = append(cells[[2]string{c.From, to}], c)
		if !slices.Contains(columns, to) {
			columns = append(columns, to)
		}
	}
	slices.Sort(columns)
	if len(columns) > maxColumns {
		_, err := fmt.Fprintf(w, "%s %d: %s\n", title, len(columns), summary(checks))
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, title+"\t"+strings.Join(columns, "\t"))
	for _, n := range nodes {
		row := []string{n.Name}
		for _, to := range columns {
			row = append(row, cell(cells[[2]string{n.Name, to}]))
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	return t.Flush()
}

func summary(checks []netcheck.Check) string {
	failed, silent, low, high := 0, 0, time.Duration(0), time.Duration(0)
	for _, c := range checks {
		switch {
		case c.Error != "":
			failed++
		case c.Silent:
			silent++
		default:
			if low == 0 || c.Latency < low {
				low = c.Latency
			}
			high = max(high, c.Latency)
		}
	}
	unknown := ""
	if silent > 0 {
		unknown = fmt.Sprintf("%d not refused, ", silent)
	}
	return fmt.Sprintf("%s, %d failed, %s%s to %s (-o json shows each)", count(len(checks), "check"), failed, unknown, millis(low), millis(high))
}

// cell is one pair: the slower of its address families, or those that failed.
func cell(checks []netcheck.Check) string {
	var slowest netcheck.Check
	var failed []string
	silent := false
	for _, c := range checks {
		switch {
		case c.Error != "" && c.Address.Is4():
			failed = append(failed, "IPv4")
		case c.Error != "":
			failed = append(failed, "IPv6")
		case c.Silent:
			silent = true
		case c.Latency >= slowest.Latency:
			slowest = c
		}
	}
	switch {
	case len(checks) == 0:
		return "-"
	case len(failed) == len(checks):
		return "FAILED"
	case len(failed) > 0:
		return strings.Join(failed, ", ") + " FAILED"
	case silent: // in one family, if not in both: the least that is known
		return "not refused"
	case slowest.Lost > 0:
		return fmt.Sprintf("%s (%d of %d lost)", millis(slowest.Latency), slowest.Lost, slowest.Sent)
	}
	return millis(slowest.Latency)
}

func millis(d time.Duration) string { return fmt.Sprintf("%.2f ms", d.Seconds()*1000) }
