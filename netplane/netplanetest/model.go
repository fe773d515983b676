package netplanetest

import (
	"fmt"
	"net/netip"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/netplane/simnet"
)

// Model is the World in memory.
type Model struct{ Kernel *simnet.Kernel }

// NewModel returns a World of which the draws depend on seed only. now is its clock.
func NewModel(seed uint64, now func() time.Time) Model {
	var node []simnet.Address
	for _, n := range Nets {
		node = append(node, simnet.Address{Addr: n.Addr[Node], Net: n.Cluster})
	}
	for _, n := range Nets {
		node = append(node, simnet.Address{Addr: n.Uplink, Net: netip.PrefixFrom(n.Uplink, 0).Masked()})
	}
	k := simnet.New(seed, now, node...)
	k.Serve(render.TCP, TCPPort)
	k.Serve(render.TCP, SecondPort)
	k.Serve(render.UDP, UDPPort)
	for _, n := range Nets {
		for h, a := range n.Addr {
			if h != Node {
				k.AddHost(a)
			}
		}
	}
	return Model{k}
}

// Services implements World.
func (m Model) Services() (netplane.Services, error) { return m.Kernel, nil }

// source is the address that a host sends from.
func source(from Host, to netip.Addr) (netip.Addr, error) {
	for _, n := range Nets {
		switch {
		case n.Uplink.Is4() != to.Is4():
		case from != Node:
			return n.Addr[from], nil
		case n.Range.Contains(to) || to == n.Uplink:
			return to, nil // service addresses are local to a node
		case n.Cluster.Contains(to):
			return n.Addr[Node], nil
		default:
			return n.Uplink, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("no family for %s", to)
}

// Send implements World.
func (m Model) Send(from Host, proto render.Proto, to netip.AddrPort) (Verdict, error) {
	src, err := source(from, to.Addr())
	if err != nil {
		return Verdict{}, err
	}
	v, err := m.Kernel.Send(src, render.Port{Addr: to.Addr(), Proto: proto, Port: to.Port()})
	return verdict(v), err
}

// Outcomes are all verdicts that Send may come to.
func (m Model) Outcomes(from Host, to render.Port) ([]Verdict, error) {
	src, err := source(from, to.Addr)
	if err != nil {
		return nil, err
	}
	vs, err := m.Kernel.Outcomes(src, to)
	var out []Verdict
	for _, v := range vs {
		out = append(out, verdict(v))
	}
	return out, err
}

func verdict(v simnet.Verdict) Verdict {
	return Verdict{To: v.To, From: v.From, Rejected: v.Rejected, Dropped: v.Dropped}
}

// Tamper implements World.
func (m Model) Tamper(p render.Port) error {
	m.Kernel.Tamper(func(t *render.Table) {
		svc, _ := t.Find(p)
		svc.Endpoints = svc.Endpoints[:len(svc.Endpoints)-1]
	})
	return nil
}

// Break implements World.
func (m Model) Break() error {
	m.Kernel.Tamper(func(t *render.Table) { t.Range = nil })
	return nil
}

// Leftovers implements World.
func (m Model) Leftovers() (string, error) {
	if m.Kernel.Made() {
		return "a table", nil
	}
	return "", nil
}
