package render

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

// node is a node in a zone, with addresses of its own.
func node(name, zone string, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: zone}}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

// cluster is what these services and slices look like from node n1.
func cluster(services []*corev1.Service, eps ...*discoveryv1.EndpointSlice) Desired {
	return Desired{
		Node: "n1", Services: services, Slices: eps,
		Nodes:       []*corev1.Node{node("n1", "za", "192.0.2.1", "2001:db8::1"), node("n2", "za", "192.0.2.2"), node("n3", "zb", "192.0.2.3")},
		ServiceCIDR: []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16")}, ClusterCIDR: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")},
	}
}

func TestExternal(t *testing.T) {
	const v4, v6 = discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	http := []corev1.ServicePort{{Name: "p", Port: 80, NodePort: 30080}}
	here, there := "10.98.0.2 @n1", "10.98.1.2 @n2"
	for _, c := range []struct {
		name    string
		spec    corev1.ServiceSpec
		ingress []corev1.LoadBalancerIngress
		eps     []string
		want    string // a line each
	}{
		{"node port", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http}, nil, []string{here, there},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.1.2:8080]|tcp 192.0.2.1:30080 -> [10.98.0.2:8080 10.98.1.2:8080]"},
		{"node port of another type", corev1.ServiceSpec{Type: "ClusterIP", ClusterIP: "10.97.0.1", Ports: http}, nil, nil, "tcp 10.97.0.1:80 -> []"},
		{"node port, none", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http}, nil, nil, "tcp 10.97.0.1:80 -> []|tcp 192.0.2.1:30080 -> []"},
		{"both families", corev1.ServiceSpec{Type: "NodePort", ClusterIPs: []string{"10.97.0.1", "fd97::1"}, Ports: http}, nil, []string{here},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]|tcp 192.0.2.1:30080 -> [10.98.0.2:8080]|tcp [2001:db8::1]:30080 -> []|tcp [fd97::1]:80 -> []"},
		{"headless", corev1.ServiceSpec{ClusterIP: "None", ExternalIPs: []string{"203.0.113.9"}, Ports: http}, nil, []string{here}, ""},
		{"local", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http, ExternalTrafficPolicy: "Local"}, nil, []string{here, there},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.1.2:8080]|tcp 192.0.2.1:30080 -> [10.98.0.2:8080 10.98.1.2:8080] outside [10.98.0.2:8080]"},
		{"local, none here", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http, ExternalTrafficPolicy: "Local"}, nil, []string{there},
			"tcp 10.97.0.1:80 -> [10.98.1.2:8080]|tcp 192.0.2.1:30080 -> [10.98.1.2:8080] outside []"},
		{"local, all here", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http, ExternalTrafficPolicy: "Local"}, nil, []string{here},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]|tcp 192.0.2.1:30080 -> [10.98.0.2:8080]"},
		{"local, none at all", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http, ExternalTrafficPolicy: "Local"}, nil, nil,
			"tcp 10.97.0.1:80 -> []|tcp 192.0.2.1:30080 -> []"},
		{"local, ending here", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.1", Ports: http, ExternalTrafficPolicy: "Local"}, nil,
			[]string{here + " notready serving terminating", there},
			"tcp 10.97.0.1:80 -> [10.98.1.2:8080]|tcp 192.0.2.1:30080 -> [10.98.1.2:8080] outside [10.98.0.2:8080]"},
		{"internal local, none here", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: http, InternalTrafficPolicy: ptr(corev1.ServiceInternalTrafficPolicyLocal)}, nil,
			[]string{there}, "tcp 10.97.0.1:80 -> [] drop"},
		{"internal local, none at all", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: http, InternalTrafficPolicy: ptr(corev1.ServiceInternalTrafficPolicyLocal)}, nil,
			nil, "tcp 10.97.0.1:80 -> []"},
		{"internal local is not external", corev1.ServiceSpec{ClusterIP: "10.97.0.1", ExternalIPs: []string{"203.0.113.9"}, Ports: http, InternalTrafficPolicy: ptr(corev1.ServiceInternalTrafficPolicyLocal)}, nil,
			[]string{there}, "tcp 10.97.0.1:80 -> [] drop|tcp 203.0.113.9:80 -> [10.98.1.2:8080]"},
		{"load balancer", corev1.ServiceSpec{Type: "LoadBalancer", ClusterIP: "10.97.0.1", Ports: http, LoadBalancerSourceRanges: []string{"198.51.100.0/24", " 192.0.2.0/25", "198.51.100.64/26", "2001:db8::/32"}},
			[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}, {IP: "203.0.113.8", IPMode: ptr(corev1.LoadBalancerIPModeProxy)}, {Hostname: "lb"}}, []string{here},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]|tcp 192.0.2.1:30080 -> [10.98.0.2:8080]|tcp 203.0.113.7:80 -> [10.98.0.2:8080] from [192.0.2.0/25 198.51.100.0/24]"},
		{"load balancer for everybody", corev1.ServiceSpec{Type: "LoadBalancer", ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "p", Port: 80}}, LoadBalancerSourceRanges: []string{"0.0.0.0/0"}},
			[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}, []string{here}, "tcp 10.97.0.1:80 -> [10.98.0.2:8080]|tcp 203.0.113.7:80 -> [10.98.0.2:8080]"},
		{"load balancer for the other family", corev1.ServiceSpec{Type: "LoadBalancer", ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "p", Port: 80}}, LoadBalancerSourceRanges: []string{"2001:db8::/32"}},
			[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}, []string{here}, "tcp 10.97.0.1:80 -> [10.98.0.2:8080]|tcp 203.0.113.7:80 -> [] drop"},
		{"external addresses", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "p", Port: 80}},
			ExternalIPs: []string{"203.0.113.9", "203.0.113.9", "192.0.2.1", "10.97.0.2", "10.98.0.2", "127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "nonsense", "2001:db8::9"}}, nil, []string{here},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]|tcp 192.0.2.1:80 -> [10.98.0.2:8080]|tcp 203.0.113.9:80 -> [10.98.0.2:8080]"},
	} {
		svc := svc("s", c.spec)
		svc.Status.LoadBalancer.Ingress = c.ingress
		got := Render(cluster([]*corev1.Service{svc}, slice("s", v4, 8080, c.eps...), slice("s", v6, 8080)))
		if want := strings.ReplaceAll(c.want+"|", "|", "\n"); c.want != "" && text(got) != want || c.want == "" && len(got.Services) > 0 {
			t.Errorf("%s:\n%swant\n%s", c.name, text(got), want)
		}
	}
}

