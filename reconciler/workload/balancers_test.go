package workload_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

func addressPool(name string, addresses ...string) *api.AddressPool {
	return &api.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: api.AddressPoolSpec{Addresses: addresses}}
}

// balancer is a service of type LoadBalancer with words about it: a family (4, 6, 46),
// an address, a label "tier=x".
func balancer(name string, words ...string) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}}
	svc.Spec.Type, svc.Spec.IPFamilies = corev1.ServiceTypeLoadBalancer, []corev1.IPFamily{"IPv4"}
	for _, w := range words {
		switch key, value, label := strings.Cut(w, "="); {
		case label:
			svc.Labels = map[string]string{key: value}
		case w == "6":
			svc.Spec.IPFamilies = []corev1.IPFamily{"IPv6"}
		case w == "46":
			svc.Spec.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"}
		default:
			svc.Spec.LoadBalancerIP = w
		}
	}
	return svc
}

// balance runs the planner until it has nothing to do, and returns for each service its
// addresses, or the reason of its condition.
func (w *world) balance() string {
	w.t.Helper()
	for range 10 {
		ms := workload.Balancers(w.now, w.reader())
		if len(ms) == 0 {
			break
		}
		w.apply(ms)
	}
	if ms := workload.Balancers(w.now, w.reader()); len(ms) > 0 {
		w.t.Fatalf("does not settle: %v", ms)
	}
	var out []string
	for svc := range api.List[*corev1.Service](w.reader(), "") {
		text := svc.Name + ":"
		for _, in := range svc.Status.LoadBalancer.Ingress {
			if *in.IPMode != corev1.LoadBalancerIPModeVIP {
				w.t.Fatalf("%s has mode %s", svc.Name, *in.IPMode)
			}
			text += " " + in.IP
		}
		for _, c := range svc.Status.Conditions {
			if c.Status != metav1.ConditionTrue {
				text += " " + c.Reason
			}
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func (w *world) expectBalance(want string) {
	w.t.Helper()
	if got := w.balance(); got != want {
		w.t.Fatalf("got  %s\nwant %s", got, want)
	}
}

func TestBalancers(t *testing.T) {
	w := newWorld(t)
	w.put(balancer("a"))
	w.expectBalance("a: NoAddressPool")
	w.put(addressPool("p", "203.0.113.8/31"))
	w.put(balancer("b"))
	w.put(balancer("c"))
	w.expectBalance("a: 203.0.113.8, b: 203.0.113.9, c: AddressPoolExhausted")
	if p, _ := api.Get[*api.AddressPool](w.reader(), "", "p"); p.Status.Assigned != 2 || p.Status.Given != 2 {
		t.Fatalf("got %+v", p.Status)
	}
	events := 0
	for e := range api.List[*corev1.Event](w.reader(), "") {
		if e.InvolvedObject.Name == "c" && e.Reason == "AddressPoolExhausted" && strings.Contains(e.Message, `no IPv4 address is left in addresspools "p"`) && e.Count == 1 {
			events++
		}
	}
	if events != 1 {
		t.Fatalf("%d events about c", events)
	}
	// What was given back goes on; nobody else moves.
	delete(w.objects, api.KeyOf(balancer("a")))
	w.expectBalance("b: 203.0.113.9, c: 203.0.113.8")
	b, _ := api.Get[*corev1.Service](w.reader(), "default", "b")
	plain := api.Clone(b)
	plain.Spec.Type = corev1.ServiceTypeClusterIP
	w.put(plain)
	w.put(balancer("d"))
	w.expectBalance("b:, c: 203.0.113.8, d: 203.0.113.9")
	// A pool that changes takes along who is in it.
	p, _ := api.Get[*api.AddressPool](w.reader(), "", "p")
	moved := api.Clone(p)
	moved.Spec.Addresses = []string{"203.0.113.9-203.0.113.10"}
	w.put(moved)
	w.expectBalance("b:, c: 203.0.113.10, d: 203.0.113.9")
}

func TestBalancersChoose(t *testing.T) {
	for _, c := range []struct {
		name     string
		pools    []*api.AddressPool
		services []*corev1.Service
		want     string
	}{
		{"asked for", []*api.AddressPool{addressPool("p", "203.0.113.0/29")}, []*corev1.Service{balancer("a"), balancer("b", "203.0.113.0")}, "a: 203.0.113.1, b: 203.0.113.0"},
		{"asked for twice", []*api.AddressPool{addressPool("p", "203.0.113.0/29")}, []*corev1.Service{balancer("a", "203.0.113.3"), balancer("b", "203.0.113.3")}, "a: 203.0.113.3, b: AddressInUse"},
		{"asked for elsewhere", []*api.AddressPool{addressPool("p", "203.0.113.0/29")}, []*corev1.Service{balancer("a", "203.0.113.8")}, "a: AddressNotInPool"},
		{"both families", []*api.AddressPool{addressPool("p", "203.0.113.0/29"), addressPool("q", "2001:db8::1-2001:db8::2")}, []*corev1.Service{balancer("a", "46"), balancer("b", "6"), balancer("c", "6")},
			"a: 203.0.113.0 2001:db8::1, b: 2001:db8::2, c: AddressPoolExhausted"},
		{"one of two families", []*api.AddressPool{addressPool("p", "203.0.113.0/29")}, []*corev1.Service{balancer("a", "46", "203.0.113.5")}, "a: 203.0.113.5 NoAddressPool"},
		{"the next pool", []*api.AddressPool{addressPool("p", "203.0.113.0/32"), addressPool("q", "198.51.100.7/32")}, []*corev1.Service{balancer("a"), balancer("b")}, "a: 203.0.113.0, b: 198.51.100.7"},
		{"the last address", []*api.AddressPool{addressPool("p", "255.255.255.255/32")}, []*corev1.Service{balancer("a"), balancer("b")}, "a: 255.255.255.255, b: AddressPoolExhausted"},
		{"not by itself", []*api.AddressPool{func() *api.AddressPool {
			p := addressPool("p", "203.0.113.0/29")
			p.Spec.AutoAssign = new(bool)
			return p
		}()},
			[]*corev1.Service{balancer("a"), balancer("b", "203.0.113.5")}, "a: NoAddressPool, b: 203.0.113.5"},
		{"selected", []*api.AddressPool{func() *api.AddressPool {
			p := addressPool("p", "203.0.113.0/29")
			p.Spec.ServiceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"tier": "front"}}
			return p
		}()}, []*corev1.Service{balancer("a", "tier=back"), balancer("b", "tier=front"), balancer("c", "203.0.113.5")}, "a: NoAddressPool, b: 203.0.113.0, c: AddressNotInPool"},
		{"of a namespace", []*api.AddressPool{func() *api.AddressPool {
			p := addressPool("p", "203.0.113.0/29")
			p.Spec.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "x"}}
			return p
		}()}, []*corev1.Service{balancer("a"), func() *corev1.Service { s := balancer("b"); s.Namespace = "x"; return s }()}, "a: NoAddressPool, b: 203.0.113.0"},
		{"another class", []*api.AddressPool{addressPool("p", "203.0.113.0/29")}, []*corev1.Service{func() *corev1.Service { s := balancer("a"); s.Spec.LoadBalancerClass = new("other/lb"); return s }()}, "a:"},
	} {
		w := newWorld(t)
		w.put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{"team": "x"}}})
		for _, p := range c.pools {
			w.put(p)
		}
		for _, s := range c.services {
			w.put(s)
		}
		if got := w.balance(); got != c.want {
			t.Errorf("%s: got  %s\nwant %s", c.name, got, c.want)
		}
	}
}

