package cli

import (
	"context"
	"fmt"
	"math"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// figure is one measured quantity.
type figure struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Runs   int     `json:"runs"`
	Median float64 `json:"median"`
	P99    float64 `json:"p99"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Note   string  `json:"note,omitempty"`
}

// summarize makes a figure of measured values.
func summarize(name, unit string, values []float64) figure {
	s := slices.Sorted(slices.Values(values))
	at := func(q float64) float64 { return s[int(math.Ceil(q*float64(len(s))))-1] }
	return figure{Name: name, Unit: unit, Runs: len(s), Median: at(0.5), P99: at(0.99), Min: s[0], Max: s[len(s)-1]}
}

// milliseconds since begun.
func milliseconds(begun time.Time) float64 { return float64(time.Since(begun).Microseconds()) / 1000 }

func benchCmd(e *env) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "bench",
		Short: "Measure this machine and this build, beside a peer where there is one",
		Long: `Bench measures. Figures of one machine compare only with figures of the same
machine in the same hour; where there is a peer it runs interleaved in the same run.`,
		Hidden: true,
	}
	c.PersistentFlags().StringVarP(&output, "output", "o", "", "json for everything")
	add := func(name, short string, runs int, alone bool, run func(context.Context, int) ([]figure, error)) {
		sub := &cobra.Command{
			Use: name, Short: short, Args: cobra.NoArgs, Example: "  decree bench " + name + " -o json",
			RunE: func(c *cobra.Command, _ []string) error {
				if err := checkOutput(output, "json"); err != nil {
					return err
				}
				n, err := c.Flags().GetInt("runs")
				if err != nil {
					return err
				}
				if alone {
					if done, err := inOwnNetNS(c.Context(), e.Streams); done || err != nil {
						return err
					}
				}
				figures, err := run(c.Context(), n)
				if err != nil {
					return fmt.Errorf("bench %s: %w", name, err)
				}
				return e.writeFigures(figures, output)
			},
		}
		sub.Flags().Int("runs", runs, "how often to measure")
		c.AddCommand(sub)
	}
	add("compile", "Objects per second from CUE, cold and with one package changed", 5, false, benchCompile)
	add("podstart", "A container's create and start beside raw containerd", 20, true, benchPodStart)
	c.AddCommand(benchStoreCmd(e, &output))
	c.AddCommand(benchNetplaneCmd(e, &output))
	c.AddCommand(benchDNSCmd(e, &output))
	c.AddCommand(benchIngressCmd(e, &output))
	add("push", "From an accepted push to the first container and to a healthy rollout", 10, true, benchPush)
	return c
}

func (e *env) writeFigures(figures []figure, output string) error {
	if output == "json" {
		return e.writeJSON(figures)
	}
	w := tabwriter.NewWriter(e.Out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FIGURE\tMEDIAN\tP99\tMIN\tMAX\tUNIT\tRUNS\tNOTE")
	for _, f := range figures {
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%.4g\t%.4g\t%s\t%d\t%s\n", f.Name, f.Median, f.P99, f.Min, f.Max, f.Unit, f.Runs, f.Note)
	}
	return w.Flush()
}
