package state_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/raftstore/command"
	"decree.dev/decree/raftstore/state"
	"decree.dev/decree/schemas/api"
)

// born is a world with other settings.
func born(t *testing.T, edit func(*command.Bootstrap)) *world {
	w := &world{t: t, s: state.New(), now: 1_700_000_000_500}
	b := bootstrap()
	edit(b)
	w.must(command.Txn{Bootstrap: b})
	return w
}

// typed makes a service of a type with ports such as "http 80/TCP 30080".
func typed(kind corev1.ServiceType, ports ...string) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type = kind
		for _, text := range ports {
			var p corev1.ServicePort
			f := strings.Fields(text)
			p.Name = f[0]
			number, protocol, _ := strings.Cut(f[1], "/")
			fmt.Sscan(number, &p.Port)
			p.Protocol = corev1.Protocol(protocol)
			if len(f) > 2 {
				fmt.Sscan(f[2], &p.NodePort)
			}
			s.Spec.Ports = append(s.Spec.Ports, p)
		}
	}
}

func local(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func (w *world) ports(name string) (numbers []int32) {
	w.t.Helper()
	for _, p := range fetch[*corev1.Service](w, "default", name).Spec.Ports {
		numbers = append(numbers, p.NodePort)
	}
	return numbers
}

func TestNodePorts(t *testing.T) {
	w := newWorld(t)
	given := service("a", typed("NodePort", "http 80/TCP", "https 443/TCP 30443"))
	w.must(txn(api.Create, given))
	a := w.ports("a")
	if a[0] < 30086 || a[0] > 32767 || a[1] != 30443 { // the first 86 are for who chooses
		t.Fatalf("got %v", a)
	}
	if given.Spec.Ports[0].NodePort != 0 {
		t.Fatal("the transaction's object was modified")
	}
	w.refuse(command.Invalid, txn(api.Create, service("b", typed("NodePort", "x 80/UDP 30443"))), `spec.ports[0].nodePort 30443 is in use by services "default/a"`, "choose another")
	w.refuse(command.Invalid, txn(api.Create, service("b", typed("LoadBalancer", "x 80/TCP 80"))), "not in the range of node ports 30000-32767")
	w.refuse(command.Invalid, txn(api.Create, service("b", typed("NodePort", "x 80/TCP 30001", "y 81/TCP 30001"))), "spec.ports[1].nodePort 30001 is that of another TCP port")

	// Kept by name; given back with the port, the type and the service.
	w.must(txn(api.Update, service("a", typed("NodePort", "https 8443/TCP", "http 8080/TCP"))))
	if got := w.ports("a"); got[0] != a[1] || got[1] != a[0] {
		t.Fatalf("got %v after %v", got, a)
	}
	w.must(txn(api.Update, service("a", typed("NodePort", "http 80/TCP"))))
	w.must(txn(api.Create, service("b", typed("NodePort", "x 80/TCP 30443", "y 80/UDP 30443"))))
	w.must(txn(api.Update, service("b", typed("ClusterIP", "x 80/TCP"))))
	if got := w.ports("b"); got[0] != 0 {
		t.Fatalf("a service without node ports has %v", got)
	}
	w.must(txn(api.Update, service("b", typed("LoadBalancer", "x 80/TCP 30443"))))
	w.must(txn(api.Delete, service("b")))
	w.must(txn(api.Create, service("c", typed("NodePort", "x 80/TCP 30443"))))

	// Who comes back gets what it had.
	w.must(txn(api.Delete, service("a")))
	w.must(txn(api.Create, service("a", typed("NodePort", "http 80/TCP"))))
	if got := w.ports("a"); got[0] != a[0] {
		t.Fatalf("got %v, want %v again", got, a)
	}
	// The same port of another protocol shares the number.
	w.must(txn(api.Create, service("dns", typed("NodePort", "u 53/UDP", "t 53/TCP", "m 9153/TCP"))))
	if got := w.ports("dns"); got[0] != got[1] || got[0] == got[2] {
		t.Fatalf("got %v", got)
	}
}

func TestNodePortsInOneTransaction(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, service("a", typed("NodePort", "x 80/TCP 30001"))))
	swap := txn(api.Delete, service("a"))
	swap.Mutations = append(swap.Mutations, mutation(api.Create, service("b", typed("NodePort", "x 80/TCP 30001"))))
	w.must(swap)
	// Refused as a whole: what was given meanwhile is free again.
	w.refuse(command.Invalid, txn(api.Create, service("c", typed("NodePort", "x 80/TCP 30002")), service("d", typed("NodePort", "x 80/TCP 30001"))), `"default/b"`)
	w.must(txn(api.Create, service("d", typed("NodePort", "x 80/TCP 30002"))))
}

