package cli

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"decree.dev/decree/cmd/decree/internal/daemon"
	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/dns"
	"decree.dev/decree/netplane/front"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
	"decree.dev/decree/schemas/compile"
)

// newCompiler returns a compiler whose child processes are this binary.
func newCompiler() (*compile.Process, error) { return daemon.NewCompiler() }

// daemonFlags are the flags of every verb that runs a daemon. check reads those that
// are text.
type daemonFlags struct {
	level, serviceCIDR, podCIDR, dns, nodePorts string
	tokenFile                                   string
	stubs                                       []string
	backend, ingress                            string
}

func upCmd(e *env) *cobra.Command {
	cfg := daemon.Config{Version: version}
	var flags daemonFlags
	withAgent := true
	c := &cobra.Command{
		Use:   "up",
		Short: "Run a server and an agent on this machine until Ctrl-C",
		Long: `Up runs a server and an agent in one process, with a Git repository of its own.
What runs is what that repository says. Ctrl-C stops decree only: containers go on
and services keep answering; the next up adopts them. See also: decree down.

One machine is a whole cluster. Others can join it when --address is one that they
reach: decree server --help.`,
		Example: `  decree up
  decree up --repo examples/hello --images bin/images`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := flags.apply(e, &cfg); err != nil {
				return err
			}
			cfg.NoAgent = !withAgent
			return daemon.Up(c.Context(), cfg, e.Out)
		},
	}
	dataFlags(c, &cfg)
	flags.common(c, &cfg)
	flags.server(c, &cfg, "127.0.0.1:7443")
	flags.node(c, &cfg)
	c.Flags().BoolVar(&withAgent, "agent", true, "run containers on this machine")
	return c
}

func serverCmd(e *env) *cobra.Command {
	cfg := daemon.Config{Version: version, NoAgent: true}
	var flags daemonFlags
	c := &cobra.Command{
		Use:   "server",
		Short: "Run a server of the control plane on this machine until Ctrl-C",
		Long: `Server runs the control plane: the replicated state, the API, Git and the
controllers. The first one founds a cluster; more join it with a token and get a vote
as soon as they have caught up. Three servers survive the loss of one, five of two.

A server whose data folder was lost joins again with a token for its name (decree
token create --role server --node NAME) and takes the place of its former self.`,
		Example: `  decree server --address 0.0.0.0:7443              # the first
  decree token create --role server                 # there, for the others
  decree server --address 0.0.0.0:7443 --join HOST:7443 --token TOKEN
  decree members`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := flags.apply(e, &cfg); err != nil {
				return err
			}
			return daemon.Up(c.Context(), cfg, e.Out)
		},
	}
	dataFlags(c, &cfg)
	flags.common(c, &cfg)
	flags.server(c, &cfg, "0.0.0.0:7443")
	return c
}

func agentCmd(e *env) *cobra.Command {
	cfg := daemon.Config{Version: version}
	var flags daemonFlags
	c := &cobra.Command{
		Use:   "agent",
		Short: "Run the agent of this machine, for servers elsewhere, until Ctrl-C",
		Long: `Agent runs what the control plane schedules onto this machine. It joins with a
token once, and keeps its certificate renewed from then on. It goes on without any
server: containers are restarted, probes run, services answer.`,
		Example: `  decree token create --role agent                  # on a server
  decree agent --join HOST:7443 --token TOKEN`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := flags.apply(e, &cfg); err != nil {
				return err
			}
			return daemon.Agent(c.Context(), cfg, e.Out)
		},
	}
	dataFlags(c, &cfg)
	flags.common(c, &cfg)
	flags.node(c, &cfg)
	return c
}

