package netplane_test

import (
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

// labelled is a pod of the node n1 that has no status yet.
func labelled(name string) *corev1.Pod {
	p := pod(name)
	p.Labels = map[string]string{"app": name}
	p.Spec.NodeName = "n1"
	return p
}

// from allows the pods of an app to reach those of another one, and isolates those.
func from(app string, to ...string) *networkingv1.NetworkPolicy {
	only := func(app string) metav1.LabelSelector {
		return metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
	}
	sel := only(app)
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "only-" + app},
		Spec: networkingv1.NetworkPolicySpec{PodSelector: only(to[0]), Ingress: []networkingv1.NetworkPolicyIngressRule{
			{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &sel}}},
		}},
	}
}

// blocked tells whether nothing answers a TCP connection.
func blocked(t *testing.T, netns string, to netip.Addr) bool {
	t.Helper()
	answers := false
	netspacetest.In(t, netns, func() error {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, 8080).String(), 300*time.Millisecond)
		if err == nil {
			answers = true
			c.Close()
		}
		return nil
	})
	return !answers
}

// TestPolicies: a pod is isolated from its first packet on, whatever its status says, and
// by another process as well.
func TestPolicies(t *testing.T) {
	n := newNode(t)
	before := n.dump()
	n.start()
	d := desired()
	d.Policies = []*networkingv1.NetworkPolicy{from("one", "two")}
	d.Pods = []*corev1.Pod{labelled("one"), labelled("three")}
	n.set(d)
	attach := func(name string) (string, netip.Addr) {
		t.Helper()
		path := netspacetest.Namespace(t, name)
		addrs, err := n.plane.Attach(t.Context(), labelled(name), path)
		if err != nil {
			t.Fatal(err)
		}
		netplanetest.ServeTCP(t, path, 8080)
		return path, addrs[0]
	}
	one, _ := attach("one")
	two, a2 := attach("two")
	three, a3 := attach("three")
	check := func(when string) {
		t.Helper()
		if !blocked(t, three, a2) {
			t.Errorf("%s: pod three reaches pod two", when)
		}
		for name, netns := range map[string]string{"one": one, "the node": n.netns, "itself": two} {
			if blocked(t, netns, a2) {
				t.Errorf("%s: %s does not reach pod two", when, name)
			}
		}
		if blocked(t, two, a3) {
			t.Errorf("%s: pod two does not reach pod three", when)
		}
	}
	check("attached, before it is known")
	d.Pods = append(d.Pods, labelled("two"))
	n.set(d)
	check("known, without an address in its status")
	for name, want := range map[string]float64{"policies": 1, "policy_rules": 1, "policy_isolated_addresses": 1, "policy_failures_total": 0} {
		if got := n.metric("decree_netplane_" + name); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if n.metric("decree_netplane_policy_last_apply_seconds") <= 0 || n.metric("decree_netplane_policy_changes_total") <= 0 {
		t.Error("policies came into force in no time, or by no change")
	}
	n.stop()
	check("without a process")
	n.start()
	n.set(d)
	check("by another process")
	netspacetest.In(t, n.netns, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
	if blocked(t, three, a2) {
		t.Fatal("the tables are there")
	}
	if err := n.plane.Repair(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("repaired")
	n.unnamed(t, d, three, a2)
	d.Policies = nil
	n.set(d)
	if blocked(t, three, a2) {
		t.Error("without policies pod three does not reach pod two")
	}
	for _, name := range []string{"one", "two", "three"} {
		if err := n.plane.Detach(t.Context(), pod(name).UID, ""); err != nil {
			t.Fatal(err)
		}
	}
	n.stop()
	n.cfg.Registerer = nil
	p, err := netplane.New(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := n.dump(); after != before {
		t.Errorf("before\n%s\nafter purge\n%s", before, after)
	}
}

// metric is the value of a gauge or a counter of the node's Plane.
func (n *node) metric(name string) float64 {
	n.t.Helper()
	all, err := n.cfg.Registerer.(*prometheus.Registry).Gather()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			return f.Metric[0].GetGauge().GetValue() + f.Metric[0].GetCounter().GetValue()
		}
	}
	n.t.Fatalf("there is no metric %s", name)
	return 0
}

// unnamed: a process that knows nothing of a pod but its address lets nobody but the node
// talk to it.
func (n *node) unnamed(t *testing.T, d netplane.Desired, from string, to netip.Addr) {
	t.Helper()
	n.stop()
	n.start()
	d.Pods = nil
	n.set(d)
	if !blocked(t, from, to) {
		t.Error("a pod reaches one that nobody knows")
	}
	if blocked(t, n.netns, to) {
		t.Error("the node does not reach a pod that nobody knows")
	}
}