// TestBalancersFromOneView: of two plans from one view only one comes into force.
func TestBalancersFromOneView(t *testing.T) {
	w := newWorld(t)
	w.put(addressPool("p", "203.0.113.8/31"))
	w.put(balancer("a"))
	first := workload.Balancers(w.now, w.reader())
	w.put(balancer("a-before"))
	w.put(balancer("0"))
	other := workload.Balancers(w.now, w.reader())
	w.apply(first)
	for _, m := range other {
		if old := w.objects[m.Key]; m.Key.Resource == api.AddressPools && m.Revision != 0 && m.Revision != api.RevisionOf(old) {
			return
		}
	}
	t.Fatal("a second plan from the same view would come into force")
}

// TestBalancersProperties: whatever comes and goes, no address is given twice, none is
// from outside the pools, and who has one keeps it while it may.
func TestBalancersProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.put(addressPool("p", "203.0.113.0/30", "2001:db8::/126"))
		w.put(addressPool("q", "198.51.100.1-198.51.100.2"))
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			w.now = w.now.Add(time.Second)
			words := []string{rapid.SampledFrom([]string{"4", "6", "46"}).Draw(t, "families")}
			if words[0] == "4" {
				words = nil
			}
			if rapid.IntRange(0, 3).Draw(t, "asks") == 0 {
				words = append(words, rapid.SampledFrom([]string{"203.0.113.1", "2001:db8::1", "192.0.2.1"}).Draw(t, "address"))
			}
			svc := balancer(fmt.Sprint("s", rapid.IntRange(0, 9).Draw(t, "name")), words...)
			switch old, ok := w.objects[api.KeyOf(svc)]; {
			case !ok:
				w.put(svc)
			case rapid.Bool().Draw(t, "delete"):
				delete(w.objects, api.KeyOf(svc))
			default:
				svc.UID, svc.Status = old.GetUID(), old.(*corev1.Service).Status
				w.put(svc)
			}
			before := w.addresses()
			w.balance()
			after := w.addresses()
			seen := map[string]string{}
			for name, ips := range after {
				for _, ip := range ips {
					if other := seen[ip]; other != "" {
						t.Fatalf("%s has %s and so has %s", name, ip, other)
					}
					seen[ip] = name
					if !netip.MustParsePrefix("203.0.113.0/30").Contains(netip.MustParseAddr(ip)) && !netip.MustParsePrefix("2001:db8::/126").Contains(netip.MustParseAddr(ip)) && !strings.HasPrefix(ip, "198.51.100.") {
						t.Fatalf("%s has %s", name, ip)
					}
				}
				if name != svc.Name && slices.ContainsFunc(before[name], func(ip string) bool { return !slices.Contains(ips, ip) }) {
					t.Fatalf("%s had %v and has %v", name, before[name], ips)
				}
			}
		}
	})
}

