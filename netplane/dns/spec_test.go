package dns

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/render"
)

// specCluster has what the examples of the specification are about.
func specCluster() render.Desired {
	port := func(name string, n int32) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Port: n, Protocol: corev1.ProtocolTCP}
	}
	endpoints := func(svc string, family discoveryv1.AddressType, ports []discoveryv1.EndpointPort, eps ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
		return &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: svc + "-" + string(family), Labels: map[string]string{discoveryv1.LabelServiceName: svc}},
			AddressType: family, Ports: ports, Endpoints: eps,
		}
	}
	ep := func(host string, ready bool, addrs ...string) discoveryv1.Endpoint {
		e := discoveryv1.Endpoint{Addresses: addrs, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
		if host != "" {
			e.Hostname = &host
		}
		return e
	}
	https := []discoveryv1.EndpointPort{{Name: ptr("https"), Port: ptr(int32(443))}, {Name: ptr("metrics"), Port: ptr(int32(9090))}}
	unnamed := []discoveryv1.EndpointPort{{Name: ptr(""), Port: ptr(int32(80))}}
	tolerant := svc("default", "tolerant", corev1.ServiceSpec{ClusterIP: "None", Ports: []corev1.ServicePort{port("", 80)}})
	tolerant.Annotations = map[string]string{"service.alpha.kubernetes.io/tolerate-unready-endpoints": "true"}
	v4, v6 := discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6
	return render.Desired{
		Domain: "cluster.local", DNS: netip.MustParseAddr("10.3.0.10"),
		ServiceCIDR: []netip.Prefix{netip.MustParsePrefix("10.3.0.0/26"), netip.MustParsePrefix("2001:db8::/112")},
		ClusterCIDR: []netip.Prefix{netip.MustParsePrefix("10.3.0.64/26"), netip.MustParsePrefix("2001:db8:0:1::/64")},
		Services: []*corev1.Service{
			svc("default", "kubernetes", corev1.ServiceSpec{ClusterIP: "10.3.0.1", ClusterIPs: []string{"10.3.0.1", "2001:db8::1"}, Ports: []corev1.ServicePort{port("https", 443)}}),
			svc("default", "plain", corev1.ServiceSpec{ClusterIP: "10.3.0.2", Ports: []corev1.ServicePort{port("", 80)}}),
			svc("default", "headless", corev1.ServiceSpec{ClusterIP: "None", Ports: []corev1.ServicePort{port("https", 443), port("metrics", 9090)}}),
			svc("default", "unnamed", corev1.ServiceSpec{ClusterIP: "None", Ports: []corev1.ServicePort{port("", 80)}}),
			svc("default", "notready", corev1.ServiceSpec{ClusterIP: "None", Ports: []corev1.ServicePort{port("https", 443)}}),
			svc("default", "published", corev1.ServiceSpec{ClusterIP: "None", PublishNotReadyAddresses: true}),
			tolerant,
			svc("default", "foo", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "www.example.com", Ports: []corev1.ServicePort{port("https", 443)}}),
			svc("default", "foo6", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "www.example.com."}),
			svc("default", "near", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "Kubernetes.default.svc.cluster.local"}),
			svc("default", "chain", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "near.default.svc.cluster.local"}),
			svc("default", "dangling", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "gone.default.svc.cluster.local"}),
			svc("default", "faraway", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "gone.example.com"}),
			svc("default", "numbers", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "192.0.2.5"}),
		},
		Slices: []*discoveryv1.EndpointSlice{
			endpoints("headless", v4, https, ep("my-pet", true, "10.3.0.100"), ep("My-Pet-2", true, "10.3.0.101"), ep("", true, "10.3.0.102"), ep("asleep", false, "10.3.0.103")),
			endpoints("headless", v6, https, ep("my-pet", true, "2001:db8:0:1::1", "2001:db8:0:1::2")),
			endpoints("plain", v4, unnamed, ep("pet-0", true, "10.3.0.90"), ep("", false, "10.3.0.91")),
			endpoints("unnamed", v4, unnamed, ep("my-pet", true, "10.3.0.100")),
			endpoints("notready", v4, https, ep("a", false, "10.3.0.110")),
			endpoints("published", v4, nil, ep("a", false, "10.3.0.110")),
			endpoints("tolerant", v4, unnamed, ep("b", false, "10.3.0.111")),
		},
	}
}

