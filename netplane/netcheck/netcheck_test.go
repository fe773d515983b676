package netcheck

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"
)

func node(name string, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func pod(name, on string, ready bool, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name), Labels: map[string]string{"app": name}}}
	p.Spec.NodeName, p.Status.Phase = on, corev1.PodRunning
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	if ready {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}
	return p
}

func service(name, ip string, port int32, endpoints ...string) (*corev1.Service, *discoveryv1.EndpointSlice) {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Port: port, Protocol: corev1.ProtocolTCP}}}}
	number, tcp, empty := int32(8080), corev1.ProtocolTCP, ""
	e := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: name + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &empty, Port: &number, Protocol: &tcp}},
	}
	for _, a := range endpoints {
		e.Endpoints = append(e.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s, e
}

// cluster has three nodes: one with a good pod, one with pods that are no good, one with none.
func cluster() Cluster {
	host := pod("host", "n2", true, "10.0.0.2")
	host.Spec.HostNetwork = true
	ending := pod("ending", "n2", true, "10.1.1.5")
	ending.DeletionTimestamp = &metav1.Time{}
	c := Cluster{
		Nodes: []*corev1.Node{node("n3", "10.0.0.3"), node("n1", "10.0.0.1", "fd00::1"), node("n2", "10.0.0.2", "fd00::2")},
		Pods: []*corev1.Pod{
			pod("web", "n1", true, "10.1.0.9"), pod("app", "n1", true, "10.1.0.8"), pod("vault", "n1", true, "10.1.0.2"),
			pod("slow", "n2", false, "10.1.1.4"), host, ending, pod("vault", "n2", true, "10.1.1.2"), pod("waiting", "n2", true),
		},
		Policies: []*networkingv1.NetworkPolicy{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "closed"},
			Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "vault"}}},
		}},
		DNS: netip.MustParseAddr("10.2.0.10"), Domain: "cluster.local",
	}
	for _, s := range []struct {
		name, ip  string
		endpoints []string
	}{{"web", "10.2.0.2", []string{"10.1.0.9", "10.1.0.8"}}, {"vault", "10.2.0.3", []string{"10.1.0.2"}}, {"none", "10.2.0.4", nil}, {"headless", "None", []string{"10.1.0.9"}}} {
		svc, e := service(s.name, s.ip, 80, s.endpoints...)
		c.Services, c.Slices = append(c.Services, svc), append(c.Slices, e)
	}
	return c
}

