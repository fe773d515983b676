package cli

import (
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/dnsbench"
)

// benchDNSCmd measures the cluster DNS beside CoreDNS and unbound.
func benchDNSCmd(e *env, output *string) *cobra.Command {
	cfg := dnsbench.Config{}
	var serve, upstream string
	alone := false
	c := &cobra.Command{
		Use: "dns", Short: "Queries of cluster names and others, beside CoreDNS and unbound if they are installed",
		Long: `Dns starts the cluster DNS, CoreDNS and unbound as processes on loopback, each with the
same services and the same server to forward to, and puts the same questions to one after
the other: with dnsperf if it is installed, 100 at a time, and then one at a time for
latencies. CoreDNS serves the services from a zone file.`,
		Args: cobra.NoArgs, Example: "  decree bench dns --only cluster\n  decree bench dns -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			if serve != "" {
				return dnsbench.Serve(c.Context(), serve, upstream, cfg.Names)
			}
			if err := checkOutput(*output, "json"); err != nil {
				return err
			}
			var err error
			if cfg.Binary, err = os.Executable(); err != nil {
				return err
			}
			cfg.Dnsperf, _ = exec.LookPath("dnsperf")
			if !alone { // without them there are no peers
				cfg.CoreDNS, _ = exec.LookPath("coredns")
				cfg.Unbound, _ = exec.LookPath("unbound")
			}
			if cfg.Dir, err = os.MkdirTemp("", "decree-bench-"); err != nil {
				return err
			}
			defer os.RemoveAll(cfg.Dir)
			samples := []dnsbench.Sample{}
			cfg.Say = func(s dnsbench.Sample) {
				if *output == "json" {
					samples = append(samples, s)
					return
				}
				fmt.Fprintf(e.Out, "%-18s %-8s %8.0f/s  p50 %6.0f µs  p99 %6.0f µs  %6.2f ms CPU per 1,000  %4.0f MiB  %.0f lost\n",
					s.What, s.Server, s.PerSec, s.P50, s.P99, s.CPU, s.Memory, s.Lost)
			}
			if err := dnsbench.Run(c.Context(), cfg); err != nil {
				return fmt.Errorf("bench dns: %w", err)
			}
			if *output == "json" {
				return e.writeJSON(samples)
			}
			return nil
		},
	}
	f := c.Flags()
	f.DurationVar(&cfg.Duration, "duration", 3*time.Second, "of each measurement")
	f.IntVar(&cfg.Rounds, "rounds", 3, "how often to measure each")
	f.IntVar(&cfg.Names, "names", 10_000, "how many services there are")
	f.StringVar(&cfg.Only, "only", "", "measure only what has this in its name")
	f.BoolVar(&alone, "alone", false, "leave out CoreDNS and unbound")
	f.StringVar(&serve, "serve", "", "be the server that is measured, at an address")
	f.StringVar(&upstream, "upstream", "", "where that one forwards to")
	for _, name := range []string{"serve", "upstream"} {
		_ = f.MarkHidden(name)
	}
	return c
}
