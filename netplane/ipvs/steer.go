package ipvs

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/host"
	"decree.dev/decree/netplane/nft"
	"decree.dev/decree/netplane/render"
)

const (
	// steerTable is the routing table in which every address is local, and steerPriority
	// the place of the rule that leads there: after this node's own addresses, before
	// all other routes.
	steerTable    = 214
	steerPriority = 214
)

// steer makes this node look at packets that the guard marked although their address is
// none of its own: those to services at external addresses. Only the ports of services
// are marked, so that all else that goes to such an address goes where it went before.
type steer struct{ h *netlink.Handle }

// openSteer opens a socket in the network namespace of the calling thread.
func openSteer() (*steer, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open routing: %w", err)
	}
	return &steer{h}, nil
}

func (s *steer) close() { s.h.Close() }

// families are those that t has services at external addresses of.
func families(t *render.Table) (out []int) {
	for _, x := range []struct {
		family int
		v4     bool
	}{{unix.AF_INET, true}, {unix.AF_INET6, false}} {
		if slices.ContainsFunc(t.Range, func(p netip.Prefix) bool { return p.Addr().Is4() == x.v4 }) {
			out = append(out, x.family)
		}
	}
	return out
}

func rule(family int) *netlink.Rule {
	r := netlink.NewRule()
	mask := uint32(nft.DeliverBit)
	r.Family, r.Table, r.Priority, r.Mark, r.Mask = family, steerTable, steerPriority, nft.DeliverBit, &mask
	return r
}

func (s *steer) route(family int) (*netlink.Route, error) {
	lo, err := s.h.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("look for loopback: %w", err)
	}
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == unix.AF_INET6 {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{LinkIndex: lo.Attrs().Index, Family: family, Type: unix.RTN_LOCAL, Table: steerTable, Scope: netlink.SCOPE_HOST, Protocol: host.Protocol, Dst: all}, nil
}

// kept reports whether what t needs is there.
func (s *steer) kept(t *render.Table) (bool, error) {
	for _, f := range families(t) {
		rules, routes, err := s.have(f)
		if err != nil || len(rules) != 1 || len(routes) != 1 {
			return false, err
		}
	}
	return true, nil
}

// have returns our rules and routes of a family.
func (s *steer) have(family int) ([]netlink.Rule, []netlink.Route, error) {
	rules, err := s.h.RuleListFiltered(family, &netlink.Rule{Table: steerTable, Priority: steerPriority}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PRIORITY)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil, fmt.Errorf("list routing rules: %w", err)
	}
	routes, err := s.h.RouteListFiltered(family, &netlink.Route{Table: steerTable, Protocol: host.Protocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, nil, fmt.Errorf("list routes: %w", err)
	}
	return rules, routes, nil
}

// make makes what t needs, the route before the rule that leads to it.
func (s *steer) make(t *render.Table) error {
	for _, f := range families(t) {
		rules, _, err := s.have(f)
		if err != nil {
			return err
		}
		r, err := s.route(f)
		if err != nil {
			return err
		}
		if err := s.h.RouteReplace(r); err != nil {
			return fmt.Errorf("make external addresses local: %w", err)
		}
		if len(rules) > 0 {
			continue
		}
		if err := s.h.RuleAdd(rule(f)); err != nil {
			return fmt.Errorf("lead packets to external addresses here: %w", err)
		}
	}
	return nil
}

// remove undoes make.
func (s *steer) remove() error {
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, routes, err := s.have(f)
		if err != nil {
			return err
		}
		for range rules {
			if err := s.h.RuleDel(rule(f)); err != nil {
				return fmt.Errorf("remove routing rule %d: %w", steerPriority, err)
			}
		}
		for i := range routes {
			if err := s.h.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route of table %d: %w", steerTable, err)
			}
		}
	}
	return nil
}
