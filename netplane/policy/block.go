package policy

import (
	"net/netip"
	"slices"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
)

// Range is all addresses from First to Last, both of one family.
type Range struct{ First, Last netip.Addr }

// Block is the addresses of the ipBlocks of one rule. ID names its content.
type Block struct {
	ID string
	// Ranges in order; none touches another.
	Ranges []Range
}

// Has reports whether a is in one of the ranges.
func (b *Block) Has(a netip.Addr) bool {
	i, found := slices.BinarySearchFunc(b.Ranges, a, func(r Range, a netip.Addr) int { return r.First.Compare(a) })
	return found || i > 0 && b.Ranges[i-1].Last.Compare(a) >= 0 && b.Ranges[i-1].Last.BitLen() == a.BitLen()
}

// newBlock returns the addresses of all blocks together.
func newBlock(blocks []*networkingv1.IPBlock) *Block {
	var all []Range
	for _, b := range blocks {
		all = append(all, rangesOf(b)...)
	}
	all = merged(all)
	var id strings.Builder
	for _, r := range all {
		id.WriteString(r.First.String() + "-" + r.Last.String() + " ")
	}
	return &Block{ID: id.String(), Ranges: all}
}

// rangesOf is the range of a block without its exceptions. A block that cannot be
// understood in all its parts allows nobody.
func rangesOf(b *networkingv1.IPBlock) []Range {
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		return nil
	}
	left := []Range{rangeOf(cidr)}
	for _, text := range b.Except {
		except, err := netip.ParsePrefix(text)
		if err != nil {
			return nil
		}
		left = without(left, rangeOf(except))
	}
	return left
}

func rangeOf(p netip.Prefix) Range {
	first := p.Masked().Addr()
	b := first.AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return Range{first, last}
}

// without takes x out of ranges.
func without(ranges []Range, x Range) []Range {
	var out []Range
	for _, r := range ranges {
		if x.Last.Compare(r.First) < 0 || x.First.Compare(r.Last) > 0 {
			out = append(out, r)
			continue
		}
		if r.First.Compare(x.First) < 0 {
			out = append(out, Range{r.First, x.First.Prev()})
		}
		if x.Last.Compare(r.Last) < 0 {
			out = append(out, Range{x.Last.Next(), r.Last})
		}
	}
	return out
}

// merged puts ranges in order, and those together that touch.
func merged(ranges []Range) []Range {
	slices.SortFunc(ranges, func(a, b Range) int { return a.First.Compare(b.First) })
	var out []Range
	for _, r := range ranges {
		n := len(out)
		if n == 0 || out[n-1].Last.Compare(r.First) < 0 && out[n-1].Last.Next() != r.First {
			out = append(out, r)
			continue
		}
		if out[n-1].Last.Compare(r.Last) < 0 {
			out[n-1].Last = r.Last
		}
	}
	return out
}
