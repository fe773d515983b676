package state

import (
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/schemas/api"
)

// placeNode settles the pod ranges of node, which the caller owns, and updates the pool.
// A node has the same number in the range of each family, so that one pool says which
// numbers are taken. old is nil on Create.
func (d *draft) placeNode(key api.Key, old, node *corev1.Node) *command.Rejection {
	b := d.next.settings
	wanted := node.Spec.PodCIDRs
	if n := len(b.Families()); len(wanted) > n {
		return invalid(key, "spec.podCIDRs has %d ranges: %s", len(wanted), atMost(n))
	}
	if one := node.Spec.PodCIDR; one != "" && (len(wanted) == 0 || wanted[0] != one) {
		wanted = []string{one}
	} else if len(wanted) > 0 && wanted[0] == "" {
		wanted = nil
	}
	n, ok := nodeNumber(b, old)
	switch {
	case len(wanted) > 0 && !(ok && wanted[0] == old.Spec.PodCIDR):
		number, rejection := d.wantedRange(key, wanted[0])
		if rejection != nil {
			return rejection
		}
		d.releaseNode(old)
		n = number
		d.next.nodes.take(d.edit, n, holderOf(key))
	case !ok:
		pool, number, free := d.next.nodes.free(0, nodeRanges(b)-1, nodeRanges(b))
		if !free {
			return invalid(key, "no /%d is left in the pod range %s: all %d are in use, delete a node that is gone", b.NodeMask, b.PodCIDR, nodeRanges(b))
		}
		d.next.nodes, n = pool, number
		d.next.nodes.take(d.edit, n, holderOf(key))
	}
	cidrs := nodeCIDRs(b, n)
	if len(wanted) > 1 && wanted[1] != cidrs[1] {
		return invalid(key, "spec.podCIDRs: with %s goes %s, not %s", cidrs[0], cidrs[1], wanted[1])
	}
	node.Spec.PodCIDR, node.Spec.PodCIDRs = cidrs[0], cidrs
	return nil
}

func atMost(families int) string {
	if families == 1 {
		return "one is possible"
	}
	return "one of each address family is possible"
}

// wantedRange is the number of the free range that a node asks for.
func (d *draft) wantedRange(key api.Key, wanted string) (uint64, *command.Rejection) {
	b := d.next.settings
	p, err := netip.ParsePrefix(wanted)
	if err != nil {
		return 0, invalid(key, "spec.podCIDR %q is not a network", wanted)
	}
	n, ok := nodeRangeNumber(b, p)
	if !ok {
		return 0, invalid(key, "spec.podCIDR %s is not a /%d of the pod range %s", wanted, b.NodeMask, b.PodCIDR)
	}
	if holder, taken := d.next.nodes.holder(n); taken {
		return 0, invalid(key, "spec.podCIDR %s is in use by nodes %q", wanted, holder)
	}
	return n, nil
}

func (d *draft) releaseNode(node *corev1.Node) {
	if n, ok := nodeNumber(d.next.settings, node); ok {
		d.next.nodes.release(d.edit, n)
	}
}

// nodeNumber is the number that a stored node holds; node may be nil.
func nodeNumber(b *command.Bootstrap, node *corev1.Node) (uint64, bool) {
	if node == nil {
		return 0, false
	}
	p, err := netip.ParsePrefix(node.Spec.PodCIDR)
	if err != nil {
		return 0, false
	}
	return nodeRangeNumber(b, p)
}

func holderOf(k api.Key) string { return strings.TrimPrefix(k.Namespace+"/"+k.Name, "/") }
