package reach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace"
)

// echoes is how many small packets are sent to each address.
const echoes = 3

// largest bounds the size of the large packet, in bytes: jumbo frames.
const largest = 9000

// The sizes of an echo in bytes: its own header, and with that of IP (RFC 791, RFC 8200).
const (
	echoHead  = 8
	echoHead4 = 20 + echoHead
	echoHead6 = 40 + echoHead
	small     = 56 // of its payload
)

// echo sends ICMP echoes (RFC 792, RFC 4443): small ones, and if they are answered one that
// fills a packet as large as the way is said to take, which must not be taken apart.
func echo(ctx context.Context, netns string, to netip.Addr) (o netcheck.Outcome, err error) {
	var p *pinger
	if p, err = newPinger(ctx, netns, to); err != nil {
		return o, err
	}
	defer p.conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = p.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	for range echoes {
		took, err := p.once(ctx, small, Patience)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return o, err
		}
		o.Sent++
		switch {
		case err != nil:
			o.Lost++
		case o.Latency == 0 || took < o.Latency:
			o.Latency = took
		}
	}
	if o.Lost == o.Sent {
		return o, fmt.Errorf("no answer to %d pings", o.Sent)
	}
	err = p.large(ctx, &o)
	return o, err
}

// large sends a packet as large as the way takes. One that is too large for a link further on
// is answered by a router that says so, and the kernel then knows of it (RFC 1191, RFC 8201):
// the next one is smaller. Where nobody says so, connections hang.
func (p *pinger) large(ctx context.Context, o *netcheck.Outcome) error {
	for range 3 {
		size, err := p.mtu(ctx)
		if err != nil {
			return err
		}
		o.TooLarge = size
		_, err = p.once(ctx, size-p.head, min(Patience, Patience/5+4*o.Latency))
		switch {
		case err == nil:
			o.TooLarge = 0
			return nil
		case ctx.Err() != nil:
			o.TooLarge = 0
			return context.Cause(ctx)
		case !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, unix.EMSGSIZE):
			o.TooLarge = 0
			return err
		}
	}
	return fmt.Errorf("packets of %d bytes are lost, small ones pass", o.TooLarge)
}

// pinger exchanges echoes with one address.
type pinger struct {
	conn    *net.IPConn
	to      *net.IPAddr
	addr    netip.Addr
	netns   string
	head    int
	id, seq uint16
}

// newPinger opens a socket in a network namespace.
func newPinger(ctx context.Context, netns string, to netip.Addr) (*pinger, error) {
	p := &pinger{addr: to, netns: netns, to: &net.IPAddr{IP: to.AsSlice()}, head: echoHead6, id: uint16(rand.Uint32())}
	network, options := "ip6:ipv6-icmp", [][3]int{{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO}, {unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1}}
	if to.Is4() {
		network, options, p.head = "ip4:icmp", [][3]int{{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO}}, echoHead4
	}
	whole := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			for _, o := range options {
				err = errors.Join(err, unix.SetsockoptInt(int(fd), o[0], o[1], o[2]))
			}
		})
		return errors.Join(err, cerr)
	}}
	err := netspace.Do(netns, func() error {
		conn, err := whole.ListenPacket(ctx, network, "")
		if err == nil {
			p.conn = conn.(*net.IPConn)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a socket for echoes (needs root): %w", err)
	}
	return p, nil
}

// mtu is the size in bytes of the largest packet that the way is known to take, now: a socket
// remembers what was known when it was connected. Nothing is sent.
func (p *pinger) mtu(ctx context.Context) (size int, err error) {
	c, err := dial(ctx, p.netns, "udp", netip.AddrPortFrom(p.addr, 9))
	if err != nil {
		return 0, fmt.Errorf("no way there: %w", err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	level, option := unix.IPPROTO_IPV6, unix.IPV6_MTU
	if p.addr.Is4() {
		level, option = unix.IPPROTO_IP, unix.IP_MTU
	}
	cerr := raw.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), level, option) })
	return min(size, largest), errors.Join(err, cerr)
}

// once sends one echo and waits for its answer. It returns an error that matches
// os.ErrDeadlineExceeded if there is none in time.
func (p *pinger) once(ctx context.Context, payload int, patience time.Duration) (time.Duration, error) {
	if err := context.Cause(ctx); err != nil {
		return 0, err
	}
	p.seq++
	request, answer, protocol := icmp.Type(ipv6.ICMPTypeEchoRequest), icmp.Type(ipv6.ICMPTypeEchoReply), unix.IPPROTO_ICMPV6
	if p.addr.Is4() {
		request, answer, protocol = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply, unix.IPPROTO_ICMP
	}
	// What comes back must be what went: the sequence number alone may be that of others.
	data := binary.BigEndian.AppendUint64(nil, rand.Uint64())
	data = append(data, make([]byte, max(0, payload-len(data)))...)
	packet, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: int(p.id), Seq: int(p.seq), Data: data}}).Marshal(nil)
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	if err := p.conn.SetDeadline(begun.Add(patience)); err != nil {
		return 0, err
	}
	if _, err := p.conn.WriteTo(packet, p.to); err != nil {
		return 0, fmt.Errorf("send: %w", plain(err))
	}
	buf := make([]byte, largest+echoHead)
	for {
		n, from, err := p.conn.ReadFrom(buf)
		if err != nil {
			return 0, plain(err)
		}
		took := time.Since(begun)
		if ip, ok := from.(*net.IPAddr); !ok || !ip.IP.Equal(p.to.IP) {
			continue
		}
		m, err := icmp.ParseMessage(protocol, buf[:n])
		if err != nil || m.Type != answer {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == int(p.id) && e.Seq == int(p.seq) && string(e.Data) == string(data) {
			return took, nil
		}
	}
}

// plain is why an operation of a socket failed, without its addresses.
func plain(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}
