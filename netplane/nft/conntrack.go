package nft

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/render"
)

// stale are UDP services whose flows may lead where they may not any more, as they are now.
type stale struct {
	services map[render.Port]*render.Service
	// inside is where clients are that are not from outside.
	inside []netip.Prefix
}

// forgotten reports whether the flow goes to what is no endpoint for its client: one
// that the service lost, or the address itself, from a time at which no service was there;
// or whether the client is not served any more.
func (s *stale) forgotten(flow *flows.Flow) bool {
	svc := s.services[render.Port{Addr: flow.Orig.Dst.Addr(), Proto: render.Proto(flow.Proto), Port: flow.Orig.Dst.Port()}]
	if svc == nil {
		return false
	}
	client := flow.Orig.Src.Addr()
	if len(svc.Sources) > 0 && !within(svc.Sources, client) {
		return true
	}
	return !among(led(svc, !within(s.inside, client)), flow.Reply.Src)
}

// among looks in a list that is in order.
func among(eps []netip.AddrPort, ep netip.AddrPort) bool {
	_, found := slices.BinarySearchFunc(eps, ep, netip.AddrPort.Compare)
	return found
}

func within(ps []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
}

// led is where clients of one kind are led. The node itself may count as outside here: its
// flow is then found anew, and goes on.
func led(svc *render.Service, fromOutside bool) []netip.AddrPort {
	if svc.Split && fromOutside {
		return svc.Outside
	}
	return svc.Endpoints
}

// unanswered returns what finds TCP connections that were led to lost endpoints and got no answer.
func unanswered(lost []netip.Prefix) func(*flows.Flow) bool {
	return func(flow *flows.Flow) bool {
		server := flow.Reply.Src.Addr()
		return flow.TCPState == nl.TCP_CONNTRACK_SYN_SENT && within(lost, server) && flow.Orig.Dst.Addr() != server
	}
}

// forgetUnanswered deletes the kernel's memory of connections that began towards nodes which
// are lost now, once no service leads there any more or more nodes are lost. For two minutes
// the next try from the same port would be led there again. Established connections stay: the
// node may only be out of reach of the control plane.
func (s *Services) forgetUnanswered(ops []diff.Op, t *render.Table) error {
	s.lost = s.lost || len(t.Lost) > 0 && (!slices.Equal(s.swept, t.Lost) || slices.ContainsFunc(ops, func(op diff.Op) bool {
		return op.Have != nil && op.Port().Proto == render.TCP && slices.ContainsFunc(op.Have.Endpoints, func(ep netip.AddrPort) bool { return within(t.Lost, ep.Addr()) })
	}))
	for _, f := range families {
		if s.lost && uses(f, t) {
			if _, err := s.flows.Delete(f.conntrack, unanswered(t.Lost)); err != nil {
				return fmt.Errorf("forget connections to lost nodes: %w", err)
			}
		}
	}
	s.lost, s.swept = false, t.Lost
	return nil
}

// forgetFlows deletes the kernel's memory of UDP flows that the changes to t ended: a client
// that keeps sending from one port would stay there for ever. TCP connections end by
// themselves, if they were answered.
func (s *Services) forgetFlows(ops []diff.Op, t *render.Table) error {
	if err := s.forgetUnanswered(ops, t); err != nil {
		return err
	}
	s.unforgotten = append(s.unforgotten, ops...)
	inside := slices.Concat(t.Cluster, t.Range) // what the node sends to the range comes from there
	for f, services := range staleServices(s.unforgotten, t.Range) {
		if _, err := s.flows.Delete(f.conntrack, (&stale{services, inside}).forgotten); err != nil {
			return fmt.Errorf("forget UDP flows to removed endpoints: %w", err)
		}
	}
	s.unforgotten = nil
	return nil
}

// staleServices are those that lead or serve less than they did, and those that came to an
// address that others may have answered at. In ranges nobody does.
func staleServices(ops []diff.Op, ranges []netip.Prefix) map[*family]map[render.Port]*render.Service {
	out := map[*family]map[render.Port]*render.Service{}
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
		if out[f][p] != nil || loses(op.Have, now) || comes(op) && !within(ranges, p.Addr) {
			if out[f] == nil {
				out[f] = map[render.Port]*render.Service{}
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
	for _, outside := range []bool{false, true} {
		left := led(now, outside)
		if slices.ContainsFunc(led(have, outside), func(ep netip.AddrPort) bool { return !among(left, ep) }) {
			return true
		}
	}
	return len(now.Sources) > 0 && !slices.Equal(have.Sources, now.Sources)
}

// comes reports whether a service leads somewhere that did not before.
func comes(op diff.Op) bool {
	return op.Want != nil && len(op.Want.Endpoints) > 0 && (op.Have == nil || len(op.Have.Endpoints) == 0)
}
