package netbench

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace"
)

// lab is a node between two pods, one of which serves.
type lab struct {
	node, client string
	server       netip.AddrPort
	undo         []func() error
}

func newLab(dir string) (*lab, error) {
	l := &lab{server: netip.AddrPortFrom(netip.MustParseAddr(served), 8080)}
	if err := l.build(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("network of namespaces: %w", err), l.close())
	}
	return l, nil
}

func (l *lab) close() error {
	var errs []error
	for i := len(l.undo) - 1; i >= 0; i-- {
		errs = append(errs, l.undo[i]())
	}
	l.undo = nil
	return errors.Join(errs...)
}

func (l *lab) build(dir string) error {
	var paths [3]string
	for i, name := range []string{"node", "client", "server"} {
		path, remove, err := namespace(dir, name)
		if err != nil {
			return err
		}
		paths[i] = path
		l.undo = append(l.undo, remove)
	}
	l.node, l.client = paths[0], paths[1]
	server := paths[2]
	err := netspace.Do(l.node, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		local := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: network("10.96.0.0/12"), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
		return errors.Join(netlink.LinkSetUp(lo), netlink.RouteAdd(local), os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644))
	})
	if err != nil {
		return err
	}
	for _, pod := range []struct{ path, link, addr string }{{l.client, "client", caller}, {server, "server", served}} {
		if err := plug(l.node, pod.path, pod.link, pod.addr); err != nil {
			return err
		}
	}
	return netspace.Do(server, func() error {
		ln, err := net.Listen("tcp4", l.server.String())
		if err != nil {
			return err
		}
		l.undo = append(l.undo, ln.Close)
		go accept(ln)
		return nil
	})
}

func network(s string) *net.IPNet {
	p := netip.MustParsePrefix(s)
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// gateway is the node's address on every link.
const gateway = "10.250.0.1"

// plug gives a pod a link to the node and a default route.
func plug(node, pod, name, addr string) error {
	err := netspace.Do(node, func() error {
		peer, err := os.Open(pod)
		if err != nil {
			return err
		}
		defer peer.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(peer.Fd())}); err != nil {
			return err
		}
		return configure(name, gateway, addr)
	})
	if err != nil {
		return err
	}
	return netspace.Do(pod, func() error {
		if err := configure("eth0", addr, gateway); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: network("0.0.0.0/0"), Gw: net.ParseIP(gateway)})
	})
}

// configure brings a link up, with an address and the way to its other end.
func configure(name, addr, other string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(link), netlink.AddrAdd(link, &netlink.Addr{IPNet: network(addr + "/32")}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: network(other + "/32"), Scope: netlink.SCOPE_LINK}))
}

// accept takes connections until their clients end them.
func accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(io.Discard, c) // ends by a reset, so that none lingers
		}()
	}
}

// connectOnce is how long one connect takes, in microseconds, in the current namespace;
// without Go's poller, whose part would be larger than the kernel's.
func connectOnce(addr [4]byte, port int) (float64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return 0, err
	}
	start := time.Now()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: addr, Port: port}); err != nil {
		return 0, err
	}
	return float64(time.Since(start).Nanoseconds()) / 1000, nil
}
