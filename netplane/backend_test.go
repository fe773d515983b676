package netplane_test

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

// TestInKernel runs what needs IPVS in a stock kernel, and several nodes with IPVS on each.
func TestInKernel(t *testing.T) {
	if vm.Inside() {
		t.Skip("this is the machine")
	}
	plugins := []string{"/usr/lib/cni/ptp", "/usr/lib/cni/host-local"}
	vm.TestWith(t, 9*time.Minute, cmp.Or(os.Getenv("DECREE_TEST_RUN"), "^Test(Kernel|Nodes|Churn)"), plugins)
}

// TestKernelSwitch: with IPVS in the kernel it is the backend; each backend gives way to
// the other while a connection goes on and new ones are made, and nothing of it stays.
func TestKernelSwitch(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	t.Parallel()
	for _, n := range netplanetest.Nets {
		t.Run(n.Name, func(t *testing.T) { switchBackends(t, n) })
	}
}

func switchBackends(t *testing.T, n netplanetest.Net) {
	lab := netplanetest.NewLab(t)
	node := lab.Path[netplanetest.Node]
	p, err := netplane.New(netplane.Config{DataDir: t.TempDir(), NetNS: node})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	before := kernelState(t, node) // with IPVS loaded
	if got := p.Backend(); got != netplane.IPVS {
		t.Fatalf("the kernel has IPVS, the backend is %q", got)
	}
	to := netip.AddrPortFrom(n.Service(1), 80)
	if err := p.Set(t.Context(), labDesired(n, to)); err != nil {
		t.Fatal(err)
	}
	lines(t, lab.Path[netplanetest.Pod2], linePort)
	var talks []net.Conn
	for _, b := range []netplane.Backend{netplane.IPVS, netplane.NFTables, netplane.IPVS, netplane.NFTables} {
		if err := p.Switch(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		if got := p.Backend(); got != b {
			t.Errorf("the backend is %q, want %q", got, b)
		}
		for _, from := range []netplanetest.Host{netplanetest.Pod1, netplanetest.Outside, netplanetest.Node} {
			netspacetest.In(t, lab.Path[from], func() error {
				c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
				if err == nil {
					talks = append(talks, c)
				}
				return err
			})
		}
		for i, c := range talks {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			fmt.Fprintln(c, "still here")
			if got, err := bufio.NewReader(c).ReadString('\n'); err != nil || got != "still here\n" {
				t.Errorf("with %s, connection %d of %d: %q, %v", b, i, len(talks), got, err)
			}
		}
	}
	for _, c := range talks {
		c.Close()
	}
	if err := p.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := kernelState(t, node); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

const linePort = 9090

// lines serves back what it is told, line by line.
func lines(t *testing.T, path string, port int) {
	netspacetest.In(t, path, func() error {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					defer context.AfterFunc(t.Context(), func() { c.Close() })() // of a client that is gone without a word
					for sc := bufio.NewScanner(c); sc.Scan(); {
						fmt.Fprintln(c, sc.Text())
					}
				}()
			}
		}()
		return nil
	})
}

// labDesired is a cluster with one service in front of Pod2.
func labDesired(n netplanetest.Net, at netip.AddrPort) netplane.Desired {
	port, name, family := int32(linePort), "p", discoveryv1.AddressTypeIPv4
	if at.Addr().Is6() {
		family = discoveryv1.AddressTypeIPv6
	}
	return netplane.Desired{
		Node: "n1", Domain: "cluster.local",
		PodCIDRs: []netip.Prefix{n.Pods}, ClusterCIDR: []netip.Prefix{n.Cluster}, ServiceCIDR: []netip.Prefix{n.Range},
		Services: []*corev1.Service{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
			Spec:       corev1.ServiceSpec{ClusterIP: at.Addr().String(), Ports: []corev1.ServicePort{{Name: name, Port: int32(at.Port())}}},
		}},
		Slices: []*discoveryv1.EndpointSlice{{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			AddressType: family, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{n.Addr[netplanetest.Pod2].String()}}},
		}},
	}
}

// kernelState is what the kernel holds of IPVS, routing rules and settings. The machine
// has no nft command; that both backends remove their tables is tested where they are.
// Links to pods, which Purge removes, are not of interest.
func kernelState(t *testing.T, ns string) string {
	var b strings.Builder
	netspacetest.In(t, ns, func() error {
		out, err := exec.Command("sh", "-c", "cat /proc/net/ip_vs; grep . /proc/sys/net/ipv4/vs/*; ip rule; ip -6 rule; ip route show table 214; ip -6 route show table 214; true").CombinedOutput()
		b.Write(out)
		return err
	})
	return b.String()
}
