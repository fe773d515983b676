package overlay

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"net"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

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
	// Device carries packets that are wrapped; nil: none are.
	Device *Device
	Routes []Route
	Peers  []Tunnel
	// Sealed carries packets that are encrypted; nil: none are.
	Sealed *Sealed
	// MTU is the largest packet, in bytes, that reaches every pod whole; zero: unknown.
	MTU int
	// Lost are the nodes whose pods cannot be reached: neither they nor this node have
	// an address that the other one could use.
	Lost []string
	// Clear are the nodes that do not encrypt, although this one does. Where encryption
	// is required their pods are not reached.
	Clear []string
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
	Link int // index of the interface, Wrapped, Encrypted or Refused
}

// Encrypts returns to how many nodes packets are encrypted.
func (p *Plan) Encrypts() int {
	if p.Sealed == nil {
		return 0
	}
	return len(p.Sealed.Peers)
}

// These stand for interfaces that may not exist yet.
const (
	Wrapped   = 0  // the Device
	Encrypted = -1 // the interface of Sealed; such a route has no Via
	Refused   = -2 // none: packets must not go another way, such as that of a default route
)

// Sealed is the WireGuard interface (Donenfeld, NDSS 2017).
type Sealed struct {
	MTU int
	// Addrs are this node's own on the interface, as of a Device.
	Addrs []netip.Addr
	Peers []Sealing
}

// Sealing is a node to which packets are encrypted.
type Sealing struct {
	Key    wgtypes.Key // public
	Remote netip.Addr
	// Allowed are the addresses that packets from that node may come from: its pods, and
	// its own, as pods that call a node are answered from there.
	Allowed []netip.Prefix
}

// Tunnel is how the Device finds another node: the kernel neither asks nor learns.
type Tunnel struct {
	MAC    MAC
	Remote netip.Addr
	// Vias are the addresses that routes name the node by.
	Vias []netip.Addr
}

// The bytes that VXLAN adds to a packet are Ethernet, IP, UDP and VXLAN headers; those
// of WireGuard are IP, UDP and its own header and tag.
const (
	ip4, ip6  = 20, 40
	wrapping  = 14 + 8 + 8
	encrypted = 8 + 32
)

// Decide returns the plan for a node.
//
// Between two nodes that both have a key packets are encrypted. Otherwise a node with an
// address in a network of this one is a neighbour: packets go there as they are. For all
// others they are wrapped. Both ends decide the same, as both look at the same keys, the
// same two addresses and, where networks are set up soundly, at the same mask. Where
// encryption is required, there is no other way than the first: nor is there one to what else
// is in cluster, the ranges of all pods, such as the pods of a node that was removed.
func Decide(self render.Peer, peers []render.Peer, links []Link, cluster []netip.Prefix, required bool) Plan {
	var p Plan
	own, err := wgtypes.ParseKey(self.Key)
	sealed := self.Key != "" && err == nil
	local, link, ok := underlay(self, links)
	if ok {
		p.MTU = link.MTU - overhead(local, sealed)
	}
	for _, peer := range peers {
		reached := false
		key, err := wgtypes.ParseKey(peer.Key)
		both := sealed && err == nil && key != own
		if sealed && !both {
			p.Clear = append(p.Clear, peer.Node)
		}
		switch {
		case !ok:
		case both:
			reached = p.seal(self, peer, key, local)
		case !sealed || !required:
			reached = p.lead(self, peer, local, link, links)
		}
		if reached {
			continue
		}
		if both || !required || !sealed {
			p.Lost = append(p.Lost, peer.Node)
		}
		if sealed && required {
			p.refuse(peer.Pods)
		}
	}
	if sealed && required {
		p.refuse(cluster)
	}
	slices.SortFunc(p.Routes, func(a, b Route) int {
		return cmp.Or(a.Dst.Addr().Compare(b.Dst.Addr()), cmp.Compare(a.Dst.Bits(), b.Dst.Bits()))
	})
	slices.SortFunc(p.Peers, func(a, b Tunnel) int { return a.Remote.Compare(b.Remote) })
	slices.Sort(p.Lost)
	slices.Sort(p.Clear)
	if p.Sealed != nil {
		p.Sealed.settle()
	}
	return p
}

