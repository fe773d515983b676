package announce

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

var balancers = []netip.Addr{netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8::80")}

// machine is one node, or the client, on the network of a test.
type machine struct {
	ns  string
	mac net.HardwareAddr
	a   *Announcer
}

func newMachine(t *testing.T, network, name string, number int) *machine {
	m := &machine{ns: netspacetest.Namespace(t, name)}
	netspacetest.Link(t, m.ns, "eth0", network, name)
	netspacetest.Plug(t, network, name, "switch")
	netspacetest.Up(t, m.ns, "eth0", fmt.Sprintf("192.0.2.%d/24", number), fmt.Sprintf("2001:db8::%d/64", number))
	netspacetest.Forward(t, m.ns)
	m.a = New(host.New(t.TempDir()), slog.New(slog.DiscardHandler))
	netspacetest.In(t, m.ns, func() error {
		// An address that is not checked for duplicates is of use at once.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/accept_dad", []byte("0"), 0o644); err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		m.mac = l.Attrs().HardwareAddr
		return err
	})
	return m
}

func (m *machine) sync(t *testing.T, addrs ...netip.Addr) (n int) {
	t.Helper()
	netspacetest.In(t, m.ns, func() (err error) { n, err = m.a.Sync(addrs); return err })
	return n
}

// resolve asks the network for an address until it is at mac.
func (m *machine) resolve(t *testing.T, addr netip.Addr, mac net.HardwareAddr) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	netspacetest.In(t, m.ns, func() error {
		updates, done := make(chan netlink.NeighUpdate, 64), make(chan struct{})
		defer close(done)
		if err := netlink.NeighSubscribeWithOptions(updates, done, netlink.NeighSubscribeOptions{ListExisting: true}); err != nil {
			return err
		}
		c, err := net.Dial("udp", netip.AddrPortFrom(addr, 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil { // which asks for the address, if it is not known
			return err
		}
		for {
			select {
			case u := <-updates:
				if ip, _ := netip.AddrFromSlice(u.IP); ip.Unmap() == addr && u.Type == unix.RTM_NEWNEIGH && bytes.Equal(u.HardwareAddr, mac) {
					return nil
				}
			case <-ctx.Done():
				return fmt.Errorf("%s is not found at %s", addr, mac)
			}
		}
	})
}

// traces is all that announcing may leave in a namespace.
func (m *machine) traces(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	netspacetest.In(t, m.ns, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rs, err := netlink.RouteList(nil, family)
			if err != nil {
				return err
			}
			for _, r := range rs {
				fmt.Fprintln(&b, r.Dst, r.LinkIndex, r.Protocol)
			}
			ns, err := netlink.NeighProxyList(0, family)
			if err != nil {
				return err
			}
			for _, n := range ns {
				fmt.Fprintln(&b, n.IP, n.LinkIndex)
			}
		}
		for _, path := range []string{"ipv4/neigh/eth0/proxy_delay", "ipv6/neigh/eth0/proxy_delay", "ipv6/conf/eth0/proxy_ndp"} {
			value, err := os.ReadFile("/proc/sys/net/" + path)
			if err != nil {
				return err
			}
			b.Write(value)
		}
		return nil
	})
	return b.String()
}

