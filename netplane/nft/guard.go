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
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/render"
)

// Bits of packet marks by which a Guard remembers something of a connection's first
// packet, between a service and its endpoint. OwnBit is the one that kube-proxy uses for
// masquerading, so that other software leaves it alone.
const (
	// OwnBit: this node sent it.
	OwnBit = 0x4000
	// FarBit: it comes from outside the cluster.
	FarBit = 0x2000
	// DeliverBit: this node has to look at it although the address is none of its own;
	// a rule of routing does that.
	DeliverBit = 0x1000
)

// MarkSet is one of the sets of a Guard that follow services.
type MarkSet uint8

// The sets of marks.
const (
	// Closed are services without endpoints, of which senders are told.
	Closed MarkSet = iota
	// Dropped are such of which they are not.
	Dropped
	// Draining are services that ended or lost all endpoints: new connections are
	// refused, those that are established go on.
	Draining
	// Outside are services whose address is in no range, but for those that are closed.
	Outside
	// Undelivered are services that drop what comes from outside.
	Undelivered
	// Guarded are services for some sources only.
	Guarded
	// Allowed are those: Source is one.
	Allowed
	// Split are services for which packets from outside get Value as mark.
	Split
	// Hairpin are addresses of endpoints, which may reach themselves through a service.
	Hairpin
)

// Mark is one entry of a set: a port, or for Hairpin an address, with what belongs to
// it. It is comparable.
type Mark struct {
	Set    MarkSet
	Port   render.Port
	Addr   netip.Addr
	Source netip.Prefix
	Value  uint32
}

func (m *Mark) family() *family {
	if m.Set == Hairpin {
		return familyOf(m.Addr)
	}
	return familyOf(m.Port.Addr)
}

var markSets = [...]setID{Closed: closed, Dropped: dropped, Draining: draining, Outside: outside, Undelivered: undelivered,
	Guarded: guarded, Allowed: allowed, Split: marks, Hairpin: hairpin}

func (m *Mark) element() element {
	if m.Set == Hairpin {
		return hairpinOf(m.Addr)
	}
	e := element{set: markSets[m.Set], key: string(appendPort(nil, m.Port))}
	switch m.Set {
	case Allowed:
		e.key, e.val = e.key+string(appendAddr(nil, m.Source.Addr())), e.key+string(appendAddr(nil, lastOf(m.Source)))
	case Split:
		e.val = word(m.Value, "")
	}
	return e
}

// markOf undoes element.
func (f *family) markOf(e *element) (Mark, bool) {
	i := slices.Index(markSets[:], e.set)
	if i < 0 {
		return Mark{}, false
	}
	m := Mark{Set: MarkSet(i)}
	switch m.Set {
	case Hairpin:
		m.Addr = f.addr(e.key)
		return m, true
	case Allowed:
		at := len(e.key) - f.bytes
		var ok bool
		if m.Source, ok = prefixBetween(f.addr(e.key[at:]), f.addr(e.val[at:]).Next()); !ok {
			return Mark{}, false
		}
	case Split:
		if len(e.val) != 4 {
			return Mark{}, false
		}
		m.Value = binary.NativeEndian.Uint32([]byte(e.val))
	}
	m.Port = f.port(e.key)
	return m, true
}

// GuardState is what the kernel holds of a Guard.
type GuardState struct {
	// Settings is a table without services.
	Settings render.Table
	Marks    map[Mark]bool
	// Before is what Note noted.
	Before map[uint32]uint32
	// Salvaged are marks of tables that are not as they should be.
	Salvaged map[Mark]bool
}

