package route

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/schemas/api"
)

// Build makes the table of o. before is the table that was in force, or nil: what is
// costly to make and has not changed is taken from it.
//
// Where two Ingresses want the same path of the same host, or a certificate for the same
// host, the older one has it; then the one first by namespace and name.
func Build(o Objects, before *Table) *Table {
	b := &builder{
		table:    &Table{names: map[string]*host{}, wildcards: map[string]*host{}},
		services: map[string]*corev1.Service{}, backends: map[BackendKey]int{},
	}
	var served []*networkingv1.Ingress
	for _, ing := range o.Ingresses {
		if ing.DeletionTimestamp == nil && api.ServesIngress(ing, o.Classes) {
			served = append(served, ing)
		}
	}
	if len(served) == 0 {
		return b.table
	}
	slices.SortFunc(served, func(x, y *networkingv1.Ingress) int {
		return cmp.Or(x.CreationTimestamp.Compare(y.CreationTimestamp.Time), cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Name, y.Name))
	})
	b.find(o.Desired, served)
	b.certs = newCerts(o.Secrets, before)
	for _, ing := range served {
		b.add(ing)
	}
	if b.table.fallback == nil {
		b.table.fallback = b.ruled // of an ingress that has rules, too
	}
	b.table.certificates, b.table.Certificates = b.certs.certificates, b.certs.list()
	slices.Sort(b.table.Managed)
	b.table.Managed = slices.Compact(b.table.Managed)
	if len(b.table.Managed) > 0 {
		b.table.Others = others(o.Desired)
	}
	return b.table
}

// others are the other nodes that serve Ingresses.
func others(d render.Desired) (out []netip.Addr) {
	for _, n := range d.Nodes {
		if n.Name == d.Node || n.Labels[api.LabelIngressNode] != "true" {
			continue
		}
		if at := render.PeerOf(n).Addrs; len(at) > 0 {
			out = append(out, at[0])
		}
	}
	return out
}

// find looks for the services that ingresses name, and for their endpoints. It is called
// whenever an endpoint changes: of a cluster's services most are not reached from outside.
func (b *builder) find(d render.Desired, served []*networkingv1.Ingress) {
	type name struct{ namespace, name string }
	wanted := map[name]bool{}
	for _, ing := range served {
		for to := range backends(ing) {
			if to.Service != nil {
				wanted[name{ing.Namespace, to.Service.Name}] = true
			}
		}
	}
	for _, svc := range d.Services {
		if wanted[name{svc.Namespace, svc.Name}] {
			b.services[svc.Namespace+"/"+svc.Name] = svc
		}
	}
	all := d.Slices
	d.Slices = nil
	for _, s := range all {
		if wanted[name{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}] {
			d.Slices = append(d.Slices, s)
		}
	}
	b.client = render.NewClient(d)
}

// backends yields those of an ingress, one as often as it is named.
func backends(ing *networkingv1.Ingress) iter.Seq[*networkingv1.IngressBackend] {
	return func(yield func(*networkingv1.IngressBackend) bool) {
		if b := ing.Spec.DefaultBackend; b != nil && !yield(b) {
			return
		}
		for i := range ing.Spec.Rules {
			if ing.Spec.Rules[i].HTTP == nil {
				continue
			}
			paths := ing.Spec.Rules[i].HTTP.Paths
			for j := range paths {
				if !yield(&paths[j].Backend) {
					return
				}
			}
		}
	}
}

// builder is the making of a table.
type builder struct {
	table    *Table
	client   *render.Client
	services map[string]*corev1.Service
	backends map[BackendKey]int
	certs    *certs
	// ruled is the default backend of the first ingress that has rules as well.
	ruled *Route

	// The ingress that is being added.
	ing     *networkingv1.Ingress
	options api.IngressOptions
	warned  map[string]bool
}

func (b *builder) warn(format string, args ...any) {
	w := Warning{b.ing.Namespace, b.ing.Name, fmt.Sprintf(format, args...)}
	if !b.warned[w.Message] {
		b.warned[w.Message] = true
		b.table.Warnings = append(b.table.Warnings, w)
	}
}

