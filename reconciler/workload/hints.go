package workload

import (
	"cmp"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"decree.dev/decree/schemas/api"
)

// PrefersNear reports whether the endpoints of svc get hints about who should use them, which
// depend on nodes too.
func PrefersNear(svc *corev1.Service) bool { return spread(svc) || preference(svc) != "" }

// spread reports whether svc asks for endpoints to be dealt out to zones by their CPUs.
func spread(svc *corev1.Service) bool {
	for _, key := range []string{corev1.AnnotationTopologyMode, corev1.DeprecatedAnnotationTopologyAwareHints} {
		if v, ok := svc.Annotations[key]; ok {
			return v == "Auto" || v == "auto"
		}
	}
	return false
}

// preference is what svc says in trafficDistribution, "" if that is nothing known.
func preference(svc *corev1.Service) string {
	switch p := deref(svc.Spec.TrafficDistribution, ""); p {
	case corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameZone, corev1.ServiceTrafficDistributionPreferSameNode:
		return p
	}
	return ""
}

// hint says for each ready endpoint of g who should use it: those in its own zone, and with
// PreferSameNode on its own node before them (KEP-4444, KEP-3015), or with the annotation
// topology-mode those in the zone that it is dealt to (KEP-2433). The annotation wins, as in
// Kubernetes. before are the zones that endpoints were hinted for, by address.
//
// Endpoints that are not ready have no hints: they are the last resort of everybody.
func (g *group) hint(r api.Reader, svc *corev1.Service, before map[string]string) {
	var zones map[string]string
	near := preference(svc)
	switch {
	case spread(svc):
		near = ""
		zones = deal(g.want, cpus(r), before)
	case near != "":
		zones = home(g.want)
	}
	for addr, e := range g.want {
		if !deref(e.Conditions.Ready, false) {
			continue
		}
		var h discoveryv1.EndpointHints
		if z := zones[addr]; z != "" {
			h.ForZones = []discoveryv1.ForZone{{Name: z}}
		}
		if near == corev1.ServiceTrafficDistributionPreferSameNode && e.NodeName != nil {
			h.ForNodes = []discoveryv1.ForNode{{Name: *e.NodeName}}
		}
		if len(h.ForZones)+len(h.ForNodes) > 0 {
			e.Hints = &h
			g.want[addr] = e
		}
	}
}

// home is the zone of each ready endpoint that is in one, by address.
func home(endpoints map[string]discoveryv1.Endpoint) map[string]string {
	out := map[string]string{}
	for addr, e := range endpoints {
		if z := deref(e.Zone, ""); z != "" && deref(e.Conditions.Ready, false) {
			out[addr] = z
		}
	}
	return out
}

// hinted are the zones that the endpoints of svc are hinted for now, by address.
func hinted(r api.Reader, svc *corev1.Service) map[string]string {
	out := map[string]string{}
	for s := range api.Owned[*discoveryv1.EndpointSlice](r, svc.UID) {
		for _, e := range s.Endpoints {
			if e.Hints != nil && len(e.Hints.ForZones) == 1 && len(e.Addresses) == 1 {
				out[e.Addresses[0]] = e.Hints.ForZones[0].Name
			}
		}
	}
	return out
}

// The labels of nodes that are not for ordinary pods, so that their CPUs do not count.
const (
	controlPlaneLabel = "node-role.kubernetes.io/control-plane"
	masterLabel       = "node-role.kubernetes.io/master"
)

// cpus are the CPUs of the ready nodes of each zone, in thousandths; nil if one of those has
// no zone or does not say how many it has.
func cpus(r api.Reader) map[string]int64 {
	out := map[string]int64{}
	for n := range api.List[*corev1.Node](r, "") {
		_, control := n.Labels[controlPlaneLabel]
		_, master := n.Labels[masterLabel]
		if control || master || nodeReady(n).Status != corev1.ConditionTrue {
			continue
		}
		zone, cpu := n.Labels[corev1.LabelTopologyZone], n.Status.Allocatable.Cpu().MilliValue()
		if zone == "" || cpu <= 0 {
			return nil
		}
		out[zone] += cpu
	}
	return out
}

