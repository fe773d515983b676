package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"decree.dev/decree/netplane/host"
)

// The defaults of WireGuard.
const (
	DefaultSealedDevice = "decree1"
	DefaultSealedPort   = 51820
)

// keepalive is the time between signs of life when there is nothing to send. The first
// one is sent when the kernel hears of a node: a node that came back knows at once that
// this one has forgotten what they had agreed on, not 15 seconds later. The others keep
// firewalls between sites open.
const keepalive = 25 * time.Second

// When two nodes begin a handshake at the same time nothing comes of it: each answers the
// other one's and forgets its own (Linux, drivers/net/wireguard/noise.c). By itself the
// kernel begins another one after 5 seconds, and at most a third of a second more, on both
// sides: the farther they are from each other, the longer this may go on. So if there is no
// session after patience, the node with the smaller key begins anew; the other one, which
// may be alone in knowing that there is none, later.
const (
	patience      = time.Second
	otherPatience = 2500 * time.Millisecond
)

// meeting is a node with which there was no handshake yet.
type meeting struct {
	Sealing
	due time.Time // to begin anew
}

// WireGuard is how packets are encrypted; all nodes must agree on Port.
type WireGuard struct {
	Device string // empty: DefaultSealedDevice
	Port   int    // UDP; zero: DefaultSealedPort
	// Key is this node's private one; zero: it does not encrypt.
	Key wgtypes.Key
	// Required forbids every other way to the pods of other nodes.
	Required bool
}

// PublicKey is what other nodes have to know, in base64; empty: this one does not encrypt.
func (w WireGuard) PublicKey() string {
	if w.Key == (wgtypes.Key{}) {
		return ""
	}
	return w.Key.PublicKey().String()
}

// LoadKey reads a private key from a file, and makes both if there is none.
func LoadKey(path string) (wgtypes.Key, error) {
	text, err := os.ReadFile(path)
	if err == nil {
		key, err := wgtypes.ParseKey(string(text))
		if err != nil {
			return key, fmt.Errorf("private key of WireGuard in %s: %w; remove the file to get another one", path, err)
		}
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return wgtypes.Key{}, err
	}
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return key, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return key, err
	}
	temporary := path + ".new"
	if err := os.WriteFile(temporary, []byte(key.String()), 0o600); err != nil {
		return key, err
	}
	return key, os.Rename(temporary, path)
}

// Encrypts reports whether the kernel has WireGuard, by making an interface: nil, or why
// not. It works in the network namespace of the calling thread.
func Encrypts() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("decree%d", 1<<20+os.Getpid()%(1<<20))
	probe := &netlink.Wireguard{LinkAttrs: attrs}
	if err := netlink.LinkAdd(probe); err != nil {
		return fmt.Errorf("the kernel has no WireGuard (is there a module wireguard?): %w", err)
	}
	return netlink.LinkDel(probe)
}

// seal makes the WireGuard interface what it should be, but for nodes that are not in
// the plan any more, and returns its index.
func (o *Overlay) seal(s *Sealed) (index, changes int, err error) {
	name := o.cfg.WireGuard.Device
	link, err := find(name)
	if err != nil {
		return 0, 0, err
	}
	if link != nil && link.Type() != "wireguard" {
		if err := remove(link); err != nil {
			return 0, 0, err
		}
		link, changes = nil, changes+1
	}
	if link == nil {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, s.MTU
		if link, err = add(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
			return 0, changes, err
		}
		changes++
	}
	n, err := o.keys(s, false) // before it is up: it listens then
	changes += n
	if err != nil {
		return 0, changes, err
	}
	n, err = settle(link, s.MTU, s.Addrs)
	return link.Attrs().Index, changes + n, err
}

