package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"decree.dev/decree/netplane/render"
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func nets(texts ...string) (out []netip.Prefix) {
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// cluster is where all pods of the tests are.
var cluster = nets("10.42.0.0/16", "fd42::/16")

// text is a plan in words.
func text(p Plan) string {
	var b strings.Builder
	if d := p.Device; d != nil {
		fmt.Fprintf(&b, "device on %d from %s mtu %d has %v\n", d.Link, d.Local, d.MTU, d.Addrs)
	}
	for _, t := range p.Peers {
		fmt.Fprintf(&b, "%v at %s\n", t.Vias, t.Remote)
	}
	if d := p.Sealed; d != nil {
		fmt.Fprintf(&b, "sealed mtu %d has %v\n", d.MTU, d.Addrs)
		for _, s := range d.Peers {
			fmt.Fprintf(&b, "%.4s at %s may be %v\n", s.Key, s.Remote, s.Allowed)
		}
	}
	for _, r := range p.Routes {
		switch r.Link {
		case Encrypted:
			fmt.Fprintf(&b, "%s encrypted\n", r.Dst)
		case Refused:
			fmt.Fprintf(&b, "%s refused\n", r.Dst)
		default:
			fmt.Fprintf(&b, "%s via %s on %d\n", r.Dst, r.Via, r.Link)
		}
	}
	return b.String()
}

func TestDecide(t *testing.T) {
	eth0 := Link{2, "eth0", 1500, nets("192.168.1.1/24", "fd00:1::1/64")}
	eth1 := Link{3, "eth1", 9000, nets("10.0.0.1/30")}
	self := render.Peer{Node: "n1", Addrs: addrs("192.168.1.1", "fd00:1::1"), Pods: nets("10.42.1.0/24", "fd42:1::/64")}
	near := render.Peer{Node: "n2", Addrs: addrs("192.168.1.2", "fd00:1::2"), Pods: nets("10.42.2.0/24", "fd42:2::/64")}
	far := render.Peer{Node: "n3", Addrs: addrs("192.168.2.3"), Pods: nets("10.42.3.0/24", "fd42:3::/64")}
	half := render.Peer{Node: "n4", Addrs: addrs("192.168.1.4"), Pods: nets("10.42.4.0/24", "fd42:4::/64")}
	six := render.Peer{Node: "n5", Addrs: addrs("fd00:5::5"), Pods: nets("10.42.5.0/24")}
	for _, c := range []struct {
		name  string
		self  render.Peer
		peers []render.Peer
		links []Link
		want  string
		lost  string
	}{
		{"alone", self, nil, []Link{eth0}, "", ""},
		{"alone without an address", render.Peer{Node: "n1"}, nil, nil, "", ""},
		{"a neighbour", self, []render.Peer{near}, []Link{eth0}, `10.42.2.0/24 via 192.168.1.2 on 2
fd42:2::/64 via fd00:1::2 on 2
`, ""},
		{"one elsewhere", self, []render.Peer{far}, []Link{eth1, eth0}, `device on 2 from 192.168.1.1 mtu 1450 has [10.42.1.0 fd42:1::]
[10.42.3.0 fe80::86b1:b910:30e1] at 192.168.2.3
10.42.3.0/24 via 10.42.3.0 on 0
fd42:3::/64 via fe80::86b1:b910:30e1 on 0
`, ""},
		{"a neighbour with one family only", self, []render.Peer{half}, []Link{eth0}, `device on 2 from 192.168.1.1 mtu 1450 has [10.42.1.0 fd42:1::]
[fe80::5a24:99c4:5d20] at 192.168.1.4
10.42.4.0/24 via 192.168.1.4 on 2
fd42:4::/64 via fe80::5a24:99c4:5d20 on 0
`, ""},
		{"another interface's network", self, []render.Peer{{Node: "n6", Addrs: addrs("10.0.0.2"), Pods: nets("10.42.6.0/24")}}, []Link{eth0, eth1}, "10.42.6.0/24 via 10.0.0.2 on 3\n", ""},
		{"no common family", self, []render.Peer{near, six}, []Link{eth0}, `10.42.2.0/24 via 192.168.1.2 on 2
fd42:2::/64 via fd00:1::2 on 2
`, "n5"},
		{"over IPv6", render.Peer{Node: "n1", Addrs: addrs("fd00:1::1"), Pods: nets("10.42.1.0/24")}, []render.Peer{six}, []Link{eth0}, `device on 2 from fd00:1::1 mtu 1430 has [10.42.1.0]
[10.42.5.0] at fd00:5::5
10.42.5.0/24 via 10.42.5.0 on 0
`, ""},
		{"an address that no interface has", self, []render.Peer{near}, []Link{eth1}, "", "n2"},
	} {
		p := Decide(c.self, c.peers, c.links, cluster, false)
		if got := text(p); got != c.want {
			t.Errorf("%s:\n%swant\n%s", c.name, got, c.want)
		}
		if got := strings.Join(p.Lost, " "); got != c.lost {
			t.Errorf("%s: lost %q, want %q", c.name, got, c.lost)
		}
	}
}

// TestDecideEncrypted: what is between two nodes with keys is encrypted, near or far;
// what is not is named.
func TestDecideEncrypted(t *testing.T) {
	key := func(n byte) string { return wgtypes.Key{8 * n}.PublicKey().String() }
	eth0 := Link{2, "eth0", 1500, nets("192.168.1.1/24", "fd00:1::1/64")}
	self := render.Peer{Node: "n1", Addrs: addrs("192.168.1.1", "fd00:1::1"), Pods: nets("10.42.1.0/24", "fd42:1::/64"), Key: key(1)}
	near := render.Peer{Node: "n2", Addrs: addrs("192.168.1.2"), Pods: nets("10.42.2.0/24", "fd42:2::/64"), Key: key(2)}
	far := render.Peer{Node: "n3", Addrs: addrs("192.168.2.3"), Pods: nets("10.42.3.0/24"), Key: key(3)}
	bare := render.Peer{Node: "n4", Addrs: addrs("192.168.1.4"), Pods: nets("10.42.4.0/24")}
	wrong := render.Peer{Node: "n5", Addrs: addrs("192.168.1.5"), Pods: nets("10.42.5.0/24"), Key: "AAAA"}
	mine := render.Peer{Node: "n6", Addrs: addrs("192.168.1.6"), Pods: nets("10.42.6.0/24"), Key: self.Key}
	six := render.Peer{Node: "n7", Addrs: addrs("fd00:5::5"), Pods: nets("10.42.7.0/24"), Key: key(7)}
	thief := render.Peer{Node: "n8", Addrs: addrs("192.168.1.2", "192.168.1.8"), Pods: nets("10.42.8.0/24"), Key: key(8)}
	plain := self
	plain.Key = ""
	both := `sealed mtu 1440 has [10.42.1.0 fd42:1::]
jSD4 at 192.168.1.2 may be [10.42.2.0/24 192.168.1.2/32 fd42:2::/64]
rosE at 192.168.2.3 may be [10.42.3.0/24 192.168.2.3/32]
10.42.0.0/16 refused
10.42.2.0/24 encrypted
10.42.3.0/24 encrypted
fd42::/16 refused
`
	for _, c := range []struct {
		name     string
		self     render.Peer
		peers    []render.Peer
		required bool
		want     string
		clear    string
		lost     string
	}{
		{"near and far", self, []render.Peer{near, far}, true, both + "fd42:2::/64 encrypted\n", "", ""},
		{"some without", self, []render.Peer{bare, far, wrong, mine}, false, `sealed mtu 1440 has [10.42.1.0 fd42:1::]
rosE at 192.168.2.3 may be [10.42.3.0/24 192.168.2.3/32]
10.42.3.0/24 encrypted
10.42.4.0/24 via 192.168.1.4 on 2
10.42.5.0/24 via 192.168.1.5 on 2
10.42.6.0/24 via 192.168.1.6 on 2
`, "n4 n5 n6", ""},
		{"some without, which is forbidden", self, []render.Peer{bare, far, wrong, mine}, true, `sealed mtu 1440 has [10.42.1.0 fd42:1::]
rosE at 192.168.2.3 may be [10.42.3.0/24 192.168.2.3/32]
10.42.0.0/16 refused
10.42.3.0/24 encrypted
10.42.4.0/24 refused
10.42.5.0/24 refused
10.42.6.0/24 refused
fd42::/16 refused
`, "n4 n5 n6", ""},
		{"a range that is all the cluster", self, []render.Peer{{Node: "n9", Addrs: addrs("192.168.1.9"), Pods: cluster, Key: key(9)}}, true, `sealed mtu 1440 has [10.42.1.0 fd42:1::]
j8td at 192.168.1.9 may be [10.42.0.0/16 192.168.1.9/32 fd42::/16]
10.42.0.0/16 encrypted
fd42::/16 encrypted
`, "", ""},
		{"without a key of its own", plain, []render.Peer{near}, false, `device on 2 from 192.168.1.1 mtu 1450 has [10.42.1.0 fd42:1::]
[fe80::ea56:2207:c32] at 192.168.1.2
10.42.2.0/24 via 192.168.1.2 on 2
fd42:2::/64 via fe80::ea56:2207:c32 on 0
`, "", ""},
		{"no common family", self, []render.Peer{six}, false, "", "", "n7"},
		{"an address that two claim", self, []render.Peer{near, thief}, false, `sealed mtu 1440 has [10.42.1.0 fd42:1::]
jSD4 at 192.168.1.2 may be [10.42.2.0/24 192.168.1.2/32 fd42:2::/64]
r2xr at 192.168.1.2 may be [10.42.8.0/24 192.168.1.8/32]
10.42.2.0/24 encrypted
10.42.8.0/24 encrypted
fd42:2::/64 encrypted
`, "", ""},
	} {
		p := Decide(c.self, c.peers, []Link{eth0}, cluster, c.required)
		if got := text(p); got != c.want {
			t.Errorf("%s:\n%swant\n%s", c.name, got, c.want)
		}
		if clear, lost := strings.Join(p.Clear, " "), strings.Join(p.Lost, " "); clear != c.clear || lost != c.lost {
			t.Errorf("%s: clear %q, lost %q; want %q and %q", c.name, clear, lost, c.clear, c.lost)
		}
	}
}

// TestDecideInAnyOrder: a plan depends on what there is, not on how it is listed.
func TestDecideInAnyOrder(t *testing.T) {
	link := Link{2, "eth0", 1500, nets("192.168.1.1/24")}
	self := render.Peer{Node: "n1", Addrs: addrs("192.168.1.1"), Pods: nets("10.42.1.0/24")}
	var peers []render.Peer
	for i := range 20 {
		peers = append(peers, render.Peer{
			Node: fmt.Sprint("p", i), Addrs: addrs(fmt.Sprintf("192.168.%d.%d", 1+i%3, 10+i)), Pods: nets(fmt.Sprintf("10.42.%d.0/24", 10+i)),
		})
	}
	first := Decide(self, peers, []Link{link}, nil, false)
	if len(first.Routes) != 20 || len(first.Peers) != 13 {
		t.Fatalf("%d routes, %d tunnels", len(first.Routes), len(first.Peers))
	}
	slices.Reverse(peers)
	second := Decide(self, peers, []Link{link}, nil, false)
	if text(first) != text(second) {
		t.Errorf("%s\nand\n%s", text(first), text(second))
	}
}

// TestMACs: addresses are usable (unicast, locally administered) and differ.
func TestMACs(t *testing.T) {
	seen := map[MAC]bool{}
	for i := range 10_000 {
		m := macOf(fmt.Sprint("node-", i))
		if m[0]&3 != 2 || seen[m] {
			t.Fatalf("node %d has %s", i, m)
		}
		seen[m] = true
	}
}
