package netplanetest

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
)

// ComparePolicies gives random policies to what enforces them and to the model, and sends
// both random packets: straight, and to services. Cases follow each other on the same
// tables, so that each is a random change as well.
func ComparePolicies(t *testing.T, w Sender, p Policies, n Net) {
	s := &suite{w: sending{Sender: w}, n: n}
	s.open(t)
	var services []render.Service
	for i, h := range Pods {
		services = append(services, s.inFront(n.Service(i+1), h)...)
	}
	s.sync(t, s.table(services...))
	model := NewModel(1, time.Now)
	if _, err := model.Kernel.Sync(t.Context(), s.table(services...)); err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		c := DrawPolicies(rt, n)
		plan := policy.New(c)
		for _, k := range []Policies{p, model.Kernel.Policies()} {
			if _, err := k.Set(rt.Context(), plan, []netip.Prefix{n.Range}); err != nil {
				rt.Fatal(err)
			}
		}
		if ok, err := p.Read(rt.Context()); err != nil || !ok {
			rt.Fatalf("read back: %v, %v", ok, err)
		}
		var wg sync.WaitGroup
		failures := make([]string, 12)
		for i := range failures {
			from := rapid.SampledFrom([]Host{Pod1, Pod2, Pod3, Node, Outside}).Draw(rt, "from")
			to, service := rapid.IntRange(0, 2).Draw(rt, "to"), from != Outside && rapid.Bool().Draw(rt, "service")
			port := portNames[rapid.SampledFrom([]string{"tcp", "second", "udp", "sctp"}).Draw(rt, "port")]
			at := netip.AddrPortFrom(n.Addr[Pods[to]], port.Port)
			if service {
				at = netip.AddrPortFrom(n.Service(to+1), port.Port-8000)
			}
			wg.Go(func() {
				want, err2 := model.Send(from, port.Proto, at)
				got, err1 := insist(w, from, port.Proto, at, want.To.IsValid())
				if err1 != nil || err2 != nil || got.To != want.To || got.Dropped != want.Dropped {
					failures[i] = fmt.Sprintf("from %s to %s %s: %+v %v, the model has %+v %v", from, port.Proto, at, got, err1, want, err2)
				}
			})
		}
		wg.Wait()
		for _, f := range failures {
			if f != "" {
				rt.Errorf("%s; policies\n%+v\npods\n%+v", f, c.Policies, c.Pods)
			}
		}
	})
}

// DrawPolicies draws a cluster whose pods are those of a World.
func DrawPolicies(t *rapid.T, n Net) policy.Cluster {
	d := drawing{t, n}
	c := policy.Cluster{}
	for _, ns := range []string{"a", "b"} {
		c.Namespaces = append(c.Namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: d.labels()}})
	}
	for _, h := range Pods {
		pod := policy.Pod{Namespace: d.namespace(), Name: string(h), Labels: d.labels(), Addrs: []netip.Addr{n.Addr[h]}, Here: true}
		for name, p := range portNames {
			if rapid.Bool().Draw(t, "named") {
				pod.Ports = append(pod.Ports, policy.NamedPort{Name: name, Proto: p.Proto, Number: p.Port})
			}
		}
		c.Pods = append(c.Pods, pod)
	}
	for i := range rapid.IntRange(0, 4).Draw(t, "policies") {
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: d.namespace(), Name: fmt.Sprint("p", i)}}
		np.Spec.PodSelector = *d.selector()
		np.Spec.PolicyTypes = rapid.SliceOfDistinct(rapid.SampledFrom([]networkingv1.PolicyType{"Ingress", "Egress"}), rapid.ID).Draw(t, "types")
		for range rapid.IntRange(0, 2).Draw(t, "ingress") {
			np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: d.peers(), Ports: d.ports()})
		}
		for range rapid.IntRange(0, 2).Draw(t, "egress") {
			np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: d.peers(), Ports: d.ports()})
		}
		c.Policies = append(c.Policies, np)
	}
	return c
}

