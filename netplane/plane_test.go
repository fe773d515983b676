package netplane_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/netplane"
	clusterdns "decree.dev/decree/netplane/dns"
	"decree.dev/decree/netplane/front"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

// TestMain is three programs: the tests, an agent that some of them run, and its servers.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == front.Verb {
		if err := front.Main(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if folder := os.Getenv(agentVariable); folder != "" {
		os.Exit(runAgent(folder))
	}
	goleak.VerifyTestMain(m)
}

var (
	clusterIP = netip.MustParseAddr("10.97.0.80")
	dnsIP     = netip.MustParseAddr("10.97.0.10")
)

// desired is a network with one service "web" in front of some pods.
func desired(backends ...netip.Addr) netplane.Desired {
	var eps []discoveryv1.Endpoint
	for _, a := range backends {
		eps = append(eps, discoveryv1.Endpoint{Addresses: []string{a.String()}})
	}
	port, name := int32(8080), "http"
	return netplane.Desired{
		Node: "n1", Domain: "cluster.local", DNS: dnsIP,
		PodCIDRs:    []netip.Prefix{netip.MustParsePrefix("10.98.3.0/24")},
		ClusterCIDR: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")},
		ServiceCIDR: []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16")},
		Services: []*corev1.Service{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
			Spec:       corev1.ServiceSpec{ClusterIP: clusterIP.String(), Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
		}},
		Slices: []*discoveryv1.EndpointSlice{{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints:   eps, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		}},
	}
}

func pod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name)}}
}

// node is a network namespace with a Plane and servers in it.
type node struct {
	t             *testing.T
	netns         string
	name, address string // as one of several machines
	router        string // of those
	cfg           netplane.Config
	plane         *netplane.Plane
	serving       front.Config
	servers       *front.Servers
	stop          func()
}

func newNode(t *testing.T) *node {
	n := &node{t: t, netns: netspacetest.Namespace(t, "node")}
	dir := t.TempDir()
	n.cfg = netplane.Config{
		DataDir: filepath.Join(dir, "netplane"), CNIConfDir: filepath.Join(dir, "user"), NetNS: n.netns, Log: slog.New(slog.DiscardHandler),
	}
	n.serving = front.Config{ResolvConf: filepath.Join(dir, "resolv.conf"), NetNS: n.netns}
	return n
}

// start begins a Plane as a new process would.
func (n *node) start() {
	n.t.Helper()
	var err error
	n.cfg.Registerer = prometheus.NewRegistry()
	if n.plane, err = netplane.New(n.cfg); err != nil {
		n.t.Fatal(err)
	}
	if n.servers, err = front.New(n.serving, &front.Sockets{NetNS: n.netns}, nil, n.cfg.Log); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.plane.Run(ctx) }()
	var serving sync.WaitGroup
	serving.Go(func() { n.servers.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		serving.Wait()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			n.t.Errorf("Run: %v", err)
		}
		if err := n.plane.Close(); err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(n.stop)
}

func (n *node) set(d netplane.Desired) {
	n.t.Helper()
	n.servers.Set(front.Objects{Desired: d})
	if err := n.plane.Set(n.t.Context(), d); err != nil {
		n.t.Fatal(err)
	}
}

// attach gives a pod a namespace, its network, and a server.
func (n *node) attach(name string) (string, netip.Addr) {
	n.t.Helper()
	path := netspacetest.Namespace(n.t, name)
	addrs, err := n.plane.Attach(n.t.Context(), pod(name), path)
	if err != nil {
		n.t.Fatal(err)
	}
	netplanetest.ServeTCP(n.t, path, 8080)
	return path, addrs[0]
}

// get connects from a namespace and returns what the server says: its own address
// and the source it sees.
func get(t *testing.T, netns string, to netip.AddrPort) (server, source netip.AddrPort) {
	t.Helper()
	netspacetest.In(t, netns, func() error {
		c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		b, err := io.ReadAll(c)
		if err != nil {
			return err
		}
		a, f, _ := strings.Cut(string(b), " ")
		server, source = netip.MustParseAddrPort(a), netip.MustParseAddrPort(f)
		return nil
	})
	return netip.AddrPortFrom(server.Addr().Unmap(), server.Port()), netip.AddrPortFrom(source.Addr().Unmap(), source.Port())
}

// ask resolves a name from a namespace.
func ask(t *testing.T, netns, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	var m *dns.Msg
	netspacetest.In(t, netns, func() (err error) {
		req := new(dns.Msg).SetQuestion(name, qtype)
		// The server may be about to start listening.
		for end := time.Now().Add(5 * time.Second); ; {
			c := dns.Client{Net: network, Timeout: time.Second}
			m, _, err = c.Exchange(req, netip.AddrPortFrom(dnsIP, 53).String())
			if err == nil || time.Now().After(end) {
				return err
			}
		}
	})
	return m
}

