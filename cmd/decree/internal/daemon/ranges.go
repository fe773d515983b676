package daemon

import (
	"fmt"
	"net/netip"
	"slices"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
)

// completeRanges fills in the address ranges and checks them. Pod ranges come into the
// order of the families of the service ranges.
func (c *Config) completeRanges() error {
	if len(c.ServiceCIDRs) == 0 {
		c.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16")}
	}
	if len(c.PodCIDRs) == 0 {
		c.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")}
	}
	if !c.DNS.IsValid() {
		c.DNS = netip.MustParseAddr("10.97.0.10")
	}
	if len(c.ServiceCIDRs) > 2 || len(c.ServiceCIDRs) != len(c.PodCIDRs) {
		return fmt.Errorf("service ranges %v and pod ranges %v: expected one of each for one address family, or two of each", c.ServiceCIDRs, c.PodCIDRs)
	}
	if len(c.PodCIDRs) == 2 && c.PodCIDRs[0].Addr().Is4() != c.ServiceCIDRs[0].Addr().Is4() {
		c.PodCIDRs = []netip.Prefix{c.PodCIDRs[1], c.PodCIDRs[0]}
	}
	for i := range c.ServiceCIDRs {
		if s, p := c.ServiceCIDRs[i], c.PodCIDRs[i]; s.Addr().Is4() != p.Addr().Is4() {
			return fmt.Errorf("service range %s and pod range %s are of two address families", s, p)
		}
	}
	born := c.birth()
	born.ClusterID = "new"
	if err := state.CheckBootstrap(born); err != nil {
		return fmt.Errorf("--service-cidr, --pod-cidr, --cluster-dns, --service-node-port-range: %w", err)
	}
	return nil
}

// birth are the settings that a new cluster is born with.
func (c *Config) birth() *command.Bootstrap {
	b := &command.Bootstrap{ServiceCIDR: c.ServiceCIDRs[0], PodCIDR: c.PodCIDRs[0], NodeMask: nodeMask(c.PodCIDRs[0]), DNS: c.DNS, NodePorts: c.NodePorts}
	if len(c.ServiceCIDRs) > 1 {
		b.Second = command.Ranges{ServiceCIDR: c.ServiceCIDRs[1], PodCIDR: c.PodCIDRs[1], NodeMask: nodeMask(c.PodCIDRs[1])}
	}
	if b.NodePorts == command.DefaultNodePorts {
		b.NodePorts = command.PortRange{} // which servers of every version understand
	}
	return b
}

// nodeMask is how wide a node's part of the pod range is: 254 pods of IPv4, a network of
// IPv6, or as many nodes as go into a smaller range.
func nodeMask(pods netip.Prefix) int {
	switch {
	case pods.Addr().Is4():
		return 24
	case pods.Bits() < 64:
		return min(64, pods.Bits()+20)
	}
	return min(pods.Bits()+16, 120)
}

// setRanges takes over what the cluster was born with, whatever the flags say now.
func (c *Config) setRanges(families []command.Ranges) {
	c.ServiceCIDRs, c.PodCIDRs = nil, nil
	for _, r := range families {
		c.ServiceCIDRs = append(c.ServiceCIDRs, r.ServiceCIDR)
		c.PodCIDRs = append(c.PodCIDRs, r.PodCIDR)
	}
}

// hostIPs are this machine's own addresses, without those of the cluster.
func (c *Config) hostIPs() []netip.Addr { return hostIPs(slices.Concat(c.PodCIDRs, c.ServiceCIDRs)...) }

// networks are those that this machine stands on, as its node says it.
func (c *Config) networks() string {
	return networkList(hostPrefixes(slices.Concat(c.PodCIDRs, c.ServiceCIDRs)...))
}
