package workload

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/schemas/api"
)

const (
	// AddressAssigned is the condition of a Service of type LoadBalancer that says
	// whether it has the addresses it wants.
	AddressAssigned = "AddressAssigned"
	// maxBalanced is how many Services one pass changes; what is left waits for the
	// next one, which these changes bring about.
	maxBalanced = 1000
)

// Balancers returns what gives Services of type LoadBalancer their addresses, one of each
// of their families, from the AddressPools that are for them. An address stays with its
// Service for as long as a pool has it; then, and with the Service, it is free again. Of
// two that want one address, the first by namespace and name has it.
//
// It plans all of them together, so that none is given twice; and whatever is given
// changes the status of the pool that it is from, at the revision that was read, so that
// of two plans from one view only one comes into force.
func Balancers(now time.Time, r api.Reader) []api.Mutation {
	b := &balance{now: now, reader: r, taken: map[netip.Addr]bool{}}
	for p := range api.List[*api.AddressPool](r, "") {
		b.pools = append(b.pools, newPool(p))
	}
	for svc := range api.List[*corev1.Service](r, "") {
		switch {
		case svc.Spec.LoadBalancerClass != nil: // somebody else's
		case svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.DeletionTimestamp == nil:
			b.keep(svc)
		default:
			b.clear(svc)
		}
	}
	for _, asking := range []bool{true, false} { // or else others get what somebody asks for
		for _, w := range b.waiting {
			if asked(w.svc).IsValid() == asking {
				b.serve(w)
			}
		}
	}
	return append(b.ms, b.count()...)
}

// balance is one pass.
type balance struct {
	now     time.Time
	reader  api.Reader
	pools   []*pool
	taken   map[netip.Addr]bool
	waiting []*balanced
	changed int // services
	ms      []api.Mutation
}

// pool is an AddressPool that is read, and where the search for a free address goes on.
type pool struct {
	*api.AddressPool
	ranges []api.AddressRange
	next   []netip.Addr // by range; invalid at its end
	given  int64
}

func newPool(p *api.AddressPool) *pool {
	out := &pool{AddressPool: p}
	for _, text := range p.Spec.Addresses {
		if r, err := api.ParseAddressRange(text); err == nil { // the compiler refuses others
			out.ranges, out.next = append(out.ranges, r), append(out.next, r.First)
		}
	}
	return out
}

func (p *pool) contains(a netip.Addr) bool {
	return slices.ContainsFunc(p.ranges, func(r api.AddressRange) bool { return r.Contains(a) })
}

// fits reports whether the pool is for svc.
func (p *pool) fits(r api.Reader, svc *corev1.Service) bool {
	if !matches(p.Spec.ServiceSelector, svc.Labels) {
		return false
	}
	if p.Spec.NamespaceSelector == nil {
		return true
	}
	ns, ok := api.Get[*corev1.Namespace](r, "", svc.Namespace)
	return ok && matches(p.Spec.NamespaceSelector, ns.Labels)
}

// matches is the meaning of selectors in pools: nil and empty select everything.
func matches(s *metav1.LabelSelector, l map[string]string) bool {
	if s == nil {
		return true
	}
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(labels.Set(l))
}

// balanced is one Service: what it has, by its families.
type balanced struct {
	svc      *corev1.Service
	families []corev1.IPFamily
	has      []netip.Addr // invalid where it lacks one
	lacks    string       // why, for people
	reason   string       // and for machines
}

func is(a netip.Addr, family corev1.IPFamily) bool {
	return a.Is4() == (family == corev1.IPv4Protocol)
}

// asked is the address that svc asks for, invalid for none.
func asked(svc *corev1.Service) netip.Addr {
	a, _ := netip.ParseAddr(svc.Spec.LoadBalancerIP)
	return a
}

// keep takes note of the addresses that svc has and may keep.
func (b *balance) keep(svc *corev1.Service) {
	w := &balanced{svc: svc, families: svc.Spec.IPFamilies}
	if len(w.families) == 0 {
		return // the state machine has not settled it
	}
	w.has = make([]netip.Addr, len(w.families))
	for i := range svc.Status.LoadBalancer.Ingress {
		a, err := netip.ParseAddr(svc.Status.LoadBalancer.Ingress[i].IP)
		if err != nil || b.taken[a] || !b.mayHave(svc, a) {
			continue
		}
		if f := slices.IndexFunc(w.families, func(f corev1.IPFamily) bool { return is(a, f) }); f >= 0 && !w.has[f].IsValid() {
			w.has[f], b.taken[a] = a, true
		}
	}
	b.waiting = append(b.waiting, w)
}

// mayHave reports whether a is an address that a pool has for svc, and the one that it
// names, if it names one of this family.
func (b *balance) mayHave(svc *corev1.Service, a netip.Addr) bool {
	want := asked(svc)
	if want.IsValid() && want.Is4() == a.Is4() && want != a {
		return false
	}
	return slices.ContainsFunc(b.pools, func(p *pool) bool {
		return (want == a || deref(p.Spec.AutoAssign, true)) && p.contains(a) && p.fits(b.reader, svc)
	})
}

