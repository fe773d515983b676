package workload

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/schemas/api"
)

const (
	// maxEndpoints is the most endpoints in one slice.
	maxEndpoints = 100
	// managedBy marks the slices that Endpoints keeps.
	managedBy = "endpointslice-controller.decree.dev"
)

// Endpoints returns what brings the EndpointSlices of svc in line with the pods it
// selects. An endpoint stays in the slice it is in, so that one pod's change is one
// slice's change. The time is not used yet; every planner has the same shape.
func Endpoints(_ time.Time, r api.Reader, svc *corev1.Service) []api.Mutation {
	var groups []*group
	if svc.DeletionTimestamp == nil && svc.Spec.Type != corev1.ServiceTypeExternalName && len(svc.Spec.Selector) > 0 {
		groups = gather(r, svc)
	}
	byKey := make(map[string]*group, len(groups))
	for _, g := range groups {
		byKey[g.key] = g
	}
	var ms []api.Mutation
	var idle []*discoveryv1.EndpointSlice
	kept := 0
	for s := range api.Owned[*discoveryv1.EndpointSlice](r, svc.UID) {
		g := byKey[groupKey(s.AddressType, s.Ports)]
		if s.DeletionTimestamp != nil {
			continue
		}
		if g == nil || !g.take(s) {
			idle = append(idle, s)
			continue
		}
		kept++
	}
	for _, g := range groups {
		ms = append(ms, g.finish(r, svc)...)
	}
	return append(ms, retire(svc, idle, kept+creations(ms) == 0 && len(svc.Spec.Selector) > 0)...)
}

func creations(ms []api.Mutation) (n int) {
	for _, m := range ms {
		if m.Verb == api.Create {
			n++
		}
	}
	return n
}

// retire deletes slices that are no longer needed, but empties one of them when no
// other is left: a service whose only pod restarts keeps its slice.
func retire(svc *corev1.Service, idle []*discoveryv1.EndpointSlice, keepOne bool) (ms []api.Mutation) {
	for i, s := range idle {
		switch {
		case i > 0 || !keepOne || svc.Spec.Type == corev1.ServiceTypeExternalName:
			ms = append(ms, remove(s))
		case len(s.Endpoints) > 0:
			empty := api.Clone(s)
			empty.Endpoints = []discoveryv1.Endpoint{}
			ms = append(ms, api.Guarded(api.Update, empty))
		}
	}
	return ms
}

// group is the endpoints that share an address type and port numbers: pods may give
// the same port name different numbers.
type group struct {
	key     string
	family  discoveryv1.AddressType
	ports   []discoveryv1.EndpointPort
	want    map[string]discoveryv1.Endpoint // by address
	slices  []*filling
	created int
}

// filling is an existing slice and what it shall hold.
type filling struct {
	slice     *discoveryv1.EndpointSlice
	endpoints []discoveryv1.Endpoint
}

func groupKey(family discoveryv1.AddressType, ports []discoveryv1.EndpointPort) string {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b discoveryv1.EndpointPort) int { return cmp.Compare(deref(a.Name, ""), deref(b.Name, "")) })
	raw, err := json.Marshal(ports)
	if err != nil {
		panic(fmt.Sprintf("workload: encode endpoint ports: %v", err)) // plain data encodes
	}
	return string(family) + string(raw)
}

// gather sorts the service's pods into groups, in an order that depends on the
// groups only, and says who should use them.
func gather(r api.Reader, svc *corev1.Service) []*group {
	byKey := map[string]*group{}
	selector := labels.SelectorFromSet(svc.Spec.Selector)
	for pod := range api.List[*corev1.Pod](r, svc.Namespace) {
		if api.PodFinished(pod) || !selector.Matches(labels.Set(pod.Labels)) {
			continue
		}
		ports := portsOf(svc, pod)
		for _, family := range families(svc, pod) {
			ip := addressOf(pod, family)
			if ip == "" {
				continue
			}
			key := groupKey(family, ports)
			g := byKey[key]
			if g == nil {
				g = &group{key: key, family: family, ports: ports, want: map[string]discoveryv1.Endpoint{}}
				byKey[key] = g
			}
			// Two pods with one address are on the host's network; the ready one counts.
			if e := endpointOf(r, svc, pod, ip); !deref(g.want[ip].Conditions.Ready, false) {
				g.want[ip] = e
			}
		}
	}
	if PrefersNear(svc) {
		before := hinted(r, svc)
		for _, g := range byKey {
			g.hint(r, svc, before)
		}
	}
	return slices.SortedFunc(maps.Values(byKey), func(a, b *group) int { return cmp.Compare(a.key, b.key) })
}

// families are the address types of svc. The state machine fills ipFamilies, but not of
// a headless service that leaves the choice open: that one is of the primary family of
// its pods.
func families(svc *corev1.Service, pod *corev1.Pod) []discoveryv1.AddressType {
	var out []discoveryv1.AddressType
	for _, f := range svc.Spec.IPFamilies {
		out = append(out, discoveryv1.AddressType(f))
	}
	if len(out) > 0 {
		return out
	}
	if ip, err := netip.ParseAddr(pod.Status.PodIP); err == nil && ip.Is6() {
		return []discoveryv1.AddressType{discoveryv1.AddressTypeIPv6}
	}
	return []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4}
}

func addressOf(pod *corev1.Pod, family discoveryv1.AddressType) string {
	candidates := []string{pod.Status.PodIP}
	for _, ip := range pod.Status.PodIPs {
		candidates = append(candidates, ip.IP)
	}
	for _, c := range candidates {
		if ip, err := netip.ParseAddr(c); err == nil && ip.Is4() == (family == discoveryv1.AddressTypeIPv4) {
			return c
		}
	}
	return ""
}

