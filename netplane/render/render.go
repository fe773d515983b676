package render

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/schemas/api"
)

// defaultAffinity is what Kubernetes uses when ClientIP affinity names no timeout.
const defaultAffinity = 3 * time.Hour

// DNSPort is where cluster DNS listens, over UDP and TCP.
const DNSPort = 53

// name identifies a service.
type name struct{ namespace, name string }

// The claims to a port, the strongest first. Who may write services must not be able to
// take the traffic of another service by naming its address as an external one.
const (
	clusterClaim = iota
	nodeClaim
	podClaim
	balancerClaim
	externalClaim
)

// renderer is what the services of one table share, and the part that is being made.
type renderer struct {
	node, zone string
	own        []netip.Addr // addresses of this node, for node ports
	table      Table        // without services
	part       *part
	found      []candidate // scratch
}

// Render returns the table that d asks for, see [Renderer.Render].
func Render(d Desired) Table { return new(Renderer).Render(d) }

func newRenderer(d Desired) *renderer {
	r := &renderer{node: d.Node, table: Table{
		Range:     prefixes(d.ServiceCIDR),
		Announced: prefixes(d.Announced),
		Cluster:   prefixes(d.ClusterCIDR),
		Pods:      prefixes(d.PodCIDRs),
		Lost:      lost(d),
	}}
	if d.DNS.IsValid() {
		r.table.Local = []Port{{d.DNS.Unmap(), TCP, DNSPort}, {d.DNS.Unmap(), UDP, DNSPort}}
	}
	if i := slices.IndexFunc(d.Nodes, func(n *corev1.Node) bool { return n.Name == d.Node }); i >= 0 {
		r.zone = d.Nodes[i].Labels[corev1.LabelTopologyZone]
		r.own = addresses(d.Nodes[i], corev1.NodeInternalIP, corev1.NodeExternalIP)
	}
	return r
}

// prefixes returns ps masked, ordered, and without those inside another.
func prefixes(ps []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(ps))
	for _, p := range ps {
		if p.IsValid() {
			out = append(out, p.Masked())
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits() // the wider first
	})
	kept := out[:0]
	for _, p := range out {
		if n := len(kept); n == 0 || !kept[n-1].Overlaps(p) {
			kept = append(kept, p)
		}
	}
	return kept
}

// add claims a port of every address of svc, in the families that it has cluster
// addresses of. A headless service has nothing for a kernel to do.
func (r *renderer) add(svc *corev1.Service, eps []*discoveryv1.EndpointSlice) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	ips := ClusterIPs(svc)
	for _, v4 := range []bool{true, false} {
		if !slices.ContainsFunc(ips, func(a netip.Addr) bool { return a.Is4() == v4 }) {
			continue
		}
		for i := range svc.Spec.Ports {
			p := &svc.Spec.Ports[i]
			if proto, ok := ProtoOf(p.Protocol); ok && p.Port >= 1 && p.Port <= 65535 {
				r.addPort(svc, p, Port{Proto: proto, Port: uint16(p.Port)}, ips, r.reachable(svc, eps, v4, p.Name, proto))
			}
		}
	}
}

// addPort claims one port of svc in the family of r.found; at is without an address.
func (r *renderer) addPort(svc *corev1.Service, p *corev1.ServicePort, at Port, ips []netip.Addr, eps reachable) {
	local := svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	cluster := eps.internal(local, affinity(svc))
	cluster.Scheduler = scheduler(svc, &cluster)
	r.claim(clusterClaim, cluster, at, ips, eps.v4)
	external := eps.external(svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal, affinity(svc))
	external.Scheduler = scheduler(svc, &external)
	balanced := svc.Spec.Type == corev1.ServiceTypeLoadBalancer
	if balanced {
		r.claim(balancerClaim, guarded(external, svc.Spec.LoadBalancerSourceRanges, eps.v4), at, r.outer(ingress(svc)), eps.v4)
	}
	r.claim(externalClaim, external, at, r.outer(svc.Spec.ExternalIPs), eps.v4)
	if (balanced || svc.Spec.Type == corev1.ServiceTypeNodePort) && p.NodePort >= 1 && p.NodePort <= 65535 {
		at.Port = uint16(p.NodePort)
		r.claim(nodeClaim, external, at, r.own, eps.v4)
	}
}

