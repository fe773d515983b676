package nft

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/render"
)

// family is what differs between IPv4 and IPv6. Both have a table of their own,
// with the same sets and chains.
type family struct {
	name  string
	nf    nftables.TableFamily
	words uint32 // 32-bit words of an address, which is registers of an address
	bytes int
	saddr uint32 // offset of the source address in the header
	daddr uint32
	// unreachable is the ICMP code of "port unreachable".
	unreachable uint8
	addrType    nftables.SetDatatype
	conntrack   uint8 // address family of conntrack messages
}

var (
	ip4 = &family{name: "ip", nf: nftables.TableFamilyIPv4, words: 1, bytes: 4, saddr: 12, daddr: 16,
		unreachable: 3, addrType: nftables.TypeIPAddr, conntrack: unix.AF_INET}
	ip6 = &family{name: "ip6", nf: nftables.TableFamilyIPv6, words: 4, bytes: 16, saddr: 8, daddr: 24,
		unreachable: 4, addrType: nftables.TypeIP6Addr, conntrack: unix.AF_INET6}
	families = [...]*family{ip4, ip6}
)

func familyOf(a netip.Addr) *family {
	if a.Is4() {
		return ip4
	}
	return ip6
}

// appendAddr adds an address as the kernel holds it.
func appendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		x := a.As4()
		return append(b, x[:]...)
	}
	x := a.As16()
	return append(b, x[:]...)
}

// appendPort adds address . protocol . port, each padded to whole words: the key
// by which a packet's service is found.
func appendPort(b []byte, p render.Port) []byte {
	b = appendAddr(b, p.Addr)
	b = append(b, byte(p.Proto), 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, p.Port)
	return append(b, 0, 0)
}

// appendAddrPort adds address . port.
func appendAddrPort(b []byte, p netip.AddrPort) []byte {
	b = appendAddr(b, p.Addr())
	b = binary.BigEndian.AppendUint16(b, p.Port())
	return append(b, 0, 0)
}

func (f *family) addr(b string) netip.Addr {
	a, _ := netip.AddrFromSlice([]byte(b[:f.bytes]))
	return a
}

// port decodes what appendPort wrote; b is long enough.
func (f *family) port(b string) render.Port {
	t := b[f.bytes:]
	return render.Port{Addr: f.addr(b), Proto: render.Proto(t[0]), Port: binary.BigEndian.Uint16([]byte(t[4:6]))}
}

// addrPort decodes what appendAddrPort wrote; b is long enough.
func (f *family) addrPort(b string) netip.AddrPort {
	return netip.AddrPortFrom(f.addr(b), binary.BigEndian.Uint16([]byte(b[f.bytes:f.bytes+2])))
}

func (f *family) addrPortBytes() int { return f.bytes + 4 }
