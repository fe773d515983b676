package render

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"decree.dev/decree/schemas/api"
)

// Announcement is an address of a load balancer and the node that answers for it on the
// network: to ARP and to neighbour discovery.
type Announcement struct {
	Addr            netip.Addr
	Namespace, Name string // of the service
	// Node is "" when no node can serve the address.
	Node string
}

// Announcements elects the announcing node of every address that nodes hold for services
// of type LoadBalancer, ordered by address. It says the same on every node that sees the
// same objects, so that nothing is stored and nobody has to agree: each service ranks
// the nodes in an order of its own (rendezvous hashing), and the first that can serve it
// announces it. So the loss of a node moves the addresses of that node only.
//
// A node can serve an address when it is ready and not excluded by the label
// node.kubernetes.io/exclude-from-external-load-balancers; with external traffic policy
// Local, when it also has a ready endpoint of the address's family. Where nodes stand on the
// network that the address is of ([api.AnnotationNetworks]), others would announce it to nobody, and
// cannot serve it; where none does, a router has to lead to it, and any node will do. An
// address that two services name is that of the first by namespace and name.
func Announcements(d Desired) []Announcement {
	services := slices.DeleteFunc(slices.Clone(d.Services), func(svc *corev1.Service) bool {
		return svc.Spec.Type != corev1.ServiceTypeLoadBalancer || len(svc.Status.LoadBalancer.Ingress) == 0
	})
	if len(services) == 0 {
		return nil
	}
	nodes, on := announcers(d.Nodes), networks(d.Nodes)
	var bySvc groups // made when they are needed
	var out []Announcement
	for _, svc := range services {
		for _, text := range ingress(svc) {
			a, err := netip.ParseAddr(text)
			if err != nil || a.Zone() != "" {
				continue
			}
			a = a.Unmap()
			near := on.at(a)
			able := func(node string) bool { return near == nil || near[node] }
			if svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
				if bySvc.members == nil {
					bySvc.set(d.Slices)
				}
				local := serving(bySvc.of(name{svc.Namespace, svc.Name}).slices, a.Is4())
				able = func(node string) bool { return local[node] && (near == nil || near[node]) }
			}
			out = append(out, Announcement{a, svc.Namespace, svc.Name, elect(svc, nodes, able)})
		}
	}
	slices.SortFunc(out, func(a, b Announcement) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return slices.CompactFunc(out, func(a, b Announcement) bool { return a.Addr == b.Addr })
}

// Balanced are the addresses that services of type LoadBalancer have, as networks for
// [Desired.Announced].
func Balanced(services []*corev1.Service) []netip.Prefix {
	var out []netip.Prefix
	for _, svc := range services {
		if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
			continue
		}
		for _, text := range ingress(svc) {
			if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
				out = append(out, netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()))
			}
		}
	}
	return out
}

// standing are the nodes that stand on each network.
type standing map[netip.Prefix]map[string]bool

// networks reads what nodes say. What does not parse is left out.
func networks(nodes []*corev1.Node) standing {
	out := standing{}
	for _, n := range nodes {
		for _, text := range strings.Split(n.Annotations[api.AnnotationNetworks], ",") {
			p, err := netip.ParsePrefix(strings.TrimSpace(text))
			if err != nil {
				continue
			}
			if out[p.Masked()] == nil {
				out[p.Masked()] = map[string]bool{}
			}
			out[p.Masked()][n.Name] = true
		}
	}
	return out
}

// at are the nodes that stand on a network of a, whatever state they are in; nil if none does.
func (s standing) at(a netip.Addr) (nodes map[string]bool) {
	for p, here := range s {
		switch {
		case !p.Contains(a):
		case nodes == nil:
			nodes = here
		default: // networks may lie within each other
			nodes = maps.Clone(nodes)
			maps.Copy(nodes, here)
		}
	}
	return nodes
}

// announcers are the names of the nodes that may announce.
func announcers(nodes []*corev1.Node) (names []string) {
	for _, n := range nodes {
		_, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]
		ready := slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		})
		if ready && !excluded && n.DeletionTimestamp == nil {
			names = append(names, n.Name)
		}
	}
	return names
}

// serving are the nodes that have a ready endpoint of a family.
func serving(eps []*discoveryv1.EndpointSlice, v4 bool) map[string]bool {
	out := map[string]bool{}
	for _, s := range eps {
		if (s.AddressType == discoveryv1.AddressTypeIPv4) != v4 || s.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for i := range s.Endpoints {
			if ep := &s.Endpoints[i]; ep.NodeName != nil && (ep.Conditions.Ready == nil || *ep.Conditions.Ready) {
				out[*ep.NodeName] = true
			}
		}
	}
	return out
}

// elect is the able node that ranks first for svc. It is asked whenever anything changes,
// for every service and node: hence a hash that is quick, the same on every node.
func elect(svc *corev1.Service, nodes []string, able func(string) bool) (first string) {
	var best uint64
	key := slices.Grow([]byte(svc.Namespace+"\x00"+svc.Name+"\x00"), 64)
	for _, n := range nodes {
		if !able(n) {
			continue
		}
		if rank := xxhash.Sum64(append(key, n...)); first == "" || rank > best || rank == best && n < first {
			first, best = n, rank
		}
	}
	return first
}
