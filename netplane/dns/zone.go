package dns

import (
	"cmp"
	"maps"
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

// external reports whether e is an alias.
func (e *service) external() bool { return e.svc.Spec.Type == corev1.ServiceTypeExternalName }

func (e *service) headless() bool { return !e.external() && len(render.ClusterIPs(e.svc)) == 0 }

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

// owns reports whether this zone, and no other server, answers for a name.
func (z *zone) owns(name string) bool {
	if dns.IsSubDomain(z.domain, name) {
		return true
	}
	return z.reverseZone(name).IsValid()
}

// key of a service.
type key struct{ namespace, name string }

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.namespace, o.namespace), cmp.Compare(k.name, o.name))
}

// treeKey joins words to a key, so that those with the first ones alike are together. No
// name in Kubernetes has a zero byte.
func treeKey(words ...string) []byte { return []byte(strings.Join(words, "\x00") + "\x00") }

// newZone indexes d. It keeps d's objects and lists, which must not be modified.
func newZone(d render.Desired) *zone { return (*zone)(nil).next(d) }

// next is the zone of d, made from the one before it. What takes time is what has changed,
// by the identity of objects. It is z itself if nothing has.
func (z *zone) next(d render.Desired) *zone {
	n := &zone{domain: dns.CanonicalName(d.Domain), server: d.DNS, reverse: slices.Concat(d.ServiceCIDR, d.ClusterCIDR)}
	if z == nil || z.domain != n.domain {
		z = &zone{services: iradix.New[*service](), slices: iradix.New[*discoveryv1.EndpointSlice](), pointers: iradix.New[string]()}
	}
	n.lists.services, n.lists.slices = d.Services, d.Slices
	up := update{zone: n, services: z.services.Txn(), slices: z.slices.Txn(), pointers: z.pointers.Txn(), dirty: map[key]*corev1.Service{}}
	up.list(z, d)
	if len(up.dirty) == 0 && n.sameNames(z) && n.server == z.server {
		return z
	}
	for _, k := range slices.SortedFunc(maps.Keys(up.dirty), key.compare) { // neighbours in a tree are quicker
		up.service(k, up.dirty[k])
	}
	n.services, n.slices, n.pointers = up.services.Commit(), up.slices.Commit(), up.pointers.Commit()
	return n
}

// update is the making of a zone.
type update struct {
	zone     *zone
	services *iradix.Txn[*service]
	slices   *iradix.Txn[*discoveryv1.EndpointSlice]
	pointers *iradix.Txn[string]
	// dirty are the services that change, with what they are from now on.
	dirty map[key]*corev1.Service
}

// list finds what is dirty, and brings the slices up to date.
func (up *update) list(z *zone, d render.Desired) {
	gone, come := render.Changes(z.lists.services, d.Services)
	for _, svc := range gone {
		up.dirty[key{svc.Namespace, svc.Name}] = nil
	}
	for _, svc := range come {
		up.dirty[key{svc.Namespace, svc.Name}] = svc
	}
	lost, found := render.Changes(z.lists.slices, d.Slices)
	for _, s := range lost {
		up.slices.Delete(treeKey(s.Namespace, s.Labels[discoveryv1.LabelServiceName], s.Name))
		up.touch(s)
	}
	for _, s := range found {
		up.slices.Insert(treeKey(s.Namespace, s.Labels[discoveryv1.LabelServiceName], s.Name), s)
		up.touch(s)
	}
}

// touch makes the service of a slice dirty.
func (up *update) touch(s *discoveryv1.EndpointSlice) {
	k := key{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
	if _, ok := up.dirty[k]; ok {
		return
	}
	if old, ok := up.services.Get(treeKey(k.namespace, k.name)); ok {
		up.dirty[k] = old.svc
	}
}

// service brings one service up to date; nil: there is none any more.
func (up *update) service(k key, svc *corev1.Service) {
	at := treeKey(k.namespace, k.name)
	if old, ok := up.services.Get(at); ok {
		for p, name := range up.zone.pointersOf(old) {
			up.pointers.Delete([]byte(p + name))
		}
	}
	if svc == nil {
		up.services.Delete(at)
		return
	}
	e := &service{svc: svc}
	up.slices.Root().WalkPrefix(at, func(_ []byte, s *discoveryv1.EndpointSlice) bool {
		e.slices = append(e.slices, s)
		return false
	})
	up.services.Insert(at, e)
	for p, name := range up.zone.pointersOf(e) {
		up.pointers.Insert([]byte(p+name), name)
	}
}

// What gives a name to an address; the lesser one counts.
const (
	ofService  = "\x00"
	ofEndpoint = "\x01"
)

// pointersOf yields the names that a service gives to addresses, each with what comes
// before it in the key.
func (z *zone) pointersOf(e *service) func(yield func(prefix, name string) bool) {
	return func(yield func(prefix, name string) bool) {
		name := z.name(e)
		ips := render.ClusterIPs(e.svc)
		for _, a := range ips {
			if !yield(addrKey(a)+ofService, name) {
				return
			}
		}
		if len(ips) > 0 || !e.headless() {
			return
		}
		for ep := range e.endpoints {
			if !yield(addrKey(ep.addr)+ofEndpoint, ep.host+"."+name) {
				return
			}
		}
	}
}

func addrKey(a netip.Addr) string {
	b := a.As16()
	return string(b[:])
}

// find returns a service, or nil.
func (z *zone) find(namespace, name string) *service {
	e, _ := z.services.Get(treeKey(namespace, name))
	return e
}

// hasNamespace reports whether a namespace has a service.
func (z *zone) hasNamespace(namespace string) bool {
	it := z.services.Root().Iterator()
	it.SeekPrefix(treeKey(namespace))
	_, _, ok := it.Next()
	return ok
}

// names are those of an address: that of the service, or those of an endpoint, of which
// several services may be made.
func (z *zone) names(a netip.Addr) (names []string) {
	prefix := addrKey(a)
	z.pointers.Root().WalkPrefix([]byte(prefix), func(k []byte, name string) bool {
		names = append(names, name)
		return k[len(prefix)] == ofService[0]
	})
	return names
}

// sameNames reports whether z and other answer for the same names, though perhaps
// differently.
func (z *zone) sameNames(other *zone) bool {
	return z.domain == other.domain && slices.Equal(z.reverse, other.reverse)
}
