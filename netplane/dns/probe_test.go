package dns

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

func TestDeadUpstreams(t *testing.T) {
	silentUp := scripted(t, func(*dns.Msg) [][]byte { return nil })
	gone, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	good := nameserver(t, func(_ string, req, resp *dns.Msg) {
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.7")}
	})
	for name, dead := range map[string]string{"silent": silentUp, "refusing": gone.LocalAddr().String()} {
		s := New(Config{Upstreams: addrPorts(dead, good)})
		s.Set(fixture())
		addr := serve(t, s)
		for i := range 3 {
			q := fmt.Sprintf("n%d.example.org.", i)
			if got := brief(exchange(t, "udp", addr, new(dns.Msg).SetQuestion(q, dns.TypeA))); got != "NOERROR, A 192.0.2.7" {
				t.Errorf("%s: %s: %s", name, q, got)
			}
		}
		if h := s.forward.upstream.Load().servers[0].health(); h != failing {
			t.Errorf("%s: the upstream that does not answer counts as %v", name, h)
		}
	}
}

// TestHealth: an upstream that does not answer is asked last, probed ever less often, and
// taken back when it answers.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a, b := "192.0.2.1:53", "192.0.2.2:53"
		n.set(a, dead)
		n.set(b, answersWith(t, 0, "198.51.100.2"))
		s := New(Config{Upstreams: addrPorts(a, b), Dial: n.dial})
		s.Set(fixture())
		ctx, cancel := context.WithCancel(t.Context())
		var watching sync.WaitGroup
		watching.Go(func() { s.forward.watch(ctx) })
		defer watching.Wait()
		defer cancel()
		ask := asker(t, s)
		for range 3 {
			if got := ask("www.example.org."); got != "NOERROR, A 198.51.100.2 for 0 s" {
				t.Fatal(got)
			}
		}
		begun := time.Now()
		before := n.count(n.asked, a)
		for range 100 {
			ask("www.example.org.")
		}
		if took := time.Since(begun); took != 0 || n.count(n.asked, a) != before {
			t.Errorf("100 queries took %v and asked the dead upstream %d times", took, n.count(n.asked, a)-before)
		}
		probes := n.count(n.probed, a)
		time.Sleep(5 * time.Minute)
		if more := n.count(n.probed, a) - probes; more < 15 || more > 25 {
			t.Errorf("%d probes in 5 minutes", more)
		}
		n.set(a, answersWith(t, 0, "198.51.100.1"))
		time.Sleep(lastProbe + 2*tryTimeout)
		if got := ask("www.example.org."); got != "NOERROR, A 198.51.100.1 for 0 s" {
			t.Errorf("after it came back: %s", got)
		}
	})
}

// TestLoop: an upstream that asks this server in return is found out and left out.
func TestLoop(t *testing.T) {
	var s *Server
	var addr atomic.Pointer[string]
	back := scriptedAll(t, func(req *dns.Msg) *dns.Msg {
		c := dns.Client{Timeout: 10 * time.Second}
		to := addr.Load()
		if to == nil {
			return nil
		}
		m, _, err := c.Exchange(req.Copy(), *to)
		if err != nil {
			return nil
		}
		return m
	})
	good := nameserver(t, func(_ string, req, resp *dns.Msg) {
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.7")}
	})
	elsewhere := scriptedAll(t, func(req *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(req, dns.RcodeNameError) })
	s = New(Config{Upstreams: addrPorts(back, good)})
	s.Set(fixture())
	at := serve(t, s)
	addr.Store(&at)
	looped := s.forward.upstream.Load().servers[0]
	looped.probe(t.Context())
	if h := looped.health(); h != looping {
		t.Fatalf("it counts as %v", h)
	}
	if got := brief(exchange(t, "udp", at, new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA))); got != "NOERROR, A 192.0.2.7" {
		t.Error(got)
	}
	addr.Store(&elsewhere)
	looped.probe(t.Context())
	if h := looped.health(); h != unsure {
		t.Errorf("once it asks another server it counts as %v", h)
	}
}

// scriptedAll is a name server that answers everything, probes too.
func scriptedAll(t *testing.T, fn func(req *dns.Msg) *dns.Msg) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	up, ended := make(chan struct{}), make(chan struct{})
	srv := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(up) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if m := fn(req); m != nil {
			_ = w.WriteMsg(m)
		}
	})}
	go func() { defer close(ended); _ = srv.ActivateAndServe() }()
	<-up
	t.Cleanup(func() { _ = srv.Shutdown(); <-ended })
	return pc.LocalAddr().String()
}