// TestSpecification goes through the Kubernetes DNS specification 1.1.0, section by section.
func TestSpecification(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		q := req.Question[0]
		switch name := dns.CanonicalName(q.Name); {
		case name == "www.example.com." && q.Qtype == dns.TypeA:
			resp.Answer = []dns.RR{rr(t, q.Name+" 28715 IN A 192.0.2.53")}
		case name == "www.example.com." && q.Qtype == dns.TypeAAAA:
			resp.Answer = []dns.RR{rr(t, q.Name+" 28715 IN AAAA 2001:db8:9::1")}
		default:
			resp.Rcode = dns.RcodeNameError
			resp.Ns = []dns.RR{rr(t, "example.com. 900 IN SOA ns.example.com. x.example.com. 1 2 3 4 60")}
		}
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(specCluster())
	addr := serve(t, s)
	const d = ".default.svc.cluster.local."
	for _, c := range []struct {
		section, name string
		qtype         uint16
		want          string
	}{
		{"2.1", "KUBERNETES.Default.svc.CLUSTER.local.", dns.TypeA, "NOERROR, A 10.3.0.1"},
		{"2.1", "my-pet-2.headless" + d, dns.TypeA, "NOERROR, A 10.3.0.101"},
		{"2.1", "a.published" + d, dns.TypeA, "NOERROR, A 10.3.0.110"},
		{"2.1", "tolerant" + d, dns.TypeA, "NOERROR, A 10.3.0.111"},
		{"2.2", "dns-version.cluster.local.", dns.TypeTXT, `NOERROR, TXT "1.1.0"`},
		{"2.3.1", "kubernetes" + d, dns.TypeA, "NOERROR, A 10.3.0.1"},
		{"2.3.1", "kubernetes" + d, dns.TypeAAAA, "NOERROR, AAAA 2001:db8::1"},
		{"2.3.1", "plain" + d, dns.TypeAAAA, "NOERROR"},
		{"2.3.2", "_https._tcp.kubernetes" + d, dns.TypeSRV, "NOERROR, SRV 0 100 443 kubernetes" + d},
		{"2.3.2", "_._tcp.plain" + d, dns.TypeSRV, "NXDOMAIN"},
		{"2.3.3", "1.0.3.10.in-addr.arpa.", dns.TypePTR, "NOERROR, PTR kubernetes" + d},
		{"2.3.3", mustReverse(t, "2001:db8::1"), dns.TypePTR, "NOERROR, PTR kubernetes" + d},
		{"2.4.1", "headless" + d, dns.TypeA, "NOERROR, A 10.3.0.100, A 10.3.0.101, A 10.3.0.102"},
		{"2.4.1", "headless" + d, dns.TypeAAAA, "NOERROR, AAAA 2001:db8:0:1::1, AAAA 2001:db8:0:1::2"},
		{"2.4.1", "my-pet.headless" + d, dns.TypeA, "NOERROR, A 10.3.0.100"},
		{"2.4.1", "my-pet.headless" + d, dns.TypeAAAA, "NOERROR, AAAA 2001:db8:0:1::1, AAAA 2001:db8:0:1::2"},
		{"2.4.1", "10-3-0-102.headless" + d, dns.TypeA, "NOERROR, A 10.3.0.102"},
		{"2.4.1", "asleep.headless" + d, dns.TypeA, "NXDOMAIN"},
		{"2.4.1", "notready" + d, dns.TypeA, "NXDOMAIN"},
		{"2.4.1", "notready" + d, dns.TypeAAAA, "NXDOMAIN"},
		{"2.4.1", "unnamed" + d, dns.TypeAAAA, "NOERROR"}, // there is one of the other family
		{"2.4.2", "_https._tcp.headless" + d, dns.TypeSRV,
			"NOERROR, SRV 0 100 443 10-3-0-102.headless" + d + ", SRV 0 100 443 my-pet-2.headless" + d + ", SRV 0 100 443 my-pet.headless" + d},
		{"2.4.2", "_metrics._tcp.headless" + d, dns.TypeSRV,
			"NOERROR, SRV 0 100 9090 10-3-0-102.headless" + d + ", SRV 0 100 9090 my-pet-2.headless" + d + ", SRV 0 100 9090 my-pet.headless" + d},
		{"2.4.2", "_._tcp.unnamed" + d, dns.TypeSRV, "NXDOMAIN"},
		{"2.4.2", "_https._tcp.notready" + d, dns.TypeSRV, "NXDOMAIN"},
		{"2.4.3", "100.0.3.10.in-addr.arpa.", dns.TypePTR, "NOERROR, PTR my-pet.headless" + d + ", PTR my-pet.unnamed" + d},
		{"2.4.3", "102.0.3.10.in-addr.arpa.", dns.TypePTR, "NOERROR, PTR 10-3-0-102.headless" + d},
		{"2.4.3", "103.0.3.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"},
		{"2.4.3", mustReverse(t, "2001:db8:0:1::2"), dns.TypePTR, "NOERROR, PTR my-pet.headless" + d},
		{"2.5", "foo" + d, dns.TypeA, "NOERROR, CNAME www.example.com., A 192.0.2.53"},
		{"2.5", "foo6" + d, dns.TypeAAAA, "NOERROR, CNAME www.example.com., AAAA 2001:db8:9::1"},
		{"2.5", "foo" + d, dns.TypeCNAME, "NOERROR, CNAME www.example.com."},
		// What the specification leaves open.
		{"3", "_https._tcp.foo" + d, dns.TypeSRV, "NXDOMAIN"},
		{"3", "_tcp.foo" + d, dns.TypeSRV, "NXDOMAIN"},
		{"3", "foo" + d, dns.TypeSRV, "NXDOMAIN, CNAME www.example.com."},
		{"3", "pet-0.plain" + d, dns.TypeA, "NOERROR, A 10.3.0.90"},
		{"3", "pet-1.plain" + d, dns.TypeA, "NXDOMAIN"},
		{"3", "10-3-0-91.plain" + d, dns.TypeA, "NXDOMAIN"},
		{"3", "90.0.3.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"},
		{"3", "headless" + d, dns.TypeSRV,
			"NOERROR, SRV 0 100 443 10-3-0-102.headless" + d + ", SRV 0 100 443 my-pet-2.headless" + d + ", SRV 0 100 443 my-pet.headless" + d +
				", SRV 0 100 9090 10-3-0-102.headless" + d + ", SRV 0 100 9090 my-pet-2.headless" + d + ", SRV 0 100 9090 my-pet.headless" + d},
		{"3", "near" + d, dns.TypeAAAA, "NOERROR, CNAME kubernetes" + d + ", AAAA 2001:db8::1"},
		{"3", "chain" + d, dns.TypeA, "NOERROR, CNAME near" + d + ", CNAME kubernetes" + d + ", A 10.3.0.1"},
		{"3", "dangling" + d, dns.TypeA, "NXDOMAIN, CNAME gone" + d},
		{"3", "faraway" + d, dns.TypeA, "NXDOMAIN, CNAME gone.example.com."},
		{"3", "numbers" + d, dns.TypeA, "NOERROR"},
		{"3", "kubernetes" + d, dns.TypeSRV, "NOERROR, SRV 0 100 443 kubernetes" + d},
		{"3", "10-3-0-102.default.pod.cluster.local.", dns.TypeA, "NOERROR, A 10.3.0.102"},
	} {
		t.Run(c.section+"/"+c.name+dns.TypeToString[c.qtype], func(t *testing.T) {
			m := exchange(t, "udp", addr, new(dns.Msg).SetQuestion(c.name, c.qtype))
			if got := brief(m); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
			if !m.RecursionAvailable || !m.Authoritative {
				t.Errorf("ra %t, aa %t", m.RecursionAvailable, m.Authoritative)
			}
			checkAbsence(t, m)
			checkAdditional(t, m)
		})
	}
}

