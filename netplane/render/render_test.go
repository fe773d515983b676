package render

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

func ptr[T any](v T) *T { return &v }

func svc(name string, spec corev1.ServiceSpec) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: name}, Spec: spec}
}

// ep is an endpoint: address, then any of notready, serving, notserving, terminating,
// @node, %zone, and hint@node and hint%zone.
func ep(words string) discoveryv1.Endpoint {
	f := strings.Fields(words)
	e := discoveryv1.Endpoint{Addresses: []string{f[0]}}
	for _, w := range f[1:] {
		switch {
		case w == "notready":
			e.Conditions.Ready = ptr(false)
		case w == "serving":
			e.Conditions.Serving = ptr(true)
		case w == "notserving":
			e.Conditions.Serving = ptr(false)
		case w == "terminating":
			e.Conditions.Terminating = ptr(true)
		case w[0] == '@':
			e.NodeName = ptr(w[1:])
		case w[0] == '%':
			e.Zone = ptr(w[1:])
		case strings.HasPrefix(w, "hint@"):
			e.Hints = cmp.Or(e.Hints, &discoveryv1.EndpointHints{})
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: w[5:]})
		case strings.HasPrefix(w, "hint%"):
			e.Hints = cmp.Or(e.Hints, &discoveryv1.EndpointHints{})
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: w[5:]})
		}
	}
	return e
}

func slice(svc string, family discoveryv1.AddressType, port int32, eps ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "d", Labels: map[string]string{discoveryv1.LabelServiceName: svc}},
		AddressType: family, Ports: []discoveryv1.EndpointPort{{Name: ptr("p"), Port: &port}},
	}
	for _, e := range eps {
		s.Endpoints = append(s.Endpoints, ep(e))
	}
	return s
}

// text is a table's services, a line each.
func text(t Table) string {
	var b strings.Builder
	for _, s := range t.Services {
		fmt.Fprintf(&b, "%s -> %v", s.Port, s.Endpoints)
		if s.Split {
			fmt.Fprintf(&b, " outside %v", s.Outside)
		}
		if s.Drop {
			b.WriteString(" drop")
		}
		if len(s.Sources) > 0 {
			fmt.Fprintf(&b, " from %v", s.Sources)
		}
		if s.Affinity > 0 {
			fmt.Fprintf(&b, " %s", s.Affinity)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func TestRender(t *testing.T) {
	port := []corev1.ServicePort{{Name: "p", Port: 80}}
	const v4, v6 = discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	local := corev1.ServiceInternalTrafficPolicyLocal
	for _, c := range []struct {
		name   string
		svc    corev1.ServiceSpec
		slices []*discoveryv1.EndpointSlice
		want   string
	}{
		{"ready", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.3", "10.98.0.2", "10.98.0.4 notready", "10.98.0.5 notready serving terminating")},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.0.3:8080]\n"},
		{"terminating only", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.4 notready", "10.98.0.5 notready serving terminating", "10.98.0.6 notready notserving terminating", "10.98.0.7 notready serving")},
			"tcp 10.97.0.1:80 -> [10.98.0.5:8080]\n"},
		{"none", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port}, nil, "tcp 10.97.0.1:80 -> []\n"},
		{"merged", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.3", "10.98.0.2"), slice("s", v4, 8080, "10.98.0.2"), slice("s", v4, 9090, "10.98.0.2"), slice("other", v4, 1, "10.98.0.9")},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080 10.98.0.2:9090 10.98.0.3:8080]\n"},
		{"headless", corev1.ServiceSpec{ClusterIP: "None", Ports: port}, nil, ""},
		{"no address yet", corev1.ServiceSpec{Ports: port}, nil, ""},
		{"external", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ClusterIP: "10.97.0.1", Ports: port}, nil, ""},
		{"bad port", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Port: 70000}, {Port: 1, Protocol: "ICMP"}}}, nil, ""},
		{"bad endpoints", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "nonsense", "fd98::1", "10.98.0.2"), slice("s", discoveryv1.AddressTypeFQDN, 8080, "10.98.0.3"), slice("s", v4, 0, "10.98.0.4")},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]\n"},
		{"dual stack", corev1.ServiceSpec{ClusterIPs: []string{"10.97.0.1", "fd97::1"}, Ports: port},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.2"), slice("s", v6, 8080, "fd98::2")},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]\ntcp [fd97::1]:80 -> [[fd98::2]:8080]\n"},
		{"protocols", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "s", Port: 3, Protocol: "SCTP"}, {Name: "u", Port: 2, Protocol: "UDP"}, {Name: "p", Port: 1}}},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.2")},
			"tcp 10.97.0.1:1 -> [10.98.0.2:8080]\nudp 10.97.0.1:2 -> []\nsctp 10.97.0.1:3 -> []\n"},
		{"affinity", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port, SessionAffinity: corev1.ServiceAffinityClientIP},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.2")}, "tcp 10.97.0.1:80 -> [10.98.0.2:8080] 3h0m0s\n"},
		{"affinity to nothing", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port, SessionAffinity: corev1.ServiceAffinityClientIP}, nil, "tcp 10.97.0.1:80 -> []\n"},
		{"affinity timeout", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port, SessionAffinity: corev1.ServiceAffinityClientIP,
			SessionAffinityConfig: &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(60))}}},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.2")}, "tcp 10.97.0.1:80 -> [10.98.0.2:8080] 1m0s\n"},
		{"local", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: port, InternalTrafficPolicy: &local},
			[]*discoveryv1.EndpointSlice{slice("s", v4, 8080, "10.98.0.2 @n1", "10.98.1.2 @n2", "10.98.2.2")},
			"tcp 10.97.0.1:80 -> [10.98.0.2:8080]\n"},
	} {
		got := Render(Desired{Node: "n1", Services: []*corev1.Service{svc("s", c.svc)}, Slices: c.slices})
		if text(got) != c.want {
			t.Errorf("%s:\n%swant\n%s", c.name, text(got), c.want)
		}
	}
}

