package state

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// CheckBootstrap says what is wrong with the settings of a new cluster.
func CheckBootstrap(b *command.Bootstrap) error {
	if b.ClusterID == "" {
		return fmt.Errorf("the cluster id is empty")
	}
	for i, p := range []netip.Prefix{b.ServiceCIDR, b.PodCIDR} {
		name := [...]string{"service", "pod"}[i]
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
			return fmt.Errorf("%s range %q is not a network such as 10.97.0.0/16", name, p)
		}
		if bits := p.Addr().BitLen() - p.Bits(); bits < 2 || (p.Addr().Is4() && bits > 24) {
			return fmt.Errorf("%s range %s must be between /8 and /30 wide", name, p)
		}
	}
	if b.ServiceCIDR.Overlaps(b.PodCIDR) {
		return fmt.Errorf("service range %s and pod range %s overlap", b.ServiceCIDR, b.PodCIDR)
	}
	if b.NodeMask < b.PodCIDR.Bits() || b.NodeMask > b.PodCIDR.Addr().BitLen()-2 || b.NodeMask-b.PodCIDR.Bits() > 20 {
		return fmt.Errorf("a node range of /%d does not fit into the pod range %s", b.NodeMask, b.PodCIDR)
	}
	if r := b.Restored; r != nil && (r.ClusterID == "" || r.ClusterID == b.ClusterID) {
		return fmt.Errorf("the id %q of the cluster that was restored does not tell it from the new one, %q", r.ClusterID, b.ClusterID)
	}
	low, high := serviceBounds(b)
	if n, ok := numberOf(b.ServiceCIDR, b.DNS); !ok || n < low || n > high {
		return fmt.Errorf("the cluster DNS address %s must lie within the service range %s, and not at its ends", b.DNS, b.ServiceCIDR)
	}
	return nil
}

// placeService settles the cluster IP of svc, which the caller owns, and updates
// the pool. old is nil on Create.
func (d *draft) placeService(key api.Key, old, svc *corev1.Service) *command.Rejection {
	had, wanted := serviceIP(old), wantedIP(svc)
	if len(svc.Spec.ClusterIPs) > 1 {
		return invalid(key, "spec.clusterIPs has %d addresses: one is possible, services have one address family", len(svc.Spec.ClusterIPs))
	}
	switch {
	case svc.Spec.Type == corev1.ServiceTypeExternalName:
		if wanted != "" && wanted != had {
			return invalid(key, "a service of type ExternalName has no cluster IP: remove spec.clusterIP")
		}
		d.releaseService(old)
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = "", nil
		return nil
	case wanted == corev1.ClusterIPNone:
		d.releaseService(old)
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = corev1.ClusterIPNone, []string{corev1.ClusterIPNone}
		return nil
	case had != "" && (wanted == "" || wanted == had):
		d.setServiceIP(svc, had)
		return nil
	case wanted == "":
		return d.allocateServiceIP(key, svc)
	}
	return d.claimServiceIP(key, old, svc, wanted)
}

func (d *draft) allocateServiceIP(key api.Key, svc *corev1.Service) *command.Rejection {
	b := d.next.settings
	low, high := serviceBounds(b)
	dns, _ := numberOf(b.ServiceCIDR, b.DNS)
	pool, n, ok := d.next.services.free(low, high, dns)
	if !ok {
		return invalid(key, "no address is left in the service range %s: all %d are in use, delete a service that is not needed", b.ServiceCIDR, d.next.services.used.Len())
	}
	pool.take(d.edit, n, holderOf(key))
	d.next.services = pool
	d.setServiceIP(svc, addressAt(b.ServiceCIDR, n, 0).String())
	return nil
}

func (d *draft) claimServiceIP(key api.Key, old, svc *corev1.Service, wanted string) *command.Rejection {
	b := d.next.settings
	addr, err := netip.ParseAddr(wanted)
	if err != nil {
		return invalid(key, "spec.clusterIP %q is not an IP address", wanted)
	}
	n, ok := numberOf(b.ServiceCIDR, addr)
	if low, high := serviceBounds(b); !ok || n < low || n > high {
		return invalid(key, "spec.clusterIP %s is not in the service range %s", wanted, b.ServiceCIDR)
	}
	if addr == b.DNS {
		return invalid(key, "spec.clusterIP %s is the cluster DNS address, choose another or none", wanted)
	}
	if holder, taken := d.next.services.holder(n); taken && holder != holderOf(key) {
		return invalid(key, "spec.clusterIP %s is in use by services %q, choose another or none", wanted, holder)
	}
	d.releaseService(old)
	d.next.services.take(d.edit, n, holderOf(key))
	d.setServiceIP(svc, addr.String())
	return nil
}

