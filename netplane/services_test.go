package netplane_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

// TestNodesServices: node ports and a load balancer's address on three nodes, as clients
// beyond the router, pods and nodes see them. Pods are on the first and the third.
func TestNodesServices(t *testing.T) {
	nodes := machines(t, 3)
	for _, n := range nodes {
		n.set(desiredOn(n, nodes))
	}
	pod1, a1 := nodes[0].attach("pod1")
	pod2, _ := nodes[1].attach("pod2")
	_, a3 := nodes[2].attach("pod3")
	owner := map[netip.Addr]*node{a1: nodes[0], a3: nodes[2]}
	balanced := netip.MustParseAddr("203.0.113.1")
	set := func(policy corev1.ServiceExternalTrafficPolicy) {
		t.Helper()
		for _, n := range nodes {
			n.set(balancedOn(n, nodes, policy, balanced, a1, a3))
		}
	}
	router := nodes[0].router
	at := func(n *node) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(n.address), 30080) }
	kept := func(source netip.Addr) bool { return source.As4()[3] == 254 } // the router's addresses
	// hits are the pods that a client reaches, with the sources that they see.
	hits := func(from string, to netip.AddrPort) map[netip.Addr]netip.Addr {
		t.Helper()
		out := map[netip.Addr]netip.Addr{}
		for range 30 {
			server, source := get(t, from, to)
			out[server.Addr()] = source.Addr()
		}
		return out
	}

	set(corev1.ServiceExternalTrafficPolicyCluster)
	for _, n := range nodes {
		got := hits(router, at(n))
		if len(got) != 2 {
			t.Errorf("node port of %s leads to %v, want %s and %s", n.name, got, a1, a3)
		}
		for server, source := range got {
			if kept(source) != (owner[server] == n) {
				t.Errorf("%s, on %s, is reached by the node port of %s from %s", server, owner[server].name, n.name, source)
			}
		}
	}
	for _, from := range []string{pod1, pod2, nodes[1].netns} {
		if got := hits(from, at(nodes[1])); len(got) != 2 {
			t.Errorf("node port of %s from within leads to %v", nodes[1].name, got)
		}
	}
	netspacetest.Route(t, router, balanced.String()+"/32", nodes[1].address, "") // it is announced there
	if got := hits(router, netip.AddrPortFrom(balanced, 80)); len(got) != 2 {
		t.Errorf("the load balancer's address leads to %v", got)
	}
	if err := reach(router, netip.AddrPortFrom(balanced, 81)); err == nil {
		t.Error("the load balancer's address answers at a port that no service has")
	}

	set(corev1.ServiceExternalTrafficPolicyLocal)
	for server, n := range owner {
		got := hits(router, at(n))
		if len(got) != 1 || !kept(got[server]) {
			t.Errorf("with policy Local the node port of %s leads to %v, want %s alone and the client's own address", n.name, got, server)
		}
	}
	for _, to := range []netip.AddrPort{at(nodes[1]), netip.AddrPortFrom(balanced, 80)} {
		if err := reach(router, to); err == nil {
			t.Errorf("with policy Local %s answers without a pod on its node", to)
		}
		for _, from := range []string{pod2, nodes[1].netns} {
			if got := hits(from, to); len(got) != 2 {
				t.Errorf("%s from within its node leads to %v", to, got)
			}
		}
	}
}

// TestAnnounced: an address of the nodes' own network is found by who asks for it there,
// and found elsewhere once the node that announced it is lost.
func TestAnnounced(t *testing.T) {
	nodes := machines(t, 4) // the last one is in another network, and holds the endpoint
	for _, n := range nodes {
		n.set(desiredOn(n, nodes))
	}
	_, a := nodes[3].attach("pod")
	balanced := netip.MustParseAddr("192.168.1.200")
	set := func(lost string) (announcer string) {
		t.Helper()
		for _, n := range nodes {
			d := balancedOn(n, nodes, corev1.ServiceExternalTrafficPolicyCluster, balanced, a)
			d.Announced = []netip.Prefix{netip.MustParsePrefix("192.168.1.200/29")}
			for _, o := range d.Nodes {
				o.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
				if o.Name == nodes[3].name || o.Name == lost {
					o.Labels = map[string]string{corev1.LabelNodeExcludeBalancers: ""}
				}
			}
			if n.name != lost {
				n.set(d)
			}
			announcer = render.Announcements(d)[0].Node
		}
		return announcer
	}
	router := nodes[0].router
	first := set("")
	get(t, router, netip.AddrPortFrom(balanced, 80))
	if err := reach(router, netip.AddrPortFrom(balanced, 22)); err == nil {
		t.Error("the address answers at a port that no service has")
	}
	for _, n := range nodes {
		if n.name == first { // its machine is off, as far as others see
			netspacetest.In(t, n.netns, func() error {
				l, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				return netlink.LinkSetDown(l)
			})
		}
	}
	if second := set(first); second == first || second == "" {
		t.Fatalf("announced by %q after %q was lost", second, first)
	}
	get(t, router, netip.AddrPortFrom(balanced, 80))
}

// balancedOn is [desiredOn] with a load balancer; each backend is on the node of which it
// has an address.
func balancedOn(self *node, nodes []*node, policy corev1.ServiceExternalTrafficPolicy, balanced netip.Addr, backends ...netip.Addr) netplane.Desired {
	d := desiredOn(self, nodes, backends...)
	d.Announced = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
	svc := d.Services[0]
	svc.Spec.Type, svc.Spec.ExternalTrafficPolicy, svc.Spec.Ports[0].NodePort = corev1.ServiceTypeLoadBalancer, policy, 30080
	svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: balanced.String()}}
	for i, a := range backends {
		name := fmt.Sprint("n", a.As4()[2])
		d.Slices[0].Endpoints[i].NodeName = &name
	}
	return d
}
