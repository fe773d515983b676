package dns

import (
	"context"
	"slices"
	"testing"

	"github.com/miekg/dns"
)

func keyOf(t testing.TB, name string, qtype uint16) []byte {
	t.Helper()
	msg, err := new(dns.Msg).SetQuestion(name, qtype).Pack()
	if err != nil {
		t.Fatal(err)
	}
	var q query
	if rcode := q.read(msg); rcode != dns.RcodeSuccess {
		t.Fatalf("%s: rcode %d", name, rcode)
	}
	return q.key()
}

// answerTo is what a server without sockets answers over UDP or TCP.
func answerTo(s *Server, msg []byte, udp bool) []byte {
	w := &worker{}
	answer, wait := s.quick(w, msg, udp)
	if wait {
		answer = s.slow(context.Background(), w.park(), udp)
	}
	return answer
}

// TestMalformed: what no client of a resolver sends is told so, in as few bytes as can be.
func TestMalformed(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	good := func(change func(m *dns.Msg)) []byte {
		m := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
		change(m)
		b, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	edns := good(func(m *dns.Msg) { m.SetEdns0(1232, false) })
	named := slices.Clone(edns)
	named[len(named)-optSize] = 1 // the name of OPT
	named = slices.Insert(named, len(named)-optSize+1, 'x', 0)
	pointer := slices.Concat(edns[:headerSize], []byte{0xc0, 12, 0, 1, 0, 1})
	pointer[11] = 0
	for name, c := range map[string]struct {
		msg   []byte
		rcode int
	}{
		"two OPT": {good(func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.Extra = append(m.Extra, m.Extra[0])
		}), dns.RcodeFormatError},
		"OPT with a name":   {named, dns.RcodeFormatError},
		"OPT in authority":  {good(func(m *dns.Msg) { m.SetEdns0(1232, false); m.Ns, m.Extra = m.Extra, nil }), dns.RcodeFormatError},
		"cut":               {edns[:len(edns)-1], dns.RcodeFormatError},
		"name is a pointer": {pointer, dns.RcodeFormatError},
		"an answer in it":   {good(func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "a. 1 IN A 192.0.2.1")} }), dns.RcodeFormatError},
		"notify":            {good(func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }), dns.RcodeNotImplemented},
		"type OPT":          {good(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeOPT }), dns.RcodeFormatError},
		"class ANY":         {good(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }), dns.RcodeRefused},
		"an unknown option": {good(func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			o := m.IsEdns0()
			o.Option = append(o.Option, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("x")})
		}), dns.RcodeSuccess},
		"something after it": {append(slices.Clone(edns), 1, 2, 3), dns.RcodeSuccess},
	} {
		answer := answerTo(s, c.msg, true)
		m := new(dns.Msg)
		if err := m.Unpack(answer); err != nil || m.Rcode != c.rcode {
			t.Errorf("%s: %v, %v; want %s", name, m, err, dns.RcodeToString[c.rcode])
		}
		if c.rcode != dns.RcodeSuccess && len(answer) > len(c.msg) {
			t.Errorf("%s: %d bytes for %d", name, len(answer), len(c.msg))
		}
	}
}
