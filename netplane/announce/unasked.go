package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// gratuitous tells all on a link that an address is at its interface.
func gratuitous(l *link, addr netip.Addr) error {
	send := advertise
	if addr.Is4() {
		send = gratuitousARP
	}
	if err := send(l, addr); err != nil {
		return fmt.Errorf("tell on %s that %s is here: %w", l.name, addr, err)
	}
	return nil
}

// The operations of ARP (RFC 826), as there are hosts that believe only one of them.
const (
	arpRequest = 1
	arpReply   = 2
)

// arpPacket says that addr is at mac: an ARP announcement (RFC 5227, section 3).
func arpPacket(mac []byte, addr netip.Addr, operation uint16) []byte {
	b := make([]byte, 0, 28)
	b = binary.BigEndian.AppendUint16(b, 1) // Ethernet
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
	b = append(b, 6, 4)
	b = binary.BigEndian.AppendUint16(b, operation)
	b = append(append(b, mac...), addr.AsSlice()...)
	target := make([]byte, 6)
	if operation == arpReply {
		target = mac
	}
	return append(append(b, target...), addr.AsSlice()...)
}

func gratuitousARP(l *link, addr netip.Addr) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ARP), Ifindex: l.index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	return errors.Join(
		unix.Sendto(fd, arpPacket(l.mac, addr, arpRequest), 0, to),
		unix.Sendto(fd, arpPacket(l.mac, addr, arpReply), 0, to),
	)
}

func networkOrder(v uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v))
}

// The fields of a Neighbor Advertisement (RFC 4861, section 4.4).
const (
	neighborAdvertisement = 136
	overrideFlag          = 0x20
	targetLinkLayer       = 2 // option
)

// advertisement says that addr is at mac, for those too that know it elsewhere.
func advertisement(mac []byte, addr netip.Addr) []byte {
	b := []byte{neighborAdvertisement, 0, 0, 0, overrideFlag, 0, 0, 0} // the kernel fills in the checksum
	b = append(b, addr.AsSlice()...)
	return append(append(b, targetLinkLayer, 1), mac...)
}

func advertise(l *link, addr netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	for _, option := range []struct{ name, value int }{
		{unix.IPV6_MULTICAST_IF, l.index},
		{unix.IPV6_MULTICAST_HOPS, 255}, // or else it is not believed
	} {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, option.name, option.value); err != nil {
			return fmt.Errorf("socket option: %w", err)
		}
	}
	allNodes := netip.IPv6LinkLocalAllNodes().As16()
	return unix.Sendto(fd, advertisement(l.mac, addr), 0, &unix.SockaddrInet6{ZoneId: uint32(l.index), Addr: allNodes})
}