// deal gives ready endpoints to zones so that none has less than 1/1.2 of what its CPUs stand
// for, and nobody's endpoints are loaded by more than 20 % above the average, if traffic
// follows the CPUs (the overload threshold of KEP-2433). Endpoints stay in their own zones as
// far as that goes, and with those that they were dealt to before. It returns nil where there
// is no such deal: fewer than two zones, fewer endpoints than it takes, or an endpoint or node
// that is in no zone.
func deal(endpoints map[string]discoveryv1.Endpoint, cpu map[string]int64, before map[string]string) map[string]string {
	zones := home(endpoints)
	ready := 0
	for _, e := range endpoints {
		if deref(e.Conditions.Ready, false) {
			ready++
		}
	}
	d := dealer{cpu: cpu, before: before, n: int64(len(zones)), hands: map[string][]string{}}
	least := int64(0)
	for z := range cpu {
		d.total += cpu[z]
	}
	for z := range cpu {
		least += d.least(z)
	}
	if len(zones) != ready || len(cpu) < 2 || least > d.n {
		return nil
	}
	for _, addr := range slices.Sorted(maps.Keys(zones)) {
		d.hands[zones[addr]] = append(d.hands[zones[addr]], addr)
	}
	d.run()
	for z, addrs := range d.hands {
		for _, addr := range addrs {
			zones[addr] = z
		}
	}
	return zones
}

// dealer moves endpoints between zones.
type dealer struct {
	cpu      map[string]int64 // of each zone with nodes
	total, n int64            // CPUs, endpoints
	before   map[string]string
	hands    map[string][]string // addresses by zone, in order
}

// least is how many endpoints a zone has to have: n*cpu/total/1.2, rounded up.
func (d *dealer) least(zone string) int64 {
	return (10*d.n*d.cpu[zone] + 12*d.total - 1) / (12 * d.total)
}

// excess is by how much a zone has more than its share, in parts of total.
func (d *dealer) excess(zone string) int64 {
	return int64(len(d.hands[zone]))*d.total - d.n*d.cpu[zone]
}

// short reports whether a zone has fewer than it has to.
func (d *dealer) short(zone string) bool { return int64(len(d.hands[zone])) < d.least(zone) }

// spare reports whether a zone can give one away.
func (d *dealer) spare(zone string) bool { return int64(len(d.hands[zone])) > d.least(zone) }

func (d *dealer) compare(a, b string) int { return cmp.Compare(d.excess(a), d.excess(b)) }

// run moves one endpoint at a time, until each zone has enough and none is left where there
// are no nodes: from there, or else from who has the most too many, to who has the most too few.
// As the zones need no more than there are, who is short always finds one with something to spare.
func (d *dealer) run() {
	nodes := slices.Sorted(maps.Keys(d.cpu))
	all := slices.Sorted(maps.Keys(d.hands))
	not := func(f func(string) bool) func(string) bool { return func(z string) bool { return !f(z) } }
	for {
		poor := slices.DeleteFunc(slices.Clone(nodes), not(d.short))
		from := ""
		switch i := slices.IndexFunc(all, func(z string) bool { return d.cpu[z] == 0 && len(d.hands[z]) > 0 }); {
		case i >= 0:
			from = all[i]
		case len(poor) > 0:
			from = slices.MaxFunc(slices.DeleteFunc(slices.Clone(nodes), not(d.spare)), d.compare)
		default:
			return
		}
		if len(poor) == 0 {
			poor = nodes
		}
		d.move(from, slices.MinFunc(poor, d.compare))
	}
}

// move takes an endpoint that was dealt that way before, else one that was not moved before,
// else any.
func (d *dealer) move(from, to string) {
	hand := d.hands[from]
	pick := slices.IndexFunc(hand, func(a string) bool { return d.before[a] == to })
	if pick < 0 {
		pick = slices.IndexFunc(hand, func(a string) bool { return d.before[a] == "" || d.before[a] == from })
	}
	pick = max(pick, 0)
	d.hands[to] = append(d.hands[to], hand[pick])
	d.hands[from] = slices.Delete(hand, pick, pick+1)
}
