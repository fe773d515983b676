package reach

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"

	"decree.dev/decree/netplane/netcheck"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	far4, far6 = netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8:2::2")
	families   = map[string]netip.Addr{"ipv4": far4, "ipv6": far6}
)

// lab is two hosts with a router between them.
func lab(t *testing.T) (near, router, far string) {
	t.Parallel()
	near, router, far = netspacetest.Namespace(t, "near"), netspacetest.Namespace(t, "router"), netspacetest.Namespace(t, "far")
	for _, path := range []string{near, router, far} {
		netspacetest.In(t, path, func() error {
			// Without it a new interface is of no use to IPv6 for a second.
			return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644)
		})
	}
	netspacetest.Link(t, router, "near", near, "eth0")
	netspacetest.Link(t, router, "far", far, "eth0")
	netspacetest.Up(t, router, "near", "198.51.100.1/24", "2001:db8:1::1/64")
	netspacetest.Up(t, router, "far", "192.0.2.1/24", "2001:db8:2::1/64")
	netspacetest.Forward(t, router)
	netspacetest.Up(t, near, "eth0", "198.51.100.2/24", "2001:db8:1::2/64")
	netspacetest.Up(t, far, "eth0", "192.0.2.2/24", "2001:db8:2::2/64")
	for path, via := range map[string][2]string{near: {"198.51.100.1", "2001:db8:1::1"}, far: {"192.0.2.1", "2001:db8:2::1"}} {
		netspacetest.Route(t, path, "0.0.0.0/0", via[0], "")
		netspacetest.Route(t, path, "::/0", via[1], "")
	}
	await(t, near, "eth0")
	await(t, router, "near", "far")
	await(t, far, "eth0")
	return near, router, far
}

// await waits until interfaces carry packets: on a busy machine the kernel drops them for a
// second after an interface was set up.
func await(t *testing.T, path string, names ...string) {
	t.Helper()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	updates, done := make(chan netlink.LinkUpdate, 100), make(chan struct{})
	err = netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{Namespace: &ns, ListExisting: true})
	if err != nil {
		t.Fatal(err)
	}
	up := map[string]bool{}
	for u := range updates {
		a := u.Link.Attrs()
		if up[a.Name] = a.OperState == netlink.OperUp; !slices.ContainsFunc(names, func(n string) bool { return !up[n] }) {
			break
		}
	}
	close(done)
	for range updates { // until the subscription has ended
	}
}

func setMTU(t *testing.T, path, name string, mtu int) {
	t.Helper()
	netspacetest.In(t, path, func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, mtu)
	})
}

// one sends one probe.
func one(t *testing.T, from From, p netcheck.Probe) netcheck.Outcome {
	t.Helper()
	return Send(t.Context(), from, []netcheck.Probe{p})[0]
}

func TestEcho(t *testing.T) {
	near, router, far := lab(t)
	from := From{Node: near}
	for name, to := range families {
		p := netcheck.Probe{Kind: netcheck.NodeToNode, Address: to}
		if o := one(t, from, p); o.Error != "" || o.Latency <= 0 || o.Latency > Patience || o.Sent != echoes || o.Lost != 0 {
			t.Errorf("%s: %+v", name, o)
		}
	}
	// A router that says so: what is smaller passes, and connections find out.
	setMTU(t, router, "far", 1400)
	setMTU(t, far, "eth0", 1400)
	for name, to := range families {
		if o := one(t, from, netcheck.Probe{Kind: netcheck.NodeToNode, Address: to}); o.Error != "" {
			t.Errorf("%s: a smaller link that says so: %+v", name, o)
		}
	}
	// A link that loses what is too large, and says nothing.
	setMTU(t, far, "eth0", 1300)
	for name, to := range families {
		if o := one(t, from, netcheck.Probe{Kind: netcheck.NodeToNode, Address: to}); o.TooLarge != 1400 || o.Latency <= 0 || o.Lost != 0 || !strings.Contains(o.Error, "packets of 1400 bytes are lost") {
			t.Errorf("%s: a smaller link that does not say so: %+v", name, o)
		}
	}
	silent := []netcheck.Probe{{Kind: netcheck.NodeToNode, Address: netip.MustParseAddr("192.0.2.9")}, {Kind: netcheck.NodeToNode, Address: netip.MustParseAddr("2001:db8:2::9")}}
	for i, o := range Send(t.Context(), from, silent) {
		if o.Error != "no answer to 3 pings" || o.Lost != 3 || o.Latency != 0 || o.TooLarge != 0 {
			t.Errorf("%s: %+v", silent[i].Address, o)
		}
	}
	island := netspacetest.Namespace(t, "island")
	if o := one(t, From{Node: island}, netcheck.Probe{Kind: netcheck.NodeToNode, Address: far4}); !strings.Contains(o.Error, "unreachable") {
		t.Errorf("without a route: %+v", o)
	}
	if o := one(t, From{Node: near, Pod: island}, netcheck.Probe{Kind: netcheck.PodToPod, Address: far4}); !strings.Contains(o.Error, "unreachable") {
		t.Errorf("from a pod's namespace: %+v", o)
	}
}