// dump is everything that Purge must put back.
func (n *node) dump() string {
	n.t.Helper()
	var b strings.Builder
	netspacetest.In(n.t, n.netns, func() error {
		for _, c := range []string{
			"ip -o addr", "ip route show table all", "ip -6 route show table all", "nft list ruleset",
			"cat /proc/sys/net/ipv4/ip_forward", "cat /proc/sys/net/ipv6/conf/all/forwarding",
		} {
			out, err := exec.Command("sh", "-c", c).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w: %s; run: go tool task setup", c, err, out)
			}
			fmt.Fprintf(&b, "%s\n%s\n", c, out)
		}
		return nil
	})
	return b.String()
}

func TestPlane(t *testing.T) {
	n := newNode(t)
	before := n.dump()
	n.start()
	n.set(desired())
	ns1, a1 := n.attach("one")
	ns2, a2 := n.attach("two")
	if a1 == a2 {
		t.Fatalf("both pods have %s", a1)
	}
	n.set(desired(a1, a2))

	t.Run("service", func(t *testing.T) {
		vip := netip.AddrPortFrom(clusterIP, 80)
		for _, from := range []string{ns1, ns2, n.netns} {
			got := map[netip.Addr]int{}
			for range 40 {
				server, _ := get(t, from, vip)
				got[server.Addr()]++
			}
			if got[a1] == 0 || got[a2] == 0 {
				t.Errorf("from %s reached %v, want both of %s and %s", from, got, a1, a2)
			}
		}
	})
	t.Run("direct", func(t *testing.T) {
		if _, source := get(t, ns1, netip.AddrPortFrom(a2, 8080)); source.Addr() != a1 {
			t.Errorf("pod two sees %s, want pod one's %s", source, a1)
		}
	})
	t.Run("dns", func(t *testing.T) {
		for _, from := range []string{ns1, n.netns} {
			for _, network := range []string{"udp", "tcp"} {
				m := ask(t, from, network, "web.default.svc.cluster.local.", dns.TypeA)
				if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != clusterIP.String() {
					t.Errorf("from %s over %s: %v", from, network, m)
				}
			}
		}
		// Nothing but DNS is served on the address.
		err := netspace.Do(ns1, func() error {
			c, err := net.DialTimeout("tcp", netip.AddrPortFrom(dnsIP, 80).String(), 2*time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Error("port 80 of the DNS address is open")
		}
	})
	t.Run("attached", func(t *testing.T) {
		again, err := n.plane.Attach(t.Context(), pod("one"), ns1)
		if err != nil || len(again) != 1 || again[0] != a1 {
			t.Errorf("second attach: %v, %v; want %s", again, err, a1)
		}
		uids, err := n.plane.Attached(t.Context())
		if err != nil || fmt.Sprint(uids) != "[uid-one uid-two]" {
			t.Errorf("attached: %v, %v", uids, err)
		}
	})
	t.Run("health check", func(t *testing.T) { n.health(t, a1, a2) })
	t.Run("restart", func(t *testing.T) { n.restart(t, ns1, ns2, a1, a2) })
	t.Run("repair", func(t *testing.T) {
		netspacetest.In(t, n.netns, func() error { return exec.Command("nft", "flush", "ruleset").Run() })
		if err := n.plane.Repair(t.Context()); err != nil {
			t.Fatal(err)
		}
		get(t, ns1, netip.AddrPortFrom(clusterIP, 80))
	})
	t.Run("purge", func(t *testing.T) {
		n.stop()
		n.cfg.Registerer = nil
		p, err := netplane.New(n.cfg) // a process that knows nothing
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		for range 2 {
			if err := p.Purge(t.Context()); err != nil {
				t.Fatal(err)
			}
			if after := n.dump(); after != before {
				t.Errorf("before\n%s\nafter purge\n%s", before, after)
			}
			if _, err := os.Stat(n.cfg.DataDir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("data folder: %v", err)
			}
		}
	})
}

// health asks as a load balancer does.
func (n *node) health(t *testing.T, local, other netip.Addr) {
	t.Helper()
	d := desired(local, other)
	d.Node = "self"
	spec := &d.Services[0].Spec
	spec.Type, spec.ExternalTrafficPolicy, spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal, 30001
	ask := func() (code int) {
		t.Helper()
		netspacetest.In(t, n.netns, func() error {
			c, err := net.DialTimeout("tcp", "127.0.0.1:30001", 5*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			fmt.Fprintf(c, "GET / HTTP/1.0\r\n\r\n")
			_, err = fmt.Fscanf(c, "HTTP/1.0 %d", &code)
			return err
		})
		return code
	}
	n.set(d)
	if got := ask(); got != 503 {
		t.Errorf("without an endpoint here: %d", got)
	}
	d.Slices[0].Endpoints[0].NodeName = &d.Node
	n.set(d)
	if got := ask(); got != 200 {
		t.Errorf("with an endpoint here: %d", got)
	}
	n.set(desired(local, other))
	if err := reach(n.netns, netip.MustParseAddrPort("127.0.0.1:30001")); err == nil {
		t.Error("the health check of a service that is gone is answered")
	}
}

// restart ends the Plane and begins another, with a connection open all the time.
func (n *node) restart(t *testing.T, ns1, ns2 string, a1, a2 netip.Addr) {
	t.Helper()
	var ln net.Listener
	netspacetest.In(t, ns2, func() (err error) { ln, err = net.Listen("tcp", ":9000"); return err })
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, _ = io.Copy(c, c)
			c.Close()
		}
	}()
	d := desired(a1, a2)
	name, port, only := "echo", int32(9000), a2.String()
	d.Services = append(d.Services, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "echo"},
		Spec:       corev1.ServiceSpec{ClusterIP: "10.97.0.81", Ports: []corev1.ServicePort{{Name: name, Port: 7}}},
	})
	d.Slices = append(d.Slices, &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "echo-1", Labels: map[string]string{discoveryv1.LabelServiceName: "echo"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{only}}}, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
	})
	n.set(d)
	var c net.Conn
	netspacetest.In(t, ns1, func() (err error) {
		c, err = net.DialTimeout("tcp", "10.97.0.81:7", 5*time.Second)
		return err
	})
	defer c.Close()
	alive := func(when string) {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, len(when))
		if _, err := c.Write([]byte(when)); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != when {
			t.Fatalf("%s: %q, %v", when, buf, err)
		}
	}
	alive("before")
	n.stop()
	alive("while down")
	get(t, ns1, netip.AddrPortFrom(clusterIP, 80))
	get(t, n.netns, netip.AddrPortFrom(clusterIP, 80))
	n.start()
	alive("started")
	attached := make(chan struct{})
	go func() { // policies are not known before the first set
		defer close(attached)
		if again, err := n.plane.Attach(t.Context(), pod("one"), ns1); err != nil || again[0] != a1 {
			t.Errorf("attach before the first set: %v, %v; want %s", again, err, a1)
		}
	}()
	n.set(d)
	<-attached
	alive("after")
	ask(t, ns1, "udp", "echo.default.svc.cluster.local.", dns.TypeA)
}