// claim makes s an entry for those of addrs that are of the family.
func (r *renderer) claim(kind int, s Service, at Port, addrs []netip.Addr, v4 bool) {
	claimed := false
	for _, a := range addrs {
		if a.Is4() == v4 {
			s.Port = Port{Addr: a, Proto: at.Proto, Port: at.Port}
			r.part.claims, claimed = append(r.part.claims, claim{kind, s}), true
		}
	}
	if claimed {
		r.note(s.Endpoints)
		r.note(s.Outside)
	}
}

// guarded is s for the clients in sources, of all that it may name. Sources of the other
// family only, or that make no sense, leave nobody to serve.
func guarded(s Service, sources []string, v4 bool) Service {
	if len(sources) == 0 || len(s.Endpoints) == 0 {
		return s
	}
	var ps []netip.Prefix
	for _, text := range sources {
		if p, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil && p.Addr().Is4() == v4 {
			ps = append(ps, p)
		}
	}
	switch ps = prefixes(ps); {
	case len(ps) == 0:
		return Service{Drop: true}
	case ps[0].Bits() > 0: // or else it is everybody
		s.Sources = ps
	}
	return s
}

// ingress are the addresses at which a load balancer hands on packets as they came; one
// that is a proxy is reached like any other host.
func ingress(svc *corev1.Service) []string {
	var out []string
	for i := range svc.Status.LoadBalancer.Ingress {
		in := &svc.Status.LoadBalancer.Ingress[i]
		if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
			out = append(out, in.IP)
		}
	}
	return out
}

// outer parses addresses from outside the cluster. The cluster's own are not for services
// to claim, nor are those that mean another host on every link.
func (r *renderer) outer(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, text := range texts {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			continue
		}
		a = a.Unmap()
		within := func(p netip.Prefix) bool { return p.Contains(a) }
		if !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast() && !slices.Contains(out, a) &&
			!slices.ContainsFunc(r.table.Range, within) && !slices.ContainsFunc(r.table.Cluster, within) {
			out = append(out, a)
		}
	}
	return out
}

// ClusterIPs returns the cluster addresses of svc; none for a headless service.
func ClusterIPs(svc *corev1.Service) []netip.Addr {
	texts := svc.Spec.ClusterIPs
	if len(texts) == 0 {
		texts = []string{svc.Spec.ClusterIP}
	}
	var out []netip.Addr
	for _, s := range texts {
		if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !slices.Contains(out, a.Unmap()) {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// ProtoOf returns the number of a protocol that ports may have; TCP when p is empty.
func ProtoOf(p corev1.Protocol) (Proto, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
	}
	return 0, false
}

func affinity(svc *corev1.Service) time.Duration {
	if svc.Spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return 0
	}
	if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil && *c.ClientIP.TimeoutSeconds > 0 {
		return time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
	}
	return defaultAffinity
}

// scheduler is the one that svc asks for, if there is anything to choose from.
func scheduler(svc *corev1.Service, s *Service) string {
	name := svc.Annotations[api.AnnotationScheduler]
	if len(s.Endpoints) == 0 || !slices.Contains(api.Schedulers, name) {
		return ""
	}
	return name
}

// Targets returns the pods of d's node that new connections are meant to be sent to:
// those behind ready endpoints that are not about to end.
func Targets(d Desired) map[types.UID]bool {
	out := map[types.UID]bool{}
	for _, s := range d.Slices {
		for i := range s.Endpoints {
			ep, c := &s.Endpoints[i], &s.Endpoints[i].Conditions
			ready, ending := c.Ready == nil || *c.Ready, c.Terminating != nil && *c.Terminating
			if here := ep.NodeName == nil || *ep.NodeName == d.Node; here && ep.TargetRef != nil && ready && !ending {
				out[ep.TargetRef.UID] = true
			}
		}
	}
	return out
}