// drawing draws parts of policies.
type drawing struct {
	t *rapid.T
	n Net
}

func (d drawing) namespace() string {
	return rapid.SampledFrom([]string{"a", "b"}).Draw(d.t, "namespace")
}

func (d drawing) labels() map[string]string {
	out := map[string]string{}
	for _, k := range []string{"x", "y"} {
		if v := rapid.SampledFrom([]string{"", "1", "2"}).Draw(d.t, k); v != "" {
			out[k] = v
		}
	}
	return out
}

func (d drawing) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	switch rapid.IntRange(0, 4).Draw(d.t, "selector") {
	case 0:
		s.MatchLabels = d.labels()
	case 1:
		op := rapid.SampledFrom([]metav1.LabelSelectorOperator{"In", "NotIn", "Exists", "DoesNotExist"}).Draw(d.t, "operator")
		e := metav1.LabelSelectorRequirement{Key: rapid.SampledFrom([]string{"x", "y"}).Draw(d.t, "key"), Operator: op}
		if op == metav1.LabelSelectorOpIn || op == metav1.LabelSelectorOpNotIn {
			e.Values = rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"1", "2"}), 1, 2, rapid.ID).Draw(d.t, "values")
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func (d drawing) peers() (out []networkingv1.NetworkPolicyPeer) {
	for range rapid.IntRange(0, 2).Draw(d.t, "peers") {
		switch rapid.IntRange(0, 3).Draw(d.t, "kind") {
		case 0:
			out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: d.selector()})
		case 1:
			out = append(out, networkingv1.NetworkPolicyPeer{NamespaceSelector: d.selector()})
		case 2:
			out = append(out, networkingv1.NetworkPolicyPeer{NamespaceSelector: d.selector(), PodSelector: d.selector()})
		case 3:
			out = append(out, networkingv1.NetworkPolicyPeer{IPBlock: d.block()})
		}
	}
	return out
}

func (d drawing) block() *networkingv1.IPBlock {
	a := d.n.Addr[rapid.SampledFrom([]Host{Pod1, Pod2, Pod3, Outside}).Draw(d.t, "address")]
	off := rapid.IntRange(0, 4).Draw(d.t, "bits")
	b := &networkingv1.IPBlock{CIDR: netip.PrefixFrom(a, a.BitLen()-off).String()}
	if rapid.IntRange(0, 4).Draw(d.t, "all") == 0 {
		b.CIDR, off = netip.PrefixFrom(a, 0).Masked().String(), a.BitLen()
	}
	for range rapid.IntRange(0, 2).Draw(d.t, "exceptions") {
		if off > 0 {
			x := d.n.Addr[rapid.SampledFrom(Pods).Draw(d.t, "exception")]
			b.Except = append(b.Except, netip.PrefixFrom(x, x.BitLen()-rapid.IntRange(0, 1).Draw(d.t, "bits of exception")).String())
		}
	}
	return b
}

func (d drawing) ports() (out []networkingv1.NetworkPolicyPort) {
	for range rapid.IntRange(0, 2).Draw(d.t, "ports") {
		var p networkingv1.NetworkPolicyPort
		if proto := rapid.SampledFrom([]corev1.Protocol{"", "TCP", "UDP", "SCTP"}).Draw(d.t, "protocol"); proto != "" {
			p.Protocol = &proto
		}
		switch rapid.IntRange(0, 3).Draw(d.t, "port") {
		case 0:
			at := intstr.FromString(rapid.SampledFrom([]string{"tcp", "second", "udp", "sctp"}).Draw(d.t, "name"))
			p.Port = &at
		case 1:
			at := intstr.FromInt32(rapid.Int32Range(TCPPort-1, SCTPPort+1).Draw(d.t, "number"))
			p.Port = &at
		case 2:
			at := intstr.FromInt32(rapid.Int32Range(TCPPort-1, SCTPPort+1).Draw(d.t, "first"))
			end := at.IntVal + rapid.Int32Range(0, 2).Draw(d.t, "more")
			p.Port, p.EndPort = &at, &end
		}
		out = append(out, p)
	}
	return out
}

