package netplanetest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/render"
)

// SharedPort is a World whose clients can talk to two places from one port.
type SharedPort interface {
	// Both sends to two places, in order, from one source port, which goes on talking to
	// the first.
	Both(from Host, proto render.Proto, to [2]netip.AddrPort) ([2]Verdict, error)
	// Again connects by TCP from one source port, each time that next returns true, and
	// returns how many packets had to be sent again.
	Again(from Host, to netip.AddrPort, next func(Verdict) bool) (int, error)
}

// sharedPort: a client may talk to a service and to its endpoint at once, from one port.
func (s *suite) sharedPort(t *testing.T) {
	w, ok := s.w.(SharedPort)
	if !ok {
		return // a World whose clients have no ports cannot mistake one for another
	}
	tcp := s.tcp(1, s.n.Endpoints(TCPPort, Pod2)...)
	udp := render.Service{Port: render.Port{Addr: s.n.Service(1), Proto: render.UDP, Port: 80}, Endpoints: s.n.Endpoints(UDPPort, Pod2)}
	sctp := render.Service{Port: render.Port{Addr: s.n.Service(1), Proto: render.SCTP, Port: 80}, Endpoints: s.n.Endpoints(SCTPPort, Pod2)}
	s.sync(t, s.table(udp, tcp, sctp))
	for _, svc := range []render.Service{tcp, udp, sctp} {
		for _, from := range []Host{Pod1, Node, Outside} {
			at, direct := netip.AddrPortFrom(svc.Addr, svc.Port.Port), svc.Endpoints[0]
			for _, to := range [][2]netip.AddrPort{{at, direct}, {direct, at}} {
				v, err := w.Both(from, svc.Proto, to)
				if err != nil || v[0].To != direct || v[1].To != direct {
					t.Errorf("%s from %s to %v: %+v, %v", svc.Proto, from, to, v, err)
				}
			}
		}
	}
}

// portAgain: who uses one port again and again for a service gets to an endpoint at once, also
// when it is another one than last time.
func (s *suite) portAgain(t *testing.T) {
	w, ok := s.w.(SharedPort)
	if !ok {
		return
	}
	for _, from := range []Host{Pod1, Node, Outside} {
		const times = 24
		var svc render.Service
		n, others := 0, [][]netip.AddrPort{s.n.Endpoints(TCPPort, Pod2), s.n.Endpoints(TCPPort, Pod1, Pod2), s.n.Endpoints(TCPPort, Node)}
		lead := func() {
			svc = s.tcp(1, others[n/4%len(others)]...)
			s.sync(t, s.table(svc))
		}
		lead()
		again, err := w.Again(from, netip.AddrPortFrom(svc.Addr, svc.Port.Port), func(v Verdict) bool {
			if !slices.Contains(svc.Endpoints, v.To) {
				t.Errorf("from %s, connection %d: %+v, want one of %v", from, n, v, svc.Endpoints)
			}
			if n++; n%4 == 0 {
				lead()
			}
			return n < times
		})
		if err != nil || again > times/8 { // one may be due to a busy machine
			t.Errorf("from %s: %d of %d connections, %d packets sent again: %v", from, n, times, again, err)
		}
	}
}

// Both implements SharedPort.
func (l *Lab) Both(from Host, proto render.Proto, to [2]netip.AddrPort) (v [2]Verdict, err error) {
	both := bothTCP
	switch proto {
	case render.UDP:
		both = bothUDP
	case render.SCTP:
		both = bothSCTP
		l.sctp.Lock()
		defer l.sctp.Unlock()
	}
	err = netspace.Do(l.Path[from], func() (err error) {
		v, err = both(to)
		return err
	})
	return v, err
}

func bothSCTP(to [2]netip.AddrPort) (v [2]Verdict, err error) {
	port := sctpPort()
	for i := range to {
		if v[i], err = sendSCTP(port, to[i]); err != nil {
			break
		}
	}
	return v, err
}

func bothTCP(to [2]netip.AddrPort) (v [2]Verdict, err error) {
	d := net.Dialer{Timeout: silence, Control: reuse}
	for i := range to {
		c, err := d.Dial("tcp", to[i].String())
		if err != nil {
			v[i], err = failed(err)
			return v, err
		}
		defer c.Close()
		d.LocalAddr = &net.TCPAddr{Port: c.LocalAddr().(*net.TCPAddr).Port}
		if v[i], err = told(c); err != nil {
			return v, err
		}
	}
	return v, nil
}

func bothUDP(to [2]netip.AddrPort) (v [2]Verdict, err error) {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return v, err
	}
	defer c.Close()
	buf := make([]byte, 256)
	for i := range to {
		if _, err := c.WriteToUDPAddrPort([]byte("?"), to[i]); err != nil {
			return v, err
		}
		_ = c.SetReadDeadline(time.Now().Add(silence))
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err == nil && netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != to[i] {
			return v, fmt.Errorf("sent to %s, and %s answered", to[i], from)
		}
		if err == nil {
			v[i], err = answered(string(buf[:n]))
		} else {
			v[i], err = failed(err)
		}
		if err != nil {
			return v, err
		}
	}
	return v, nil
}

func reuse(_, _ string, c syscall.RawConn) (err error) {
	cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return errors.Join(err, cerr)
}

// Again implements SharedPort. The servers close first, so that the port is free at once.
func (l *Lab) Again(from Host, to netip.AddrPort, next func(Verdict) bool) (sentAgain int, err error) {
	d := net.Dialer{Timeout: silence, Control: reuse}
	once := func() (v Verdict, err error) {
		var c net.Conn
		if err = netspace.Do(l.Path[from], func() (err error) {
			c, err = d.Dial("tcp", to.String())
			for end := time.Now().Add(silence); errors.Is(err, unix.EADDRNOTAVAIL) && time.Now().Before(end); { // until the last packet of the one before is there
				c, err = d.Dial("tcp", to.String())
			}
			return err
		}); err != nil {
			return failed(err)
		}
		defer c.Close()
		d.LocalAddr = c.LocalAddr()
		if v, err = told(c); err != nil {
			return v, err
		}
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			return v, err
		}
		cerr := raw.Control(func(fd uintptr) {
			var info *unix.TCPInfo
			if info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
				sentAgain += int(info.Total_retrans)
			}
		})
		return v, errors.Join(err, cerr)
	}
	for more := true; more; {
		v, err := once()
		if err != nil {
			return sentAgain, err
		}
		more = next(v)
	}
	return sentAgain, nil
}