func TestPlan(t *testing.T) {
	p := New(cluster())
	if !slices.Equal(p.Nodes, []string{"n1", "n2", "n3"}) || p.Begin("n1").Pod != "app" || p.Begin("n2").Pod != "" || p.Begin("n3").Pod != "" {
		t.Fatalf("nodes %v, pods %v", p.Nodes, p.Pods)
	}
	if len(p.Skipped) != 1 || !strings.Contains(p.Skipped[0], "network policies isolate: 1") {
		t.Errorf("skipped: %q", p.Skipped)
	}
	four, six := netip.MustParseAddr("10.1.0.8"), netip.MustParseAddr("fd01::8")
	ends := map[string]End{"n1": {Addresses: []netip.Addr{four, six}}, "n2": {Addresses: []netip.Addr{netip.MustParseAddr("10.1.1.7")}}}
	var got []string
	for _, q := range p.Probes("n1", ends) {
		got = append(got, fmt.Sprintf("%s %s %s:%d", q.Kind, q.To, q.Address, q.Port))
	}
	want := []string{
		"nodeToNode n2 10.0.0.2:0", "nodeToNode n2 fd00::2:0", "nodeToPod n2 10.1.1.7:0", "podToPod n2 10.1.1.7:0",
		"nodeToNode n3 10.0.0.3:0", // it takes no part
		"nodeToPod n1 10.1.0.8:0", "nodeToPod n1 fd01::8:0",
		"podToService shop/web:80 10.2.0.2:80",
		"nodeToDNS web.shop.svc.cluster.local. 10.2.0.10:53", "podToDNS web.shop.svc.cluster.local. 10.2.0.10:53",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	ends["n1"] = End{Error: "no address is free"}
	for _, q := range p.Probes("n1", ends) {
		if q.Kind.FromPod() || q.To == "n1" {
			t.Errorf("there is no pod to send %+v", q)
		}
	}
	c := cluster()
	c.Services = nil
	for _, q := range New(c).Probes("n1", ends) {
		if q.Kind == NodeToDNS && (q.To != "dns-version.cluster.local." || q.Want.IsValid()) {
			t.Errorf("without services: %+v", q)
		}
	}
}

// TestUDP: of a service its first TCP port and its first UDP port are tried, the latter with a
// query if it is one of names.
func TestUDP(t *testing.T) {
	c := cluster()
	c.Services, c.Slices = nil, nil
	svc, e := service("names", "10.2.0.5", 53, "10.1.0.9")
	udp, sctp := corev1.ProtocolUDP, corev1.ProtocolSCTP
	svc.Spec.Ports = nil
	e.Ports = nil
	for _, p := range []struct {
		name  string
		port  int32
		proto corev1.Protocol
	}{{"sctp", 9, sctp}, {"plain", 514, udp}, {"dns", 53, udp}, {"dns-tcp", 53, corev1.ProtocolTCP}, {"web", 80, corev1.ProtocolTCP}} {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: p.name, Port: p.port, Protocol: p.proto})
		e.Ports = append(e.Ports, discoveryv1.EndpointPort{Name: &p.name, Port: &p.port, Protocol: &p.proto})
	}
	c.Services, c.Slices = append(c.Services, svc), append(c.Slices, e)
	tried := func() (got []string) {
		for _, q := range New(c).Probes("n1", map[string]End{"n1": {Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.8")}}}) {
			if q.Port != 0 && q.Kind != NodeToDNS && q.Kind != PodToDNS {
				got = append(got, fmt.Sprintf("%s %s %s:%d %v", q.Kind, q.To, q.Address, q.Port, q.Names))
			}
		}
		return got
	}
	want := []string{"podToServiceUDP shop/names:514/UDP 10.2.0.5:514 false", "podToService shop/names:53 10.2.0.5:53 false"}
	if got := tried(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	svc.Spec.Ports[1].Port = 53 // a port of names, whatever it is called
	want[0] = "podToServiceUDP shop/names:53/UDP 10.2.0.5:53 true"
	if got := tried(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	svc.Spec.Ports[1].Port, svc.Spec.Ports[1].Name, e.Ports[1].Name = 5353, "dns-udp", &[]string{"dns-udp"}[0]
	want[0] = "podToServiceUDP shop/names:5353/UDP 10.2.0.5:5353 true"
	if got := tried(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	svc.Spec.Ports = svc.Spec.Ports[1:2] // one that takes nothing else has a name all the same
	if q := New(c).dns; q.To != "names.shop.svc.cluster.local." || q.Want.String() != "10.2.0.5" {
		t.Errorf("%+v", q)
	}
}

// TestServicesAreBounded: in a cluster with many services some are tried, and the report says
// that others are not.
func TestServicesAreBounded(t *testing.T) {
	c := cluster()
	for i := range 20 {
		svc, e := service(fmt.Sprint("more", i), fmt.Sprintf("10.2.1.%d", i+1), 80, "10.1.0.9")
		c.Services, c.Slices = append(c.Services, svc), append(c.Slices, e)
	}
	r := New(c).Report(nil)
	if len(r.Services) != MaxServices || !strings.Contains(strings.Join(r.Skipped, "\n"), "further services: 13") {
		t.Errorf("%d services are tried, skipped %q", len(r.Services), r.Skipped)
	}
}

// TestTargets: nobody tries itself or anybody twice, and in every cluster all are tried as
// often as they try others.
func TestTargets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 200).Draw(t, "nodes")
		var nodes []string
		for i := range n {
			nodes = append(nodes, fmt.Sprintf("n%03d", i))
		}
		tried := map[string]int{}
		for _, node := range nodes {
			to := targets(nodes, node)
			if len(to) != min(n-1, MaxTargets) || slices.Contains(to, node) || len(slices.Compact(slices.Clone(to))) != len(to) {
				t.Fatalf("%s of %d nodes tries %v", node, n, to)
			}
			for _, other := range to {
				tried[other]++
			}
		}
		for node, times := range tried {
			if times != min(n-1, MaxTargets) {
				t.Fatalf("%s of %d nodes is tried %d times", node, n, times)
			}
		}
	})
}

