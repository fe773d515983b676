package nft

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/render"
)

// stale are UDP services whose flows may lead where none leads any more, with the
// endpoints that are still good. It implements netlink.CustomConntrackFilter.
type stale map[render.Port]*render.Service

// MatchConntrackFlow reports whether the flow goes to what is no endpoint of its service:
// one that it lost, or the address itself, from a time at which no service was there.
func (s stale) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	dst, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	if !ok {
		return false
	}
	svc := s[render.Port{Addr: dst.Unmap(), Proto: render.Proto(flow.Forward.Protocol), Port: flow.Forward.DstPort}]
	if svc == nil {
		return false
	}
	src, ok := netip.AddrFromSlice(flow.Reverse.SrcIP)
	return ok && !svc.Leads(netip.AddrPortFrom(src.Unmap(), flow.Reverse.SrcPort))
}

// forgetFlows deletes the kernel's memory of UDP flows that the changes ended: a client that
// keeps sending from one port would stay there for ever. TCP connections end by themselves.
func (s *Services) forgetFlows(ops []diff.Op, ranges []netip.Prefix) error {
	s.unforgotten = append(s.unforgotten, ops...)
	for f, st := range staleServices(s.unforgotten, ranges) {
		if _, err := s.flows.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(f.conntrack), st); err != nil {
			return fmt.Errorf("forget UDP flows to removed endpoints: %w", err)
		}
	}
	s.unforgotten = nil
	return nil
}

// staleServices are those that lost an endpoint, and those that came to an address that
// others may have answered at. In ranges nobody does.
func staleServices(ops []diff.Op, ranges []netip.Prefix) map[*family]stale {
	out := map[*family]stale{}
	for _, op := range ops {
		p := op.Port()
		if p.Proto != render.UDP {
			continue
		}
		now := op.Want
		if now == nil {
			now = &render.Service{Port: p}
		}
		f := familyOf(p.Addr)
		if loses(op.Have, now) || out[f][p] != nil || comes(op) && !slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(p.Addr) }) {
			if out[f] == nil {
				out[f] = stale{}
			}
			out[f][p] = now
		}
	}
	return out
}

func loses(have, now *render.Service) bool {
	if have == nil {
		return false
	}
	for ep := range everyEndpoint(have) {
		if !now.Leads(ep) {
			return true
		}
	}
	return false
}

// comes reports whether a service leads somewhere that did not before.
func comes(op diff.Op) bool {
	return op.Want != nil && len(op.Want.Endpoints) > 0 && (op.Have == nil || len(op.Have.Endpoints) == 0)
}
