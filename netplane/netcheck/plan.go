package netcheck

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
)

// Plan is a check of one cluster.
type Plan struct {
	// Nodes are those that take part, by name.
	Nodes []string
	// Pods are the pods that stand for them; nodes without a suitable one are not in it.
	Pods map[string]*corev1.Pod
	// Skipped says which services are not tried, and why.
	Skipped []string

	addrs    map[string][]netip.Addr // of nodes
	services []target
	dns      Probe // without its kind
}

// target is a service's port in one address family.
type target struct {
	name  string // as in Probe.To
	at    render.Port
	names bool // as in Probe.Names
}

// New plans a check. The same cluster gives the same plan.
//
// A pod stands for a node if it is ready, has a network of its own and is not isolated by a
// policy: what policies forbid would look like trouble. For the same reason services are
// tried only where nobody is isolated behind them.
func New(c Cluster) *Plan {
	p := &Plan{Pods: map[string]*corev1.Pod{}, addrs: map[string][]netip.Addr{}}
	for _, n := range c.Nodes {
		p.Nodes = append(p.Nodes, n.Name)
		p.addrs[n.Name] = render.PeerOf(n).Addrs
	}
	slices.Sort(p.Nodes)
	policies := policy.New(policy.Cluster{Policies: c.Policies, Namespaces: c.Namespaces, Pods: policy.Everywhere(c.Pods), DNS: c.DNS})
	for _, pod := range c.Pods {
		best := p.Pods[pod.Spec.NodeName]
		if suitable(pod, policies) && (best == nil || compare(pod, best) < 0) {
			p.Pods[pod.Spec.NodeName] = pod
		}
	}
	p.pick(c, policies)
	p.dns = Probe{To: "dns-version." + c.Domain + ".", Address: c.DNS, Port: render.DNSPort}
	if len(p.services) > 0 {
		first := p.services[0]
		namespace, rest, _ := strings.Cut(first.name, "/")
		name, _, _ := strings.Cut(rest, ":")
		p.dns.To, p.dns.Want = name+"."+namespace+".svc."+c.Domain+".", first.at.Addr
	}
	return p
}

type named interface {
	GetNamespace() string
	GetName() string
}

func compare[T named](a, b T) int {
	return cmp.Or(strings.Compare(a.GetNamespace(), b.GetNamespace()), strings.Compare(a.GetName(), b.GetName()))
}

func suitable(pod *corev1.Pod, policies *policy.Plan) bool {
	q, ok := policy.PodOf(pod)
	ready := slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
	return ok && ready && pod.DeletionTimestamp == nil && len(q.Addrs) > 0 && !slices.ContainsFunc(q.Addrs, func(a netip.Addr) bool {
		_, isolated := policies.Find(a)
		return isolated
	})
}

// pick chooses the services to try: the first ones by name that have a TCP or UDP port
// with endpoints that everybody may reach.
func (p *Plan) pick(c Cluster, policies *policy.Plan) {
	services := slices.SortedFunc(slices.Values(c.Services), compare)
	behind := map[render.Port][]netip.AddrPort{}
	for _, s := range render.Render(render.Desired{Services: services, Slices: c.Slices}).Services {
		behind[s.Port] = s.Endpoints
	}
	guarded, more, tried := 0, 0, 0
	for _, svc := range services {
		targets, isolated := targetsOf(svc, behind, policies)
		switch {
		case isolated:
			guarded++
		case len(targets) == 0:
		case tried == MaxServices:
			more++
		default:
			tried++
			p.services = append(p.services, targets...)
		}
	}
	if guarded > 0 {
		p.Skipped = append(p.Skipped, fmt.Sprintf("services whose pods network policies isolate: %d (decree why-blocked says who reaches them)", guarded))
	}
	if more > 0 {
		p.Skipped = append(p.Skipped, fmt.Sprintf("further services: %d (at most %d are tried)", more, MaxServices))
	}
}

