// Package netplanetest is what every service backend has to pass: one suite, run
// against the kernel in network namespaces and against the in-memory kernel.
//
// It also builds those namespaces: a node, pods behind it, and a host outside.
package netplanetest

import (
	"net/netip"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/render"
)

// Host is one of the places that packets come from.
type Host string

// The hosts of a World.
const (
	Pod1    Host = "pod1"
	Pod2    Host = "pod2"
	Pod3    Host = "pod3"
	Node    Host = "node"
	Outside Host = "outside"
)

// Pods are the hosts that serve.
var Pods = []Host{Pod1, Pod2, Pod3}

// TCPPort, UDPPort and SCTPPort are served by each pod, by the host outside and, but for
// SCTP, by the node; SecondPort is TCP too.
const (
	TCPPort    = 8080
	UDPPort    = 8081
	SecondPort = 8082
	SCTPPort   = 8083
)

// Net is the addresses of a World in one IP family.
type Net struct {
	Name                 string
	Cluster, Pods, Range netip.Prefix
	// Announced is where load balancers have their addresses, which no host holds: all
	// other hosts send them to the node, and the node to Outside.
	Announced netip.Prefix
	// Addr is each host's address; Uplink the node's address towards Outside.
	Addr   map[Host]netip.Addr
	Uplink netip.Addr
}

// Nets are the families of every World.
var Nets = []Net{
	newNet("ipv4", "10.98.0.0/16", "10.98.0.0/24", "10.97.0.0/16", "203.0.113.0/24", "10.98.0.", "192.0.2."),
	newNet("ipv6", "fd98::/48", "fd98::/64", "fd97::/108", "2001:db8:f::/64", "fd98::", "2001:db8::"),
}

func newNet(name, cluster, pods, services, announced, pod, out string) Net {
	a := netip.MustParseAddr
	return Net{
		Name: name, Cluster: netip.MustParsePrefix(cluster), Pods: netip.MustParsePrefix(pods), Range: netip.MustParsePrefix(services),
		Announced: netip.MustParsePrefix(announced),
		Addr: map[Host]netip.Addr{
			Node: a(pod + "1"), Pod1: a(pod + "2"), Pod2: a(pod + "3"), Pod3: a(pod + "4"), Outside: a(out + "2"),
		},
		Uplink: a(out + "1"),
	}
}

// Service returns the n-th address for services, from 1.
func (n *Net) Service(i int) netip.Addr { return nth(n.Range, i) }

// Balanced returns the n-th address for load balancers, from 1.
func (n *Net) Balanced(i int) netip.Addr { return nth(n.Announced, i) }

func nth(p netip.Prefix, i int) netip.Addr {
	a := p.Addr()
	for range i {
		a = a.Next()
	}
	return a
}

// Endpoints returns a port of some hosts as endpoints, in order.
func (n *Net) Endpoints(port uint16, hosts ...Host) []netip.AddrPort {
	var out []netip.AddrPort
	for _, h := range hosts {
		out = append(out, netip.AddrPortFrom(n.Addr[h], port))
	}
	return out
}

// Verdict is what became of a packet and the connection that it began.
type Verdict struct {
	// To is where it was delivered, From the source address seen there. They are zero
	// when it was not delivered.
	To   netip.AddrPort
	From netip.Addr
	// Rejected: the sender was told. Dropped: it was not.
	Rejected, Dropped bool
}

// World is a kernel with hosts around it.
type World interface {
	// Services opens the backend as a new process would.
	Services() (netplane.Services, error)
	// Send sends a first packet and follows it.
	Send(from Host, proto render.Proto, to netip.AddrPort) (Verdict, error)
	// Tamper changes the entries of one service behind the backend's back.
	Tamper(render.Port) error
	// Break damages the backend's foundation, whatever that is.
	Break() error
	// Leftovers describes what is there although there should be nothing.
	Leftovers() (string, error)
}

// Rememberer is a World whose node tracks connections.
type Rememberer interface {
	// Remembered lists them, of both families.
	Remembered() ([]flows.Flow, error)
}

// UDPFlow is a World that can keep sending from one port.
type UDPFlow interface {
	// Flow sends datagrams from one source port; each call of the result sends one
	// and follows it.
	Flow(from Host, to netip.AddrPort) (send func() (Verdict, error), stop func(), err error)
}
