package netplanetest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

// silence is how long a sender waits before it takes a packet for dropped. An emulated
// machine is slow to answer.
var silence = func() time.Duration {
	if vm.Inside() {
		return 1500 * time.Millisecond
	}
	return 400 * time.Millisecond
}()

// Lab is a World's hosts as network namespaces, each pod on a link of its own to
// the node, which routes.
type Lab struct {
	Path map[Host]string
	// sctp lets one association after the other begin: a raw socket is told of what
	// another one was refused.
	sctp sync.Mutex
}

// NewLab builds the hosts and starts their servers, for the time of the test.
func NewLab(t testing.TB) *Lab {
	t.Helper()
	l := &Lab{Path: map[Host]string{}}
	for _, h := range append([]Host{Node, Outside}, Pods...) {
		l.Path[h] = netspacetest.Namespace(t, string(h))
		netspacetest.In(t, l.Path[h], func() error {
			// Without it a new interface is of no use to IPv6 for a second.
			return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644)
		})
	}
	netspacetest.In(t, l.Path[Node], func() error {
		return errors.Join(
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0o644),
			// One refusal a second to each client would make tests wait.
			os.WriteFile("/proc/sys/net/ipv4/icmp_ratelimit", []byte("0"), 0o644),
			os.WriteFile("/proc/sys/net/ipv6/icmp/ratelimit", []byte("0"), 0o644))
	})
	for i, h := range append([]Host{Outside}, Pods...) {
		l.connect(t, h, fmt.Sprintf("veth%d", i))
	}
	netspacetest.In(t, l.Path[Node], func() error {
		for _, n := range Nets {
			if err := errors.Join(localRoute(n.Range), routeAway(n.Announced, n.Addr[Outside])); err != nil {
				return err
			}
		}
		return nil
	})
	for _, h := range append([]Host{Outside, Node}, Pods...) {
		l.serve(t, h)
	}
	l.settle(t)
	return l
}

// settle waits until all hosts reach the node: the kernel looks at new links about once a
// second, and drops what is sent over one before that.
func (l *Lab) settle(t testing.TB) {
	t.Helper()
	end := time.Now().Add(20 * time.Second)
	var wg sync.WaitGroup
	for _, h := range append([]Host{Outside}, Pods...) {
		for _, n := range Nets {
			to := n.Addr[Node]
			if h == Outside {
				to = n.Uplink
			}
			wg.Go(func() {
				v, err := Verdict{Dropped: true}, error(nil)
				for err == nil && v.Dropped && time.Now().Before(end) {
					v, err = l.Send(h, render.ICMP, netip.AddrPortFrom(to, 0))
				}
				if err != nil || !v.To.IsValid() {
					t.Errorf("the link of %s does not come up: %+v, %v", h, v, err)
				}
			})
		}
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// routeAway leads to addresses that no host holds, as a node's default route would.
func routeAway(p netip.Prefix, gateway netip.Addr) error {
	return netlink.RouteAdd(&netlink.Route{Dst: ipNet(p), Gw: gateway.AsSlice()})
}

func localRoute(p netip.Prefix) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: ipNet(p), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// connect joins a host to the node by a pair of interfaces, with routes only for
// that host.
func (l *Lab) connect(t testing.TB, h Host, name string) {
	t.Helper()
	netspacetest.In(t, l.Path[Node], func() error {
		peer, err := os.Open(l.Path[h])
		if err != nil {
			return err
		}
		defer peer.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer.Fd())})
	})
	for _, n := range Nets {
		gateway, all := n.Addr[Node], netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if h == Outside {
			gateway = n.Uplink
		}
		if gateway.Is6() {
			all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		netspacetest.In(t, l.Path[Node], func() error { return address(name, gateway, n.Addr[h]) })
		netspacetest.In(t, l.Path[h], func() error { return address("eth0", n.Addr[h], gateway) })
		netspacetest.In(t, l.Path[h], func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(all), Gw: gateway.AsSlice()})
		})
	}
}

// address gives a link an address and a route to its peer.
func address(name string, a, peer netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}); err != nil {
		return fmt.Errorf("address %s on %s: %w", a, name, err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.PrefixFrom(peer, peer.BitLen())), Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("route to %s on %s: %w", peer, name, err)
	}
	return nil
}

func (l *Lab) serve(t testing.TB, h Host) {
	t.Helper()
	Serve(t, l.Path[h], h != Node, Nets[0].Addr[h], Nets[1].Addr[h])
}

// Serve answers each connection and each datagram to some addresses of a network namespace
// with "own address, source address", for the time of the test.
func Serve(t testing.TB, path string, sctp bool, addrs ...netip.Addr) {
	t.Helper()
	ServeTCP(t, path, TCPPort, SecondPort)
	netspacetest.In(t, path, func() error {
		for _, a := range addrs {
			pc, err := net.ListenPacket("udp", netip.AddrPortFrom(a, UDPPort).String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { pc.Close() })
			go serveUDP(pc)
			if !sctp {
				continue
			}
			sc, err := listenSCTP(a)
			if err != nil {
				return err
			}
			t.Cleanup(func() { sc.Close() })
			go serveSCTP(sc, netip.AddrPortFrom(a, SCTPPort))
		}
		return nil
	})
}

