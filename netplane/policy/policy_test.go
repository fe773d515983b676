package policy_test

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
)

// TestAgainstSpecification: random policies decide as the specification, read naively, does,
// and the order in which objects come does not matter.
func TestAgainstSpecification(t *testing.T) {
	n := netplanetest.Nets[0]
	rapid.Check(t, func(rt *rapid.T) {
		c := netplanetest.DrawPolicies(rt, n)
		plan := policy.New(c)
		turned := c
		turned.Policies, turned.Pods = slices.Clone(c.Policies), slices.Clone(c.Pods)
		slices.Reverse(turned.Policies)
		slices.Reverse(turned.Pods)
		if again := policy.New(turned); !reflect.DeepEqual(plan, again) {
			rt.Fatalf("in another order\n%+v\nis not\n%+v", again, plan)
		}
		hosts := []netplanetest.Host{netplanetest.Pod1, netplanetest.Pod2, netplanetest.Pod3, netplanetest.Outside, netplanetest.Node}
		for _, from := range hosts {
			for _, to := range hosts {
				for _, proto := range []render.Proto{render.TCP, render.UDP, render.SCTP, render.ICMP} {
					for port := uint16(netplanetest.TCPPort - 2); port <= netplanetest.SCTPPort+3; port++ {
						f := policy.Flow{From: n.Addr[from], To: n.Addr[to], Proto: proto, Port: port, FromNode: from == netplanetest.Node}
						if got, want := plan.Judge(f), netplanetest.Naive(c, f); got.Allowed != want {
							rt.Fatalf("%s to %s %s %d: %+v, want %v; policies\n%+v\npods\n%+v", from, to, proto, port, got, want, c.Policies, c.Pods)
						}
					}
				}
			}
		}
	})
}

// TestDNS: the node's own DNS is found as the pod that answers elsewhere.
func TestDNS(t *testing.T) {
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dns"}, Spec: networkingv1.NetworkPolicySpec{
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress: []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "kube-system"}},
			PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"k8s-app": "kube-dns"}},
		}}}},
	}}
	pod, dns := netip.MustParseAddr("10.98.0.2"), netip.MustParseAddr("10.97.0.10")
	plan := policy.New(policy.Cluster{Policies: []*networkingv1.NetworkPolicy{np}, DNS: dns, Pods: []policy.Pod{{Namespace: "shop", Name: "a", Addrs: []netip.Addr{pod}, Here: true}}})
	if v := plan.Judge(policy.Flow{From: pod, To: dns, Proto: render.UDP, Port: 53}); !v.Allowed {
		t.Errorf("DNS: %+v", v)
	}
	if v := plan.Judge(policy.Flow{From: pod, To: dns.Next(), Proto: render.UDP, Port: 53}); v.Allowed {
		t.Errorf("not DNS: %+v", v)
	}
}

// TestPodOf: who has no network or address of its own is no peer.
func TestPodOf(t *testing.T) {
	pod := func(change func(p *corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{Status: corev1.PodStatus{PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "::ffff:10.0.0.2"}, {IP: "x"}}}}
		change(p)
		return p
	}
	p, ok := policy.PodOf(pod(func(*corev1.Pod) {}))
	if want := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}; !ok || !slices.Equal(p.Addrs, want) {
		t.Errorf("%v %v, want %v", ok, p.Addrs, want)
	}
	for name, change := range map[string]func(*corev1.Pod){
		"on the network of its node": func(p *corev1.Pod) { p.Spec.HostNetwork = true },
		"that succeeded":             func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded },
		"that failed":                func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed },
	} {
		if _, ok := policy.PodOf(pod(change)); ok {
			t.Errorf("a pod %s is a peer", name)
		}
	}
}

// FuzzPolicy: whatever is written becomes a plan, and what cannot be understood opens
// nothing: a pod that is selected and that no rule admits stays closed.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte(`{"podSelector":{},"ingress":[{"from":[{"ipBlock":{"cidr":"10.0.0.0/8","except":["10.1.0.0/16"]}}],"ports":[{"port":80,"endPort":90},{"port":"http"}]}]}`))
	f.Add([]byte(`{"podSelector":{"matchExpressions":[{"key":"a","operator":"In"}]},"policyTypes":["Egress"],"egress":[{"to":[{"podSelector":{}},{}]}]}`))
	f.Add([]byte(`{"ingress":[{"from":[{"ipBlock":{"cidr":"::ffff:0:0/96","except":["x"]}}],"ports":[{"protocol":"SCTP"},{"port":-1},{"port":70000}]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"}}
		if json.Unmarshal(b, &np.Spec) != nil {
			return
		}
		a, stranger := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("192.0.2.1")
		plan := policy.New(policy.Cluster{Policies: []*networkingv1.NetworkPolicy{np}, Pods: []policy.Pod{{Namespace: "a", Name: "x", Addrs: []netip.Addr{a}, Here: true}}})
		for _, x := range plan.Blocks {
			for i, r := range x.Ranges {
				if r.First.BitLen() != r.Last.BitLen() || r.Last.Less(r.First) || i > 0 && !x.Ranges[i-1].Last.Less(r.First) {
					t.Fatalf("ranges %v", x.Ranges)
				}
			}
		}
		v := plan.Judge(policy.Flow{From: stranger, To: a, Proto: render.TCP, Port: 80})
		if by := v.Ingress.By; v.Ingress.Isolating != nil && v.Allowed != (by != nil) {
			t.Fatalf("%+v", v)
		} else if by != nil && !by.Anyone && (by.Block == nil || !by.Block.Has(stranger)) {
			t.Fatalf("a stranger by %+v", by)
		}
	})
}

// TestSize: what several pods are isolated by is counted once.
func TestSize(t *testing.T) {
	np := func(name string, selector map[string]string, rules int) *networkingv1.NetworkPolicy {
		return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: selector}, Ingress: make([]networkingv1.NetworkPolicyIngressRule, rules), Egress: make([]networkingv1.NetworkPolicyEgressRule, 1),
		}}
	}
	c := policy.Cluster{Policies: []*networkingv1.NetworkPolicy{np("all", nil, 2), np("one", map[string]string{"app": "a"}, 3), np("nobody", map[string]string{"app": "z"}, 9)}}
	for i, app := range []string{"a", "b", "b"} {
		c.Pods = append(c.Pods, policy.Pod{Namespace: "shop", Name: app, Labels: map[string]string{"app": app}, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 98, 0, byte(i + 1)})}, Here: true})
	}
	if policies, rules := policy.New(c).Size(); policies != 2 || rules != 2+1+3+1 {
		t.Errorf("%d policies with %d rules", policies, rules)
	}
	if policies, rules := policy.New(policy.Cluster{}).Size(); policies != 0 || rules != 0 {
		t.Errorf("without policies: %d, %d", policies, rules)
	}
}
