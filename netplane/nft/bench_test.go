package nft_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

// manyServices is a table with n services of three endpoints each.
func manyServices(n int) render.Table {
	t := render.Table{
		Range:   []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16")},
		Cluster: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")},
		Pods:    []netip.Prefix{netip.MustParsePrefix("10.98.0.0/24")},
	}
	for i := range n {
		var eps []netip.AddrPort
		for e := range 3 {
			eps = append(eps, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 98, byte(i / 250), byte(i%80*3 + e)}), 8080))
		}
		t.Services = append(t.Services, render.Service{
			Port:      render.Port{Addr: netip.AddrFrom4([4]byte{10, 97, byte(i / 250), byte(i%250 + 1)}), Proto: render.TCP, Port: 80},
			Endpoints: eps,
		})
	}
	return t
}

func open(tb testing.TB, ns string) *nft.Services {
	tb.Helper()
	var s *nft.Services
	netspacetest.In(tb, ns, func() (err error) {
		s, err = nft.New("", slog.New(slog.DiscardHandler))
		return err
	})
	tb.Cleanup(func() { s.Close() })
	return s
}

func BenchmarkCold(b *testing.B) {
	for _, n := range []int{1000, 30000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := open(b, netspacetest.Namespace(b, "node"))
			t := manyServices(n)
			for b.Loop() {
				if _, err := s.Sync(b.Context(), t); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Purge(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

func BenchmarkOneChange(b *testing.B) {
	s := open(b, netspacetest.Namespace(b, "node"))
	t := manyServices(30000)
	if _, err := s.Sync(b.Context(), t); err != nil {
		b.Fatal(err)
	}
	all := t.Services[15000].Endpoints
	for i := 0; b.Loop(); i++ {
		u := t
		u.Services = append([]render.Service(nil), t.Services...)
		u.Services[15000].Endpoints = all[:2+i%2]
		if n, err := s.Sync(b.Context(), u); err != nil || i > 0 && n != 1 {
			b.Fatal(n, err)
		}
	}
}

// BenchmarkSources: what source ranges cost, where 1,000 services have ten each: all of them
// at once, one that changes, and a service without that does.
func BenchmarkSources(b *testing.B) {
	sources := func(n, from int) (out []netip.Prefix) {
		for i := range n {
			out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(from + i), 0}), 24))
		}
		return out
	}
	t := manyServices(2000)
	for i := range 1000 {
		t.Services[i].Sources = sources(10, i%20)
	}
	b.Run("cold", func(b *testing.B) {
		s := open(b, netspacetest.Namespace(b, "node"))
		for b.Loop() {
			if _, err := s.Sync(b.Context(), t); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			if err := s.Purge(b.Context()); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
	})
	change := func(b *testing.B, change func(svc []render.Service, i int)) {
		s := open(b, netspacetest.Namespace(b, "node"))
		if _, err := s.Sync(b.Context(), t); err != nil {
			b.Fatal(err)
		}
		for i := 0; b.Loop(); i++ {
			u := t
			u.Services = append([]render.Service(nil), t.Services...)
			change(u.Services, i)
			if _, err := s.Sync(b.Context(), u); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("change", func(b *testing.B) {
		change(b, func(svc []render.Service, i int) { svc[500].Sources = sources(10, i%40) })
	})
	b.Run("other", func(b *testing.B) {
		change(b, func(svc []render.Service, i int) { svc[1500].Endpoints = svc[1500].Endpoints[:2+i%2] })
	})
}

func BenchmarkReadBack(b *testing.B) {
	s := open(b, netspacetest.Namespace(b, "node"))
	if _, err := s.Sync(b.Context(), manyServices(30000)); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Read(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

// TestProbe leaves nothing behind.
func TestProbe(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	if err := netspace.Do(ns, nft.Probe); err != nil {
		t.Fatal(err)
	}
}
