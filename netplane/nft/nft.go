// Package nft holds a node's services in nftables, straight over netlink.
//
// Everything lives in one table of our own (one for IPv4, and one for IPv6 where
// it is used). The number of rules does not grow with the number of services: a
// map finds a packet's service and with it the chain for its number of endpoints (by a
// second map, see [balancers]), that chain draws a random index, and a third map finds the
// endpoint by index and service. A change of a service is a change of map elements in one
// transaction, so that no packet sees half of it.
//
// What it holds survives this process; the next one reads it back and goes on.
package nft

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/flows"
	"decree.dev/decree/netplane/render"
)

// DefaultTable is the name of the tables unless told otherwise.
const DefaultTable = "decree"

// maxTransaction is how many elements go to the kernel at once: a bound keeps other users
// of nftables from waiting long.
const maxTransaction = 16000

// maxIdleChains is how many balancers without a service are kept for the next one, beside
// the usual ones.
const maxIdleChains = 64

// usualEndpoints is for how many endpoints there are balancers from the beginning: for each
// that is made later the kernel walks through all endpoints that there are.
const usualEndpoints = 8

// errPods: what is a pod of this node has to be looked at anew.
var errPods = errors.New("the pods of this node have other addresses")

var errClosed = fmt.Errorf("service tables: %w", os.ErrClosed)

// Services implements netplane.Services with nftables. All methods are safe for
// concurrent use; they take turns.
type Services struct {
	name   string
	layout layout
	log    *slog.Logger

	mu sync.Mutex
	// closed: the netlink library would go on with a socket of whatever network
	// namespace its caller is in.
	closed bool
	conn   *nftables.Conn
	wire   *elementWire
	flows  *flows.Table
	// known says that have and what follows is what the kernel holds.
	known  bool
	have   render.Table
	chains map[*family]map[string]bool
	// reach counts what an address is in hairpin for: each endpoint that is a pod of this
	// node, and that it is in Near.
	reach map[netip.Addr]int
	// swept are the lost pods at the last forgetUnanswered, lost that another is due.
	swept []netip.Prefix
	lost  bool
	// unforgotten are changes whose UDP flows are still to be forgotten.
	unforgotten []diff.Op
}

// New opens the sockets, in the network namespace of the calling thread, and
// changes nothing yet. table names the tables; empty means DefaultTable.
func New(table string, log *slog.Logger) (*Services, error) {
	if table == "" {
		table = DefaultTable
	}
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	s := &Services{name: table, layout: balancing, log: log, conn: conn}
	if s.wire, err = openWire(); err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	if s.flows, err = flows.Open(); err != nil {
		return nil, errors.Join(err, s.wire.Close(), conn.CloseLasting())
	}
	return s, nil
}

// Close closes the sockets; what the kernel holds stays.
func (s *Services) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.flows.Close()
	return errors.Join(s.conn.CloseLasting(), s.wire.Close())
}

func (s *Services) table(f *family) *nftables.Table {
	return &nftables.Table{Name: s.name, Family: f.nf}
}

// Sync implements netplane.Services.
func (s *Services) Sync(ctx context.Context, want render.Table) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, errClosed
	}
	if s.known {
		n, err := s.incremental(ctx, want)
		if err == nil || ctx.Err() != nil {
			return n, err
		}
		if !errors.Is(err, errPods) {
			s.log.Warn("service table is not as expected; reading it back", "table", s.name, "err", err)
		}
	}
	return s.full(ctx, want)
}

// Read implements netplane.Services.
func (s *Services) Read(ctx context.Context) (render.Table, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var t render.Table
	if s.closed {
		return t, errClosed
	}
	for _, f := range families {
		undisturbed := false
		a, err := s.readFamily(ctx, f, func(a *actual) bool {
			undisturbed = s.known && s.undisturbed(f, a)
			return undisturbed
		})
		if err != nil {
			return t, err
		}
		for p, es := range a.byPort {
			if svc, ok := f.service(p, es); ok {
				t.Services = append(t.Services, svc)
			}
		}
		f.settings(&t, a.rest)
		s.known = undisturbed
	}
	sortServices(t.Services)
	return t, nil
}

// Purge implements netplane.Services.
func (s *Services) Purge(ctx context.Context) error { return s.every(ctx, s.dropTable) }

// Retire removes all services; connections that are established go on, because the
// kernel remembers where they go. It is done at once.
//
// What refuses goes first. When all went at once, a new connection was refused about once in
// a hundred times on a busy machine, and not by the balancer that was to take it: it seems that
// a packet that is on its way can miss the rules that translate and still meet those that
// refuse what was not translated.
func (s *Services) Retire(ctx context.Context) (bool, error) {
	err := s.every(ctx, s.unrefuse)
	if err == nil {
		err = s.Purge(ctx)
	}
	return err == nil, err
}

