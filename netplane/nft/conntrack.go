package nft

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/render"
)

// gone are endpoints that UDP services lost. It implements
// netlink.CustomConntrackFilter.
type gone map[render.Port]map[netip.AddrPort]bool

// MatchConntrackFlow reports whether the flow goes to an endpoint that its service
// lost.
func (g gone) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	dst, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	if !ok {
		return false
	}
	eps := g[render.Port{Addr: dst.Unmap(), Proto: render.Proto(flow.Forward.Protocol), Port: flow.Forward.DstPort}]
	if eps == nil {
		return false
	}
	src, ok := netip.AddrFromSlice(flow.Reverse.SrcIP)
	return ok && eps[netip.AddrPortFrom(src.Unmap(), flow.Reverse.SrcPort)]
}

// forgetFlows deletes the kernel's memory of UDP flows to endpoints that are gone:
// a client that keeps sending from one port would stay there for ever. TCP
// connections end by themselves.
func (s *Services) forgetFlows(ops []diff.Op) error {
	s.unforgotten = append(s.unforgotten, ops...)
	for f, g := range lostEndpoints(s.unforgotten) {
		if _, err := s.flows.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(f.conntrack), g); err != nil {
			return fmt.Errorf("forget UDP flows to removed endpoints: %w", err)
		}
	}
	s.unforgotten = nil
	return nil
}

func lostEndpoints(ops []diff.Op) map[*family]gone {
	lost := map[*family]gone{}
	for _, op := range ops {
		if op.Have == nil || op.Have.Proto != render.UDP || len(op.Have.Endpoints) == 0 {
			continue
		}
		stay := map[netip.AddrPort]bool{}
		if op.Want != nil {
			for _, ep := range op.Want.Endpoints {
				stay[ep] = true
			}
		}
		for _, ep := range op.Have.Endpoints {
			if stay[ep] {
				continue
			}
			f := familyOf(op.Have.Addr)
			if lost[f] == nil {
				lost[f] = gone{}
			}
			if lost[f][op.Have.Port] == nil {
				lost[f][op.Have.Port] = map[netip.AddrPort]bool{}
			}
			lost[f][op.Have.Port][ep] = true
		}
	}
	return lost
}
