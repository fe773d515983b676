package nft

import (
	"encoding/binary"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/render"
)

// reg0 is the first of the sixteen 32-bit registers (NFT_REG32_00).
const reg0 = unix.NFT_REG32_00

const (
	dstNATStatus = 1 << 5 // IPS_DST_NAT of nf_conntrack_common.h
	// dynsetDelete is NFT_DYNSET_OP_DELETE of nf_tables.h.
	dynsetDelete = 2
)

// chain is a chain as it should be.
type chain struct {
	name  string
	hook  *nftables.ChainHook // nil: entered by goto
	prio  *nftables.ChainPriority
	typ   nftables.ChainType
	rules [][]expr.Any
}

// chains returns the fixed chains of a table, those that others go to first.
func (f *family) chains() []chain {
	return []chain{
		{name: "refuse", rules: f.refuse()},
		{name: "prerouting", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, prio: nftables.ChainPriorityNATDest, rules: f.balance(false)},
		{name: "output", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, prio: nftables.ChainPriorityNATDest, rules: f.balance(true)},
		{name: "postrouting", typ: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, prio: nftables.ChainPriorityNATSource, rules: f.masquerade()},
		{name: "filter_input", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, prio: nftables.ChainPriorityFilter, rules: f.filter(false)},
		{name: "filter_forward", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, prio: nftables.ChainPriorityFilter, rules: f.filter(true)},
		{name: "filter_output", typ: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, prio: nftables.ChainPriorityFilter, rules: f.filter(false)},
	}
}

// balance sends packets to services on to the chain for their number of endpoints, unless
// their source is not allowed. What this node sends itself never comes from outside.
func (f *family) balance(own bool) [][]expr.Any {
	// The number of the balancer travels in the packet mark, because the nft command cannot
	// list rules that use the result of a lookup in another one.
	mark := func(from bool) expr.Any {
		return &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: from, Register: reg0}
	}
	to := func(id setID) []expr.Any {
		return append(f.loadPort(reg0), mapped(reg0, id, reg0), mark(true), mark(false), mapped(reg0, balancers, unix.NFT_REG_VERDICT))
	}
	client := f.load(reg0+f.words+2, f.saddr) // behind the service
	rules := [][]expr.Any{
		join(f.loadPort(reg0), []expr.Any{member(reg0, guarded)}, f.loadPort(reg0), []expr.Any{client, notMember(reg0, allowed), drop()}),
	}
	if !own {
		rules = append(rules, join([]expr.Any{f.load(reg0, f.saddr), notMember(reg0, cluster)}, to(split)))
	}
	return append(rules, to(services))
}

// filter refuses what is addressed to a service and was not translated. What is
// established may be another balancer's, which gives way to this one.
func (f *family) filter(forwarded bool) [][]expr.Any {
	refuse := &expr.Verdict{Kind: expr.VerdictGoto, Chain: "refuse"}
	rules := [][]expr.Any{
		append(ctHas(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept()),
		{f.load(reg0, f.daddr), member(reg0, ranges), refuse},
		append(f.loadPort(reg0), member(reg0, closed), refuse),
	}
	if forwarded {
		rules = append(rules, []expr.Any{f.load(reg0, f.daddr), member(reg0, announced), refuse})
	}
	return rules
}

// refuse tells the client at once where the protocol has a way to, except for
// what this node serves itself.
func (f *family) refuse() [][]expr.Any {
	unreachable := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: f.unreachable}
	return [][]expr.Any{
		append(f.loadPort(reg0), member(reg0, local), accept()),
		{l4proto(reg0), equal([]byte{byte(render.TCP)}), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}},
		{l4proto(reg0), equal([]byte{byte(render.UDP)}), unreachable},
		{l4proto(reg0), equal([]byte{byte(render.SCTP)}), unreachable},
		{drop()},
	}
}

