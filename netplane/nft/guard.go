package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/render"
)

// MasqueradeBit is the bit of packet marks by which a Guard remembers, between a
// service and its endpoint, that a connection needs the node's address. It is the
// one that kube-proxy uses for this, so that other software leaves it alone.
const MasqueradeBit = 0x4000

// MarkSet is one of the sets of a Guard that follow services.
type MarkSet uint8

// The sets of marks.
const (
	// Closed are services without endpoints: refused.
	Closed MarkSet = iota
	// Draining are services that ended: new connections are refused, those that are
	// established go on.
	Draining
	// Outside are services whose address is in no range.
	Outside
	// Hairpin are addresses of pods that may reach themselves through a service.
	Hairpin
)

// Mark is one entry of a set: a port, or for Hairpin an address. It is comparable.
type Mark struct {
	Set  MarkSet
	Port render.Port
	Addr netip.Addr
}

func (m *Mark) family() *family {
	if m.Set == Hairpin {
		return familyOf(m.Addr)
	}
	return familyOf(m.Port.Addr)
}

func (m *Mark) element() element {
	if m.Set == Hairpin {
		return hairpinOf(m.Addr)
	}
	return element{set: [...]setID{Closed: closed, Draining: draining, Outside: outside}[m.Set], key: string(appendPort(nil, m.Port))}
}

// GuardState is what the kernel holds of a Guard.
type GuardState struct {
	// Settings is a table without services.
	Settings render.Table
	Marks    map[Mark]bool
	// Before is what Note noted.
	Before map[uint32]uint32
}

// Guard is what another balancer (IPVS) needs of nftables, in tables of its own: it
// refuses what is sent to service addresses and is no service, and masquerades. Its
// rules do not grow with services, and neither do its sets, but for services without
// endpoints and such as are not in a range.
//
// The balancer works at the hooks input and output after the chains "new" and before
// the chains "unlisted". A Guard is not safe for concurrent use.
type Guard struct {
	s *Services
	// sound are the families whose table is as it should be, as of the last Read.
	sound map[*family]bool
	made  map[*family]bool
}

// NewGuard opens the sockets, in the network namespace of the calling thread, and
// changes nothing yet. table names its tables.
func NewGuard(table string, log *slog.Logger) (*Guard, error) {
	s, err := New(table, log)
	if err != nil {
		return nil, err
	}
	s.layout = guarding
	return &Guard{s: s}, nil
}

// Close closes the sockets; what the kernel holds stays.
func (g *Guard) Close() error { return g.s.Close() }

// Read returns what the kernel holds: of tables that are not as they should be only
// what was noted.
func (g *Guard) Read(ctx context.Context) (GuardState, error) {
	st := GuardState{Marks: map[Mark]bool{}, Before: map[uint32]uint32{}}
	g.sound, g.made = map[*family]bool{}, map[*family]bool{}
	for _, f := range families {
		if err := context.Cause(ctx); err != nil {
			return st, err
		}
		a, err := g.s.readFamily(f)
		if err != nil {
			return st, err
		}
		g.sound[f], g.made[f] = a.sound, a.exists
		if !a.sound {
			if a.exists {
				g.salvage(f, st.Before)
			}
			continue
		}
		f.settings(&st.Settings, a.rest)
		for _, e := range slices.Concat(a.rest, slices.Concat(slices.Collect(maps.Values(a.byPort))...)) {
			st.add(f, &e)
		}
	}
	return st, nil
}

func (st *GuardState) add(f *family, e *element) {
	switch e.set {
	case closed:
		st.Marks[Mark{Set: Closed, Port: f.port(e.key)}] = true
	case draining:
		st.Marks[Mark{Set: Draining, Port: f.port(e.key)}] = true
	case outside:
		st.Marks[Mark{Set: Outside, Port: f.port(e.key)}] = true
	case hairpin:
		st.Marks[Mark{Set: Hairpin, Addr: f.addr(e.key)}] = true
	case before:
		if len(e.key) == 4 && len(e.val) == 4 {
			st.Before[binary.BigEndian.Uint32([]byte(e.key))] = binary.BigEndian.Uint32([]byte(e.val))
		}
	}
}

// salvage reads what was noted from a table that is otherwise damaged.
func (g *Guard) salvage(f *family, notes map[uint32]uint32) {
	st := GuardState{Before: notes}
	err := g.s.wire.contents(f, g.s.name, before, func(e element) { st.add(f, &e) })
	if err != nil {
		g.s.log.Warn("kernel settings of before are not known any more", "table", g.s.name, "family", f.name, "err", err)
	}
}

// Undisturbed reports whether the tables that t needs were as they should be at the
// last Read.
func (g *Guard) Undisturbed(t *render.Table) bool {
	return !slices.ContainsFunc(families[:], func(f *family) bool { return g.needs(f, t) && !g.sound[f] || g.made[f] && !g.sound[f] })
}

// needs reports whether t needs a table of the family. That of IPv4 holds the notes.
func (g *Guard) needs(f *family, t *render.Table) bool { return f == ip4 || uses(f, t) }

// Make makes the tables that t needs, empty, where the last Read found none that is as
// it should be. It returns how many.
func (g *Guard) Make(t *render.Table) (int, error) {
	n := 0
	for _, f := range families {
		if !g.needs(f, t) && !g.made[f] || g.sound[f] {
			continue
		}
		if err := g.s.build(f); err != nil {
			return n, err
		}
		n++
		g.sound[f], g.made[f] = true, true
		g.s.log.Info("service guard made", "family", f.name, "table", g.s.name)
	}
	return n, nil
}

