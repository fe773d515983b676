package nft

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/netplane/ruleset"
	"decree.dev/decree/netplane/wire"
)

// actual is what the kernel holds of one family.
type actual struct {
	// sound is false when table, sets or fixed chains are not as they should be: the
	// table is made anew.
	sound  bool
	exists bool
	// chains are the balancers, true for those that are as they should be and are found by
	// their number.
	chains map[string]bool
	// byPort are the elements of each service; rest all others.
	byPort map[render.Port][]element
	rest   []element
	// digest is the sum of the hashes of all elements.
	digest uint64
}

var digestSeed = maphash.MakeSeed()

// readFamily loads everything of one family, more than once if it is not as expected; see
// [wire.Settled].
func (s *Services) readFamily(ctx context.Context, f *family, expected func(*actual) bool) (*actual, error) {
	return wire.Settled(ctx, func() (*actual, error) { return s.readOnce(f) }, func(a *actual) bool {
		return expected(a) || !a.sound
	}, func(a, b *actual) bool { return a.digest == b.digest })
}

func (s *Services) readOnce(f *family) (*actual, error) {
	a := &actual{chains: map[string]bool{}, byPort: map[render.Port][]element{}}
	t := s.table(f)
	tables, err := s.conn.ListTablesOfFamily(f.nf)
	if err != nil {
		return nil, fmt.Errorf("list %s tables: %w", f.name, err)
	}
	if !slices.ContainsFunc(tables, func(x *nftables.Table) bool { return x.Name == t.Name }) {
		return a, nil
	}
	a.exists = true
	if a.sound, err = s.checkSets(f, t); err != nil || !a.sound {
		return a, err
	}
	if a.sound, err = s.checkChains(f, t, a.chains); err != nil || !a.sound {
		return a, err
	}
	if a.sound, err = s.checkNumbers(f, t, a.chains); err != nil || !a.sound {
		return a, err
	}
	for _, id := range s.layout.sets {
		if id == affinity || id == balancers {
			continue
		}
		size := f.set(t, id).KeyType.Bytes
		err := s.wire.contents(f, t.Name, id, func(e element) {
			a.sound = a.sound && len(e.key) == int(size) && (id != allowed || len(e.val) == int(size))
			if a.sound {
				a.add(f, e)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("read set %s %s %s: %w", f.name, t.Name, setNames[id], err)
		}
	}
	return a, nil
}

func (a *actual) add(f *family, e element) {
	a.digest += maphash.Comparable(digestSeed, e)
	key := e.key
	switch e.set {
	case services, split, guarded, closed:
	case allowed:
		key = key[:len(key)-f.bytes]
	case endpoints, identities, live:
		key = key[4:]
	default:
		a.rest = append(a.rest, e)
		return
	}
	p := f.port(key)
	a.byPort[p] = append(a.byPort[p], e)
}

func (s *Services) checkSets(f *family, t *nftables.Table) (bool, error) {
	sets, err := s.conn.GetSets(t)
	if err != nil {
		return false, fmt.Errorf("list sets of %s %s: %w", f.name, t.Name, err)
	}
	found := map[string]*nftables.Set{}
	for _, x := range sets {
		found[x.Name] = x
	}
	for _, id := range s.layout.sets {
		want, have := f.set(t, id), found[setNames[id]]
		if have == nil || have.IsMap != want.IsMap || have.Interval != want.Interval || have.Dynamic != want.Dynamic || have.HasTimeout != want.HasTimeout {
			return false, nil
		}
	}
	return true, nil
}

// checkChains compares the fixed chains, and collects the balancers that are as
// they should be.
func (s *Services) checkChains(f *family, t *nftables.Table, balancers map[string]bool) (bool, error) {
	all, err := s.conn.ListChainsOfTableFamily(f.nf)
	if err != nil {
		return false, fmt.Errorf("list chains of %s %s: %w", f.name, t.Name, err)
	}
	found := map[string]*nftables.Chain{}
	for _, c := range all {
		if c.Table.Name == t.Name {
			found[c.Name] = c
		}
	}
	tags, err := ruleset.Tags(s.wire.Conn, uint8(f.nf), t.Name)
	if err != nil {
		return false, fmt.Errorf("read rules of %s %s: %w", f.name, t.Name, err)
	}
	for _, want := range s.layout.chains(f) {
		have := found[want.name]
		if have == nil || (have.Hooknum == nil) != (want.hook == nil) {
			return false, nil
		}
		if ok, err := ruleset.Tagged(uint8(f.nf), tags[want.name], want.rules); err != nil || !ok {
			return false, err
		}
		delete(found, want.name)
	}
	for name := range found {
		b, ok := parseBalancer(name)
		if !ok {
			return false, nil // not ours
		}
		want := f.balancerChain(b)
		if balancers[name], err = ruleset.Tagged(uint8(f.nf), tags[name], want.rules); err != nil {
			return false, err
		}
	}
	return true, nil
}

// checkNumbers takes the balancers that are not found by their number for unsound.
func (s *Services) checkNumbers(f *family, t *nftables.Table, chains map[string]bool) (sound bool, err error) {
	if !slices.Contains(s.layout.sets, balancers) {
		return true, nil
	}
	found := map[string]bool{}
	sound = true
	err = s.wire.contents(f, t.Name, balancers, func(e element) {
		b, ok := parseNumber(e.key)
		sound = sound && ok && b.name() == e.val
		found[e.val] = true
	})
	if err != nil {
		return false, fmt.Errorf("read set %s %s %s: %w", f.name, t.Name, setNames[balancers], err)
	}
	for name := range chains {
		chains[name] = chains[name] && found[name]
	}
	chains[verdictDrop] = found[verdictDrop]
	return sound, nil
}

// service decodes the elements of one service as far as they make sense.
func (f *family) service(p render.Port, es []element) (render.Service, bool) {
	s := render.Service{Port: p}
	known, n, outer := false, 0, 0
	var backends []element
	sortElements(es)
	for _, e := range es {
		switch e.set {
		case closed:
			known = true
		case services:
			b, ok := parseNumber(e.val)
			known, s.Drop = true, ok && b.n == 0
			n, s.Affinity = b.n, b.affinity
		case split:
			b, _ := parseNumber(e.val)
			s.Split, outer = true, b.n
		case endpoints:
			backends = append(backends, e)
		case allowed:
			first, last := f.addr(e.key[len(e.key)-f.bytes:]), f.addr(e.val[len(e.val)-f.bytes:])
			if source, ok := prefixBetween(first, last.Next()); ok {
				s.Sources = append(s.Sources, source)
			}
		}
	}
	s.Endpoints, s.Outside = f.backends(backends, 0, n), f.backends(backends, firstOutside, outer)
	return s, known
}

// backends returns the n endpoints from index first on, in the order of their indices.
func (f *family) backends(es []element, first uint32, n int) []netip.AddrPort {
	type indexed struct {
		i  uint32
		ep netip.AddrPort
	}
	var eps []indexed
	for _, e := range es {
		if i := binary.NativeEndian.Uint32([]byte(e.key[:4])); i >= first && uint64(i) < uint64(first)+uint64(n) && len(e.val) >= f.addrPortBytes() {
			eps = append(eps, indexed{i, f.addrPort(e.val)})
		}
	}
	slices.SortFunc(eps, func(a, b indexed) int { return cmp.Compare(a.i, b.i) })
	var out []netip.AddrPort
	for _, x := range eps {
		out = append(out, x.ep)
	}
	return out
}

// settings decodes what is not of a service into t.
func (f *family) settings(t *render.Table, rest []element) {
	sortElements(rest)
	for i, e := range rest {
		var into *[]netip.Prefix
		switch e.set {
		case local:
			t.Local = append(t.Local, f.port(e.key))
			continue
		case near:
			t.Near = append(t.Near, f.addr(e.key))
			continue
		case cluster:
			into = &t.Cluster
		case pods:
			into = &t.Pods
		case ranges:
			into = &t.Range
		case announced:
			into = &t.Announced
		default:
			continue
		}
		if e.end {
			continue
		}
		var after netip.Addr
		if i+1 < len(rest) && rest[i+1].set == e.set && rest[i+1].end {
			after = f.addr(rest[i+1].key)
		}
		if p, ok := prefixBetween(f.addr(e.key), after); ok {
			*into = append(*into, p)
		}
	}
}