// TestConflict: two services claim one port.
func TestConflict(t *testing.T) {
	spec := corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "p", Port: 80}}}
	a, b := svc("a", spec), svc("b", spec)
	sl := []*discoveryv1.EndpointSlice{slice("a", discoveryv1.AddressTypeIPv4, 1, "10.98.0.1"), slice("b", discoveryv1.AddressTypeIPv4, 2, "10.98.0.2")}
	for _, order := range [][]*corev1.Service{{a, b}, {b, a}} {
		if got := text(Render(Desired{Services: order, Slices: sl})); got != "tcp 10.97.0.1:80 -> [10.98.0.1:1]\n" {
			t.Error(got)
		}
	}
}

func TestSettings(t *testing.T) {
	p := netip.MustParsePrefix
	got := Render(Desired{
		DNS:         netip.MustParseAddr("10.97.0.10"),
		ServiceCIDR: []netip.Prefix{p("10.97.3.4/16"), p("10.97.1.0/24"), p("10.97.0.0/16"), {}},
		ClusterCIDR: []netip.Prefix{p("fd98::/48"), p("10.98.0.0/16")},
		Announced:   []netip.Prefix{p("203.0.113.9/28")},
	})
	if fmt.Sprint(got.Range, got.Cluster, got.Announced, got.Local) != "[10.97.0.0/16] [10.98.0.0/16 fd98::/48] [203.0.113.0/28] [tcp 10.97.0.10:53 udp 10.97.0.10:53]" {
		t.Error(got.Range, got.Cluster, got.Local)
	}
}

// TestLost: the pods of nodes that do not answer are lost, those of this node never.
func TestLost(t *testing.T) {
	node := func(name, cidr string, ready ...corev1.ConditionStatus) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{cidr}}}
		for _, r := range ready {
			n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeReady, Status: r})
		}
		return n
	}
	got := Render(Desired{Node: "n1", Nodes: []*corev1.Node{
		node("n1", "10.98.1.0/24", corev1.ConditionFalse), node("n2", "10.98.2.0/24", corev1.ConditionTrue), node("n3", "10.98.3.0/24", corev1.ConditionUnknown),
		node("n4", "10.98.4.0/24", corev1.ConditionFalse), node("n5", "10.98.5.0/24"),
	}})
	if fmt.Sprint(got.Lost) != "[10.98.3.0/24 10.98.4.0/24]" {
		t.Error(got.Lost)
	}
}

// TestOrder: the table does not depend on the order of the objects, and is ordered.
func TestOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var d Desired
		for i := range rapid.IntRange(0, 6).Draw(t, "services") {
			name := fmt.Sprint("s", i)
			ports := []corev1.ServicePort{{Name: "p", Port: rapid.Int32Range(1, 3).Draw(t, "port")}}
			d.Services = append(d.Services, svc(name, corev1.ServiceSpec{ClusterIP: fmt.Sprint("10.97.0.", rapid.IntRange(1, 4).Draw(t, "ip")), Ports: ports}))
			for range rapid.IntRange(0, 2).Draw(t, "slices") {
				s := slice(name, discoveryv1.AddressTypeIPv4, 8080)
				for range rapid.IntRange(0, 4).Draw(t, "endpoints") {
					s.Endpoints = append(s.Endpoints, ep(fmt.Sprint("10.98.0.", rapid.IntRange(1, 5).Draw(t, "ep"))))
				}
				d.Slices = append(d.Slices, s)
			}
		}
		a := Render(d)
		shuffled := d
		shuffled.Services = rapid.Permutation(d.Services).Draw(t, "services order")
		shuffled.Slices = rapid.Permutation(d.Slices).Draw(t, "slices order")
		if b := Render(shuffled); !a.Equal(b) {
			t.Fatalf("%s\nin another order\n%s", text(a), text(b))
		}
		for i := 1; i < len(a.Services); i++ {
			if a.Services[i-1].Compare(a.Services[i].Port) >= 0 {
				t.Fatalf("not ordered:\n%s", text(a))
			}
		}
		for _, s := range a.Services {
			for i := 1; i < len(s.Endpoints); i++ {
				if s.Endpoints[i-1].Compare(s.Endpoints[i]) >= 0 {
					t.Fatalf("endpoints not ordered:\n%s", text(a))
				}
			}
			if found, ok := a.Find(s.Port); !ok || !found.Equal(&s) {
				t.Fatalf("%s is not found", s.Port)
			}
		}
	})
}

