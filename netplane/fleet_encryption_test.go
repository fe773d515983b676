package netplane_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/overlay"
	"decree.dev/decree/schemas/api"
)

// TestKernelFleetEncrypted: three nodes, each with an agent process, that encrypt all that their
// pods say to each other, or what they can.
//   - Everybody reaches every pod, and between the nodes there is nothing but WireGuard.
//   - Agents that are killed keep their keys: no datagram is lost, and nothing read.
//   - A node that the others removed, or that boots, is reached again soon; what is sent to it
//     before does not leave in the clear.
//   - An agent that no longer encrypts is not reached where encryption is required, and in the
//     clear where it is not, while others go on to encrypt; and again, encrypted, once it does.
func TestKernelFleetEncrypted(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	f := newFleet(t, 3, netplane.EncryptAll, netplane.EncryptAll, netplane.EncryptAll)
	tap := netspacetest.Listen(t, f.router)
	secret := func(when string) {
		t.Helper()
		if all, read := tap.Seen(f.headers(f.podHosts(), f.podHosts())...); all == 0 || read > 0 {
			t.Errorf("%s: of %d packets %d can be read", when, all, read)
		}
	}
	for _, h := range f.podHosts() {
		if mtu := podMTU(t, f.lab.Path[h]); mtu != 1440 {
			t.Errorf("%s has an interface with MTU %d", h, mtu)
		}
	}
	f.service("web", 1, 80, netplanetest.TCPPort, nil, f.podHosts()...)
	f.publish()
	testPairs(t, f)
	for _, n := range f.nets {
		f.reached(n, "cluster address", netip.AddrPortFrom(n.Service(1), 80), f.podHosts(), "pod1", "n2")
	}
	secret("at first")
	f.meet()
	onlyWireGuard(t, tap.Packets())
	testKeys(t, f)
	secret("agents were killed")
	testReturn(t, f)
	secret("a node came back")
	testUnwilling(t, f, tap)
	secret("all encrypt again")
}

// meet has pods and nodes connect to all pods, which see pods as themselves.
func (f *fleet) meet() {
	f.t.Helper()
	for _, n := range f.nets {
		var all []asked
		for from := range f.lab.Path {
			for _, to := range f.podHosts() {
				if from != outside {
					all = append(all, asked{from, netip.AddrPortFrom(n.Addr[to], netplanetest.TCPPort)})
				}
			}
		}
		for a, who := range f.answers(1, all...) {
			if source := who[a.to.Addr()]; !source.IsValid() || f.pods[a.from] != nil && source != n.Addr[a.from] {
				f.t.Errorf("%s: %v", a, who)
			}
		}
	}
}

// onlyWireGuard: in some packets there is nothing else, but for looking for neighbours.
func onlyWireGuard(t *testing.T, packets []netspacetest.Packet) {
	t.Helper()
	sealed := 0
	for _, p := range packets {
		var proto byte
		var payload []byte
		switch {
		case p.Type == unix.ETH_P_ARP:
			continue
		case p.Type == unix.ETH_P_IP && len(p.Data) >= 20:
			proto, payload = p.Data[9], p.Data[min(len(p.Data), int(p.Data[0]&15)*4):]
		case p.Type == unix.ETH_P_IPV6 && len(p.Data) >= 40:
			proto, payload = p.Data[6], p.Data[40:]
			if proto == unix.IPPROTO_ICMPV6 && len(payload) > 0 && payload[0] >= 133 || proto == unix.IPPROTO_HOPOPTS {
				continue // RFC 4861; RFC 3810
			}
		}
		if proto != unix.IPPROTO_UDP || len(payload) < 8 || binary.BigEndian.Uint16(payload[2:]) != overlay.DefaultSealedPort {
			t.Errorf("between nodes there is a packet of type %#x, protocol %d: %x", p.Type, proto, p.Data)
			continue
		}
		sealed++
	}
	if sealed == 0 {
		t.Error("there is nothing between nodes: this test proves nothing")
	}
}

// datagrams is a stream of datagrams that are answered. Nobody sends again what is lost.
func (f *fleet) datagrams(from netplanetest.Host, to netip.AddrPort) *stream {
	var c net.Conn
	netspacetest.In(f.t, f.lab.Path[from], func() (err error) {
		c, err = net.Dial("udp", to.String())
		return err
	})
	f.t.Cleanup(func() { c.Close() })
	buf := make([]byte, 256)
	return &stream{name: fmt.Sprintf("%s to %s, datagrams", from, to), asked: make(chan struct{}, 1), ask: func() error {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("?")); err != nil {
			return err
		}
		_, err := c.Read(buf)
		return err
	}}
}

func (n *fleetNode) key() string { return n.object.Annotations[api.AnnotationWireGuard] }

