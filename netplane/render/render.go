package render

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// defaultAffinity is what Kubernetes uses when ClientIP affinity names no timeout.
const defaultAffinity = 3 * time.Hour

// DNSPort is where cluster DNS listens, over UDP and TCP.
const DNSPort = 53

// name identifies a service.
type name struct{ namespace, name string }

// Render returns the table that d asks for. Objects that cannot be used (an
// address that does not parse, a port out of range) are left out: validation is
// done where objects enter the cluster. When two services claim one port, the one
// first by namespace and name has it.
func Render(d Desired) Table {
	t := Table{
		Range:   prefixes(d.ServiceCIDR),
		Cluster: prefixes(d.ClusterCIDR),
		Pods:    prefixes(d.PodCIDRs),
		Lost:    lost(d),
	}
	if d.DNS.IsValid() {
		t.Local = []Port{{d.DNS.Unmap(), TCP, DNSPort}, {d.DNS.Unmap(), UDP, DNSPort}}
	}
	bySvc := slicesByService(d.Slices)
	services := slices.Clone(d.Services)
	slices.SortStableFunc(services, func(a, b *corev1.Service) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	for _, svc := range services {
		t.Services = appendService(t.Services, svc, bySvc[name{svc.Namespace, svc.Name}], d.Node)
	}
	slices.SortStableFunc(t.Services, func(a, b Service) int { return a.Compare(b.Port) })
	t.Services = slices.CompactFunc(t.Services, func(a, b Service) bool { return a.Port == b.Port })
	return t
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

func slicesByService(all []*discoveryv1.EndpointSlice) map[name][]*discoveryv1.EndpointSlice {
	out := make(map[name][]*discoveryv1.EndpointSlice, len(all))
	for _, s := range all {
		if svc := s.Labels[discoveryv1.LabelServiceName]; svc != "" {
			k := name{s.Namespace, svc}
			out[k] = append(out[k], s)
		}
	}
	return out
}

// appendService adds one entry per cluster address and port of svc.
func appendService(out []Service, svc *corev1.Service, eps []*discoveryv1.EndpointSlice, node string) []Service {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return out
	}
	local := ""
	if p := svc.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		local = node
	}
	for _, addr := range ClusterIPs(svc) {
		for i := range svc.Spec.Ports {
			p := &svc.Spec.Ports[i]
			proto, ok := protocol(p.Protocol)
			if !ok || p.Port < 1 || p.Port > 65535 {
				continue
			}
			out = append(out, Service{
				Port:      Port{Addr: addr, Proto: proto, Port: uint16(p.Port)},
				Endpoints: endpoints(eps, addr.Is4(), p.Name, proto, local),
				Affinity:  affinity(svc),
			})
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

func protocol(p corev1.Protocol) (Proto, bool) {
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

// endpoints returns the ready endpoints of one service port, or, when none is
// ready, those that still serve while they terminate (KEP-1669). node, when set,
// keeps the endpoints of that node only.
func endpoints(eps []*discoveryv1.EndpointSlice, v4 bool, port string, proto Proto, node string) []netip.AddrPort {
	var ready, serving []netip.AddrPort
	for _, s := range eps {
		if (s.AddressType == discoveryv1.AddressTypeIPv4) != v4 || s.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		number, ok := slicePort(s, port, proto)
		if !ok {
			continue
		}
		for i := range s.Endpoints {
			ep := &s.Endpoints[i]
			if node != "" && (ep.NodeName == nil || *ep.NodeName != node) {
				continue
			}
			switch c := ep.Conditions; {
			case c.Ready == nil || *c.Ready:
				ready = appendAddrs(ready, ep.Addresses, v4, number)
			case c.Serving != nil && *c.Serving && c.Terminating != nil && *c.Terminating:
				serving = appendAddrs(serving, ep.Addresses, v4, number)
			}
		}
	}
	if len(ready) == 0 {
		ready = serving
	}
	slices.SortFunc(ready, netip.AddrPort.Compare)
	return slices.Compact(ready)
}

// appendAddrs adds the first address of an endpoint: the others are defined to be
// the same endpoint (discovery/v1).
func appendAddrs(out []netip.AddrPort, addrs []string, v4 bool, port uint16) []netip.AddrPort {
	if len(addrs) == 0 {
		return out
	}
	a, err := netip.ParseAddr(addrs[0])
	if err != nil || a.Zone() != "" {
		return out
	}
	if a = a.Unmap(); a.Is4() != v4 {
		return out
	}
	return append(out, netip.AddrPortFrom(a, port))
}

func slicePort(s *discoveryv1.EndpointSlice, port string, proto Proto) (uint16, bool) {
	for i := range s.Ports {
		p := &s.Ports[i]
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 {
			continue
		}
		var pn string
		if p.Name != nil {
			pn = *p.Name
		}
		pp := TCP
		if p.Protocol != nil {
			pp, _ = protocol(*p.Protocol)
		}
		if pn == port && pp == proto {
			return uint16(*p.Port), true
		}
	}
	return 0, false
}

// Targets returns the pods that d means to send new connections to: those behind
// ready endpoints that are not about to end.
func Targets(d Desired) map[types.UID]bool {
	out := map[types.UID]bool{}
	for _, s := range d.Slices {
		for i := range s.Endpoints {
			ep, c := &s.Endpoints[i], &s.Endpoints[i].Conditions
			ready, ending := c.Ready == nil || *c.Ready, c.Terminating != nil && *c.Terminating
			if ep.TargetRef != nil && ready && !ending {
				out[ep.TargetRef.UID] = true
			}
		}
	}
	return out
}
