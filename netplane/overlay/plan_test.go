package overlay

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

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

// text is a plan in words.
func text(p Plan) string {
	var b strings.Builder
	if d := p.Device; d != nil {
		fmt.Fprintf(&b, "device on %d from %s mtu %d has %v\n", d.Link, d.Local, d.MTU, d.Addrs)
	}
	for _, t := range p.Peers {
		fmt.Fprintf(&b, "%v at %s\n", t.Vias, t.Remote)
	}
	for _, r := range p.Routes {
		fmt.Fprintf(&b, "%s via %s on %d\n", r.Dst, r.Via, r.Link)
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
		p := Decide(c.self, c.peers, c.links)
		if got := text(p); got != c.want {
			t.Errorf("%s:\n%swant\n%s", c.name, got, c.want)
		}
		if got := strings.Join(p.Lost, " "); got != c.lost {
			t.Errorf("%s: lost %q, want %q", c.name, got, c.lost)
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
	first := Decide(self, peers, []Link{link})
	if len(first.Routes) != 20 || len(first.Peers) != 13 {
		t.Fatalf("%d routes, %d tunnels", len(first.Routes), len(first.Peers))
	}
	slices.Reverse(peers)
	second := Decide(self, peers, []Link{link})
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
