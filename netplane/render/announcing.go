package render

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Announcing returns the addresses of load balancers that this node is to announce, in
// order: of those in d.Announced, the ones that the cluster's nodes, each by itself, give
// to this one.
//
// A node that is ready may get any, one with a ready endpoint if external traffic is to
// stay on its node, and none that is excluded from load balancers by its label. Of these
// the one with the highest hash of address and name has the address (rendezvous hashing,
// Thaler and Ravishankar 1998): when a node comes or goes, no other addresses move.
func Announcing(d Desired) []netip.Addr {
	if len(d.Announced) == 0 {
		return nil
	}
	fit := map[string]bool{}
	for _, n := range d.Nodes {
		fit[n.Name] = announces(n)
	}
	bySvc := slicesByService(d.Slices)
	var out []netip.Addr
	for _, svc := range d.Services {
		if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
			continue
		}
		local := svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
		for _, text := range ingress(svc) {
			a, err := netip.ParseAddr(text)
			if err != nil || !slices.ContainsFunc(d.Announced, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) }) {
				continue
			}
			able := fit
			if local {
				able = withEndpoint(fit, bySvc[name{svc.Namespace, svc.Name}], a.Unmap().Is4())
			}
			if elect(a.Unmap(), able) == d.Node {
				out = append(out, a.Unmap())
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func announces(n *corev1.Node) bool {
	if _, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]; excluded {
		return false
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			return false
		}
	}
	return true
}

// withEndpoint are those of nodes that have a ready endpoint of a family.
func withEndpoint(nodes map[string]bool, eps []*discoveryv1.EndpointSlice, v4 bool) map[string]bool {
	out := map[string]bool{}
	for _, s := range eps {
		if (s.AddressType == discoveryv1.AddressTypeIPv4) != v4 {
			continue
		}
		for i := range s.Endpoints {
			ep := &s.Endpoints[i]
			if ready := ep.Conditions.Ready == nil || *ep.Conditions.Ready; ready && ep.NodeName != nil && nodes[*ep.NodeName] {
				out[*ep.NodeName] = true
			}
		}
	}
	return out
}

// elect returns the node that an address goes to, "" if there is none.
func elect(a netip.Addr, nodes map[string]bool) (best string) {
	var highest uint64
	for n, fit := range nodes {
		if !fit {
			continue
		}
		if h := weight(a, n); best == "" || h > highest || h == highest && n < best {
			best, highest = n, h
		}
	}
	return best
}

// weight is the same on every node, whatever its architecture.
func weight(a netip.Addr, node string) uint64 {
	h := fnv.New64a()
	b := a.As16()
	h.Write(b[:])
	h.Write([]byte(node))
	// FNV hardly mixes its last bytes into the high bits; this does (splitmix64).
	x := binary.BigEndian.Uint64(h.Sum(nil))
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
