package diff

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"decree.dev/decree/netplane/render"
)

func drawTable(t *rapid.T, name string) []render.Service {
	byPort := map[render.Port]render.Service{}
	for range rapid.IntRange(0, 8).Draw(t, name) {
		p := render.Port{Addr: netip.AddrFrom4([4]byte{10, 97, 0, rapid.Byte().Draw(t, "addr") % 4}), Proto: render.TCP, Port: rapid.Uint16Range(1, 2).Draw(t, "port")}
		s := render.Service{Port: p}
		for i := range rapid.IntRange(0, 2).Draw(t, "endpoints") {
			s.Endpoints = append(s.Endpoints, netip.AddrPortFrom(p.Addr, uint16(i)))
		}
		byPort[p] = s
	}
	return slices.SortedFunc(maps.Values(byPort), func(a, b render.Service) int { return a.Compare(b.Port) })
}

// TestServices: the operations turn one table into the other, none is idle, and
// no port has two.
func TestServices(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := drawTable(t, "have"), drawTable(t, "want")
		got := map[render.Port]render.Service{}
		for _, s := range have {
			got[s.Port] = s
		}
		seen := map[render.Port]bool{}
		for _, op := range Services(have, want) {
			p := op.Port()
			if seen[p] {
				t.Fatalf("two operations for %s", p)
			}
			seen[p] = true
			old, exists := got[p]
			if exists != (op.Have != nil) || exists && !old.Equal(op.Have) {
				t.Fatalf("operation on %s starts from %+v, but there is %+v", p, op.Have, old)
			}
			if op.Have != nil && op.Want != nil && op.Have.Equal(op.Want) {
				t.Fatalf("idle operation on %s", p)
			}
			if delete(got, p); op.Want != nil {
				got[p] = *op.Want
			}
		}
		result := slices.SortedFunc(maps.Values(got), func(a, b render.Service) int { return a.Compare(b.Port) })
		if !(render.Table{Services: result}).Equal(render.Table{Services: want}) {
			t.Fatalf("%+v, want %+v", result, want)
		}
	})
}