// every does something to both tables, after which they have to be read anew.
func (s *Services) every(ctx context.Context, do func(*family) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	s.known = false
	for _, f := range families {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := do(f); err != nil {
			return err
		}
	}
	return nil
}

// unrefuse empties the chains that refuse.
func (s *Services) unrefuse(f *family) error {
	t := s.table(f)
	for _, c := range f.chains() {
		if c.typ == nftables.ChainTypeFilter {
			s.conn.FlushChain(&nftables.Chain{Name: c.name, Table: t})
		}
	}
	if err := s.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("empty chains of table %s %s: %w", f.name, t.Name, err)
	}
	return nil
}

func (s *Services) dropTable(f *family) error {
	t := s.table(f)
	if _, err := s.conn.ListTableOfFamily(t.Name, f.nf); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("look for table %s %s: %w", f.name, t.Name, err)
	}
	s.conn.DelTable(t)
	if err := s.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete table %s %s: %w", f.name, t.Name, err)
	}
	return nil
}

// change is what one service needs; it is never split over transactions.
type change struct {
	dels, adds []element
}

// incremental goes from s.have to want without asking the kernel.
func (s *Services) incremental(ctx context.Context, want render.Table) (int, error) {
	s.known = false // until all is done
	ops := diff.Services(s.have.Services, want.Services)
	n := len(ops)
	byFamily := map[*family][]change{}
	for _, op := range ops {
		f := familyOf(op.Port().Addr)
		byFamily[f] = append(byFamily[f], s.changeOf(op))
	}
	if !slices.Equal(s.have.Pods, want.Pods) {
		return n, errPods
	}
	if !s.have.SameConfig(want) {
		n++
		before, after := differing(s.have, want)
		for _, f := range families {
			c := s.recount(func(count func(netip.Addr, int)) {
				for _, x := range []struct {
					near []netip.Addr
					by   int
				}{{after.Near, 1}, {before.Near, -1}} {
					for _, a := range x.near {
						if familyOf(a) == f {
							count(a, x.by)
						}
					}
				}
			})
			dels, adds := settingChanges(f.settingsOf(nil, &before), f.settingsOf(nil, &after))
			byFamily[f] = append([]change{{append(dels, c.dels...), append(adds, c.adds...)}}, byFamily[f]...)
		}
	}
	for _, f := range families {
		if s.chains[f] == nil && uses(f, &want) {
			return n, fmt.Errorf("family %s is new", f.name) // full makes its table
		}
		if err := s.apply(ctx, f, &want, byFamily[f]); err != nil {
			return n, err
		}
	}
	s.have, s.known = want, true
	s.collect(ctx, &want)
	return n, s.forgetFlows(ops, &want)
}

// differing returns the settings in which a and b differ, without those that are the same.
func differing(a, b render.Table) (render.Table, render.Table) {
	a.Services, b.Services = nil, nil
	for _, p := range [][2]*[]netip.Prefix{{&a.Range, &b.Range}, {&a.Announced, &b.Announced}, {&a.Cluster, &b.Cluster}, {&a.Pods, &b.Pods}} {
		if slices.Equal(*p[0], *p[1]) {
			*p[0], *p[1] = nil, nil
		}
	}
	return a, b
}

// changeOf turns an operation into elements, those of hairpin included.
func (s *Services) changeOf(op diff.Op) change {
	var have, want []element
	if op.Have != nil {
		have = elementsOf(nil, op.Have)
	}
	if op.Want != nil {
		want = elementsOf(nil, op.Want)
	}
	c := s.recount(func(count func(netip.Addr, int)) {
		countPods(op.Want, s.have.Pods, 1, count)
		countPods(op.Have, s.have.Pods, -1, count)
	})
	dels, adds := changes(have, want)
	return change{append(dels, c.dels...), append(adds, c.adds...)}
}

// full reads the kernel's tables and goes from there to want.
func (s *Services) full(ctx context.Context, want render.Table) (int, error) {
	s.known = false
	s.chains = map[*family]map[string]bool{}
	s.reach = map[netip.Addr]int{}
	count := func(a netip.Addr, by int) { s.reach[a] += by }
	for i := range want.Services {
		countPods(&want.Services[i], want.Pods, 1, count)
	}
	for _, a := range want.Near {
		count(a, 1)
	}
	n := 0
	var ops []diff.Op
	for _, f := range families {
		var cs []change
		var fops []diff.Op
		var count int
		a, err := s.readFamily(ctx, f, func(a *actual) bool {
			if a.sound {
				cs, fops, count = s.compare(f, a, &want)
			}
			return len(cs) == 0
		})
		if err != nil {
			return n, err
		}
		if !uses(f, &want) {
			ops = append(ops, fops...)
			if a.exists {
				n++
				if err := s.dropTable(f); err != nil {
					return n, err
				}
			}
			continue
		}
		if !a.sound {
			n++
			if err := s.build(f); err != nil {
				return n, err
			}
			s.log.Info("service table made", "family", f.name, "table", s.name)
			a.chains = usual()
			cs, fops, count = s.compare(f, a, &want)
		}
		s.chains[f] = a.chains
		ops = append(ops, fops...)
		n += count
		if err := s.apply(ctx, f, &want, cs); err != nil {
			return n, err
		}
	}
	s.have, s.known = want, true
	s.collect(ctx, &want)
	return n, s.forgetFlows(ops, &want)
}

