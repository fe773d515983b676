package netplanetest

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// SCTP (RFC 9260) as far as the first two packets of an association, over raw sockets: many
// kernels have no sockets for it and translate it all the same.
const (
	sctpHeader  = 12 // source port, destination port, tag, checksum
	sctpInit    = 1
	sctpInitAck = 2
	initChunk   = 20
	// textParameter is one that no receiver knows, and that none has to (section 3.2.1).
	textParameter = 0x8d5a
)

func sctpNetwork(a netip.Addr) string {
	if a.Is6() {
		return "ip6:132"
	}
	return "ip4:132"
}

func listenSCTP(a netip.Addr) (*net.IPConn, error) {
	return net.ListenIP(sctpNetwork(a), &net.IPAddr{IP: a.AsSlice()})
}

// sctpPacket is a packet with an INIT or INIT ACK and, perhaps, text.
func sctpPacket(kind byte, from, to uint16, tag, own uint32, text string) []byte {
	for len(text)%4 != 0 {
		text += " "
	}
	length := initChunk
	if text != "" {
		length += 4 + len(text)
	}
	p := binary.BigEndian.AppendUint16(nil, from)
	p = binary.BigEndian.AppendUint16(p, to)
	p = binary.BigEndian.AppendUint32(p, tag)
	p = append(p, 0, 0, 0, 0, kind, 0)
	p = binary.BigEndian.AppendUint16(p, uint16(length))
	p = binary.BigEndian.AppendUint32(p, own)
	p = binary.BigEndian.AppendUint32(p, 65536) // receive window
	p = append(p, 0, 1, 0, 1)                   // streams
	p = binary.BigEndian.AppendUint32(p, own)   // first sequence number
	if text != "" {
		p = binary.BigEndian.AppendUint16(p, textParameter)
		p = binary.BigEndian.AppendUint16(p, uint16(4+len(text)))
		p = append(p, text...)
	}
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}

// serveSCTP answers each INIT to a port with "own address, source address".
func serveSCTP(c *net.IPConn, own netip.AddrPort) {
	buf := make([]byte, 256)
	for {
		n, from, err := c.ReadFromIP(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n < sctpHeader+initChunk || buf[sctpHeader] != sctpInit || binary.BigEndian.Uint16(buf[2:]) != own.Port() {
			continue
		}
		client, ok := netip.AddrFromSlice(from.IP)
		if !ok {
			continue
		}
		port, tag := binary.BigEndian.Uint16(buf), binary.BigEndian.Uint32(buf[sctpHeader+4:])
		text := own.String() + " " + netip.AddrPortFrom(client.Unmap(), port).String()
		_, _ = c.WriteToIP(sctpPacket(sctpInitAck, own.Port(), port, tag, rand.Uint32()|1, text), from)
	}
}

// sctpPort is a port for an association.
func sctpPort() uint16 { return uint16(20000 + rand.N(20000)) }

// sendSCTP sends an INIT from a port and waits for the answer.
func sendSCTP(port uint16, to netip.AddrPort) (Verdict, error) {
	c, err := net.DialIP(sctpNetwork(to.Addr()), nil, &net.IPAddr{IP: to.Addr().AsSlice()})
	if err != nil {
		return failed(err)
	}
	defer c.Close()
	if _, err := c.Write(sctpPacket(sctpInit, port, to.Port(), 0, rand.Uint32()|1, "")); err != nil {
		if errors.Is(err, unix.EPERM) {
			return Verdict{Rejected: true}, nil
		}
		return failed(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(silence))
	buf := make([]byte, 512)
	for {
		n, _, err := c.ReadFromIP(buf)
		if err != nil {
			return failed(err)
		}
		const text = sctpHeader + initChunk + 4
		if n > text && buf[sctpHeader] == sctpInitAck && binary.BigEndian.Uint16(buf[2:]) == port {
			return answered(strings.TrimSpace(string(buf[text:n])))
		}
	}
}
