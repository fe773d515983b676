package netplane_test

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"

	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

// tries are enough for a service in front of all pods to show all of them: with n of them some
// is missing once in n*(1-1/n)^tries, which is less than one of 100,000. IPVS does not draw:
// endpoints take turns.
func (f *fleet) tries() int {
	if vm.Inside() {
		return 3 * len(f.nodes)
	}
	n := float64(len(f.nodes))
	return int(math.Ceil(math.Log(1e-5/n) / math.Log(1-1/n)))
}

// asked is one client and what it asks.
type asked struct {
	from netplanetest.Host
	to   netip.AddrPort
}

func (a asked) String() string { return fmt.Sprintf("%s to %s", a.from, a.to) }

// answers sends requests of many clients at a time, each so often, and returns who answered
// each of them, and from which sources.
func (f *fleet) answers(times int, all ...asked) map[asked]map[netip.Addr]netip.Addr {
	f.t.Helper()
	out := map[asked]map[netip.Addr]netip.Addr{}
	var wg sync.WaitGroup
	for _, a := range all {
		who := map[netip.Addr]netip.Addr{}
		out[a] = who
		wg.Go(func() {
			for range times {
				v, err := f.lab.Send(a.from, render.TCP, a.to)
				if err != nil || v.Rejected {
					f.t.Errorf("%s: %+v, %v", a, v, err)
				}
				if err != nil || v.Rejected || v.Dropped {
					return
				}
				who[v.To.Addr()] = v.From
			}
		})
	}
	wg.Wait()
	return out
}

// TestFleet: in clusters of three and five nodes all pods, nodes and hosts outside reach what
// they should, in both families: pods by their addresses, and services of every type.
func TestFleet(t *testing.T) {
	t.Parallel()
	for _, nodes := range []int{3, 5} {
		t.Run(fmt.Sprint(nodes, " nodes"), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, nodes)
			testPairs(t, f)
			testServices(t, f)
			testNames(t, f)
		})
	}
}

// testPairs: everybody reaches every pod; pods and the host outside as themselves.
func testPairs(t *testing.T, f *fleet) {
	for _, n := range f.nets {
		var all []asked
		for from := range f.lab.Path {
			for _, to := range f.podHosts() {
				all = append(all, asked{from, netip.AddrPortFrom(n.Addr[to], netplanetest.TCPPort)})
			}
		}
		for a, who := range f.answers(1, all...) {
			if len(who) == 0 && vm.Inside() { // slow, rather than out of reach
				who = f.answers(1, a)[a]
			}
			source, ok := who[a.to.Addr()]
			if f.pods[a.from] == nil && a.from != outside {
				source = n.Addr[a.from] // nodes have several
			}
			if !ok || source != n.Addr[a.from] {
				t.Errorf("%s: %v", a, who)
			}
		}
	}
}

// reached checks that each of some clients reaches each of some pods at an address.
func (f *fleet) reached(n netplanetest.Net, what string, to netip.AddrPort, pods []netplanetest.Host, from ...netplanetest.Host) map[netplanetest.Host]map[netip.Addr]netip.Addr {
	f.t.Helper()
	var all []asked
	for _, h := range from {
		all = append(all, asked{h, to})
	}
	var want []netip.Addr
	for _, h := range pods {
		want = append(want, n.Addr[h])
	}
	slices.SortFunc(want, netip.Addr.Compare)
	out := map[netplanetest.Host]map[netip.Addr]netip.Addr{}
	for a, who := range f.answers(f.tries(), all...) {
		if len(who) < len(want) && vm.Inside() {
			// Clients that ask by turns, as endpoints answer, always meet the same one.
			maps.Copy(who, f.answers(f.tries(), a)[a])
		}
		if got := slices.SortedFunc(maps.Keys(who), netip.Addr.Compare); !slices.Equal(got, want) {
			f.t.Errorf("%s, %s: answered by %v, want %v", what, a, got, want)
		}
		out[a.from] = who
	}
	return out
}

