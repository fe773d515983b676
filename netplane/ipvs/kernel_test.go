package ipvs_test

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/ipvs"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/render"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestInKernel runs every test named TestKernel... in a stock kernel, which has IPVS.
func TestInKernel(t *testing.T) {
	if vm.Inside() {
		t.Skip("this is the machine")
	}
	vm.Test(t, 8*time.Minute, cmp.Or(os.Getenv("DECREE_TEST_RUN"), "^TestKernel"), "-rapid.checks=6")
}

// inside skips tests that only a machine with IPVS can run; TestInKernel runs them, at
// the same time, because most of them wait for something.
func inside(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	t.Parallel()
}

// kernel is the real one, in namespaces.
type kernel struct {
	*netplanetest.Lab
	t testing.TB
}

func newKernel(t testing.TB) *kernel { return &kernel{netplanetest.NewLab(t), t} }

func (k *kernel) node() string { return k.Path[netplanetest.Node] }

func open(t testing.TB, ns string, cfg ipvs.Config) *ipvs.Services {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	var s *ipvs.Services
	netspacetest.In(t, ns, func() (err error) {
		s, err = ipvs.New(cfg)
		return err
	})
	t.Cleanup(func() { s.Close() })
	return s
}

func (k *kernel) Services() (netplane.Services, error) {
	return open(k.t, k.node(), ipvs.Config{}), nil
}

// Tamper deletes one endpoint of a service.
func (k *kernel) Tamper(p render.Port) error {
	return netspace.Do(k.node(), func() error { return ipvs.DeleteServer(p) })
}

// Break empties a chain of every table.
func (k *kernel) Break() error {
	return netspace.Do(k.node(), func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		ts, err := c.ListTables()
		for _, t := range ts {
			c.FlushChain(&nftables.Chain{Name: "unlisted_forward", Table: t})
		}
		return errors.Join(err, c.Flush())
	})
}

func (k *kernel) Leftovers() (left string, err error) {
	err = netspace.Do(k.node(), func() error {
		left, err = dump()
		return err
	})
	if left == fresh {
		left = ""
	}
	return left, err
}

// fresh is the dump of a network namespace that nobody touched.
const fresh = "vs/conntrack 0\nvs/expire_nodest_conn 0\nvs/expire_quiescent_template 0\ntcp_early_demux 1\nudp_early_demux 1\ntimeouts 900 120 300\n"

// dump is all that the kernel holds of services, in the current namespace.
func dump() (string, error) {
	var b strings.Builder
	for _, name := range []string{"vs/conntrack", "vs/expire_nodest_conn", "vs/expire_quiescent_template", "tcp_early_demux", "udp_early_demux"} {
		v, err := os.ReadFile("/proc/sys/net/ipv4/" + name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%s %s", name, v)
	}
	held, err := ipvs.Dump()
	if err != nil {
		return "", err
	}
	b.WriteString(held)
	c, err := nftables.New()
	if err != nil {
		return "", err
	}
	ts, err := c.ListTables()
	for _, t := range ts {
		fmt.Fprintf(&b, "table %v %s\n", t.Family, t.Name)
	}
	return b.String(), err
}

func TestKernelConformance(t *testing.T) {
	inside(t)
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) {
			t.Parallel() // each on machines of its own
			netplanetest.RunFamily(t, newKernel(t), n)
		})
	}
}

// TestKernelCompare: random services and packets end in IPVS as they do in memory.
func TestKernelCompare(t *testing.T) {
	inside(t)
	netplanetest.Compare(t, newKernel(t))
}

func TestProbeWithout(t *testing.T) {
	if _, err := os.Stat("/proc/net/ip_vs"); err == nil || vm.Inside() {
		t.Skip("this kernel has IPVS")
	}
	if err := netspace.Do(netspacetest.Namespace(t, "node"), ipvs.Probe); !errors.Is(err, ipvs.ErrMissing) {
		t.Errorf("probing a kernel without IPVS: %v", err)
	}
}

// TestKernelRefused: however much is refused at once, the kernel's reason is what is told.
func TestKernelRefused(t *testing.T) {
	inside(t)
	var ports []render.Port
	for i := range 10000 {
		ports = append(ports, render.Port{Addr: netplanetest.Nets[1].Service(1), Proto: render.TCP, Port: uint16(1 + i)})
	}
	err := netspace.Do(netspacetest.Namespace(t, "node"), func() error { return ipvs.RemoveMany(ports) })
	if !errors.Is(err, unix.ESRCH) || !strings.Contains(err.Error(), ports[0].String()) {
		t.Errorf("%v", err)
	}
}
