package overlay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

// machine is a node, and one pod on it, as network namespaces.
type machine struct {
	render.Peer
	node, pod string // paths
	overlay   *Overlay
}

// lab is three nodes: n1 and n2 in one network, n3 in another one, and a router.
type lab struct {
	t        *testing.T
	router   string
	machines []*machine
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t, router: netspacetest.Namespace(t, "router")}
	netspacetest.Switch(t, l.router, "br1", "192.168.1.254/24", "fd00:1::fe/64")
	netspacetest.Switch(t, l.router, "br2", "192.168.2.254/24", "fd00:2::fe/64")
	netspacetest.Forward(t, l.router)
	for i, network := range []int{1, 1, 2} {
		l.machine(i+1, network)
	}
	return l
}

func (l *lab) machine(n, network int) {
	t := l.t
	m := &machine{
		Peer: render.Peer{
			Node:  fmt.Sprint("n", n),
			Addrs: addrs(fmt.Sprintf("192.168.%d.%d", network, n), fmt.Sprintf("fd00:%d::%d", network, n)),
			Pods:  nets(fmt.Sprintf("10.42.%d.0/24", n), fmt.Sprintf("fd42:%d::/64", n)),
		},
		overlay: New(Config{}),
	}
	m.node, m.pod = netspacetest.Namespace(t, m.Node), netspacetest.Namespace(t, m.Node+"-pod")
	netspacetest.Link(t, l.router, "to-"+m.Node, m.node, "eth0")
	netspacetest.Plug(t, l.router, "to-"+m.Node, fmt.Sprint("br", network))
	netspacetest.Up(t, m.node, "eth0", m.Addrs[0].String()+"/24", m.Addrs[1].String()+"/64")
	netspacetest.Route(t, m.node, "0.0.0.0/0", fmt.Sprintf("192.168.%d.254", network), "")
	netspacetest.Route(t, m.node, "::/0", fmt.Sprintf("fd00:%d::fe", network), "")
	netspacetest.Forward(t, m.node)

	gate4, gate6 := m.Pods[0].Addr().Next().String(), m.Pods[1].Addr().Next().String()
	pod4, pod6 := m.podAddr(0).String(), m.podAddr(1).String()
	netspacetest.Link(t, m.node, "pod0", m.pod, "eth0")
	netspacetest.Up(t, m.node, "pod0", gate4+"/32", gate6+"/128")
	netspacetest.Route(t, m.node, pod4+"/32", "", "pod0")
	netspacetest.Route(t, m.node, pod6+"/128", "", "pod0")
	netspacetest.Up(t, m.pod, "eth0", pod4+"/32", pod6+"/128")
	netspacetest.Route(t, m.pod, gate4+"/32", "", "eth0")
	netspacetest.Route(t, m.pod, gate6+"/128", "", "eth0")
	netspacetest.Route(t, m.pod, "0.0.0.0/0", gate4, "eth0")
	netspacetest.Route(t, m.pod, "::/0", gate6, "eth0")
	netspacetest.In(t, m.pod, func() error {
		pc, err := net.ListenPacket("udp", ":7")
		if err != nil {
			return err
		}
		t.Cleanup(func() { pc.Close() })
		go echo(pc)
		return nil
	})
	l.machines = append(l.machines, m)
}

// podAddr is the pod's address of a family: the one after the gateway's.
func (m *machine) podAddr(family int) netip.Addr { return m.Pods[family].Addr().Next().Next() }

// echo answers datagrams with the address that they came from and their length.
func echo(pc net.PacketConn) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = pc.WriteTo(fmt.Appendf(nil, "%s %d", from.(*net.UDPAddr).AddrPort().Addr().Unmap(), n), from)
	}
}

