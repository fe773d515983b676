// Package overlay leads packets to the pods of other nodes: straight to nodes that are
// neighbours, in VXLAN (RFC 7348) to all others, and encrypted by WireGuard between nodes
// that both do so. Nothing is flooded and nothing is learned: every node knows from the
// cluster's state where every pod range is.
//
// What it makes carries a mark (a routing protocol number, the name of a device), so
// that a process that knows nothing else finds it, mends it and removes it. It works in
// the network namespace of the calling thread.
package overlay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/render"
)

// The defaults of Config.
const (
	DefaultDevice = "decree0"
	DefaultVNI    = 7443
	DefaultPort   = 4789 // RFC 7348, section 8.1
)

// Config names what the overlay is made of; all nodes must agree on VNI and Port.
type Config struct {
	Device string // of VXLAN; empty: DefaultDevice
	VNI    int    // VXLAN network identifier, 24 bits; zero: DefaultVNI
	Port   int    // UDP; zero: DefaultPort
	// WireGuard encrypts; zero: nothing does.
	WireGuard WireGuard
}

// Overlay is the overlay of one node. Methods must take turns.
type Overlay struct {
	cfg Config
	// remotes are where nodes said that they are, when the kernel was last told.
	remotes map[wgtypes.Key]netip.Addr
	// meetings are nodes that the kernel was told of, until there is a handshake.
	meetings map[wgtypes.Key]meeting
}

// New returns an Overlay; it changes nothing yet.
func New(cfg Config) *Overlay {
	if cfg.Device == "" {
		cfg.Device = DefaultDevice
	}
	if cfg.VNI == 0 {
		cfg.VNI = DefaultVNI
	}
	if cfg.Port == 0 {
		cfg.Port = DefaultPort
	}
	if cfg.WireGuard.Device == "" {
		cfg.WireGuard.Device = DefaultSealedDevice
	}
	if cfg.WireGuard.Port == 0 {
		cfg.WireGuard.Port = DefaultSealedPort
	}
	return &Overlay{cfg: cfg}
}

// Sync makes the kernel lead to the pods of peers, and to no others that any Sync ever
// led to; all pods of all nodes are in cluster. It returns the plan and how many things it had
// to change. It is idempotent.
func (o *Overlay) Sync(self render.Peer, peers []render.Peer, cluster []netip.Prefix) (Plan, int, error) {
	links, err := o.links()
	if err != nil {
		return Plan{}, 0, err
	}
	self.Key = o.cfg.WireGuard.PublicKey() // whatever the cluster still thinks
	plan := Decide(self, peers, links, cluster, o.cfg.WireGuard.Required)
	n, err := o.apply(plan)
	return plan, n, err
}

// Purge removes everything that any Sync ever made.
func (o *Overlay) Purge() error {
	_, err := o.apply(Plan{})
	return err
}

// links are this machine's interfaces with addresses of their own.
func (o *Overlay) links() ([]Link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL) // of all at once: each pod has an interface
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	prefixes := map[int][]netip.Prefix{}
	for _, addr := range addrs {
		if p := host.PrefixOf(addr.IPNet); p.IsValid() && !p.Addr().IsLinkLocalUnicast() {
			prefixes[addr.LinkIndex] = append(prefixes[addr.LinkIndex], p)
		}
	}
	var out []Link
	for _, l := range all {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || a.Name == o.cfg.Device || a.Name == o.cfg.WireGuard.Device || len(prefixes[a.Index]) == 0 {
			continue
		}
		out = append(out, Link{Index: a.Index, Name: a.Name, MTU: a.MTU, Prefixes: prefixes[a.Index]})
	}
	return out, nil
}