func TestNodePortsRunOut(t *testing.T) {
	w := born(t, func(b *command.Bootstrap) {
		b.ServiceCIDR = netip.MustParsePrefix("10.97.0.0/16")
		b.NodePorts = command.PortRange{First: 20000, Last: 20039}
	})
	seen := map[int32]bool{}
	for i := range 20 {
		name := fmt.Sprint("s", i)
		w.must(txn(api.Create, service(name, typed("NodePort", "a 80/TCP", "b 81/TCP"))))
		for _, n := range w.ports(name) {
			if n < 20000 || n > 20039 || seen[n] {
				t.Fatalf("%s got %d", name, n)
			}
			if seen[n] = true; n < 20016 && len(seen) <= 24 {
				t.Fatalf("%d was given before the others were", n)
			}
		}
	}
	w.refuse(command.Invalid, txn(api.Create, service("one more", typed("NodePort", "a 80/TCP"))), "not a name")
	w.refuse(command.Invalid, txn(api.Create, service("more", typed("NodePort", "a 80/TCP"))), "no node port is left in the range 20000-20039: all 40 are in use")
	w.must(txn(api.Create, service("more", typed("LoadBalancer", "a 80/TCP"), func(s *corev1.Service) { s.Spec.AllocateLoadBalancerNodePorts = new(bool) })))
	if got := w.ports("more"); got[0] != 0 {
		t.Fatalf("got %v", got)
	}
	w.must(txn(api.Update, service("s3", typed("NodePort", "a 80/TCP"))))
	w.must(txn(api.Create, service("last", typed("NodePort", "a 80/TCP"))))
}

func TestHealthCheckNodePort(t *testing.T) {
	w := newWorld(t)
	health := func(name string) int32 {
		return fetch[*corev1.Service](w, "default", name).Spec.HealthCheckNodePort
	}
	with := func(n int32) func(*corev1.Service) {
		return func(s *corev1.Service) { s.Spec.HealthCheckNodePort = n }
	}
	w.must(txn(api.Create, service("a", typed("LoadBalancer", "x 80/TCP"), local)))
	first := health("a")
	if first < 30000 || first == w.ports("a")[0] {
		t.Fatalf("got %d", first)
	}
	w.must(txn(api.Update, service("a", typed("LoadBalancer", "x 81/TCP"), local)))
	if got := health("a"); got != first {
		t.Fatalf("got %d after %d", got, first)
	}
	w.refuse(command.Invalid, txn(api.Create, service("b", typed("NodePort", "x 80/TCP "+fmt.Sprint(first)))), `in use by services "default/a"`)
	w.refuse(command.Invalid, txn(api.Update, service("a", typed("LoadBalancer", "x 81/TCP 30005"), local, with(30005))), "spec.healthCheckNodePort 30005 is the node port of one of the service's ports")
	w.must(txn(api.Update, service("a", typed("LoadBalancer", "x 81/TCP"), local, with(30006))))
	w.must(txn(api.Create, service("b", typed("NodePort", "x 80/TCP "+fmt.Sprint(first)))))
	w.must(txn(api.Update, service("a", typed("LoadBalancer", "x 81/TCP"), with(30006))))
	if got := health("a"); got != 0 {
		t.Fatalf("with policy Cluster there is %d", got)
	}
	w.must(txn(api.Create, service("c", typed("LoadBalancer", "x 80/TCP"), local, with(30006))))
}

// TestStatusOfLoadBalancer: what a controller writes leaves assignments alone.
func TestStatusOfLoadBalancer(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, service("a", typed("LoadBalancer", "x 80/TCP"))))
	before := fetch[*corev1.Service](w, "default", "a")
	changed := before.DeepCopy()
	changed.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}
	w.must(txn(api.UpdateStatus, changed))
	after := fetch[*corev1.Service](w, "default", "a")
	if after.Status.LoadBalancer.Ingress[0].IP != "203.0.113.7" || after.Spec.Ports[0].NodePort != before.Spec.Ports[0].NodePort || after.Generation != 1 {
		t.Fatalf("got %+v", after)
	}
}

