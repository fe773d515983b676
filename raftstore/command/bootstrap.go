package command

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
)

// AppendBootstrap appends the encoding of s to b.
func AppendBootstrap(b []byte, s *Bootstrap) []byte {
	b = appendString(b, s.ClusterID)
	b = appendPrefixes(b, s.ServiceCIDR, s.PodCIDR)
	b = binary.AppendUvarint(b, uint64(s.NodeMask))
	dns, _ := s.DNS.MarshalBinary() // never fails
	b = appendString(b, string(dns))
	if r := s.Restored; r != nil || s.extended() { // who reads it knows that more follows
		if r == nil {
			r = new(Restored)
		}
		b = appendString(b, r.ClusterID)
		b = binary.AppendUvarint(b, r.Revision)
		b = binary.AppendVarint(b, r.Time)
	}
	if s.extended() {
		b = appendPrefixes(b, s.Second.ServiceCIDR, s.Second.PodCIDR)
		b = appendUvarints(b, uint64(s.Second.NodeMask), uint64(s.NodePorts.First), uint64(s.NodePorts.Last))
	}
	return b
}

func appendPrefixes(b []byte, ps ...netip.Prefix) []byte {
	for _, p := range ps {
		data, _ := p.MarshalBinary() // never fails
		b = appendString(b, string(data))
	}
	return b
}

// DecodeBootstrap decodes what [AppendBootstrap] wrote, all of b.
func DecodeBootstrap(b []byte) (*Bootstrap, error) {
	r := reader{b: b, format: Newest}
	s := r.bootstrap(false, false)
	if r.err == nil && len(r.b) > 0 {
		s.Restored = r.restored()
	}
	if r.err == nil && len(r.b) > 0 {
		r.extended(s)
		if *s.Restored == (Restored{}) {
			s.Restored = nil
		}
	}
	if r.err == nil && len(r.b) > 0 {
		r.fail("%d bytes too many", len(r.b))
	}
	if r.err != nil {
		return nil, fmt.Errorf("decode cluster settings: %w", r.err)
	}
	return s, nil
}

func (r *reader) restored() *Restored {
	return &Restored{ClusterID: r.str(maxName), Revision: r.uvarint(), Time: r.varint()}
}

func (r *reader) bootstrap(restored, extended bool) *Bootstrap {
	s := &Bootstrap{ClusterID: r.str(maxName)}
	s.ServiceCIDR, s.PodCIDR = r.prefix(), r.prefix()
	s.NodeMask = r.mask()
	if err := s.DNS.UnmarshalBinary(r.bytes(64)); err != nil {
		r.fail("cluster settings: %w", err)
	}
	if restored || extended {
		if old := r.restored(); restored {
			s.Restored = old
		} else if *old != (Restored{}) {
			r.fail("cluster settings: of a restored cluster, and not marked so")
		}
	}
	if extended {
		r.extended(s)
	}
	return s
}

// extended reads what only format 3 knows.
func (r *reader) extended(s *Bootstrap) {
	s.Second = Ranges{ServiceCIDR: r.prefix(), PodCIDR: r.prefix(), NodeMask: r.mask()}
	first, last := r.uvarint(), r.uvarint()
	if first > math.MaxUint16 || last > math.MaxUint16 {
		r.fail("ports %d to %d", first, last)
	}
	s.NodePorts = PortRange{uint16(first), uint16(last)}
	if r.err == nil && !s.extended() {
		r.fail("cluster settings: nothing where something is announced")
	}
}

func (r *reader) prefix() (p netip.Prefix) {
	if err := p.UnmarshalBinary(r.bytes(64)); err != nil {
		r.fail("cluster settings: %w", err)
	}
	return p
}

func (r *reader) mask() int {
	mask := r.uvarint()
	if mask > 128 {
		r.fail("node mask %d", mask)
		return 0
	}
	return int(mask)
}
