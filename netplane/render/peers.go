package render

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/schemas/api"
)

// Peer is a node as others reach it: its own addresses, in the order in which its agent
// names them, and where its pods are, the primary family first.
type Peer struct {
	Node  string
	Addrs []netip.Addr
	Pods  []netip.Prefix
	// Key is its public key for WireGuard as the node says it, in base64; empty: what is
	// sent to it is not encrypted.
	Key string
}

// Equal reports whether both say the same.
func (p Peer) Equal(q Peer) bool {
	return p.Node == q.Node && p.Key == q.Key && slices.Equal(p.Addrs, q.Addrs) && slices.Equal(p.Pods, q.Pods)
}

// Peers returns d's own node and, in the order of their names, all others that have
// addresses and pods.
func Peers(d Desired) (self Peer, others []Peer) {
	self = Peer{Node: d.Node, Pods: ranges(d.PodCIDRs)}
	for _, n := range d.Nodes {
		p := PeerOf(n)
		switch {
		case n.Name == d.Node:
			self.Addrs, self.Key = p.Addrs, p.Key
		case len(p.Addrs) > 0 && len(p.Pods) > 0:
			others = append(others, p)
		}
	}
	slices.SortFunc(others, func(a, b Peer) int { return strings.Compare(a.Node, b.Node) })
	return self, others
}

// PeerOf is how a node says that it is reached. What does not parse is left out.
func PeerOf(n *corev1.Node) Peer {
	p := Peer{Node: n.Name, Addrs: addresses(n, corev1.NodeInternalIP), Key: n.Annotations[api.AnnotationWireGuard]}
	var pods []netip.Prefix
	for _, text := range n.Spec.PodCIDRs {
		if cidr, err := netip.ParsePrefix(text); err == nil {
			pods = append(pods, cidr)
		}
	}
	p.Pods = ranges(pods)
	return p
}

// ranges are the pod ranges of a node, masked, in the order that they are given in.
func ranges(ps []netip.Prefix) (out []netip.Prefix) {
	for _, p := range ps {
		if p.IsValid() && !slices.Contains(out, p.Masked()) {
			out = append(out, p.Masked())
		}
	}
	return out
}

// lost are the pods of nodes that are known not to be ready; of those whose condition
// nobody reports nothing is known.
func lost(d Desired) []netip.Prefix {
	var out []netip.Prefix
	for _, n := range d.Nodes {
		i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeReady })
		if n.Name != d.Node && i >= 0 && n.Status.Conditions[i].Status != corev1.ConditionTrue {
			out = append(out, PeerOf(n).Pods...)
		}
	}
	return prefixes(out)
}

// addresses are a node's addresses of some kinds, in the order in which its agent names
// them.
func addresses(n *corev1.Node, kinds ...corev1.NodeAddressType) []netip.Addr {
	var out []netip.Addr
	for _, a := range n.Status.Addresses {
		addr, err := netip.ParseAddr(a.Address)
		if slices.Contains(kinds, a.Type) && err == nil && addr.Zone() == "" && !slices.Contains(out, addr.Unmap()) {
			out = append(out, addr.Unmap())
		}
	}
	return out
}
