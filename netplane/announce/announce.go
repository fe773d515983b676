// Package announce brings what is sent to the addresses of load balancers to this node:
// on the networks that the addresses are of, the kernel answers who asks for them, by ARP
// (RFC 826, RFC 1027) and by Neighbor Discovery (RFC 4861). Others are told unasked when
// an address comes to this node.
//
// The node does not hold these addresses. Each is a proxy neighbour, and a route that
// never leads anywhere, as packets for a service are translated before they are routed,
// and others are refused: it marks what is ours, and the kernel answers ARP only for what
// it would not send back by the same interface. Both outlive the process.
//
// It works in the network namespace of the calling thread.
package announce

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/host"
)

// Protocol marks our routes (rtm_protocol).
const Protocol = host.Protocol + 1

// rounds is how often others are told, in all, that an address has come here: packets get
// lost, and switches learn from them.
const rounds = 4

// Announcer announces the addresses of one node. Methods must take turns.
type Announcer struct {
	host *host.Host
	log  *slog.Logger
	tell map[netip.Addr]int // how often it is still to be told that they came
	lost []netip.Addr       // what was last said to be of no network here
}

// New returns an Announcer that notes the settings it changes with h; it changes nothing yet.
func New(h *host.Host, log *slog.Logger) *Announcer {
	return &Announcer{host: h, log: log, tell: map[netip.Addr]int{}}
}

// link is an interface with the networks it leads to.
type link struct {
	index    int
	name     string
	mac      net.HardwareAddr
	prefixes []netip.Prefix // with the node's own address
}

// Sync announces these addresses and no others that any Sync ever did. It is idempotent
// and returns how many addresses came and went. Those that are of no network of this node,
// or its own, are left out: a router has to lead to them.
func (a *Announcer) Sync(addrs []netip.Addr) (changes int, err error) {
	links, err := linksWithAddresses()
	if err != nil {
		return 0, err
	}
	want, lost := place(addrs, links)
	if len(lost) > 0 && !slices.Equal(lost, a.lost) {
		a.log.Warn("these addresses are of no network of this node and cannot be announced: a router has to lead to them", "addresses", lost)
	}
	a.lost = lost
	routes, err := marked()
	if err != nil {
		return 0, err
	}
	proxies, err := proxies()
	if err != nil {
		return 0, err
	}
	for addr := range routes {
		if want[addr] == nil {
			changes++
			err = errors.Join(err, withdraw(addr, proxies[addr]))
			delete(a.tell, addr)
		}
	}
	var errs []error
	for _, addr := range addrs { // in order
		l := want[addr]
		if l == nil || routes[addr] && slices.Equal(proxies[addr], []int{l.index}) {
			continue
		}
		changes++
		if err := a.take(addr, l, proxies[addr]); err != nil {
			errs = append(errs, err)
			continue
		}
		a.tell[addr] = rounds
	}
	_, told := a.Tell()
	return changes, errors.Join(err, errors.Join(errs...), told)
}

// Tell tells others once more of the addresses that came of late, and returns how many
// are to be told of again, in a second or so.
func (a *Announcer) Tell() (left int, err error) {
	if len(a.tell) == 0 {
		return 0, nil
	}
	links, err := linksWithAddresses()
	if err != nil {
		return 0, err
	}
	want, _ := place(slices.Collect(maps.Keys(a.tell)), links)
	var errs []error
	for addr := range a.tell {
		if l := want[addr]; l != nil {
			errs = append(errs, gratuitous(l, addr))
		}
		if a.tell[addr]--; a.tell[addr] <= 0 {
			delete(a.tell, addr)
		}
	}
	return len(a.tell), errors.Join(errs...)
}

// Purge removes everything that any Sync ever made.
func (a *Announcer) Purge() error {
	_, err := a.Sync(nil)
	return err
}

// place finds the interface for each address: the one whose network it is of, the
// narrowest first. It is pure.
func place(addrs []netip.Addr, links []link) (at map[netip.Addr]*link, lost []netip.Addr) {
	at = map[netip.Addr]*link{}
	for _, addr := range addrs {
		bits, own := -1, false
		for i := range links {
			for _, p := range links[i].prefixes {
				own = own || p.Addr() == addr
				if p.Contains(addr) && p.Bits() > bits && !p.IsSingleIP() {
					bits, at[addr] = p.Bits(), &links[i]
				}
			}
		}
		if own {
			delete(at, addr)
		} else if bits < 0 {
			lost = append(lost, addr)
		}
	}
	return at, lost
}

