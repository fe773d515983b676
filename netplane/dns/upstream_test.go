package dns

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// scripted is an upstream whose datagrams are written by hand: fn gets a query and
// returns what is sent for it, in order.
func scripted(t *testing.T, fn func(req *dns.Msg) [][]byte) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			req := new(dns.Msg)
			if req.Unpack(buf[:n]) != nil || strings.HasSuffix(dns.CanonicalName(req.Question[0].Name), probeDomain) {
				continue
			}
			for _, b := range fn(req) {
				_, _ = pc.WriteTo(b, from)
			}
		}
	}()
	t.Cleanup(func() { pc.Close(); <-ended })
	return pc.LocalAddr().String()
}

// reply is an answer to req with one address, changed by change.
func reply(t *testing.T, req *dns.Msg, addr string, change func(m *dns.Msg)) []byte {
	t.Helper()
	m := new(dns.Msg).SetReply(req)
	m.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A "+addr)}
	if change != nil {
		change(m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Error(err)
	}
	return b
}

// TestForgedAnswers: what does not answer the question as it was asked is not believed.
func TestForgedAnswers(t *testing.T) {
	lies := map[string]func(m *dns.Msg){
		"id":          func(m *dns.Msg) { m.Id++ },
		"name":        func(m *dns.Msg) { m.Question[0].Name = "other.example.org." },
		"type":        func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA },
		"class":       func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS },
		"no response": func(m *dns.Msg) { m.Response = false },
		"no question": func(m *dns.Msg) { m.Question = nil },
		"two":         func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
	}
	up := scripted(t, func(req *dns.Msg) (out [][]byte) {
		out = append(out, nil, []byte{1}, make([]byte, 12))
		for _, lie := range lies {
			out = append(out, reply(t, req, "192.0.2.66", lie))
		}
		return append(out[:min(len(out), maxForged)], reply(t, req, "192.0.2.1", nil))
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(fixture())
	addr := serve(t, s)
	for i := range 20 {
		name := fmt.Sprintf("n%d.example.org.", i)
		if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion(name, dns.TypeA))); got != "NOERROR, A 192.0.2.1" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// TestCase: an answer whose name is not spelled as asked for is not believed over UDP;
// servers that never keep the spelling are asked by TCP once, and then without.
func TestCase(t *testing.T) {
	var tcp, udp atomic.Int32
	pc, ln := sockets(t, "127.0.0.1:0")
	fold := func(n *atomic.Int32) dns.HandlerFunc {
		return func(w dns.ResponseWriter, req *dns.Msg) {
			if !strings.HasSuffix(dns.CanonicalName(req.Question[0].Name), probeDomain) {
				n.Add(1)
			}
			req.Question[0].Name = dns.CanonicalName(req.Question[0].Name)
			m := new(dns.Msg).SetReply(req)
			m.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.1")}
			_ = w.WriteMsg(m)
		}
	}
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: fold(&udp)}, {Listener: ln, Handler: fold(&tcp)}} {
		up, ended := make(chan struct{}), make(chan struct{})
		srv.NotifyStartedFunc = func() { close(up) }
		go func() { defer close(ended); _ = srv.ActivateAndServe() }()
		<-up
		t.Cleanup(func() { _ = srv.Shutdown(); <-ended })
	}
	s := New(Config{Upstreams: addrPorts(pc.LocalAddr().String())})
	s.Set(fixture())
	for i := range 5 {
		name := fmt.Sprintf("a-name-with-many-letters-%d.example.org.", i)
		e, _, err := s.forward.resolve(t.Context(), name, dns.TypeA, keyOf(t, name, dns.TypeA))
		if err != nil || e.answers != 1 {
			t.Fatalf("%s: %v, %v", name, e, err)
		}
	}
	if tcp.Load() != 1 || udp.Load() != 5 {
		t.Errorf("asked %d times by UDP and %d by TCP, want 5 and 1", udp.Load(), tcp.Load())
	}
}