// masquerade gives the node's address to connections whose replies would not come
// back otherwise: a pod that reached itself, a client outside the cluster whose endpoint
// is on another node, and pods that leave the cluster. What this node sends to a service
// in the range has the service's address as source, because that is local.
func (f *family) masquerade() [][]expr.Any {
	translated := ctHas(expr.CtKeySTATUS, dstNATStatus)
	src, dst := f.load(reg0, f.saddr), f.load(reg0, f.daddr)
	masq := &expr.Masq{FullyRandom: true}
	// Others translate addresses too: only what went through a balancer.
	foreign := join(ctHas(expr.CtKeyMARK, BalancedBit), []expr.Any{src, notMember(reg0, cluster)})
	own := []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg0}, equal(make([]byte, 4))}
	return [][]expr.Any{
		join(translated, []expr.Any{src, f.load(reg0+f.words, f.daddr), member(reg0, hairpin), masq}),
		join(foreign, []expr.Any{dst, notMember(reg0, near), masq}),
		join(foreign, own, []expr.Any{masq}),
		{src, member(reg0, pods), dst, notMember(reg0, cluster), dst, notMember(reg0, ranges), masq},
	}
}

// balancer is a chain for all services with so many endpoints; the one with none drops.
type balancer struct {
	outside  bool // for clients from outside only
	n        int
	affinity time.Duration
}

// The number of a balancer is that of its endpoints, outsideBit, and, with affinityBit, the
// seconds of affinity from affinityShift on: 36 hours, where the API allows for 24. Of a
// service with affinity not more than affinityMost endpoints are used.
const (
	outsideBit    = 1 << 31
	affinityBit   = 1 << 30
	affinityShift = 13
	affinityMost  = 1<<affinityShift - 1
	affinityLong  = (affinityBit>>affinityShift - 1) * time.Second
)

// balancerOf is the balancer of a service, for clients from outside or for all others.
func balancerOf(s *render.Service, outside bool) balancer {
	b := balancer{outside: outside, n: len(s.Endpoints), affinity: min(s.Affinity, affinityLong)}
	if outside {
		b.n = len(s.Outside)
	}
	if b.affinity > 0 {
		b.n = min(b.n, affinityMost)
	}
	if b.n == 0 {
		return balancer{}
	}
	return b
}

// number is b in a map.
func (b balancer) number() string {
	n := uint32(b.n)
	if b.outside {
		n |= outsideBit
	}
	if b.affinity > 0 {
		n |= affinityBit | uint32(b.affinity/time.Second)<<affinityShift
	}
	return listed(n)
}

// parseNumber undoes number.
func parseNumber(v string) (b balancer, ok bool) {
	if len(v) != 4 {
		return b, false
	}
	n := binary.BigEndian.Uint32([]byte(v))
	b.outside = n&outsideBit != 0
	if n &^= outsideBit; n&affinityBit != 0 {
		n &^= affinityBit
		b.affinity = time.Duration(n>>affinityShift) * time.Second
		n &= affinityMost
	}
	b.n = int(n)
	return b, b.number() == v && (b.n > 0 || b == balancer{})
}

func (b balancer) name() string {
	if b.n == 0 {
		return verdictDrop
	}
	name := "lb_"
	if b.outside {
		name = "out_"
	}
	name += strconv.Itoa(b.n)
	if b.affinity > 0 {
		name += "_" + strconv.FormatInt(int64(b.affinity/time.Second), 10)
	}
	return name
}

// parseBalancer undoes name.
func parseBalancer(name string) (balancer, bool) {
	view, rest, _ := strings.Cut(name, "_")
	b := balancer{outside: view == "out"}
	count, seconds, has := strings.Cut(rest, "_")
	var err error
	if b.n, err = strconv.Atoi(count); err != nil || b.n < 1 {
		return balancer{}, false
	}
	if has {
		s, err := strconv.ParseInt(seconds, 10, 32)
		if err != nil || s < 1 {
			return balancer{}, false
		}
		b.affinity = time.Duration(s) * time.Second
	}
	return b, b.name() == name
}

