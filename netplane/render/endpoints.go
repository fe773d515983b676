package render

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// candidate is an endpoint that may get traffic of one service port.
type candidate struct {
	addr  netip.AddrPort
	ready bool // or else it still serves while it ends (KEP-1669)
	local bool // on this node
	ep    *discoveryv1.Endpoint
}

// reachable is where traffic of one service port may go, in one address family.
type reachable struct {
	v4 bool
	// cluster are the endpoints for traffic policy Cluster, near to this node where the
	// service says so; local those for Local.
	cluster, local []netip.AddrPort
}

// reachable sorts the endpoints of one service port. Local is not a part of Cluster: when
// no pod of this node is ready, a pod that ends there still serves Local.
func (r *renderer) reachable(svc *corev1.Service, eps []*discoveryv1.EndpointSlice, v4 bool, port string, proto Proto) reachable {
	r.gather(eps, v4, port, proto)
	out := reachable{v4: v4}
	var preference string
	if svc.Spec.TrafficDistribution != nil {
		preference = *svc.Spec.TrafficDistribution
	}
	out.cluster = choose(r.found, r.preferred(preference))
	if usesLocal(svc) {
		out.local = choose(r.found, func(c *candidate) bool { return c.local })
	}
	return out
}

func usesLocal(svc *corev1.Service) bool {
	return svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal ||
		svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
}

// choose returns the ready ones of those that fit, or, when none is ready, those that
// serve while they end.
func choose(found []candidate, fits func(*candidate) bool) []netip.AddrPort {
	var out []netip.AddrPort
	for _, ready := range []bool{true, false} {
		for i := range found {
			if c := &found[i]; c.ready == ready && (fits == nil || fits(c)) {
				out = append(out, c.addr)
			}
		}
		if len(out) > 0 {
			break
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// preferred returns which endpoints of r.found are near enough, or nil if nearness is of no
// matter: hints for this node decide if every ready endpoint has some and one is for this
// node; if not, hints for its zone do in the same way; if not, all endpoints are good.
// Whether they are enough for the traffic is not asked, as in Kubernetes since 1.33.
func (r *renderer) preferred(preference string) func(*candidate) bool {
	if preference == "" && !slices.ContainsFunc(r.found, func(c candidate) bool { return c.ep.Hints != nil }) {
		return nil
	}
	for _, hints := range []func(*candidate) (here, any bool){
		func(c *candidate) (bool, bool) { return r.nodeHint(c, preference) },
		func(c *candidate) (bool, bool) { return r.zoneHint(c, preference) },
	} {
		all, here := true, false
		for i := range r.found {
			if c := &r.found[i]; c.ready {
				h, has := hints(c)
				all, here = all && has, here || h
			}
		}
		if all && here {
			return func(c *candidate) bool { h, _ := hints(c); return h }
		}
	}
	return nil
}

// nodeHint reports whether c is hinted for this node, and whether for any. An endpoint
// without hints counts as hinted for where it is, if the service prefers that.
func (r *renderer) nodeHint(c *candidate, preference string) (here, some bool) {
	if h := c.ep.Hints; h != nil {
		return slices.Contains(h.ForNodes, discoveryv1.ForNode{Name: r.node}), len(h.ForNodes) > 0
	}
	if preference != corev1.ServiceTrafficDistributionPreferSameNode || c.ep.NodeName == nil {
		return false, false
	}
	return c.local, true
}

// zoneHint is nodeHint for zones.
func (r *renderer) zoneHint(c *candidate, preference string) (here, some bool) {
	if h := c.ep.Hints; h != nil {
		return slices.Contains(h.ForZones, discoveryv1.ForZone{Name: r.zone}), len(h.ForZones) > 0
	}
	switch preference {
	case corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone, corev1.ServiceTrafficDistributionPreferSameNode:
		if z := c.ep.Zone; z != nil && *z != "" {
			return *z == r.zone, true
		}
	}
	return false, false
}

// internal is the entry for cluster addresses, without its port.
func (e *reachable) internal(local bool, affinity time.Duration) Service {
	if !local {
		return open(e.cluster, affinity)
	}
	s := open(e.local, affinity)
	s.Drop = len(e.local) == 0 && len(e.cluster) > 0
	return s
}

// external is the entry for addresses from outside the cluster and of nodes. What pods and
// this node send there is not told from what would come back from a load balancer, so that
// it may go to any endpoint whatever the policy.
func (e *reachable) external(local bool, affinity time.Duration) Service {
	s := open(e.cluster, affinity)
	if local && !slices.Equal(e.local, e.cluster) {
		s.Split, s.Outside = true, e.local
	}
	return s
}

func open(eps []netip.AddrPort, affinity time.Duration) Service {
	if len(eps) == 0 {
		affinity = 0
	}
	return Service{Endpoints: eps, Affinity: affinity}
}

// note remembers which endpoints in use are on this node.
func (r *renderer) note(eps []netip.AddrPort) {
	for i := range r.found {
		c := &r.found[i]
		if _, used := slices.BinarySearchFunc(eps, c.addr, netip.AddrPort.Compare); used && c.local {
			r.part.near = append(r.part.near, c.addr.Addr())
		}
	}
}

// gather makes r.found the endpoints of one service port that are ready, or serve while
// they end.
func (r *renderer) gather(eps []*discoveryv1.EndpointSlice, v4 bool, port string, proto Proto) {
	r.found = r.found[:0]
	for _, s := range eps {
		if (s.AddressType == discoveryv1.AddressTypeIPv4) != v4 || s.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		number, ok := slicePort(s, port, proto)
		if !ok {
			continue
		}
		for i := range s.Endpoints {
			ep := &s.Endpoints[i]
			c := ep.Conditions
			ready := c.Ready == nil || *c.Ready
			ending := (c.Serving == nil || *c.Serving) && c.Terminating != nil && *c.Terminating
			addr, ok := firstAddr(ep.Addresses, v4)
			if ok && (ready || ending) {
				local := ep.NodeName != nil && *ep.NodeName == r.node && r.node != ""
				r.found = append(r.found, candidate{netip.AddrPortFrom(addr, number), ready, local, ep})
			}
		}
	}
}

// firstAddr is the first address of an endpoint: the others are defined to be the same
// endpoint (discovery/v1).
func firstAddr(addrs []string, v4 bool) (netip.Addr, bool) {
	if len(addrs) == 0 {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(addrs[0])
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	a = a.Unmap()
	return a, a.Is4() == v4
}

func slicePort(s *discoveryv1.EndpointSlice, port string, proto Proto) (uint16, bool) {
	for i := range s.Ports {
		p := &s.Ports[i]
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
			continue
		}
		var pn string
		if p.Name != nil {
			pn = *p.Name
		}
		pp := TCP
		if p.Protocol != nil {
			pp, _ = ProtoOf(*p.Protocol)
		}
		if pn == port && pp == proto {
			return uint16(*p.Port), true
		}
	}
	return 0, false
}
