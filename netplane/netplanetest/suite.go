package netplanetest

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/render"
)

// Run runs the suite on a World with nothing in it yet.
func Run(t *testing.T, w World) {
	for _, n := range Nets {
		t.Run(n.Name, func(t *testing.T) { RunFamily(t, w, n) })
	}
}

// RunFamily runs the suite in one IP family, on a World with nothing in it yet.
func RunFamily(t *testing.T, w World, n Net) {
	s := &suite{w: w, n: n}
	s.open(t)
	for _, c := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"balance", s.balance},
		{"change", s.change},
		{"none", s.none},
		{"unlisted", s.unlisted},
		{"hairpin", s.hairpin},
		{"masquerade", s.masquerade},
		{"samePort", s.samePort},
		{"sharedPort", s.sharedPort},
		{"portAgain", s.portAgain},
		{"udp", s.udp},
		{"udpFlow", s.udpFlow},
		{"udpBefore", s.udpBefore},
		{"udpSplit", s.udpSplit},
		{"affinity", s.affinity},
		{"affinitySplit", s.affinitySplit},
		{"split", s.split},
		{"types", s.types},
		{"many", s.many},
		{"idempotent", s.idempotent},
		{"settings", s.settings},
		{"adopt", s.adopt},
		{"tamper", s.tamper},
		{"broken", s.broken},
		{"purge", s.purge},
	} {
		t.Run(c.name, c.run)
	}
}

type suite struct {
	w World
	n Net
	s netplane.Services
}

func (s *suite) open(t *testing.T) {
	t.Helper()
	var err error
	if s.s, err = s.w.Services(); err != nil {
		t.Fatal(err)
	}
}

func (s *suite) ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// table is the usual settings with these services.
func (s *suite) table(services ...render.Service) render.Table {
	slices.SortFunc(services, func(a, b render.Service) int { return a.Compare(b.Port) })
	return render.Table{
		Services: services,
		Range:    []netip.Prefix{s.n.Range},
		Cluster:  []netip.Prefix{s.n.Cluster},
		Pods:     []netip.Prefix{s.n.Pods},
		Local:    []render.Port{{Addr: s.n.Service(10), Proto: render.TCP, Port: 53}, {Addr: s.n.Service(10), Proto: render.UDP, Port: 53}},
	}
}

func (s *suite) tcp(i int, eps ...netip.AddrPort) render.Service {
	return render.Service{Port: render.Port{Addr: s.n.Service(i), Proto: render.TCP, Port: 80}, Endpoints: eps}
}

