package render

import (
	"fmt"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// announced is a cluster whose load balancers have addresses, all at nodes n1 to n3.
func announced(policy corev1.ServiceExternalTrafficPolicy, addrs []netip.Addr, eps ...*discoveryv1.EndpointSlice) Desired {
	var services []*corev1.Service
	for i, a := range addrs {
		s := svc(fmt.Sprint("s", i), corev1.ServiceSpec{Type: "LoadBalancer", ClusterIP: "10.97.0.1", ExternalTrafficPolicy: policy, Ports: []corev1.ServicePort{{Name: "p", Port: 80}}})
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: a.String()}}
		services = append(services, s)
	}
	d := cluster(services, eps...)
	d.Announced = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:1::/64")}
	return d
}

// announcers is who announces what, as every node by itself decides.
func announcers(t *testing.T, d Desired) map[netip.Addr]string {
	t.Helper()
	out := map[netip.Addr]string{}
	for _, n := range d.Nodes {
		d.Node = n.Name
		for _, a := range Announcing(d) {
			if out[a] != "" {
				t.Errorf("%s is announced by %s and %s", a, out[a], n.Name)
			}
			out[a] = n.Name
		}
	}
	return out
}

func notReady(n *corev1.Node) {
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionUnknown}}
}

// TestAnnouncing: every address is announced by one node, all nodes have their share, and
// the loss of one moves only what it had.
func TestAnnouncing(t *testing.T) {
	var addrs []netip.Addr
	for a := netip.MustParseAddr("203.0.113.1"); len(addrs) < 90; a = a.Next() {
		addrs = append(addrs, a)
	}
	for a := netip.MustParseAddr("2001:db8:1::1"); len(addrs) < 180; a = a.Next() {
		addrs = append(addrs, a)
	}
	d := announced(corev1.ServiceExternalTrafficPolicyCluster, addrs)
	before := announcers(t, d)
	share := map[string]int{}
	for _, n := range before {
		share[n]++
	}
	if len(before) != len(addrs) || share["n1"] < 30 || share["n2"] < 30 || share["n3"] < 30 {
		t.Errorf("%d of %d addresses are announced: %v", len(before), len(addrs), share)
	}
	notReady(d.Nodes[1])
	for a, n := range announcers(t, d) {
		if n == "n2" || before[a] != "n2" && n != before[a] {
			t.Errorf("%s moved from %s to %s when n2 was lost", a, before[a], n)
		}
	}
	d.Nodes[2].Labels[corev1.LabelNodeExcludeBalancers] = ""
	for a, n := range announcers(t, d) {
		if n != "n1" {
			t.Errorf("%s is announced by %s, which is excluded", a, n)
		}
	}
	notReady(d.Nodes[0])
	if got := announcers(t, d); len(got) > 0 {
		t.Errorf("nodes that are not fit announce %v", got)
	}
}

// TestAnnouncingLocal: where the endpoints are, if traffic is to stay there.
func TestAnnouncingLocal(t *testing.T) {
	const v4 = discoveryv1.AddressTypeIPv4
	balanced := netip.MustParseAddr("203.0.113.7")
	for _, c := range []struct{ endpoint, want string }{
		{"10.98.1.2 @n2", "map[203.0.113.7:n2]"},
		{"10.98.2.2 @n3", "map[203.0.113.7:n3]"},
		{"10.98.1.2 @n2 notready", "map[]"},
		{"10.98.1.2", "map[]"},
	} {
		d := announced(corev1.ServiceExternalTrafficPolicyLocal, []netip.Addr{balanced}, slice("s0", v4, 8080, c.endpoint))
		if got := fmt.Sprint(announcers(t, d)); got != c.want {
			t.Errorf("endpoint %s: %s, want %s", c.endpoint, got, c.want)
		}
	}
}

// TestAnnouncingNot: what is not of the cluster's own addresses is not announced.
func TestAnnouncingNot(t *testing.T) {
	d := announced(corev1.ServiceExternalTrafficPolicyCluster, []netip.Addr{netip.MustParseAddr("198.51.100.1")})
	if got := announcers(t, d); len(got) > 0 {
		t.Error(got)
	}
	d = announced(corev1.ServiceExternalTrafficPolicyCluster, []netip.Addr{netip.MustParseAddr("203.0.113.1")})
	d.Services[0].Spec.Type = corev1.ServiceTypeNodePort
	if got := announcers(t, d); len(got) > 0 {
		t.Error(got)
	}
}

// TestWeight has values that nodes of all versions must agree on.
func TestWeight(t *testing.T) {
	if got := weight(netip.MustParseAddr("203.0.113.7"), "n1"); got != 0xcae90e1bf048659a {
		t.Errorf("%#x", got)
	}
}