func (b *builder) add(ing *networkingv1.Ingress) {
	b.ing, b.warned = ing, map[string]bool{}
	options, errs := api.ParseIngressOptions(ing.Annotations)
	for _, err := range errs {
		b.warn("%v", err)
	}
	b.options = options
	b.table.Ingresses = append(b.table.Ingresses, Ingress{ing.Namespace, ing.Name, options})
	secure := b.tls()
	var fallback *Route
	if ing.Spec.DefaultBackend != nil {
		fallback = b.route(ing.Spec.DefaultBackend, secure(""))
		switch {
		case len(ing.Spec.Rules) > 0 && b.ruled == nil:
			b.ruled = fallback
		case len(ing.Spec.Rules) == 0 && b.table.fallback != nil:
			b.warn("the default backend is that of an older ingress")
		case len(ing.Spec.Rules) == 0:
			b.table.fallback = fallback
		}
	}
	for i := range ing.Spec.Rules {
		b.rule(&ing.Spec.Rules[i], fallback, secure(ing.Spec.Rules[i].Host))
	}
}

// hostOf is the rules of a host as a rule writes it.
func (b *builder) hostOf(name string) *host {
	in, key := b.table.names, strings.ToLower(name)
	if name == "" {
		if b.table.any == nil {
			b.table.any = newHost()
		}
		return b.table.any
	}
	if parent, ok := strings.CutPrefix(key, "*."); ok {
		in, key = b.table.wildcards, parent
	}
	if in[key] == nil {
		in[key] = newHost()
	}
	return in[key]
}

func newHost() *host { return &host{exact: map[string]*Route{}, prefixes: map[string]*Route{}} }

func (b *builder) rule(r *networkingv1.IngressRule, fallback *Route, secure bool) {
	h := b.hostOf(r.Host)
	if fallback != nil && h.fallback == nil {
		h.fallback = b.in(fallback, secure)
	}
	if r.HTTP == nil {
		return
	}
	for i := range r.HTTP.Paths {
		p := &r.HTTP.Paths[i]
		route := b.route(&p.Backend, secure)
		into := h.prefixes
		if route.Exact = p.PathType != nil && *p.PathType == networkingv1.PathTypeExact; route.Exact {
			route.Path, into = p.Path, h.exact
		} else {
			route.Path = strings.TrimSuffix(p.Path, "/")
		}
		if old := into[route.Path]; old != nil {
			of := b.table.Ingresses[old.Ingress]
			b.warn("path %q of host %q is already that of ingress %s/%s", cmp.Or(p.Path, "/"), cmp.Or(r.Host, "*"), of.Namespace, of.Name)
			continue
		}
		into[route.Path] = route
		if !route.Exact {
			h.longest = max(h.longest, len(route.Path))
		}
	}
}

// in is a default backend as the route of one host.
func (b *builder) in(r *Route, secure bool) *Route {
	out := *r
	out.Redirect = secure && b.options.Redirect
	return &out
}

// route leads to a backend of the ingress.
func (b *builder) route(to *networkingv1.IngressBackend, secure bool) *Route {
	return &Route{Ingress: len(b.table.Ingresses) - 1, Backend: b.backend(to), Redirect: secure && b.options.Redirect}
}

// backend is the index of a backend, negative if there is no such one.
func (b *builder) backend(to *networkingv1.IngressBackend) int {
	if to.Service == nil {
		b.warn("a backend has to be a service")
		return -1
	}
	svc := b.services[b.ing.Namespace+"/"+to.Service.Name]
	if svc == nil {
		b.warn("there is no service %q", to.Service.Name)
		return -1
	}
	want := &to.Service.Port
	text := cmp.Or(want.Name, strconv.Itoa(int(want.Number)))
	alias := svc.Spec.Type == corev1.ServiceTypeExternalName
	i := slices.IndexFunc(svc.Spec.Ports, func(p corev1.ServicePort) bool {
		return (p.Protocol == corev1.ProtocolTCP || p.Protocol == "") && (want.Name != "" && p.Name == want.Name || want.Name == "" && p.Port == want.Number)
	})
	if i < 0 && (!alias || want.Number == 0) { // an alias has any port
		b.warn("service %q has no TCP port %s", svc.Name, text)
		return -1
	}
	key := BackendKey{svc.Namespace, svc.Name, text, b.options.Protocol, b.options.Timeout, b.options.ConnectTimeout}
	if n, ok := b.backends[key]; ok {
		return n
	}
	out := Backend{BackendKey: key, Alias: alias}
	if alias {
		number := want.Number
		if i >= 0 {
			number = svc.Spec.Ports[i].Port
		}
		out.Endpoints = []string{svc.Spec.ExternalName + ":" + strconv.Itoa(int(number))}
	} else {
		for _, a := range b.client.Endpoints(svc, &svc.Spec.Ports[i]) {
			out.Endpoints = append(out.Endpoints, a.String())
		}
	}
	n := len(b.table.Backends)
	b.backends[key] = n
	b.table.Backends = append(b.table.Backends, out)
	return n
}