// Guard is what another balancer (IPVS) needs of nftables, in tables of its own: it
// refuses what is sent to service addresses and is no service, and masquerades. Its
// rules do not grow with services, and neither do its sets, but for the addresses of
// endpoints, services without any, and such as are not in a range.
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
// what was noted and what can be salvaged.
func (g *Guard) Read(ctx context.Context) (GuardState, error) {
	st := GuardState{Marks: map[Mark]bool{}, Before: map[uint32]uint32{}, Salvaged: map[Mark]bool{}}
	g.sound, g.made = map[*family]bool{}, map[*family]bool{}
	for _, f := range families {
		a, err := g.s.readFamily(ctx, f, func(*actual) bool { return false })
		if err != nil {
			return st, err
		}
		g.sound[f], g.made[f] = a.sound, a.exists
		if !a.sound {
			if a.exists {
				g.salvage(f, &st)
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
	if m, ok := f.markOf(e); ok {
		st.Marks[m] = true
	}
	if e.set == before && len(e.key) == 4 && len(e.val) == 4 {
		st.Before[binary.BigEndian.Uint32([]byte(e.key))] = binary.BigEndian.Uint32([]byte(e.val))
	}
}

// salvage reads what can be of a table that is otherwise damaged: what was noted, and
// which services have been this balancer's.
func (g *Guard) salvage(f *family, into *GuardState) {
	st := GuardState{Marks: into.Salvaged, Before: into.Before}
	for _, id := range []setID{before, closed, draining, outside} {
		size := f.set(g.s.table(f), id).KeyType.Bytes
		err := g.s.wire.contents(f, g.s.name, id, func(e element) {
			if len(e.key) == int(size) {
				st.add(f, &e)
			}
		})
		if err != nil {
			g.s.log.Warn("part of a damaged table cannot be read", "table", g.s.name, "family", f.name, "set", setNames[id], "err", err)
		}
	}
}

// Undisturbed reports whether the tables that t needs were as they should be at the
// last Read.
func (g *Guard) Undisturbed(t *render.Table) bool {
	return !slices.ContainsFunc(families[:], func(f *family) bool { return g.needs(f, t) && !g.sound[f] || g.made[f] && !g.sound[f] })
}

// Made reports whether there was any table at the last Read.
func (g *Guard) Made() bool { return g.made[ip4] || g.made[ip6] }

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

// Mark removes, then adds entries, those of one family at once if they are not many.
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

// Forget deletes the kernel's memory of UDP flows to endpoints that services of t lost.
// What it could not do is done by the next call.
func (g *Guard) Forget(ops []diff.Op, t *render.Table) error { return g.s.forgetFlows(ops, t) }

// Purge removes the tables.
func (g *Guard) Purge(ctx context.Context) error { return g.s.Purge(ctx) }

// guardChains returns the chains of a Guard, those that others go to first.
func (f *family) guardChains() []chain {
	const (
		// IPVS is at -98 of the hook output and at 98 and 99 of the hook input
		// (net/netfilter/ipvs/ip_vs_core.c). What nftables translated (-100) is not for
		// IPVS, nor for the rule of routing: both backends are there while one gives way.
		beforeIPVS, afterIPVS, afterDNAT, afterMasquerade = -99, 110, -90, 101
		// It is at 100 of the hook forward, and policies judge from 105 of input on.
		behindIPVS = 101
	)
	filter := func(name string, hook *nftables.ChainHook, prio nftables.ChainPriority, rules [][]expr.Any) chain {
		return chain{name: name, typ: nftables.ChainTypeFilter, hook: hook, prio: &prio, rules: rules}
	}
	return []chain{
		{name: "refuse", rules: f.refuse()},
		filter("direct", nftables.ChainHookPrerouting, *nftables.ChainPriorityMangle, slices.Concat(f.direct(), f.hide(false))),
		filter("direct_output", nftables.ChainHookOutput, *nftables.ChainPriorityMangle, f.direct()),
		filter("show_input", nftables.ChainHookInput, behindIPVS, f.hide(true)),
		filter("show_forward", nftables.ChainHookForward, behindIPVS, f.hide(true)),
		filter("deliver", nftables.ChainHookPrerouting, afterDNAT, f.deliver()),
		filter("new_input", nftables.ChainHookInput, 0, f.admit(false)),
		filter("new_output", nftables.ChainHookOutput, beforeIPVS, f.admit(true)),
		// The kernel puts what comes later before what has the same priority.
		{name: "deliver_output", typ: nftables.ChainTypeRoute, hook: nftables.ChainHookOutput, prio: nftables.ChainPriorityRef(beforeIPVS), rules: f.deliver()},
		filter("unlisted_input", nftables.ChainHookInput, afterIPVS, f.filter(false)),
		filter("unlisted_forward", nftables.ChainHookForward, 0, f.filter(true)),
		filter("unlisted_output", nftables.ChainHookOutput, 0, f.filter(false)),
		{name: "postrouting", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: nftables.ChainPriorityNATSource, rules: f.guardMasquerade()},
		filter("unmark", nftables.ChainHookPostrouting, afterMasquerade, unmark()),
	}
}

// deliver makes this node look at what is sent to services at addresses that are none of
// its own. What is refused goes on, to be refused on its way: the kernel sends no ICMP
// errors from addresses that are not local.
func (f *family) deliver() [][]expr.Any {
	known := []expr.Any{ct(expr.CtKeySTATE), bits(reg0, expr.CtStateBitNEW), equal(make([]byte, 4))}
	return [][]expr.Any{
		join(f.loadPort(reg0), []expr.Any{member(reg0, outside)}, markWith(DeliverBit)),
		join(known, f.loadPort(reg0), []expr.Any{member(reg0, draining)}, markWith(DeliverBit)),
	}
}

// admit looks at packets that begin a connection, while they still have the service's
// address. own: this node sent them.
func (f *family) admit(own bool) [][]expr.Any {
	refuse := &expr.Verdict{Kind: expr.VerdictGoto, Chain: "refuse"}
	client := f.load(reg0+f.words+2, f.saddr) // behind the service
	rules := [][]expr.Any{
		{ct(expr.CtKeySTATE), bits(reg0, expr.CtStateBitNEW), equal(make([]byte, 4)), accept()},
		append(f.loadPort(reg0), member(reg0, local), accept()),
		append(f.loadPort(reg0), member(reg0, dropped), drop()),
		append(f.loadPort(reg0), member(reg0, draining), refuse),
		append(f.loadPort(reg0), member(reg0, closed), refuse),
		join(f.loadPort(reg0), []expr.Any{member(reg0, guarded)}, f.loadPort(reg0), []expr.Any{client, notMember(reg0, allowed), drop()}),
	}
	// Once delivered, the bit must not steer the packet's way to the endpoint.
	rules = slices.Insert(rules, 0, changeMark(^uint32(DeliverBit), 0), needless())
	bit := uint32(OwnBit)
	foreign := []expr.Any{f.load(reg0, f.saddr), notMember(reg0, cluster)}
	if !own {
		bit = FarBit
		rules = append(rules,
			join(foreign, f.loadPort(reg0), []expr.Any{member(reg0, undelivered), drop()}),
			join(foreign, f.loadPort(reg0), []expr.Any{mapped(reg0, marks, reg0), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg0}, accept()}))
	}
	return append(rules,
		join(foreign, []expr.Any{f.load(reg0, f.daddr), member(reg0, ranges)}, markWith(bit)),
		join(foreign, f.loadPort(reg0), []expr.Any{member(reg0, outside)}, markWith(bit)))
}

// needless drops the first packet of a TCP connection when it comes once more, on the way past
// the answer. If IPVS takes its endpoint away just then (weight 0), it would forget the connection
// for that packet, and the client would be reset. Should the answer be lost, who sent it sends
// it again; with SYN cookies nobody does, and the client gets through when it asks for
// the third time, after seven seconds.
func needless() []expr.Any {
	const (
		seenReply, assured = 1 << 1, 1 << 2 // IPS_SEEN_REPLY, IPS_ASSURED of nf_conntrack_common.h
		fin, syn, rst, ack = 1, 2, 4, 16
		flags              = 13 // where they are in the header (RFC 9293, 3.1)
		// What is left of the minute that the kernel waits for who was answered to go on.
		answering = 55 * time.Second
	)
	return []expr.Any{
		l4proto(reg0), equal([]byte{byte(render.TCP)}),
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Offset: flags, Len: 1},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}}, equal([]byte{syn}),
		ct(expr.CtKeySTATUS), bits(reg0, seenReply|assured), equal(binaryutil.NativeEndian.PutUint32(seenReply)),
		ct(expr.CtKeyEXPIRATION), &expr.Byteorder{SourceRegister: reg0, DestRegister: reg0, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpGt, Register: reg0, Data: binary.BigEndian.AppendUint32(nil, uint32(answering.Milliseconds()))},
		drop(),
	}
}

// markWith sets a bit of the packet's mark.
func markWith(bit uint32) []expr.Any { return changeMark(^bit, bit) }

// changeMark makes the packet's mark (itself & mask) ^ xor.
func changeMark(mask, xor uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: binaryutil.NativeEndian.PutUint32(xor)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg0},
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
		join(marked(OwnBit), []expr.Any{masq}),
		join(marked(FarBit), []expr.Any{dst, notMember(reg0, near), masq}),
		{src, member(reg0, pods), dst, notMember(reg0, cluster), dst, notMember(reg0, ranges), masq},
	}
}

// unmark ends the marks of admit: a packet that is wrapped now, for another node, would hand
// them on to what it is wrapped in, which would be masqueraded, too. Masquerading itself sees the
// first packet of a connection only, and marks have others, too: those that are sent again.
func unmark() [][]expr.Any {
	return [][]expr.Any{join(marked(OwnBit|FarBit), changeMark(^uint32(OwnBit|FarBit), 0))}
}

// marked finds packets whose mark has one of some bits.
func marked(mask uint32) []expr.Any {
	return has(&expr.Meta{Key: expr.MetaKeyMARK, Register: reg0}, mask)
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
