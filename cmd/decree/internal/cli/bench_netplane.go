package cli

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/netbench"
	"decree.dev/decree/netplane"
)

// benchNetplaneCmd measures the service tables of a node.
func benchNetplaneCmd(e *env, output *string) *cobra.Command {
	cfg := netbench.Config{}
	backends := []string{}
	c := &cobra.Command{
		Use: "netplane", Short: "Service tables: programming, changes, memory and what a connection costs, beside nft",
		Long: `Netplane programs service tables in network namespaces of its own and measures how long
that takes from nothing and for single changes, what one change in a hundred services a
second costs, the memory of the process and of the kernel, and how long connections take
through a service and directly.

The peer is nft, which loads tables with a chain for each service, and with one for each
endpoint too. It takes minutes where there are many: --peer-services limits it.

The backend ipvs needs a kernel with IPVS. Where there is none, the tests of this
repository measure both in a kernel of their own: DECREE_BENCH_VM=500,2000 go test -run InKernel
-v ./cmd/decree/internal/netbench`,
		Args: cobra.NoArgs, Example: "  decree bench netplane --services 1000\n  decree bench netplane --backend ipvs,nftables -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(*output, "json"); err != nil {
				return err
			}
			for _, b := range backends {
				cfg.Backends = append(cfg.Backends, netplane.Backend(b))
			}
			samples := []netbench.Sample{}
			cfg.Say = func(s netbench.Sample) {
				if *output == "json" {
					samples = append(samples, s)
					return
				}
				fmt.Fprintf(e.Out, "%-9s %6d services  %s\n", s.Backend, s.Services, s)
			}
			err := netbench.Run(c.Context(), cfg)
			if err != nil {
				err = fmt.Errorf("bench netplane: %w", err)
			}
			if *output == "json" { // what was measured before an error too
				err = errors.Join(err, e.writeJSON(samples))
			}
			return err
		},
	}
	f := c.Flags()
	f.StringSliceVar(&backends, "backend", []string{string(netplane.NFTables)}, "what to measure: "+strings.Join([]string{string(netplane.NFTables), string(netplane.IPVS)}, ", "))
	f.IntSliceVar(&cfg.Services, "services", []int{1000, 10_000, 30_000}, "how many services there are")
	f.IntVar(&cfg.Endpoints, "endpoints", 50, "the most endpoints of a service; each has one to so many")
	f.IntVar(&cfg.Runs, "runs", 3, "how often to begin with nothing")
	f.IntVar(&cfg.Changes, "changes", 200, "how many single changes to make")
	f.DurationVar(&cfg.Churn, "churn", time.Minute, "how long one service in a hundred changes each second")
	f.IntVar(&cfg.Connects, "connects", 2000, "how many connections to make each way")
	f.IntVar(&cfg.PeerServices, "peer-services", 1000, "measure the peer up to so many services")
	return c
}
