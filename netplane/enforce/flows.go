package enforce

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
)

// closes reports whether want may not allow connections that have does. Nobody has to look
// at them, which means at all that the machine has, where more is allowed than before, for
// a pod that is new, or because of one that is gone.
func closes(have, want *policy.Plan) bool {
	for i := range want.Subjects {
		s := &want.Subjects[i]
		old, ok := have.Find(s.Addr)
		if !ok && have.Known(s.Addr) || ok && (!sameGroup(old.Ingress, s.Ingress) || !sameGroup(old.Egress, s.Egress)) {
			return true
		}
	}
	for _, p := range have.Peers {
		if i, ok := slices.BinarySearchFunc(want.Peers, p.ID, func(p *policy.Peer, id string) int { return cmp.Compare(p.ID, id) }); ok && loses(p.Addrs, want.Peers[i].Addrs, netip.Addr.Compare, want.Known) {
			return true
		}
	}
	for _, n := range have.Names {
		if i, ok := slices.BinarySearchFunc(want.Names, n.ID, func(n *policy.Name, id string) int { return cmp.Compare(n.ID, id) }); ok && loses(n.Ports, want.Names[i].Ports, render.Port.Compare, func(p render.Port) bool { return want.Known(p.Addr) }) {
			return true
		}
	}
	return false
}

// loses reports whether something of have that matters is not in want; both are in order.
func loses[T any](have, want []T, order func(a, b T) int, matters func(T) bool) bool {
	for _, x := range have {
		for len(want) > 0 && order(want[0], x) < 0 {
			want = want[1:]
		}
		if (len(want) == 0 || order(want[0], x) != 0) && matters(x) {
			return true
		}
	}
	return false
}

// sameGroup reports whether both consist of the same objects.
func sameGroup(a, b *policy.Group) bool {
	if a == nil || b == nil {
		return b == nil // nothing is closed where nothing is isolated
	}
	return slices.EqualFunc(a.Policies, b.Policies, func(p, q *policy.Policy) bool { return p.Object == q.Object })
}

// sweep deletes the kernel's memory of connections that p does not allow. Their next
// packets would be dropped without it, but not what the other end sends.
func (e *Policies) sweep(p *policy.Plan, ranges []netip.Prefix) error {
	addrs, err := e.links.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list addresses of the node: %w", err)
	}
	d := &denied{plan: p, ranges: ranges, own: map[netip.Addr]bool{}}
	for _, a := range addrs {
		if own, ok := netip.AddrFromSlice(a.IP); ok {
			d.own[own.Unmap()] = true
		}
	}
	n := 0
	for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
		m, err := e.flows.Delete(f, d.forgotten)
		n += m
		if err != nil {
			return err
		}
	}
	if n > 0 {
		e.log.Info("connections ended that network policies do not allow", "connections", n)
	}
	return nil
}

// denied are the connections that a plan does not allow.
type denied struct {
	plan   *policy.Plan
	own    map[netip.Addr]bool
	ranges []netip.Prefix
}

// forgotten judges by who began the flow, as it called itself, and by who answers, whatever it
// was called by.
func (d *denied) forgotten(flow *flows.Flow) bool {
	from, to := flow.Orig.Src.Addr(), flow.Reply.Src
	local := d.own[from] || slices.ContainsFunc(d.ranges, func(r netip.Prefix) bool { return r.Contains(from) })
	return !d.plan.Judge(policy.Flow{From: from, To: to.Addr(), Proto: render.Proto(flow.Proto), Port: to.Port(), FromNode: local}).Allowed
}