// compare finds the changes of every service of f and of the rest, the operations
// that forgetFlows wants to know, and how many operations Sync counts.
func (s *Services) compare(f *family, a *actual, want *render.Table) (cs []change, ops []diff.Op, count int) {
	note := func(p render.Port, svc *render.Service, es []element) {
		have := a.byPort[p]
		c := change{}
		if c.dels, c.adds = changes(have, es); len(c.dels)+len(c.adds) == 0 {
			return
		}
		cs = append(cs, c)
		op := diff.Op{Want: svc}
		if old, ok := f.service(p, have); ok {
			op.Have = &old
		}
		if op.Have != nil || svc != nil {
			ops = append(ops, op)
		}
	}
	for i := range want.Services {
		if svc := &want.Services[i]; familyOf(svc.Addr) == f {
			note(svc.Port, svc, elementsOf(nil, svc))
		}
	}
	for p := range a.byPort {
		if _, ok := want.Find(p); !ok {
			note(p, nil, nil)
		}
	}
	count = len(cs)
	before, after := s.shared(f, a, want)
	if len(before)+len(after) > 0 && (count == 0 || slices.ContainsFunc(before, isSetting) || slices.ContainsFunc(after, isSetting)) {
		count++
	}
	return slices.Concat(before, cs, after), ops, count
}

// shared finds the changes of settings and of the hairpin pairs that services
// share: what comes before the services change, and what may only go after.
func (s *Services) shared(f *family, a *actual, want *render.Table) (before, after []change) {
	isHairpin := func(e element) bool { return e.set == hairpin }
	settings := slices.DeleteFunc(slices.Clone(a.rest), isHairpin)
	if dels, adds := settingChanges(settings, f.settingsOf(nil, want)); len(dels)+len(adds) > 0 {
		before = append(before, change{dels, adds})
	}
	var have, reached []element
	for _, e := range a.rest {
		if isHairpin(e) {
			have = append(have, e)
		}
	}
	for addr := range s.reach {
		if familyOf(addr) == f {
			reached = append(reached, hairpinOf(addr))
		}
	}
	dels, adds := changes(have, reached)
	for part := range slices.Chunk(adds, maxTransaction) {
		before = append(before, change{adds: part})
	}
	for part := range slices.Chunk(dels, maxTransaction) {
		after = append(after, change{dels: part})
	}
	return before, after
}

// isSetting tells a change of settings from one of hairpin pairs.
func isSetting(c change) bool {
	return slices.ContainsFunc(slices.Concat(c.dels, c.adds), func(e element) bool { return e.set != hairpin })
}

// apply makes the balancers that want needs and commits the changes, in as few
// transactions as maxTransaction allows.
func (s *Services) apply(ctx context.Context, f *family, want *render.Table, cs []change) error {
	if err := s.addBalancers(ctx, f, cs); err != nil {
		return err
	}
	var dels, adds []element
	for i, c := range cs {
		dels, adds = append(dels, c.dels...), append(adds, c.adds...)
		if i+1 < len(cs) && len(dels)+len(adds)+len(cs[i+1].dels)+len(cs[i+1].adds) <= maxTransaction {
			continue
		}
		start := time.Now()
		if err := s.wire.commit(ctx, f, s.name, dels, adds); err != nil {
			return fmt.Errorf("table %s %s: delete %d, add %d: %w", f.name, s.name, len(dels), len(adds), err)
		}
		s.log.Debug("service transaction", "family", f.name, "deleted", len(dels), "added", len(adds), "took", time.Since(start))
		dels, adds = dels[:0], adds[:0]
	}
	return nil
}

// undisturbed reports whether a is what s.have left there.
func (s *Services) undisturbed(f *family, a *actual) bool {
	if !uses(f, &s.have) {
		return !a.exists
	}
	if !a.sound {
		return false
	}
	for name, ok := range a.chains {
		if !ok || !s.chains[f][name] {
			return false
		}
	}
	if len(a.chains) != len(s.chains[f]) {
		return false
	}
	cs, _, _ := s.compare(f, a, &s.have)
	return len(cs) == 0
}