// Naive says whether a cluster's policies allow a flow between two of its pods, or with an
// address that is none: by reading the specification again for every question.
func Naive(c policy.Cluster, f policy.Flow) bool {
	if f.FromNode || f.From == f.To {
		return true
	}
	return naive{c, f, true}.allowed() && naive{c, f, false}.allowed()
}

// naive is one direction of a flow: egress of its beginner, or ingress at its end.
type naive struct {
	c      policy.Cluster
	f      policy.Flow
	egress bool
}

func (d naive) find(a netip.Addr) *policy.Pod {
	i := slices.IndexFunc(d.c.Pods, func(p policy.Pod) bool { return slices.Contains(p.Addrs, a) })
	if i < 0 {
		return nil
	}
	return &d.c.Pods[i]
}

func (d naive) allowed() bool {
	subject, peer := d.f.To, d.f.From
	if d.egress {
		subject, peer = peer, subject
	}
	pod, isolated := d.find(subject), false
	if pod == nil || !pod.Here {
		return true
	}
	for _, np := range d.c.Policies {
		in, out := policy.Types(np)
		if np.Namespace != pod.Namespace || !matches(&np.Spec.PodSelector, pod.Labels) || d.egress && !out || !d.egress && !in {
			continue
		}
		isolated = true
		if d.egress {
			for _, r := range np.Spec.Egress {
				if d.from(r.To, np.Namespace, peer) && d.at(r.Ports) {
					return true
				}
			}
			continue
		}
		for _, r := range np.Spec.Ingress {
			if d.from(r.From, np.Namespace, peer) && d.at(r.Ports) {
				return true
			}
		}
	}
	return !isolated
}

func matches(s *metav1.LabelSelector, set map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, ok := set[k]; !ok || have != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, ok := set[e.Key]
		is := map[metav1.LabelSelectorOperator]bool{
			"In": ok && slices.Contains(e.Values, have), "NotIn": !ok || !slices.Contains(e.Values, have), "Exists": ok, "DoesNotExist": !ok,
		}
		if !is[e.Operator] {
			return false
		}
	}
	return true
}

func (d naive) from(peers []networkingv1.NetworkPolicyPeer, ns string, a netip.Addr) bool {
	pod := d.find(a)
	for _, p := range peers {
		switch {
		case p.IPBlock != nil:
			inside := func(text string) bool { return netip.MustParsePrefix(text).Contains(a) }
			if inside(p.IPBlock.CIDR) && !slices.ContainsFunc(p.IPBlock.Except, inside) {
				return true
			}
		case pod == nil:
		case p.NamespaceSelector == nil && pod.Namespace != ns:
		case p.NamespaceSelector != nil && !matches(p.NamespaceSelector, d.namespaceLabels(pod.Namespace)):
		case p.PodSelector == nil || matches(p.PodSelector, pod.Labels):
			return true
		}
	}
	return len(peers) == 0
}

func (d naive) namespaceLabels(name string) map[string]string {
	for _, ns := range d.c.Namespaces {
		if ns.Name == name {
			return ns.Labels
		}
	}
	return nil
}

func (d naive) at(ports []networkingv1.NetworkPolicyPort) bool {
	for _, p := range ports {
		proto := "tcp"
		if p.Protocol != nil {
			proto = map[corev1.Protocol]string{"TCP": "tcp", "UDP": "udp", "SCTP": "sctp"}[*p.Protocol]
		}
		switch {
		case proto != d.f.Proto.String():
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			if pod := d.find(d.f.To); pod != nil && slices.Contains(pod.Ports, policy.NamedPort{Name: p.Port.StrVal, Proto: d.f.Proto, Number: d.f.Port}) {
				return true
			}
		case p.EndPort == nil && int32(d.f.Port) == p.Port.IntVal,
			p.EndPort != nil && p.Port.IntVal <= int32(d.f.Port) && int32(d.f.Port) <= *p.EndPort:
			return true
		}
	}
	return len(ports) == 0
}