func (s *suite) sync(t *testing.T, tb render.Table) int {
	t.Helper()
	n, err := s.s.Sync(s.ctx(t), tb)
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.s.Read(s.ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if !got.Equal(tb) {
		ops := diff.Services(got.Services, tb.Services)
		for _, op := range ops[:min(len(ops), 3)] {
			t.Logf("read back %+v instead of %+v", op.Have, op.Want)
		}
		got.Services, tb.Services = nil, nil
		t.Fatalf("after sync %d services are read back as others; settings %+v instead of %+v", len(ops), got, tb)
	}
	return n
}

func (s *suite) send(t *testing.T, from Host, p render.Port) Verdict {
	t.Helper()
	v, err := s.w.Send(from, p.Proto, netip.AddrPortFrom(p.Addr, p.Port))
	if err != nil {
		t.Fatalf("send from %s to %s: %v", from, p, err)
	}
	return v
}

// refused sends until the sender is told. Once may not be enough: a kernel limits
// how many ICMP errors it sends to one host, by default to one a second.
func (s *suite) refused(t *testing.T, from Host, p render.Port) Verdict {
	t.Helper()
	v := s.send(t, from, p)
	for i := 0; i < 5 && v.Dropped; i++ {
		v = s.send(t, from, p)
	}
	return v
}

// reached sends n packets and returns how many went to each endpoint.
func (s *suite) reached(t *testing.T, from Host, p render.Port, n int) map[netip.AddrPort]int {
	t.Helper()
	got := map[netip.AddrPort]int{}
	for range n {
		v := s.send(t, from, p)
		if !v.To.IsValid() {
			t.Fatalf("from %s to %s: %+v", from, p, v)
		}
		got[v.To]++
	}
	return got
}

func (s *suite) balance(t *testing.T) {
	svc := s.tcp(1, s.n.Endpoints(TCPPort, Pods...)...)
	s.sync(t, s.table(svc))
	sent, least, most := 120, 14, 66 // a fair draw is outside once in a million times
	if vm.Inside() {
		sent, least, most = 45, 2, 33
	}
	for _, from := range []Host{Pod1, Node, Outside} {
		got := s.reached(t, from, svc.Port, sent)
		if len(got) != 3 {
			t.Errorf("from %s: %v, want all of %v", from, got, svc.Endpoints)
		}
		for ep, n := range got {
			if n < least || n > most {
				t.Errorf("from %s: %d of %d to %s", from, n, sent, ep)
			}
		}
	}
}

func (s *suite) change(t *testing.T) {
	for _, pods := range [][]Host{{Pod1}, {Pod1, Pod2}, {Pod2}, {Pod2, Pod3}, {Pod3}} {
		svc := s.tcp(1, s.n.Endpoints(TCPPort, pods...)...)
		if n := s.sync(t, s.table(svc)); n != 1 {
			t.Errorf("to %v: %d operations, want 1", pods, n)
		}
		for ep := range s.reached(t, Pod1, svc.Port, 10) {
			if !slices.Contains(svc.Endpoints, ep) {
				t.Errorf("reached %s, want one of %v", ep, svc.Endpoints)
			}
		}
	}
	svc := s.tcp(1, s.n.Endpoints(SecondPort, Pod3)...)
	s.sync(t, s.table(svc))
	if got := s.reached(t, Node, svc.Port, 5); got[svc.Endpoints[0]] != 5 {
		t.Errorf("after a change of port: %v", got)
	}
}

func (s *suite) none(t *testing.T) {
	svc := s.tcp(1)
	udp := render.Service{Port: render.Port{Addr: s.n.Service(1), Proto: render.UDP, Port: 80}}
	s.sync(t, s.table(svc, udp))
	for _, from := range []Host{Pod1, Node, Outside} {
		for _, p := range []render.Port{svc.Port, udp.Port} {
			if v := s.refused(t, from, p); !v.Rejected {
				t.Errorf("from %s to %s without endpoints: %+v, want rejected", from, p, v)
			}
		}
	}
	s.sync(t, s.table())
	if v := s.send(t, Pod1, svc.Port); !v.Rejected {
		t.Errorf("to a removed service: %+v, want rejected", v)
	}
}

func (s *suite) unlisted(t *testing.T) {
	svc := s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...)
	s.sync(t, s.table(svc))
	for _, from := range []Host{Pod1, Node, Outside} {
		for _, p := range []render.Port{
			{Addr: svc.Addr, Proto: render.TCP, Port: 81},
			{Addr: svc.Addr, Proto: render.UDP, Port: 80},
			{Addr: s.n.Service(99), Proto: render.TCP, Port: 80},
		} {
			if v := s.refused(t, from, p); !v.Rejected {
				t.Errorf("from %s to %s: %+v, want rejected", from, p, v)
			}
		}
		icmp := render.Port{Addr: svc.Addr, Proto: render.ICMP}
		if svc.Addr.Is6() {
			icmp.Proto = render.ICMPv6
		}
		if v := s.send(t, from, icmp); !v.Dropped {
			t.Errorf("ping from %s: %+v, want dropped", from, v)
		}
	}
}

func (s *suite) hairpin(t *testing.T) {
	svc := s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...)
	s.sync(t, s.table(svc))
	v := s.send(t, Pod1, svc.Port)
	if v.To != svc.Endpoints[0] || v.From == s.n.Addr[Pod1] {
		t.Errorf("a pod to itself: %+v, want %s from the node", v, svc.Endpoints[0])
	}
}

func (s *suite) masquerade(t *testing.T) {
	svc := s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...)
	s.sync(t, s.table(svc))
	if v := s.send(t, Pod2, svc.Port); v.From != s.n.Addr[Pod2] {
		t.Errorf("pod to service: source %s, want the pod's own", v.From)
	}
	for _, from := range []Host{Outside, Node} {
		if v := s.send(t, from, svc.Port); v.From != s.n.Addr[Node] {
			t.Errorf("%s to service: source %s, want the node's %s", from, v.From, s.n.Addr[Node])
		}
	}
	direct := render.Port{Addr: s.n.Addr[Pod2], Proto: render.TCP, Port: TCPPort}
	if v := s.send(t, Pod1, direct); v.From != s.n.Addr[Pod1] {
		t.Errorf("pod to pod: source %s, want the pod's own", v.From)
	}
	direct.Addr = s.n.Addr[Outside]
	if v := s.send(t, Pod1, direct); v.From != s.n.Uplink {
		t.Errorf("pod to a host outside: source %s, want the node's %s", v.From, s.n.Uplink)
	}
}

