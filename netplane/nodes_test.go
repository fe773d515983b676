package netplane_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane"
	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace"
	"decree.dev/decree/netplane/netspace/netspacetest"
	"decree.dev/decree/netplane/overlay"
)

// machines are nodes with Planes, in two networks with a router between them: all but
// the last one in the first.
func machines(t *testing.T, count int) []*node {
	if vm.Inside() { // where each packet takes its time
		t.Parallel()
	}
	router := netspacetest.Namespace(t, "router")
	netspacetest.Switch(t, router, "br1", "192.168.1.254/24")
	netspacetest.Switch(t, router, "br2", "192.168.2.254/24")
	netspacetest.Forward(t, router)
	var nodes []*node
	for i := range count {
		network := 1
		if i == count-1 {
			network = 2
		}
		n := newNode(t)
		n.router = router
		uplink := fmt.Sprint("to", i+1)
		netspacetest.Link(t, router, uplink, n.netns, "eth0")
		netspacetest.Plug(t, router, uplink, fmt.Sprint("br", network))
		netspacetest.Up(t, n.netns, "eth0", fmt.Sprintf("192.168.%d.%d/24", network, i+1))
		netspacetest.Route(t, n.netns, "0.0.0.0/0", fmt.Sprintf("192.168.%d.254", network), "")
		n.name, n.address = fmt.Sprint("n", i+1), fmt.Sprintf("192.168.%d.%d", network, i+1)
		n.start()
		if got := n.plane.Backend(); vm.Inside() && got != netplane.IPVS {
			t.Fatalf("the kernel has IPVS, %s has %s", n.name, got)
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// desiredOn is [desired] as one of some nodes sees it.
func desiredOn(self *node, nodes []*node, backends ...netip.Addr) netplane.Desired {
	d := desired(backends...)
	d.Node, d.PodCIDRs = self.name, nil
	for i, n := range nodes {
		cidr := fmt.Sprintf("10.98.%d.0/24", i+1)
		d.Nodes = append(d.Nodes, &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: n.name}, Spec: corev1.NodeSpec{PodCIDRs: []string{cidr}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.address}}},
		})
		if n == self {
			d.PodCIDRs = []netip.Prefix{netip.MustParsePrefix(cidr)}
		}
	}
	return d
}

// TestNodes: pods of several nodes reach each other without translation, and a service
// from everywhere; a node that is lost and comes back costs the others nothing.
func TestNodes(t *testing.T) {
	nodes := machines(t, 3)
	var pods []string // namespaces
	var addrs []netip.Addr
	for i, n := range nodes {
		n.set(desiredOn(n, nodes))
		path, a := n.attach(fmt.Sprint("pod", i+1))
		pods, addrs = append(pods, path), append(addrs, a)
	}
	for _, n := range nodes {
		n.set(desiredOn(n, nodes, addrs...))
	}
	for i, from := range pods {
		for j, to := range addrs {
			if server, source := get(t, from, netip.AddrPortFrom(to, 8080)); source.Addr() != addrs[i] || server.Addr() != to {
				t.Errorf("pod %d is %s to pod %d", i+1, source, j+1)
			}
		}
		if mtu := podMTU(t, from); mtu != 1450 {
			t.Errorf("pod %d has an interface with MTU %d", i+1, mtu)
		}
	}
	for i, n := range nodes {
		for _, to := range addrs {
			get(t, n.netns, netip.AddrPortFrom(to, 8080))
		}
		for _, from := range []string{pods[i], n.netns} {
			reached := map[netip.Addr]bool{}
			for range 60 {
				server, _ := get(t, from, netip.AddrPortFrom(clusterIP, 80))
				reached[server.Addr()] = true
			}
			if len(reached) != 3 {
				t.Errorf("from %s of node %d the service leads to %v", from, i+1, reached)
			}
		}
	}

	far := nodes[2]
	far.stop() // the agent is gone; its node works on
	get(t, pods[0], netip.AddrPortFrom(addrs[2], 8080))
	for _, n := range nodes[:2] { // the node is removed from the cluster
		n.set(desiredOn(n, nodes[:2], addrs[:2]...))
	}
	if err := reach(pods[0], netip.AddrPortFrom(addrs[2], 8080)); err == nil {
		t.Error("pods of a node that was removed are still reached")
	}
	for range 20 {
		get(t, pods[0], netip.AddrPortFrom(clusterIP, 80))
	}
	far.start()
	for _, n := range nodes {
		n.set(desiredOn(n, nodes, addrs...))
	}
	get(t, pods[2], netip.AddrPortFrom(addrs[0], 8080))
	get(t, pods[0], netip.AddrPortFrom(addrs[2], 8080))
}

func podMTU(t *testing.T, netns string) (mtu int) {
	t.Helper()
	netspacetest.In(t, netns, func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			mtu = l.Attrs().MTU
		}
		return err
	})
	return mtu
}

// reach connects from a namespace.
func reach(netns string, to netip.AddrPort) error {
	return netspace.Do(netns, func() error {
		c, err := net.DialTimeout("tcp", to.String(), 500*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// TestEncryptionAsked: what a kernel cannot do is told, when it must not be done without.
func TestEncryptionAsked(t *testing.T) {
	n := newNode(t)
	for asked, refused := range map[netplane.Encryption]bool{"": false, netplane.EncryptNothing: false, "maybe": true} {
		n.cfg.Encryption = asked
		p, err := netplane.New(n.cfg)
		if (err != nil) != refused {
			t.Errorf("%q: %v", asked, err)
		}
		if err == nil {
			if p.PublicKey() != "" {
				t.Errorf("%q: there is a key", asked)
			}
			p.Close()
		}
	}
	able := netspace.Do(n.netns, overlay.Encrypts) == nil
	n.cfg.Encryption = netplane.EncryptAll
	switch p, err := netplane.New(n.cfg); {
	case err == nil && able:
		p.Close()
	case err == nil || able:
		t.Errorf("the kernel has WireGuard: %v; required: %v", able, err)
	case !strings.Contains(err.Error(), "WireGuard"):
		t.Error(err)
	}
	n.cfg.Encryption = netplane.EncryptPossible
	p, err := netplane.New(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if (p.PublicKey() != "") != able {
		t.Errorf("the kernel has WireGuard: %v; the key is %q", able, p.PublicKey())
	}

	// A network of the user's own is not Decree's to encrypt: that is said at the start.
	if err := os.MkdirAll(n.cfg.CNIConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	conf := `{"cniVersion": "1.0.0", "name": "mine", "plugins": [{"type": "ptp"}]}`
	if err := os.WriteFile(filepath.Join(n.cfg.CNIConfDir, "10-mine.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	n.cfg.Encryption = netplane.EncryptAll
	if p, err := netplane.New(n.cfg); err == nil {
		p.Close()
		t.Error("encryption is required of a network that is the user's own")
	} else if !strings.Contains(err.Error(), "CNI configuration") {
		t.Error(err)
	}
}