// TestPreference: hints, and where there are none, what the service prefers.
func TestPreference(t *testing.T) {
	for _, c := range []struct {
		name, preference string
		eps              []string
		want             string // the last number of each address
	}{
		{"none", "", []string{"10.98.0.1 @n1 %za", "10.98.0.2 @n2 %za", "10.98.0.3 @n3 %zb"}, "1 2 3"},
		{"zone", "PreferSameZone", []string{"10.98.0.1 @n1 %za", "10.98.0.2 @n2 %za", "10.98.0.3 @n3 %zb"}, "1 2"},
		{"close", "PreferClose", []string{"10.98.0.1 @n1 %za", "10.98.0.2 @n2 %za", "10.98.0.3 @n3 %zb"}, "1 2"},
		{"node", "PreferSameNode", []string{"10.98.0.1 @n1 %za", "10.98.0.2 @n2 %za", "10.98.0.3 @n3 %zb"}, "1"},
		{"node, else zone", "PreferSameNode", []string{"10.98.0.2 @n2 %za", "10.98.0.3 @n3 %zb"}, "2"},
		{"node, else all", "PreferSameNode", []string{"10.98.0.3 @n3 %zb", "10.98.0.4 @n4 %zc"}, "3 4"},
		{"one without zone", "PreferSameZone", []string{"10.98.0.1 @n1 %za", "10.98.0.2 @n2", "10.98.0.3 @n3 %zb"}, "1 2 3"},
		{"one without node", "PreferSameNode", []string{"10.98.0.1 @n1 %za", "10.98.0.2 %za", "10.98.0.3 @n3 %zb"}, "1 2"},
		{"zone without ready ones", "PreferSameZone", []string{"10.98.0.1 @n1 %za notready", "10.98.0.3 @n3 %zb"}, "3"},
		{"unready ones do not count", "PreferSameZone", []string{"10.98.0.1 @n1 %za", "10.98.0.2 @n2 notready", "10.98.0.3 @n3 %zb"}, "1"},
		{"only ending ones", "PreferSameZone", []string{"10.98.0.1 @n1 %za notready serving terminating", "10.98.0.3 @n3 %zb notready serving terminating"}, "1 3"},
		{"hints", "", []string{"10.98.0.1 @n1 %za hint%zb", "10.98.0.2 @n2 %za hint%za hint%zb", "10.98.0.3 @n3 %zb hint%za"}, "2 3"},
		{"hints win", "PreferSameNode", []string{"10.98.0.1 @n1 hint%za", "10.98.0.2 @n2 hint%za"}, "1 2"},
		{"node hints", "", []string{"10.98.0.1 @n1 hint@n2 hint%za", "10.98.0.2 @n2 hint@n1 hint%za"}, "2"},
		{"node hints for others", "", []string{"10.98.0.1 hint@n2 hint%za", "10.98.0.2 hint@n3 hint%zb"}, "1"},
		{"hints for some", "", []string{"10.98.0.1 hint%za", "10.98.0.2"}, "1 2"},
		{"hints for nobody here", "", []string{"10.98.0.1 hint%zb", "10.98.0.2 hint%zc"}, "1 2"},
	} {
		spec := corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "p", Port: 80}}}
		if c.preference != "" {
			spec.TrafficDistribution = &c.preference
		}
		table := Render(cluster([]*corev1.Service{svc("s", spec)}, slice("s", discoveryv1.AddressTypeIPv4, 8080, c.eps...)))
		var got []string
		for _, ep := range table.Services[0].Endpoints {
			got = append(got, fmt.Sprint(ep.Addr().As4()[3]))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

// TestNear: the endpoints on this node that services use.
func TestNear(t *testing.T) {
	spec := corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "p", Port: 80}}}
	got := Render(cluster([]*corev1.Service{svc("s", spec)},
		slice("s", discoveryv1.AddressTypeIPv4, 8080, "10.98.0.3 @n1", "10.98.0.2 @n1", "10.98.0.4 @n1 notready", "10.98.1.2 @n2", "10.98.2.2"),
		slice("other", discoveryv1.AddressTypeIPv4, 8080, "10.98.0.9 @n1")))
	if fmt.Sprint(got.Near) != "[10.98.0.2 10.98.0.3]" {
		t.Error(got.Near)
	}
}

