package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// dashed is an address as a label.
func dashed(a netip.Addr) string {
	if a.Is4() {
		return strings.ReplaceAll(a.String(), ".", "-")
	}
	return strings.ReplaceAll(a.StringExpanded(), ":", "-")
}

// undashed reads a label as an address.
func undashed(label string) (netip.Addr, bool) {
	if strings.Count(label, "-") == 3 {
		if a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ".")); err == nil {
			return a, true
		}
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
	return a, err == nil && a.Zone() == ""
}

// reverseZone is the range, among those this zone answers for, that all addresses below a
// name are in; invalid: there is none.
func (z *zone) reverseZone(name string) netip.Prefix {
	p, _ := reverseRange(name)
	i := slices.IndexFunc(z.reverse, func(r netip.Prefix) bool { return r.Bits() <= p.Bits() && r.Contains(p.Addr()) })
	if i < 0 {
		return netip.Prefix{}
	}
	return z.reverse[i]
}

// origin is the zone, as resolvers see it, that a name is in: the domain, or the
// smallest reverse zone around the range of an address.
func (z *zone) origin(name string) string {
	r := z.reverseZone(name)
	if !r.IsValid() {
		return z.domain
	}
	keep := 2 + r.Bits()/8 // labels, with those of in-addr.arpa
	if r.Addr().Is6() {
		keep = 2 + r.Bits()/4
	}
	labels := strings.Split(name, ".") // the last one is empty
	return strings.Join(labels[len(labels)-1-keep:], ".")
}

// reverseRange is the range of addresses that is below a name in in-addr.arpa or ip6.arpa,
// by as many of its labels as make sense; exact: that is all of them.
func reverseRange(name string) (p netip.Prefix, exact bool) {
	var a [16]byte
	if rest, ok := strings.CutSuffix(name, ".in-addr.arpa."); ok {
		n, exact := readReversed(rest, 4, func(i int, label string) bool {
			b, err := strconv.ParseUint(label, 10, 8)
			a[i] = byte(b)
			return err == nil && (label[0] != '0' || label == "0")
		})
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(a[:4])), 8*n), exact
	}
	rest, ok := strings.CutSuffix(name, ".ip6.arpa.")
	if !ok {
		return netip.Prefix{}, false
	}
	n, exact := readReversed(rest, 32, func(i int, label string) bool {
		b, err := strconv.ParseUint(label, 16, 4)
		a[i/2] |= byte(b) << (4 * (1 - i%2))
		return err == nil && len(label) == 1
	})
	return netip.PrefixFrom(netip.AddrFrom16(a), 4*n), exact
}

// readReversed reads labels from the last one on, as long as they can be read, and at most
// some. It returns how many those are, and whether they are all.
func readReversed(labels string, most int, read func(i int, label string) bool) (n int, all bool) {
	list := strings.Split(labels, ".")
	slices.Reverse(list)
	for n < min(most, len(list)) && read(n, list[n]) {
		n++
	}
	return n, n == len(list)
}
