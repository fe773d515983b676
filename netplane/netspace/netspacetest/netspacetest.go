// Package netspacetest gives tests network namespaces of their own.
package netspacetest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/netspace"
)

// Namespace makes a network namespace with loopback up that lives as long as the
// test, and returns its path.
func Namespace(t testing.TB, name string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root, for network namespaces; run: sudo go test")
	}
	path := filepath.Join(t.TempDir(), name)
	if err := netspace.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netspace.Remove(path); err != nil {
			t.Error(err)
		}
	})
	In(t, path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return path
}

// In runs fn in a network namespace and fails the test on its error.
func In(t testing.TB, path string, fn func() error) {
	t.Helper()
	if err := netspace.Do(path, fn); err != nil {
		t.Fatal(err)
	}
}

// Link makes a pair of interfaces, nameA in the namespace a and nameB in b.
func Link(t testing.TB, a, nameA, b, nameB string) {
	t.Helper()
	In(t, a, func() error {
		peer, err := os.Open(b)
		if err != nil {
			return err
		}
		defer peer.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = nameA
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameB, PeerNamespace: netlink.NsFd(peer.Fd())})
	})
}

// Switch makes a bridge in a namespace, with addresses of its own.
func Switch(t testing.TB, path, name string, addrs ...string) {
	t.Helper()
	In(t, path, func() error {
		a := netlink.NewLinkAttrs()
		a.Name = name
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: a})
	})
	Up(t, path, name, addrs...)
}

// Plug connects an interface with a bridge.
func Plug(t testing.TB, path, name, bridge string) {
	t.Helper()
	In(t, path, func() error {
		b, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMaster(l, b), netlink.LinkSetUp(l))
	})
}

// Up sets an interface up, with addresses such as "10.0.0.1/24" that are of use at once.
func Up(t testing.TB, path, name string, addrs ...string) {
	t.Helper()
	In(t, path, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, text := range addrs {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return err
			}
			a := &netlink.Addr{IPNet: host.IPNet(p)}
			if p.Addr().Is6() {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, a); err != nil {
				return fmt.Errorf("%s on %s: %w", text, name, err)
			}
		}
		return netlink.LinkSetUp(link)
	})
}

// Route adds a route to dst by an interface, a gateway, or both; the other one is empty.
func Route(t testing.TB, path, dst, via, name string) {
	t.Helper()
	In(t, path, func() error {
		r := &netlink.Route{Dst: host.IPNet(netip.MustParsePrefix(dst)), Gw: net.ParseIP(via)}
		if name != "" {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			r.LinkIndex = link.Attrs().Index
		}
		if via == "" {
			r.Scope = netlink.SCOPE_LINK
		}
		if err := netlink.RouteAdd(r); err != nil {
			return fmt.Errorf("route to %s: %w", dst, err)
		}
		return nil
	})
}

// Forward makes a namespace route.
func Forward(t testing.TB, path string) {
	t.Helper()
	In(t, path, func() error {
		return errors.Join(os.WriteFile(host.Forwarding(false), []byte("1"), 0o644), os.WriteFile(host.Forwarding(true), []byte("1"), 0o644))
	})
}

// Wiretap listens to all that passes a network namespace, as tcpdump does.
type Wiretap struct {
	t  testing.TB
	fd int
}

// Packet is one that passed a Wiretap.
type Packet struct {
	Type uint16 // of Ethernet
	Data []byte // behind the Ethernet header
}

// wiretapRoom is for packets that nobody has asked for yet, in bytes.
const wiretapRoom = 32 << 20

// Listen listens until the test ends.
func Listen(t testing.TB, path string) *Wiretap {
	t.Helper()
	w := &Wiretap{t: t}
	In(t, path, func() (err error) {
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(swapped(unix.ETH_P_ALL)))
		return err
	})
	t.Cleanup(func() { unix.Close(w.fd) })
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, wiretapRoom); err != nil {
		t.Fatal(err)
	}
	return w
}

// swapped is in network order what v is in that of the machine, and the other way round.
func swapped(v uint16) uint16 { return v<<8 | v>>8 }

// Packets returns those since the last call. That it missed some fails the test.
func (w *Wiretap) Packets() (out []Packet) {
	w.t.Helper()
	buf := make([]byte, 64<<10)
	for {
		n, from, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			w.t.Fatal(err)
		}
		out = append(out, Packet{swapped(from.(*unix.SockaddrLinklayer).Protocol), bytes.Clone(buf[:n])})
	}
	stats, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		w.t.Fatal(err)
	}
	if stats.Drops > 0 {
		w.t.Fatalf("who listens missed %d packets", stats.Drops)
	}
	return out
}

// Seen returns how many packets there were since the last call, and how many of them had one
// of some patterns in them.
func (w *Wiretap) Seen(patterns ...[]byte) (all, with int) {
	w.t.Helper()
	packets := w.Packets()
	return len(packets), Holding(packets, patterns...)
}

// Holding returns how many of some packets have one of some patterns in them.
func Holding(packets []Packet, patterns ...[]byte) (with int) {
	for _, p := range packets {
		if slices.ContainsFunc(patterns, func(pattern []byte) bool { return bytes.Contains(p.Data, pattern) }) {
			with++
		}
	}
	return with
}
