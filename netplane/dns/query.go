package dns

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

const (
	headerSize = 12
	maxName    = 255 // bytes of a name in a message (RFC 1035, 3.1)
	optSize    = 11  // of an OPT record without options (RFC 6891)

	// Bits of a header's second word.
	bitQR, bitAA, bitTC, bitRD, bitRA, bitAD, bitCD = 1 << 15, 1 << 10, 1 << 9, 1 << 8, 1 << 7, 1 << 5, 1 << 4
	maskOpcode                                      = 0xf << 11
	maskRcode                                       = 0xf
)

// What keeps apart answers that are remembered for the same name and type.
const (
	flagDO byte = 1 << iota // the client wants signatures
	flagCD                  // the client checks them itself
)

// query is what a client asks. It is read without allocating: most answers are ready,
// and need nothing but the bytes of the question.
type query struct {
	id, bits     uint16
	qtype, class uint16
	question     []byte // as the client spelled it, within its message; nil: unreadable
	edns, do     bool
	version      byte
	size         uint16 // of datagrams that the client says it takes
	nameLen      int
	keyBuf       [maxName + 3]byte
}

// key tells questions apart: the name in lower case, the type and flags.
func (q *query) key() []byte { return q.keyBuf[:q.nameLen+3] }

// name is the name in lower case, as in a message.
func (q *query) name() []byte { return q.keyBuf[:q.nameLen] }

// silent is in place of a response code when nothing may be answered: to garbage, which
// could come from anybody under any address, and to answers.
const silent = -1

// read takes the query out of msg and returns RcodeSuccess, what it must be refused
// with, or silent.
func (q *query) read(msg []byte) int {
	*q = query{}
	if len(msg) < headerSize {
		return silent
	}
	q.id, q.bits = binary.BigEndian.Uint16(msg), binary.BigEndian.Uint16(msg[2:])
	if q.bits&bitQR != 0 {
		return silent
	}
	if q.bits&maskOpcode != 0 {
		return dns.RcodeNotImplemented
	}
	count := func(at int) int { return int(binary.BigEndian.Uint16(msg[at:])) }
	qd, an, ns, ar := count(4), count(6), count(8), count(10)
	// IXFR has a SOA in the authority section; OPT and a signature are all that queries add.
	if qd != 1 || an != 0 || ns > 1 || ar > 2 {
		return dns.RcodeFormatError
	}
	at := q.readQuestion(msg)
	if at < 0 || !q.readRecords(msg, at, ns, ar) {
		q.question = nil
		return dns.RcodeFormatError
	}
	if q.version != 0 {
		return dns.RcodeBadVers
	}
	return dns.RcodeSuccess
}

// readQuestion returns where the question ends, or -1.
func (q *query) readQuestion(msg []byte) int {
	at := headerSize
	for {
		if at >= len(msg) {
			return -1
		}
		n := int(msg[at])
		// A pointer here could lead nowhere but into the header, or round.
		if n > 63 || at+n+1 > len(msg) || q.nameLen+n+1 > maxName {
			return -1
		}
		q.keyBuf[q.nameLen] = byte(n)
		for i, c := range msg[at+1 : at+1+n] {
			q.keyBuf[q.nameLen+1+i] = lower(c)
		}
		q.nameLen += n + 1
		at += n + 1
		if n == 0 {
			break
		}
	}
	if at+4 > len(msg) {
		return -1
	}
	q.qtype, q.class = binary.BigEndian.Uint16(msg[at:]), binary.BigEndian.Uint16(msg[at+2:])
	copy(q.keyBuf[q.nameLen:], msg[at:at+2])
	q.question = msg[headerSize : at+4]
	return at + 4
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// readRecords looks for EDNS among the records after the question.
func (q *query) readRecords(msg []byte, at, ns, ar int) bool {
	for i := range ns + ar {
		name := at
		if at = skipName(msg, at); at < 0 || at+10 > len(msg) {
			return false
		}
		fixed := msg[at : at+10]
		end := at + 10 + int(binary.BigEndian.Uint16(fixed[8:]))
		if end > len(msg) {
			return false
		}
		if binary.BigEndian.Uint16(fixed) == dns.TypeOPT {
			if i < ns || q.edns || msg[name] != 0 { // one, in its place, of the root
				return false
			}
			q.edns = true
			q.size = binary.BigEndian.Uint16(fixed[2:])
			q.version = fixed[5]
			q.do = fixed[6]&0x80 != 0
		}
		at = end
	}
	var flags byte
	if q.do {
		flags |= flagDO
	}
	if q.bits&bitCD != 0 {
		flags |= flagCD
	}
	q.keyBuf[q.nameLen+2] = flags
	return true
}

// skipName returns where a name ends, or -1. Pointers are not followed.
func skipName(msg []byte, at int) int {
	for at < len(msg) {
		switch n := int(msg[at]); {
		case n == 0:
			return at + 1
		case n >= 0xc0:
			if at+2 > len(msg) {
				return -1
			}
			return at + 2
		case n > 63:
			return -1
		default:
			at += n + 1
		}
	}
	return -1
}

// text is the name in lower case, as people and miekg/dns write it.
func (q *query) text() (string, error) {
	name, _, err := dns.UnpackDomainName(q.name(), 0)
	return name, err
}
