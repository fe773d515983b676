package cli

import (
	"fmt"
	"os"
	"os/exec"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/storebench"
)

// benchStoreCmd measures three servers beside three etcd servers.
func benchStoreCmd(e *env, output *string) *cobra.Command {
	cfg := storebench.Config{}
	alone := false
	c := &cobra.Command{
		Use: "store", Short: "Puts, reads, watches and failover of three servers, beside etcd's if it is installed",
		Args: cobra.NoArgs, Example: "  decree bench store --only put",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(*output, "json"); err != nil {
				return err
			}
			var err error
			if cfg.Binary, err = os.Executable(); err != nil {
				return err
			}
			if !alone {
				cfg.Etcd, _ = exec.LookPath("etcd") // without it there is no peer
			}
			if cfg.Dir, err = os.MkdirTemp("", "decree-bench-"); err != nil {
				return err
			}
			defer os.RemoveAll(cfg.Dir)
			samples := []storebench.Sample{}
			w := tabwriter.NewWriter(e.Out, 44, 0, 2, ' ', tabwriter.AlignRight|tabwriter.DiscardEmptyColumns)
			cfg.Say = func(s storebench.Sample) {
				if *output == "json" {
					samples = append(samples, s)
					return
				}
				fmt.Fprintf(w, "%s\t%s\t%.0f/s\tp50 %.2f ms\tp99 %.2f ms\tmax %.2f ms\t%.4g %s\t%d failed %s\n", s.What, s.Store, s.PerSec, s.P50, s.P99, s.Max, s.Value, s.Unit, s.Failed, s.LastErr)
				w.Flush()
			}
			if err := storebench.Run(c.Context(), cfg); err != nil {
				return fmt.Errorf("bench store: %w", err)
			}
			if *output == "json" {
				return e.writeJSON(samples)
			}
			return nil
		},
	}
	f := c.Flags()
	f.DurationVar(&cfg.Duration, "duration", 5*time.Second, "of each measurement")
	f.IntVar(&cfg.Kills, "kills", 100, "how often to kill the leader")
	f.IntVar(&cfg.Watchers, "watchers", 1000, "how many watch")
	f.IntSliceVar(&cfg.Callers, "callers", []int{1, 64, 256, 1000}, "how many call at once")
	f.StringVar(&cfg.Only, "only", "", "measure only what has this in its name")
	f.BoolVar(&alone, "alone", false, "leave out etcd")
	return c
}