func TestReport(t *testing.T) {
	p := New(cluster())
	at := netip.MustParseAddr("10.0.0.9")
	lost := Outcome{Sent: 3, Lost: 3, Error: "no answer to 3 pings"}
	good := Outcome{Sent: 3, Latency: time.Millisecond}
	for _, tc := range []struct {
		name   string
		checks []Check
		nodes  map[string]Part
		advice []string // what each line contains
	}{
		{name: "well", checks: []Check{{"n1", Probe{Kind: NodeToNode, To: "n2", Address: at}, good}}},
		{
			name: "a cut link is the reason for all that follows", advice: []string{"n1 does not reach n2 at 10.0.0.9", "n2 does not reach n1"},
			checks: []Check{
				{"n1", Probe{Kind: PodToPod, To: "n2", Address: at}, lost}, {"n1", Probe{Kind: NodeToNode, To: "n2", Address: at}, lost},
				{"n2", Probe{Kind: NodeToNode, To: "n1", Address: at}, lost}, {"n2", Probe{Kind: NodeToPod, To: "n1", Address: at}, lost},
			},
		},
		{
			name: "only the overlay is closed", advice: []string{"pods of n2 are not reached from n1 while the nodes may reach each other: is UDP port 4789"},
			checks: []Check{{"n1", Probe{Kind: NodeToNode, To: "n2", Address: at}, good}, {"n1", Probe{Kind: PodToPod, To: "n2", Address: at}, lost}, {"n1", Probe{Kind: NodeToPod, To: "n2", Address: at}, lost}},
		},
		{
			name: "large packets", advice: []string{"packets of 1450 bytes are lost where small ones pass"},
			checks: []Check{{"n1", Probe{Kind: PodToPod, To: "n2", Address: at}, Outcome{Sent: 3, TooLarge: 1450, Error: "too large"}}},
		},
		{
			name: "its own pod", advice: []string{"node n1 does not reach a pod of its own"},
			checks: []Check{{"n1", Probe{Kind: NodeToPod, To: "n1", Address: at}, lost}},
		},
		{
			name: "a service", advice: []string{"decree describe service web -n shop"},
			checks: []Check{{"n1", Probe{Kind: PodToService, To: "shop/web:80", Address: at, Port: 80}, Outcome{Error: "TCP port 80: connection refused"}}},
		},
		{
			name: "a service that takes UDP", advice: []string{"service shop/log:514/UDP is not reached from pods on n1 (UDP port 514: read: connection refused): decree describe service log -n shop"},
			checks: []Check{{"n1", Probe{Kind: PodToUDP, To: "shop/log:514/UDP", Address: at, Port: 514}, Outcome{Error: "UDP port 514: read: connection refused"}}},
		},
		{name: "silence is no failure", checks: []Check{{"n1", Probe{Kind: PodToUDP, To: "shop/log:514/UDP", Address: at, Port: 514}, Outcome{Silent: true}}}},
		{
			name: "DNS", advice: []string{"cluster DNS at 10.0.0.9 does not answer on n1"},
			checks: []Check{{"n1", Probe{Kind: PodToDNS, To: "x.", Address: at, Port: 53}, Outcome{Error: "no answer"}}},
		},
		{
			name: "a node takes no part", advice: []string{"node n2: its agent is not connected"},
			nodes: map[string]Part{"n2": {Trouble: "its agent is not connected"}},
		},
		{
			name: "a node goes away", advice: []string{"node n2: the connection broke", "n2 does not reach n1"},
			nodes: map[string]Part{"n2": {Trouble: "the connection broke", Probes: []Probe{{Kind: NodeToNode, To: "n1", Address: at}}}},
		},
		{
			name: "a namespace cannot be made", advice: []string{"node n2: no address is free"},
			nodes: map[string]Part{"n2": {End: End{Error: "no address is free"}, Trouble: "and then"}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			parts := map[string]Part{}
			for _, c := range tc.checks {
				part := parts[c.From]
				part.Probes, part.Outcomes = append(part.Probes, c.Probe), append(part.Outcomes, c.Outcome)
				parts[c.From] = part
			}
			for name, part := range tc.nodes {
				parts[name] = part
			}
			r := p.Report(parts)
			if r.OK != (len(tc.advice) == 0) || len(r.Advice) != len(tc.advice) {
				t.Fatalf("ok %v, advice %q", r.OK, r.Advice)
			}
			for i, want := range tc.advice {
				if !strings.Contains(r.Advice[i], want) {
					t.Errorf("advice %q, want %q in it", r.Advice[i], want)
				}
			}
			if r.Nodes[0].Pod != "shop/app" || r.Nodes[1].Pod != "" {
				t.Errorf("nodes: %+v", r.Nodes)
			}
			data, err := json.Marshal(r)
			var back Report
			if err == nil {
				err = json.Unmarshal(data, &back)
			}
			if err != nil || !reflect.DeepEqual(*r, back) {
				t.Errorf("%v: JSON keeps less than all of it: %s", err, data)
			}
		})
	}
}
