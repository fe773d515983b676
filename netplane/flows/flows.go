// Package flows makes the kernel forget the connections of addresses that are given back, so
// that who gets an address next has nothing of what another one began: what conntrack
// remembers of translated UDP would send its answers, and its packets, to the wrong place.
package flows

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"decree.dev/decree/netplane/netspace"
)

// Sweeper deletes entries of one network namespace's connection tracking. It is safe for
// concurrent use.
type Sweeper struct {
	handle *netlink.Handle

	running sync.Mutex // held by the one that sweeps
	mu      sync.Mutex
	next    *batch
}

// batch is the addresses of callers that wait for one sweep.
type batch struct {
	once  sync.Once
	addrs map[netip.Addr]bool
	n     int
	err   error
}

// New returns a Sweeper of the network namespace at a path; empty: the current one.
func New(netns string) (*Sweeper, error) {
	s := &Sweeper{next: &batch{addrs: map[netip.Addr]bool{}}}
	err := netspace.Do(netns, func() (err error) {
		s.handle, err = netlink.NewHandle(unix.NETLINK_NETFILTER)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", err)
	}
	return s, nil
}

// Close lets go of the kernel's interface.
func (s *Sweeper) Close() { s.handle.Close() }

// Forget deletes all flows that one of addrs began, or answers, by its own or by a translated
// address, and returns how many they and those of others who asked at the same time were. It
// looks at all that the machine has, some milliseconds for every 10,000; callers that come
// while that is done share the next look. Nobody may have the addresses meanwhile.
func (s *Sweeper) Forget(addrs ...netip.Addr) (n int, err error) {
	if len(addrs) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	b := s.next
	for _, a := range addrs {
		b.addrs[a.Unmap()] = true
	}
	s.mu.Unlock()
	b.once.Do(func() {
		s.running.Lock()
		defer s.running.Unlock()
		s.mu.Lock()
		s.next = &batch{addrs: map[netip.Addr]bool{}}
		s.mu.Unlock()
		b.n, b.err = s.sweep(b)
	})
	return b.n, b.err
}

func (s *Sweeper) sweep(b *batch) (n int, err error) {
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		any := false
		for a := range b.addrs {
			any = any || a.Is4() == (family == unix.AF_INET)
		}
		if !any {
			continue
		}
		m, ferr := s.handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, b)
		n += int(m)
		if ferr != nil {
			err = errors.Join(err, fmt.Errorf("forget connections: %w", ferr))
		}
	}
	return n, err
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (b *batch) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	for _, ip := range [][]byte{flow.Forward.SrcIP, flow.Forward.DstIP, flow.Reverse.SrcIP, flow.Reverse.DstIP} {
		if a, ok := netip.AddrFromSlice(ip); ok && b.addrs[a.Unmap()] {
			return true
		}
	}
	return false
}