func TestConnect(t *testing.T) {
	near, _, far := lab(t)
	var port uint16
	netspacetest.In(t, far, func() error {
		ln, err := net.Listen("tcp", ":0")
		if err == nil {
			port = uint16(ln.Addr().(*net.TCPAddr).Port)
			t.Cleanup(func() { ln.Close() })
		}
		return err
	})
	for name, to := range families {
		p := netcheck.Probe{Kind: netcheck.PodToService, Address: to, Port: port}
		if o := one(t, From{Pod: near}, p); o.Error != "" || o.Latency <= 0 {
			t.Errorf("%s: %+v", name, o)
		}
		p.Port = 1
		if o := one(t, From{Pod: near}, p); o.Error != "TCP port 1: connect: connection refused" {
			t.Errorf("%s: nobody listens: %+v", name, o)
		}
	}
}

func TestResolve(t *testing.T) {
	near, _, far := lab(t)
	started := make(chan struct{})
	server := &dns.Server{NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		name := q.Question[0].Name
		head := dns.RR_Header{Name: name, Rrtype: q.Question[0].Qtype, Class: dns.ClassINET, Ttl: 5}
		switch {
		case name == "silent.":
			return
		case name != "web.":
			m.Rcode = dns.RcodeNameError
		case head.Rrtype == dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: head, A: far4.AsSlice()})
		case head.Rrtype == dns.TypeAAAA:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: head, AAAA: far6.AsSlice()})
		default:
			m.Answer = append(m.Answer, &dns.TXT{Hdr: head, Txt: []string{"1.1.0"}})
		}
		_ = w.WriteMsg(m)
	})}
	netspacetest.In(t, far, func() (err error) {
		server.PacketConn, err = net.ListenPacket("udp", netip.AddrPortFrom(far4, 53).String())
		return err
	})
	ended := make(chan error)
	go func() { ended <- server.ActivateAndServe() }()
	<-started
	t.Cleanup(func() {
		if err := errors.Join(server.Shutdown(), <-ended); err != nil {
			t.Error(err)
		}
	})
	for _, tc := range []struct {
		name, error string
		want        netip.Addr
	}{
		{"web.", "", far4}, {"web.", "", far6}, {"web.", "", netip.Addr{}},
		{"web.", "web. resolves to [192.0.2.2], not to 192.0.2.9", netip.MustParseAddr("192.0.2.9")},
		{"none.", "none. does not resolve: NXDOMAIN, 0 answers", far4},
		{"silent.", "no answer to queries for silent.", far4},
	} {
		o := one(t, From{Pod: near}, netcheck.Probe{Kind: netcheck.PodToDNS, To: tc.name, Want: tc.want, Address: far4, Port: 53})
		if o.Error != tc.error || o.Error == "" && o.Latency <= 0 {
			t.Errorf("%s, %s: %+v", tc.name, tc.want, o)
		}
	}
}

// TestEnd: when time is up, what is under way ends and what is left is not begun.
func TestEnd(t *testing.T) {
	near, _, _ := lab(t)
	late := errors.New("there was no time left")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 200*time.Millisecond, late)
	defer cancel()
	probes := make([]netcheck.Probe, 500) // more than can be under way
	for i := range probes {
		probes[i] = netcheck.Probe{Kind: netcheck.NodeToNode, Address: netip.MustParseAddr("192.0.2.9")}
	}
	begun := time.Now()
	for _, o := range Send(ctx, From{Node: near}, probes) {
		if o.Error != late.Error() {
			t.Fatalf("%+v", o)
		}
	}
	if took := time.Since(begun); took > 2*Patience {
		t.Errorf("%s until the end", took)
	}
}
