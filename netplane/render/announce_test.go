package render

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/schemas/api"
)

func readyNode(name string, edits ...func(*corev1.Node)) *corev1.Node {
	n := node(name, "za")
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	for _, edit := range edits {
		edit(n)
	}
	return n
}

func balanced(name string, policy corev1.ServiceExternalTrafficPolicy, ips ...string) *corev1.Service {
	s := svc(name, corev1.ServiceSpec{Type: "LoadBalancer", ExternalTrafficPolicy: policy})
	for _, ip := range ips {
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
	}
	return s
}

func TestAnnouncements(t *testing.T) {
	silent := func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown }
	excluded := func(n *corev1.Node) { n.Labels[corev1.LabelNodeExcludeBalancers] = "" }
	nodes := []*corev1.Node{readyNode("n1", silent), readyNode("n2", excluded), readyNode("n3"), node("n4", "za")}
	got := Announcements(Desired{
		Nodes: nodes,
		Services: []*corev1.Service{
			balanced("b", "Cluster", "203.0.113.2", "2001:db8::2"), balanced("a", "Cluster", "203.0.113.2", "203.0.113.1"),
			balanced("local", "Local", "203.0.113.3", "2001:db8::3"), balanced("far", "Local", "203.0.113.4"),
			svc("no", corev1.ServiceSpec{Type: "ClusterIP"}), balanced("bad", "Cluster", "nonsense", "fe80::1%eth0"),
		},
		Slices: []*discoveryv1.EndpointSlice{
			slice("local", discoveryv1.AddressTypeIPv4, 80, "10.98.0.1 @n3", "10.98.0.2 @n1"), slice("local", discoveryv1.AddressTypeIPv6, 80, "fd98::1 @n3 notready"),
			slice("far", discoveryv1.AddressTypeIPv4, 80, "10.98.0.1 @n1", "10.98.0.3"),
		},
	})
	var lines []string
	for _, a := range got {
		lines = append(lines, fmt.Sprint(a.Addr, " ", a.Name, " ", a.Node))
	}
	want := "203.0.113.1 a n3|203.0.113.2 a n3|203.0.113.3 local n3|203.0.113.4 far |2001:db8::2 b n3|2001:db8::3 local "
	if strings.Join(lines, "|") != want {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.ReplaceAll(want, "|", "\n"))
	}
}

// TestElection: the order of objects does not matter, every able node gets its share, and
// the loss of one moves what it had and nothing else.
func TestElection(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var d Desired
		for i := range rapid.IntRange(2, 9).Draw(t, "nodes") {
			d.Nodes = append(d.Nodes, readyNode(fmt.Sprint("n", i)))
		}
		for i := range 200 {
			d.Services = append(d.Services, balanced(fmt.Sprint("s", i), "Cluster", netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}).String()))
		}
		before := Announcements(d)
		shuffled := d
		shuffled.Nodes = rapid.Permutation(d.Nodes).Draw(t, "order")
		if fmt.Sprint(Announcements(shuffled)) != fmt.Sprint(before) {
			t.Fatal("another order of nodes elects others")
		}
		lost := shuffled.Nodes[0].Name
		shuffled.Nodes = shuffled.Nodes[1:]
		share := 0
		for i, after := range Announcements(shuffled) {
			if before[i].Node == lost {
				share++
			} else if after != before[i] {
				t.Fatalf("%v became %v when %s was lost", before[i], after, lost)
			}
		}
		if fair := 200 / len(d.Nodes); share < fair/3 || share > fair*3 {
			t.Fatalf("%s had %d of 200 services among %d nodes", lost, share, len(d.Nodes))
		}
	})
}

// TestNetworks: who stands on an address's network announces it, whatever the ranks; where
// nobody does, anybody.
func TestNetworks(t *testing.T) {
	on := func(networks string) func(*corev1.Node) {
		return func(n *corev1.Node) { n.Annotations = map[string]string{api.AnnotationNetworks: networks} }
	}
	silent := func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionUnknown }
	nodes := []*corev1.Node{
		readyNode("n1", on("192.168.1.0/24, fd00:1::/64")), readyNode("n2", on("192.168.2.0/24,nonsense")), readyNode("n3"),
		readyNode("n4", on("192.168.4.0/24"), silent), readyNode("n5", on("192.168.0.0/16")),
	}
	var services []*corev1.Service
	var eps []*discoveryv1.EndpointSlice
	for i := range 40 { // of all ranks
		name := fmt.Sprint("s", i)
		services = append(services, balanced(name, "Cluster", fmt.Sprint("192.168.1.", i), fmt.Sprint("192.168.2.", i), fmt.Sprint("203.0.113.", i), fmt.Sprint("fd00:1::", i+1)))
		local := fmt.Sprint("l", i)
		services = append(services, balanced(local, "Local", fmt.Sprint("192.168.1.", 100+i), fmt.Sprint("fd00:1::1:", i)))
		eps = append(eps, slice(local, discoveryv1.AddressTypeIPv4, 80, "10.98.0.1 @n2", "10.98.0.2 @n5"), slice(local, discoveryv1.AddressTypeIPv6, 80, "fd98::1 @n2"))
	}
	services = append(services, balanced("off", "Cluster", "192.168.4.1"))
	got := map[string]map[string]bool{}
	for _, a := range Announcements(Desired{Nodes: nodes, Services: services, Slices: eps}) {
		network, _ := a.Addr.Prefix(24)
		if a.Addr.Is6() {
			network, _ = a.Addr.Prefix(64)
		}
		key := fmt.Sprint(network, " ", a.Name[:1])
		if got[key] == nil {
			got[key] = map[string]bool{}
		}
		got[key][a.Node] = true
	}
	want := "map[192.168.1.0/24 l:map[n5:true] 192.168.1.0/24 s:map[n1:true n5:true] 192.168.2.0/24 s:map[n2:true n5:true] 192.168.4.0/24 o:map[n5:true] " +
		"203.0.113.0/24 s:map[n1:true n2:true n3:true n5:true] fd00:1::/64 l:map[:true] fd00:1::/64 s:map[n1:true]]"
	if fmt.Sprint(got) != want {
		t.Errorf("got\n%v\nwant\n%s", got, want)
	}
}