// ask sends size bytes from a namespace to a pod and returns who the pod saw.
func ask(from string, to netip.Addr, size int) (string, error) {
	var c net.Conn
	err := netspace.Do(from, func() (err error) {
		c, err = net.Dial("udp", netip.AddrPortFrom(to, 7).String())
		return err
	})
	if err != nil {
		return "", err
	}
	defer c.Close()
	buf := make([]byte, 256)
	for range 20 { // neighbours of the lab's own networks have to be found
		if _, err := c.Write(make([]byte, size)); err != nil {
			return "", err
		}
		_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Read(buf)
		if err == nil {
			seen, length, _ := strings.Cut(string(buf[:n]), " ")
			if length != fmt.Sprint(size) {
				return "", fmt.Errorf("%s bytes arrived", length)
			}
			return seen, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return "", err
		}
	}
	return "", os.ErrDeadlineExceeded
}

func (l *lab) others(m *machine) (out []render.Peer) {
	for _, x := range l.machines {
		if x != m {
			out = append(out, x.Peer)
		}
	}
	return out
}

func (l *lab) sync(m *machine, peers []render.Peer) (p Plan, n int) {
	l.t.Helper()
	netspacetest.In(l.t, m.node, func() (err error) {
		p, n, err = m.overlay.Sync(m.Peer, peers, cluster)
		return err
	})
	return p, n
}

func (l *lab) syncAll() {
	l.t.Helper()
	for _, m := range l.machines {
		l.sync(m, l.others(m))
	}
}

// TestEveryPair: every pod reaches every pod with its own address, and every node every
// pod, in both families, with packets of the largest size.
func TestEveryPair(t *testing.T) {
	l := newLab(t)
	l.syncAll()
	for _, a := range l.machines {
		for _, b := range l.machines {
			for f := range 2 {
				seen, err := ask(a.pod, b.podAddr(f), 1000)
				if err != nil || seen != a.podAddr(f).String() {
					t.Errorf("pod of %s to pod of %s: seen as %q, %v", a.Node, b.Node, seen, err)
				}
				if a == b {
					continue
				}
				seen, err = ask(a.node, b.podAddr(f), 1000)
				if own := netip.MustParseAddr(seen); err != nil || !a.Pods[f].Contains(own) && !slices.Contains(a.Addrs, own) {
					t.Errorf("%s to pod of %s: seen as %q, %v", a.Node, b.Node, seen, err)
				}
			}
		}
	}
	n1, n2 := l.machines[0], l.machines[1]
	if p, n := l.sync(n1, l.others(n1)); n != 0 || p.MTU != 1450 || len(p.Peers) != 1 {
		t.Errorf("a second Sync changed %d things; MTU %d, %d tunnels", n, p.MTU, len(p.Peers))
	}
	if _, err := ask(n1.pod, l.machines[2].podAddr(0), 1450-28); err != nil {
		t.Errorf("a packet of the size of the MTU: %v", err)
	}
	before := counter(t, n2.node, DefaultDevice)
	if _, err := ask(n1.pod, n2.podAddr(0), 1000); err != nil {
		t.Error(err)
	}
	if after := counter(t, n2.node, DefaultDevice); after != before {
		t.Error("packets between neighbours are wrapped")
	}
}

func counter(t *testing.T, path, name string) (n uint64) {
	t.Helper()
	netspacetest.In(t, path, func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			n = link.Attrs().Statistics.RxPackets
		}
		return err
	})
	return n
}

// TestNodesComeAndGo: a node that moves to another network is followed, one that is
// gone is forgotten, and the others do not notice.
func TestNodesComeAndGo(t *testing.T) {
	l := newLab(t)
	l.syncAll()
	n1, n2, n3 := l.machines[0], l.machines[1], l.machines[2]
	if _, n := l.sync(n1, []render.Peer{n2.Peer}); n == 0 {
		t.Error("nothing changed when a node went")
	}
	if _, err := ask(n1.pod, n3.podAddr(0), 10); err == nil {
		t.Error("a node that is gone is still reached")
	}
	if _, err := ask(n1.pod, n2.podAddr(0), 10); err != nil {
		t.Error(err)
	}
	if names := devices(t, n1.node); slices.Contains(names, DefaultDevice) {
		t.Errorf("the device stays without need: %v", names)
	}
	// n3 is another machine now: its pods are where n2 is. No packet must go the old way.
	moved := n3.Peer
	moved.Addrs = n2.Addrs
	l.sync(n1, l.others(n1))
	p, _ := l.sync(n1, []render.Peer{moved})
	if p.Device != nil || len(p.Routes) != 2 || p.Routes[0].Via != n2.Addrs[0] {
		t.Errorf("%s", text(p))
	}
	l.sync(n1, l.others(n1))
	if _, err := ask(n1.pod, n3.podAddr(1), 10); err != nil {
		t.Errorf("after it came back: %v", err)
	}
}

