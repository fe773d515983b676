// Package render turns the desired network of a node into service tables: for each
// service address and port, the endpoints that traffic to it goes to, and for whom.
//
// It is pure: no clock, no I/O, no goroutines. It knows nothing about how a kernel
// holds a table; the backends beside it do.
package render

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// Desired is the whole network of one node as the cluster wants it. The objects
// are shared and never modified.
type Desired struct {
	Node        string
	PodCIDRs    []netip.Prefix // of this node
	ClusterCIDR []netip.Prefix // all pods
	ServiceCIDR []netip.Prefix
	Announced   []netip.Prefix // addresses that nodes announce for load balancers
	DNS         netip.Addr     // the cluster DNS address
	Domain      string         // "cluster.local"
	Services    []*corev1.Service
	Slices      []*discoveryv1.EndpointSlice
	Nodes       []*corev1.Node
	// Policies and what they speak about: all namespaces, and the pods of all nodes. Of
	// those, labels, named ports, the addresses in the status, node, phase and whether they
	// use the network of their node matter.
	Policies   []*networkingv1.NetworkPolicy
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
}

// Proto is an IP protocol number (IANA "Protocol Numbers").
type Proto uint8

// The protocols a service port may have, and ICMP for tracing what is dropped.
const (
	ICMP   Proto = 1
	TCP    Proto = 6
	UDP    Proto = 17
	ICMPv6 Proto = 58
	SCTP   Proto = 132
)

// String is the protocol's name in lower case, or its number.
func (p Proto) String() string {
	switch p {
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMPv6:
		return "icmpv6"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("proto-%d", uint8(p))
}

// Port is one address, protocol and port that a service listens on. It is
// comparable.
type Port struct {
	Addr  netip.Addr
	Proto Proto
	Port  uint16
}

// String is "tcp 10.97.0.1:443".
func (p Port) String() string {
	return fmt.Sprintf("%s %s", p.Proto, netip.AddrPortFrom(p.Addr, p.Port))
}

// Compare orders ports by address, protocol, port.
func (p Port) Compare(q Port) int {
	return cmp.Or(p.Addr.Compare(q.Addr), cmp.Compare(p.Proto, q.Proto), cmp.Compare(p.Port, q.Port))
}

// Service is one address, protocol and port of a service, and where its traffic goes. The
// address may be a cluster address, one from outside the cluster (of a load balancer, or an
// external IP), or one of this node's own: node ports are an entry for each of them.
//
// Clients are of three kinds, told apart by where a packet comes from: pods, whose source
// is in Table.Cluster; this node itself; and outside, which is everybody else, other nodes
// included.
//
// A service without Endpoints has no other field set but, perhaps, Drop: so what a kernel
// holds says all of it.
type Service struct {
	Port
	// Endpoints in order, without duplicates, of the address family of Addr. Empty:
	// traffic is refused, or dropped.
	Endpoints []netip.AddrPort
	// Split sends clients from outside to Outside instead of Endpoints; an empty Outside
	// drops what they send. That is external traffic policy Local, on a node that has not
	// all of the endpoints.
	Split bool
	// Outside is like Endpoints; it is empty without Split, and never the same as Endpoints.
	Outside []netip.AddrPort
	// Drop is for a service without Endpoints on this node that has some on another one:
	// senders are not told, because asking again elsewhere helps.
	Drop bool
	// Sources are the only clients that are served, in order, none inside another; others
	// are dropped, whatever kind they are of. Empty: everybody is served.
	Sources []netip.Prefix
	// Affinity is how long a client address keeps its endpoint after its last new
	// connection, in whole seconds. Zero: no affinity.
	Affinity time.Duration
	// Scheduler is how the service's user wants endpoints to be chosen, one of
	// api.Schedulers; empty: as the backend does it. Of the backends only IPVS has a choice,
	// so that it does not count when services are compared.
	Scheduler string
}

// Equal reports whether both mean the same.
func (s *Service) Equal(t *Service) bool {
	return s.Port == t.Port && s.Affinity == t.Affinity && s.Split == t.Split && s.Drop == t.Drop &&
		sameEndpoints(s.Endpoints, t.Endpoints) && sameEndpoints(s.Outside, t.Outside) && slices.Equal(s.Sources, t.Sources)
}

// sameEndpoints is slices.Equal, faster for a slice and itself.
func sameEndpoints(a, b []netip.AddrPort) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

// Table is everything a service backend has to know. All slices are ordered and
// without duplicates, so that equal tables are equal byte for byte.
//
// Source addresses are kept where replies come back anyway. What goes to a service is
// masqueraded when a pod reached itself, and when its source is not in Cluster and either
// this node sent it or its endpoint is not in Near.
type Table struct {
	Services []Service
	// Range is where cluster addresses come from: what is sent there and is not in
	// Services is refused.
	Range []netip.Prefix
	// Announced is where the cluster's own load balancer addresses come from, which nodes
	// announce and do not hold: what others send there through this node and is not in
	// Services is refused, for it would go round in circles. Other addresses from outside
	// the cluster are not for the cluster to close: only what is in Services goes there.
	Announced []netip.Prefix
	// Local are ports on Range that this node itself serves, such as cluster DNS.
	Local []Port
	// Cluster is all pods.
	Cluster []netip.Prefix
	// Near are the addresses of the endpoints on this node. What they answer passes
	// through it.
	Near []netip.Addr
	// Pods is the pods of this node. What they send out of the cluster is masqueraded.
	Pods []netip.Prefix
	// Lost are the pods of nodes that are gone: connections to endpoints there are not
	// waited for. No kernel holds it, so that it does not count when tables are compared.
	Lost []netip.Prefix
}

// Equal reports whether both tables mean the same.
func (t Table) Equal(u Table) bool {
	return t.SameConfig(u) && slices.EqualFunc(t.Services, u.Services, func(a, b Service) bool { return a.Equal(&b) })
}

// SameConfig reports whether the tables agree in everything but Services.
func (t Table) SameConfig(u Table) bool {
	return slices.Equal(t.Range, u.Range) && slices.Equal(t.Announced, u.Announced) && slices.Equal(t.Local, u.Local) &&
		slices.Equal(t.Cluster, u.Cluster) && slices.Equal(t.Near, u.Near) && slices.Equal(t.Pods, u.Pods)
}

// Find returns the service at a port.
func (t Table) Find(p Port) (*Service, bool) {
	i, ok := slices.BinarySearchFunc(t.Services, p, func(s Service, p Port) int { return s.Compare(p) })
	if !ok {
		return nil, false
	}
	return &t.Services[i], true
}
