package state

import (
	"fmt"
	"net/netip"

	"decree.dev/decree/raftstore/command"
)

// CheckBootstrap says what is wrong with the settings of a new cluster.
func CheckBootstrap(b *command.Bootstrap) error {
	if b.ClusterID == "" {
		return fmt.Errorf("the cluster id is empty")
	}
	families := b.Families()
	for _, r := range families {
		if err := checkRanges(r); err != nil {
			return err
		}
	}
	if len(families) > 1 && families[0].ServiceCIDR.Addr().Is4() == families[1].ServiceCIDR.Addr().Is4() {
		return fmt.Errorf("the service ranges %s and %s are of one address family, a second range is for the other one", families[0].ServiceCIDR, families[1].ServiceCIDR)
	}
	if p := b.NodePortRange(); p.First < 1 || p.Last < p.First {
		return fmt.Errorf("%s is not a range of node ports such as %s", p, command.DefaultNodePorts)
	}
	if r := b.Restored; r != nil && (r.ClusterID == "" || r.ClusterID == b.ClusterID) {
		return fmt.Errorf("the id %q of the cluster that was restored does not tell it from the new one, %q", r.ClusterID, b.ClusterID)
	}
	low, high := serviceBounds(b.ServiceCIDR)
	if n, ok := numberOf(b.ServiceCIDR, b.DNS); !ok || n < low || n > high {
		return fmt.Errorf("the cluster DNS address %s must lie within the service range %s, and not at its ends", b.DNS, b.ServiceCIDR)
	}
	return nil
}

// checkRanges says what is wrong with the ranges of one family.
func checkRanges(r command.Ranges) error {
	for i, p := range []netip.Prefix{r.ServiceCIDR, r.PodCIDR} {
		name := [...]string{"service", "pod"}[i]
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
			return fmt.Errorf("%s range %q is not a network such as 10.97.0.0/16", name, p)
		}
		if bits := p.Addr().BitLen() - p.Bits(); bits < 2 || (p.Addr().Is4() && bits > 24) {
			return fmt.Errorf("%s range %s must be between /8 and /30 wide", name, p)
		}
	}
	if r.ServiceCIDR.Overlaps(r.PodCIDR) {
		return fmt.Errorf("service range %s and pod range %s overlap", r.ServiceCIDR, r.PodCIDR)
	}
	if r.NodeMask < r.PodCIDR.Bits() || r.NodeMask > r.PodCIDR.Addr().BitLen()-2 || r.NodeMask-r.PodCIDR.Bits() > 20 {
		return fmt.Errorf("a node range of /%d does not fit into the pod range %s", r.NodeMask, r.PodCIDR)
	}
	return nil
}