// balancerChain is the chain that picks one of b.n endpoints.
//
// The random number lies in the register before the service's key, so that one
// lookup finds the endpoint, whatever the number of services. With affinity, the
// endpoint's identity travels in the packet mark of a connection's first packet
// from one lookup to the next, as the balancer's number did; the mark is zero when done, and
// conntrack has BalancedBit.
func (f *family) balancerChain(b balancer) chain {
	key := reg0 + f.words     // service; one address before it for the client
	data := key + f.words + 2 // endpoint
	spare := data + f.words + 1
	index := &expr.Numgen{Register: key - 1, Modulus: uint32(b.n), Type: unix.NFT_NG_RANDOM}
	if b.outside {
		index.Offset = firstOutside
	}
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nf), RegAddrMin: data, RegProtoMin: data + f.words, Specified: true}
	c := chain{name: b.name()}
	pick := join([]expr.Any{index}, f.loadPort(key), []expr.Any{mapped(key-1, endpoints, data)})
	mark := func(reg uint32) expr.Any { return &expr.Meta{Key: expr.MetaKeyMARK, Register: reg} }
	setMark := func(reg uint32) expr.Any {
		return &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg}
	}
	done := join([]expr.Any{&expr.Immediate{Register: spare, Data: make([]byte, 4)}, setMark(spare)}, remember(spare, BalancedBit))
	if b.affinity == 0 {
		c.rules = [][]expr.Any{join(done, pick, []expr.Any{nat})}
		return c
	}
	client := f.load(reg0, f.saddr)
	dynset := func(op uint32, timeout time.Duration) expr.Any {
		return &expr.Dynset{SetName: setNames[affinity], SrcRegKey: reg0, SrcRegData: spare, Operation: op, Timeout: timeout}
	}
	remember, forget := dynset(unix.NFT_DYNSET_OP_UPDATE, b.affinity), dynset(dynsetDelete, 0)
	find := []expr.Any{mark(key - 1), mapped(key-1, live, data)}
	var allowed []expr.Any
	if b.outside { // not what it is remembered by from a time when all went everywhere
		allowed = []expr.Any{mark(spare), bits(spare, firstOutside), &expr.Cmp{Op: expr.CmpOpNeq, Register: spare, Data: make([]byte, 4)}}
	}
	c.rules = [][]expr.Any{
		// A client that is remembered, and whose endpoint is still there.
		join([]expr.Any{client}, f.loadPort(key), []expr.Any{mapped(reg0, affinity, data), setMark(data)},
			allowed, find, []expr.Any{client, mark(spare), remember}, done, []expr.Any{nat}),
		// Any other. An update keeps the endpoint that it finds: one that is gone has
		// to be forgotten first.
		join([]expr.Any{index}, f.loadPort(key), []expr.Any{mapped(key-1, identities, data), setMark(data)},
			find, []expr.Any{client, mark(spare), forget, remember}, done, []expr.Any{nat}),
		// Where there was no room to remember.
		join(done, pick, []expr.Any{nat}),
	}
	return c
}

// mapped looks up what is at register reg in a map, into register to.
func mapped(reg uint32, id setID, to uint32) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: setNames[id], IsDestRegSet: true, DestRegister: to}
}

// loadPort loads the packet's address . protocol . port from register reg on.
func (f *family) loadPort(reg uint32) []expr.Any {
	return []expr.Any{
		f.load(reg, f.daddr),
		l4proto(reg + f.words),
		&expr.Payload{DestRegister: reg + f.words + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (f *family) load(reg, offset uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(f.bytes)}
}

func l4proto(reg uint32) expr.Any { return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg} }

func ct(key expr.CtKey) expr.Any { return &expr.Ct{Key: key, Register: reg0} }

// ctHas finds packets of whose connection any of some bits is set.
func ctHas(key expr.CtKey, mask uint32) []expr.Any { return has(ct(key), mask) }

// has finds packets of which what is loaded into register 0 has any of some bits.
func has(load expr.Any, mask uint32) []expr.Any {
	return []expr.Any{load, bits(reg0, mask), &expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)}}
}

func equal(b []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: b} }

func member(reg uint32, id setID) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: setNames[id]}
}

func notMember(reg uint32, id setID) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: setNames[id], Invert: true}
}

// bits keeps some bits of a register.
func bits(reg, mask uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4)}
}

func accept() expr.Any { return &expr.Verdict{Kind: expr.VerdictAccept} }

func drop() expr.Any { return &expr.Verdict{Kind: expr.VerdictDrop} }

func join(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}