// node are the flags of machines that run containers.
func (d *daemonFlags) node(c *cobra.Command, cfg *daemon.Config) {
	f := c.Flags()
	f.StringVar(&cfg.Zone, "zone", "", "the zone this machine is in (the node's label topology.kubernetes.io/zone), for services that prefer endpoints near by")
	f.StringVar(&cfg.Images, "images", "", "folder of image archives (*.tar) to import")
	f.StringVar(&cfg.ResolvConf, "resolv-conf", "/etc/resolv.conf", "file with the name servers for names outside the cluster")
	f.StringVar(&d.backend, "service-backend", "", "ipvs or nftables: what balances services (default: ipvs where the kernel has it); the next start with another one changes it, and connections go on")
	f.StringVar(&d.ingress, "ingress", "on", "on or off: whether this machine serves Ingresses; it listens only while there are some")
	f.StringVar(&cfg.Ingress.HTTP, "ingress-http", ":80", "host:port for HTTP")
	f.StringVar(&cfg.Ingress.HTTPS, "ingress-https", ":443", "host:port for HTTPS, and for HTTP/3")
	f.StringVar(&cfg.Ingress.AccessLog, "ingress-access-log", "", "file that gets a line of JSON for every request (default: none)")
	f.StringVar(&cfg.Ingress.ACMEDirectory, "acme-directory", "", "URL of a CA (RFC 8555) that certificates are obtained from (default: none, or Let's Encrypt with --acme-email)")
	f.StringVar(&cfg.Ingress.ACMEEmail, "acme-email", "", "address that the CA writes to about certificates")
	f.StringVar(&cfg.Ingress.ACMERoots, "acme-ca-file", "", "file with the certificates that the CA's own server is verified with (default: those of the system)")
	f.StringVar(&cfg.IPVS.Scheduler, "ipvs-scheduler", ipvs.DefaultScheduler, "how IPVS chooses an endpoint where a service does not say: "+strings.Join(api.Schedulers, ", "))
	f.DurationVar(&cfg.IPVS.Drain, "ipvs-drain", ipvs.DefaultDrain, "how long connections to an endpoint that went may go on")
	f.DurationVar(&cfg.IPVS.TCP, "ipvs-tcp-timeout", 0, "how long IPVS remembers idle connections (default: as the kernel has it)")
	f.DurationVar(&cfg.IPVS.TCPFin, "ipvs-tcpfin-timeout", 0, "the same for connections that one side has ended")
	f.DurationVar(&cfg.IPVS.UDP, "ipvs-udp-timeout", 0, "the same for UDP")
	f.StringVar((*string)(&cfg.Encryption), "encryption", "off", "of what pods of different nodes say to each other, by WireGuard (UDP port 51820): on (with nodes that have it on too) or required (nodes that do not encrypt are not reached)")
	f.StringArrayVar(&d.stubs, "dns-stub", nil, "DOMAIN=ADDRESS[:PORT][,...]: a domain with name servers of its own; may be repeated")
}

// common are the flags of servers and agents.
func (d *daemonFlags) common(c *cobra.Command, cfg *daemon.Config) {
	f := c.Flags()
	f.StringVar(&cfg.Node, "node", "", "name of this node (default: the host's name)")
	f.StringSliceVar(&cfg.Join, "join", nil, "host:port of servers of the cluster to join")
	f.StringVar(&cfg.Token, "token", "", "token to join with (default: $DECREE_TOKEN)")
	f.StringVar(&d.tokenFile, "token-file", "", "file that holds the token")
	f.StringVar(&d.level, "log-level", "warn", "debug, info, warn or error")
}

// server are the flags of servers.
func (d *daemonFlags) server(c *cobra.Command, cfg *daemon.Config, address string) {
	f := c.Flags()
	f.StringVar(&cfg.Address, "address", address, "host:port of everything this server serves")
	f.StringVar(&cfg.Advertise, "advertise", "", "host:port that other machines reach this server at (default: --address, or this machine's first address)")
	f.StringVar(&cfg.Site, "site", "", "where this machine stands, for decree members")
	f.BoolVar(&cfg.NonVoter, "non-voter", false, "hold the whole state, never vote")
	f.DurationVar(&cfg.Grace, "dead-server-grace", 0, "how long a dead server is waited for before it is given up (default 1h; negative: for ever)")
	f.DurationVar(&cfg.Heartbeat, "heartbeat-timeout", 0, "how long to wait for a leader that falls silent (default 300ms); the same on all servers")
	f.DurationVar(&cfg.CAOverlap, "ca-overlap", 24*time.Hour, "how long the old CA is trusted at least after a new one was made, for kubeconfigs that were copied away")
	f.StringVar(&cfg.MasterKey, "master-key", "", "file with the key that wraps the keys of everything on disk (default: one in the data folder)")
	f.StringVar(&cfg.Snapshots.To, "snapshot-to", "", "folder or s3://BUCKET/PREFIX?endpoint=HOST that the leader saves snapshots to")
	f.DurationVar(&cfg.Snapshots.Every, "snapshot-every", time.Hour, "time from one snapshot to the next")
	f.IntVar(&cfg.Snapshots.Keep, "snapshot-keep", 24, "how many of the newest snapshots are kept")
	f.IntVar(&cfg.Snapshots.KeepDaily, "snapshot-keep-daily", 14, "for how many days one snapshot a day is kept")
	f.StringSliceVar(&cfg.Snapshots.Recipients, "snapshot-recipient", nil, "age1... that snapshots are encrypted for")
	f.StringVar(&cfg.Seed, "repo", "", "folder that becomes the first commit of the built-in repository, if it has none")
	f.StringVar(&d.serviceCIDR, "service-cidr", "10.97.0.0/16", "addresses of services, with a comma also those of the other address family; for a new cluster")
	f.StringVar(&d.podCIDR, "pod-cidr", "10.98.0.0/16", "addresses of pods, like --service-cidr; for a new cluster")
	f.StringVar(&d.dns, "cluster-dns", "10.97.0.10", "address of the cluster DNS; for a new cluster")
	f.StringVar(&d.nodePorts, "service-node-port-range", command.DefaultNodePorts.String(), "ports that services get on the nodes; for a new cluster")
	f.StringVar(&cfg.Domain, "cluster-domain", "cluster.local", "domain of the cluster DNS")
}

