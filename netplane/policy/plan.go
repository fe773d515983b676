package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/netplane/render"
)

// New makes the plan of a cluster. Only what the pods that are Here need is in it.
func New(c Cluster) *Plan {
	p := newPlanner(c)
	subjects := map[netip.Addr]*Subject{}
	for _, np := range slices.SortedFunc(slices.Values(c.Policies), comparePolicies) {
		p.isolate(np, subjects)
	}
	for _, a := range c.Unknown {
		if subjects[a] == nil {
			subjects[a] = &Subject{Addr: a, Ingress: &Group{}, Egress: &Group{}}
		}
	}
	plan := &Plan{Peers: sorted(p.peers), Blocks: sorted(p.blocks), Names: sorted(p.names)}
	for _, a := range slices.SortedFunc(maps.Keys(subjects), netip.Addr.Compare) {
		plan.Subjects = append(plan.Subjects, *subjects[a])
	}
	p.shareGroups(plan.Subjects)
	if len(c.Policies) > 0 {
		plan.known = make(map[netip.Addr]bool, len(c.Pods))
		for i := range c.Pods {
			for _, a := range c.Pods[i].Addrs {
				plan.known[a] = true
			}
		}
	}
	return plan
}

func sorted[T any](m map[string]T) []T {
	var out []T
	for _, id := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[id])
	}
	return out
}

// planner is the working memory of New.
type planner struct {
	pods []Pod
	// byNamespace are indices of pods.
	byNamespace map[string][]int
	// namespaces are the labels of each.
	namespaces map[string]labels.Set
	peers      map[string]*Peer
	blocks     map[string]*Block
	names      map[string]*Name
	selectors  map[*metav1.LabelSelector]labels.Selector
}

// The names under which policies find cluster DNS.
const (
	dnsNamespace = "kube-system"
	dnsLabel     = "k8s-app"
	dnsApp       = "kube-dns"
)

func newPlanner(c Cluster) *planner {
	p := &planner{
		pods: c.Pods, byNamespace: map[string][]int{}, namespaces: map[string]labels.Set{},
		peers: map[string]*Peer{}, blocks: map[string]*Block{}, names: map[string]*Name{}, selectors: map[*metav1.LabelSelector]labels.Selector{},
	}
	if len(c.Policies) == 0 {
		return p
	}
	if c.DNS.IsValid() {
		p.pods = append(slices.Clip(p.pods), Pod{Namespace: dnsNamespace, Name: "cluster-dns", Labels: map[string]string{dnsLabel: dnsApp}, Addrs: []netip.Addr{c.DNS},
			Ports: []NamedPort{{"dns", render.UDP, render.DNSPort}, {"dns-tcp", render.TCP, render.DNSPort}}})
	}
	for i := range p.pods {
		ns := p.pods[i].Namespace
		p.byNamespace[ns] = append(p.byNamespace[ns], i)
	}
	for _, ns := range c.Namespaces {
		p.namespaces[ns.Name] = labels.Merge(ns.Labels, labels.Set{corev1.LabelMetadataName: ns.Name})
	}
	for ns := range p.byNamespace {
		if p.namespaces[ns] == nil {
			p.namespaces[ns] = labels.Set{corev1.LabelMetadataName: ns}
		}
	}
	return p
}

// isolate notes the pods of this node that np selects.
func (p *planner) isolate(np *networkingv1.NetworkPolicy, subjects map[netip.Addr]*Subject) {
	sel, ok := p.selector(&np.Spec.PodSelector)
	var in, out *Policy
	for _, i := range p.byNamespace[np.Namespace] {
		pod := &p.pods[i]
		// A policy that cannot be understood isolates everything that it may mean.
		if !pod.Here || ok && !sel.Matches(labels.Set(pod.Labels)) {
			continue
		}
		if in == nil && out == nil {
			in, out = p.policy(np)
		}
		for _, a := range pod.Addrs {
			s := subjects[a]
			if s == nil {
				s = &Subject{Addr: a, Pod: pod.Namespace + "/" + pod.Name}
				subjects[a] = s
			}
			s.Ingress, s.Egress = joined(s.Ingress, in), joined(s.Egress, out)
		}
	}
}

// joined is g with one more policy.
func joined(g *Group, p *Policy) *Group {
	switch {
	case p == nil:
		return g
	case g == nil:
		g = &Group{}
	case len(g.Policies) > 0 && g.Policies[len(g.Policies)-1] == p:
		return g // two pods claim the address
	}
	g.Policies = append(g.Policies, p)
	return g
}

// shareGroups makes subjects with the same policies have the same group.
func (p *planner) shareGroups(subjects []Subject) {
	number := map[*Policy]int{}
	known := map[string]*Group{}
	share := func(g *Group) *Group {
		if g == nil {
			return nil
		}
		var key strings.Builder
		for _, q := range g.Policies {
			if number[q] == 0 {
				number[q] = len(number) + 1
			}
			key.WriteString(strconv.Itoa(number[q]) + ",")
		}
		if have := known[key.String()]; have != nil {
			return have
		}
		known[key.String()] = g
		return g
	}
	for i := range subjects {
		subjects[i].Ingress, subjects[i].Egress = share(subjects[i].Ingress), share(subjects[i].Egress)
	}
}

