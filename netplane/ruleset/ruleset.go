// Package ruleset makes one nftables table what a description of it says, straight over
// netlink: chains, rules, sets and elements in one transaction, so that no packet sees
// half of a change.
//
// It does not know what a table is for. Names say what a thing is: a chain, and a set of
// ranges, is never changed, but replaced by one with another name; all other sets change
// element by element.
package ruleset

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Family is what differs between IPv4 and IPv6.
type Family struct {
	Name string
	// Number is the family of netlink messages (NFPROTO_IPV4, NFPROTO_IPV6).
	Number uint8
	// Words is how many 32-bit registers an address takes.
	Words uint32
	// Source and Destination are offsets of the addresses in the header, in bytes.
	Source, Destination uint32
	addrType            uint32
}

// The families.
var (
	IPv4 = &Family{Name: "ip", Number: unix.NFPROTO_IPV4, Words: 1, Source: 12, Destination: 16, addrType: typeIPAddr}
	IPv6 = &Family{Name: "ip6", Number: unix.NFPROTO_IPV6, Words: 4, Source: 8, Destination: 24, addrType: typeIP6Addr}
)

// Of returns the family of an address.
func Of(a netip.Addr) *Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Bytes is how long an address is.
func (f *Family) Bytes() uint32 { return f.Words * 4 }

// Kind is what a set holds.
type Kind uint8

// The kinds of sets. Keys are in network byte order, each part padded to whole words.
const (
	// Addrs holds addresses.
	Addrs Kind = iota
	// Ranges holds ranges of addresses: Key is the first, Val the last.
	Ranges
	// Pairs holds address . address.
	Pairs
	// Ports holds address . protocol . port.
	Ports
	// Verdicts maps addresses to the chain to go to: Val.
	Verdicts
)

// Elem is one element of a set.
type Elem struct{ Key, Val string }

func (e Elem) compare(o Elem) int {
	return cmp.Or(cmp.Compare(e.Key, o.Key), cmp.Compare(e.Val, o.Val))
}

// Set is a set of a table; its elements are in order, without duplicates.
type Set struct {
	Kind  Kind
	Elems []Elem
}

// Sort puts the elements in order.
func (s *Set) Sort() {
	slices.SortFunc(s.Elems, Elem.compare)
	s.Elems = slices.Compact(s.Elems)
}

// Hook makes a chain one that packets pass.
type Hook struct {
	Number   uint32 // NF_INET_LOCAL_IN, ...
	Priority int32
}

// Chain is a chain of a table.
type Chain struct {
	Hook  *Hook // nil: others go there
	Rules [][]expr.Any
}

// Table is all that there is in a table, by name.
type Table struct {
	Sets   map[string]*Set
	Chains map[string]*Chain
}

// change is the difference of two sets.
type change struct {
	name       string
	kind       Kind
	dels, adds []Elem
}

// difference walks through two lists in order. A key with another value is deleted and added.
func difference(have, want []Elem) (dels, adds []Elem) {
	for len(have) > 0 || len(want) > 0 {
		switch {
		case len(want) == 0 || len(have) > 0 && have[0].compare(want[0]) < 0:
			dels, have = append(dels, have[0]), have[1:]
		case len(have) == 0 || have[0].compare(want[0]) > 0:
			adds, want = append(adds, want[0]), want[1:]
		default:
			have, want = have[1:], want[1:]
		}
	}
	return dels, adds
}
