package enforce

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/policy"
	"decree.dev/decree/netplane/render"
	"decree.dev/decree/netplane/ruleset"
)

// Names of what every table has.
const (
	egressMap, ingressMap = "egress", "ingress"
	selfSet               = "self"
	denyOut, denyIn       = "deny_egress", "deny_ingress"
)

const (
	// reg0 is the first of the sixteen 32-bit registers (NFT_REG32_00).
	reg0 = unix.NFT_REG32_00
	// leaving is behind every translation of destinations, and just before that of sources
	// (100, NF_IP_PRI_NAT_SRC). All that is forwarded or sent passes there, also what IPVS
	// sends on, which never passes the hook forward.
	leaving = 90
	// entering is behind IPVS (98 and 99 of the hook input): what is left is for the node.
	entering = 105
	// fromPeer is the conntrack direction of replies (IP_CT_DIR_REPLY).
	fromPeer = 1
)

// builder makes the table of one family from a plan.
type builder struct {
	f *ruleset.Family
	t *ruleset.Table
}

// table is what the kernel shall hold of a plan in one family; nil if that is nothing.
func table(f *ruleset.Family, p *policy.Plan) *ruleset.Table {
	b := &builder{f: f, t: &ruleset.Table{Sets: map[string]*ruleset.Set{}, Chains: map[string]*ruleset.Chain{}}}
	egress, ingress, self := &ruleset.Set{Kind: ruleset.Verdicts}, &ruleset.Set{Kind: ruleset.Verdicts}, &ruleset.Set{Kind: ruleset.Pairs}
	out, in := map[*policy.Group]string{}, map[*policy.Group]string{}
	for i := range p.Subjects {
		s := &p.Subjects[i]
		if ruleset.Of(s.Addr) != f {
			continue
		}
		key := string(s.Addr.AsSlice())
		self.Elems = append(self.Elems, ruleset.Elem{Key: key + key})
		if s.Egress != nil {
			egress.Elems = append(egress.Elems, ruleset.Elem{Key: key, Val: b.group(out, s.Egress, true)})
		}
		if s.Ingress != nil {
			ingress.Elems = append(ingress.Elems, ruleset.Elem{Key: key, Val: b.group(in, s.Ingress, false)})
		}
	}
	if len(self.Elems) == 0 {
		return nil
	}
	b.t.Sets[egressMap], b.t.Sets[ingressMap], b.t.Sets[selfSet] = egress, ingress, self
	b.fixed()
	return b.t
}

// fixed adds the chains that every table has.
func (b *builder) fixed() {
	reply := []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg0}, equal(fromPeer), accept()}
	related := join(state(expr.CtStateBitRELATED), []expr.Any{accept()})
	self := []expr.Any{b.source(reg0), b.destination(reg0 + b.f.Words), member(selfSet), accept()}
	own := []expr.Any{&expr.Meta{Key: expr.MetaKeyIIF, Register: reg0}, &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: make([]byte, 4)}, accept()}
	in, out := [][]expr.Any{related, own, self, {drop()}}, [][]expr.Any{related, self, {drop()}}
	if b.f == ruleset.IPv6 {
		in, out = append([][]expr.Any{discovery()}, in...), append([][]expr.Any{discovery()}, out...)
	}
	b.chain(denyIn, nil, in...)
	b.chain(denyOut, nil, out...)

	postrouting := func(prio int32) *ruleset.Hook {
		return &ruleset.Hook{Number: unix.NF_INET_POST_ROUTING, Priority: prio}
	}
	to := func(name string) expr.Any {
		return &expr.Lookup{SourceRegister: reg0, SetName: name, IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT}
	}
	b.chain("leave", postrouting(leaving), reply, b.strayed(b.source), b.strayed(b.destination), []expr.Any{b.source(reg0), to(egressMap)})
	b.chain("arrive", postrouting(leaving+1), reply, []expr.Any{b.destination(reg0), to(ingressMap)})
	b.chain("leave_to_node", &ruleset.Hook{Number: unix.NF_INET_LOCAL_IN, Priority: entering}, reply, []expr.Any{b.source(reg0), to(egressMap)})
}

// discovery accepts what finds Ethernet addresses, types 133 to 137 of ICMPv6 (RFC 4861).
// It never passes a router: what others send on has a lower hop limit.
func discovery() []expr.Any {
	return []expr.Any{
		l4proto(reg0), equal(byte(render.ICMPv6)),
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Len: 1},
		&expr.Range{Op: expr.CmpOpEq, Register: reg0, FromData: []byte{133}, ToData: []byte{137}},
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1}, equal(255), accept(),
	}
}

// strayed drops packets from the middle of a TCP connection that the kernel does not know,
// if policies isolate the pod at one end: one that was cut must not go on as if the other
// end had begun it.
func (b *builder) strayed(end func(uint32) expr.Any) []expr.Any {
	const fin, syn, rst, ack = 1, 2, 4, 16
	return join(state(expr.CtStateBitNEW), []expr.Any{
		l4proto(reg0), equal(byte(render.TCP)),
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: []byte{syn}},
		end(reg0), end(reg0 + b.f.Words), member(selfSet), drop(),
	})
}

func (b *builder) chain(name string, hook *ruleset.Hook, rules ...[]expr.Any) {
	b.t.Chains[name] = &ruleset.Chain{Hook: hook, Rules: rules}
}

