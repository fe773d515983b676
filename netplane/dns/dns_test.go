package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/render"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ptr[T any](v T) *T { return &v }

func svc(ns, name string, spec corev1.ServiceSpec) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: spec}
}

func slice(svc string, family discoveryv1.AddressType, eps ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: svc + "-x", Labels: map[string]string{discoveryv1.LabelServiceName: svc}},
		AddressType: family, Endpoints: eps, Ports: []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(8080)), Protocol: ptr(corev1.ProtocolTCP)}},
	}
}

func fixture() render.Desired {
	http := []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}}
	ep := func(addr, host string, ready bool) discoveryv1.Endpoint {
		e := discoveryv1.Endpoint{Addresses: []string{addr}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
		if host != "" {
			e.Hostname = &host
		}
		return e
	}
	var many []discoveryv1.Endpoint
	for i := range 200 {
		many = append(many, ep(fmt.Sprintf("10.98.7.%d", i), "", true))
	}
	return render.Desired{
		Domain: "Cluster.Local", DNS: netip.MustParseAddr("10.97.0.10"),
		ServiceCIDR: []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16"), netip.MustParsePrefix("fd97::/108")},
		ClusterCIDR: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")},
		Services: []*corev1.Service{
			svc("default", "kubernetes", corev1.ServiceSpec{ClusterIP: "10.97.0.1", Ports: []corev1.ServicePort{{Name: "https", Port: 443}}}),
			svc("default", "web", corev1.ServiceSpec{ClusterIP: "10.97.0.80", ClusterIPs: []string{"10.97.0.80", "fd97::80"}, Ports: http}),
			svc("default", "db", corev1.ServiceSpec{ClusterIP: "None", Ports: http}),
			svc("default", "empty", corev1.ServiceSpec{ClusterIP: "None", Ports: http}),
			svc("default", "many", corev1.ServiceSpec{ClusterIP: "None", Ports: http}),
			svc("default", "alias", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "www.example.org"}),
			svc("default", "inner", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "web.default.svc.cluster.local"}),
			svc("default", "loop", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "loop.default.svc.cluster.local"}),
		},
		Slices: []*discoveryv1.EndpointSlice{
			slice("db", discoveryv1.AddressTypeIPv4, ep("10.98.0.5", "db-0", true), ep("10.98.0.6", "", true), ep("10.98.0.7", "db-2", false)),
			slice("many", discoveryv1.AddressTypeIPv4, many...),
		},
	}
}

// sockets are two with the same port, which may take a few tries.
func sockets(t testing.TB, at string) (net.PacketConn, net.Listener) {
	t.Helper()
	var errs []error
	for range 50 {
		ln, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenPacket("udp", ln.Addr().String())
		if err == nil {
			return pc, ln
		}
		errs = append(errs, err, ln.Close())
	}
	t.Fatal(errors.Join(errs...))
	return nil, nil
}

// nameserver is one that answers, apart from probes, as fn says, on loopback.
func nameserver(t testing.TB, fn func(network string, req, resp *dns.Msg)) string {
	t.Helper()
	pc, ln := sockets(t, "127.0.0.1:0")
	for _, srv := range []*dns.Server{{PacketConn: pc}, {Listener: ln}} {
		network := "tcp"
		if srv.PacketConn != nil {
			network = "udp"
		}
		srv.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
			resp := new(dns.Msg).SetReply(req)
			if strings.HasSuffix(dns.CanonicalName(req.Question[0].Name), probeDomain) {
				resp.Rcode = dns.RcodeNameError
			} else {
				fn(network, req, resp)
			}
			_ = w.WriteMsg(resp)
		})
		up, ended := make(chan struct{}), make(chan struct{})
		srv.NotifyStartedFunc = func() { close(up) }
		go func() { defer close(ended); _ = srv.ActivateAndServe() }()
		<-up
		t.Cleanup(func() { _ = srv.Shutdown(); <-ended })
	}
	return pc.LocalAddr().String()
}

func addrPorts(list ...string) (out []netip.AddrPort) {
	for _, text := range list {
		out = append(out, netip.MustParseAddrPort(text))
	}
	return out
}