// serve gives w what it lacks, if there is any, and writes down what it has.
func (b *balance) serve(w *balanced) {
	if b.changed >= maxBalanced {
		return
	}
	for i, f := range w.families {
		if w.has[i].IsValid() {
			continue
		}
		if want := asked(w.svc); want.IsValid() && is(want, f) {
			w.has[i] = b.claim(w, want)
		} else {
			w.has[i] = b.free(w, f)
		}
	}
	status := w.svc.Status.DeepCopy()
	status.LoadBalancer.Ingress = nil
	for _, a := range w.has {
		if a.IsValid() {
			status.LoadBalancer.Ingress = append(status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a.String(), IPMode: new(corev1.LoadBalancerIPModeVIP)})
		}
	}
	c := metav1.Condition{Type: AddressAssigned, Status: metav1.ConditionTrue, Reason: "Assigned", ObservedGeneration: w.svc.Generation}
	if w.lacks != "" {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, w.reason, w.lacks
	}
	if b.write(w.svc, status, c) && w.lacks != "" {
		b.ms = note(b.ms, b.now, b.reader, api.Note{About: w.svc, Type: corev1.EventTypeWarning, Reason: w.reason, Message: w.lacks, Component: "addresspool-controller"})
	}
}

// claim is the address that a service names, if it can have it.
func (b *balance) claim(w *balanced, want netip.Addr) netip.Addr {
	switch {
	case !b.mayHave(w.svc, want):
		w.lack("AddressNotInPool", "no AddressPool has the address %s for this service", want)
	case b.taken[want]:
		w.lack("AddressInUse", "another service has the address %s", want)
	default:
		b.give(want)
		return want
	}
	return netip.Addr{}
}

// free is an address that nobody has, from the first pool by name that has one.
func (b *balance) free(w *balanced, family corev1.IPFamily) netip.Addr {
	var full []string
	for _, p := range b.pools {
		if !deref(p.Spec.AutoAssign, true) || !p.fits(b.reader, w.svc) {
			continue
		}
		for i, r := range p.ranges {
			if !is(r.First, family) {
				continue
			}
			for a := p.next[i]; a.IsValid() && r.Contains(a); a = a.Next() {
				p.next[i] = a.Next()
				if !b.taken[a] {
					b.give(a)
					return a
				}
			}
			if named := fmt.Sprintf("addresspools %q", p.Name); !slices.Contains(full, named) {
				full = append(full, named)
			}
		}
	}
	if len(full) > 0 {
		w.lack("AddressPoolExhausted", "no %s address is left in %s", family, strings.Join(full, ", "))
	} else {
		w.lack("NoAddressPool", "no AddressPool has %s addresses for this service", family)
	}
	return netip.Addr{}
}

func (w *balanced) lack(reason, format string, args ...any) {
	w.lacks, w.reason = cmp.Or(w.lacks, fmt.Sprintf(format, args...)), cmp.Or(w.reason, reason)
}

func (b *balance) give(a netip.Addr) {
	b.taken[a] = true
	for _, p := range b.pools {
		if p.contains(a) {
			p.given++
		}
	}
}

// clear takes the addresses of a service that is no longer balanced.
func (b *balance) clear(svc *corev1.Service) {
	had := slices.ContainsFunc(svc.Status.Conditions, func(c metav1.Condition) bool { return c.Type == AddressAssigned })
	if !had && len(svc.Status.LoadBalancer.Ingress) == 0 || b.changed >= maxBalanced {
		return
	}
	s := *svc
	s.Status = corev1.ServiceStatus{Conditions: slices.DeleteFunc(slices.Clone(svc.Status.Conditions), func(c metav1.Condition) bool { return c.Type == AddressAssigned })}
	b.ms, b.changed = append(b.ms, api.Guarded(api.UpdateStatus, &s)), b.changed+1
}

// write stores the status of svc, with the condition, if that changes anything.
func (b *balance) write(svc *corev1.Service, status *corev1.ServiceStatus, c metav1.Condition) bool {
	i := slices.IndexFunc(status.Conditions, func(o metav1.Condition) bool { return o.Type == c.Type })
	c.LastTransitionTime = metav1.NewTime(b.now)
	if i < 0 {
		status.Conditions = append(status.Conditions, c)
	} else {
		if old := status.Conditions[i]; old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
		status.Conditions[i] = c
	}
	if equality.Semantic.DeepEqual(svc.Status, *status) {
		return false
	}
	s := *svc
	s.Status = *status
	b.ms, b.changed = append(b.ms, api.Guarded(api.UpdateStatus, &s)), b.changed+1
	return true
}

// count keeps the status of the pools.
func (b *balance) count() (ms []api.Mutation) {
	for _, p := range b.pools {
		status := p.Status
		status.Assigned, status.Given = 0, status.Given+p.given
		for a := range b.taken {
			if p.contains(a) {
				status.Assigned++
			}
		}
		if status != p.Status {
			o := *p.AddressPool
			o.Status = status
			ms = append(ms, api.Guarded(api.UpdateStatus, &o))
		}
	}
	return ms
}
