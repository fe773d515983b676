package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// tcpDial opens a connection to a server.
func tcpDial(t *testing.T, addr string) *dns.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return &dns.Conn{Conn: c}
}

// TestPipelining: queries of one connection do not wait for each other (RFC 7766), however
// they are cut into packets.
func TestPipelining(t *testing.T) {
	release := make(chan struct{})
	up := nameserver(t, func(_ string, req, resp *dns.Msg) {
		<-release
		resp.Answer = []dns.RR{rr(t, req.Question[0].Name+" 60 IN A 192.0.2.1")}
	})
	s := New(Config{Upstreams: addrPorts(up)})
	s.Set(fixture())
	c := tcpDial(t, serve(t, s))
	var sent []byte
	for i, name := range []string{"slow.example.org.", "web.default.svc.cluster.local.", "nope.default.svc.cluster.local."} {
		req := new(dns.Msg).SetQuestion(name, dns.TypeA)
		req.Id = uint16(i)
		b, err := req.Pack()
		if err != nil {
			t.Fatal(err)
		}
		sent = append(binary.BigEndian.AppendUint16(sent, uint16(len(b))), b...)
	}
	for _, part := range [][]byte{sent[:1], sent[1:40], sent[40:]} {
		if _, err := c.Conn.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{"1 NOERROR, A 10.97.0.80", "2 NXDOMAIN", "0 NOERROR, A 192.0.2.1"} {
		if i == 2 {
			close(release)
		}
		m, err := c.ReadMsg()
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(m.Id, " ", brief(m)); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestConnections: one client cannot take all connections, and gives back what it closes.
func TestConnections(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serve(t, s)
	web := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)
	works := func(c *dns.Conn) bool {
		if c.WriteMsg(web) != nil {
			return false
		}
		_, err := c.ReadMsg()
		return err == nil
	}
	var all []*dns.Conn
	for range maxClientConns {
		c := tcpDial(t, addr)
		if !works(c) {
			t.Fatalf("connection %d is refused", len(all))
		}
		all = append(all, c)
	}
	if works(tcpDial(t, addr)) {
		t.Error("one more than allowed is served")
	}
	all[0].Close()
	for range 1000 { // until the server has seen that
		if works(tcpDial(t, addr)) {
			return
		}
	}
	t.Error("a place that became free is not given to anybody")
}

// TestTCPGarbage: who sends no query is disconnected; others are not.
func TestTCPGarbage(t *testing.T) {
	s := New(Config{})
	s.Set(fixture())
	addr := serve(t, s)
	good := tcpDial(t, addr)
	for _, b := range [][]byte{{0, 1, 0}, {0x10, 1}, slices.Concat([]byte{0, 12}, bytes.Repeat([]byte{0xff}, 12))} {
		c := tcpDial(t, addr)
		if _, err := c.Conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	if err := good.WriteMsg(new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	if m, err := good.ReadMsg(); err != nil || len(m.Answer) != 1 {
		t.Errorf("%v, %v", m, err)
	}
}

// TestWaiting: one client's questions that upstreams do not answer leave room for those of
// others, and are forgotten in the end.
func TestWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newFakeNet()
		a := "192.0.2.1:53"
		good := answersWith(t, 60, "198.51.100.1")
		n.set(a, func(req *dns.Msg) *dns.Msg {
			if strings.HasPrefix(dns.CanonicalName(req.Question[0].Name), "good.") {
				return good(req)
			}
			return nil
		})
		s := New(Config{Upstreams: addrPorts(a), Dial: n.dial})
		s.Set(fixture())
		t.Cleanup(s.forward.close)
		var busy sync.WaitGroup
		later := func(from, name string) *dns.Msg {
			msg, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
			if err != nil {
				t.Fatal(err)
			}
			w := &worker{}
			if _, wait := s.quick(w, msg, true); !wait {
				t.Fatalf("%s: nobody has to wait", name)
			}
			got := new(dns.Msg)
			s.later(t.Context(), w.park(), netip.MustParseAddr(from), &busy, func(answer []byte) {
				if err := got.Unpack(answer); err != nil {
					t.Error(err)
				}
			})
			return got
		}
		for i := range 2 * maxWaiting {
			later("10.98.0.1", fmt.Sprintf("n%d.example.org.", i))
		}
		got := later("10.98.0.2", "good.example.org.")
		synctest.Wait()
		if len(got.Answer) != 1 {
			t.Errorf("another client got %s", brief(got))
		}
		busy.Wait()
		if s.waiting.all != 0 || len(s.waiting.held) != 0 {
			t.Errorf("nobody waits, but %d are counted, of %d clients", s.waiting.all, len(s.waiting.held))
		}
	})
}
