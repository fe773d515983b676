package dns

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// FuzzQuery: whatever bytes come, the answer parses, is to the same question, and is no
// longer than what may be sent for it.
func FuzzQuery(f *testing.F) {
	s := New(Config{CacheBytes: 1 << 20})
	s.Set(specCluster())
	for _, name := range []string{"kubernetes.default.svc.cluster.local.", "1.0.3.10.in-addr.arpa.", "10-98-0-6.default.pod.cluster.local.", ".", "foo.default.svc.cluster.local.",
		`a\.b\000.default.svc.cluster.local.`, strings.Repeat("a.", 110) + "cluster.local.", "_https._tcp.headless.default.svc.cluster.local."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypeANY, dns.TypePTR, dns.TypeAXFR} {
			req := new(dns.Msg).SetQuestion(name, qtype)
			req.SetEdns0(qtype*100, true)
			b, err := req.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
			f.Add(b[:len(b)-11])
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, udp := range []bool{true, false} {
			answer := answerTo(s, b, udp)
			if len(b) < headerSize || b[2]&0x80 != 0 {
				if answer != nil {
					t.Fatalf("answered %x with %x", b, answer)
				}
				continue
			}
			if udp && len(answer) > udpSize {
				t.Fatalf("%d bytes over UDP", len(answer))
			}
			resp, req := new(dns.Msg), new(dns.Msg)
			if err := resp.Unpack(answer); err != nil {
				t.Fatalf("answer %x to %x: %v", answer, b, err)
			}
			if resp.Id != binary.BigEndian.Uint16(b) || !resp.Response {
				t.Fatalf("answer %v to %x", resp, b)
			}
			if req.Unpack(b) != nil || len(req.Question) != 1 {
				continue
			}
			if udp && req.IsEdns0() == nil && len(answer) > dns.MinMsgSize {
				t.Fatalf("%d bytes to a client without EDNS", len(answer))
			}
			if resp.Rcode != dns.RcodeFormatError && resp.Rcode != dns.RcodeNotImplemented && (len(resp.Question) != 1 || resp.Question[0] != req.Question[0]) {
				t.Fatalf("answer to %v for %v", resp.Question, req.Question)
			}
		}
	})
}

// FuzzUpstream: whatever an upstream answers, clients get something that parses and fits.
func FuzzUpstream(f *testing.F) {
	for _, text := range []string{"www.example.org. 60 IN A 192.0.2.1", "www.example.org. 60 IN CNAME x.example.org.", "www.example.org. 60 IN TXT \"a\""} {
		m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA)
		m.Response = true
		m.Answer = []dns.RR{rr(f, text)}
		m.SetEdns0(1232, true)
		b, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	name, err := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA).Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(dns.Msg)
		if m.Unpack(b) != nil {
			return
		}
		var q query
		if rcode := q.read(name); rcode != dns.RcodeSuccess {
			t.Fatal(rcode)
		}
		m = clean(m, "www.example.org.", dns.TypeA)
		lifetime(m)
		p, err := repack(m, q.name())
		if err != nil {
			return // SERVFAIL
		}
		for _, limit := range []int{dns.MinMsgSize, udpSize, dns.MaxMsgSize} {
			out := p.append(nil, &q, delivery{limit: limit, age: 7, turn: 5})
			if len(out) > limit {
				t.Fatalf("%d bytes of at most %d", len(out), limit)
			}
			if err := new(dns.Msg).Unpack(out); err != nil {
				t.Fatalf("%x: %v", out, err)
			}
		}
	})
}
