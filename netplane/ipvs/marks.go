package ipvs

import (
	"net/netip"

	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

// maxMarks is how many services may lead clients from outside elsewhere, in a family.
const maxMarks = 1<<16 - 1

// markOf is the packet mark with a number: the high half of it, with the bit that says
// that the packet comes from outside.
func markOf(n uint32) uint32 { return n<<16 | nft.FarBit }

// isMark reports whether a mark is one that markOf makes.
func isMark(mark uint32) bool { return mark>>16 != 0 && mark&0xffff == nft.FarBit }

// splits are the packet marks of services with a virtual service of their own for clients
// from outside.
type splits struct {
	marks map[render.Port]uint32
	ports map[key]render.Port // by byMark
	// last is the number of the last mark that was taken.
	last uint32
}

func newSplits() *splits {
	return &splits{marks: map[render.Port]uint32{}, ports: map[key]render.Port{}}
}

// of is the mark of a port, or zero.
func (s *splits) of(p render.Port) uint32 { return s.marks[p] }

func (s *splits) set(p render.Port, mark uint32) {
	s.marks[p], s.ports[byMark(mark, p.Addr)] = mark, p
}

func (s *splits) clear(p render.Port) {
	if mark := s.marks[p]; mark != 0 {
		delete(s.marks, p)
		delete(s.ports, byMark(mark, p.Addr))
	}
}

// free returns a mark that no service of a family has, and none that drains; zero if there
// is none.
func (s *splits) free(family netip.Addr, draining map[key]*drain) uint32 {
	for range maxMarks {
		s.last = s.last%maxMarks + 1
		k := byMark(markOf(s.last), family)
		if _, taken := s.ports[k]; !taken && draining[k] == nil {
			return k.mark
		}
	}
	return 0
}

// marksOf are the marks of a port with a service, or without one if svc is nil. held:
// IPVS has it. split is the packet mark of clients from outside, if they are apart.
func marksOf(p render.Port, svc *render.Service, held bool, split uint32, t *render.Table) map[nft.Mark]bool {
	m := map[nft.Mark]bool{}
	if held && (svc == nil || len(svc.Endpoints) == 0) {
		m[nft.Mark{Set: nft.Draining, Port: p}] = true
	}
	if svc == nil {
		return m
	}
	if !contains(t.Range, p.Addr) && (len(svc.Endpoints) > 0 || svc.Drop) {
		m[nft.Mark{Set: nft.Outside, Port: p}] = true
	}
	switch {
	case len(svc.Endpoints) == 0 && svc.Drop:
		m[nft.Mark{Set: nft.Dropped, Port: p}] = true
	case len(svc.Endpoints) == 0:
		m[nft.Mark{Set: nft.Closed, Port: p}] = true
	case svc.Split && len(svc.Outside) == 0:
		m[nft.Mark{Set: nft.Undelivered, Port: p}] = true
	case split != 0:
		m[nft.Mark{Set: nft.Split, Port: p, Value: split}] = true
	}
	if len(svc.Sources) > 0 {
		m[nft.Mark{Set: nft.Guarded, Port: p}] = true
	}
	for _, src := range svc.Sources {
		m[nft.Mark{Set: nft.Allowed, Port: p, Source: src}] = true
	}
	return m
}

// remark makes these the marks of a port, and returns whether that changes any.
func (s *Services) remark(w *work, p render.Port, want map[nft.Mark]bool) bool {
	changed := false
	for m := range s.marks[p] {
		if !want[m] {
			changed = s.turn(w, m, false) || changed
		}
	}
	for m := range want {
		changed = s.turn(w, m, true) || changed
	}
	return changed
}

// turn sets or clears a mark; hairpins are under the zero port.
func (s *Services) turn(w *work, m nft.Mark, on bool) bool {
	of := s.marks[m.Port]
	was := of[m]
	if on == was {
		return false
	}
	if _, ok := w.touched[m]; !ok {
		w.touched[m] = was
	}
	switch {
	case !on:
		if delete(of, m); len(of) == 0 {
			delete(s.marks, m.Port)
		}
	case of == nil:
		s.marks[m.Port] = map[nft.Mark]bool{m: true}
	default:
		of[m] = true
	}
	return true
}

// count counts the services that go to each endpoint: any of them may reach itself.
func (s *Services) count(w *work, svc *render.Service, by int) {
	if svc == nil {
		return
	}
	for _, eps := range [][]netip.AddrPort{svc.Endpoints, svc.Outside} {
		for _, ep := range eps {
			a := ep.Addr()
			if s.reach[a] += by; s.reach[a] == 0 {
				delete(s.reach, a)
			}
			s.turn(w, nft.Mark{Set: nft.Hairpin, Addr: a}, s.reach[a] > 0)
		}
	}
}

// early reports whether a mark goes before IPVS changes: where packets would find a
// service that is ended, and where what comes in its place must not overlap with it.
func (s *Services) early(m nft.Mark) bool {
	return m.Set == nft.Split || m.Set == nft.Allowed && s.marks[m.Port][nft.Mark{Set: nft.Guarded, Port: m.Port}]
}
