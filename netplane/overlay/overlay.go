// Package overlay leads packets to the pods of other nodes: straight to nodes that are
// neighbours, in VXLAN (RFC 7348) to all others. Nothing is flooded and nothing is
// learned: every node knows from the cluster's state where every pod range is.
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
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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
}

// Overlay is the overlay of one node. Methods must take turns.
type Overlay struct{ cfg Config }

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
	return &Overlay{cfg}
}

// Sync makes the kernel lead to the pods of peers, and to no others that any Sync ever
// led to. It returns the plan and how many things it had to change. It is idempotent.
func (o *Overlay) Sync(self render.Peer, peers []render.Peer) (Plan, int, error) {
	links, err := o.links()
	if err != nil {
		return Plan{}, 0, err
	}
	plan := Decide(self, peers, links)
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
		if a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || a.Name == o.cfg.Device || len(prefixes[a.Index]) == 0 {
			continue
		}
		out = append(out, Link{Index: a.Index, Name: a.Name, MTU: a.MTU, Prefixes: prefixes[a.Index]})
	}
	return out, nil
}

// apply makes the kernel hold the plan: first what packets need, then the routes that
// send them there; what is not needed any more goes in the opposite order.
func (o *Overlay) apply(p Plan) (changes int, err error) {
	device := 0
	if p.Device != nil {
		index, n, err := o.device(p.Device)
		changes += n
		if err != nil {
			return changes, err
		}
		device = index
		n, err = o.tunnels(device, p.Peers)
		changes += n
		if err != nil {
			return changes, err
		}
	}
	n, err := routes(p.Routes, device)
	changes += n
	if err != nil || p.Device != nil {
		return changes, err
	}
	link, err := o.find()
	if err != nil || link == nil {
		return changes, err
	}
	if err := netlink.LinkDel(link); err != nil && !gone(err) {
		return changes, fmt.Errorf("remove %s: %w", o.cfg.Device, err)
	}
	return changes + 1, nil
}

// find returns the device, nil if there is none.
func (o *Overlay) find() (netlink.Link, error) {
	link, err := netlink.LinkByName(o.cfg.Device)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for %s: %w", o.cfg.Device, err)
	}
	return link, nil
}

func gone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV)
}

// device makes the VXLAN interface what it should be, and returns its index.
func (o *Overlay) device(d *Device) (index, changes int, err error) {
	link, err := o.find()
	if err != nil {
		return 0, 0, err
	}
	if link != nil && !o.fits(link, d) {
		if err := netlink.LinkDel(link); err != nil && !gone(err) {
			return 0, 0, fmt.Errorf("remove %s, which is another one: %w", o.cfg.Device, err)
		}
		link, changes = nil, changes+1
	}
	if link == nil {
		if link, err = o.create(d); err != nil {
			return 0, changes, err
		}
		changes++
	}
	a := link.Attrs()
	if a.MTU != d.MTU {
		if err := netlink.LinkSetMTU(link, d.MTU); err != nil {
			return 0, changes, fmt.Errorf("set MTU of %s to %d: %w", o.cfg.Device, d.MTU, err)
		}
		changes++
	}
	if a.Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return 0, changes, fmt.Errorf("set %s up: %w", o.cfg.Device, err)
		}
		changes++
	}
	n, err := o.addresses(link, d.Addrs)
	return a.Index, changes + n, err
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

func (o *Overlay) create(d *Device) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = o.cfg.Device, d.MTU, d.MAC[:]
	v := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: o.cfg.VNI, VtepDevIndex: d.Link, SrcAddr: d.Local.AsSlice(), Port: o.cfg.Port}
	if err := netlink.LinkAdd(v); err != nil {
		return nil, fmt.Errorf("make %s (VXLAN %d from %s): %w", o.cfg.Device, o.cfg.VNI, d.Local, err)
	}
	// Without an address of its own making: nobody speaks to the link itself. A kernel
	// without IPv6 has no such setting.
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+o.cfg.Device+"/addr_gen_mode", []byte("1"), 0o644)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make %s: %w", o.cfg.Device, err)
	}
	link, err := netlink.LinkByName(o.cfg.Device)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", o.cfg.Device, err)
	}
	return link, nil
}

func (o *Overlay) addresses(link netlink.Link, want []netip.Addr) (changes int, err error) {
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return 0, fmt.Errorf("list addresses of %s: %w", o.cfg.Device, err)
	}
	missing := slices.Clone(want)
	for i := range have {
		p := host.PrefixOf(have[i].IPNet)
		if j := slices.Index(missing, p.Addr()); j >= 0 && p.IsSingleIP() {
			missing = slices.Delete(missing, j, j+1)
			continue
		}
		if err := netlink.AddrDel(link, &have[i]); err != nil {
			return changes, fmt.Errorf("remove address %s from %s: %w", p, o.cfg.Device, err)
		}
		changes++
	}
	for _, a := range missing {
		addr := &netlink.Addr{IPNet: host.IPNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}
		if a.Is4() {
			addr.Flags = 0
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return changes, fmt.Errorf("add address %s to %s: %w", a, o.cfg.Device, err)
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
func routes(want []Route, device int) (changes int, err error) {
	have, err := marked()
	if err != nil {
		return 0, err
	}
	kept := map[netip.Prefix]Route{}
	for _, h := range have {
		via, _ := netip.AddrFromSlice(h.Gw)
		kept[host.PrefixOf(h.Dst)] = Route{host.PrefixOf(h.Dst), via.Unmap(), h.LinkIndex}
	}
	for _, w := range want {
		flags := 0
		if w.Link == 0 {
			w.Link, flags = device, int(netlink.FLAG_ONLINK)
		}
		same := kept[w.Dst] == w
		delete(kept, w.Dst)
		if same {
			continue
		}
		r := &netlink.Route{LinkIndex: w.Link, Dst: host.IPNet(w.Dst), Gw: w.Via.AsSlice(), Protocol: host.Protocol, Flags: flags}
		if err := netlink.RouteReplace(r); err != nil {
			return changes, fmt.Errorf("route %s via %s: %w", w.Dst, w.Via, err)
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
