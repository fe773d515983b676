package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/netplane/render"
)

// answerTo is what a server without sockets answers over UDP or TCP.
func answerTo(s *Server, msg []byte, udp bool) []byte {
	w := &worker{}
	answer, wait := s.quick(w, msg, udp)
	if wait {
		answer = s.slow(context.Background(), w.park(), udp)
	}
	return answer
}

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

// tcpDial opens a connection to a server.
func tcpDial(t *testing.T, addr string) *dns.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return &dns.Conn{Conn: c}
}

// TestPipelining: queries of one connection do not wait for each other (RFC 7766), however
// they are cut into packets.
func TestPipelining(t *testing.T) {
	release := make(chan struct{})
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		<-release
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.1")}
	})
	s := New(Config{Upstreams: []string{up}})
	s.Set(fixture())
	c := tcpDial(t, serve(t, s))
	var sent []byte
	for i, name := range []string{"slow.example.org.", "web.default.svc.cluster.local.", "nope.default.svc.cluster.local."} {
		req := new(dns.Msg).SetQuestion(name, dns.TypeA)
		req.Id = uint16(i)
		b, err := req.Pack()
		if err != nil {
			t.Fatal(err)
		}
		sent = append(binary.BigEndian.AppendUint16(sent, uint16(len(b))), b...)
	}
	for _, part := range [][]byte{sent[:1], sent[1:40], sent[40:]} {
		if _, err := c.Conn.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{"1 NOERROR, A 10.97.0.80", "2 NXDOMAIN", "0 NOERROR, A 192.0.2.1"} {
		if i == 2 {
			close(release)
		}
		m, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(m.Id, " ", brief(m)); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestConnections: one client cannot take all connections, and gives back what it closes.
func TestConnections(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serve(t, s)
	web := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
	works := func(c *dns.Conn) bool {
		if c.WriteMsg(web) != nil {
			return false
		}
		_, err := c.ReadMsg()
		return err == nil
	}
	var all []*dns.Conn
	for range maxClientConns {
		c := tcpDial(t, addr)
		if !works(c) {
			t.Fatalf("connection %d is refused", len(all))
		}
		all = append(all, c)
	}
	if works(tcpDial(t, addr)) {
		t.Error("one more than allowed is served")
	}
	all[0].Close()
	for range 1000 { // until the server has seen that
		if works(tcpDial(t, addr)) {
			return
		}
	}
	t.Error("a place that became free is not given to anybody")
}

// TestTCPGarbage: who sends no query is disconnected; others are not.
func TestTCPGarbage(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serve(t, s)
	good := tcpDial(t, addr)
	for _, b := range [][]byte{{0, 1, 0}, slices.Concat([]byte{0, 12}, bytes.Repeat([]byte{0xff}, 12))} {
		c := tcpDial(t, addr)
		if _, err := c.Conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	if err := good.WriteMsg(new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	if m, err := good.ReadMsg(); err != nil || len(m.Answer) != 1 {
		t.Errorf("%v, %v", m, err)
	}
}

// TestSetWhileAsked: whoever asks gets the old answer or the new one, and after Set the
// new one only.
func TestSetWhileAsked(t *testing.T) {
	d := fixture()
	at := func(ip string) render.Desired {
		next := d
		next.Services = append(slices.Clone(d.Services), svc("default", "moves", corev1.ServiceSpec{ClusterIP: ip}))
		return next
	}
	s := New(Config{})
	s.Set(at("10.97.1.0"))
	addr := serve(t, s)
	var asking sync.WaitGroup
	ended := make(chan struct{})
	for range 3 {
		asking.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				if m := exchange(t, "udp", addr, new(dns.Msg).SetQuestion("moves.default.svc.cluster.local.", dns.TypeA)); len(m.Answer) != 1 {
					t.Error(brief(m))
				}
			}
		})
	}
	for i := range 200 {
		ip := fmt.Sprintf("10.97.1.%d", i)
		s.Set(at(ip))
		if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion("moves.default.svc.cluster.local.", dns.TypeA))); got != "NOERROR, A "+ip {
			t.Errorf("after Set: %s, want %s", got, ip)
		}
	}
	close(ended)
	asking.Wait()
}

// TestMemory: a flood of names that are not there does not fill more than the cache.
func TestMemory(t *testing.T) {
	s := New(Config{CacheBytes: 1 << 20})
	s.Set(fixture())
	for i := range 20_000 {
		msg, err := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.default.svc.cluster.local.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		answerTo(s, msg, true)
	}
	if n, bytes := s.cache.size(); bytes > 1<<20 || n < 1000 {
		t.Errorf("%d answers in %d bytes", n, bytes)
	}
}

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

// TestFlags: what clients say of DNSSEC reaches upstream, keeps answers apart, and comes
// back to those only who asked (RFC 6840, 5.7 and 5.8).
func TestFlags(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		resp.AuthenticatedData = req.AuthenticatedData && !req.CheckingDisabled
		resp.Answer = []dns.RR{rr(t, fmt.Sprintf("%s 60 IN TXT \"do %t cd %t\"", req.Question[0].Name, req.IsEdns0() != nil && req.IsEdns0().Do(), req.CheckingDisabled))}
	})
	s := New(Config{Upstreams: []string{up}})
	s.Set(fixture())
	addr := serve(t, s)
	for range 2 { // the second time from memory
		for _, c := range []struct {
			ad, cd, do bool
			want       string
			wantAD     bool
		}{
			{false, false, false, "do false cd false", false},
			{true, false, false, "do false cd false", true},
			{false, false, true, "do true cd false", true},
			{false, true, true, "do true cd true", false},
		} {
			req := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeTXT)
			req.AuthenticatedData, req.CheckingDisabled = c.ad, c.cd
			if c.do {
				req.SetEdns0(1232, true)
			}
			m := exchange(t, "udp", addr, req)
			if got := m.Answer[0].(*dns.TXT).Txt[0]; got != c.want || m.AuthenticatedData != c.wantAD || m.CheckingDisabled != c.cd {
				t.Errorf("%+v: %s, ad %t, cd %t", c, got, m.AuthenticatedData, m.CheckingDisabled)
			}
		}
	}
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

// TestDomainChanges: what upstream said of a name is not said of it once it is the
// cluster's.
func TestDomainChanges(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.1")}
	})
	s := New(Config{Upstreams: []string{up}})
	s.Set(fixture())
	ask := asker(t, s)
	if got := ask("web.default.svc.other.test."); got != "NOERROR, A 192.0.2.1 for 60 s" {
		t.Error(got)
	}
	d := fixture()
	d.Domain = "other.test"
	s.Set(d)
	if got := ask("web.default.svc.other.test."); got != "NOERROR, A 10.97.0.80 for 5 s" {
		t.Error(got)
	}
	if got := ask("web.default.svc.cluster.local."); got != "NOERROR, A 192.0.2.1 for 60 s" {
		t.Error(got)
	}
}