// TestMove: the addresses are found at one node, and then at another one, by a client
// that knew them at the first.
func TestMove(t *testing.T) {
	network := netspacetest.Namespace(t, "network")
	netspacetest.Switch(t, network, "switch")
	one, two, client := newMachine(t, network, "one", 1), newMachine(t, network, "two", 2), newMachine(t, network, "client", 3)
	before := one.traces(t)
	if n := one.sync(t, balancers...); n != 2 {
		t.Errorf("%d changes, want 2", n)
	}
	if n := one.sync(t, balancers...); n != 0 {
		t.Errorf("%d changes by the same again", n)
	}
	for _, addr := range balancers {
		client.resolve(t, addr, one.mac)
	}
	if n := one.sync(t) + two.sync(t, balancers...); n != 4 {
		t.Errorf("%d changes, want 4", n)
	}
	for _, addr := range balancers {
		client.resolve(t, addr, two.mac)
	}
	netspacetest.In(t, one.ns, one.a.host.Restore)
	if after := one.traces(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// TestRepair: a process that knows nothing finds what an earlier one made and others
// took away, and removes all of it.
func TestRepair(t *testing.T) {
	network := netspacetest.Namespace(t, "network")
	netspacetest.Switch(t, network, "switch")
	m := newMachine(t, network, "one", 1)
	before := m.traces(t)
	m.sync(t, balancers...)
	m.a = New(m.a.host, m.a.log)
	if n := m.sync(t, balancers...); n != 0 {
		t.Errorf("%d changes by a new process", n)
	}
	netspacetest.In(t, m.ns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.NeighDel(proxy(balancers[0], l.Attrs().Index))
	})
	if n := m.sync(t, balancers...); n != 1 {
		t.Errorf("%d repairs, want 1", n)
	}
	m.a = New(m.a.host, m.a.log)
	netspacetest.In(t, m.ns, func() error {
		if err := m.a.Purge(); err != nil {
			return err
		}
		return m.a.host.Restore()
	})
	if after := m.traces(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// TestTell: others are told some times, and no more of what has gone again.
func TestTell(t *testing.T) {
	network := netspacetest.Namespace(t, "network")
	netspacetest.Switch(t, network, "switch")
	m := newMachine(t, network, "one", 1)
	m.sync(t, balancers...)
	tell := func() (left int) {
		netspacetest.In(t, m.ns, func() (err error) { left, err = m.a.Tell(); return err })
		return left
	}
	if left := tell(); left != 2 {
		t.Errorf("%d to be told of again, want 2", left)
	}
	m.sync(t, balancers[0]) // which tells, too
	if left := tell(); left != 0 {
		t.Errorf("%d to be told of again, want 0", left)
	}
}

func TestPlace(t *testing.T) {
	p := netip.MustParsePrefix
	links := []link{
		{name: "wide", prefixes: []netip.Prefix{p("10.0.0.1/8"), p("2001:db8::1/32")}},
		{name: "narrow", prefixes: []netip.Prefix{p("10.1.0.1/16")}},
		{name: "alone", prefixes: []netip.Prefix{p("192.0.2.1/32")}},
	}
	for text, want := range map[string]string{
		"10.2.0.1": "wide", "10.1.0.9": "narrow", "2001:db8::9": "wide",
		"10.1.0.1": "own", "192.0.2.1": "own", "192.0.2.2": "lost", "fd00::1": "lost",
	} {
		addr := netip.MustParseAddr(text)
		at, lost := place([]netip.Addr{addr}, links)
		got := "own"
		switch {
		case len(lost) > 0:
			got = "lost"
		case at[addr] != nil:
			got = at[addr].name
		}
		if got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

// TestPackets has the bytes of the RFCs.
func TestPackets(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 7}
	for got, want := range map[string]string{
		hex.EncodeToString(arpPacket(mac, balancers[0], arpRequest)): "0001" + "0800" + "06" + "04" + "0001" + "020000000007" + "c0000250" + "000000000000" + "c0000250",
		hex.EncodeToString(arpPacket(mac, balancers[0], arpReply)):   "0001" + "0800" + "06" + "04" + "0002" + "020000000007" + "c0000250" + "020000000007" + "c0000250",
		hex.EncodeToString(advertisement(mac, balancers[1])):         "88000000" + "20000000" + "20010db8000000000000000000000080" + "0201" + "020000000007",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestNowhere: a machine without any network announces nothing, and says so.
func TestNowhere(t *testing.T) {
	var log bytes.Buffer
	a := New(host.New(t.TempDir()), slog.New(slog.NewTextHandler(&log, nil)))
	err := netspace.Do(netspacetest.Namespace(t, "alone"), func() error {
		for range 2 {
			if n, err := a.Sync(balancers); n != 0 || err != nil {
				return fmt.Errorf("%d changes, %w", n, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if got := strings.Count(log.String(), "level=WARN"); got != 1 {
		t.Errorf("%d warnings:\n%s", got, log.String())
	}
}