// TestClaims: nobody takes another service's port by calling its address external.
func TestClaims(t *testing.T) {
	port := func(port, nodePort int32) []corev1.ServicePort {
		return []corev1.ServicePort{{Name: "p", Port: port, NodePort: nodePort}}
	}
	thief := svc("a", corev1.ServiceSpec{ClusterIP: "10.97.0.1", ExternalIPs: []string{"10.97.0.2", "192.0.2.1", "203.0.113.7"}, Ports: port(80, 0)})
	balanced := svc("b", corev1.ServiceSpec{Type: "LoadBalancer", ClusterIP: "10.97.0.2", Ports: port(80, 0)})
	balanced.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}
	byNode := svc("c", corev1.ServiceSpec{Type: "NodePort", ClusterIP: "10.97.0.3", Ports: port(81, 80)})
	eps := func(name, addr string) *discoveryv1.EndpointSlice {
		return slice(name, discoveryv1.AddressTypeIPv4, 1, addr)
	}
	got := Render(cluster([]*corev1.Service{thief, balanced, byNode}, eps("a", "10.98.0.1"), eps("b", "10.98.0.2"), eps("c", "10.98.0.3")))
	const want = "tcp 10.97.0.1:80 -> [10.98.0.1:1]\ntcp 10.97.0.2:80 -> [10.98.0.2:1]\ntcp 10.97.0.3:81 -> [10.98.0.3:1]\n" +
		"tcp 192.0.2.1:80 -> [10.98.0.3:1]\ntcp 203.0.113.7:80 -> [10.98.0.2:1]\n"
	if text(got) != want {
		t.Errorf("%swant\n%s", text(got), want)
	}
}

// TestHostPorts: ports of this node that lead to its pods, and to none that ended or is
// in the node's own network.
func TestHostPorts(t *testing.T) {
	pod := func(name, nodeName string, phase corev1.PodPhase, ports []corev1.ContainerPort, ips ...string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Status: corev1.PodStatus{Phase: phase}}
		p.Spec.NodeName, p.Spec.Containers = nodeName, []corev1.Container{{Name: "c", Ports: ports}}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		return p
	}
	http := []corev1.ContainerPort{{ContainerPort: 8080, HostPort: 80}, {ContainerPort: 9090}}
	inHost := pod("e", "n1", corev1.PodRunning, []corev1.ContainerPort{{ContainerPort: 84, HostPort: 84}}, "192.0.2.1")
	inHost.Spec.HostNetwork = true
	d := cluster(nil)
	d.Pods = []*corev1.Pod{
		pod("b", "n1", corev1.PodRunning, http, "10.98.0.3"), // a has the port
		pod("a", "n1", corev1.PodRunning, http, "10.98.0.2", "fd98::2"),
		pod("c", "n2", corev1.PodRunning, http, "10.98.1.2"),
		pod("d", "n1", corev1.PodFailed, []corev1.ContainerPort{{ContainerPort: 1, HostPort: 83}}, "10.98.0.4"),
		inHost,
		pod("f", "n1", corev1.PodPending, []corev1.ContainerPort{{ContainerPort: 1, HostPort: 85}}),
		pod("g", "n1", corev1.PodRunning, []corev1.ContainerPort{
			{ContainerPort: 1, HostPort: 86, HostIP: "192.0.2.1", Protocol: "UDP"}, {ContainerPort: 1, HostPort: 87, HostIP: "192.0.2.2"},
			{ContainerPort: 1, HostPort: 88, HostIP: "0.0.0.0", Protocol: "SCTP"},
		}, "10.98.0.5"),
	}
	got := Render(d)
	const want = "tcp 192.0.2.1:80 -> [10.98.0.2:8080]\nudp 192.0.2.1:86 -> [10.98.0.5:1]\nsctp 192.0.2.1:88 -> [10.98.0.5:1]\ntcp [2001:db8::1]:80 -> [[fd98::2]:8080]\n"
	if text(got) != want {
		t.Errorf("%swant\n%s", text(got), want)
	}
	if fmt.Sprint(got.Near) != "[10.98.0.2 10.98.0.3 10.98.0.5 fd98::2]" {
		t.Error(got.Near)
	}
}

