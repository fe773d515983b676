package reach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

// listen serves datagrams in a namespace until the test ends: answer returns what to say to
// one, nil for nothing. It returns the port.
func listen(t *testing.T, path string, answer func([]byte) []byte) uint16 {
	t.Helper()
	var conn net.PacketConn
	netspacetest.In(t, path, func() (err error) {
		conn, err = net.ListenPacket("udp", ":0")
		return err
	})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if said := answer(buf[:n]); said != nil {
				_, _ = conn.WriteTo(said, from) // who asks finds out
			}
		}
	}()
	t.Cleanup(func() { conn.Close(); <-ended })
	return uint16(conn.LocalAddr().(*net.UDPAddr).Port)
}

// TestDatagram: a refusal, an answer and silence are told apart, whoever refuses.
func TestDatagram(t *testing.T) {
	near, router, far := lab(t)
	got := make(chan int, 100)
	talks := listen(t, far, func([]byte) []byte { return []byte("no such message") })
	empties := listen(t, far, func([]byte) []byte { return []byte{} })
	silent := listen(t, far, func(b []byte) []byte { got <- len(b); return nil })
	for name, kind := range map[string]int{"192.0.3.0/24": unix.RTN_PROHIBIT, "192.0.4.0/24": unix.RTN_UNREACHABLE, "2001:db8:3::/64": unix.RTN_PROHIBIT, "2001:db8:4::/64": unix.RTN_UNREACHABLE} {
		netspacetest.In(t, router, func() error {
			dst, err := netlink.ParseIPNet(name)
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{Dst: dst, Type: kind})
		})
	}
	for _, tc := range []struct {
		address string
		port    uint16
		silent  bool
		error   string
	}{
		{"192.0.2.2", talks, false, ""}, {"2001:db8:2::2", talks, false, ""},
		{"192.0.2.2", empties, false, ""}, {"2001:db8:2::2", empties, false, ""},
		{"192.0.2.2", silent, true, ""}, {"2001:db8:2::2", silent, true, ""},
		{"192.0.2.2", 1, false, "UDP port 1: read: connection refused"}, {"2001:db8:2::2", 1, false, "UDP port 1: read: connection refused"},
		{"192.0.3.1", 9, false, "UDP port 9: read: no route to host"}, {"2001:db8:3::1", 9, false, "UDP port 9: read: permission denied"},
		{"192.0.4.1", 9, false, "UDP port 9: read: no route to host"}, {"2001:db8:4::1", 9, false, "UDP port 9: read: network is unreachable"},
	} {
		o := one(t, From{Pod: near}, netcheck.Probe{Kind: netcheck.PodToUDP, Address: netip.MustParseAddr(tc.address), Port: tc.port})
		if o.Error != tc.error || o.Silent != tc.silent || (o.Latency > 0) != (tc.error == "" && !tc.silent) {
			t.Errorf("%s port %d: %+v", tc.address, tc.port, o)
		}
	}
	// What runs in a pod gets one datagram for each, with nothing in it.
	if len(got) != 2 || <-got != 0 || <-got != 0 {
		t.Errorf("%d more datagrams came, or one with something in it", len(got))
	}
	if o := one(t, From{Pod: netspacetest.Namespace(t, "island")}, netcheck.Probe{Kind: netcheck.PodToUDP, Address: far4, Port: 9}); o.Error != "UDP port 9: connect: network is unreachable" {
		t.Errorf("without a route: %+v", o)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	late := errors.New("there was no time left")
	time.AfterFunc(Patience/10, func() { cancel(late) })
	if o := Send(ctx, From{Pod: near}, []netcheck.Probe{{Kind: netcheck.PodToUDP, Address: far4, Port: silent}})[0]; o.Silent || o.Error != late.Error() {
		t.Errorf("given up: %+v", o)
	}
}

// TestNames: a name server has to answer; that it does not want to is an answer.
func TestNames(t *testing.T) {
	near, _, far := lab(t)
	refuses := listen(t, far, func(b []byte) []byte {
		q := new(dns.Msg)
		if err := q.Unpack(b); err != nil {
			t.Errorf("that is no query: %q, %v", b, err)
			return nil
		}
		data, err := new(dns.Msg).SetRcode(q, dns.RcodeRefused).Pack()
		if err != nil {
			t.Error(err)
		}
		return data
	})
	silent := listen(t, far, func([]byte) []byte { return nil })
	for name, to := range families {
		for port, want := range map[uint16]string{refuses: "", silent: "UDP port %d: no answer to queries for .", 1: "UDP port %d: query for .: read: connection refused"} {
			if want != "" {
				want = fmt.Sprintf(want, port)
			}
			o := one(t, From{Pod: near}, netcheck.Probe{Kind: netcheck.PodToUDP, Address: to, Port: port, Names: true})
			if o.Error != want || o.Silent || (o.Latency > 0) != (want == "") {
				t.Errorf("%s: %+v, want %q", name, o, want)
			}
		}
	}
}
