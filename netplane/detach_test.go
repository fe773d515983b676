package netplane_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace/netspacetest"
)

// TestDetachForgets: connections of a pod end with it, those of others do not.
func TestDetachForgets(t *testing.T) {
	n := newNode(t)
	n.start()
	n.set(desired())
	one, a1 := n.attach("one")
	two, a2 := n.attach("two")
	n.set(desired(a2))
	get(t, one, netip.AddrPortFrom(clusterIP, 80))
	get(t, two, netip.AddrPortFrom(clusterIP, 80))
	for _, path := range []string{one, two} {
		netspacetest.In(t, path, func() error {
			c, err := net.Dial("udp", netip.AddrPortFrom(dnsIP, 53).String())
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte("?"))
			return err
		})
	}
	// flows are those of an address.
	flows := func(a netip.Addr) (found int) {
		t.Helper()
		netspacetest.In(t, n.netns, func() error {
			all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
			for _, f := range all {
				if strings.Contains(f.String()+" ", "="+a.String()+" ") {
					found++
				}
			}
			return err
		})
		return found
	}
	if flows(a1) < 2 || flows(a2) < 3 {
		t.Fatalf("the pods have %d and %d connections", flows(a1), flows(a2))
	}
	if err := n.plane.Detach(t.Context(), pod("one").UID, one); err != nil {
		t.Fatal(err)
	}
	if flows(a1) != 0 || flows(a2) < 2 {
		t.Errorf("%d connections of the pod that ended, %d of the other", flows(a1), flows(a2))
	}
	if err := n.plane.Detach(t.Context(), pod("one").UID, one); err != nil {
		t.Errorf("once more: %v", err)
	}
}