func devices(t *testing.T, path string) (names []string) {
	t.Helper()
	netspacetest.In(t, path, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	return names
}

// dump is all that the kernel holds of addresses and routes, but for the link-local ones that it
// gives every interface about a second after that is up.
func dump(t *testing.T, path string) string {
	t.Helper()
	var b strings.Builder
	netspacetest.In(t, path, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			addrs = slices.DeleteFunc(addrs, func(a netlink.Addr) bool { return a.IP.IsLinkLocalUnicast() })
			fmt.Fprintln(&b, l.Attrs().Name, l.Attrs().MTU, addrs)
		}
		for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return err
			}
			for _, r := range routes {
				if r.Dst != nil && r.Dst.IP.IsLinkLocalUnicast() {
					continue
				}
				fmt.Fprintln(&b, r.Dst, r.Gw, r.LinkIndex, r.Protocol)
			}
		}
		return nil
	})
	return b.String()
}

// TestRepairAndPurge: what others break is mended, also by a process that knows nothing
// of it, and in the end everything is as it was before.
func TestRepairAndPurge(t *testing.T) {
	l := newLab(t)
	n1, n3 := l.machines[0], l.machines[2]
	before := dump(t, n1.node)
	l.syncAll()
	breakIt := map[string]func() error{
		"the device is gone": func() error {
			link, err := netlink.LinkByName(DefaultDevice)
			return errors.Join(err, netlink.LinkDel(link))
		},
		"the device is down": func() error {
			link, err := netlink.LinkByName(DefaultDevice)
			return errors.Join(err, netlink.LinkSetDown(link))
		},
		"a route is gone": func() error { return netlink.RouteDel(&netlink.Route{Dst: host.IPNet(n3.Pods[0])}) },
		"a route leads elsewhere": func() error {
			return netlink.RouteReplace(&netlink.Route{Dst: host.IPNet(n3.Pods[0]), Gw: net.ParseIP("192.168.1.254"), Protocol: host.Protocol})
		},
		"the neighbours are gone": func() error {
			link, err := netlink.LinkByName(DefaultDevice)
			if err != nil {
				return err
			}
			for _, f := range []int{unix.AF_BRIDGE, unix.AF_INET, unix.AF_INET6} {
				list, err := netlink.NeighList(link.Attrs().Index, f)
				if err != nil {
					return err
				}
				for i := range list {
					if err := netlink.NeighDel(&list[i]); err != nil {
						return err
					}
				}
			}
			return nil
		},
		"another device has its name": func() error {
			link, err := netlink.LinkByName(DefaultDevice)
			if err != nil {
				return err
			}
			a := netlink.NewLinkAttrs()
			a.Name = DefaultDevice
			return errors.Join(netlink.LinkDel(link), netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: a, VxlanId: 1, Port: 4789, Learning: true}))
		},
	}
	for name, do := range breakIt {
		netspacetest.In(t, n1.node, do)
		n1.overlay = New(Config{}) // another process
		if _, n := l.sync(n1, l.others(n1)); n == 0 {
			t.Errorf("%s: nothing was mended", name)
		}
		if _, err := ask(n1.pod, n3.podAddr(0), 10); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, n := l.sync(n1, l.others(n1)); n != 0 {
			t.Errorf("%s: %d things differ after that", name, n)
		}
	}
	for range 2 {
		netspacetest.In(t, n1.node, func() error { return New(Config{}).Purge() })
		if after := dump(t, n1.node); after != before {
			t.Fatalf("before:\n%safter:\n%s", before, after)
		}
	}
}
