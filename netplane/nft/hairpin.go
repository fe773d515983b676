package nft

import (
	"iter"
	"net/netip"
	"slices"

	"decree.dev/decree/netplane/render"
)

func hairpinOf(a netip.Addr) element {
	return element{set: hairpin, key: string(appendAddr(appendAddr(nil, a), a))}
}

// recount changes reach, and returns what follows for hairpin.
func (s *Services) recount(all func(count func(netip.Addr, int))) (c change) {
	before := map[netip.Addr]int{}
	all(func(a netip.Addr, by int) {
		if _, ok := before[a]; !ok {
			before[a] = s.reach[a]
		}
		s.reach[a] += by
	})
	for a, n := range before {
		switch now := s.reach[a]; {
		case n == 0 && now > 0:
			c.adds = append(c.adds, hairpinOf(a))
		case n > 0 && now == 0:
			c.dels = append(c.dels, hairpinOf(a))
			delete(s.reach, a)
		case now == 0:
			delete(s.reach, a)
		}
	}
	return c
}

// countPods counts the endpoints of a service, if there is one, that are pods of this node.
func countPods(svc *render.Service, pods []netip.Prefix, by int, count func(netip.Addr, int)) {
	if svc == nil {
		return
	}
	for ep := range everyEndpoint(svc) {
		if slices.ContainsFunc(pods, func(p netip.Prefix) bool { return p.Contains(ep.Addr()) }) {
			count(ep.Addr(), by)
		}
	}
}

// everyEndpoint is what any client may be led to; some of it may come twice.
func everyEndpoint(svc *render.Service) iter.Seq[netip.AddrPort] {
	return func(yield func(netip.AddrPort) bool) {
		for _, eps := range [...][]netip.AddrPort{svc.Endpoints, svc.Outside} {
			for _, ep := range eps {
				if !yield(ep) {
					return
				}
			}
		}
	}
}
