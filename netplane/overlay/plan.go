package overlay

import (
	"cmp"
	"crypto/sha256"
	"net"
	"net/netip"
	"slices"

	"decree.dev/decree/netplane/render"
)

// Link is an interface of this node that leads to others.
type Link struct {
	Index    int
	Name     string
	MTU      int            // bytes
	Prefixes []netip.Prefix // its addresses, with the networks they are in
}

// Plan is what the kernel of a node holds so that packets reach the pods of all
// others. Everything is ordered, so that equal plans are equal.
type Plan struct {
	// Device carries packets that are wrapped; nil: every other node is a neighbour.
	Device *Device
	Routes []Route
	Peers  []Tunnel
	// MTU is the largest packet, in bytes, that reaches every pod whole; zero: unknown.
	MTU int
	// Lost are the nodes whose pods cannot be reached: neither they nor this node have
	// an address that the other one could use.
	Lost []string
}

// Device is the VXLAN interface (RFC 7348).
type Device struct {
	Link  int        // index of the interface that wrapped packets leave by
	Local netip.Addr // the address they come from
	MAC   MAC
	MTU   int
	// Addrs are this node's own on the device: what it sends to pods comes from them.
	Addrs []netip.Addr
}

// MAC is an Ethernet address.
type MAC [6]byte

// String is the usual form.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// Route leads to the pods of another node.
type Route struct {
	Dst  netip.Prefix
	Via  netip.Addr
	Link int // index of the interface; zero: the Device
}

// Tunnel is how the Device finds another node: the kernel neither asks nor learns.
type Tunnel struct {
	MAC    MAC
	Remote netip.Addr
	// Vias are the addresses that routes name the node by.
	Vias []netip.Addr
}

// The bytes that VXLAN adds to a packet: Ethernet, IP, UDP and VXLAN headers.
const (
	overhead4 = 14 + 20 + 8 + 8
	overhead6 = 14 + 40 + 8 + 8
)

// Decide returns the plan for a node.
//
// A node with an address in a network of this one is a neighbour: packets go there as
// they are. For all others they are wrapped. Both ends decide the same, as both look at
// the same two addresses and, where networks are set up soundly, at the same mask.
func Decide(self render.Peer, peers []render.Peer, links []Link) Plan {
	var p Plan
	local, link, ok := underlay(self, links)
	if ok {
		p.MTU = link.MTU - overhead(local)
	}
	for _, peer := range peers {
		if !ok || !p.lead(self, peer, local, link, links) {
			p.Lost = append(p.Lost, peer.Node)
		}
	}
	slices.SortFunc(p.Routes, func(a, b Route) int {
		return cmp.Or(a.Dst.Addr().Compare(b.Dst.Addr()), cmp.Compare(a.Dst.Bits(), b.Dst.Bits()))
	})
	slices.SortFunc(p.Peers, func(a, b Tunnel) int { return a.Remote.Compare(b.Remote) })
	slices.Sort(p.Lost)
	return p
}

// lead adds what leads to the pods of one node.
func (p *Plan) lead(self, peer render.Peer, local netip.Addr, link Link, links []Link) bool {
	var wrapped []netip.Prefix
	for _, pods := range peer.Pods {
		via, on, ok := neighbour(peer, pods.Addr().Is4(), links)
		if ok {
			p.Routes = append(p.Routes, Route{Dst: pods, Via: via, Link: on.Index})
		} else {
			wrapped = append(wrapped, pods)
		}
	}
	if len(wrapped) == 0 {
		return true
	}
	i := slices.IndexFunc(peer.Addrs, func(a netip.Addr) bool { return a.Is4() == local.Is4() })
	if i < 0 {
		return false
	}
	if p.Device == nil {
		p.Device = &Device{Link: link.Index, Local: local, MAC: macOf(self.Node), MTU: p.MTU}
		for _, pods := range self.Pods {
			p.Device.Addrs = append(p.Device.Addrs, pods.Masked().Addr())
		}
	}
	t := Tunnel{MAC: macOf(peer.Node), Remote: peer.Addrs[i]}
	for _, pods := range wrapped {
		via := gateway(pods, t.MAC)
		if !slices.Contains(t.Vias, via) {
			t.Vias = append(t.Vias, via)
		}
		p.Routes = append(p.Routes, Route{Dst: pods, Via: via})
	}
	p.Peers = append(p.Peers, t)
	return true
}

// gateway returns an address that stands for a node on the device. In IPv4 it is the
// first of a pod range, which is no pod's. In IPv6 it is one of the link: the kernel
// does not take a gateway that an older route leads elsewhere.
func gateway(pods netip.Prefix, mac MAC) netip.Addr {
	if pods.Addr().Is4() {
		return pods.Addr()
	}
	b := [16]byte{0: 0xfe, 1: 0x80}
	copy(b[10:], mac[:])
	return netip.AddrFrom16(b)
}

// underlay returns the address at which other nodes reach this one, and where it is.
func underlay(self render.Peer, links []Link) (netip.Addr, Link, bool) {
	for _, a := range self.Addrs {
		for _, l := range links {
			if slices.ContainsFunc(l.Prefixes, func(q netip.Prefix) bool { return q.Addr() == a }) {
				return a, l, true
			}
		}
	}
	return netip.Addr{}, Link{}, false
}

// neighbour returns an address of a node that is in a network of this one.
func neighbour(peer render.Peer, v4 bool, links []Link) (netip.Addr, Link, bool) {
	for _, a := range peer.Addrs {
		if a.Is4() != v4 {
			continue
		}
		for _, l := range links {
			in := func(q netip.Prefix) bool { return !q.IsSingleIP() && q.Contains(a) && q.Addr() != a }
			if slices.ContainsFunc(l.Prefixes, in) {
				return a, l, true
			}
		}
	}
	return netip.Addr{}, Link{}, false
}

func overhead(local netip.Addr) int {
	if local.Is4() {
		return overhead4
	}
	return overhead6
}

// macOf makes a node's Ethernet address from its name, so that nobody has to be told:
// locally administered, one of 2^46.
func macOf(node string) (m MAC) {
	sum := sha256.Sum256([]byte("decree/" + node))
	copy(m[:], sum[:])
	m[0] = m[0]&^0x01 | 0x02
	return m
}