// keys tells the interface its own key and those of other nodes. It forgets those that
// are not in s only if told so: routes lead elsewhere first.
func (o *Overlay) keys(s *Sealed, forget bool) (changes int, err error) {
	w := o.cfg.WireGuard
	c, err := wgctrl.New()
	if err != nil {
		return 0, fmt.Errorf("configure %s: %w", w.Device, err)
	}
	defer c.Close()
	have, err := c.Device(w.Device)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", w.Device, err)
	}
	var cfg wgtypes.Config
	if have.PrivateKey != w.Key || have.ListenPort != w.Port {
		cfg.PrivateKey, cfg.ListenPort = &w.Key, &w.Port
		changes++
	}
	kept := byKey(have.Peers)
	meetings := map[wgtypes.Key]meeting{}
	for _, p := range s.Peers {
		h := kept[p.Key]
		delete(kept, p.Key)
		pc := wgtypes.PeerConfig{PublicKey: p.Key}
		if h == nil {
			meetings[p.Key] = meeting{p, time.Now().Add(w.patience(p.Key))}
		} else if m, ok := o.meetings[p.Key]; ok {
			meetings[p.Key] = meeting{p, m.due}
		}
		// The kernel follows a node that sends from elsewhere; it is led back only if the
		// node itself says that it moved.
		if moved := o.remotes[p.Key] != p.Remote; h == nil || moved && !at(h.Endpoint, p.Remote, w.Port) {
			pc.Endpoint = &net.UDPAddr{IP: p.Remote.AsSlice(), Port: w.Port}
		}
		if h == nil || !same(h.AllowedIPs, p.Allowed) {
			pc.ReplaceAllowedIPs, pc.AllowedIPs = true, p.allowed()
		}
		if h == nil || h.PersistentKeepaliveInterval != keepalive {
			pc.PersistentKeepaliveInterval = new(keepalive)
		}
		if pc.Endpoint != nil || pc.ReplaceAllowedIPs || pc.PersistentKeepaliveInterval != nil {
			cfg.Peers = append(cfg.Peers, pc)
			changes++
		}
	}
	if forget {
		for key := range kept {
			cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: key, Remove: true})
			changes++
		}
	}
	if changes > 0 {
		if err := c.ConfigureDevice(w.Device, cfg); err != nil {
			return 0, fmt.Errorf("configure %s (UDP port %d): %w", w.Device, w.Port, err)
		}
	}
	o.remotes, o.meetings = map[wgtypes.Key]netip.Addr{}, meetings
	for _, p := range s.Peers {
		o.remotes[p.Key] = p.Remote
	}
	return changes, nil
}

// patience is how long this node waits for a first handshake with another one.
func (w WireGuard) patience(other wgtypes.Key) time.Duration {
	if own := w.Key.PublicKey(); bytes.Compare(own[:], other[:]) < 0 {
		return patience
	}
	return otherPatience
}

// Meet begins handshakes anew that came to nothing. It returns the time until it has
// something to do again, zero if there is none before the next Sync, and the number of
// handshakes it began.
func (o *Overlay) Meet() (next time.Duration, begun int, err error) {
	if len(o.meetings) == 0 {
		return 0, 0, nil
	}
	w := o.cfg.WireGuard
	c, err := wgctrl.New()
	if err != nil {
		return 0, 0, fmt.Errorf("configure %s: %w", w.Device, err)
	}
	defer c.Close()
	have, err := c.Device(w.Device)
	if err != nil {
		return 0, 0, fmt.Errorf("read %s: %w", w.Device, err)
	}
	var cfg wgtypes.Config
	peers := byKey(have.Peers)
	for key, m := range o.meetings {
		h := peers[key]
		if h == nil || !h.LastHandshakeTime.IsZero() { // or else the next Sync mends it
			delete(o.meetings, key)
			continue
		}
		if left := time.Until(m.due); left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		delete(o.meetings, key)
		begun++
		// There is no other way to have the kernel begin before its time.
		cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: key, Remove: true}, wgtypes.PeerConfig{
			PublicKey: key, Endpoint: h.Endpoint, ReplaceAllowedIPs: true, AllowedIPs: m.allowed(), PersistentKeepaliveInterval: new(keepalive),
		})
	}
	if begun > 0 {
		if err := c.ConfigureDevice(w.Device, cfg); err != nil {
			return 0, 0, fmt.Errorf("configure %s: %w", w.Device, err)
		}
	}
	return next, begun, nil
}

func byKey(peers []wgtypes.Peer) map[wgtypes.Key]*wgtypes.Peer {
	out := map[wgtypes.Key]*wgtypes.Peer{}
	for i := range peers {
		out[peers[i].PublicKey] = &peers[i]
	}
	return out
}

// allowed is Allowed as the kernel's interface has it.
func (s Sealing) allowed() (out []net.IPNet) {
	for _, q := range s.Allowed {
		out = append(out, *host.IPNet(q))
	}
	return out
}

func at(e *net.UDPAddr, a netip.Addr, port int) bool {
	return e != nil && e.AddrPort().Addr().Unmap() == a && e.Port == port
}

// same reports whether the kernel's list holds these, in any order.
func same(have []net.IPNet, want []netip.Prefix) bool {
	return len(have) == len(want) && !slices.ContainsFunc(have, func(n net.IPNet) bool { return !slices.Contains(want, host.PrefixOf(&n)) })
}

// noAddress keeps the kernel from giving an interface an address of its own making:
// nobody speaks to the link itself. A kernel without IPv6 has no such setting.
func noAddress(name string) error {
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/addr_gen_mode", []byte("1"), 0o644)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make %s: %w", name, err)
	}
	return nil
}