func dual(t *testing.T) *world {
	return born(t, func(b *command.Bootstrap) {
		b.Second = command.Ranges{ServiceCIDR: netip.MustParsePrefix("fd00:97::/112"), PodCIDR: netip.MustParsePrefix("fd00:98::/48"), NodeMask: 64}
	})
}

// in asks for a policy ("" for none) and for families.
func in(policy corev1.IPFamilyPolicy, families ...corev1.IPFamily) func(*corev1.Service) {
	return func(s *corev1.Service) {
		if s.Spec.IPFamilies = families; policy != "" {
			s.Spec.IPFamilyPolicy = &policy
		}
	}
}

func ips(list ...string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Spec.ClusterIPs = list }
}

func TestTwoFamilies(t *testing.T) {
	for _, c := range []struct {
		name string
		edit []func(*corev1.Service)
		want string // families, addresses, policy
	}{
		{"nothing said", nil, "[IPv4] [10.97.0.1] SingleStack"},
		{"the other one", []func(*corev1.Service){in("", "IPv6")}, "[IPv6] [fd00:97::1] SingleStack"},
		{"prefer", []func(*corev1.Service){in("PreferDualStack")}, "[IPv4 IPv6] [10.97.0.1 fd00:97::1] PreferDualStack"},
		{"require, in another order", []func(*corev1.Service){in("RequireDualStack", "IPv6")}, "[IPv6 IPv4] [fd00:97::1 10.97.0.1] RequireDualStack"},
		{"two named", []func(*corev1.Service){in("", "IPv6", "IPv4")}, "[IPv6 IPv4] [fd00:97::1 10.97.0.1] RequireDualStack"},
		{"by address", []func(*corev1.Service){ip("fd00:97::7")}, "[IPv6] [fd00:97::7] SingleStack"},
		{"by addresses", []func(*corev1.Service){ips("fd00:97::7", "10.97.0.5")}, "[IPv6 IPv4] [fd00:97::7 10.97.0.5] RequireDualStack"},
		{"one address of two", []func(*corev1.Service){ip("10.97.0.5"), in("PreferDualStack")}, "[IPv4 IPv6] [10.97.0.5 fd00:97::1] PreferDualStack"},
		{"headless", []func(*corev1.Service){ip("None"), in("PreferDualStack")}, "[IPv4 IPv6] [None] PreferDualStack"},
		{"headless, nothing said", []func(*corev1.Service){ip("None")}, "[IPv4] [None] SingleStack"},
	} {
		w := dual(t)
		w.must(txn(api.Create, service("a", c.edit...)))
		s := fetch[*corev1.Service](w, "default", "a").Spec
		if got := fmt.Sprintf("%v %v %s", s.IPFamilies, s.ClusterIPs, *s.IPFamilyPolicy); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	w := dual(t)
	w.refuse(command.Invalid, txn(api.Create, service("a", in("SingleStack", "IPv4", "IPv6"))), "SingleStack has one address family")
	w.refuse(command.Invalid, txn(api.Create, service("a", in("", "IPv4", "IPv4"))), "IPv4 twice")
	w.refuse(command.Invalid, txn(api.Create, service("a", ip("10.97.0.5"), in("", "IPv6"))), "10.97.0.5 is not of the family IPv6")
	w.refuse(command.Invalid, txn(api.Create, service("a", ips("10.97.0.5", "10.97.0.6"))), "IPv4 twice")
	w.refuse(command.Invalid, txn(api.Create, service("a", ips("fd00:97::7", "10.97.0.2"))), "DNS")
}

func TestFamiliesChange(t *testing.T) {
	w := dual(t)
	addresses := func() []string { return fetch[*corev1.Service](w, "default", "a").Spec.ClusterIPs }
	w.must(txn(api.Create, service("a", in("PreferDualStack")), service("b", in("", "IPv6"))))
	w.must(txn(api.Update, service("a", in("SingleStack", "IPv6"))))
	if got := addresses(); !slices.Equal(got, []string{"fd00:97::1"}) {
		t.Fatalf("got %v: what fits is kept", got)
	}
	w.must(txn(api.Create, service("c", ip("10.97.0.1")))) // given back
	w.must(txn(api.Update, service("a", in("RequireDualStack", "IPv6", "IPv4"))))
	if got := addresses(); got[0] != "fd00:97::1" || got[1] == "10.97.0.1" {
		t.Fatalf("got %v", got)
	}
	w.refuse(command.Invalid, txn(api.Update, service("a", ips("fd00:97::2", ""), in("RequireDualStack", "IPv6", "IPv4"))), "not an IP address")
	w.refuse(command.Invalid, txn(api.Update, service("a", ip("fd00:97::2"), in("RequireDualStack", "IPv6"))), `in use by services "default/b"`)
	w.must(txn(api.Delete, service("a"), service("b")))
	w.must(txn(api.Create, service("d", ips("fd00:97::1", "10.97.0.3")), service("e", ip("fd00:97::2"))))
}

func TestOneFamily(t *testing.T) {
	w := newWorld(t)
	w.must(txn(api.Create, service("a", in("PreferDualStack"))))
	if s := fetch[*corev1.Service](w, "default", "a").Spec; len(s.ClusterIPs) != 1 || len(s.IPFamilies) != 1 || *s.IPFamilyPolicy != "PreferDualStack" {
		t.Fatalf("got %+v", s)
	}
	w.refuse(command.Invalid, txn(api.Create, service("b", in("RequireDualStack"))), "the cluster has IPv4 only")
	w.refuse(command.Invalid, txn(api.Create, service("b", in("", "IPv6"))), "ipFamilies names IPv6, which this cluster has no addresses of")
}

func TestNodesOfTwoFamilies(t *testing.T) {
	w := dual(t)
	w.must(txn(api.Create, node("n0"), node("n1")))
	if n := fetch[*corev1.Node](w, "", "n1").Spec; n.PodCIDR != "10.98.1.0/24" || !slices.Equal(n.PodCIDRs, []string{"10.98.1.0/24", "fd00:98:0:1::/64"}) {
		t.Fatalf("got %+v", n)
	}
	chosen := func(cidrs ...string) *corev1.Node {
		n := node("n2")
		n.Spec.PodCIDRs = cidrs
		return n
	}
	w.refuse(command.Invalid, txn(api.Create, chosen("10.98.2.0/24", "fd00:98:0:1::/64")), "with 10.98.2.0/24 goes fd00:98:0:2::/64")
	w.refuse(command.Invalid, txn(api.Create, chosen("10.98.1.0/24")), `in use by nodes "n1"`)
	w.must(txn(api.Create, chosen("10.98.3.0/24", "fd00:98:0:3::/64")))
	w.must(txn(api.Update, node("n2")))
	if n := fetch[*corev1.Node](w, "", "n2").Spec; !slices.Equal(n.PodCIDRs, []string{"10.98.3.0/24", "fd00:98:0:3::/64"}) {
		t.Fatalf("got %+v", n)
	}
}

func TestSettingsOfTwoFamilies(t *testing.T) {
	second := command.Ranges{ServiceCIDR: netip.MustParsePrefix("fd00:97::/112"), PodCIDR: netip.MustParsePrefix("fd00:98::/48"), NodeMask: 64}
	for name, edit := range map[string]func(*command.Bootstrap){
		"one family twice": func(b *command.Bootstrap) {
			b.Second = command.Ranges{ServiceCIDR: netip.MustParsePrefix("10.1.0.0/16"), PodCIDR: netip.MustParsePrefix("10.2.0.0/16"), NodeMask: 24}
		},
		"half of one":    func(b *command.Bootstrap) { b.Second.ServiceCIDR = second.ServiceCIDR },
		"mixed":          func(b *command.Bootstrap) { b.Second = second; b.Second.PodCIDR = netip.MustParsePrefix("10.2.0.0/16") },
		"no ports":       func(b *command.Bootstrap) { b.NodePorts = command.PortRange{First: 100, Last: 99} },
		"ports from 0":   func(b *command.Bootstrap) { b.NodePorts = command.PortRange{First: 0, Last: 99} },
		"dns in the 2nd": func(b *command.Bootstrap) { b.Second = second; b.DNS = netip.MustParseAddr("fd00:97::a") },
	} {
		b := bootstrap()
		edit(b)
		if err := state.CheckBootstrap(b); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	b := bootstrap()
	b.Second = second
	if err := state.CheckBootstrap(b); err != nil {
		t.Error(err)
	}
}

// TestSnapshotHasTheVersionOfItsContent: servers of the version before can read what
// they could have written.
func TestSnapshotHasTheVersionOfItsContent(t *testing.T) {
	version := func(w *world) string {
		var buf bytes.Buffer
		if _, err := w.s.WriteTo(&buf); err != nil {
			t.Fatal(err)
		}
		head, _, _ := strings.Cut(buf.String(), "\n")
		return head[len(head)-1:]
	}
	w := newWorld(t)
	w.must(txn(api.Create, service("a"), node("n")))
	if got := version(w); got != "1" {
		t.Fatalf("version %s", got)
	}
	w.must(txn(api.Create, service("b", typed("NodePort", "x 80/TCP"))))
	if got := version(w); got != "3" {
		t.Fatalf("version %s with node ports", got)
	}
	w.must(txn(api.Delete, service("b")))
	if got := version(w); got != "1" {
		t.Fatalf("version %s without them", got)
	}
	if got := version(dual(t)); got != "3" {
		t.Fatalf("version %s of two families", got)
	}
	if got := version(born(t, func(b *command.Bootstrap) { b.NodePorts = command.PortRange{First: 1, Last: 9} })); got != "3" {
		t.Fatalf("version %s of other node ports", got)
	}
}

// TestRestoredClusterKeepsPorts: what was assigned before a backup stays assigned.
func TestRestoredClusterKeepsPorts(t *testing.T) {
	w := dual(t)
	w.must(txn(api.Create, service("a", typed("NodePort", "x 80/TCP 30005"), in("PreferDualStack"))))
	restored, err := state.Restore(reread(t, w.s), "new", 1, 100)
	if err != nil {
		t.Fatal(err)
	}
	w.s = reread(t, restored)
	w.refuse(command.Invalid, txn(api.Create, service("b", typed("NodePort", "x 80/TCP 30005"))), `"default/a"`)
	w.refuse(command.Invalid, txn(api.Create, service("b", ip("fd00:97::1"))), `"default/a"`)
	w.must(txn(api.Create, service("b", in("PreferDualStack"))))
}

// TestSnapshotKeepsWhereToSearch: a server that started from a snapshot gives out the
// same addresses of the second family as one that applied the log.
func TestSnapshotKeepsWhereToSearch(t *testing.T) {
	w := dual(t)
	w.must(txn(api.Create, service("a", in("", "IPv6")), service("b", in("", "IPv6"))))
	w.must(txn(api.Delete, service("a")))
	again := &world{t: t, s: reread(t, w.s), now: w.now, index: w.index}
	for _, w := range []*world{w, again} {
		w.must(txn(api.Create, service("c", in("", "IPv6"))))
		if got := fetch[*corev1.Service](w, "default", "c").Spec.ClusterIP; got != "fd00:97::3" {
			t.Errorf("got %s, which was free a moment ago", got)
		}
	}
}

// BenchmarkReduceNodePort creates a service in a cluster that has n already.
func BenchmarkReduceNodePort(b *testing.B) {
	for _, n := range []int{100, 30_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			born := bootstrap()
			born.ServiceCIDR, born.DNS = netip.MustParsePrefix("172.16.0.0/12"), netip.MustParseAddr("172.16.0.2")
			born.NodePorts = command.PortRange{First: 1024, Last: 65535}
			s, _, _ := state.Reduce(state.New(), 1, command.Txn{Bootstrap: born})
			for i := range n {
				next, r, _ := state.Reduce(s, 2, txn(api.Create, service(fmt.Sprint("s", i), typed("NodePort", "x 80/TCP"))))
				if r.Rejected != nil {
					b.Fatal(r.Rejected)
				}
				s = next
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, r, _ := state.Reduce(s, 3, txn(api.Create, service("new", typed("NodePort", "x 80/TCP")))); r.Rejected != nil {
					b.Fatal(r.Rejected)
				}
			}
		})
	}
}