// refuse keeps what is sent to these pods from leaving the node, unless a route leads there.
func (p *Plan) refuse(pods []netip.Prefix) {
	for _, q := range pods {
		if !slices.ContainsFunc(p.Routes, func(r Route) bool { return r.Dst == q }) {
			p.Routes = append(p.Routes, Route{Dst: q, Link: Refused})
		}
	}
}

// seal adds what leads to the pods of one node, encrypted.
func (p *Plan) seal(self, peer render.Peer, key wgtypes.Key, local netip.Addr) bool {
	remote, ok := sameFamily(peer, local)
	if !ok {
		return false
	}
	if p.Sealed == nil {
		p.Sealed = &Sealed{MTU: p.MTU, Addrs: bases(self.Pods)}
	}
	s := Sealing{Key: key, Remote: remote, Allowed: slices.Clone(peer.Pods)}
	for _, a := range peer.Addrs {
		s.Allowed = append(s.Allowed, netip.PrefixFrom(a, a.BitLen()))
	}
	p.Sealed.Peers = append(p.Sealed.Peers, s)
	for _, pods := range peer.Pods {
		p.Routes = append(p.Routes, Route{Dst: pods, Link: Encrypted})
	}
	return true
}

// settle orders the nodes, and leaves an address that two of them claim to the first:
// the kernel knows one for each.
func (s *Sealed) settle() {
	slices.SortFunc(s.Peers, func(a, b Sealing) int { return bytes.Compare(a.Key[:], b.Key[:]) })
	taken := map[netip.Prefix]bool{}
	for i := range s.Peers {
		s.Peers[i].Allowed = slices.DeleteFunc(s.Peers[i].Allowed, func(q netip.Prefix) bool { return taken[q] })
		for _, q := range s.Peers[i].Allowed {
			taken[q] = true
		}
		slices.SortFunc(s.Peers[i].Allowed, func(a, b netip.Prefix) int {
			return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
		})
	}
	s.Peers = slices.CompactFunc(s.Peers, func(a, b Sealing) bool { return a.Key == b.Key })
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
	remote, ok := sameFamily(peer, local)
	if !ok {
		return false
	}
	if p.Device == nil {
		p.Device = &Device{Link: link.Index, Local: local, MAC: macOf(self.Node), MTU: link.MTU - overhead(local, false), Addrs: bases(self.Pods)}
	}
	t := Tunnel{MAC: macOf(peer.Node), Remote: remote}
	for _, pods := range wrapped {
		via := gateway(pods, t.MAC)
		if !slices.Contains(t.Vias, via) {
			t.Vias = append(t.Vias, via)
		}
		p.Routes = append(p.Routes, Route{Dst: pods, Via: via, Link: Wrapped})
	}
	p.Peers = append(p.Peers, t)
	return true
}

// bases are the first addresses of pod ranges, which are no pod's.
func bases(pods []netip.Prefix) (out []netip.Addr) {
	for _, q := range pods {
		out = append(out, q.Masked().Addr())
	}
	return out
}

// sameFamily returns the first address of a node that packets from local can go to.
func sameFamily(peer render.Peer, local netip.Addr) (netip.Addr, bool) {
	i := slices.IndexFunc(peer.Addrs, func(a netip.Addr) bool { return a.Is4() == local.Is4() })
	if i < 0 {
		return netip.Addr{}, false
	}
	return peer.Addrs[i], true
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

func overhead(local netip.Addr, sealed bool) int {
	n := wrapping
	if sealed {
		n = encrypted
	}
	if local.Is4() {
		return n + ip4
	}
	return n + ip6
}

// macOf makes a node's Ethernet address from its name, so that nobody has to be told:
// locally administered, one of 2^46.
func macOf(node string) (m MAC) {
	sum := sha256.Sum256([]byte("decree/" + node))
	copy(m[:], sum[:])
	m[0] = m[0]&^0x01 | 0x02
	return m
}
