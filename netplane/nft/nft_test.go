package nft_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/diff"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kernel is the real one, in namespaces.
type kernel struct {
	*netplanetest.Lab
	t testing.TB
}

func (k *kernel) Services() (s netplane.Services, err error) {
	err = netspace.Do(k.Path[netplanetest.Node], func() error {
		n, err := nft.New("", slog.New(slog.DiscardHandler))
		if err == nil {
			k.t.Cleanup(func() { n.Close() })
		}
		s = n
		return err
	})
	return s, err
}

func (k *kernel) in(fn func(c *nftables.Conn) error) error {
	return netspace.Do(k.Path[netplanetest.Node], func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		return errors.Join(fn(c), c.Flush())
	})
}

// Tamper deletes one endpoint of a service.
func (k *kernel) Tamper(p render.Port) error {
	return k.in(func(c *nftables.Conn) error {
		set := nft.EndpointSet(p.Addr)
		es, err := c.GetSetElements(set)
		if err != nil {
			return err
		}
		for _, e := range es {
			if string(e.Key[4:]) == nft.PortKey(p) {
				return c.SetDeleteElements(set, []nftables.SetElement{{Key: e.Key}})
			}
		}
		return fmt.Errorf("no endpoint of %s", p)
	})
}

// Break empties a chain of every table.
func (k *kernel) Break() error {
	return k.in(func(c *nftables.Conn) error {
		ts, err := c.ListTables()
		for _, t := range ts {
			c.FlushChain(&nftables.Chain{Name: "filter_forward", Table: t})
		}
		return err
	})
}

func (k *kernel) Leftovers() (string, error) {
	var names []string
	err := k.in(func(c *nftables.Conn) error {
		ts, err := c.ListTables()
		for _, t := range ts {
			names = append(names, t.Name)
		}
		return err
	})
	return strings.Join(names, " "), err
}

func TestConformance(t *testing.T) {
	t.Parallel()
	netplanetest.Run(t, &kernel{netplanetest.NewLab(t), t})
}

// TestCompare: random packets end in the kernel as they do in memory.
func TestCompare(t *testing.T) {
	t.Parallel()
	netplanetest.Compare(t, &kernel{netplanetest.NewLab(t), t})
}

// TestAffinityEnds: a client is remembered for as long as the service says. Time has to pass
// in the kernel, hence the sleep.
func TestAffinityEnds(t *testing.T) {
	t.Parallel()
	k := &kernel{netplanetest.NewLab(t), t}
	s, err := k.Services()
	if err != nil {
		t.Fatal(err)
	}
	n := netplanetest.Nets[0]
	svc := render.Service{
		Port:      render.Port{Addr: n.Service(1), Proto: render.TCP, Port: 80},
		Endpoints: n.Endpoints(netplanetest.TCPPort, netplanetest.Pods...), Affinity: time.Second,
	}
	if _, err := s.Sync(t.Context(), render.Table{Services: []render.Service{svc}, Range: only(n.Range), Cluster: only(n.Cluster), Pods: only(n.Pods)}); err != nil {
		t.Fatal(err)
	}
	seen := map[netip.AddrPort]bool{}
	for range 15 { // all the same once in five million times
		v, err := k.Send(netplanetest.Pod1, render.TCP, netip.AddrPortFrom(svc.Addr, svc.Port.Port))
		if err != nil || !v.To.IsValid() {
			t.Fatalf("%+v, %v", v, err)
		}
		if seen[v.To] = true; len(seen) > 1 {
			return
		}
		time.Sleep(1200 * time.Millisecond)
	}
	t.Errorf("a client that is to be forgotten after a second always reached %v", seen)
}

// TestListed: the tool that operators look with can print what is there.
func TestListed(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Fatalf("%v; run: go tool task setup", err)
	}
	k := &kernel{netplanetest.NewLab(t), t}
	s, err := k.Services()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range netplanetest.Nets {
		tb := render.Table{
			Range: only(n.Range), Cluster: only(n.Cluster), Pods: only(n.Pods),
			Services: []render.Service{
				{Port: render.Port{Addr: n.Service(1), Proto: render.TCP, Port: 80}, Endpoints: n.Endpoints(8080, netplanetest.Pods...)},
				{Port: render.Port{Addr: n.Service(2), Proto: render.TCP, Port: 80}, Endpoints: n.Endpoints(8080, netplanetest.Pods...), Affinity: 3600e9},
				{Port: render.Port{Addr: n.Service(3), Proto: render.TCP, Port: 80}},
				{Port: render.Port{Addr: n.Service(4), Proto: render.TCP, Port: 80}, Drop: true},
				{Port: render.Port{Addr: n.Service(5), Proto: render.TCP, Port: 80}, Endpoints: n.Endpoints(8080, netplanetest.Pods...),
					Split: true, Outside: n.Endpoints(8080, netplanetest.Pod1, netplanetest.Pod2), Affinity: 3600e9, Sources: only(n.Cluster)},
				{Port: render.Port{Addr: n.Service(6), Proto: render.TCP, Port: 80}, Endpoints: n.Endpoints(8080, netplanetest.Pods...), Split: true},
			},
			Announced: only(n.Announced), Near: []netip.Addr{n.Addr[netplanetest.Pod1]},
		}
		if _, err := s.Sync(t.Context(), tb); err != nil {
			t.Fatal(err)
		}
		var out []byte
		netspacetest.In(t, k.Path[netplanetest.Node], func() (err error) {
			out, err = exec.Command("nft", "list", "ruleset").CombinedOutput()
			return err
		})
		t.Logf("%s", out)
		for _, want := range []string{"table " + map[bool]string{true: "ip", false: "ip6"}[n.Service(1).Is4()] + " decree", "numgen random mod 3", n.Service(1).String() + " . tcp . 80 : 0x00000003",
			"0x00000003 : goto lb_3", "0x00000000 : drop", " : goto out_2_3600", n.Service(4).String() + " . tcp . 80 : 0x00000000", "numgen random mod 2 offset 2147483648",
			n.Service(5).String() + " . tcp . 80 . " + n.Cluster.String(), n.Service(6).String() + " . tcp . 80 : 0x00000000"} {
			if !strings.Contains(string(out), want) {
				t.Errorf("%q is not in the listing", want)
			}
		}
	}
}

