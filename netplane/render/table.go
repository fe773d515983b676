// Package render turns the desired network of a node into service tables: for each
// service address and port, the endpoints that traffic to it goes to.
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
)

// Desired is the whole network of one node as the cluster wants it. The objects
// are shared and never modified.
type Desired struct {
	Node        string
	PodCIDRs    []netip.Prefix // of this node
	ClusterCIDR []netip.Prefix // all pods
	ServiceCIDR []netip.Prefix
	DNS         netip.Addr // the cluster DNS address
	Domain      string     // "cluster.local"
	Services    []*corev1.Service
	Slices      []*discoveryv1.EndpointSlice
	Nodes       []*corev1.Node
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

// Service is one service port and where its traffic goes.
type Service struct {
	Port
	// Endpoints in order, without duplicates, of the address family of Addr. Empty:
	// traffic is refused.
	Endpoints []netip.AddrPort
	// Affinity is how long a client address keeps its endpoint after its last new
	// connection, in whole seconds. Zero: no affinity.
	Affinity time.Duration
}

// Equal reports whether both mean the same.
func (s *Service) Equal(t *Service) bool {
	if s.Port != t.Port || s.Affinity != t.Affinity || len(s.Endpoints) != len(t.Endpoints) {
		return false
	}
	return len(s.Endpoints) == 0 || &s.Endpoints[0] == &t.Endpoints[0] || slices.Equal(s.Endpoints, t.Endpoints)
}

// Table is everything a service backend has to know. All slices are ordered and
// without duplicates, so that equal tables are equal byte for byte.
type Table struct {
	Services []Service
	// Range is where service addresses come from: what is sent there and is not in
	// Services is refused.
	Range []netip.Prefix
	// Local are ports on Range that this node itself serves, such as cluster DNS.
	Local []Port
	// Cluster is all pods. Service traffic from anywhere else is masqueraded, so that
	// replies find their way back.
	Cluster []netip.Prefix
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
	return slices.Equal(t.Range, u.Range) && slices.Equal(t.Local, u.Local) &&
		slices.Equal(t.Cluster, u.Cluster) && slices.Equal(t.Pods, u.Pods)
}

// Find returns the service at a port.
func (t Table) Find(p Port) (*Service, bool) {
	i, ok := slices.BinarySearchFunc(t.Services, p, func(s Service, p Port) int { return s.Compare(p) })
	if !ok {
		return nil, false
	}
	return &t.Services[i], true
}