// TestInvariants: what Table promises holds for any services, in any order.
func TestInvariants(t *testing.T) {
	const v4 = discoveryv1.AddressTypeIPv4
	rapid.Check(t, func(t *rapid.T) {
		var services []*corev1.Service
		var eps []*discoveryv1.EndpointSlice
		addrs := rapid.SliceOfN(rapid.SampledFrom([]string{"10.97.0.1", "10.97.0.2", "192.0.2.1", "203.0.113.1", "203.0.113.2"}), 0, 3)
		policy := rapid.SampledFrom([]string{"Cluster", "Local"})
		for i := range rapid.IntRange(0, 4).Draw(t, "services") {
			internal := corev1.ServiceInternalTrafficPolicy(policy.Draw(t, "internal"))
			s := svc(fmt.Sprint("s", i), corev1.ServiceSpec{
				Type: corev1.ServiceType(rapid.SampledFrom([]string{"ClusterIP", "NodePort", "LoadBalancer"}).Draw(t, "type")), ClusterIP: fmt.Sprint("10.97.0.", rapid.IntRange(1, 3).Draw(t, "ip")),
				Ports:       []corev1.ServicePort{{Name: "p", Port: 80, NodePort: rapid.Int32Range(79, 81).Draw(t, "node port")}},
				ExternalIPs: addrs.Draw(t, "external"), ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicy(policy.Draw(t, "external policy")), InternalTrafficPolicy: &internal,
				SessionAffinity:          rapid.SampledFrom([]corev1.ServiceAffinity{"None", "ClientIP"}).Draw(t, "affinity"),
				LoadBalancerSourceRanges: rapid.SliceOfN(rapid.SampledFrom([]string{"10.0.0.0/8", "10.98.0.0/16", "0.0.0.0/0", "192.0.2.0/24", "::/0", "x"}), 0, 3).Draw(t, "sources"),
			})
			for _, a := range addrs.Draw(t, "ingress") {
				s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
			}
			services = append(services, s)
			for j, state := range rapid.SliceOfN(rapid.SampledFrom([]string{"@n1", "@n2", "@n1 notready serving terminating", "@n2 notready", ""}), 0, 4).Draw(t, "endpoints") {
				eps = append(eps, slice(s.Name, v4, 8080, fmt.Sprintf("10.98.0.%d %s", j, state)))
			}
		}
		got := Render(cluster(services, eps...))
		if other := Render(cluster(rapid.Permutation(services).Draw(t, "order"), rapid.Permutation(eps).Draw(t, "order of slices")...)); !got.Equal(other) {
			t.Fatalf("%s\nin another order\n%s", text(got), text(other))
		}
		near := map[netip.Addr]bool{}
		for _, a := range got.Near {
			near[a] = true
		}
		if !slices.IsSortedFunc(got.Near, netip.Addr.Compare) || len(near) != len(got.Near) {
			t.Fatalf("near: %v", got.Near)
		}
		for i, s := range got.Services {
			promise := func(kept bool, what string) {
				if !kept {
					t.Fatalf("%s: %s\n%s", s.Port, what, text(got))
				}
			}
			promise(i == 0 || got.Services[i-1].Compare(s.Port) < 0, "not in order")
			promise(len(s.Endpoints) > 0 || !s.Split && len(s.Sources) == 0 && s.Affinity == 0, "says more than that there is nothing")
			promise(len(s.Endpoints) == 0 || !s.Drop, "drops what it leads on")
			promise(s.Split || len(s.Outside) == 0, "leads outside without a split")
			promise(!s.Split || !slices.Equal(s.Endpoints, s.Outside), "splits what is the same")
			promise(slices.IsSortedFunc(s.Sources, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) }), "sources not in order")
			for _, ep := range s.Outside {
				promise(near[ep.Addr()], "leads outside to an endpoint elsewhere")
			}
		}
	})
}
