package reach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace"
)

// datagram tells what can be told of a service that takes UDP. A name server has to answer a
// query, if only to say that it will not. Of others a refusal is known (RFC 1122, section
// 4.1.3.3), and an answer; silence is both what they do with a datagram that says nothing and
// what a lost one looks like. One is sent, empty, as it gets to what runs in a pod.
func datagram(ctx context.Context, netns string, to netip.AddrPort, names bool) (o netcheck.Outcome, err error) {
	if names {
		q := new(dns.Msg).SetQuestion(".", dns.TypeNS)
		q.RecursionDesired = false // its own view of the root will do
		_, o.Latency, err = query(ctx, netns, to, q)
	} else {
		o.Latency, err = knock(ctx, netns, to)
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		o.Silent, err = true, nil
	default:
		err = fmt.Errorf("UDP port %d: %w", to.Port(), err)
	}
	return o, err
}

// knock sends an empty datagram and returns how long an answer took. The error matches
// os.ErrDeadlineExceeded if nothing came back, and is what the network said if it said so.
func knock(ctx context.Context, netns string, to netip.AddrPort) (time.Duration, error) {
	level, option := unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	if to.Addr().Is4() {
		level, option = unix.IPPROTO_IP, unix.IP_RECVERR
	}
	// Else a socket is told of closed ports, but not of hosts that a router does not reach.
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) })
		return errors.Join(err, cerr)
	}}
	var conn net.Conn
	err := netspace.Do(netns, func() (err error) {
		conn, err = d.DialContext(ctx, "udp", to.String())
		return err
	})
	if err != nil {
		return 0, plain(err)
	}
	defer conn.Close()
	begun := time.Now()
	if err := conn.SetDeadline(begun.Add(Patience)); err != nil {
		return 0, err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(nil); err != nil {
		return 0, plain(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return 0, plain(err)
	}
	return time.Since(begun), nil
}