func (e *env) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(e.Err, &slog.HandlerOptions{Level: level}))
}

// apply checks the flags and puts them into cfg.
func (d *daemonFlags) apply(e *env, cfg *daemon.Config) error {
	var l slog.Level
	if err := l.UnmarshalText([]byte(d.level)); err != nil {
		return usageError{fmt.Errorf("--log-level %q: expected debug, info, warn or error", d.level)}
	}
	cfg.Log = e.logger(l)
	if err := d.ranges(cfg); err != nil {
		return usageError{err}
	}
	if d.dns != "" {
		addr, err := netip.ParseAddr(d.dns)
		if err != nil {
			return usageError{fmt.Errorf("--cluster-dns: %w", err)}
		}
		cfg.DNS = addr
	}
	switch cfg.Backend = netplane.Backend(d.backend); cfg.Backend {
	case "", netplane.IPVS, netplane.NFTables:
	default:
		return usageError{fmt.Errorf("--service-backend %q: expected %s or %s", d.backend, netplane.IPVS, netplane.NFTables)}
	}
	switch d.ingress {
	case "", "on":
	case "off":
		cfg.Ingress.Off = true
	default:
		return usageError{fmt.Errorf("--ingress %q: expected on or off", d.ingress)}
	}
	if err := cfg.Encryption.Validate(); err != nil {
		return usageError{fmt.Errorf("--%w", err)}
	}
	if err := cfg.IPVS.Validate(); err != nil {
		return usageError{fmt.Errorf("--ipvs-*: %w", err)}
	}
	for _, text := range d.stubs {
		stub, err := dns.ParseStub(text)
		if err != nil {
			return usageError{fmt.Errorf("--dns-stub: %w", err)}
		}
		cfg.DNSStubs = append(cfg.DNSStubs, stub)
	}
	if d.tokenFile != "" {
		data, err := os.ReadFile(d.tokenFile)
		if err != nil {
			return fmt.Errorf("--token-file: %w", err)
		}
		cfg.Token = strings.TrimSpace(string(data))
	}
	if cfg.Token == "" {
		cfg.Token = os.Getenv("DECREE_TOKEN")
	}
	return nil
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
			cfg.Log = e.logger(slog.LevelWarn) // what it waits for
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

// frontCmd is the process of a node's servers, which an agent starts.
func frontCmd(*env) *cobra.Command {
	return &cobra.Command{
		Use: front.Verb + " DIR", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, _ []string) error { return front.Main(c.Context()) },
	}
}

// ranges puts the address and port ranges into cfg. Agents have no such flags.
func (d *daemonFlags) ranges(cfg *daemon.Config) error {
	for _, r := range []struct {
		flag, text string
		into       *[]netip.Prefix
	}{{"service-cidr", d.serviceCIDR, &cfg.ServiceCIDRs}, {"pod-cidr", d.podCIDR, &cfg.PodCIDRs}} {
		if r.text == "" {
			continue
		}
		*r.into = nil
		for text := range strings.SplitSeq(r.text, ",") {
			p, err := netip.ParsePrefix(strings.TrimSpace(text))
			if err != nil {
				return fmt.Errorf("--%s: %w", r.flag, err)
			}
			*r.into = append(*r.into, p)
		}
	}
	if d.nodePorts == "" {
		return nil
	}
	first, last, _ := strings.Cut(d.nodePorts, "-")
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil {
		return fmt.Errorf("--service-node-port-range %q: expected two ports, such as %s", d.nodePorts, command.DefaultNodePorts)
	}
	cfg.NodePorts = command.PortRange{First: uint16(a), Last: uint16(b)}
	return nil
}