// TestWithdraw: a pod is withdrawn once a table without it is in force, and not
// before the linger is over; a pod that is in no table at once.
func TestWithdraw(t *testing.T) {
	n := newNode(t)
	n.cfg.Linger = 50 * time.Millisecond
	n.start()
	defer n.stop()
	a, b := netip.MustParseAddr("10.98.3.2"), netip.MustParseAddr("10.98.3.3")
	d := desired(a, b)
	for i, uid := range []types.UID{"a", "b"} {
		d.Slices[0].Endpoints[i].TargetRef = &corev1.ObjectReference{Kind: "Pod", UID: uid}
	}
	n.set(d)
	if err := n.plane.Withdraw(t.Context(), "other"); err != nil {
		t.Error(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := n.plane.Withdraw(short, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("withdrawn while it is in the table: %v", err)
	}
	done := make(chan time.Time, 1)
	go func() {
		if err := n.plane.Withdraw(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		done <- time.Now()
	}()
	next := desired(a, b)
	yes, no := true, false
	next.Slices[0].Endpoints[0].TargetRef = d.Slices[0].Endpoints[0].TargetRef
	next.Slices[0].Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
	begun := time.Now()
	n.set(next)
	if took := (<-done).Sub(begun); took < n.cfg.Linger {
		t.Errorf("withdrawn after %s, before the linger was over", took)
	}
}

// TestStub: a domain with a name server of its own, which the node reaches.
func TestStub(t *testing.T) {
	n := newNode(t)
	var conn net.PacketConn
	netspacetest.In(t, n.netns, func() (err error) {
		conn, err = net.ListenPacket("udp", "127.0.0.1:0")
		return err
	})
	const name = "www.corp.example."
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(192, 0, 2, 9)}}
		_ = w.WriteMsg(m) // or the client asks again
	})}
	ended := make(chan error, 1)
	go func() { ended <- server.ActivateAndServe() }()
	t.Cleanup(func() {
		_ = server.Shutdown()
		<-ended
	})
	stub, err := clusterdns.ParseStub("corp.example=" + conn.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	n.serving.Stubs = []clusterdns.Stub{stub}
	n.start()
	n.set(desired())
	if m := ask(t, n.netns, "udp", name, dns.TypeA); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.9" {
		t.Errorf("%s", m)
	}
}
