package nft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/netplane/ruleset"
)

// uses reports whether t has anything of the family.
func uses(f *family, t *render.Table) bool {
	of := func(a netip.Addr) bool { return familyOf(a) == f }
	prefix := func(p netip.Prefix) bool { return of(p.Addr()) }
	// Services are ordered, IPv4 first.
	n := len(t.Services)
	return n > 0 && (of(t.Services[0].Addr) || of(t.Services[n-1].Addr)) ||
		slices.ContainsFunc(t.Range, prefix) || slices.ContainsFunc(t.Cluster, prefix) || slices.ContainsFunc(t.Pods, prefix) ||
		slices.ContainsFunc(t.Announced, prefix) || slices.ContainsFunc(t.Near, of) ||
		slices.ContainsFunc(t.Local, func(p render.Port) bool { return of(p.Addr) })
}

// build makes the table with its sets and fixed chains anew, in one transaction.
func (s *Services) build(f *family) error {
	t := s.table(f)
	s.conn.AddTable(t) // so that deleting it cannot fail
	s.conn.DelTable(t)
	s.conn.AddTable(t)
	for _, id := range s.layout.sets {
		set := f.set(t, id)
		set.KeyByteOrder = binaryutil.BigEndian
		if err := s.conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("set %s %s %s: %w", f.name, t.Name, set.Name, err)
		}
	}
	for _, c := range s.layout.chains(f) {
		if err := s.addChain(f, t, &c); err != nil {
			return err
		}
	}
	if err := s.conn.Flush(); err != nil {
		return fmt.Errorf("make table %s %s: %w", f.name, t.Name, err)
	}
	return nil
}

func (s *Services) addChain(f *family, t *nftables.Table, c *chain) error {
	nc := &nftables.Chain{Name: c.name, Table: t}
	if c.hook != nil {
		nc.Hooknum, nc.Priority, nc.Type = c.hook, c.prio, c.typ
	}
	s.conn.AddChain(nc)
	for _, exprs := range c.rules {
		tag, err := ruleset.Tag(uint8(f.nf), exprs)
		if err != nil {
			return fmt.Errorf("chain %s: %w", c.name, err)
		}
		s.conn.AddRule(&nftables.Rule{Table: t, Chain: nc, Exprs: exprs, UserData: []byte(tag)})
	}
	return nil
}

// addBalancers makes the balancers that the changes go to, where they are missing
// or not as they should be.
func (s *Services) addBalancers(ctx context.Context, f *family, cs []change) error {
	missing := map[string]bool{}
	for i := range cs {
		for j := range cs[i].adds {
			e := &cs[i].adds[j]
			if e.set != services && e.set != split {
				continue
			}
			b, _ := parseNumber(e.val)
			if name := b.name(); !s.chains[f][name] {
				missing[name] = true
			}
		}
	}
	// Those that are there but damaged may have services that do not change.
	for name, ok := range s.chains[f] {
		if !ok {
			missing[name] = true
		}
	}
	t := s.table(f)
	for names := range slices.Chunk(slices.Sorted(maps.Keys(missing)), maxChains) {
		for _, name := range names {
			if err := s.addBalancer(f, t, name); err != nil {
				return err
			}
		}
		if err := s.conn.Flush(); err != nil {
			return fmt.Errorf("make chains of %s %s: %w", f.name, t.Name, err)
		}
		if err := s.wire.commit(ctx, f, s.name, nil, numbered(names)); err != nil {
			return fmt.Errorf("number chains of %s %s: %w", f.name, t.Name, err)
		}
		for _, name := range names {
			s.chains[f][name] = true
		}
	}
	return nil
}

// maxChains is how many chains are made or deleted at once: there is an answer to each of a
// few messages for one, and the socket holds some two hundred.
const maxChains = 32

// usual are the balancers that a table has from the beginning, which are to be made.
func usual() map[string]bool {
	out := map[string]bool{}
	for n := range usualEndpoints + 1 {
		out[balancer{n: n}.name()] = false
	}
	return out
}

// numbered are the elements by which balancers are found.
func numbered(names []string) (out []element) {
	for _, name := range names {
		b, _ := parseBalancer(name)
		out = append(out, element{set: balancers, key: b.number(), val: name})
	}
	return out
}

func (s *Services) addBalancer(f *family, t *nftables.Table, name string) error {
	b, ok := parseBalancer(name)
	if !ok {
		return nil // the one that drops needs no chain
	}
	c := f.balancerChain(b)
	s.conn.AddChain(&nftables.Chain{Name: name, Table: t})
	s.conn.FlushChain(&nftables.Chain{Name: name, Table: t})
	return s.addChain(f, t, &c)
}

// collect deletes balancers that no service goes to, once there are many. What
// does not work now works later, so that it is no error.
func (s *Services) collect(ctx context.Context, want *render.Table) {
	for _, f := range families {
		if len(s.chains[f]) <= maxIdleChains {
			continue
		}
		idle := maps.Clone(s.chains[f])
		for name := range usual() {
			delete(idle, name)
		}
		for i := range want.Services {
			if svc := &want.Services[i]; familyOf(svc.Addr) == f {
				delete(idle, balancerOf(svc, false).name())
				delete(idle, balancerOf(svc, true).name())
			}
		}
		if len(idle) <= maxIdleChains {
			continue
		}
		for names := range slices.Chunk(slices.Collect(maps.Keys(idle)), maxChains) {
			err := s.wire.commit(ctx, f, s.name, numbered(names), nil)
			if err == nil {
				for _, name := range names {
					s.conn.DelChain(&nftables.Chain{Name: name, Table: s.table(f)})
				}
				err = s.conn.Flush()
			}
			if err != nil {
				s.log.Warn("delete unused chains", "family", f.name, "table", s.name, "err", err)
				s.known = false
				break
			}
			for _, name := range names {
				delete(s.chains[f], name)
			}
		}
	}
}

func sortServices(ss []render.Service) {
	slices.SortFunc(ss, func(a, b render.Service) int { return a.Compare(b.Port) })
}

// probeName is a name that no table has.
func probeName() string { return fmt.Sprintf("decree-probe-%d", os.Getpid()) }

// Probe finds out whether the kernel has all that a table needs, in the network
// namespace of the calling thread, by making one under a name that nobody has.
func Probe() error {
	s, err := New(probeName(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	t := s.table(ip4)
	err = s.build(ip4)
	if err == nil {
		for _, affinity := range []time.Duration{0, time.Hour} {
			c := ip4.balancerChain(balancer{n: 2, affinity: affinity})
			err = errors.Join(err, s.addChain(ip4, t, &c))
		}
		if err == nil {
			err = s.conn.Flush()
		}
		err = errors.Join(err, s.dropTable(ip4))
	}
	return errors.Join(err, s.Close())
}