// group adds the chain for a group of policies, and returns its name.
func (b *builder) group(known map[*policy.Group]string, g *policy.Group, out bool) string {
	if name, ok := known[g]; ok {
		return name
	}
	deny := denyIn
	if out {
		deny = denyOut
	}
	var rules [][]expr.Any
	var content []string
	for _, p := range g.Policies {
		if chain := b.policy(p, out); chain != "" {
			content = append(content, chain)
			rules = append(rules, []expr.Any{jump(chain)})
		}
	}
	name := deny
	if len(rules) > 0 {
		name = named("pods_"+direction(out), content...)
		b.chain(name, nil, append(rules, []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: deny}})...)
	}
	known[g] = name
	return name
}

func direction(out bool) string {
	if out {
		return "out"
	}
	return "in"
}

// policy adds the chain for the rules of a policy, and returns its name; "" if there are
// none that mean anything in this family.
func (b *builder) policy(p *policy.Policy, out bool) string {
	var rules [][]expr.Any
	var content []string
	peer := b.source
	if out {
		peer = b.destination
	}
	for _, r := range p.Rules {
		then, end := "accept", accept()
		if !r.AnyPort {
			if then = b.ports(r.Ports); then == "" {
				continue
			}
			end = jump(then)
		}
		if r.Anyone {
			rules, content = append(rules, []expr.Any{end}), append(content, "anyone "+then)
		}
		for _, set := range b.peers(r) {
			rules, content = append(rules, []expr.Any{peer(reg0), member(set), end}), append(content, set+" "+then)
		}
	}
	if len(rules) == 0 {
		return ""
	}
	name := named("policy_"+direction(out), content...)
	b.chain(name, nil, rules...)
	return name
}

// peers adds the sets of a rule's peers, and returns their names.
func (b *builder) peers(r *policy.Rule) (sets []string) {
	for _, p := range r.Peers {
		name := named("peers", p.ID)
		sets = append(sets, name)
		if b.t.Sets[name] == nil {
			set := &ruleset.Set{Kind: ruleset.Addrs}
			for _, a := range p.Addrs {
				if ruleset.Of(a) == b.f {
					set.Elems = append(set.Elems, ruleset.Elem{Key: string(a.AsSlice())})
				}
			}
			b.t.Sets[name] = set
		}
	}
	if r.Block == nil {
		return sets
	}
	set := &ruleset.Set{Kind: ruleset.Ranges}
	for _, x := range r.Block.Ranges {
		if ruleset.Of(x.First) == b.f {
			set.Elems = append(set.Elems, ruleset.Elem{Key: string(x.First.AsSlice()), Val: string(x.Last.AsSlice())})
		}
	}
	if len(set.Elems) == 0 {
		return sets
	}
	name := named("block", r.Block.ID)
	b.t.Sets[name] = set
	return append(sets, name)
}

// ports adds the chain that accepts what goes to some ports, and returns its name; "" if
// there are none.
func (b *builder) ports(ps []policy.Ports) string {
	var rules [][]expr.Any
	var content []string
	for _, p := range ps {
		if p.Name != nil {
			name := b.name(p.Name)
			rules = append(rules, []expr.Any{b.destination(reg0), l4proto(reg0 + b.f.Words), port(reg0 + b.f.Words + 1), member(name), accept()})
			content = append(content, name)
			continue
		}
		rule := []expr.Any{l4proto(reg0), equal(byte(p.Proto))}
		switch first, last := twoBytes(p.First), twoBytes(p.Last); {
		case p.First == p.Last:
			rule = append(rule, port(reg0), equal(first...))
		case p.First > 0 || p.Last < 65535:
			rule = append(rule, port(reg0), &expr.Range{Op: expr.CmpOpEq, Register: reg0, FromData: first, ToData: last})
		}
		rules, content = append(rules, append(rule, accept())), append(content, fmt.Sprint(p.Proto, p.First, "-", p.Last))
	}
	if len(rules) == 0 {
		return ""
	}
	name := named("ports", content...)
	b.chain(name, nil, rules...)
	return name
}

// name adds the set of everything that listens at a port of a name.
func (b *builder) name(n *policy.Name) string {
	name := named("port", n.ID)
	if b.t.Sets[name] == nil {
		set := &ruleset.Set{Kind: ruleset.Ports}
		for _, p := range n.Ports {
			if ruleset.Of(p.Addr) == b.f {
				key := append(p.Addr.AsSlice(), byte(p.Proto), 0, 0, 0)
				set.Elems = append(set.Elems, ruleset.Elem{Key: string(append(key, append(twoBytes(p.Port), 0, 0)...))})
			}
		}
		b.t.Sets[name] = set
	}
	return name
}

// named is a name that says what a thing consists of. It is a hash that nobody can make
// collide: users choose what goes in.
func named(kind string, content ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(content, "\n")))
	return kind + "_" + hex.EncodeToString(sum[:12])
}

func (b *builder) source(reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: b.f.Source, Len: b.f.Bytes()}
}

func (b *builder) destination(reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: b.f.Destination, Len: b.f.Bytes()}
}

// port loads the destination's port.
func port(reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

func l4proto(reg uint32) expr.Any { return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg} }

// state matches packets whose connection is in one of some states.
func state(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: reg0},
		&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)},
	}
}

func equal(b ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: b} }

func member(set string) expr.Any { return &expr.Lookup{SourceRegister: reg0, SetName: set} }

func jump(chain string) expr.Any { return &expr.Verdict{Kind: expr.VerdictJump, Chain: chain} }

func accept() expr.Any { return &expr.Verdict{Kind: expr.VerdictAccept} }

func drop() expr.Any { return &expr.Verdict{Kind: expr.VerdictDrop} }

func twoBytes(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }

func join(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}
