package api

import (
	"fmt"
	"net/netip"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AddressPool holds addresses for Services of type LoadBalancer, which the nodes
// announce to the network that they stand in.
type AddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              AddressPoolSpec   `json:"spec,omitempty"`
	Status            AddressPoolStatus `json:"status,omitempty"`
}

// AddressPoolSpec says which addresses there are, and for whom.
type AddressPoolSpec struct {
	// Addresses are networks, all of whose addresses are used ("203.0.113.16/28"), and
	// ranges of both ends ("203.0.113.7-203.0.113.9"), of both families.
	Addresses []string `json:"addresses"`
	// AutoAssign gives addresses to Services that name none; true when nil. From a pool
	// without it, a Service gets an address that its spec.loadBalancerIP names.
	AutoAssign *bool `json:"autoAssign,omitempty"`
	// ServiceSelector and NamespaceSelector choose the Services that the pool is for, by
	// their labels and by those of their namespaces; nil: all.
	ServiceSelector   *metav1.LabelSelector `json:"serviceSelector,omitempty"`
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
}

// AddressPoolStatus says how much of the pool is in use.
type AddressPoolStatus struct {
	// Assigned is how many addresses Services have.
	Assigned int64 `json:"assigned,omitempty"`
	// Given is how often one was given out. It changes whenever that happens, so that of
	// two plans made from one view only one comes into force.
	Given int64 `json:"given,omitempty"`
}

// AddressRange is a run of addresses of one family, both ends included.
type AddressRange struct{ First, Last netip.Addr }

// ParseAddressRange reads one of the Addresses of an AddressPool. The error says what
// is expected.
func ParseAddressRange(text string) (AddressRange, error) {
	if first, last, ok := strings.Cut(text, "-"); ok {
		a, errA := netip.ParseAddr(strings.TrimSpace(first))
		b, errB := netip.ParseAddr(strings.TrimSpace(last))
		if errA != nil || errB != nil || a.Zone() != "" || b.Zone() != "" || a.BitLen() != b.BitLen() || a.Is4In6() || b.Less(a) {
			return AddressRange{}, fmt.Errorf("%q is not a range such as 203.0.113.7-203.0.113.9", text)
		}
		return AddressRange{a, b}, nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || p != p.Masked() || p.Addr().Is4In6() {
		return AddressRange{}, fmt.Errorf("%q is not a network such as 203.0.113.16/28", text)
	}
	last := p.Addr().AsSlice()
	for i := range last {
		if host := max(0, min(8, (i+1)*8-p.Bits())); host > 0 {
			last[i] |= byte(1<<host - 1)
		}
	}
	end, _ := netip.AddrFromSlice(last) // as long as an address
	return AddressRange{p.Addr(), end}, nil
}

// Contains reports whether a is one of r.
func (r AddressRange) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && !a.Less(r.First) && !r.Last.Less(a)
}

// Overlaps reports whether r and s have an address in common.
func (r AddressRange) Overlaps(s AddressRange) bool {
	return r.Contains(s.First) || s.Contains(r.First)
}