// linksWithAddresses are the interfaces on which somebody may ask.
func linksWithAddresses() ([]link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []link
	for _, l := range all {
		at := l.Attrs()
		if at.Flags&net.FlagLoopback != 0 || at.Flags&net.FlagUp == 0 || at.Flags&net.FlagBroadcast == 0 || len(at.HardwareAddr) != 6 {
			continue
		}
		one := link{index: at.Index, name: at.Name, mac: at.HardwareAddr}
		for i := range addrs {
			if p := host.PrefixOf(addrs[i].IPNet); addrs[i].LinkIndex == at.Index && p.IsValid() && !p.Addr().IsLinkLocalUnicast() {
				one.prefixes = append(one.prefixes, p)
			}
		}
		if len(one.prefixes) > 0 {
			out = append(out, one)
		}
	}
	return out, nil
}

// marked are the addresses that carry our mark.
func marked() (map[netip.Addr]bool, error) {
	out := map[netip.Addr]bool{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN, Protocol: Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list announced addresses: %w", err)
		}
		for i := range rs {
			if p := host.PrefixOf(rs[i].Dst); p.IsValid() {
				out[p.Addr()] = true
			}
		}
	}
	return out, nil
}

// proxies are the interfaces on which the kernel answers for an address.
func proxies() (map[netip.Addr][]int, error) {
	out := map[netip.Addr][]int{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		ns, err := netlink.NeighProxyList(0, family)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list proxy neighbours: %w", err)
		}
		for i := range ns {
			if a, ok := netip.AddrFromSlice(ns[i].IP); ok {
				out[a.Unmap()] = append(out[a.Unmap()], ns[i].LinkIndex)
			}
		}
	}
	return out, nil
}

func proxy(addr netip.Addr, index int) *netlink.Neigh {
	family := netlink.FAMILY_V4
	if addr.Is6() {
		family = netlink.FAMILY_V6
	}
	return &netlink.Neigh{LinkIndex: index, Family: family, Flags: netlink.NTF_PROXY, IP: addr.AsSlice()}
}

func nowhere(addr netip.Addr) (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("look for loopback: %w", err)
	}
	scope := netlink.SCOPE_LINK
	if addr.Is6() {
		scope = netlink.SCOPE_UNIVERSE // it has no scopes
	}
	return &netlink.Route{
		LinkIndex: lo.Attrs().Index, Scope: scope, Protocol: Protocol, Dst: host.IPNet(netip.PrefixFrom(addr, addr.BitLen())),
	}, nil
}

// take makes the kernel answer for an address on one interface, and on no other.
func (a *Announcer) take(addr netip.Addr, l *link, before []int) error {
	route, err := nowhere(addr)
	if err == nil {
		err = netlink.RouteReplace(route)
	}
	if err != nil {
		return fmt.Errorf("announce %s: route: %w", addr, err)
	}
	settings := []struct{ path, value string }{{"ipv4/neigh/%s/proxy_delay", "0"}}
	if addr.Is6() {
		settings = []struct{ path, value string }{{"ipv6/neigh/%s/proxy_delay", "0"}, {"ipv6/conf/%s/proxy_ndp", "1"}}
	}
	for _, s := range settings {
		if err := a.host.Set("/proc/sys/net/"+fmt.Sprintf(s.path, l.name), s.value); err != nil {
			return fmt.Errorf("announce %s on %s: %w", addr, l.name, err)
		}
	}
	for _, index := range before {
		if index != l.index {
			if err := gone(netlink.NeighDel(proxy(addr, index))); err != nil {
				return fmt.Errorf("withdraw %s from interface %d: %w", addr, index, err)
			}
		}
	}
	if err := netlink.NeighSet(proxy(addr, l.index)); err != nil {
		return fmt.Errorf("announce %s on %s: %w", addr, l.name, err)
	}
	a.log.Info("address announced", "address", addr, "interface", l.name)
	return nil
}

// withdraw undoes take; the mark goes last.
func withdraw(addr netip.Addr, on []int) error {
	for _, index := range on {
		if err := gone(netlink.NeighDel(proxy(addr, index))); err != nil {
			return fmt.Errorf("withdraw %s: %w", addr, err)
		}
	}
	route, err := nowhere(addr)
	if err == nil {
		err = gone(netlink.RouteDel(route))
	}
	if err != nil {
		return fmt.Errorf("withdraw %s: route: %w", addr, err)
	}
	return nil
}

// gone is nil for what is not there any more.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
