package policy

import (
	"net/netip"

	"decree.dev/decree/netplane/render"
)

// Flow is the first packet of a connection, after its destination was translated and
// before its source was.
type Flow struct {
	From, To netip.Addr
	Proto    render.Proto
	Port     uint16 // of the destination
	// FromNode: the node of the destination sent it, whatever its address.
	FromNode bool
}

// Verdict is what policies say about a flow: it has to leave and to arrive.
type Verdict struct {
	Allowed         bool
	Egress, Ingress Decision
}

// Decision is what policies say about one direction.
type Decision struct {
	Allowed bool
	// Isolating are the policies that isolate the subject; nil if none does.
	Isolating *Group
	// By is the first rule that allows it; nil without one, also where none is needed.
	By *Rule
}

// Judge says whether a flow is allowed, and why. An address that is no subject of the plan
// is not isolated.
func (p *Plan) Judge(f Flow) Verdict {
	v := Verdict{Egress: Decision{Allowed: true}, Ingress: Decision{Allowed: true}}
	if f.From != f.To { // a pod reaches itself
		if s, ok := p.Find(f.From); ok && !f.FromNode {
			v.Egress = s.Egress.judge(f, f.To)
		}
		if s, ok := p.Find(f.To); ok && !f.FromNode {
			v.Ingress = s.Ingress.judge(f, f.From)
		}
	}
	v.Allowed = v.Egress.Allowed && v.Ingress.Allowed
	return v
}

// judge looks for a rule that allows f between the subject and its peer.
func (g *Group) judge(f Flow, peer netip.Addr) Decision {
	if g == nil {
		return Decision{Allowed: true}
	}
	for _, p := range g.Policies {
		for _, r := range p.Rules {
			if r.meets(peer) && r.open(f) {
				return Decision{Allowed: true, Isolating: g, By: r}
			}
		}
	}
	return Decision{Isolating: g}
}

func (r *Rule) meets(peer netip.Addr) bool {
	if r.Anyone || r.Block != nil && r.Block.Has(peer) {
		return true
	}
	for _, p := range r.Peers {
		if p.Has(peer) {
			return true
		}
	}
	return false
}

func (r *Rule) open(f Flow) bool {
	if r.AnyPort {
		return true
	}
	for _, p := range r.Ports {
		if p.Name != nil && p.Name.Has(render.Port{Addr: f.To, Proto: f.Proto, Port: f.Port}) ||
			p.Name == nil && p.Proto == f.Proto && p.First <= f.Port && f.Port <= p.Last {
			return true
		}
	}
	return false
}
