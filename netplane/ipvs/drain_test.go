package ipvs_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

// echoPort is where pods echo lines, on connections that last.
const echoPort = 9090

// echo serves lines in a namespace: "own address line".
func echo(t *testing.T, path string) {
	netspacetest.In(t, path, func() error {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", echoPort))
		if err != nil {
			return err
		}
		var mu sync.Mutex
		var all []net.Conn
		t.Cleanup(func() { // nobody may have told the server that they ended
			ln.Close()
			mu.Lock()
			defer mu.Unlock()
			for _, c := range all {
				c.Close()
			}
		})
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				all = append(all, c)
				mu.Unlock()
				go func() {
					for sc := bufio.NewScanner(c); sc.Scan(); {
						fmt.Fprintf(c, "%s %s\n", c.LocalAddr(), sc.Text())
					}
				}()
			}
		}()
		return nil
	})
}

// talk is a connection that lasts.
type talk struct {
	c  net.Conn
	in *bufio.Reader
}

func dial(t *testing.T, path string, to render.Port) *talk {
	t.Helper()
	var c net.Conn
	netspacetest.In(t, path, func() (err error) {
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to.Addr, to.Port).String(), 5*time.Second)
		return err
	})
	t.Cleanup(func() { c.Close() })
	return &talk{c, bufio.NewReader(c)}
}

// say sends a line and returns who answers.
func (k *talk) say(line string) (string, error) {
	_ = k.c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintln(k.c, line); err != nil {
		return "", err
	}
	answer, err := k.in.ReadString('\n')
	if err != nil {
		return "", err
	}
	who, said, _ := strings.Cut(strings.TrimSpace(answer), " ")
	if said != line {
		return "", fmt.Errorf("said %q, heard %q", line, said)
	}
	return who, nil
}

// stage is a node with services and pods that echo.
type stage struct {
	*kernel
	t *testing.T
	n netplanetest.Net
	s *ipvs.Services
}

// stages runs a test in both families.
func stages(t *testing.T, cfg ipvs.Config, run func(*stage)) {
	inside(t)
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel()
			st := &stage{kernel: newKernel(t), t: t, n: n}
			for _, p := range netplanetest.Pods {
				echo(t, st.Path[p])
			}
			st.s = open(t, st.node(), cfg)
			run(st)
		})
	}
}

func (st *stage) port() render.Port {
	return render.Port{Addr: st.n.Service(1), Proto: render.TCP, Port: 80}
}

func (st *stage) table(pods ...netplanetest.Host) render.Table {
	return render.Table{
		Range: []netip.Prefix{st.n.Range}, Cluster: []netip.Prefix{st.n.Cluster}, Pods: []netip.Prefix{st.n.Pods},
		Services: []render.Service{{Port: st.port(), Endpoints: st.n.Endpoints(echoPort, pods...)}},
	}
}

func (st *stage) sync(t render.Table) {
	st.t.Helper()
	if _, err := st.s.Sync(st.t.Context(), t); err != nil {
		st.t.Fatal(err)
	}
}

func (st *stage) dump() (out string) {
	st.t.Helper()
	netspacetest.In(st.t, st.node(), func() (err error) {
		out, err = dump()
		return err
	})
	return out
}