// TestPorts: no port is used for long, and none after an answer that did not come.
func TestPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		n.set(a, answersWith(t, 0, "198.51.100.1"))
		dialled := 0
		s := New(Config{Upstreams: addrPorts(a), Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			dialled++
			return n.dial(ctx, network, address)
		}})
		s.Set(fixture())
		ask := asker(t, s)
		for range 10 * portUses {
			ask("www.example.org.")
		}
		if dialled != 10 {
			t.Errorf("%d ports for %d questions", dialled, 10*portUses)
		}
		ask("www.example.org.")
		time.Sleep(portAge + 1)
		ask("www.example.org.")
		if dialled != 12 {
			t.Errorf("%d ports after a pause, want 12", dialled)
		}
		n.set(a, dead)
		ask("www.example.org.")
		n.set(a, answersWith(t, 0, "198.51.100.1"))
		if before := dialled; len(s.forward.upstream.Load().servers[0].ports.free) != 0 {
			t.Errorf("a port without an answer is kept; %d", before)
		}
	})
}

// TestSpelling: clients get names back as they wrote them, and never in our random case.
func TestSpelling(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		q := req.Question[0].Name
		resp.Answer = []dns.RR{rr(t, q+" 60 IN CNAME target."+q), rr(t, "target."+q+" 60 IN A 192.0.2.1")}
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(fixture())
	addr := serve(t, s)
	for _, name := range []string{"www.example.org.", "WWW.eXample.org.", "web.default.svc.cluster.local.", "wEb.Default.SVC.cluster.LOCAL."} {
		m := exchange(t, "udp", addr, new(dns.Msg).SetQuestion(name, dns.TypeA))
		if m.Question[0].Name != name || m.Answer[0].Header().Name != name {
			t.Errorf("%s: %v", name, m)
		}
		if c, ok := m.Answer[0].(*dns.CNAME); ok && !strings.EqualFold(c.Target, m.Answer[1].Header().Name) {
			t.Errorf("%s: a broken chain: %v", name, m.Answer)
		}
	}
}

// TestWithoutEDNS: an upstream that knows no EDNS is asked without.
func TestWithoutEDNS(t *testing.T) {
	var asked atomic.Int32
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		asked.Add(1)
		if req.IsEdns0() != nil {
			resp.Rcode = dns.RcodeFormatError
			return
		}
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.7")}
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(fixture())
	ask := asker(t, s)
	for i := range 3 {
		if got := ask(fmt.Sprintf("n%d.example.org.", i)); got != "NOERROR, A 192.0.2.7 for 60 s" {
			t.Error(got)
		}
	}
	if n := asked.Load(); n != 4 {
		t.Errorf("asked %d times for three names, want 4", n)
	}
}

// TestFlags: what clients say of DNSSEC reaches upstream, keeps answers apart, and comes
// back to those only who asked (RFC 6840, 5.7 and 5.8).
func TestFlags(t *testing.T) {
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		resp.AuthenticatedData = req.AuthenticatedData && !req.CheckingDisabled
		resp.Answer = []dns.RR{rr(t, fmt.Sprintf("%s 60 IN TXT \"do %t cd %t\"", req.Question[0].Name, req.IsEdns0() != nil && req.IsEdns0().Do(), req.CheckingDisabled))}
	})
	s := New(Config{Upstreams: addrPorts(up)})
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

// TestClean: a time to live that would be negative is none (RFC 2181, 8).
func TestClean(t *testing.T) {
	m := &dns.Msg{Answer: []dns.RR{rr(t, "www.example.org. 4294967295 IN A 192.0.2.1"), rr(t, "www.example.org. 2147483647 IN A 192.0.2.2")}}
	got := clean(m, "www.example.org.", dns.TypeA)
	if a, b := got.Answer[0].Header().Ttl, got.Answer[1].Header().Ttl; a != 0 || b != 1<<31-1 {
		t.Errorf("%d s and %d s", a, b)
	}
	if age := lifetime(got); age != 0 {
		t.Errorf("remembered for %v", age)
	}
}
