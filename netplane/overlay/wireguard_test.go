package overlay

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"decree.dev/decree/netplane/netplanetest/vm"
	"decree.dev/decree/netplane/netspace/netspacetest"
)

// TestInKernel runs what needs WireGuard in a stock kernel.
func TestInKernel(t *testing.T) {
	if vm.Inside() {
		t.Skip("this is the machine")
	}
	vm.Test(t, 3*time.Minute, "^TestKernel")
}

// TestLoadKey: a key is made once, nobody else can read it, and one that is damaged is
// not replaced in silence.
func TestLoadKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "key")
	first, err := LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := LoadKey(path)
	if err != nil || first != second || first == (wgtypes.Key{}) {
		t.Errorf("%v and %v, %v", first.PublicKey(), second.PublicKey(), err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := os.WriteFile(path, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(path); err == nil {
		t.Error("a damaged key is taken")
	}
}

// encrypt gives machines keys, and tells all of them.
func (l *lab) encrypt(required bool, which ...int) {
	for i, m := range l.machines {
		w := WireGuard{Required: required}
		if slices.Contains(which, i) {
			key, err := wgtypes.GeneratePrivateKey()
			if err != nil {
				l.t.Fatal(err)
			}
			w.Key = key
		}
		m.overlay, m.Key = New(Config{WireGuard: w}), w.PublicKey()
	}
}

// zeros are what ask sends; no packet of any kind of the lab's own has as many.
var zeros = make([]byte, 200)

// TestKernelEncrypted: every pod reaches every pod with its own address and every node
// every pod, in both families, and who listens between the nodes reads nothing.
func TestKernelEncrypted(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	l := newLab(t)
	tap := netspacetest.Listen(t, l.router)
	before := dump(t, l.machines[0].node)
	l.encrypt(true, 0, 1, 2)
	l.syncAll()
	for _, a := range l.machines {
		for _, b := range l.machines {
			if a == b {
				continue
			}
			for f := range 2 {
				for _, from := range []string{a.pod, a.node} {
					seen, err := ask(from, b.podAddr(f), 1000)
					if want := a.podAddr(f).String(); err != nil || from == a.pod && seen != want {
						t.Errorf("%s to pod of %s: seen as %q, %v", from, b.Node, seen, err)
					}
				}
			}
		}
	}
	n1, n3 := l.machines[0], l.machines[2]
	if p, n := l.sync(n1, l.others(n1)); n != 0 || p.MTU != 1440 || len(p.Sealed.Peers) != 2 || p.Device != nil {
		t.Errorf("a second Sync changed %d things: %s", n, text(p))
	}
	if _, err := ask(n1.pod, n3.podAddr(0), 1440-28); err != nil {
		t.Errorf("a packet of the size of the MTU: %v", err)
	}
	if all, with := tap.Seen(zeros); all < 12 || with > 0 {
		t.Errorf("of %d packets between nodes %d can be read", all, with)
	}
	// What pods ask of the node itself goes in the clear, and its answers reach them.
	for _, a := range n3.Addrs {
		netspacetest.In(t, n3.node, func() error {
			pc, err := net.ListenPacket("udp", netip.AddrPortFrom(a, 7).String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { pc.Close() })
			go echo(pc)
			return nil
		})
		if _, err := ask(n1.pod, a, 100); err != nil {
			t.Errorf("a pod asks %s of the node: %v", a, err)
		}
	}

	// Another process, and then a node with another key.
	n1.overlay = New(Config{WireGuard: n1.overlay.cfg.WireGuard})
	if _, n := l.sync(n1, l.others(n1)); n != 0 {
		t.Errorf("another process changed %d things", n)
	}
	old := n3.Key
	l.encrypt(true, 0, 1, 2)
	l.syncAll()
	if _, err := ask(n1.pod, n3.podAddr(1), 500); err != nil {
		t.Errorf("with new keys: %v", err)
	}
	if keys := peers(t, n1.node); len(keys) != 2 || slices.Contains(keys, old) {
		t.Errorf("the kernel knows %v, of which %s is an old one", keys, old)
	}

	// What others break is mended.
	for name, do := range map[string]func(c *wgctrl.Client) error{
		"the device is gone": func(*wgctrl.Client) error {
			link, err := netlink.LinkByName(DefaultSealedDevice)
			return errors.Join(err, netlink.LinkDel(link))
		},
		"it has no peers": func(c *wgctrl.Client) error {
			return c.ConfigureDevice(DefaultSealedDevice, wgtypes.Config{ReplacePeers: true})
		},
		"it has another key": func(c *wgctrl.Client) error {
			return c.ConfigureDevice(DefaultSealedDevice, wgtypes.Config{PrivateKey: &wgtypes.Key{1}})
		},
	} {
		netspacetest.In(t, n1.node, func() error {
			c, err := wgctrl.New()
			if err != nil {
				return err
			}
			return errors.Join(do(c), c.Close())
		})
		if _, n := l.sync(n1, l.others(n1)); n == 0 {
			t.Errorf("%s: nothing was mended", name)
		}
		if _, err := ask(n1.pod, n3.podAddr(0), 10); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	// One that does not encrypt is not reached, and then it is, in the clear.
	l.encrypt(true, 0, 1)
	l.syncAll()
	if p, _ := l.sync(n1, l.others(n1)); !slices.Equal(p.Clear, []string{"n3"}) {
		t.Errorf("in the clear: %v", p.Clear)
	}
	tap.Seen(zeros)
	for f := range 2 {
		if _, err := ask(n1.pod, n3.podAddr(f), 1000); err == nil {
			t.Error("encryption is required, and a node without is reached")
		}
	}
	if p, n := l.sync(n1, l.others(n1)); n != 0 {
		t.Errorf("a second Sync changed %d things: %s", n, text(p))
	}
	if _, with := tap.Seen(zeros); with > 0 {
		t.Errorf("%d packets can be read where encryption is required", with)
	}
	l.encrypt(false, 0, 1)
	l.syncAll()
	if _, err := ask(n1.pod, n3.podAddr(0), 1000); err != nil {
		t.Error(err)
	}
	if _, with := tap.Seen(zeros); with == 0 {
		t.Error("the wiretap does not see what is in the clear: this test proves nothing")
	}
	for range 2 {
		netspacetest.In(t, n1.node, func() error { return New(Config{}).Purge() })
		if after := dump(t, n1.node); after != before {
			t.Fatalf("before:\n%safter:\n%s", before, after)
		}
	}
}

// TestKernelMoves: a node that moves to another address is followed.
func TestKernelMoves(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	l := newLab(t)
	l.encrypt(true, 0, 1, 2)
	l.syncAll()
	n1, n2 := l.machines[0], l.machines[1]
	if _, err := ask(n1.pod, n2.podAddr(0), 10); err != nil {
		t.Fatal(err)
	}
	to := netip.MustParseAddr("192.168.1.77")
	netspacetest.In(t, n2.node, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		old, _ := netlink.ParseAddr(n2.Addrs[0].String() + "/24")
		moved, _ := netlink.ParseAddr(to.String() + "/24")
		return errors.Join(netlink.AddrDel(link, old), netlink.AddrAdd(link, moved))
	})
	n2.Addrs[0] = to
	netspacetest.Route(t, n2.node, "0.0.0.0/0", "192.168.1.254", "")
	l.syncAll()
	if _, err := ask(n1.pod, n2.podAddr(0), 10); err != nil {
		t.Fatal(err)
	}
}

// TestKernelMeet: nodes that are far from each other, hear of each other at the same time and
// have something to say at once, reach each other soon.
func TestKernelMeet(t *testing.T) {
	if !vm.Inside() {
		t.Skip("TestInKernel runs it")
	}
	l := newLab(t)
	for _, m := range l.machines {
		netspacetest.In(t, l.router, func() error {
			link, err := netlink.LinkByName("to-" + m.Node)
			if err != nil {
				return err
			}
			at := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
			return netlink.QdiscAdd(netlink.NewNetem(at, netlink.NetemQdiscAttrs{Latency: 100_000})) // microseconds
		})
	}
	for round := range 3 {
		l.encrypt(true, 0, 1, 2)
		var all sync.WaitGroup
		for _, m := range l.machines {
			all.Go(func() { l.sync(m, l.others(m)) })
		}
		all.Wait()
		for _, a := range l.machines {
			for _, b := range l.machines {
				if a == b {
					continue
				}
				all.Go(func() {
					if _, err := ask(a.pod, b.podAddr(0), 100); err != nil {
						t.Errorf("round %d, pod of %s to pod of %s: %v", round, a.Node, b.Node, err)
					}
				})
			}
			all.Go(func() { l.meet(a) })
		}
		all.Wait()
	}
}

// meet does what a node has to do until it has met the others.
func (l *lab) meet(m *machine) {
	for next := time.Nanosecond; next > 0; {
		time.Sleep(next)
		netspacetest.In(l.t, m.node, func() (err error) {
			next, _, err = m.overlay.Meet()
			return err
		})
	}
}

// peers are the public keys that a node's kernel knows.
func peers(t *testing.T, path string) (keys []string) {
	t.Helper()
	netspacetest.In(t, path, func() error {
		c, err := wgctrl.New()
		if err != nil {
			return err
		}
		defer c.Close()
		d, err := c.Device(DefaultSealedDevice)
		if err != nil {
			return err
		}
		for _, p := range d.Peers {
			keys = append(keys, p.PublicKey.String())
		}
		return nil
	})
	return keys
}
