package dns

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/dns"
)

// packed is an answer as it is sent, but for what is each client's own: the id, how
// the question is spelled, flags, EDNS, and what fits. It is immutable.
type packed struct {
	wire []byte   // without an OPT record
	ttls []uint16 // where the time to live of each record is, in order
	// answers and authorities are how many of the records are in those sections.
	answers, authorities int
	// run is the last answers if they are addresses of one name: they take turns in
	// being first.
	run struct{ at, size, n int }
}

var errUnpackable = errors.New("answer cannot be packed")

// pack makes resp ready to be sent. The question must be spelled as name, which is
// that of the query in lower case.
func pack(resp *dns.Msg, name []byte) (*packed, error) {
	if resp.Compress = true; resp.Len() > dns.MaxMsgSize {
		resp.Truncate(dns.MaxMsgSize)
		resp.Compress = true // which Truncate undoes where it is not needed
	}
	wire, err := resp.Pack()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnpackable, err)
	}
	p := &packed{wire: wire, answers: len(resp.Answer), authorities: len(resp.Ns)}
	if len(wire) < headerSize+len(name)+4 || string(wire[headerSize:headerSize+len(name)]) != string(name) {
		return nil, fmt.Errorf("%w: it has another question", errUnpackable)
	}
	records := len(resp.Answer) + len(resp.Ns) + len(resp.Extra)
	p.ttls = make([]uint16, 0, records)
	at := headerSize + len(name) + 4
	for range records {
		start := at
		if at = skipName(wire, at); at < 0 || at+10 > len(wire) {
			return nil, errUnpackable
		}
		p.ttls = append(p.ttls, uint16(at+4))
		end := p.end(len(p.ttls) - 1)
		if len(p.ttls) <= p.answers {
			p.extendRun(start, at, end)
		}
		at = end
	}
	return p, nil
}

// end is where a record ends.
func (p *packed) end(record int) int {
	at := int(p.ttls[record])
	return at + 6 + int(binary.BigEndian.Uint16(p.wire[at+4:]))
}

// extendRun takes the answer from start to end, whose type is at typ, into the run, or
// begins another.
func (p *packed) extendRun(start, typ, end int) {
	r := &p.run
	// Owner, type and class alike: with compression that is one pointer for all.
	if r.n > 0 && r.size == end-start && string(p.wire[r.at:r.at+typ-start+4]) == string(p.wire[start:typ+4]) {
		r.n++
		return
	}
	r.n = 0
	switch t := binary.BigEndian.Uint16(p.wire[typ:]); {
	case typ-start == 2 && (t == dns.TypeA || t == dns.TypeAAAA):
		r.at, r.size, r.n = start, end-start, 1
	}
}

// delivery is how an answer goes to a client.
type delivery struct {
	limit int    // bytes
	age   uint32 // seconds to take off each time to live
	ttl   uint32 // of each record, if not zero
	turn  uint32 // which address is first
}

// append adds the answer to q to dst, which must be empty.
func (p *packed) append(dst []byte, q *query, d delivery) []byte {
	room := d.limit
	if q.edns {
		room -= optSize
	}
	records, end, cut := p.fit(room)
	dst = append(dst, p.wire[:end]...)
	if n := p.run.n; n > 1 {
		p.rotate(dst, int(d.turn%uint32(n)))
	}
	for _, at := range p.ttls[:records] {
		ttl := binary.BigEndian.Uint32(dst[at:])
		ttl -= min(ttl, d.age)
		if d.ttl != 0 {
			ttl = d.ttl
		}
		binary.BigEndian.PutUint32(dst[at:], ttl)
	}
	copy(dst[headerSize:], q.question)
	bits := binary.BigEndian.Uint16(p.wire[2:])
	if q.bits&bitAD == 0 && !q.do { // who does not ask would not know what it means (RFC 6840, 5.8)
		bits &^= bitAD
	}
	if cut {
		bits |= bitTC
	}
	header(dst, q, bits)
	if records < len(p.ttls) {
		an := min(records, p.answers)
		ns := min(records-an, p.authorities)
		binary.BigEndian.PutUint16(dst[6:], uint16(an))
		binary.BigEndian.PutUint16(dst[8:], uint16(ns))
		binary.BigEndian.PutUint16(dst[10:], uint16(records-an-ns))
	}
	return appendOPT(dst, q, 0)
}

// fit returns how many records fit into room, where the last one ends, and whether
// what is missing is missed: additional records are not.
func (p *packed) fit(room int) (records, end int, cut bool) {
	if len(p.wire) <= room {
		return len(p.ttls), len(p.wire), false
	}
	records, end = len(p.ttls), len(p.wire)
	for end > room && records > 0 {
		if records--; records > 0 {
			end = p.end(records - 1)
		} else {
			end = skipQuestion(p.wire)
		}
	}
	return records, end, records < p.answers+p.authorities
}

// skipQuestion returns where the question of an answer ends.
func skipQuestion(wire []byte) int { return skipName(wire, headerSize) + 4 }

// rotate turns the addresses of dst, of which some may have been cut off, so that
// every one of the answer is first at times.
func (p *packed) rotate(dst []byte, by int) {
	r := p.run
	for i := range r.n {
		to := r.at + i*r.size
		if to+r.size > len(dst) {
			return
		}
		from := r.at + (i+by)%r.n*r.size
		copy(dst[to:to+r.size], p.wire[from:])
	}
}

// header writes what is the client's own into an answer.
func header(dst []byte, q *query, bits uint16) {
	bits |= bitQR | bitRA | q.bits&(maskOpcode|bitRD|bitCD)
	binary.BigEndian.PutUint16(dst, q.id)
	binary.BigEndian.PutUint16(dst[2:], bits)
}

// appendOPT ends an answer with EDNS if the query had it. high is what of the response
// code does not fit into the header.
func appendOPT(dst []byte, q *query, high byte) []byte {
	if !q.edns {
		return dst
	}
	var do byte
	if q.do {
		do = 0x80
	}
	binary.BigEndian.PutUint16(dst[10:], binary.BigEndian.Uint16(dst[10:])+1)
	return append(dst, 0, 0, byte(dns.TypeOPT), udpSize>>8, udpSize&0xff, high, 0, do, 0, 0, 0)
}

// appendRcode adds an answer without records to dst, which must be empty.
func appendRcode(dst []byte, q *query, rcode int) []byte {
	dst = append(dst, make([]byte, headerSize)...)
	header(dst, q, uint16(rcode&maskRcode))
	if q.question != nil {
		binary.BigEndian.PutUint16(dst[4:], 1)
		dst = append(dst, q.question...)
	}
	return appendOPT(dst, q, byte(rcode>>4))
}
