package cli

import (
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/schemas/compile"
)

// newCompiler returns a compiler whose child processes are this binary.
func newCompiler() (*compile.Process, error) { return daemon.NewCompiler() }

func upCmd(e *env) *cobra.Command {
	cfg := daemon.Config{Version: version}
	var level, serviceCIDR, podCIDR, dns string
	withAgent := true
	c := &cobra.Command{
		Use:   "up",
		Short: "Run a one-node cluster on this machine until Ctrl-C",
		Long: `Up runs a server and an agent in one process, with a Git repository of its own.
What runs is what that repository says. Ctrl-C stops decree only: containers go on
and services keep answering; the next up adopts them. See also: decree down.`,
		Example: `  decree up
  decree up --repo examples/hello --images bin/images`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			var l slog.Level
			if err := l.UnmarshalText([]byte(level)); err != nil {
				return usageError{fmt.Errorf("--log-level %q: expected debug, info, warn or error", level)}
			}
			cfg.Log = slog.New(slog.NewTextHandler(e.Err, &slog.HandlerOptions{Level: l}))
			cfg.NoAgent = !withAgent
			for _, r := range []struct {
				flag, text string
				into       *netip.Prefix
			}{{"service-cidr", serviceCIDR, &cfg.ServiceCIDR}, {"pod-cidr", podCIDR, &cfg.PodCIDR}} {
				p, err := netip.ParsePrefix(r.text)
				if err != nil {
					return usageError{fmt.Errorf("--%s: %w", r.flag, err)}
				}
				*r.into = p
			}
			addr, err := netip.ParseAddr(dns)
			if err != nil {
				return usageError{fmt.Errorf("--cluster-dns: %w", err)}
			}
			cfg.DNS = addr
			return daemon.Up(c.Context(), cfg, e.Out)
		},
	}
	dataFlags(c, &cfg)
	f := c.Flags()
	f.StringVar(&cfg.Address, "address", "127.0.0.1:7443", "host:port of the API and of the Git repositories")
	f.StringVar(&cfg.Node, "node", "", "name of this node (default: the host's name)")
	f.StringVar(&cfg.Seed, "repo", "", "folder that becomes the first commit of the built-in repository, if it has none")
	f.StringVar(&cfg.Images, "images", "", "folder of image archives (*.tar) to import")
	f.StringVar(&serviceCIDR, "service-cidr", "10.97.0.0/16", "addresses of services; for a new cluster")
	f.StringVar(&podCIDR, "pod-cidr", "10.98.0.0/16", "addresses of pods; for a new cluster")
	f.StringVar(&dns, "cluster-dns", "10.97.0.10", "address of the cluster DNS; for a new cluster")
	f.StringVar(&cfg.Domain, "cluster-domain", "cluster.local", "domain of the cluster DNS")
	f.StringVar(&level, "log-level", "warn", "debug, info, warn or error")
	f.BoolVar(&withAgent, "agent", true, "run containers on this machine")
	return c
}

func downCmd(e *env) *cobra.Command {
	var cfg daemon.Config
	var purge bool
	c := &cobra.Command{
		Use:   "down",
		Short: "Stop the cluster on this machine with its containers, services and pod networks",
		Long: `Down stops decree, its containers, its containerd, and removes what it put into the
kernel. Containers get their termination grace, 30 seconds unless their pod says
else. Data stay: the next up starts everything again. With --purge they go too:
repositories, history, images, certificates. There is no way back from that.`,
		Example: `  decree down
  decree down --purge`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			defer e.progress("stopping")()
			return daemon.Down(c.Context(), cfg, purge)
		},
	}
	dataFlags(c, &cfg)
	c.Flags().BoolVar(&purge, "purge", false, "remove all data too")
	return c
}

func dataFlags(c *cobra.Command, cfg *daemon.Config) {
	f := c.Flags()
	f.StringVar(&cfg.Data, "data", "", "data folder (default: $DECREE_DATA, else "+daemon.DefaultData+")")
	f.StringVar(&cfg.Run, "run", "", "folder for sockets and mounts (default: /run/decree, or run below another data folder)")
	f.StringVar(&cfg.Containerd, "containerd", "", "socket of an existing containerd (default: run one below the data folder)")
}

// compileWorkerCmd is the child process of the compiler: a tree on standard input,
// objects on standard output.
func compileWorkerCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use: compile.WorkerVerb, Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if code := compile.WorkerMain(e.In, e.Out); code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
}
