package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// fakeNet stands for the network in synctest bubbles: upstreams by address, which answer
// or, if their function returns nil, do not.
type fakeNet struct {
	mu      sync.Mutex
	servers map[string]func(req *dns.Msg) *dns.Msg
	asked   map[string]int // without probes
	probed  map[string]int
}

func (n *fakeNet) dial(_ context.Context, network, address string) (net.Conn, error) {
	client, server := net.Pipe()
	go func() {
		defer server.Close()
		buf := make([]byte, 4096)
		for {
			k, err := server.Read(buf)
			if err != nil {
				return
			}
			req := new(dns.Msg)
			if req.Unpack(buf[:k]) != nil {
				return
			}
			n.mu.Lock()
			if strings.HasSuffix(dns.CanonicalName(req.Question[0].Name), probeDomain) {
				n.probed[address]++
			} else {
				n.asked[address]++
			}
			fn := n.servers[address]
			n.mu.Unlock()
			if m := fn(req); m != nil {
				b, err := m.Pack()
				if err != nil {
					return
				}
				_, _ = server.Write(b)
			}
		}
	}()
	return packetPipe{client}, nil
}

// packetPipe makes miekg/dns take a pipe for a datagram socket.
type packetPipe struct{ net.Conn }

func (packetPipe) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, errors.ErrUnsupported }
func (packetPipe) WriteTo([]byte, net.Addr) (int, error)  { return 0, errors.ErrUnsupported }
func (p packetPipe) LocalAddr() net.Addr                  { return &net.UDPAddr{} }
func (p packetPipe) RemoteAddr() net.Addr                 { return &net.UDPAddr{} }
func (n *fakeNet) set(addr string, fn func(*dns.Msg) *dns.Msg) {
	n.mu.Lock()
	n.servers[addr] = fn
	n.mu.Unlock()
}

func (n *fakeNet) count(of map[string]int, addr string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return of[addr]
}

func newFakeNet() *fakeNet {
	return &fakeNet{servers: map[string]func(*dns.Msg) *dns.Msg{}, asked: map[string]int{}, probed: map[string]int{}}
}

func answersWith(t testing.TB, ttl int, addr string) func(*dns.Msg) *dns.Msg {
	return func(req *dns.Msg) *dns.Msg {
		m := new(dns.Msg).SetReply(req)
		m.Answer = []dns.RR{rr(t, fmt.Sprintf("%s %d IN A %s", req.Question[0].Name, ttl, addr))}
		return m
	}
}

func dead(*dns.Msg) *dns.Msg { return nil }

// asker asks a server without sockets.
func asker(t testing.TB, s *Server) func(name string) string {
	t.Cleanup(s.forward.close)
	return func(name string) string {
		t.Helper()
		msg, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		w := &worker{}
		answer, wait := s.quick(w, msg, true)
		if wait {
			answer = s.slow(t.Context(), w.park(), true)
		}
		m := new(dns.Msg)
		if err := m.Unpack(answer); err != nil {
			t.Fatal(err)
		}
		ttl := ""
		if len(m.Answer) > 0 {
			ttl = fmt.Sprintf(" for %d s", m.Answer[0].Header().Ttl)
		}
		return brief(m) + ttl
	}
}

// TestStale: when upstreams do not answer, what was true before is.
func TestStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		n.set(a, answersWith(t, 60, "198.51.100.1"))
		s := New(Config{Upstreams: addrPorts(a), Dial: n.dial})
		s.Set(fixture())
		defer s.forward.busy.Wait()
		ask := asker(t, s)
		steps := func(want ...string) {
			t.Helper()
			for _, w := range want {
				begun := time.Now()
				if got := ask("www.example.org.") + fmt.Sprintf(" after %v", time.Since(begun)); got != w {
					t.Errorf("%s, want %s", got, w)
				}
			}
		}
		steps("NOERROR, A 198.51.100.1 for 60 s after 0s")
		time.Sleep(20 * time.Second)
		steps("NOERROR, A 198.51.100.1 for 40 s after 0s")
		n.set(a, dead)
		time.Sleep(40 * time.Second)
		steps("NOERROR, A 198.51.100.1 for 30 s after 1.8s")
		time.Sleep(3 * time.Second) // the refresh has ended
		asked := n.count(n.asked, a)
		steps("NOERROR, A 198.51.100.1 for 30 s after 0s")
		if n.count(n.asked, a) != asked {
			t.Error("the upstream was asked again at once")
		}
		time.Sleep(staleAgain)
		// By now it counts as down, so that nobody waits.
		steps("NOERROR, A 198.51.100.1 for 30 s after 0s")
		n.set(a, answersWith(t, 60, "198.51.100.9"))
		time.Sleep(staleAgain)
		s.forward.upstream.Load().servers[0].answered()
		steps("NOERROR, A 198.51.100.9 for 60 s after 0s")
		n.set(a, dead)
		time.Sleep(time.Minute + maxStale + time.Second)
		steps("SERVFAIL after 4.5s")
		steps("SERVFAIL after 0s") // it is remembered that nobody knows
	})
}