// testServices: services of every type with an address, from pods, nodes and outside.
func testServices(t *testing.T, f *fleet) {
	pods, last := f.podHosts(), len(f.nodes)-1
	ends := []netplanetest.Host{pods[0], pods[last]}
	nodePort := func(port int32, policy corev1.ServiceExternalTrafficPolicy) func(*corev1.Service) {
		return func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, policy, port
		}
	}
	balanced := []string{"192.168.1.200", "fd00:1::200"}
	external := []string{"203.0.113.9", "2001:db8:f::9"}
	f.service("web", 1, 80, netplanetest.TCPPort, nil, pods...)
	f.service("door", 2, 80, netplanetest.TCPPort, nodePort(30080, corev1.ServiceExternalTrafficPolicyCluster), pods...)
	f.service("local", 3, 80, netplanetest.TCPPort, nodePort(30081, corev1.ServiceExternalTrafficPolicyLocal), ends...)
	f.service("balanced", 4, 80, netplanetest.TCPPort, func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		for _, a := range balanced {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
		}
	}, ends...)
	f.service("external", 5, 80, netplanetest.TCPPort, func(s *corev1.Service) { s.Spec.ExternalIPs = external }, ends...)
	f.service("headless", 6, 80, netplanetest.TCPPort, func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = corev1.ClusterIPNone, nil }, pods...)
	f.service("alias", 7, 80, 80, func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalName, s.Spec.ClusterIP, s.Spec.ClusterIPs = corev1.ServiceTypeExternalName, "web.default.svc.cluster.local", "", nil
	})
	f.publish()
	for i, n := range f.nets {
		whole := fmt.Sprint("/", n.Addr[outside].BitLen())
		netspacetest.Route(t, f.router, external[i]+whole, n.Addr["n1"].String(), "")
		var inside []netplanetest.Host
		for h := range f.lab.Path {
			if h != outside {
				inside = append(inside, h)
			}
		}
		everybody := append(inside, outside)
		f.reached(n, "cluster address", netip.AddrPortFrom(n.Service(1), 80), pods, inside...)
		f.reached(n, "load balancer", netip.AddrPortFrom(netip.MustParseAddr(balanced[i]), 80), ends, everybody...)
		f.reached(n, "external address", netip.AddrPortFrom(netip.MustParseAddr(external[i]), 80), ends, everybody...)
		for _, node := range []netplanetest.Host{"n1", "n2"} {
			f.reached(n, "node port", netip.AddrPortFrom(n.Addr[node], 30080), pods, outside, "pod1", pods[last], "n1")
		}
		for _, h := range ends { // clients from outside reach the pod there, as themselves
			at := netip.AddrPortFrom(n.Addr[netplanetest.Host(f.pods[h].Spec.NodeName)], 30081)
			who := f.reached(n, "node port with policy Local", at, []netplanetest.Host{h}, outside)
			if source := who[outside][n.Addr[h]]; source != n.Addr[outside] {
				t.Errorf("%s sees %s for the client outside", h, source)
			}
		}
		f.reached(n, "node port with policy Local, from inside", netip.AddrPortFrom(n.Addr["n2"], 30081), ends, "pod2", "n2")
		if v, err := f.lab.Send(outside, render.TCP, netip.AddrPortFrom(n.Addr["n2"], 30081)); err != nil || v.To.IsValid() {
			t.Errorf("a node without a pod answers outside, with policy Local: %+v, %v", v, err)
		}
	}
}

// testNames: services that are names only, from a pod of each node.
func testNames(t *testing.T, f *fleet) {
	for _, h := range f.podHosts() {
		for family, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
			if m := ask(t, f.lab.Path[h], "udp", "headless.default.svc.cluster.local.", kind); len(m.Answer) != len(f.pods) {
				t.Errorf("%s: the headless service has %d addresses: %v", h, len(m.Answer), m)
			}
			m := ask(t, f.lab.Path[h], "udp", "alias.default.svc.cluster.local.", kind)
			want := f.nets[family].Service(1).String()
			if len(m.Answer) != 2 || !slices.ContainsFunc(m.Answer, func(rr dns.RR) bool { return dns.Field(rr, 1) == want }) {
				t.Errorf("%s: the alias leads to %v, want %s", h, m.Answer, want)
			}
		}
	}
}

// TestFleetPolicies: the public recipes of network policies with each pod on another node, in
// both families at a time.
func TestFleetPolicies(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3)
	var lists [2][]netplanetest.Recipe
	for i := range f.nets {
		n := f.nets[i]
		n.Addr = maps.Clone(n.Addr)
		n.Addr[netplanetest.Node] = n.Addr["n1"]
		lists[i] = netplanetest.Recipes(t, n)
	}
	begun := time.Now()
	packets := 0
	for r := range lists[0] {
		t.Run(lists[0][r].Name, func(t *testing.T) {
			f.t = t
			f.policies, f.namespaces = nil, lists[0][r].Namespaces
			for i, suffix := range []string{"", "-6"} { // rules of both add up
				for _, p := range lists[i][r].Policies {
					p = p.DeepCopy()
					p.Name += suffix
					f.policies = append(f.policies, p)
				}
			}
			for h, labelled := range lists[0][r].Pods {
				pod := f.pods[h].DeepCopy()
				pod.Namespace, pod.Labels, pod.Spec.Containers = labelled.Namespace, labelled.Labels, labelled.Spec.Containers
				f.pods[h] = pod
			}
			f.publish()
			var wg sync.WaitGroup
			for i := range f.nets {
				for _, p := range lists[i][r].Packets {
					packets++
					p, at := f.placed(p, f.nets[i])
					wg.Go(func() { p.Try(t, f.lab, at) })
				}
			}
			wg.Wait()
		})
	}
	t.Logf("%d recipes, %d packets in %s", len(lists[0]), packets, time.Since(begun).Round(time.Millisecond))
	f.t, f.policies = t, nil
	f.publish()
	for _, n := range f.nets {
		if v, err := f.lab.Send("pod1", render.TCP, netip.AddrPortFrom(n.Addr["pod2"], netplanetest.TCPPort)); err != nil || !v.To.IsValid() {
			t.Errorf("without policies: %+v, %v", v, err)
		}
	}
}

// placed makes "node" in a packet the node that its other end is on, and finds the address that
// it goes to.
func (f *fleet) placed(p netplanetest.Packet, n netplanetest.Net) (netplanetest.Packet, netip.AddrPort) {
	if p.From == netplanetest.Node {
		p.From = netplanetest.Host(f.pods[p.To].Spec.NodeName)
	}
	if p.To == netplanetest.Node {
		p.To = netplanetest.Host(f.pods[p.From].Spec.NodeName)
	}
	return p, netip.AddrPortFrom(n.Addr[p.To], p.Port)
}
