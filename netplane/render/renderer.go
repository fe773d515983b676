package render

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Renderer renders one table after the other, and looks again only at services for which,
// or for a slice of which, there is another object: objects are never modified. The zero
// value is ready; calls must take turns.
type Renderer struct {
	last     renderer
	services []*corev1.Service // in order
	parts    []*part           // of services
	groups   groups
	order    []int32 // of the claims of the last table
}

// part is what one service comes to.
type part struct {
	svc    *corev1.Service
	group  *group
	at     int // the version of group
	claims []claim
	near   []netip.Addr // of endpoints on this node
}

// claim is an entry that a service would have.
type claim struct {
	kind int
	Service
}

// Render returns the table that d asks for. Objects that cannot be used (an
// address that does not parse, a port out of range) are left out: validation is
// done where objects enter the cluster. When two services claim one port, a cluster
// address wins over a node port, that over a pod's host port, that over a load balancer's
// address, and that over an external IP; then the one first by namespace and name has it.
func (re *Renderer) Render(d Desired) Table {
	if len(re.groups.members) > 1000+2*len(d.Services) { // most are of services that are gone
		*re = Renderer{}
	}
	r := newRenderer(d)
	old := re.parts
	if !r.renders(&re.last) {
		old = nil
	}
	re.groups.set(d.Slices)
	services := byName(d.Services, re.services)
	parts := make([]*part, 0, len(services))
	claims := make([]*claim, 0, len(re.order))
	near := map[netip.Addr]bool{}
	take := func(p *part) {
		for i := range p.claims {
			claims = append(claims, &p.claims[i])
		}
		for _, a := range p.near {
			near[a] = true
		}
	}
	for _, svc := range services {
		for len(old) > 0 && old[0].svc != svc && compareNames(old[0].svc, svc) < 0 {
			old = old[1:]
		}
		var p *part
		if len(old) > 0 && old[0].svc == svc && old[0].group.version == old[0].at {
			p = old[0]
		} else {
			g := re.groups.of(name{svc.Namespace, svc.Name})
			p = &part{svc: svc, group: g, at: g.version}
			r.part = p
			r.add(svc, g.slices)
		}
		parts = append(parts, p)
		take(p)
	}
	r.part = &part{}
	r.hostPorts(d.Pods)
	take(r.part)
	re.last, re.parts, re.services = *r, parts, slices.Clone(services) // the caller's to use again
	r.table.Services = re.settle(claims)
	r.table.Near = slices.SortedFunc(maps.Keys(near), netip.Addr.Compare)
	return r.table
}

// renders reports whether r makes the same of a service as q does.
func (r *renderer) renders(q *renderer) bool {
	return r.node == q.node && r.zone == q.zone && slices.Equal(r.own, q.own) && slices.Equal(r.table.Range, q.table.Range) && slices.Equal(r.table.Cluster, q.table.Cluster)
}

func compareNames[T metav1.Object](a, b T) int {
	return cmp.Or(strings.Compare(a.GetNamespace(), b.GetNamespace()), strings.Compare(a.GetName(), b.GetName()))
}

// byName orders objects by namespace and name. last is ordered, and so is, mostly, all:
// where both have the same object at the same place there is nothing to compare.
func byName[T interface {
	comparable
	metav1.Object
}](all, last []T) []T {
	for i := 1; i < len(all); i++ {
		known := i < len(last) && all[i] == last[i] && all[i-1] == last[i-1]
		if !known && compareNames(all[i-1], all[i]) > 0 {
			all = slices.Clone(all)
			slices.SortStableFunc(all, compareNames)
			break
		}
	}
	return all
}

// settle orders claims, which are in the order of their services, by port, and keeps the
// strongest of each port. It begins with the order of the last time, which mostly is the
// order of this one.
func (re *Renderer) settle(claims []*claim) []Service {
	if len(re.order) != len(claims) {
		re.order = make([]int32, len(claims))
		for i := range re.order {
			re.order[i] = int32(i)
		}
	}
	slices.SortFunc(re.order, func(i, j int32) int {
		a, b := claims[i], claims[j]
		if c := a.Compare(b.Port); c != 0 {
			return c
		}
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(i, j))
	})
	out := make([]Service, 0, len(claims))
	for _, i := range re.order {
		if n := len(out); n == 0 || out[n-1].Port != claims[i].Port {
			out = append(out, claims[i].Service)
		}
	}
	return out
}

// groups are slices by their service.
type groups struct {
	all     []*discoveryv1.EndpointSlice
	members map[name]*group
}

// group are the slices of one service; version counts its changes.
type group struct {
	slices  []*discoveryv1.EndpointSlice
	version int
}

// of returns the group of a service, an empty one if it has no slices.
func (gs *groups) of(n name) *group {
	g := gs.members[n]
	if g == nil {
		g = &group{}
		gs.members[n] = g
	}
	return g
}

// serviceOf names the service that a slice belongs to.
func serviceOf(s *discoveryv1.EndpointSlice) (name, bool) {
	svc := s.Labels[discoveryv1.LabelServiceName]
	return name{s.Namespace, svc}, svc != ""
}

// set makes the groups those of all, and leaves as it is what has not changed.
func (gs *groups) set(all []*discoveryv1.EndpointSlice) {
	if gs.members == nil {
		gs.members = make(map[name]*group, len(all))
	}
	add := func(s *discoveryv1.EndpointSlice) {
		if n, ok := serviceOf(s); ok {
			g := gs.of(n)
			g.slices = append(slices.Clip(g.slices), s)
			g.version++
		}
	}
	remove := func(s *discoveryv1.EndpointSlice) {
		if n, ok := serviceOf(s); ok {
			g := gs.of(n)
			g.slices = slices.DeleteFunc(slices.Clone(g.slices), func(x *discoveryv1.EndpointSlice) bool { return x == s })
			g.version++
		}
	}
	all = byName(all, gs.all)
	had, have := gs.all, all
	for len(had) > 0 || len(have) > 0 {
		switch {
		case len(had) > 0 && len(have) > 0 && had[0] == have[0]:
			had, have = had[1:], have[1:]
		case len(have) == 0 || len(had) > 0 && compareNames(had[0], have[0]) <= 0:
			remove(had[0])
			had = had[1:]
		default:
			add(have[0])
			have = have[1:]
		}
	}
	gs.all = slices.Clone(all) // the caller's to use again
}