// apply makes the kernel hold the plan: first what packets need, then the routes that
// send them there; what is not needed any more goes after that.
func (o *Overlay) apply(p Plan) (changes int, err error) {
	step := func(n int, err error) error {
		changes += n
		return err
	}
	device, sealed := 0, 0
	if p.Sealed != nil {
		index, n, err := o.seal(p.Sealed)
		if sealed = index; step(n, err) != nil {
			return changes, err
		}
	}
	if p.Device != nil {
		index, n, err := o.device(p.Device)
		if device = index; step(n, err) != nil {
			return changes, err
		}
		if err := step(o.tunnels(device, p.Peers)); err != nil {
			return changes, err
		}
	}
	if err := step(routes(p.Routes, device, sealed)); err != nil {
		return changes, err
	}
	if p.Device == nil {
		if err := step(discard(o.cfg.Device)); err != nil {
			return changes, err
		}
	}
	if p.Sealed == nil {
		o.meetings = nil
		return changes, step(discard(o.cfg.WireGuard.Device))
	}
	return changes, step(o.keys(p.Sealed, true))
}

// find returns an interface, nil if there is none.
func find(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", name, err)
	}
	return link, nil
}

// discard removes an interface if it is there.
func discard(name string) (changes int, err error) {
	link, err := find(name)
	if err != nil || link == nil {
		return 0, err
	}
	return 1, remove(link)
}

func remove(link netlink.Link) error {
	if err := netlink.LinkDel(link); err != nil && !gone(err) {
		return fmt.Errorf("remove %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// add makes an interface.
func add(link netlink.Link) (netlink.Link, error) {
	name := link.Attrs().Name
	if err := netlink.LinkAdd(link); err != nil {
		return nil, fmt.Errorf("make %s (%s): %w", name, link.Type(), err)
	}
	if err := noAddress(name); err != nil {
		return nil, err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", name, err)
	}
	return link, nil
}

// settle gives an interface its MTU and addresses, and sets it up.
func settle(link netlink.Link, mtu int, addrs []netip.Addr) (changes int, err error) {
	a := link.Attrs()
	if a.MTU != mtu {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return changes, fmt.Errorf("set MTU of %s to %d: %w", a.Name, mtu, err)
		}
		changes++
	}
	if a.Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return changes, fmt.Errorf("set %s up: %w", a.Name, err)
		}
		changes++
	}
	n, err := addresses(link, addrs)
	return changes + n, err
}

// device makes the VXLAN interface what it should be, and returns its index.
func (o *Overlay) device(d *Device) (index, changes int, err error) {
	link, err := find(o.cfg.Device)
	if err != nil {
		return 0, 0, err
	}
	if link != nil && !o.fits(link, d) {
		if err := remove(link); err != nil {
			return 0, 0, err
		}
		link, changes = nil, changes+1
	}
	if link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.HardwareAddr = o.cfg.Device, d.MTU, d.MAC[:]
		link, err = add(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: o.cfg.VNI, VtepDevIndex: d.Link, SrcAddr: d.Local.AsSlice(), Port: o.cfg.Port})
		if err != nil {
			return 0, changes, err
		}
		changes++
	}
	n, err := settle(link, d.MTU, d.Addrs)
	return link.Attrs().Index, changes + n, err
}

// fits reports whether an interface is the one that d describes, but for what can be
// changed while it is in use.
func (o *Overlay) fits(link netlink.Link, d *Device) bool {
	v, ok := link.(*netlink.Vxlan)
	if !ok {
		return false
	}
	local, _ := netip.AddrFromSlice(v.SrcAddr)
	return v.VxlanId == o.cfg.VNI && v.Port == o.cfg.Port && v.VtepDevIndex == d.Link && local.Unmap() == d.Local && !v.Learning &&
		slices.Equal(v.HardwareAddr, d.MAC[:])
}

func addresses(link netlink.Link, want []netip.Addr) (changes int, err error) {
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return 0, fmt.Errorf("list addresses of %s: %w", link.Attrs().Name, err)
	}
	missing := slices.Clone(want)
	for i := range have {
		p := host.PrefixOf(have[i].IPNet)
		if j := slices.Index(missing, p.Addr()); j >= 0 && p.IsSingleIP() {
			missing = slices.Delete(missing, j, j+1)
			continue
		}
		if err := netlink.AddrDel(link, &have[i]); err != nil {
			return changes, fmt.Errorf("remove address %s from %s: %w", p, link.Attrs().Name, err)
		}
		changes++
	}
	for _, a := range missing {
		addr := &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}
		if a.Is4() {
			addr.Flags = 0
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return changes, fmt.Errorf("add address %s to %s: %w", a, link.Attrs().Name, err)
		}
		changes++
	}
	return changes, nil
}

