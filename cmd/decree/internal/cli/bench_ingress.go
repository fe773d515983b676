package cli

import (
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/ingressbench"
)

// benchIngressCmd measures the proxy of Ingresses beside others.
func benchIngressCmd(e *env, output *string) *cobra.Command {
	cfg := ingressbench.Config{}
	var serve, certificate, answer string
	alone := false
	c := &cobra.Command{
		Use: "ingress", Short: "Requests through the proxy of Ingresses, beside nginx, HAProxy and Caddy if they are installed",
		Long: `Ingress starts the proxy, nginx, HAProxy and Caddy as processes on loopback, each with one
processor core and the same backend, and puts the same requests to one after the other, with
h2load. The generator and the backend share another core: the machine needs two.`,
		Args: cobra.NoArgs, Example: "  decree bench ingress --only h1\n  decree bench ingress -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			switch {
			case serve != "":
				return ingressbench.Serve(c.Context(), serve, certificate)
			case answer != "":
				return ingressbench.Answer(c.Context(), answer)
			}
			if err := checkOutput(*output, "json"); err != nil {
				return err
			}
			var err error
			if cfg.Binary, err = os.Executable(); err != nil {
				return err
			}
			if cfg.H2load, err = exec.LookPath("h2load"); err != nil {
				return fmt.Errorf("bench ingress: %w (it is in the package nghttp2-client)", err)
			}
			if !alone { // without them there are no peers
				cfg.Nginx, _ = exec.LookPath("nginx")
				cfg.HAProxy, _ = exec.LookPath("haproxy")
				cfg.Caddy, _ = exec.LookPath("caddy")
			}
			if cfg.Dir, err = os.MkdirTemp("", "decree-bench-"); err != nil {
				return err
			}
			defer os.RemoveAll(cfg.Dir)
			samples := []ingressbench.Sample{}
			cfg.Say = func(s ingressbench.Sample) {
				if *output == "json" {
					samples = append(samples, s)
					return
				}
				ratio := ""
				if s.OfNginx > 0 {
					ratio = fmt.Sprintf("  %4.2f of nginx", s.OfNginx)
				}
				fmt.Fprintf(e.Out, "%-12s %-8s %7.0f/s%s  p50 %6.0f µs  p99 %6.0f µs  %6.2f ms CPU per 1,000  %4.0f MiB  %.0f failed\n",
					s.What, s.Server, s.PerSec, ratio, s.P50, s.P99, s.CPU, s.Memory, s.Failed)
			}
			if err := ingressbench.Run(c.Context(), cfg); err != nil {
				return fmt.Errorf("bench ingress: %w", err)
			}
			if *output == "json" {
				return e.writeJSON(samples)
			}
			return nil
		},
	}
	f := c.Flags()
	f.DurationVar(&cfg.Duration, "duration", 2*time.Second, "of each measurement")
	f.IntVar(&cfg.Rounds, "rounds", 3, "how often to measure each")
	f.StringVar(&cfg.Only, "only", "", "measure only what has this in its name")
	f.BoolVar(&alone, "alone", false, "leave out nginx, HAProxy and Caddy")
	f.StringVar(&serve, "serve", "", "be the proxy that is measured, at some addresses")
	f.StringVar(&certificate, "certificate", "", "folder of its certificate")
	f.StringVar(&answer, "answer", "", "be the backend, at an address")
	for _, name := range []string{"serve", "certificate", "answer"} {
		_ = f.MarkHidden(name)
	}
	return c
}
