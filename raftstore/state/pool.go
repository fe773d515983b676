package state

import (
	"math/big"
	"net/netip"

	"decree.dev/decree/raftstore/command"
)

// maxPool bounds the numbers of one pool, whatever the width of an IPv6 range.
const maxPool = 1 << 20

// pool says which numbers of a range are taken, and by whom. It is immutable between
// edits. Free numbers are handed out in turn, so that an address that was just
// released is the last to be used again.
type pool struct {
	used tree[uint64, string] // number -> name of the holder
	next uint64               // where the search begins
}

func (p pool) holder(n uint64) (string, bool) { return p.used.get(n) }

func (p *pool) take(e *edit, n uint64, holder string) { p.used.set(e, n, holder) }

func (p *pool) release(e *edit, n uint64) { p.used.delete(e, n) }

// free finds a number in [low, high] that is neither taken nor reserved, and
// returns the pool with its search moved on. ok is false if there is none.
func (p pool) free(low, high, reserved uint64) (pool, uint64, bool) {
	size := high - low + 1
	for i := uint64(0); i < size && uint64(p.used.Len()) < size; i++ {
		n := low + (max(p.next, low)-low+i)%size
		if _, taken := p.holder(n); n != reserved && !taken {
			p.next = n + 1
			return p, n, true
		}
	}
	return p, 0, false
}

// serviceBounds are the numbers of the service range that a Service may have: not
// the first address and not the last.
func serviceBounds(cidr netip.Prefix) (low, high uint64) {
	return 1, hosts(cidr) - 2
}

// hosts is how many addresses p has, at most maxPool.
func hosts(p netip.Prefix) uint64 {
	bits := p.Addr().BitLen() - p.Bits()
	if bits >= 20 {
		return maxPool
	}
	return 1 << bits
}

// numberOf is the distance of a from the start of p. ok is false if a lies outside
// or further than maxPool.
func numberOf(p netip.Prefix, a netip.Addr) (n uint64, ok bool) {
	if !p.Contains(a) {
		return 0, false
	}
	d := new(big.Int).Sub(new(big.Int).SetBytes(a.AsSlice()), new(big.Int).SetBytes(p.Addr().AsSlice()))
	if !d.IsUint64() || d.Uint64() >= hosts(p) {
		return 0, false
	}
	return d.Uint64(), true
}

// addressAt is the address with distance n<<shift from the start of p.
func addressAt(p netip.Prefix, n uint64, shift int) netip.Addr {
	start := p.Addr().AsSlice()
	d := new(big.Int).Lsh(new(big.Int).SetUint64(n), uint(shift))
	sum := new(big.Int).Add(new(big.Int).SetBytes(start), d)
	a, _ := netip.AddrFromSlice(sum.FillBytes(make([]byte, len(start))))
	return a
}

// nodeCIDRs are the pod ranges with number n, one of each family.
func nodeCIDRs(s *command.Bootstrap, n uint64) (cidrs []string) {
	for _, r := range s.Families() {
		start := addressAt(r.PodCIDR, n, r.PodCIDR.Addr().BitLen()-r.NodeMask)
		cidrs = append(cidrs, netip.PrefixFrom(start, r.NodeMask).String())
	}
	return cidrs
}

// nodeRanges is how many pod ranges there are, of the family that has the fewest.
func nodeRanges(s *command.Bootstrap) uint64 {
	n := uint64(1) << (s.NodeMask - s.PodCIDR.Bits())
	for _, r := range s.Families()[1:] {
		n = min(n, 1<<(r.NodeMask-r.PodCIDR.Bits()))
	}
	return n
}

// nodeRangeNumber is the number of a pod range of the primary family.
func nodeRangeNumber(s *command.Bootstrap, p netip.Prefix) (n uint64, ok bool) {
	if p.Bits() != s.NodeMask || p != p.Masked() || !s.PodCIDR.Contains(p.Addr()) {
		return 0, false
	}
	d := new(big.Int).Sub(new(big.Int).SetBytes(p.Addr().AsSlice()), new(big.Int).SetBytes(s.PodCIDR.Addr().AsSlice()))
	n = d.Rsh(d, uint(p.Addr().BitLen()-s.NodeMask)).Uint64()
	return n, n < nodeRanges(s)
}