func (s *suite) samePort(t *testing.T) {
	a, b := s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...), s.tcp(2, s.n.Endpoints(TCPPort, Pod2)...)
	c := a
	c.Port.Port, c.Endpoints = 443, s.n.Endpoints(SecondPort, Pod3)
	s.sync(t, s.table(a, b, c))
	for _, svc := range []render.Service{a, b, c} {
		if got := s.reached(t, Node, svc.Port, 5); got[svc.Endpoints[0]] != 5 {
			t.Errorf("%s: %v, want %v", svc.Port, got, svc.Endpoints)
		}
	}
}

func (s *suite) udp(t *testing.T) {
	udp := render.Service{Port: render.Port{Addr: s.n.Service(1), Proto: render.UDP, Port: 80}, Endpoints: s.n.Endpoints(UDPPort, Pod2)}
	tcp := s.tcp(1, s.n.Endpoints(TCPPort, Pod3)...)
	s.sync(t, s.table(udp, tcp))
	for _, from := range []Host{Pod1, Pod2, Node, Outside} {
		if got := s.reached(t, from, udp.Port, 5); got[udp.Endpoints[0]] != 5 {
			t.Errorf("udp from %s: %v", from, got)
		}
		if got := s.reached(t, from, tcp.Port, 5); got[tcp.Endpoints[0]] != 5 {
			t.Errorf("tcp from %s: %v", from, got)
		}
	}
}