func (w *world) addresses() map[string][]string {
	out := map[string][]string{}
	for svc := range api.List[*corev1.Service](w.reader(), "") {
		for _, in := range svc.Status.LoadBalancer.Ingress {
			out[svc.Name] = append(out[svc.Name], in.IP)
		}
	}
	return out
}

func TestEndpointsOfTwoFamilies(t *testing.T) {
	w := newWorld(t)
	svc := webService()
	svc.Spec.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"}
	w.put(svc)
	both := func(ips ...string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			for _, ip := range ips {
				p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
			}
		}
	}
	w.put(backend("a", "10.98.0.1", true, both("10.98.0.1", "fd98::1")))
	w.put(backend("b", "10.98.0.2", true, both("10.98.0.2")))
	w.stepEndpoints()
	w.expect(t, "http=8080 admin=81 10.98.0.1/rs 10.98.0.2/rs", "http=8080 admin=81 fd98::1/rs")
	// A headless service that leaves the choice open has the family of its pods.
	open := newWorld(t)
	svc = webService()
	svc.Spec.ClusterIP, svc.Spec.IPFamilies = "None", nil
	open.put(svc)
	open.put(backend("a", "fd98::1", true, both("fd98::1", "10.98.0.1")))
	open.stepEndpoints()
	open.expect(t, "http=8080 admin=81 fd98::1/rs")
}