func rr(t testing.TB, s string) dns.RR {
	t.Helper()
	r, err := dns.NewRR(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// serve runs a Server on loopback and returns its address.
func serve(t testing.TB, s *Server) string {
	t.Helper()
	return serveAt(t, s, "127.0.0.1:0")
}

func serveAt(t testing.TB, s *Server, at string) string {
	t.Helper()
	pc, ln := sockets(t, at)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, pc, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	return pc.LocalAddr().String()
}

func exchange(t testing.TB, network, addr string, req *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: 10 * time.Second}
	m, _, err := c.Exchange(req, addr)
	if err != nil {
		t.Fatalf("%s %s: %v", network, req.Question[0].String(), err)
	}
	return m
}

// brief is an answer in one line, without what is the same everywhere.
func brief(m *dns.Msg) string {
	out := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		f := strings.Fields(rr.String())
		out = append(out, strings.Join(f[3:], " "))
	}
	if !slices.ContainsFunc(m.Answer, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeCNAME }) {
		slices.Sort(out[1:]) // addresses take turns in being first
	}
	return strings.Join(out, ", ")
}

func TestAnswers(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		if dns.CanonicalName(req.Question[0].Name) == "www.example.org." && req.Question[0].Qtype == dns.TypeA {
			resp.Answer = []dns.RR{rr(t, "www.example.org. 60 IN A 192.0.2.1")}
			return
		}
		resp.Rcode = dns.RcodeNameError
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(fixture())
	addr := serve(t, s)
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"web.default.svc.cluster.local.", dns.TypeA, "NOERROR, A 10.97.0.80"},
		{"WEB.default.SVC.cluster.LOCAL.", dns.TypeA, "NOERROR, A 10.97.0.80"},
		{"web.default.svc.cluster.local.", dns.TypeAAAA, "NOERROR, AAAA fd97::80"},
		{"web.default.svc.cluster.local.", dns.TypeMX, "NOERROR"},
		{"kubernetes.default.svc.cluster.local.", dns.TypeA, "NOERROR, A 10.97.0.1"},
		{"kubernetes.default.svc.cluster.local.", dns.TypeAAAA, "NOERROR"},
		{"nope.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"web.other.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"web.default.svc.cluster.local.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"www.example.org.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"*.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"x.web.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"default.svc.cluster.local.", dns.TypeA, "NOERROR"},
		{"other.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"svc.cluster.local.", dns.TypeA, "NOERROR"},
		{"_tcp.web.default.svc.cluster.local.", dns.TypeSRV, "NOERROR"},
		{"_udp.web.default.svc.cluster.local.", dns.TypeSRV, "NXDOMAIN"},
		{"_http._tcp.web.default.svc.cluster.local.", dns.TypeSRV, "NOERROR, SRV 0 100 80 web.default.svc.cluster.local."},
		{"_http._tcp.web.default.svc.cluster.local.", dns.TypeA, "NOERROR"},
		{"_nope._tcp.web.default.svc.cluster.local.", dns.TypeSRV, "NXDOMAIN"},
		{"_http._tcp.db.default.svc.cluster.local.", dns.TypeSRV, "NOERROR, SRV 0 100 8080 10-98-0-6.db.default.svc.cluster.local., SRV 0 100 8080 db-0.db.default.svc.cluster.local."},
		{"db.default.svc.cluster.local.", dns.TypeA, "NOERROR, A 10.98.0.5, A 10.98.0.6"},
		{"db.default.svc.cluster.local.", dns.TypeAAAA, "NOERROR"},
		{"db-0.db.default.svc.cluster.local.", dns.TypeA, "NOERROR, A 10.98.0.5"},
		{"10-98-0-6.db.default.svc.cluster.local.", dns.TypeA, "NOERROR, A 10.98.0.6"},
		{"db-2.db.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"empty.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"10-98-0-6.default.pod.cluster.local.", dns.TypeA, "NOERROR, A 10.98.0.6"},
		{"fd98--6.default.pod.cluster.local.", dns.TypeAAAA, "NOERROR, AAAA fd98::6"},
		{"10-98-0-6.default.pod.cluster.local.", dns.TypeAAAA, "NOERROR"},
		{"10-98-0-600.default.pod.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"10-98-0-6.other.pod.cluster.local.", dns.TypeA, "NXDOMAIN"},
		{"80.0.97.10.in-addr.arpa.", dns.TypePTR, "NOERROR, PTR web.default.svc.cluster.local."},
		{"5.0.98.10.in-addr.arpa.", dns.TypePTR, "NOERROR, PTR db-0.db.default.svc.cluster.local."},
		{"99.0.97.10.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"},
		{"1.2.0.192.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"},
		{strings.TrimPrefix(mustReverse(t, "fd97::80"), "x"), dns.TypePTR, "NOERROR, PTR web.default.svc.cluster.local."},
		{"cluster.local.", dns.TypeNS, "NOERROR, NS ns.dns.cluster.local."},
		{"ns.dns.cluster.local.", dns.TypeA, "NOERROR, A 10.97.0.10"},
		{"dns-version.cluster.local.", dns.TypeTXT, `NOERROR, TXT "1.1.0"`},
		{"cluster.local.", dns.TypeAXFR, "REFUSED"},
		{"cluster.local.", dns.TypeIXFR, "REFUSED"},
		{"web.default.svc.cluster.local.", dns.TypeANY, `NOERROR, HINFO "RFC8482" ""`},
		{"alias.default.svc.cluster.local.", dns.TypeANY, `NOERROR, HINFO "RFC8482" ""`},
		{"nope.default.svc.cluster.local.", dns.TypeANY, "NXDOMAIN"},
		{"www.example.org.", dns.TypeANY, `NOERROR, HINFO "RFC8482" ""`},
		{"web.default.svc.cluster.local.", dns.TypeTSIG, "NOTIMP"},
		{"www.example.org.", dns.TypeA, "NOERROR, A 192.0.2.1"},
		{"alias.default.svc.cluster.local.", dns.TypeA, "NOERROR, CNAME www.example.org., A 192.0.2.1"},
		{"alias.default.svc.cluster.local.", dns.TypeCNAME, "NOERROR, CNAME www.example.org."},
		{"inner.default.svc.cluster.local.", dns.TypeA, "NOERROR, CNAME web.default.svc.cluster.local., A 10.97.0.80"},
		{"loop.default.svc.cluster.local.", dns.TypeA, "SERVFAIL"},
		{".", dns.TypeNS, "NXDOMAIN"}, // what this upstream says
	} {
		for _, network := range []string{"udp", "tcp"} {
			m := exchange(t, network, addr, new(dns.Msg).SetQuestion(c.name, c.qtype))
			if got := brief(m); got != c.want {
				t.Errorf("%s %s over %s: %q, want %q", c.name, dns.TypeToString[c.qtype], network, got, c.want)
			}
			cluster := dns.IsSubDomain("cluster.local.", dns.CanonicalName(c.name))
			if cluster && len(m.Answer) == 0 && (m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError) {
				if len(m.Ns) != 1 || m.Ns[0].(*dns.SOA).Minttl != ttl {
					t.Errorf("%s: absence without a SOA: %v", c.name, m.Ns)
				}
			}
			for _, a := range m.Answer {
				if cluster && a.Header().Rrtype != dns.TypeSRV && a.Header().Ttl > 60 {
					t.Errorf("%s: ttl %d", c.name, a.Header().Ttl)
				}
			}
		}
	}
}

