// Package host changes what a node's network needs beside tables and plugins:
// the route of the service range, and forwarding. It leaves a mark on what it
// makes and a note of what it changes, so that all of it can be undone later, by a
// process that knows nothing else.
//
// It works in the network namespace of the calling thread.
package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Protocol marks our routes (rtm_protocol): a number that no routing daemon in
// iproute2's rt_protos has.
const Protocol = 214

// Host undoes what it did by a file under its folder.
type Host struct{ dir string }

// New returns a Host that keeps its notes in dir.
func New(dir string) *Host { return &Host{dir} }

func (h *Host) notes() string { return filepath.Join(h.dir, "sysctl.json") }

// Routes makes the prefixes local to this node, and no others that earlier calls
// made. So packets to services never leave for a gateway, a node without a default
// route reaches services too, and servers can listen on service addresses.
func (h *Host) Routes(prefixes []netip.Prefix) error {
	have, err := routes()
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("look for loopback: %w", err)
	}
	for _, p := range prefixes {
		if i := slices.IndexFunc(have, func(r netlink.Route) bool { return PrefixOf(r.Dst) == p }); i >= 0 {
			have = slices.Delete(have, i, i+1)
			continue
		}
		r := &netlink.Route{
			LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: Protocol,
			Dst: IPNet(p),
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("make %s local: %w", p, err)
		}
	}
	for i := range have {
		if err := netlink.RouteDel(&have[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove local route %s: %w", have[i].Dst, err)
		}
	}
	return nil
}

// routes returns the routes that carry our mark.
func routes() ([]netlink.Route, error) {
	var out []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rs, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list local routes: %w", err)
		}
		out = append(out, rs...)
	}
	return out, nil
}

// PrefixOf converts; an unset or unusable network is no prefix.
func PrefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

// IPNet converts.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Forwarding is the file that makes a node route packets of a family.
func Forwarding(v6 bool) string {
	if v6 {
		return "/proc/sys/net/ipv6/conf/all/forwarding"
	}
	return "/proc/sys/net/ipv4/ip_forward"
}

// Forward makes the node route packets of these families. What was there before
// is noted first.
func (h *Host) Forward(v4, v6 bool) error {
	for _, x := range []struct {
		want bool
		path string
	}{{v4, Forwarding(false)}, {v6, Forwarding(true)}} {
		if !x.want {
			continue
		}
		if err := h.Set(x.path, "1"); err != nil {
			return err
		}
	}
	return nil
}

// Set changes a setting of the kernel, a file below /proc/sys, until Restore. What was
// there before is noted first.
func (h *Host) Set(path, value string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read kernel setting: %w", err)
	}
	have := strings.TrimSpace(string(b))
	if have == value {
		return nil
	}
	before, err := h.read()
	if err != nil {
		return err
	}
	if _, ok := before[path]; !ok {
		before[path] = have
		if err := h.write(before); err != nil {
			return err
		}
	}
	if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
		return fmt.Errorf("change kernel setting (needs root): %w", err)
	}
	return nil
}

func (h *Host) read() (map[string]string, error) {
	before := map[string]string{}
	b, err := os.ReadFile(h.notes())
	if errors.Is(err, os.ErrNotExist) {
		return before, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &before)
	}
	if err != nil {
		return nil, fmt.Errorf("read notes of kernel settings %s: %w", h.notes(), err)
	}
	return before, nil
}

func (h *Host) write(before map[string]string) error {
	b, err := json.Marshal(before)
	if err != nil {
		return fmt.Errorf("note kernel settings: %w", err)
	}
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return fmt.Errorf("note kernel settings: %w", err)
	}
	tmp := h.notes() + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("note kernel settings: %w", err)
	}
	if err := os.Rename(tmp, h.notes()); err != nil {
		return fmt.Errorf("note kernel settings: %w", err)
	}
	return nil
}

// Links removes the interfaces that lead to addresses in these prefixes, the pods'
// CIDRs of this node: those of pods whose plugin did not.
func (h *Host) Links(prefixes []netip.Prefix) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if l.Type() != "veth" {
			continue
		}
		rs, err := netlink.RouteList(l, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list routes of %s: %w", l.Attrs().Name, err)
		}
		ours := slices.ContainsFunc(rs, func(r netlink.Route) bool {
			p := PrefixOf(r.Dst)
			return p.IsValid() && p.IsSingleIP() && slices.ContainsFunc(prefixes, func(q netip.Prefix) bool { return q.Contains(p.Addr()) })
		})
		if !ours {
			continue
		}
		var gone netlink.LinkNotFoundError
		if err := netlink.LinkDel(l); err != nil && !errors.As(err, &gone) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove interface %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// Restore removes our routes and puts the kernel's settings back to what they were.
func (h *Host) Restore() error {
	if err := h.Routes(nil); err != nil {
		return err
	}
	before, err := h.read()
	if err != nil {
		return err
	}
	for path, value := range before {
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("put kernel setting back: %w", err)
		}
	}
	if err := os.Remove(h.notes()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove notes of kernel settings: %w", err)
	}
	return nil
}