// TestRendererRemembers: one table after the other is what each would be alone, whatever
// changed in between. What changes is another object.
func TestRendererRemembers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var r Renderer
		services, eps := map[string]*corev1.Service{}, map[string]*discoveryv1.EndpointSlice{}
		zone := "a"
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			name := fmt.Sprint("s", rapid.IntRange(0, 4).Draw(t, "service"))
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0:
				delete(services, name)
			case 1:
				services[name] = svc(name, corev1.ServiceSpec{
					Type: corev1.ServiceTypeNodePort, ClusterIP: fmt.Sprint("10.97.0.", rapid.IntRange(1, 4).Draw(t, "ip")),
					ExternalIPs: []string{fmt.Sprint("203.0.113.", rapid.IntRange(1, 3).Draw(t, "external"))},
					Ports:       []corev1.ServicePort{{Name: "p", Port: rapid.Int32Range(1, 3).Draw(t, "port"), NodePort: rapid.Int32Range(30001, 30003).Draw(t, "node port")}},
				})
			case 2:
				delete(eps, name)
			case 3:
				s := slice(name, discoveryv1.AddressTypeIPv4, 8080)
				for range rapid.IntRange(0, 3).Draw(t, "endpoints") {
					e := ep(fmt.Sprint("10.98.0.", rapid.IntRange(1, 5).Draw(t, "ep")))
					e.NodeName = new(rapid.SampledFrom([]string{"n1", "n2"}).Draw(t, "node"))
					s.Name = rapid.SampledFrom([]string{"", name, "same"}).Draw(t, "name")
					e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "hint")}}}
					s.Endpoints = append(s.Endpoints, e)
				}
				eps[name] = s
			case 4:
				zone = rapid.SampledFrom([]string{"a", "b"}).Draw(t, "zone")
			}
			d := Desired{Node: "n1", Nodes: []*corev1.Node{{
				ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: zone}},
				Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}},
			}}}
			d.Services = slices.Collect(maps.Values(services)) // in any order
			d.Slices = slices.Collect(maps.Values(eps))
			if got, want := r.Render(d), Render(d); !got.Equal(want) {
				t.Fatalf("%s\nalone:\n%s", text(got), text(want))
			}
		}
	})
}

// BenchmarkRender is the first table, and the next one after a slice has changed.
func BenchmarkRender(b *testing.B) {
	var d Desired
	for i := range 30000 {
		name := fmt.Sprintf("s%05d", i) // in order, as a view has them
		d.Services = append(d.Services, svc(name, corev1.ServiceSpec{ClusterIP: fmt.Sprintf("10.97.%d.%d", i/250, i%250), Ports: []corev1.ServicePort{{Name: "p", Port: 80}}}))
		s := slice(name, discoveryv1.AddressTypeIPv4, 8080, "10.98.0.1", "10.98.0.2", "10.98.0.3")
		s.Name = name + "-x"
		d.Slices = append(d.Slices, s)
	}
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			Render(d)
		}
	})
	b.Run("next", func(b *testing.B) {
		var r Renderer
		r.Render(d)
		for i := 0; b.Loop(); i++ {
			at := i % len(d.Slices)
			s := *d.Slices[at]
			d.Slices[at] = &s
			r.Render(d)
		}
	})
}

// TestScheduler: what a service asks for holds for all of its ports that have endpoints, and
// what nobody knows for none.
func TestScheduler(t *testing.T) {
	for _, c := range []struct{ asked, want string }{{"lc", "lc"}, {"", ""}, {"dice", ""}} {
		s := svc("a", corev1.ServiceSpec{ClusterIP: "10.97.0.1", ExternalIPs: []string{"203.0.113.1"}, Ports: []corev1.ServicePort{{Name: "p", Port: 80}, {Name: "q", Port: 81}}})
		s.Annotations = map[string]string{"net.decree.dev/scheduler": c.asked}
		got := Render(Desired{Services: []*corev1.Service{s}, Slices: []*discoveryv1.EndpointSlice{slice("a", discoveryv1.AddressTypeIPv4, 8080, "10.98.0.2")}})
		if len(got.Services) != 4 {
			t.Fatalf("%+v", got)
		}
		for _, e := range got.Services {
			want := c.want
			if len(e.Endpoints) == 0 {
				want = ""
			}
			if e.Scheduler != want {
				t.Errorf("asked for %q, %s has %q", c.asked, e.Port, e.Scheduler)
			}
		}
	}
}

// TestPeersOrder: the primary family of a node's pods stays the first, as a pod's first
// address is of it.
func TestPeersOrder(t *testing.T) {
	d := Desired{Node: "a", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("fd98::1/64"), netip.MustParsePrefix("10.98.0.0/24"), {}, netip.MustParsePrefix("fd98::/64")}}
	self, _ := Peers(d)
	if got := fmt.Sprint(self.Pods); got != "[fd98::/64 10.98.0.0/24]" {
		t.Error(got)
	}
}