// testKeys kills each agent while all pods talk to each other.
func testKeys(t *testing.T, f *fleet) {
	var datagrams, all []*stream
	for _, n := range f.nets {
		for _, from := range f.podHosts() {
			for _, to := range f.podHosts() {
				if from != to {
					datagrams = append(datagrams, f.datagrams(from, netip.AddrPortFrom(n.Addr[to], netplanetest.UDPPort)))
				}
				if from == "pod1" && to != from {
					all = append(all, f.client(from, netip.AddrPortFrom(n.Addr[to], linePort), 10*time.Second, to == "pod2"))
				}
			}
		}
	}
	all = append(all, datagrams...)
	stop := flow(t, all...)
	goOn(t, all...)
	for _, n := range f.nodes {
		key := n.key()
		n.kill()
		goOn(t, all...)
		n.start()
		f.publish()
		goOn(t, all...)
		well(t, n.object.Name+" has another agent", all...)
		if n.key() == "" || n.key() != key {
			t.Errorf("%s had the key %q, and has %q", n.object.Name, key, n.key())
		}
	}
	stop()
	total := 0
	for _, s := range datagrams {
		total += s.count()
	}
	t.Logf("%d agents killed, %d datagrams, none lost", len(f.nodes), total)
}

// soon is how long a node that comes back may stay unreached. By itself WireGuard finds out only
// after 15 seconds that the other side has forgotten what they agreed on.
const soon = 8 * time.Second

// testReturn: the last node is gone and comes back. Once it is removed from the cluster in
// between, and once it boots, after which its kernel knows nothing.
func testReturn(t *testing.T, f *fleet) {
	far, all := f.nodes[2], f.nodes
	for _, c := range []struct {
		name string
		away func()
	}{
		{"removed", func() {
			f.nodes = all[:2]
			f.publish()
			f.nodes = all
		}},
		{"booted", func() {
			netspacetest.In(t, far.path(), func() error {
				l, err := netlink.LinkByName(overlay.DefaultSealedDevice)
				if err == nil {
					err = netlink.LinkDel(l)
				}
				return err
			})
		}},
	} {
		var streams []*stream
		for _, n := range f.nets {
			// One way each, so that the other side does not notice first.
			for _, way := range [][2]netplanetest.Host{{"pod1", "pod3"}, {"n1", "pod3"}, {"pod3", "pod2"}} {
				streams = append(streams, f.client(way[0], netip.AddrPortFrom(n.Addr[way[1]], linePort), time.Second, false))
			}
		}
		stop := flow(t, streams...)
		back(t, soon, streams...)
		stop()
		far.kill()
		c.away()
		var wg sync.WaitGroup
		for _, s := range streams {
			wg.Go(func() {
				if s.ask() == nil {
					t.Errorf("%s: %s goes on without the node", c.name, s.name)
				}
			})
		}
		wg.Wait()
		far.start()
		f.publish()
		begun := time.Now()
		stop = flow(t, streams...)
		back(t, soon, streams...)
		t.Logf("%s: reached again %s after the nodes were told", c.name, time.Since(begun).Round(time.Millisecond))
		stop()
	}
}

// testUnwilling: the last node does not encrypt for a while.
func testUnwilling(t *testing.T, f *fleet, tap *netspacetest.Wiretap) {
	last := f.nodes[2]
	restart := func(n *fleetNode, encryption netplane.Encryption) {
		n.kill()
		n.encryption = encryption
		n.start()
		f.publish()
	}
	restart(last, netplane.EncryptNothing)
	var away []*stream
	for _, n := range f.nets {
		s := f.client("pod1", netip.AddrPortFrom(n.Addr["pod3"], linePort), patience, false)
		if err := s.ask(); err == nil {
			t.Errorf("%s: a node that does not encrypt is reached", s.name)
		}
		away = append(away, s)
	}
	// What it sends itself, such as the ends of connections, is in the clear as it wants.
	if _, read := tap.Seen(f.headers([]netplanetest.Host{"pod1", "pod2"}, f.podHosts())...); read > 0 {
		t.Errorf("%d packets to a node that does not encrypt can be read", read)
	}
	for _, n := range f.nodes[:2] {
		restart(n, netplane.EncryptPossible)
	}
	flow(t, away...)
	back(t, 20*time.Second, away...)
	tap.Packets()
	f.meet()
	packets := tap.Packets()
	for _, c := range []struct {
		pods  []netplanetest.Host
		clear bool
	}{
		{[]netplanetest.Host{"pod1", "pod2"}, false},
		{[]netplanetest.Host{"pod1", "pod3"}, true},
		{[]netplanetest.Host{"pod2", "pod3"}, true},
	} {
		for _, header := range f.headers(c.pods, c.pods) {
			read := netspacetest.Holding(packets, header)
			if c.clear != (read > 0) {
				t.Errorf("between %s, of which one node does not encrypt: %v; %d of %d packets can be read", c.pods, c.clear, read, len(packets))
			}
		}
	}
	restart(last, netplane.EncryptPossible)
	back(t, 20*time.Second, away...)
	goOn(t, away...) // what is under way ends
	tap.Packets()
	goOn(t, away...)
}

// headers are what the headers of packets from some pods to others have in them, however those
// are wrapped (RFC 791, RFC 8200: the source, then the destination).
func (f *fleet) headers(from, to []netplanetest.Host) (out [][]byte) {
	for _, n := range f.nets {
		for _, a := range from {
			for _, b := range to {
				if a != b {
					out = append(out, slices.Concat(n.Addr[a].AsSlice(), n.Addr[b].AsSlice()))
				}
			}
		}
	}
	return out
}