// settle syncs until nothing drains: connections end a little after they are closed.
func (st *stage) settle(t render.Table) {
	st.t.Helper()
	ctx, cancel := context.WithTimeout(st.t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for st.sync(t); st.s.Draining() > 0; st.sync(t) {
		select {
		case <-ctx.Done():
			st.t.Fatalf("still draining:\n%s", st.dump())
		case <-tick.C:
		}
	}
}

// TestKernelDrain: connections outlive the removal of their endpoint, and of their
// service; new ones go elsewhere, or are refused. What is left goes with them.
func TestKernelDrain(t *testing.T) {
	stages(t, ipvs.Config{}, func(st *stage) {
		for _, from := range []netplanetest.Host{netplanetest.Pod1, netplanetest.Outside, netplanetest.Node} {
			st.sync(st.table(netplanetest.Pod2))
			k := dial(st.t, st.Path[from], st.port())
			first, err := k.say("before")
			if err != nil {
				st.t.Fatal(err)
			}
			st.sync(st.table(netplanetest.Pod3))
			st.sync(st.table(netplanetest.Pod3))
			if who, err := k.say("after"); who != first || err != nil {
				st.t.Fatalf("from %s, after its endpoint went: %q, %v; was %q\n%s", from, who, err, first, st.dump())
			}
			if who, err := dial(st.t, st.Path[from], st.port()).say("new"); who == first || err != nil {
				st.t.Errorf("from %s, a new connection: %q, %v", from, who, err)
			}
			gone := st.table()
			gone.Services = nil
			for _, step := range []render.Table{st.table(), gone} {
				st.sync(step)
				if who, err := k.say("closed"); who != first || err != nil {
					st.t.Fatalf("from %s, after its service went: %q, %v; was %q\n%s", from, who, err, first, st.dump())
				}
				if v, err := st.Send(from, render.TCP, netip.AddrPortFrom(st.port().Addr, st.port().Port)); err != nil || !v.Rejected {
					st.t.Errorf("from %s, a new connection to no service: %+v, %v", from, v, err)
				}
			}
			got, err := st.s.Read(st.t.Context())
			if err != nil || !got.Equal(gone) {
				st.t.Errorf("what drains is read back: %+v, %v", got, err)
			}
			k.c.Close()
		}
	})
}

// TestKernelDrained: what drains is removed with its last connection, and so is a
// service; another process knows what to wait for.
func TestKernelDrained(t *testing.T) {
	stages(t, ipvs.Config{}, func(st *stage) {
		st.sync(st.table(netplanetest.Pod2))
		k := dial(st.t, st.Path[netplanetest.Pod1], st.port())
		if _, err := k.say("before"); err != nil {
			st.t.Fatal(err)
		}
		gone := st.table()
		gone.Services = nil
		st.sync(gone)
		st.s = open(st.t, st.node(), ipvs.Config{})
		if n, err := st.s.Sync(st.t.Context(), gone); n != 0 || err != nil || st.s.Draining() != 1 {
			st.t.Fatalf("a new process: %d operations, %v, %d services drain\n%s", n, err, st.s.Draining(), st.dump())
		}
		// By a reset, which IPVS forgets in ten seconds; it remembers an orderly end for two
		// minutes, whatever its timeouts are.
		if err := k.c.(*net.TCPConn).SetLinger(0); err != nil {
			st.t.Fatal(err)
		}
		k.c.Close()
		st.settle(gone)
		if got := st.dump(); strings.Contains(got, st.port().String()) {
			st.t.Errorf("left in the kernel:\n%s", got)
		}
	})
}

// TestKernelTwice: who is about to connect to an endpoint that goes does, although the first packet
// came twice, because the answer to it took long.
func TestKernelTwice(t *testing.T) {
	stages(t, ipvs.Config{}, func(st *stage) {
		want := st.n.Endpoints(echoPort, netplanetest.Pod2)[0].String()
		// The node first, as it hears what others say to services, too, and when they end.
		for _, from := range []netplanetest.Host{netplanetest.Node, netplanetest.Pod1, netplanetest.Outside} {
			got, quick := st.connectLate(from)
			for tries := 1; !quick && tries < 5; tries++ {
				got, quick = st.connectLate(from)
			}
			if got != want {
				st.t.Errorf("from %s: answered by %s, want %s", from, got, want)
			}
		}
	})
}

// connectLate connects to Pod2, which gives way to Pod3 before the client hears of the answer, and
// returns who answers in the end. It is not quick if the client may have sent its first packet so
// often that it is let through again.
func (st *stage) connectLate(from netplanetest.Host) (answered string, quick bool) {
	st.sync(st.table(netplanetest.Pod2))
	d := netspacetest.Deafen(st.t, st.Path[from])
	result := make(chan string, 1)
	go func() {
		var c net.Conn
		if err := netspace.Do(st.Path[from], func() (err error) {
			c, err = net.DialTimeout("tcp", netip.AddrPortFrom(st.port().Addr, st.port().Port).String(), 20*time.Second)
			return err
		}); err != nil {
			result <- err.Error()
			return
		}
		defer c.Close()
		who, err := (&talk{c, bufio.NewReader(c)}).say("hello")
		if err != nil {
			who = err.Error()
		}
		result <- who
	}()
	d.Missed(1)
	begun := time.Now()
	st.sync(st.table(netplanetest.Pod3))
	d.Missed(2) // the client has sent again, too, at the same time
	d.End()
	quick = time.Since(begun) < 2500*time.Millisecond
	return <-result, quick
}

// TestKernelGrace: connections that do not end in time are not waited for.
func TestKernelGrace(t *testing.T) {
	stages(t, ipvs.Config{Drain: 3 * time.Second}, func(st *stage) {
		st.sync(st.table(netplanetest.Pod2))
		k := dial(st.t, st.Path[netplanetest.Pod1], st.port())
		if _, err := k.say("before"); err != nil {
			st.t.Fatal(err)
		}
		st.sync(st.table(netplanetest.Pod3))
		if st.s.Draining() != 1 {
			st.t.Fatal("nothing drains")
		}
		st.settle(st.table(netplanetest.Pod3))
		if who, err := k.say("late"); err == nil {
			st.t.Errorf("%s still answers", who)
		}
	})
}

// TestKernelLost: endpoints on a node that is gone go at once, those that drain too.
func TestKernelLost(t *testing.T) {
	stages(t, ipvs.Config{}, func(st *stage) {
		pod2, pod3 := st.n.Addr[netplanetest.Pod2], st.n.Addr[netplanetest.Pod3]
		st.sync(st.table(netplanetest.Pod2, netplanetest.Pod3))
		var ks []*talk
		for range 2 {
			k := dial(st.t, st.Path[netplanetest.Pod1], st.port())
			if _, err := k.say("before"); err != nil {
				st.t.Fatal(err)
			}
			ks = append(ks, k)
		}
		st.sync(st.table(netplanetest.Pod3))
		if !strings.Contains(st.dump(), netip.AddrPortFrom(pod2, echoPort).String()+"*0(1)") {
			st.t.Fatalf("%s does not drain:\n%s", pod2, st.dump())
		}
		lost := st.table(netplanetest.Pod1)
		lost.Lost = []netip.Prefix{netip.PrefixFrom(pod2, pod2.BitLen()), netip.PrefixFrom(pod3, pod3.BitLen())}
		st.sync(lost)
		for _, a := range []netip.Addr{pod2, pod3} {
			if got := st.dump(); strings.Contains(got, netip.AddrPortFrom(a, echoPort).String()) {
				st.t.Errorf("%s is still there:\n%s", a, got)
			}
		}
		for _, k := range ks {
			if who, err := k.say("after"); err == nil {
				st.t.Errorf("%s answers from a node that is gone", who)
			}
		}
	})
}

// TestKernelLocal: servers of the node itself do not answer on service addresses,
// but for those that the table lists; not on a port without service, and not while
// there is none.
func TestKernelLocal(t *testing.T) {
	stages(t, ipvs.Config{}, func(st *stage) {
		netplanetest.ServeTCP(st.t, st.node(), 22, 53)
		tb := st.table(netplanetest.Pod2)
		tb.Local = []render.Port{{Addr: st.n.Service(10), Proto: render.TCP, Port: 53}}
		st.sync(tb)
		hosts := []netplanetest.Host{netplanetest.Pod1, netplanetest.Outside, netplanetest.Node}
		for _, from := range hosts {
			for _, at := range []netip.Addr{st.n.Service(1), st.n.Service(10), st.n.Service(99)} {
				if v, err := st.Send(from, render.TCP, netip.AddrPortFrom(at, 22)); err != nil || !v.Rejected {
					st.t.Errorf("from %s to sshd on %s: %+v, %v", from, at, v, err)
				}
			}
			if v, err := st.Send(from, render.TCP, netip.AddrPortFrom(st.n.Service(10), 53)); err != nil || !v.To.IsValid() {
				st.t.Errorf("from %s to DNS: %+v, %v", from, v, err)
			}
			if v, err := st.Send(from, render.TCP, netip.AddrPortFrom(st.n.Addr[netplanetest.Node], 22)); err != nil || !v.To.IsValid() {
				st.t.Errorf("from %s to sshd on the node's own address: %+v, %v", from, v, err)
			}
		}
		// A service with the port of a server of the node, and its end.
		tb.Services = slices.Clone(tb.Services)
		tb.Services[0].Port.Port = 22
		st.sync(tb)
		tb.Services = nil
		st.sync(tb)
		for _, from := range hosts {
			if v, err := st.Send(from, render.TCP, netip.AddrPortFrom(st.n.Service(1), 22)); err != nil || !v.Rejected {
				st.t.Errorf("from %s to a service that went: %+v, %v", from, v, err)
			}
		}
	})
}

// TestKernelPurge: the kernel is as it was, down to settings and to services that are
// somebody else's, whatever process purges.
func TestKernelPurge(t *testing.T) {
	stages(t, ipvs.Config{TCP: 100 * time.Second, UDP: 50 * time.Second}, func(st *stage) {
		foreign := render.Port{Addr: st.n.Addr[netplanetest.Node], Proto: render.TCP, Port: 8888}
		netspacetest.In(st.t, st.node(), func() error {
			return os.WriteFile("/proc/sys/net/ipv4/vs/expire_nodest_conn", []byte("1"), 0o644)
		})
		netspacetest.In(st.t, st.node(), func() error {
			return ipvs.Make(foreign, "wlc", netip.AddrPortFrom(st.n.Addr[netplanetest.Pod1], 1), 7)
		})
		before := st.dump()
		if !strings.Contains(before, foreign.String()+" wlc") {
			st.t.Fatalf("nothing of somebody else's:\n%s", before)
		}
		tb := st.table(netplanetest.Pod2)
		tb.Services = append(tb.Services, render.Service{Port: render.Port{Addr: st.n.Addr[netplanetest.Node], Proto: render.TCP, Port: 30080}, Endpoints: st.n.Endpoints(echoPort, netplanetest.Pod3)})
		slices.SortFunc(tb.Services, func(a, b render.Service) int { return a.Compare(b.Port) })
		for _, again := range []bool{false, true} {
			st.sync(tb)
			during := st.dump()
			for _, s := range []string{"conntrack 1", "timeouts 100 120 50", foreign.String() + " wlc", st.port().String() + " rr", "30080 rr"} {
				if !strings.Contains(during, s) {
					st.t.Errorf("%q is not in\n%s", s, during)
				}
			}
			if again {
				st.s = open(st.t, st.node(), ipvs.Config{}) // which knows nothing
			}
			if err := st.s.Purge(st.t.Context()); err != nil {
				st.t.Fatal(err)
			}
			if after := st.dump(); after != before {
				st.t.Errorf("before\n%safter\n%s", before, after)
			}
			st.s = open(st.t, st.node(), ipvs.Config{TCP: 100 * time.Second, UDP: 50 * time.Second})
		}
	})
}

// TestKernelDrift: settings, weights and schedulers that others change are seen and
// put right.
func TestKernelDrift(t *testing.T) {
	stages(t, ipvs.Config{TCP: 100 * time.Second}, func(st *stage) {
		tb := st.table(netplanetest.Pods...)
		st.sync(tb)
		want := st.dump()
		for name, change := range map[string]func() error{
			"sysctl":  func() error { return os.WriteFile("/proc/sys/net/ipv4/vs/conntrack", []byte("0"), 0o644) },
			"timeout": func() error { return ipvs.Timeout(7) },
			"weight":  func() error { return ipvs.Weigh(st.port(), 5) },
			"quiesce": func() error { return ipvs.Weigh(st.port(), 0) },
			"header":  func() error { return ipvs.Reschedule(st.port(), "sh") },
			"added": func() error {
				return ipvs.Make(render.Port{Addr: st.n.Service(7), Proto: render.TCP, Port: 7}, "rr", tb.Services[0].Endpoints[0], 1)
			},
		} {
			netspacetest.In(st.t, st.node(), change)
			if _, err := st.s.Read(st.t.Context()); err != nil {
				st.t.Fatal(err)
			}
			if n, err := st.s.Sync(st.t.Context(), tb); n != 1 || err != nil {
				st.t.Errorf("%s: %d operations, %v", name, n, err)
			}
			st.settle(tb)
			if got := st.dump(); got != want {
				st.t.Errorf("%s:\n%swant\n%s", name, got, want)
			}
		}
	})
}

func TestKernelProbe(t *testing.T) {
	inside(t)
	ns := netspacetest.Namespace(t, "node")
	if err := netspace.Do(ns, ipvs.Probe); err != nil {
		t.Fatal(err)
	}
	netspacetest.In(t, ns, func() error {
		if got, err := dump(); got != fresh || err != nil {
			t.Errorf("%v; left:\n%s", err, got)
		}
		return nil
	})
}
