package dns

import (
	"net/netip"
	"strings"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"decree.dev/decree/netplane/render"
)

// Zone is what the cluster's names mean at one moment. It is immutable.
//
// The names are those of the Kubernetes DNS specification 1.1.0.
type Zone struct {
	domain   string // "cluster.local." in lower case
	server   netip.Addr
	reverse  []netip.Prefix // that this zone answers for
	services map[string]*service
	// namespaces has every namespace with a service.
	namespaces map[string]bool
	ptr        map[netip.Addr]string
}

// service is one service under "name.namespace".
type service struct {
	svc    *corev1.Service
	slices []*discoveryv1.EndpointSlice
}

// endpoint is one ready endpoint of a headless service.
type endpoint struct {
	host  string
	addr  netip.Addr
	slice *discoveryv1.EndpointSlice
}

// NewZone indexes d. It keeps pointers into d's objects, which are never modified.
func NewZone(d render.Desired) *Zone {
	z := &Zone{
		domain: dns.CanonicalName(d.Domain), server: d.DNS,
		services:   make(map[string]*service, len(d.Services)),
		namespaces: map[string]bool{}, ptr: map[netip.Addr]string{},
	}
	z.reverse = append(append(z.reverse, d.ServiceCIDR...), d.ClusterCIDR...)
	for _, svc := range d.Services {
		z.services[svc.Name+"."+svc.Namespace] = &service{svc: svc}
		z.namespaces[svc.Namespace] = true
	}
	for _, s := range d.Slices {
		if e := z.services[s.Labels[discoveryv1.LabelServiceName]+"."+s.Namespace]; e != nil {
			e.slices = append(e.slices, s)
		}
	}
	for _, e := range z.services {
		name := z.name(e)
		for _, a := range render.ClusterIPs(e.svc) {
			z.ptr[a] = name
		}
		if e.headless() {
			for ep := range e.endpoints {
				if old := z.ptr[ep.addr]; old == "" || name < old {
					z.ptr[ep.addr] = ep.host + "." + name
				}
			}
		}
	}
	return z
}

// name is the service's full name.
func (z *Zone) name(e *service) string {
	return e.svc.Name + "." + e.svc.Namespace + ".svc." + z.domain
}

func (e *service) headless() bool {
	return e.svc.Spec.Type != corev1.ServiceTypeExternalName && len(render.ClusterIPs(e.svc)) == 0
}

// endpoints yields the ready endpoints; with publishNotReadyAddresses all of them.
func (e *service) endpoints(yield func(endpoint) bool) {
	for _, s := range e.slices {
		if s.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for i := range s.Endpoints {
			ep := &s.Endpoints[i]
			if ready := ep.Conditions.Ready; ready != nil && !*ready && !e.svc.Spec.PublishNotReadyAddresses {
				continue
			}
			for _, text := range ep.Addresses {
				a, err := netip.ParseAddr(text)
				if err != nil {
					continue
				}
				host := dashed(a)
				if ep.Hostname != nil && *ep.Hostname != "" {
					host = strings.ToLower(*ep.Hostname)
				}
				if !yield(endpoint{host, a.Unmap(), s}) {
					return
				}
			}
		}
	}
}

// dashed is an address as a label.
func dashed(a netip.Addr) string {
	if a.Is4() {
		return strings.ReplaceAll(a.String(), ".", "-")
	}
	return strings.ReplaceAll(a.StringExpanded(), ":", "-")
}

// undashed reads a label as an address.
func undashed(label string) (netip.Addr, bool) {
	if strings.Count(label, "-") == 3 {
		if a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ".")); err == nil {
			return a, true
		}
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
	return a, err == nil && a.Zone() == ""
}

// owns reports whether this zone, and no other server, answers for a name.
func (z *Zone) owns(name string) bool {
	if dns.IsSubDomain(z.domain, name) {
		return true
	}
	a, ok := reverseAddr(name)
	if !ok {
		return false
	}
	for _, p := range z.reverse {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// reverseAddr reads a name below in-addr.arpa or ip6.arpa as a whole address.
func reverseAddr(name string) (netip.Addr, bool) {
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		l := strings.Split(rest, ".")
		if len(l) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(l[3] + "." + l[2] + "." + l[1] + "." + l[0])
		return a, err == nil
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok || len(rest) != 63 {
		return netip.Addr{}, false
	}
	var b strings.Builder
	for i := 31; i >= 0; i-- {
		if i < 31 && rest[2*i+1] != '.' {
			return netip.Addr{}, false
		}
		b.WriteByte(rest[2*i])
		if i%4 == 0 && i > 0 {
			b.WriteByte(':')
		}
	}
	a, err := netip.ParseAddr(b.String())
	return a, err == nil
}