// setServiceIP writes the address and what Kubernetes clients expect beside it.
func (d *draft) setServiceIP(svc *corev1.Service, ip string) {
	svc.Spec.ClusterIP, svc.Spec.ClusterIPs = ip, []string{ip}
	if svc.Spec.IPFamilies == nil {
		family := corev1.IPv4Protocol
		if d.next.settings.ServiceCIDR.Addr().Is6() {
			family = corev1.IPv6Protocol
		}
		svc.Spec.IPFamilies = []corev1.IPFamily{family}
	}
	if svc.Spec.IPFamilyPolicy == nil {
		policy := corev1.IPFamilyPolicySingleStack
		svc.Spec.IPFamilyPolicy = &policy
	}
}

// releaseService gives back the address that svc holds, if any; svc may be nil.
func (d *draft) releaseService(svc *corev1.Service) {
	if n, ok := serviceNumber(d.next.settings, svc); ok {
		d.next.services.release(d.edit, n)
	}
}

// serviceNumber is the number that a stored service holds.
func serviceNumber(b *command.Bootstrap, svc *corev1.Service) (uint64, bool) {
	addr, err := netip.ParseAddr(serviceIP(svc))
	if err != nil {
		return 0, false
	}
	return numberOf(b.ServiceCIDR, addr)
}

// serviceIP is the address of a stored service, "" for none; svc may be nil.
func serviceIP(svc *corev1.Service) string {
	if svc == nil || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return ""
	}
	return svc.Spec.ClusterIP
}

func wantedIP(svc *corev1.Service) string {
	if svc.Spec.ClusterIP == "" && len(svc.Spec.ClusterIPs) == 1 {
		return svc.Spec.ClusterIPs[0]
	}
	return svc.Spec.ClusterIP
}

// placeNode settles the pod range of node, which the caller owns, and updates the
// pool. old is nil on Create.
func (d *draft) placeNode(key api.Key, old, node *corev1.Node) *command.Rejection {
	b := d.next.settings
	wanted := node.Spec.PodCIDR
	if wanted == "" && len(node.Spec.PodCIDRs) > 0 {
		wanted = node.Spec.PodCIDRs[0]
	}
	if len(node.Spec.PodCIDRs) > 1 {
		return invalid(key, "spec.podCIDRs has %d ranges: one is possible", len(node.Spec.PodCIDRs))
	}
	if had := podCIDR(old); had != "" && (wanted == "" || wanted == had) {
		node.Spec.PodCIDR, node.Spec.PodCIDRs = had, []string{had}
		return nil
	}
	pool, n, ok := d.next.nodes.free(0, nodeRanges(b)-1, nodeRanges(b))
	if wanted != "" {
		p, err := netip.ParsePrefix(wanted)
		if err != nil {
			return invalid(key, "spec.podCIDR %q is not a network", wanted)
		}
		if n, ok = nodeRangeNumber(b, p); !ok {
			return invalid(key, "spec.podCIDR %s is not a /%d of the pod range %s", wanted, b.NodeMask, b.PodCIDR)
		}
		if holder, taken := d.next.nodes.holder(n); taken {
			return invalid(key, "spec.podCIDR %s is in use by nodes %q", wanted, holder)
		}
		pool = d.next.nodes
	}
	if !ok {
		return invalid(key, "no /%d is left in the pod range %s: all %d are in use, delete a node that is gone", b.NodeMask, b.PodCIDR, nodeRanges(b))
	}
	d.next.nodes = pool
	d.releaseNode(old)
	d.next.nodes.take(d.edit, n, holderOf(key))
	cidr := nodeRange(b, n).String()
	node.Spec.PodCIDR, node.Spec.PodCIDRs = cidr, []string{cidr}
	return nil
}

func (d *draft) releaseNode(node *corev1.Node) {
	if n, ok := nodeNumber(d.next.settings, node); ok {
		d.next.nodes.release(d.edit, n)
	}
}

func nodeNumber(b *command.Bootstrap, node *corev1.Node) (uint64, bool) {
	p, err := netip.ParsePrefix(podCIDR(node))
	if err != nil {
		return 0, false
	}
	return nodeRangeNumber(b, p)
}

func podCIDR(node *corev1.Node) string {
	if node == nil {
		return ""
	}
	return node.Spec.PodCIDR
}

func holderOf(k api.Key) string { return strings.TrimPrefix(k.Namespace+"/"+k.Name, "/") }