// targetsOf are the first TCP port and the first UDP port of a service that have endpoints,
// at each of its cluster addresses.
func targetsOf(svc *corev1.Service, behind map[render.Port][]netip.AddrPort, policies *policy.Plan) (out []target, isolated bool) {
	if l := svc.Spec.InternalTrafficPolicy; l != nil && *l == corev1.ServiceInternalTrafficPolicyLocal {
		return nil, false // some nodes are not meant to reach it
	}
	has := map[render.Proto]bool{}
	for _, sp := range svc.Spec.Ports {
		proto, ok := render.ProtoOf(sp.Protocol)
		if !ok || proto != render.TCP && proto != render.UDP || has[proto] {
			continue
		}
		t := target{name: fmt.Sprintf("%s/%s:%d", svc.Namespace, svc.Name, sp.Port)}
		if proto == render.UDP {
			t.name += "/UDP"
			t.names = sp.Port == render.DNSPort || sp.Name == "dns" || sp.Name == "dns-udp"
		}
		for _, a := range render.ClusterIPs(svc) {
			t.at = render.Port{Addr: a, Proto: proto, Port: uint16(sp.Port)}
			if len(behind[t.at]) > 0 {
				has[proto] = true
				out = append(out, t)
			}
			for _, ep := range behind[t.at] {
				if s, ok := policies.Find(ep.Addr()); ok && s.Ingress != nil {
					return nil, true
				}
			}
		}
	}
	return out, false
}

// Begin is what a node is asked first.
func (p *Plan) Begin(node string) Begin {
	var uid types.UID
	if pod := p.Pods[node]; pod != nil {
		uid = pod.UID
	}
	return Begin{Pod: uid}
}

// Probes are what a node tries, by the ends that the nodes have told; those that are not in
// ends do not take part. Only addresses of families that both ends have are tried.
func (p *Plan) Probes(node string, ends map[string]End) []Probe {
	var out []Probe
	own, pod := p.addrs[node], ends[node].Addresses
	lead := pod // the families in which this node has routes to pods
	if len(lead) == 0 {
		lead = own
	}
	for _, other := range targets(p.Nodes, node) {
		// The machine of an agent that takes no part may answer all the same.
		out = append(out, echoes(NodeToNode, other, own, p.addrs[other])...)
		out = append(out, echoes(NodeToPod, other, lead, ends[other].Addresses)...)
		out = append(out, echoes(PodToPod, other, pod, ends[other].Addresses)...)
	}
	out = append(out, echoes(NodeToPod, node, lead, pod)...)
	for _, s := range p.services {
		kind := PodToService
		if s.at.Proto == render.UDP {
			kind = PodToUDP
		}
		if family(pod, s.at.Addr) {
			out = append(out, Probe{Kind: kind, To: s.name, Address: s.at.Addr, Port: s.at.Port, Names: s.names})
		}
	}
	if !p.dns.Address.IsValid() {
		return out
	}
	q := p.dns
	q.Kind = NodeToDNS
	out = append(out, q)
	if q.Kind = PodToDNS; family(pod, q.Address) {
		out = append(out, q)
	}
	return out
}

// echoes are one to each address of a family that the sender has too.
func echoes(kind Kind, to string, from, addrs []netip.Addr) (out []Probe) {
	seen := map[bool]bool{} // one for each family
	for _, a := range addrs {
		if family(from, a) && !seen[a.Is4()] {
			seen[a.Is4()] = true
			out = append(out, Probe{Kind: kind, To: to, Address: a})
		}
	}
	return out
}

func family(from []netip.Addr, a netip.Addr) bool {
	return slices.ContainsFunc(from, func(f netip.Addr) bool { return f.Is4() == a.Is4() })
}

// targets are the nodes that one tries: all others, or in a large cluster those at fixed
// distances in the circle of names, near and far ones, so that each is tried as often.
func targets(nodes []string, node string) (out []string) {
	i, ok := slices.BinarySearch(nodes, node)
	n := len(nodes)
	if !ok || n < 2 {
		return nil
	}
	count := min(n-1, MaxTargets)
	for k := range count {
		// 1 + k*(n-1)/count grows by at least one and stays below n.
		out = append(out, nodes[(i+1+k*(n-1)/count)%n])
	}
	slices.Sort(out)
	return out
}
