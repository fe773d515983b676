package netplanetest

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"decree.dev/decree/netplane/render"
)

// udpBefore: a client that sent to a port of the node before a service was there follows it
// when it comes, also if that is while nobody looks.
func (s *suite) udpBefore(t *testing.T) {
	w, ok := s.w.(UDPFlow)
	if !ok {
		return // as in udpFlow
	}
	svc := render.Service{Port: render.Port{Addr: s.n.Uplink, Proto: render.UDP, Port: nodePort}, Endpoints: s.n.Endpoints(UDPPort, Pod2)}
	for _, restart := range []bool{false, true} {
		s.sync(t, s.table())
		send, stop, err := w.Flow(Outside, netip.AddrPortFrom(svc.Addr, svc.Port.Port))
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		if v, err := send(); err != nil || !v.Rejected {
			t.Fatalf("before the service: %+v, %v", v, err)
		}
		if restart {
			s.open(t)
		}
		s.sync(t, s.table(svc))
		if v, err := send(); err != nil || v.To != svc.Endpoints[0] {
			t.Errorf("with the service, another process %v: %+v, %v", restart, v, err)
		}
	}
}

// udpSplit: a client that keeps sending from one port is led by the policy of the day.
func (s *suite) udpSplit(t *testing.T) {
	w, ok := s.w.(UDPFlow)
	if !ok {
		return // as in udpFlow
	}
	all := s.n.Endpoints(UDPPort, Pods...)
	svc := render.Service{Port: render.Port{Addr: s.n.Balanced(4), Proto: render.UDP, Port: 53}, Endpoints: all[:2]}
	s.sync(t, s.table(svc))
	sends := map[Host]func() (Verdict, error){}
	for _, from := range []Host{Outside, Pod3} {
		send, stop, err := w.Flow(from, netip.AddrPortFrom(svc.Addr, svc.Port.Port))
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		sends[from] = send
	}
	for _, step := range []struct {
		change func()
		end    map[Host][]netip.AddrPort // none: dropped
	}{
		{func() {}, map[Host][]netip.AddrPort{Outside: all[:2], Pod3: all[:2]}},
		{func() { svc.Split, svc.Outside = true, all[2:] }, map[Host][]netip.AddrPort{Outside: all[2:], Pod3: all[:2]}},
		{func() { svc.Sources = []netip.Prefix{s.n.Cluster} }, map[Host][]netip.AddrPort{Pod3: all[:2], Outside: nil}},
		{func() { svc.Split, svc.Outside, svc.Sources = false, nil, nil }, map[Host][]netip.AddrPort{Outside: all[:2], Pod3: all[:2]}},
		{func() { svc.Endpoints = all[1:2] }, map[Host][]netip.AddrPort{Outside: all[1:2], Pod3: all[1:2]}},
	} {
		step.change()
		s.sync(t, s.table(svc))
		for from, end := range step.end {
			v, err := sends[from]()
			if err != nil || v.Dropped != (len(end) == 0) || !v.Dropped && !slices.Contains(end, v.To) {
				t.Errorf("from %s to %+v: %+v, %v; want one of %v", from, svc, v, err, end)
			}
		}
	}
}

// split: who is led where changes in one operation, from any policy to any other.
func (s *suite) split(t *testing.T) {
	all := s.n.Endpoints(TCPPort, Pods...)
	at := func(change func(*render.Service)) render.Service {
		svc := render.Service{Port: render.Port{Addr: s.n.Uplink, Proto: render.TCP, Port: nodePort}, Endpoints: all}
		change(&svc)
		return svc
	}
	variants := []struct {
		svc render.Service
		// outside and inside are how many endpoints clients reach; zero: dropped.
		outside, inside int
	}{
		{at(func(*render.Service) {}), 3, 3},
		{at(func(s *render.Service) { s.Split, s.Outside = true, all[:1] }), 1, 3},
		{at(func(s *render.Service) { s.Split, s.Outside = true, all[1:] }), 2, 3},
		{at(func(s *render.Service) { s.Split = true }), 0, 3},
		{at(func(x *render.Service) { x.Sources = []netip.Prefix{s.n.Cluster} }), 0, 3},
		{at(func(s *render.Service) { s.Endpoints, s.Drop = nil, true }), 0, 0},
		// Outside is no part of Endpoints when only ending pods are here.
		{at(func(s *render.Service) { s.Endpoints, s.Split, s.Outside = all[2:], true, all[:2] }), 2, 1},
	}
	s.sync(t, s.table())
	for _, i := range []int{0, 1, 2, 3, 0, 4, 1, 5, 6, 3, 5, 0} {
		v := variants[i]
		if n := s.sync(t, s.table(v.svc)); n != 1 {
			t.Errorf("%d operations to %+v, want 1", n, v.svc)
		}
		for _, c := range []struct {
			from Host
			want int
		}{{Outside, v.outside}, {Pod1, v.inside}} {
			if c.want == 0 {
				if got := s.send(t, c.from, v.svc.Port); !got.Dropped {
					t.Errorf("from %s to %+v: %+v, want dropped", c.from, v.svc, got)
				}
			} else if got := s.spread(t, c.from, v.svc.Port, c.want); len(got) != c.want {
				t.Errorf("from %s to %+v: %v, want %d", c.from, v.svc, got, c.want)
			}
		}
	}
}

// spread sends until packets have come to n endpoints, and a few times more; it gives up
// when one of three would have been missed once in ten billion times.
func (s *suite) spread(t *testing.T, from Host, p render.Port, n int) map[netip.AddrPort]int {
	t.Helper()
	got := map[netip.AddrPort]int{}
	for left, tries := 5, 60; left > 0 && tries > 0; tries-- {
		maps.Copy(got, s.reached(t, from, p, 1))
		if len(got) >= n {
			left--
		}
	}
	return got
}

// affinitySplit: clients stay where they are only as long as they may be led there.
func (s *suite) affinitySplit(t *testing.T) {
	all := s.n.Endpoints(TCPPort, Pods...)
	svc := render.Service{Port: render.Port{Addr: s.n.Balanced(3), Proto: render.TCP, Port: 80}, Endpoints: all, Affinity: time.Hour}
	one := func(from Host) netip.AddrPort {
		t.Helper()
		got := s.reached(t, from, svc.Port, 20)
		for ep := range got {
			if len(got) == 1 {
				return ep
			}
		}
		t.Fatalf("with affinity %s reached %v, want one endpoint", from, got)
		return netip.AddrPort{}
	}
	s.sync(t, s.table(svc))
	pod, first := one(Pod1), one(Outside)
	svc.Split = true // without the one where the client is
	svc.Outside = slices.DeleteFunc(slices.Clone(all), func(ep netip.AddrPort) bool { return ep == first })
	s.sync(t, s.table(svc))
	if got := one(Outside); got == first {
		t.Errorf("the client from outside stayed with %s", first)
	}
	if got := one(Pod1); got != pod {
		t.Errorf("the pod moved from %s to %s", pod, got)
	}
}