// ServeTCP answers connections in a network namespace with "own address, source
// address", for the time of the test.
func ServeTCP(t testing.TB, path string, ports ...int) {
	t.Helper()
	netspacetest.In(t, path, func() error {
		for _, port := range ports {
			ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close() })
			go serveTCP(ln)
		}
		return nil
	})
}

func serveTCP(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		fmt.Fprintf(c, "%s %s", c.LocalAddr(), c.RemoteAddr())
		c.Close()
	}
}

func serveUDP(pc net.PacketConn) {
	buf := make([]byte, 64)
	for {
		_, from, err := pc.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = pc.WriteTo(fmt.Appendf(nil, "%s %s", pc.LocalAddr(), from), from)
		}
	}
}

// Send implements World.
func (l *Lab) Send(from Host, proto render.Proto, to netip.AddrPort) (v Verdict, err error) {
	if proto == render.SCTP {
		l.sctp.Lock()
		defer l.sctp.Unlock()
	}
	err = netspace.Do(l.Path[from], func() error {
		switch proto {
		case render.TCP:
			v, err = sendTCP(to)
		case render.UDP:
			v, err = sendUDP(to)
		case render.SCTP:
			v, err = sendSCTP(sctpPort(), to)
		default:
			v, err = ping(to.Addr())
		}
		return err
	})
	return v, err
}

func sendTCP(to netip.AddrPort) (Verdict, error) {
	c, err := net.DialTimeout("tcp", to.String(), silence)
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	return told(c)
}

func sendUDP(to netip.AddrPort) (Verdict, error) {
	c, err := net.Dial("udp", to.String())
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	return exchange(c)
}

// exchange sends one datagram and waits for the answer to it.
func exchange(c net.Conn) (Verdict, error) {
	if _, err := c.Write([]byte("?")); err != nil {
		if errors.Is(err, unix.EPERM) { // refused on the way out of the node itself
			return Verdict{Rejected: true}, nil
		}
		return failed(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(silence))
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	if err != nil {
		return failed(err)
	}
	return answered(string(buf[:n]))
}

// Remembered implements Rememberer.
func (l *Lab) Remembered() (all []flows.Flow, err error) {
	err = netspace.Do(l.Path[Node], func() error {
		t, err := flows.Open()
		if err != nil {
			return err
		}
		defer t.Close()
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			_, err = t.Delete(family, func(f *flows.Flow) bool {
				all = append(all, *f)
				return false
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return all, err
}

// Flow implements UDPFlow.
func (l *Lab) Flow(from Host, to netip.AddrPort) (func() (Verdict, error), func(), error) {
	var c net.Conn
	err := netspace.Do(l.Path[from], func() (err error) {
		c, err = net.Dial("udp", to.String())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return func() (Verdict, error) { return exchange(c) }, func() { c.Close() }, nil
}

// told is what a server says to whoever connects.
func told(c net.Conn) (Verdict, error) {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil {
		return failed(err)
	}
	return answered(string(b))
}

func failed(err error) (Verdict, error) {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return Verdict{Rejected: true}, nil
	case errors.As(err, &timeout) && timeout.Timeout():
		return Verdict{Dropped: true}, nil
	}
	return Verdict{}, err
}

func answered(s string) (Verdict, error) {
	to, from, _ := strings.Cut(s, " ")
	t, err1 := netip.ParseAddrPort(to)
	f, err2 := netip.ParseAddrPort(from)
	if err := errors.Join(err1, err2); err != nil {
		return Verdict{}, fmt.Errorf("answer %q: %w", s, err)
	}
	return Verdict{To: netip.AddrPortFrom(t.Addr().Unmap(), t.Port()), From: f.Addr().Unmap()}, nil
}

// ping sends one echo request (RFC 792, RFC 4443).
func ping(to netip.Addr) (Verdict, error) {
	network, kind, reply := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, kind, reply = "ip6:ipv6-icmp", 128, 129
	}
	c, err := net.Dial(network, to.String())
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	msg := []byte{kind, 0, 0, 0, 0x12, 0x34, 0, 1}
	if to.Is4() { // the kernel does it for IPv6
		binary.BigEndian.PutUint16(msg[2:], ^(uint16(kind)<<8 + 0x1234 + 1))
	}
	if _, err := c.Write(msg); err != nil {
		if errors.Is(err, unix.EPERM) { // what a drop on the way out looks like
			return Verdict{Dropped: true}, nil
		}
		return failed(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(silence))
	buf := make([]byte, 256)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return failed(err)
		}
		if to.Is4() { // comes with its header
			n = copy(buf, buf[min(n, int(buf[0]&0xf)*4):n])
		}
		if n > 0 && buf[0] == reply {
			return Verdict{To: netip.AddrPortFrom(to, 0)}, nil
		}
	}
}