// Note remembers values in the kernel, by numbers that mean something to the caller.
// Numbers that are remembered already are left as they are.
func (g *Guard) Note(ctx context.Context, values map[uint32]uint32) error {
	var adds []element
	for k, v := range values {
		adds = append(adds, element{set: before, key: listed(k), val: listed(v)})
	}
	if err := g.s.wire.commit(ctx, ip4, g.s.name, nil, adds); err != nil {
		return fmt.Errorf("note kernel settings in table %s: %w", g.s.name, err)
	}
	return nil
}

// Settings goes from the settings of one table to those of another.
func (g *Guard) Settings(ctx context.Context, from, to *render.Table) error {
	for _, f := range families {
		if !g.sound[f] {
			continue
		}
		dels, adds := settingChanges(f.settingsOf(nil, from), f.settingsOf(nil, to))
		if err := g.commit(ctx, f, dels, adds); err != nil {
			return err
		}
	}
	return nil
}

// Mark removes and adds entries, those of one family at once if they are not many.
func (g *Guard) Mark(ctx context.Context, dels, adds []Mark) error {
	for _, f := range families {
		var d, a []element
		for i := range dels {
			if dels[i].family() == f {
				d = append(d, dels[i].element())
			}
		}
		for i := range adds {
			if adds[i].family() == f {
				a = append(a, adds[i].element())
			}
		}
		if err := g.commit(ctx, f, d, a); err != nil {
			return err
		}
	}
	return nil
}

// listed is a number as listings show it best.
func listed(n uint32) string { return string(binary.BigEndian.AppendUint32(nil, n)) }

func (g *Guard) commit(ctx context.Context, f *family, dels, adds []element) error {
	for len(dels)+len(adds) > 0 {
		d := dels[:min(len(dels), maxTransaction)]
		a := adds[:min(len(adds), maxTransaction-len(d))]
		if err := g.s.wire.commit(ctx, f, g.s.name, d, a); err != nil {
			return fmt.Errorf("table %s %s: delete %d, add %d: %w", f.name, g.s.name, len(d), len(a), err)
		}
		dels, adds = dels[len(d):], adds[len(a):]
	}
	return nil
}

// Forget deletes the kernel's memory of UDP flows to endpoints that services lost.
// What it could not do is done by the next call.
func (g *Guard) Forget(ops []diff.Op) error { return g.s.forgetFlows(ops) }

// Purge removes the tables.
func (g *Guard) Purge(ctx context.Context) error { return g.s.Purge(ctx) }

// guardChains returns the chains of a Guard, those that others go to first.
func (f *family) guardChains() []chain {
	const (
		// IPVS is at -98 of the hook output and at 98 and 99 of the hook input
		// (net/netfilter/ipvs/ip_vs_core.c).
		beforeIPVS, afterIPVS = -100, 110
	)
	filter := func(name string, hook *nftables.ChainHook, prio nftables.ChainPriority, rules [][]expr.Any) chain {
		return chain{name: name, typ: nftables.ChainTypeFilter, hook: hook, prio: &prio, rules: rules}
	}
	return []chain{
		{name: "refuse", rules: f.refuse()},
		filter("new_input", nftables.ChainHookInput, 0, f.admit()),
		filter("new_output", nftables.ChainHookOutput, beforeIPVS, f.admit()),
		filter("unlisted_input", nftables.ChainHookInput, afterIPVS, f.filter()),
		filter("unlisted_forward", nftables.ChainHookForward, 0, f.filter()),
		filter("unlisted_output", nftables.ChainHookOutput, 0, f.filter()),
		{name: "postrouting", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: nftables.ChainPriorityNATSource, rules: f.guardMasquerade()},
	}
}

// admit looks at packets that begin a connection, while they still have the
// service's address.
func (f *family) admit() [][]expr.Any {
	refuse := &expr.Verdict{Kind: expr.VerdictGoto, Chain: "refuse"}
	established := []expr.Any{
		ct(expr.CtKeySTATE), masked(expr.CtStateBitNEW, 0), equal(make([]byte, 4)), accept(),
	}
	foreign := []expr.Any{f.load(reg0, f.saddr), notMember(reg0, cluster)}
	mark := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0}, masked(^uint32(MasqueradeBit), MasqueradeBit),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg0},
	}
	return [][]expr.Any{
		established,
		append(f.loadPort(reg0), member(reg0, draining), refuse),
		append(f.loadPort(reg0), member(reg0, closed), refuse),
		join(foreign, []expr.Any{f.load(reg0, f.daddr), member(reg0, ranges)}, mark),
		join(foreign, f.loadPort(reg0), []expr.Any{member(reg0, outside)}, mark),
	}
}

// guardMasquerade is masquerade for connections whose address another balancer
// changed: nothing in conntrack tells them from others, so that admit marks them. A
// pod's packets to itself are here only if they were sent to a service.
func (f *family) guardMasquerade() [][]expr.Any {
	src, dst := f.load(reg0, f.saddr), f.load(reg0, f.daddr)
	masq := &expr.Masq{FullyRandom: true}
	return [][]expr.Any{
		{src, f.load(reg0+f.words, f.daddr), member(reg0, hairpin), masq},
		{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0}, masked(MasqueradeBit, 0),
			&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)}, masq,
		},
		{src, member(reg0, pods), dst, notMember(reg0, cluster), dst, notMember(reg0, ranges), masq},
	}
}

// masked makes register 0 (itself & mask) ^ xor.
func masked(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: binaryutil.NativeEndian.PutUint32(xor)}
}

// ProbeGuard finds out whether the kernel has all that a Guard needs, as Probe does.
func ProbeGuard() error {
	g, err := NewGuard(probeName(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	err = g.s.build(ip4)
	if err == nil {
		err = g.s.dropTable(ip4)
	}
	return errors.Join(err, g.Close())
}