// udpFlow: a client that keeps its source port follows the service.
func (s *suite) udpFlow(t *testing.T) {
	w, ok := s.w.(UDPFlow)
	if !ok {
		return // a World that remembers no flows cannot remember a wrong one
	}
	svc := render.Service{Port: render.Port{Addr: s.n.Service(3), Proto: render.UDP, Port: 53}, Endpoints: s.n.Endpoints(UDPPort, Pod2)}
	s.sync(t, s.table(svc))
	send, stop, err := w.Flow(Pod1, netip.AddrPortFrom(svc.Addr, svc.Port.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	for _, pods := range [][]Host{{Pod2}, {Pod3}, {Pod2}, {}} {
		svc.Endpoints = s.n.Endpoints(UDPPort, pods...)
		s.sync(t, s.table(svc))
		v, err := send()
		for i := 0; i < 5 && err == nil && len(pods) == 0 && v.Dropped; i++ { // as in refused
			v, err = send()
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(pods) == 0 && !v.Rejected || len(pods) > 0 && v.To != svc.Endpoints[0] {
			t.Errorf("endpoints %v: %+v", svc.Endpoints, v)
		}
	}
}

func (s *suite) affinity(t *testing.T) {
	svc := s.tcp(1, s.n.Endpoints(TCPPort, Pods...)...)
	svc.Affinity = time.Hour
	s.sync(t, s.table(svc))
	stays := func(from Host) netip.AddrPort {
		t.Helper()
		got := s.reached(t, from, svc.Port, 20)
		if len(got) != 1 {
			t.Fatalf("with affinity %s reached %v, want one endpoint", from, got)
		}
		for ep := range got {
			return ep
		}
		return netip.AddrPort{}
	}
	first := stays(Pod1)
	stays(Outside)
	svc.Endpoints = slices.DeleteFunc(slices.Clone(svc.Endpoints), func(ep netip.AddrPort) bool { return ep == first })
	s.sync(t, s.table(svc))
	second := stays(Pod1)
	if second == first {
		t.Errorf("affinity kept %s, which is gone", first)
	}
	svc.Endpoints = s.n.Endpoints(TCPPort, Pods...)
	s.sync(t, s.table(svc))
	if again := stays(Pod1); again != second {
		t.Errorf("affinity moved from %s to %s when an endpoint came", second, again)
	}
	svc.Affinity = 0
	s.sync(t, s.table(svc))
	if got := s.reached(t, Pod1, svc.Port, 60); len(got) != 3 {
		t.Errorf("without affinity reached %v, want all", got)
	}
}

// many goes beyond one transaction and one message.
func (s *suite) many(t *testing.T) {
	count := 3000
	if vm.Inside() { // where each change takes ten times as long
		count = 1000
	}
	var all []render.Service
	for i := range count {
		svc := s.tcp(100+i, s.n.Endpoints(TCPPort, Pods[:1+i%3]...)...)
		all = append(all, svc)
	}
	s.sync(t, s.table(all...))
	for _, i := range []int{0, 1, count/2 - 1, count - 1} {
		if got := s.reached(t, Pod1, all[i].Port, 30); len(got) != len(all[i].Endpoints) {
			t.Errorf("%s reached %v, want %v", all[i].Port, got, all[i].Endpoints)
		}
	}
	fewer := s.table(all[:10]...)
	if n := s.sync(t, fewer); n != count-10 {
		t.Errorf("%d operations to remove %d services", n, count-10)
	}
}

func (s *suite) idempotent(t *testing.T) {
	with := s.tcp(2, s.n.Endpoints(TCPPort, Pods...)...)
	with.Affinity = time.Minute
	split, drop := s.tcp(4, s.n.Endpoints(TCPPort, Pods...)...), s.tcp(5)
	split.Split, split.Outside, split.Affinity, drop.Drop = true, s.n.Endpoints(TCPPort, Pod1, Pod2), time.Hour, true
	split.Sources = []netip.Prefix{s.n.Cluster, netip.PrefixFrom(s.n.Addr[Outside], s.n.Uplink.BitLen())}
	slices.SortFunc(split.Sources, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	nobody := s.tcp(6, s.n.Endpoints(TCPPort, Pod3)...)
	nobody.Split = true
	tb := s.table(s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...), with, s.tcp(3), split, drop, nobody)
	tb.Announced, tb.Near = []netip.Prefix{s.n.Announced}, []netip.Addr{s.n.Addr[Pod1], s.n.Addr[Pod2]}
	s.sync(t, tb)
	if n := s.sync(t, tb); n != 0 {
		t.Errorf("second sync: %d operations", n)
	}
	s.open(t)
	if n := s.sync(t, tb); n != 0 {
		t.Errorf("first sync of a new process: %d operations", n)
	}
}

func (s *suite) settings(t *testing.T) {
	tb := s.table()
	s.sync(t, tb)
	tb.Cluster = nil
	tb.Local = nil
	tb.Pods = []netip.Prefix{s.n.Cluster} // the same start, wider
	tb.Announced, tb.Near = []netip.Prefix{s.n.Announced}, []netip.Addr{s.n.Addr[Pod1], s.n.Addr[Pod2]}
	if n := s.sync(t, tb); n == 0 {
		t.Error("a change of settings took no operation")
	}
	tb.Near = []netip.Addr{s.n.Addr[Pod2], s.n.Addr[Pod3]}
	if n := s.sync(t, tb); n != 1 {
		t.Errorf("%d operations for a change of one setting, want 1", n)
	}
	s.sync(t, s.table())
}

// adopt: a new process changes only what differs, and what it finds keeps working.
func (s *suite) adopt(t *testing.T) {
	a, b := s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...), s.tcp(2, s.n.Endpoints(TCPPort, Pod2)...)
	s.sync(t, s.table(a, b))
	s.open(t)
	if got := s.reached(t, Node, a.Port, 3); got[a.Endpoints[0]] != 3 {
		t.Errorf("before the first sync: %v", got)
	}
	b.Endpoints = s.n.Endpoints(TCPPort, Pod2, Pod3)
	if n := s.sync(t, s.table(a, b)); n != 1 {
		t.Errorf("%d operations to adopt and change one service, want 1", n)
	}
}

func (s *suite) tamper(t *testing.T) {
	a := s.tcp(1, s.n.Endpoints(TCPPort, Pods...)...)
	b := s.tcp(2, s.n.Endpoints(TCPPort, Pod2)...)
	tb := s.table(a, b)
	s.sync(t, tb)
	if err := s.w.Tamper(a.Port); err != nil {
		t.Fatal(err)
	}
	got, err := s.s.Read(s.ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	if got.Equal(tb) {
		t.Fatal("reading back did not see the change")
	}
	if n := s.sync(t, tb); n != 1 {
		t.Errorf("%d operations to repair one service, want 1", n)
	}
	if got := s.reached(t, Pod1, a.Port, 60); len(got) != 3 {
		t.Errorf("after repair reached %v", got)
	}
}

func (s *suite) broken(t *testing.T) {
	svc := s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...)
	tb := s.table(svc)
	s.sync(t, tb)
	if err := s.w.Break(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.s.Read(s.ctx(t)); err != nil {
		t.Fatal(err)
	}
	if n := s.sync(t, tb); n == 0 {
		t.Error("nothing repaired")
	}
	s.reached(t, Pod2, svc.Port, 3)
	if v := s.send(t, Pod1, render.Port{Addr: svc.Addr, Proto: render.TCP, Port: 81}); !v.Rejected {
		t.Errorf("after repair an unlisted port is %+v", v)
	}
}

func (s *suite) purge(t *testing.T) {
	s.sync(t, s.table(s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...)))
	s.open(t) // purging works without a sync before
	for range 2 {
		if err := s.s.Purge(s.ctx(t)); err != nil {
			t.Fatal(err)
		}
		left, err := s.w.Leftovers()
		if err != nil {
			t.Fatal(err)
		}
		if left != "" {
			t.Errorf("left behind: %s", left)
		}
	}
	s.sync(t, s.table(s.tcp(1, s.n.Endpoints(TCPPort, Pod1)...)))
	if err := s.s.Purge(s.ctx(t)); err != nil {
		t.Fatal(err)
	}
}