// TestGrowing: what is read is what is there, while the kernel makes hash tables larger in the
// background, which takes it longer when it has no processor.
func TestGrowing(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		t.Logf("%v: nothing keeps the kernel's workers from being quick", err) // such as in a cgroup without a share
	}
	defer unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr}, 0)
	ns := netspacetest.Namespace(t, "node")
	tb := manyServices(3000)
	for i := range 40 {
		s := open(t, ns)
		if _, err := s.Sync(t.Context(), tb); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 { // the next process finds nothing to do
			next := open(t, ns)
			if n, err := next.Sync(t.Context(), tb); err != nil || n != 0 {
				t.Errorf("in round %d another process makes %d changes; %v", i, n, err)
			}
			next.Close()
		}
		if got, err := s.Read(t.Context()); err != nil || !got.Equal(tb) {
			t.Fatalf("in round %d other %d services are read back; %v", i, len(diff.Services(got.Services, tb.Services)), err)
		}
		if err := errors.Join(s.Purge(t.Context()), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBalancers: those that are not found by their number are repaired, and those that no
// service needs any more are removed once they are many.
func TestBalancers(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	s := open(t, ns)
	n := netplanetest.Nets[0]
	sized := func(sizes int, affinity time.Duration) (tb render.Table) {
		tb.Range = only(n.Range)
		for i := range sizes {
			svc := render.Service{Port: render.Port{Addr: n.Service(1), Proto: render.TCP, Port: uint16(1 + i)}, Affinity: affinity}
			for j := range 1 + i {
				svc.Endpoints = append(svc.Endpoints, netip.AddrPortFrom(n.Addr[netplanetest.Pod1], uint16(1+j)))
			}
			tb.Services = append(tb.Services, svc)
		}
		return tb
	}
	sync := func(tb render.Table) int {
		t.Helper()
		changed, err := s.Sync(t.Context(), tb)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.Read(t.Context()); err != nil || !got.Equal(tb) {
			t.Fatalf("%v; read back\n%+v\nof\n%+v", err, got, tb)
		}
		return changed
	}
	few := sized(3, 24*time.Hour)
	few.Services = append(few.Services, render.Service{Port: render.Port{Addr: n.Service(2), Proto: render.TCP, Port: 80}, Drop: true})
	sync(few)
	before := list(t, ns)
	for _, tamper := range []string{"flush map ip decree balancers", "delete element ip decree balancers { 0x00000000 }",
		"add element ip decree balancers { 0x00000077 : drop }", "flush chain ip decree lb_2_86400"} {
		netspacetest.In(t, ns, func() error {
			out, err := exec.Command("nft", strings.Fields(tamper)...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("nft %s: %w: %s", tamper, err, out)
			}
			return nil
		})
		if _, err := s.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		if changed := sync(few); changed == 0 && list(t, ns) != before {
			t.Errorf("%s is not found", tamper)
		}
		if after := list(t, ns); after != before {
			t.Errorf("%s: before\n%s\nafter\n%s", tamper, before, after)
		}
	}
	sync(sized(100, 0))
	if got := strings.Count(list(t, ns), "chain lb_"); got != 103 {
		t.Errorf("%d balancers for 100 sizes, and 3 before", got)
	}
	sync(sized(1, 0))
	if got := strings.Count(list(t, ns), "chain lb_"); got != 8 {
		t.Errorf("%d balancers for one size, and those that are there always", got)
	}
}

func only(p netip.Prefix) []netip.Prefix { return []netip.Prefix{p} }

// TestClosed: after Close nothing is touched, in this namespace or another.
func TestClosed(t *testing.T) {
	ns := netspacetest.Namespace(t, "node")
	err := netspace.Do(ns, func() error {
		s, err := nft.New("", slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		if err := errors.Join(s.Close(), s.Close()); err != nil {
			return err
		}
		_, err = s.Sync(t.Context(), manyServices(1))
		_, rerr := s.Read(t.Context())
		for _, err := range []error{err, rerr, s.Purge(t.Context())} {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("after Close: %v", err)
			}
		}
		c, err := nftables.New()
		if err != nil {
			return err
		}
		ts, err := c.ListTables()
		if len(ts) > 0 {
			t.Errorf("%d tables made after Close", len(ts))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
