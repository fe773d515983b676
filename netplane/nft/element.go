package nft

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"

	"decree.dev/decree/netplane/render"
)

// element is one entry of a set. val is the data of a map, of balancers the chain to go to (or
// verdictDrop), and of allowed the last key of its range.
type element struct {
	set      setID
	key, val string
	end      bool // of an interval
}

// id is what the kernel tells elements apart by.
type id struct {
	set setID
	key string
	end bool
}

func (e *element) id() id { return id{e.set, e.key, e.end} }

func sortElements(es []element) {
	slices.SortFunc(es, func(a, b element) int {
		return cmp.Or(cmp.Compare(a.set, b.set), cmp.Compare(a.key, b.key))
	})
}

// grouped returns es by set, otherwise in their order, but for intervals, which the kernel
// wants in the order of their keys.
func grouped(es []element) []element {
	var count [numAllSets]int
	for i := range es {
		count[es[i].set]++
	}
	var at [numAllSets]int
	for set, sum := 0, 0; set < len(count); set++ {
		at[set], sum = sum, sum+count[set]
	}
	out := make([]element, len(es))
	for i := range es {
		set := es[i].set
		out[at[set]] = es[i]
		at[set]++
	}
	for set, end := range at {
		if setID(set).interval() {
			slices.SortStableFunc(out[end-count[set]:end], func(a, b element) int { return cmp.Compare(a.key, b.key) })
		}
	}
	return out
}

// elementsOf appends what one service needs, but for hairpin, which services share.
func elementsOf(out []element, s *render.Service) []element {
	port := string(appendPort(nil, s.Port))
	n := len(s.Endpoints)
	switch {
	case n == 0 && s.Drop:
		return append(out, element{set: services, key: port, val: balancer{}.number()})
	case n == 0:
		return append(out, element{set: closed, key: port})
	}
	out = append(out, element{set: services, key: port, val: balancerOf(s, false).number()})
	out = backendsOf(out, s, port, false)
	if s.Split {
		out = append(out, element{set: split, key: port, val: balancerOf(s, true).number()})
		out = backendsOf(out, s, port, true)
	}
	if len(s.Sources) > 0 {
		out = append(out, element{set: guarded, key: port})
	}
	for _, p := range s.Sources {
		out = append(out, element{set: allowed, key: port + string(appendAddr(nil, p.Addr())), val: port + string(appendAddr(nil, lastOf(p)))})
	}
	return out
}

// backendsOf appends what the balancers of one service look up, for clients from outside or
// for all others.
func backendsOf(out []element, s *render.Service, port string, fromOutside bool) []element {
	var taken map[uint32]bool
	if s.Affinity > 0 {
		taken = make(map[uint32]bool, len(s.Endpoints))
	}
	eps, first := s.Endpoints, uint32(0)
	if fromOutside {
		eps, first = s.Outside, firstOutside
	}
	for i, ep := range eps[:balancerOf(s, fromOutside).n] {
		key := word(first+uint32(i), port)
		backend := string(appendAddrPort(nil, ep))
		out = append(out, element{set: endpoints, key: key, val: backend})
		if s.Affinity > 0 {
			who := identity(backend, fromOutside, taken)
			out = append(out, element{set: identities, key: key, val: word(who, "")}, element{set: live, key: word(who, port), val: backend})
		}
	}
	return out
}

// identity is a number for an endpoint that stays the same while other endpoints
// of its service come and go. For clients from outside it is another one, with the bit of
// firstOutside, so that they do not stay with an endpoint that is for others only.
func identity(backend string, fromOutside bool, taken map[uint32]bool) uint32 {
	h := fnv.New32a()
	h.Write([]byte(backend))
	who := h.Sum32() &^ firstOutside
	for who == 0 || taken[who] { // zero is no mark
		who = (who + 1) &^ firstOutside
	}
	taken[who] = true
	if fromOutside {
		who |= firstOutside
	}
	return who
}

// word is a number as the kernel holds it in a register, and what follows it in a key.
func word(n uint32, rest string) string {
	var b [4 + 16 + 8]byte // the longest: an IPv6 address, a protocol and a port
	return string(append(binary.NativeEndian.AppendUint32(b[:0], n), rest...))
}

// settingsOf appends the elements of everything in t but its services.
func (f *family) settingsOf(out []element, t *render.Table) []element {
	for _, x := range []struct {
		id setID
		ps []netip.Prefix
	}{{cluster, t.Cluster}, {pods, t.Pods}, {ranges, t.Range}, {announced, t.Announced}} {
		for _, p := range x.ps {
			if familyOf(p.Addr()) != f {
				continue
			}
			out = append(out, element{set: x.id, key: string(appendAddr(nil, p.Addr()))})
			if after := afterPrefix(p); after.IsValid() {
				out = append(out, element{set: x.id, key: string(appendAddr(nil, after)), end: true})
			}
		}
	}
	for _, a := range t.Near {
		if familyOf(a) == f {
			out = append(out, element{set: near, key: string(appendAddr(nil, a))})
		}
	}
	for _, p := range t.Local {
		if familyOf(p.Addr) == f {
			out = append(out, element{set: local, key: string(appendPort(nil, p))})
		}
	}
	return out
}

// afterPrefix is the first address after p, or the zero Addr if there is none.
func afterPrefix(p netip.Prefix) netip.Addr { return lastOf(p).Next() }

// lastOf is the last address in p.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// prefixBetween is the prefix from first up to, but without, after (the zero Addr:
// up to the last address).
func prefixBetween(first, after netip.Addr) (netip.Prefix, bool) {
	for bits := range first.BitLen() + 1 {
		if p := netip.PrefixFrom(first, bits); p.Masked() == p && afterPrefix(p) == after {
			return p, true
		}
	}
	return netip.Prefix{}, false
}

// changes returns what has to be deleted from and added to have to become want. An
// element whose value differs is deleted and added. adds is want if there is nothing yet.
func changes(have, want []element) (dels, adds []element) {
	if len(have) == 0 {
		return nil, want
	}
	old := make(map[id]string, len(have))
	for i := range have {
		old[have[i].id()] = have[i].val
	}
	for _, e := range want {
		val, ok := old[e.id()]
		delete(old, e.id())
		if ok && val == e.val {
			continue
		}
		if ok {
			dels = append(dels, element{set: e.set, key: e.key, val: val, end: e.end})
		}
		adds = append(adds, e)
	}
	for k, val := range old {
		dels = append(dels, element{set: k.set, key: k.key, val: val, end: k.end})
	}
	return dels, adds
}

// settingChanges is changes for settings: an interval set that differs is written
// anew, because the kernel refuses halves of intervals that overlap on the way.
func settingChanges(have, want []element) (dels, adds []element) {
	dels, adds = changes(have, want)
	var differs [numAllSets]bool
	for _, es := range [][]element{dels, adds} {
		for _, e := range es {
			differs[e.set] = true
		}
	}
	anew := func(e element) bool {
		return differs[e.set] && e.set.interval()
	}
	dels, adds = slices.DeleteFunc(dels, anew), slices.DeleteFunc(slices.Clone(adds), anew) // adds may be want
	for _, e := range have {
		if anew(e) {
			dels = append(dels, e)
		}
	}
	for _, e := range want {
		if anew(e) {
			adds = append(adds, e)
		}
	}
	return dels, adds
}