// portsOf resolves the service's ports for one pod; a named target port that the
// pod does not have is left out.
func portsOf(svc *corev1.Service, pod *corev1.Pod) []discoveryv1.EndpointPort {
	ports := []discoveryv1.EndpointPort{}
	for _, p := range svc.Spec.Ports {
		number := p.TargetPort.IntVal
		if p.TargetPort.Type == intstr.String {
			number = namedPort(pod, p.TargetPort.StrVal, p.Protocol)
		} else if number == 0 {
			number = p.Port
		}
		if number == 0 {
			continue
		}
		protocol := cmp.Or(p.Protocol, corev1.ProtocolTCP)
		ports = append(ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &protocol, Port: &number, AppProtocol: p.AppProtocol})
	}
	return ports
}

func namedPort(pod *corev1.Pod, name string, protocol corev1.Protocol) int32 {
	find := func(c *corev1.Container) int32 {
		for _, p := range c.Ports {
			if p.Name == name && cmp.Or(p.Protocol, corev1.ProtocolTCP) == cmp.Or(protocol, corev1.ProtocolTCP) {
				return p.ContainerPort
			}
		}
		return 0
	}
	for i := range pod.Spec.Containers {
		if n := find(&pod.Spec.Containers[i]); n != 0 {
			return n
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			if n := find(c); n != 0 {
				return n
			}
		}
	}
	return 0
}

func endpointOf(r api.Reader, svc *corev1.Service, pod *corev1.Pod, ip string) discoveryv1.Endpoint {
	serving := api.PodReady(pod)
	terminating := pod.DeletionTimestamp != nil
	ready := svc.Spec.PublishNotReadyAddresses || serving && !terminating
	e := discoveryv1.Endpoint{
		Addresses:  []string{ip},
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
	}
	if pod.Spec.NodeName != "" {
		e.NodeName = &pod.Spec.NodeName
		if node, ok := api.Get[*corev1.Node](r, "", pod.Spec.NodeName); ok && node.Labels[corev1.LabelTopologyZone] != "" {
			zone := node.Labels[corev1.LabelTopologyZone]
			e.Zone = &zone
		}
	}
	if pod.Spec.Hostname != "" && pod.Spec.Subdomain == svc.Name {
		e.Hostname = &pod.Spec.Hostname
	}
	return e
}

// take claims what s already holds. It returns false if nothing of it is wanted.
func (g *group) take(s *discoveryv1.EndpointSlice) bool {
	f := &filling{slice: s, endpoints: []discoveryv1.Endpoint{}}
	for _, e := range s.Endpoints {
		if len(e.Addresses) != 1 {
			continue
		}
		if wanted, ok := g.want[e.Addresses[0]]; ok && len(f.endpoints) < maxEndpoints {
			f.endpoints = append(f.endpoints, wanted)
			delete(g.want, e.Addresses[0])
		}
	}
	if len(f.endpoints) == 0 && len(g.want) == 0 {
		return false
	}
	g.slices = append(g.slices, f)
	return true
}

// finish puts the endpoints that are in no slice yet into slices with room, then
// into new ones.
func (g *group) finish(r api.Reader, svc *corev1.Service) (ms []api.Mutation) {
	rest := slices.SortedFunc(maps.Values(g.want), func(a, b discoveryv1.Endpoint) int { return cmp.Compare(a.Addresses[0], b.Addresses[0]) })
	for _, f := range g.slices {
		n := min(len(rest), maxEndpoints-len(f.endpoints))
		f.endpoints = append(f.endpoints, rest[:n]...)
		rest = rest[n:]
		if m, changed := f.update(svc); changed {
			ms = append(ms, m)
		}
	}
	for len(rest) > 0 {
		n := min(len(rest), maxEndpoints)
		ms = append(ms, create(g.newSlice(r, svc, rest[:n:n])))
		rest = rest[n:]
	}
	return ms
}

func (f *filling) update(svc *corev1.Service) (api.Mutation, bool) {
	if len(f.endpoints) == 0 {
		return remove(f.slice), true // claimed for newcomers that found room elsewhere
	}
	marks := sliceLabels(svc)
	if maps.Equal(marks, f.slice.Labels) && equality.Semantic.DeepEqual(f.endpoints, f.slice.Endpoints) {
		return api.Mutation{}, false
	}
	s := api.Clone(f.slice)
	s.Labels, s.Endpoints = marks, f.endpoints
	return api.Guarded(api.Update, s), true
}

func sliceLabels(svc *corev1.Service) map[string]string {
	l := map[string]string{}
	maps.Copy(l, svc.Labels)
	maps.DeleteFunc(l, func(k, _ string) bool { return k == corev1.IsHeadlessService })
	l[discoveryv1.LabelServiceName], l[discoveryv1.LabelManagedBy] = svc.Name, managedBy
	if svc.Spec.ClusterIP == corev1.ClusterIPNone {
		l[corev1.IsHeadlessService] = ""
	}
	return l
}

func (g *group) newSlice(r api.Reader, svc *corev1.Service, endpoints []discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	name := ""
	for ; ; g.created++ {
		name = named(svc.Name, suffix(5, string(svc.UID), g.key, strconv.Itoa(g.created)))
		if _, taken := r.Get(api.Key{Resource: api.EndpointSlices, Namespace: svc.Namespace, Name: name}); !taken {
			g.created++
			break
		}
	}
	return &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: svc.Namespace, Name: name, GenerateName: svc.Name + "-", Labels: sliceLabels(svc),
			OwnerReferences: []metav1.OwnerReference{controllerRef(svc)},
		},
		AddressType: g.family, Ports: g.ports, Endpoints: endpoints,
	}
}
