package netplane

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/nft"
)

// Check is one thing that a node's network needs.
type Check struct {
	Requirement string
	OK          bool
	// Why says what is missing, or what was found; Mend is the command that mends it.
	Why, Mend string
}

// Doctor checks what a Plane with this configuration needs of the node. It leaves
// nothing behind.
func Doctor(cfg Config) []Check {
	cfg = cfg.withDefaults()
	var checks []Check
	err := netspace.Do(cfg.NetNS, func() error {
		checks = append(checks, checkNFT(), checkIPVS(&cfg), checkForwarding())
		return nil
	})
	if err != nil {
		checks = append(checks, Check{Requirement: "network namespace", Why: err.Error(), Mend: "run as root"})
	}
	return append(checks, checkPlugins(&cfg)...)
}

func checkNFT() Check {
	c := Check{Requirement: "nftables with NAT, sets and maps", OK: true, Why: "a table with all that services need was made and removed"}
	if err := nft.Probe(); err != nil {
		c.OK, c.Why, c.Mend = false, err.Error(), "modprobe -a nf_tables nft_chain_nat nft_masq nft_reject nft_numgen nft_ct"
		if errors.Is(err, unix.EPERM) {
			c.Mend = "run as root"
		}
	}
	return c
}

// checkIPVS is satisfied without IPVS, unless it is asked for.
func checkIPVS(cfg *Config) Check {
	c := Check{Requirement: "IPVS, or nftables in its place", OK: true, Why: "IPVS is there and balances services"}
	if cfg.Backend == NFTables {
		c.Why = "nftables is asked for"
		return c
	}
	err := ipvs.Probe()
	switch {
	case err == nil:
	case cfg.Backend == IPVS:
		c.OK, c.Why, c.Mend = false, err.Error(), "modprobe -a ip_vs ip_vs_rr; or: use the backend nftables"
	default:
		c.Why = "nftables balances services: " + err.Error()
	}
	return c
}

func checkForwarding() Check {
	path := host.Forwarding(false)
	c := Check{Requirement: "IP forwarding can be switched on", OK: true, Why: path + " is writable"}
	if err := unix.Access(path, unix.W_OK); err != nil {
		c.OK, c.Why, c.Mend = false, fmt.Sprintf("%s: %v", path, err), "run as root, with /proc/sys writable; or: sysctl -w net.ipv4.ip_forward=1"
	}
	return c
}

// checkPlugins looks for the plugins of the configuration in force.
func checkPlugins(cfg *Config) []Check {
	need, file, err := cfg.networks().Plugins()
	if err != nil {
		return []Check{{Requirement: "CNI configuration", Why: err.Error(), Mend: "mend or remove the first file in " + cfg.CNIConfDir}}
	}
	var out []Check
	for _, name := range need {
		c := Check{Requirement: "CNI plugin " + name, Mend: "apt-get install containernetworking-plugins"}
		i := slices.IndexFunc(cfg.CNIBinDirs, func(dir string) bool { return unix.Access(filepath.Join(dir, name), unix.X_OK) == nil })
		if c.OK = i >= 0; c.OK {
			c.Why, c.Mend = filepath.Join(cfg.CNIBinDirs[i], name), ""
		} else {
			c.Why = "not in " + strings.Join(cfg.CNIBinDirs, ", ")
		}
		out = append(out, c)
	}
	if slices.Contains(need, "bridge") {
		c := Check{Requirement: "bridged pods pass the service tables", OK: true, Why: "bridge-nf-call-iptables is there"}
		if err := unix.Access("/proc/sys/net/bridge/bridge-nf-call-iptables", unix.F_OK); err != nil {
			c.OK, c.Why, c.Mend = false, file+" puts pods on a bridge, and the bridge does not pass packets to the service tables", "modprobe br_netfilter"
		}
		out = append(out, c)
	}
	return out
}