// entry is one of the device: who has an address (family of IP), or where an
// Ethernet address is (family of bridges).
type entry struct {
	family int
	addr   netip.Addr
	mac    MAC
}

func (o *Overlay) tunnels(device int, peers []Tunnel) (changes int, err error) {
	want := map[entry]bool{}
	for _, t := range peers {
		want[entry{unix.AF_BRIDGE, t.Remote, t.MAC}] = true
		for _, via := range t.Vias {
			want[entry{family(via), via, t.MAC}] = true
		}
	}
	var stale []netlink.Neigh
	for _, f := range []int{unix.AF_BRIDGE, unix.AF_INET, unix.AF_INET6} {
		have, err := netlink.NeighList(device, f)
		if err != nil {
			return changes, fmt.Errorf("list neighbours on %s: %w", o.cfg.Device, err)
		}
		for i := range have {
			h := &have[i]
			addr, _ := netip.AddrFromSlice(h.IP)
			key := entry{f, addr.Unmap(), MAC{}}
			copy(key.mac[:], h.HardwareAddr)
			switch {
			case want[key] && h.State&netlink.NUD_PERMANENT != 0:
				delete(want, key)
			case h.State&(netlink.NUD_PERMANENT|netlink.NUD_REACHABLE|netlink.NUD_STALE) != 0:
				stale = append(stale, *h)
			}
		}
	}
	// The old entry of an address first: an address has one.
	for i := range stale {
		if err := netlink.NeighDel(&stale[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			return changes, fmt.Errorf("remove neighbour %s from %s: %w", stale[i].IP, o.cfg.Device, err)
		}
		changes++
	}
	for w := range want {
		n := &netlink.Neigh{LinkIndex: device, Family: w.family, State: netlink.NUD_PERMANENT, IP: w.addr.AsSlice(), HardwareAddr: w.mac[:]}
		if w.family == unix.AF_BRIDGE {
			n.Flags = netlink.NTF_SELF
		}
		if err := netlink.NeighSet(n); err != nil {
			return changes, fmt.Errorf("add neighbour %s to %s: %w", w.addr, o.cfg.Device, err)
		}
		changes++
	}
	return changes, nil
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// routes makes the marked routes of the main table these.
func routes(want []Route, device, sealed int) (changes int, err error) {
	have, err := marked()
	if err != nil {
		return 0, err
	}
	kept := map[netip.Prefix]Route{}
	for _, h := range have {
		via, _ := netip.AddrFromSlice(h.Gw)
		r := Route{host.PrefixOf(h.Dst), via.Unmap(), h.LinkIndex}
		if h.Type == unix.RTN_UNREACHABLE {
			r.Link = Refused
		}
		kept[r.Dst] = r
	}
	for _, w := range want {
		flags := 0
		switch w.Link {
		case Wrapped:
			w.Link, flags = device, int(netlink.FLAG_ONLINK)
		case Encrypted:
			w.Link = sealed
		}
		same := kept[w.Dst] == w
		delete(kept, w.Dst)
		if same {
			continue
		}
		r := &netlink.Route{LinkIndex: w.Link, Dst: host.IPNet(w.Dst), Gw: w.Via.AsSlice(), Protocol: host.Protocol, Flags: flags}
		switch {
		case w.Link == Refused:
			r.LinkIndex, r.Type = 0, unix.RTN_UNREACHABLE
		case !w.Via.IsValid():
			r.Scope = netlink.SCOPE_LINK
		}
		if err := netlink.RouteReplace(r); err != nil {
			return changes, fmt.Errorf("route %s: %w", r, err)
		}
		changes++
	}
	for i := range have {
		if _, stale := kept[host.PrefixOf(have[i].Dst)]; !stale {
			continue
		}
		if err := netlink.RouteDel(&have[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return changes, fmt.Errorf("remove route %s: %w", have[i].Dst, err)
		}
		changes++
	}
	return changes, nil
}

// marked returns our routes in the main table.
func marked() ([]netlink.Route, error) {
	var out []netlink.Route
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := netlink.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_MAIN, Protocol: host.Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		out = append(out, rs...)
	}
	return out, nil
}

// gone reports whether an interface is not there.
func gone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}
