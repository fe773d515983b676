package dns

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	"pgregory.net/rapid"
)

// TestTurns: every endpoint is first at times, and all are always there.
func TestTurns(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	msg, err := new(dns.Msg).SetQuestion("many.default.svc.cluster.local.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, udp := range []bool{true, false} {
		first := map[string]bool{}
		for range 4000 {
			m := new(dns.Msg)
			if err := m.Unpack(answerTo(s, msg, udp)); err != nil {
				t.Fatal(err)
			}
			first[m.Answer[0].(*dns.A).A.String()] = true
			all := map[string]bool{}
			for _, rr := range m.Answer {
				all[rr.(*dns.A).A.String()] = true
			}
			if len(all) != len(m.Answer) || m.Truncated != udp || !udp && len(all) != 200 {
				t.Fatalf("udp %t: %d addresses in %d answers, truncated %t", udp, len(all), len(m.Answer), m.Truncated)
			}
		}
		if len(first) < 190 {
			t.Errorf("udp %t: %d of 200 endpoints were ever first", udp, len(first))
		}
	}
}

// TestFit: whatever a client takes, the answer parses, is no longer than that, begins as
// the whole one does, and says so when something is missing.
func TestFit(t *testing.T) {
	d := fixture()
	d.Services = append(d.Services, svc("default", "srv", corev1.ServiceSpec{ClusterIP: "None", Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}))
	for i := range 40 {
		d.Slices = append(d.Slices, slice("srv", "IPv4", endpointAt(fmt.Sprintf("10.98.9.%d", i), fmt.Sprintf("host-%d", i))))
		d.Slices[len(d.Slices)-1].Name = fmt.Sprint("srv-", i)
	}
	s := New(Config{})
	s.Set(d)
	rapid.Check(t, func(t *rapid.T) {
		req := new(dns.Msg).SetQuestion(rapid.SampledFrom([]string{
			"many.default.svc.cluster.local.", "_http._tcp.srv.default.svc.cluster.local.", "web.default.svc.cluster.local.", "nope.default.svc.cluster.local.",
			"inner.default.svc.cluster.local.",
		}).Draw(t, "name"), rapid.SampledFrom([]uint16{dns.TypeA, dns.TypeSRV, dns.TypeANY}).Draw(t, "type"))
		limit := dns.MinMsgSize
		if rapid.Bool().Draw(t, "edns") {
			size := rapid.Uint16().Draw(t, "size")
			req.SetEdns0(size, rapid.Bool().Draw(t, "do"))
			limit = min(max(int(size), dns.MinMsgSize), udpSize)
		}
		b, err := req.Pack()
		if err != nil {
			t.Fatal(err)
		}
		udp, tcp := answerTo(s, b, true), answerTo(s, b, false)
		if len(udp) > limit {
			t.Fatalf("%d bytes, %d are allowed", len(udp), limit)
		}
		cut, whole := new(dns.Msg), new(dns.Msg)
		if err := errors.Join(cut.Unpack(udp), whole.Unpack(tcp)); err != nil {
			t.Fatal(err)
		}
		missing := len(cut.Answer) < len(whole.Answer) || len(cut.Ns) < len(whole.Ns)
		if cut.Truncated != missing || whole.Truncated {
			t.Fatalf("truncated %t with %d of %d answers", cut.Truncated, len(cut.Answer), len(whole.Answer))
		}
		if (cut.IsEdns0() != nil) != (req.IsEdns0() != nil) || cut.Rcode != whole.Rcode {
			t.Fatalf("EDNS %v, rcode %d and %d", cut.IsEdns0(), cut.Rcode, whole.Rcode)
		}
		if missing && limit-len(udp) > 100 {
			t.Fatalf("%d bytes of %d used, though there is more", len(udp), limit)
		}
		// Addresses take turns; everything else keeps its order.
		if req.Question[0].Qtype == dns.TypeSRV && !slices.EqualFunc(cut.Answer, whole.Answer[:len(cut.Answer)], func(a, b dns.RR) bool { return a.String() == b.String() }) {
			t.Fatalf("%v is not how %v begins", cut.Answer, whole.Answer)
		}
	})
}