// checkAbsence: what there is not has a SOA of a zone that the last name is in, which
// says for how long (RFC 2308).
func checkAbsence(t *testing.T, m *dns.Msg) {
	t.Helper()
	if m.Rcode == dns.RcodeSuccess && len(m.Answer) > 0 {
		return
	}
	name := m.Question[0].Name
	for _, rr := range m.Answer {
		name = rr.(*dns.CNAME).Target
	}
	if len(m.Ns) != 1 {
		t.Fatalf("absence with authority %v", m.Ns)
	}
	soa, ok := m.Ns[0].(*dns.SOA)
	if !ok || !dns.IsSubDomain(soa.Hdr.Name, name) || dns.CountLabel(soa.Hdr.Name) < 2 {
		t.Errorf("absence of %s with authority %v", name, m.Ns)
	}
}

// checkAdditional: additional records are the addresses of targets, each once.
func checkAdditional(t *testing.T, m *dns.Msg) {
	t.Helper()
	seen := map[string]bool{}
	for _, extra := range m.Extra {
		if seen[extra.String()] {
			t.Errorf("additional %v twice", extra)
		}
		seen[extra.String()] = true
		if !slices.ContainsFunc(m.Answer, func(rr dns.RR) bool {
			s, ok := rr.(*dns.SRV)
			return ok && s.Target == extra.Header().Name
		}) {
			t.Errorf("additional %v", extra)
		}
	}
	if m.Question[0].Qtype == dns.TypeSRV && m.Rcode == dns.RcodeSuccess && len(m.Answer) > 0 && len(m.Extra) == 0 {
		t.Error("targets without addresses")
	}
}

// TestOrigin: the zone of a reverse name is that of the smallest whole label.
func TestOrigin(t *testing.T) {
	z := newZone(specCluster())
	for name, want := range map[string]string{
		"5.0.3.10.in-addr.arpa.": "0.3.10.in-addr.arpa.", "x.cluster.local.": "cluster.local.",
		mustReverse(t, "2001:db8::9"):       strings.Join(strings.Split(mustReverse(t, "2001:db8::9"), ".")[4:], "."),
		mustReverse(t, "2001:db8:0:1::abc"): "1.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.",
	} {
		if got := z.origin(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}