// TestStaleExcuse: an upstream that answers that it does not know is left alone with that
// question for a while.
func TestStaleExcuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		n.set(a, answersWith(t, 10, "198.51.100.1"))
		s := New(Config{Upstreams: addrPorts(a), Dial: n.dial})
		s.Set(fixture())
		defer s.forward.busy.Wait()
		ask := asker(t, s)
		ask("www.example.org.")
		n.set(a, func(req *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure) })
		time.Sleep(10 * time.Second)
		for range staleAgain / time.Second {
			if got := ask("www.example.org."); got != "NOERROR, A 198.51.100.1 for 30 s" {
				t.Error(got)
			}
			time.Sleep(time.Second)
		}
		if got := n.count(n.asked, a); got != 2 {
			t.Errorf("asked %d times, want 2", got)
		}
		ask("www.example.org.")
		if got := n.count(n.asked, a); got != 3 {
			t.Errorf("asked %d times after that, want 3", got)
		}
	})
}

// TestTogether: many who ask the same at once cause one question, and get one answer each.
func TestTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		n.set(a, func(req *dns.Msg) *dns.Msg {
			time.Sleep(time.Second)
			return answersWith(t, 60, "198.51.100.1")(req)
		})
		s := New(Config{Upstreams: addrPorts(a), Dial: n.dial})
		s.Set(fixture())
		ask := asker(t, s)
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if got := ask("www.example.org."); got != "NOERROR, A 198.51.100.1 for 60 s" {
					t.Error(got)
				}
			})
		}
		all.Wait()
		if n.count(n.asked, a) != 1 {
			t.Errorf("asked %d times", n.count(n.asked, a))
		}
	})
}

// TestStubs: the longest stub domain counts, and none takes the cluster's names.
func TestStubs(t *testing.T) {
	serving := func(addr string) string {
		return nameserver(t, func(_ string, req, resp *dns.Msg) {
			resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A "+addr)}
		})
	}
	var stubs []Stub
	for domain, addr := range map[string]string{"corp.example": "192.0.2.2", "Sub.Corp.Example.": "192.0.2.3", "local": "192.0.2.4"} {
		stub, err := ParseStub(domain + "=" + serving(addr))
		if err != nil {
			t.Fatal(err)
		}
		stubs = append(stubs, stub)
	}
	s := New(Config{Upstreams: addrPorts(serving("192.0.2.1")), Stubs: stubs})
	s.Set(fixture())
	addr := serve(t, s)
	for name, want := range map[string]string{
		"www.example.org.": "A 192.0.2.1", "corp.example.": "A 192.0.2.2", "a.CORP.example.": "A 192.0.2.2",
		"a.sub.corp.example.": "A 192.0.2.3", "xcorp.example.": "A 192.0.2.1", "printer.local.": "A 192.0.2.4", "web.default.svc.cluster.local.": "A 10.97.0.80",
	} {
		if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion(name, dns.TypeA))); got != "NOERROR, "+want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestLifetime(t *testing.T) {
	a := "a. 100 IN A 192.0.2.1"
	soa := "org. 900 IN SOA ns.org. x.org. 1 2 3 4 60"
	for _, c := range []struct {
		what       string
		rcode      int
		answer, ns []string
		want       time.Duration
	}{
		{"address", 0, []string{a, "a. 50 IN A 192.0.2.2"}, nil, 50 * time.Second},
		{"a day", 0, []string{"a. 86400 IN A 192.0.2.1"}, nil, maxAge},
		{"not at all", 0, []string{"a. 0 IN A 192.0.2.1"}, nil, 0},
		{"absent", dns.RcodeNameError, nil, []string{soa}, time.Minute},
		{"absent, ttl below minimum", 0, nil, []string{"org. 30 IN SOA ns.org. x.org. 1 2 3 4 60"}, 30 * time.Second},
		{"absent for a day", dns.RcodeNameError, nil, []string{"org. 86400 IN SOA ns.org. x.org. 1 2 3 4 86400"}, maxAbsent},
		{"absent, without SOA", dns.RcodeNameError, nil, nil, 0},
		{"alias of what is not", dns.RcodeNameError, []string{"a. 3600 IN CNAME b."}, []string{soa}, time.Minute},
		{"referral", 0, nil, []string{"org. 900 IN NS ns.org."}, 0},
	} {
		m := &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: c.rcode}}
		for _, text := range c.answer {
			m.Answer = append(m.Answer, rr(t, text))
		}
		for _, text := range c.ns {
			m.Ns = append(m.Ns, rr(t, text))
		}
		if got := lifetime(m); got != c.want {
			t.Errorf("%s: %v, want %v", c.what, got, c.want)
		}
	}
}

// TestStaleWhileAsked: an answer that is kept for longer, as upstreams do not answer, may be
// asked for at that moment. The race detector looks on.
func TestStaleWhileAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		n.set(a, answersWith(t, 1, "198.51.100.1"))
		s := New(Config{Upstreams: addrPorts(a), Dial: n.dial, CacheBytes: shards * 2000})
		s.Set(fixture())
		ask := asker(t, s)
		var names []string
		for i := range 50 {
			names = append(names, fmt.Sprintf("n%d.example.org.", i))
			ask(names[i])
		}
		n.set(a, func(req *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure) })
		time.Sleep(2 * time.Second)
		var asking sync.WaitGroup
		for _, name := range names {
			asking.Go(func() {
				for range 3 {
					if got := ask(name); got != "NOERROR, A 198.51.100.1 for 30 s" && got != "SERVFAIL" { // it may have been forgotten
						t.Error(got)
					}
				}
			})
		}
		asking.Wait()
		s.forward.busy.Wait()
	})
}
