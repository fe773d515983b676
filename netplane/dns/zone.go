package dns

import (
	"net/netip"
	"slices"
	"strings"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"decree.dev/decree/netplane/render"
)

// zone is what the cluster's names mean at one moment. It is immutable, and shares what
// has not changed with the one before: a cluster of 30,000 services changes many times
// a second.
//
// The names are those of the Kubernetes DNS specification 1.1.0.
type zone struct {
	domain  string // "cluster.local." in lower case
	server  netip.Addr
	reverse []netip.Prefix // that this zone answers for
	// services are by namespace and name, slices by namespace, service and name.
	services *iradix.Tree[*service]
	slices   *iradix.Tree[*discoveryv1.EndpointSlice]
	// pointers are the names of addresses, by address, kind and name.
	pointers *iradix.Tree[string]
	// lists are what all of that was made of.
	lists struct {
		services []*corev1.Service
		slices   []*discoveryv1.EndpointSlice
	}
}

// service is one service.
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

// name is the service's full name.
func (z *zone) name(e *service) string {
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
			if ready := ep.Conditions.Ready; ready != nil && !*ready && !e.tolerant() {
				continue
			}
			for _, text := range ep.Addresses {
				a, err := netip.ParseAddr(text)
				if err != nil {
					continue
				}
				a = a.Unmap()
				host := dashed(a)
				if ep.Hostname != nil && *ep.Hostname != "" {
					host = strings.ToLower(*ep.Hostname)
				}
				if !yield(endpoint{host, a, s}) {
					return
				}
			}
		}
	}
}

// tolerant reports whether endpoints that are not ready have names as well. The
// annotation is what the specification speaks of, the field what has replaced it.
func (e *service) tolerant() bool {
	return e.svc.Spec.PublishNotReadyAddresses || e.svc.Annotations["service.alpha.kubernetes.io/tolerate-unready-endpoints"] == "true"
}

// empty reports whether e is headless without an endpoint to answer with: it then has
// no name either.
func (e *service) empty() bool {
	if !e.headless() {
		return false
	}
	for range e.endpoints {
		return false
	}
	return true
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
func (z *zone) owns(name string) bool {
	if dns.IsSubDomain(z.domain, name) {
		return true
	}
	a, ok := reverseAddr(name)
	if !ok {
		return false
	}
	return slices.ContainsFunc(z.reverse, func(p netip.Prefix) bool { return p.Contains(a) })
}

// origin is the zone, as resolvers see it, that a name is in: the domain, or the
// smallest reverse zone around the range of an address.
func (z *zone) origin(name string) string {
	a, ok := reverseAddr(name)
	if !ok {
		return z.domain
	}
	i := slices.IndexFunc(z.reverse, func(p netip.Prefix) bool { return p.Contains(a) })
	if i < 0 {
		return z.domain
	}
	labels, bits := 4, 8
	if a.Is6() {
		labels, bits = 32, 4
	}
	for range labels - z.reverse[i].Bits()/bits {
		_, name, _ = strings.Cut(name, ".")
	}
	return name
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