// policy resolves the rules of np, nil where it isolates nobody.
func (p *planner) policy(np *networkingv1.NetworkPolicy) (in, out *Policy) {
	ingress, egress := Types(np)
	if ingress {
		in = &Policy{Object: np}
		for i := range np.Spec.Ingress {
			r := &np.Spec.Ingress[i]
			in.Rules = append(in.Rules, p.rule(in, i, r.From, r.Ports))
		}
	}
	if egress {
		out = &Policy{Object: np}
		for i := range np.Spec.Egress {
			r := &np.Spec.Egress[i]
			out.Rules = append(out.Rules, p.rule(out, i, r.To, r.Ports))
		}
	}
	return in, out
}

func (p *planner) rule(of *Policy, index int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) *Rule {
	r := &Rule{Policy: of, Index: index, Anyone: len(peers) == 0, AnyPort: len(ports) == 0}
	var blocks []*networkingv1.IPBlock
	for i := range peers {
		switch peer := &peers[i]; {
		case peer.IPBlock != nil:
			blocks = append(blocks, peer.IPBlock)
		case peer.PodSelector != nil || peer.NamespaceSelector != nil:
			if x := p.peer(of.Object.Namespace, peer.NamespaceSelector, peer.PodSelector); !slices.Contains(r.Peers, x) {
				r.Peers = append(r.Peers, x)
			}
		}
	}
	if len(blocks) > 0 {
		r.Block = shared(p.blocks, newBlock(blocks))
	}
	for i := range ports {
		if x, ok := p.ports(&ports[i]); ok && !slices.Contains(r.Ports, x) {
			r.Ports = append(r.Ports, x)
		}
	}
	return r
}

func shared(blocks map[string]*Block, b *Block) *Block {
	if have := blocks[b.ID]; have != nil {
		return have
	}
	blocks[b.ID] = b
	return b
}

func (p *planner) ports(np *networkingv1.NetworkPolicyPort) (Ports, bool) {
	proto := render.TCP
	if np.Protocol != nil {
		var ok bool
		if proto, ok = render.ProtoOf(*np.Protocol); !ok {
			return Ports{}, false
		}
	}
	switch {
	case np.Port == nil:
		return Ports{Proto: proto, First: 0, Last: 65535}, true
	case np.Port.Type == intstr.String:
		return Ports{Proto: proto, Name: p.name(proto, np.Port.StrVal)}, true
	}
	first, last := np.Port.IntVal, np.Port.IntVal
	if np.EndPort != nil {
		last = *np.EndPort
	}
	if first < 0 || last > 65535 || first > last {
		return Ports{}, false
	}
	return Ports{Proto: proto, First: uint16(first), Last: uint16(last)}, true
}

// name finds all pods that have a port of a name.
func (p *planner) name(proto render.Proto, name string) *Name {
	id := proto.String() + " " + name
	if n := p.names[id]; n != nil {
		return n
	}
	n := &Name{ID: id}
	for i := range p.pods {
		for _, port := range p.pods[i].Ports {
			if port.Name != name || port.Proto != proto {
				continue
			}
			for _, a := range p.pods[i].Addrs {
				n.Ports = append(n.Ports, render.Port{Addr: a, Proto: proto, Port: port.Number})
			}
		}
	}
	slices.SortFunc(n.Ports, render.Port.Compare)
	n.Ports = slices.Compact(n.Ports)
	p.names[id] = n
	return n
}

// peer finds all pods that a peer of a policy in namespace ns means.
func (p *planner) peer(ns string, namespaces, pods *metav1.LabelSelector) *Peer {
	id := "in " + ns
	if namespaces != nil {
		id = "namespaces " + canonical(namespaces)
	}
	id += " pods " + canonical(pods)
	if x := p.peers[id]; x != nil {
		return x
	}
	x := &Peer{ID: id}
	p.peers[id] = x
	sel, ok := p.selector(pods)
	if !ok {
		return x
	}
	add := func(ns string) {
		for _, i := range p.byNamespace[ns] {
			if sel.Matches(labels.Set(p.pods[i].Labels)) {
				x.Addrs = append(x.Addrs, p.pods[i].Addrs...)
			}
		}
	}
	if namespaces == nil {
		add(ns)
	} else if nsel, ok := p.selector(namespaces); ok {
		for name, set := range p.namespaces {
			if nsel.Matches(set) {
				add(name)
			}
		}
	}
	slices.SortFunc(x.Addrs, netip.Addr.Compare)
	x.Addrs = slices.Compact(x.Addrs)
	return x
}

// selector is what s selects; nil selects everything, as an empty one does. It is false for
// one that nobody can understand.
func (p *planner) selector(s *metav1.LabelSelector) (labels.Selector, bool) {
	if s == nil {
		return labels.Everything(), true
	}
	sel, known := p.selectors[s]
	if !known {
		var err error
		if sel, err = metav1.LabelSelectorAsSelector(s); err != nil {
			sel = nil
		}
		p.selectors[s] = sel
	}
	return sel, sel != nil
}

// canonical is the same text for selectors that say the same in another order.
func canonical(s *metav1.LabelSelector) string {
	if s == nil {
		return ""
	}
	var parts []string
	for k, v := range s.MatchLabels {
		parts = append(parts, fmt.Sprintf("%q in %q", k, []string{v}))
	}
	for _, e := range s.MatchExpressions {
		parts = append(parts, fmt.Sprintf("%q %s %q", e.Key, strings.ToLower(string(e.Operator)), slices.Sorted(slices.Values(e.Values))))
	}
	slices.Sort(parts)
	return strings.Join(slices.Compact(parts), ",")
}
