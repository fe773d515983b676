package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// TestUpstreams: resolv.conf is read again when it changes, and this server is
// never its own upstream.
func TestUpstreams(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	s := New(Config{ResolvConf: path})
	s.Set(fixture())
	f := s.forward
	servers := func() (list []string) {
		f.reload()
		ups, _ := f.group("example.org.").order(f.self)
		for _, u := range ups {
			list = append(list, u.addr.String())
		}
		return list
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := servers(); len(got) != 0 {
		t.Errorf("no file: %v", got)
	}
	if _, _, err := f.resolve(t.Context(), "example.org.", dns.TypeA, keyOf(t, "example.org.", dns.TypeA)); !errors.Is(err, errNoUpstream) {
		t.Errorf("no file: %v", err)
	}
	write("search x\nnameserver 10.97.0.10\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nnameserver nonsense\n")
	if got := servers(); fmt.Sprint(got) != "[192.0.2.53:53 [2001:db8::53]:53]" {
		t.Errorf("%v", got)
	}
	first := f.upstream.Load().servers[1]
	write("nameserver 192.0.2.54\nnameserver 192.0.2.53\noptions timeout:1 rotate\n")
	if got := []string{servers()[0], servers()[0]}; got[0] == got[1] {
		t.Errorf("with rotate: %v is first twice", got)
	}
	if f.upstream.Load().servers[1] != first {
		t.Error("a server that stayed is forgotten")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if got := servers(); len(got) != 2 {
		t.Errorf("while the file is replaced: %v", got)
	}
	write("nameserver 10.97.0.10\n")
	if got := servers(); len(got) != 0 {
		t.Errorf("only itself: %v", got)
	}
}

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
	s := New(Config{Upstreams: []string{up}})
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
	s := New(Config{Upstreams: []string{pc.LocalAddr().String()}})
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
		s := New(Config{Upstreams: []string{a}, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
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
	s := New(Config{Upstreams: []string{up}})
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
		s := New(Config{Upstreams: []string{dead, good}})
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

// TestHealth: an upstream that does not answer is asked last, probed ever less often, and
// taken back when it answers.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a, b := "192.0.2.1:53", "192.0.2.2:53"
		n.set(a, dead)
		n.set(b, answersWith(t, 0, "198.51.100.2"))
		s := New(Config{Upstreams: []string{a, b}, Dial: n.dial})
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

// TestStale: when upstreams do not answer, what was true before is.
func TestStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		n.set(a, answersWith(t, 60, "198.51.100.1"))
		s := New(Config{Upstreams: []string{a}, Dial: n.dial})
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
		s := New(Config{Upstreams: []string{a}, Dial: n.dial})
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
		s := New(Config{Upstreams: []string{a}, Dial: n.dial})
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
	s := New(Config{Upstreams: []string{serving("192.0.2.1")}, Stubs: stubs})
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

func TestParseStub(t *testing.T) {
	got, err := ParseStub("Corp.Example=10.0.0.53,[2001:db8::53]:5353,2001:db8::1")
	if want := "{corp.example. [10.0.0.53:53 [2001:db8::53]:5353 [2001:db8::1]:53]}"; err != nil || fmt.Sprint(got) != want {
		t.Errorf("%v, %v; want %s", got, err, want)
	}
	for _, bad := range []string{"", "=10.0.0.1", "corp.example", "corp.example=", "corp.example=dns.corp.example", "a..b=10.0.0.1", "a=10.0.0.1,"} {
		if _, err := ParseStub(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
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
	s = New(Config{Upstreams: []string{back, good}})
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
	s := New(Config{Upstreams: []string{up}})
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

func TestCacheIsBounded(t *testing.T) {
	const limit = 1 << 20
	c := newCache(limit)
	keyAt := func(i int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(i)) }
	for i := range 10_000 {
		c.put(&entry{key: string(keyAt(i)), packed: &packed{wire: make([]byte, 100)}})
		c.get(keyAt(0)) // is asked for all the time
	}
	if n, bytes := c.size(); bytes > limit || bytes < limit/2 || n < limit/2/(entryOverhead+200) {
		t.Errorf("%d answers in %d bytes, at most %d are allowed", n, bytes, limit)
	}
	if c.get(keyAt(0)) == nil || c.get(keyAt(9_999)) == nil || c.get(keyAt(1)) != nil {
		t.Error("not the ones that were not asked for longest are gone")
	}
	c.put(&entry{key: "x", packed: &packed{wire: make([]byte, limit)}})
	if c.get([]byte("x")) != nil {
		t.Error("an answer that fills all is remembered")
	}
	for i := range 10_000 { // in place of what is there
		c.put(&entry{key: "y", packed: &packed{wire: make([]byte, i%1000)}})
	}
	before := 0
	for i := range c.shards {
		for _, e := range c.shards[i].entries {
			before += e.bytes()
		}
	}
	if _, bytes := c.size(); bytes != before {
		t.Errorf("counted %d bytes, there are %d", bytes, before)
	}
}