func mustReverse(t *testing.T, a string) string {
	t.Helper()
	r, err := dns.ReverseAddr(a)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTruncation(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serve(t, s)
	req := new(dns.Msg).SetQuestion("many.default.svc.cluster.local.", dns.TypeA)
	size := func(m *dns.Msg) int { m.Compress = true; return m.Len() } // as it was sent
	if m := exchange(t, "udp", addr, req); !m.Truncated || size(m) > 512 {
		t.Errorf("over udp: truncated %t, %d bytes", m.Truncated, size(m))
	}
	req.SetEdns0(4096, true)
	m := exchange(t, "udp", addr, req)
	if !m.Truncated || size(m) <= 512 || size(m) > udpSize {
		t.Errorf("over udp with EDNS: truncated %t, %d bytes", m.Truncated, size(m))
	}
	if opt := m.IsEdns0(); opt == nil || opt.UDPSize() != udpSize || !opt.Do() {
		t.Errorf("EDNS answer %v", opt)
	}
	if m := exchange(t, "tcp", addr, req); m.Truncated || len(m.Answer) != 200 {
		t.Errorf("over tcp: truncated %t, %d answers", m.Truncated, len(m.Answer))
	}
}

func TestOddQueries(t *testing.T) {
	s := New(Config{})
	addr := serve(t, s)
	web := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
	if m := exchange(t, "udp", addr, web); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("before the first Set: %s", brief(m))
	}
	s.Set(fixture())
	badVersion := web.Copy()
	badVersion.SetEdns0(1232, false)
	badVersion.IsEdns0().SetVersion(9)
	chaos := new(dns.Msg).SetQuestion("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	update := new(dns.Msg).SetUpdate("cluster.local.")
	none := &dns.Msg{MsgHdr: dns.MsgHdr{Id: 1}}
	two := web.Copy()
	two.Question = append(two.Question, two.Question[0])
	for name, c := range map[string]struct {
		req   *dns.Msg
		rcode int
	}{
		"EDNS version": {badVersion, dns.RcodeBadVers}, "chaos": {chaos, dns.RcodeRefused}, "update": {update, dns.RcodeNotImplemented},
		"no question": {none, dns.RcodeFormatError}, "two questions": {two, dns.RcodeFormatError},
		"unknown type":  {new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", 65280), dns.RcodeSuccess},
		"long labels":   {new(dns.Msg).SetQuestion(strings.Repeat("a.", 110)+"cluster.local.", dns.TypeA), dns.RcodeNameError},
		"escaped bytes": {new(dns.Msg).SetQuestion(`a\000\.b.default.svc.cluster.local.`, dns.TypeA), dns.RcodeNameError},
		"no upstream":   {new(dns.Msg).SetQuestion("example.org.", dns.TypeA), dns.RcodeServerFailure},
	} {
		c.req.Id = dns.Id()
		m, _, err := (&dns.Client{Timeout: 5 * time.Second}).Exchange(c.req, addr)
		if err != nil || m.Rcode != c.rcode {
			t.Errorf("%s: %v, %v; want %s", name, m, err, dns.RcodeToString[c.rcode])
		}
	}
	// Garbage is not answered, and hurts nobody.
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, b := range [][]byte{{0}, make([]byte, 11), slices.Repeat([]byte{0xff}, 512), slices.Repeat([]byte{0xc0, 0x0c}, 100)} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if m := exchange(t, "udp", addr, web); len(m.Answer) != 1 {
		t.Errorf("after garbage: %s", brief(m))
	}
}

func TestForwarding(t *testing.T) {
	var asked, tcp atomic.Int32
	good := nameserver(t, func(network string, req, resp *dns.Msg) {
		asked.Add(1)
		if strings.HasPrefix(dns.CanonicalName(req.Question[0].Name), "big.") && network == "udp" {
			resp.Truncated = true
			return
		}
		if network == "tcp" {
			tcp.Add(1)
		}
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.7")}
	})
	bad := nameserver(t, func(_ string, _, resp *dns.Msg) { resp.Rcode = dns.RcodeServerFailure })
	s := New(Config{Upstreams: addrPorts(bad, good)})
	s.Set(fixture())
	addr := serve(t, s)
	for range 3 {
		if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA))); got != "NOERROR, A 192.0.2.7" {
			t.Error(got)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("upstream asked %d times for three queries", n)
	}
	if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion("big.example.org.", dns.TypeA))); got != "NOERROR, A 192.0.2.7" || tcp.Load() != 1 {
		t.Errorf("truncated by upstream: %s, %d over tcp", got, tcp.Load())
	}
}

// endpointAt is a ready endpoint.
func endpointAt(addr, host string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{addr}, Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}}
	if host != "" {
		e.Hostname = &host
	}
	return e
}

// TestIPv6 asks over IPv6.
func TestIPv6(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serveAt(t, s, "[::1]:0")
	for _, network := range []string{"udp", "tcp"} {
		if got := brief(exchange(t, network, addr, new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeAAAA))); got != "NOERROR, AAAA fd97::80" {
			t.Errorf("over %s: %s", network, got)
		}
	}
}
