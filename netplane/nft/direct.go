package nft

import (
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"decree.dev/decree/netplane/render"
)

// Bits of the marks of connections in conntrack.
const (
	// DirectBit: it is to a pod itself.
	DirectBit = 0x0800
	// IndirectBit: it is not.
	IndirectBit = 0x0400
	// BalancedBit: Services led it to an endpoint.
	BalancedBit = 0x0200
)

// remember sets a bit of the connection's mark, by way of a register.
func remember(reg, bit uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(^bit), Xor: binaryutil.NativeEndian.PutUint32(bit)},
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: reg},
	}
}

// hiding is how the checksum of a protocol follows its source port: where it is, in bytes from
// the beginning of the header.
var hiding = []struct {
	proto  render.Proto
	kind   expr.PayloadCsumType
	offset uint32
}{
	{render.TCP, expr.CsumTypeInet, 16},
	{render.UDP, expr.CsumTypeInet, 6},
	{render.SCTP, csumTypeSCTP, 8},
}

// csumTypeSCTP is NFT_PAYLOAD_CSUM_SCTP of nf_tables.h.
const csumTypeSCTP = 2

// direct remembers in conntrack whether a connection is to a pod itself, by its first packet
// and before IPVS sees that: what IPVS sends on comes by once more.
func (f *family) direct() [][]expr.Any {
	first := []expr.Any{
		ct(expr.CtKeyMARK), bits(reg0, DirectBit|IndirectBit), equal(make([]byte, 4)),
	}
	first = join(ctHas(expr.CtKeySTATE, expr.CtStateBitNEW), first)
	return [][]expr.Any{
		join(first, []expr.Any{f.load(reg0, f.daddr), member(reg0, cluster)}, remember(reg0, DirectBit)),
		join(first, remember(reg0, IndirectBit)),
	}
}

// hide hides the source port of what a pod answers in a direct connection, while IPVS looks at
// it; with show it is shown again. Clients may use one port for a service and for an endpoint
// of it at once. IPVS tells answers by their addresses and ports alone, and would take those of
// the one for those of the other.
func (f *family) hide(show bool) (rules [][]expr.Any) {
	const original, reply = 0, 1
	for _, h := range hiding {
		source := expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Len: 2}
		rule := join([]expr.Any{ct(expr.CtKeyDIRECTION), equal([]byte{reply})}, ctHas(expr.CtKeyMARK, DirectBit),
			[]expr.Any{l4proto(reg0), equal([]byte{byte(h.proto)})})
		if h.proto == render.UDP { // zero is no checksum, and must stay so (RFC 768)
			sum := source
			sum.Offset = h.offset
			rule = append(rule, &sum, &expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 2)})
		}
		if show {
			rule = append(rule, &source, equal(make([]byte, 2)), &expr.Ct{Key: expr.CtKeyPROTODST, Direction: original, Register: reg0})
		} else {
			rule = append(rule, &expr.Immediate{Register: reg0, Data: make([]byte, 2)})
		}
		rules = append(rules, append(rule, &expr.Payload{
			OperationType: expr.PayloadWrite, SourceRegister: reg0, Base: expr.PayloadBaseTransportHeader, Len: 2,
			CsumType: h.kind, CsumOffset: h.offset,
		}))
	}
	return rules
}
