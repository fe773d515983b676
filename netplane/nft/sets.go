package nft

import (
	"github.com/google/nftables"
)

// setID names one of the sets of a table.
type setID uint8

// The sets of a table.
const (
	// services maps address . protocol . port to the chain that balances it.
	services setID = iota
	// endpoints maps index . address . protocol . port to endpoint address . port.
	endpoints
	// closed are the services without endpoints.
	closed
	// identities maps index . service to the identity of the endpoint, and live maps
	// identity . service to endpoint address . port, for the services with affinity.
	identities
	live
	// affinity maps client . service to the identity of an endpoint, which may be gone
	// from live. Packets write it.
	affinity
	// hairpin are the pairs address . address of all endpoints: what a pod that
	// reached itself looks like.
	hairpin
	// cluster, pods, ranges and local are the like-named fields of render.Table.
	cluster
	pods
	ranges
	local
	numSets
)

// The sets that only a Guard has.
const (
	// draining are services that ended and still have connections.
	draining = numSets + iota
	// outside are services whose address is in no range.
	outside
	// before is what a balancer noted of the kernel's settings.
	before
	numAllSets
)

// affinitySize bounds the clients remembered at a time; beyond it a new client is
// balanced without being remembered.
const affinitySize = 1 << 18

var setNames = [numAllSets]string{"services", "endpoints", "closed", "identities", "live", "affinity", "hairpin", "cluster", "pods", "range", "local", "draining", "outside", "before"}

// layout is what a table consists of.
type layout struct {
	sets   []setID
	chains func(*family) []chain
}

// balancing is the layout of Services, guarding that of a Guard.
var (
	balancing = layout{[]setID{services, endpoints, closed, identities, live, affinity, hairpin, cluster, pods, ranges, local}, (*family).chains}
	guarding  = layout{[]setID{closed, draining, outside, hairpin, cluster, pods, ranges, local, before}, (*family).guardChains}
)

// set describes a set to the kernel.
func (f *family) set(t *nftables.Table, id setID) *nftables.Set {
	s := &nftables.Set{Table: t, Name: setNames[id], Concatenation: true}
	port := []nftables.SetDatatype{f.addrType, nftables.TypeInetProto, nftables.TypeInetService}
	backend := nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
	switch id {
	case services:
		s.KeyType, s.IsMap, s.DataType = concat(port...), true, nftables.TypeVerdict
	case endpoints, live:
		s.KeyType, s.IsMap, s.DataType = concat(append([]nftables.SetDatatype{nftables.TypeMark}, port...)...), true, backend
	case identities:
		s.KeyType, s.IsMap, s.DataType = concat(append([]nftables.SetDatatype{nftables.TypeMark}, port...)...), true, nftables.TypeMark
	case before:
		s.KeyType, s.Concatenation, s.IsMap, s.DataType = nftables.TypeMark, false, true, nftables.TypeMark
	case closed, local, draining, outside:
		s.KeyType = concat(port...)
	case affinity:
		s.KeyType, s.IsMap, s.DataType = concat(append([]nftables.SetDatatype{f.addrType}, port...)...), true, nftables.TypeMark
		s.Dynamic, s.HasTimeout, s.Size = true, true, affinitySize
	case hairpin:
		s.KeyType = concat(f.addrType, f.addrType)
	case cluster, pods, ranges:
		s.KeyType, s.Concatenation, s.Interval = f.addrType, false, true
	}
	return s
}

func concat(types ...nftables.SetDatatype) nftables.SetDatatype {
	return nftables.MustConcatSetType(types...)
}
