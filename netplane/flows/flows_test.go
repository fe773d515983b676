package flows

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace/netspacetest"
)

// TestForget: flows of an address go in both families, whoever began them and whatever they are
// called by; those of others stay.
func TestForget(t *testing.T) {
	path := netspacetest.Namespace(t, "node")
	var own, others []string
	for i, family := range []string{"10.98.1.", "fd98::"} {
		a := func(last string) string { return family + last }
		netspacetest.Up(t, path, "lo", a("1")+"/"+[]string{"24", "64"}[i], a("2")+"/"+[]string{"32", "128"}[i], a("3")+"/"+[]string{"32", "128"}[i])
		own = append(own, a("2"))
		others = append(others, a("3"))
	}
	// A service in front of the second address, so that it is there by another name.
	netspacetest.In(t, path, func() error {
		c := exec.Command("nft", "-f", "-")
		c.Stdin = strings.NewReader(`table ip t { chain c { type nat hook output priority -100; ip daddr 10.98.1.1 udp dport 53 dnat to 10.98.1.2; }; chain d { type filter hook output priority 0; ct state new accept; }; }
table ip6 t { chain d { type filter hook output priority 0; ct state new accept; }; }`)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return nil
	})
	// send sends what makes six flows, again and again the same.
	send := func() error {
		for i, pair := range [][2]string{{"10.98.1.1", "10.98.1.1"}, {"10.98.1.2", "10.98.1.3"}, {"10.98.1.3", "10.98.1.2"}, {"10.98.1.3", "10.98.1.1"}, {"fd98::2", "fd98::3"}, {"fd98::3", "fd98::1"}} {
			d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(pair[0]), Port: 4000 + i}}
			conn, err := d.Dial("udp", net.JoinHostPort(pair[1], "53"))
			if err != nil {
				return err
			}
			_, err = conn.Write([]byte("?"))
			conn.Close()
			if err != nil {
				return err
			}
		}
		return nil
	}
	// left are the flows that there are, as who sends to whom, and who really answers.
	left := func() (out []string) {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			var all []*netlink.ConntrackFlow
			netspacetest.In(t, path, func() (err error) {
				all, err = netlink.ConntrackTableList(netlink.ConntrackTable, family)
				return err
			})
			for _, f := range all {
				if f.Forward.Protocol == unix.IPPROTO_UDP {
					out = append(out, f.Forward.SrcIP.String()+" "+f.Forward.DstIP.String()+" "+f.Reverse.SrcIP.String())
				}
			}
		}
		slices.Sort(out)
		return out
	}
	const want = 6
	netspacetest.In(t, path, send)
	before := left()
	for end := time.Now().Add(5 * time.Second); len(before) < want && time.Now().Before(end); before = left() {
		netspacetest.In(t, path, send) // new addresses of IPv6 take a moment to be of use
	}
	if len(before) != want || !slices.Contains(before, "10.98.1.3 10.98.1.1 10.98.1.2") {
		t.Fatalf("%d flows, want %d: %q", len(before), want, before)
	}
	if n, err := Forget(path); n != 0 || err != nil {
		t.Errorf("nobody's: %d, %v", n, err)
	}
	if n, err := Forget(path, netip.MustParseAddr(own[0]), netip.MustParseAddr(own[1])); n != 5 || err != nil {
		t.Errorf("%d forgotten, %v", n, err)
	}
	if got := left(); !slices.Equal(got, []string{"fd98::3 fd98::1 fd98::1"}) {
		t.Errorf("left: %q", got)
	}
	if n, err := Forget(path, netip.MustParseAddr(others[1])); n != 1 || err != nil || len(left()) > 0 {
		t.Errorf("the last one: %d, %v, %q", n, err, left())
	}
}

// TestReplaced: what took the place of a flow after it was listed stays, though it was begun from
// the same port and the kernel gives it the same number.
func TestReplaced(t *testing.T) {
	path := netspacetest.Namespace(t, "node")
	netspacetest.Up(t, path, "lo", "10.98.1.1/24", "10.98.1.2/32", "10.98.1.3/32")
	lead := func(to string) {
		c := exec.Command("nft", "-f", "-")
		c.Stdin = strings.NewReader("table ip t { chain c { type nat hook output priority -100; }; }; flush chain ip t c; add rule ip t c ip daddr 10.98.1.1 udp dport 53 dnat to " + to)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	netspacetest.In(t, path, func() error {
		// An entry takes the place of another one on the same processor.
		var before, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &before); err != nil {
			return err
		}
		for cpu := 0; one.Count() == 0; cpu++ {
			if before.IsSet(cpu) {
				one.Set(cpu)
			}
		}
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		defer func() { _ = unix.SchedSetaffinity(0, &before) }()
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(10, 98, 1, 1), Port: 4000}}
		conn, err := d.Dial("udp", "10.98.1.1:53")
		if err != nil {
			return err
		}
		defer conn.Close()
		send := func() {
			_, err := conn.Write([]byte("?"))
			for errors.Is(err, unix.ECONNREFUSED) { // what became of the one before: nothing was sent
				_, err = conn.Write([]byte("?"))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		table, err := Open()
		if err != nil {
			return err
		}
		defer table.Close()
		same := 0
		for range 20 {
			lead("10.98.1.2")
			send()
			lead("10.98.1.3") // for who comes next
			if n, err := table.Delete(unix.AF_INET, func(f *Flow) bool {
				if f.Reply.Src.String() != "10.98.1.2:53" {
					return false
				}
				if err := table.delete(f); err != nil {
					t.Fatal(err)
				}
				send()
				if _, err := table.Delete(unix.AF_INET, func(now *Flow) bool {
					if now.Orig == f.Orig && now.Reply != f.Reply && bytes.Equal(within(now.attrs, nl.CTA_ID), within(f.attrs, nl.CTA_ID)) {
						same++
					}
					return false
				}); err != nil {
					t.Fatal(err)
				}
				return true
			}); n != 1 || err != nil {
				t.Fatalf("%d flows of the old endpoint: %v", n, err)
			}
			if n, err := table.Delete(unix.AF_INET, func(f *Flow) bool { return f.Reply.Src.String() == "10.98.1.3:53" }); n != 1 || err != nil {
				t.Fatalf("%d flows of the new endpoint: %v", n, err)
			}
		}
		t.Logf("%d of 20 had the number of their predecessors", same)
		return nil
	})
}
