package cli

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/storebench"
)

// benchStoreCmd measures three servers beside three etcd servers.
func benchStoreCmd(e *env, output *string) *cobra.Command {
	cfg := storebench.Config{}
	alone := false
	c := &cobra.Command{
		Use: "store", Short: "Puts, reads, watches, failover and size of three servers, beside etcd's if it is installed",
		Long: `Store starts three servers on loopback, with mutual TLS and fsync, and three of etcd
without TLS, and measures one after the other. Puts of Decree travel as those of its own
servers do, gets and watches are requests of the API (HTTP, JSON); etcd is called by gRPC
throughout.

Elections are counted over six times --duration, while every core is busy with something
else and 64 callers put: there is no reason for any. A killed leader is started again
and has caught up before the next is killed; the write goes to one server after the
other, Decree's API waits for a leader, etcd has 250 ms before the next member is asked.
Memory is that of the largest server, with objects of 1 kB, after 15 s of rest. A
snapshot is restored when a server that was started from it has answered a read; for etcd
this needs etcdctl.`,
		Args: cobra.NoArgs, Example: "  decree bench store --only put\n  decree bench store --only killed --kills 100\n  decree bench store --only elections\n  decree bench store --only objects # memory and snapshots",
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
			cfg.Say = func(s storebench.Sample) {
				if *output == "json" {
					samples = append(samples, s)
					return
				}
				fmt.Fprintf(e.Out, "%-45s %-7s%s\n", s.What, s.Store, inColumns(s))
			}
			if err = storebench.Run(c.Context(), cfg); err != nil {
				err = fmt.Errorf("bench store: %w", err)
			}
			if *output == "json" { // what was measured before an error too
				err = errors.Join(err, e.writeJSON(samples))
			}
			return err
		},
	}
	f := c.Flags()
	f.DurationVar(&cfg.Duration, "duration", 5*time.Second, "of each measurement")
	f.IntVar(&cfg.Kills, "kills", 100, "how often to kill the leader")
	f.IntVar(&cfg.Watchers, "watchers", 1000, "how many watch")
	f.IntVar(&cfg.Objects, "objects", 100_000, "how many objects memory and snapshots are measured with")
	f.IntSliceVar(&cfg.Callers, "callers", []int{1, 64, 256, 1000}, "how many call at once")
	f.StringVar(&cfg.Only, "only", "", "measure only what has this in its name: put, get, mixed, watch, elections, killed, memory, snapshot")
	f.BoolVar(&alone, "alone", false, "leave out etcd")
	return c
}

// inColumns is what a measurement gave, as far as it has it.
func inColumns(s storebench.Sample) string {
	var b strings.Builder
	column := func(width int, has bool, format string, args ...any) {
		text := ""
		if has {
			text = fmt.Sprintf(format, args...)
		}
		fmt.Fprintf(&b, " %*s", width, text)
	}
	column(10, s.PerSec > 0, "%.0f/s", s.PerSec)
	column(12, s.P50 > 0, "p50 %.2f", s.P50)
	column(12, s.P50 > 0, "p90 %.2f", s.P90)
	column(12, s.P50 > 0, "p99 %.2f", s.P99)
	column(14, s.P50 > 0, "max %.2f ms", s.Max)
	column(11, s.Took > 0, "%.0f ms", s.Took)
	column(0, s.Unit != "", "%.4g %s", s.Value, s.Unit)
	column(0, s.Failed > 0, "%d failed", s.Failed)
	column(0, s.LastErr != "", "(%s)", s.LastErr)
	return strings.TrimRight(b.String(), " ")
}
