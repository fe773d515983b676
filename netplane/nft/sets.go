package nft

import (
	"slices"

	"github.com/google/nftables"
)

// setID names one of the sets of a table.
type setID uint8

// The sets of a table.
const (
	// services maps address . protocol . port to the number of the balancer, and split the
	// same for clients from outside, where they are led elsewhere.
	services setID = iota
	split
	// balancers maps such numbers to chains, or to drop. The kernel checks all that verdicts
	// lead to whenever one is added, so that there are few of them.
	balancers
	// guarded are the services for some sources only, and allowed the ranges service .
	// client of those.
	guarded
	allowed
	// endpoints maps index . address . protocol . port to endpoint address . port. The
	// indices of split begin at firstOutside.
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
	// hairpin are the pairs address . address of the endpoints on this node: what a pod that
	// reached itself looks like.
	hairpin
	// cluster, pods, ranges, announced, near and local are the like-named fields of
	// render.Table.
	cluster
	pods
	ranges
	announced
	near
	local
	numSets
)

// The sets that only a Guard has.
const (
	// draining are services that ended and still have connections.
	draining = numSets + iota
	// outside are services whose address is in no range.
	outside
	// dropped are services without endpoints of which senders are not told.
	dropped
	// marks maps services to the packet mark of clients from outside, where they are led
	// elsewhere; undelivered are those that lead such clients nowhere.
	marks
	undelivered
	// before is what a balancer noted of the kernel's settings.
	before
	numAllSets
)

// affinitySize bounds the clients remembered at a time; beyond it a new client is
// balanced without being remembered.
const affinitySize = 1 << 18

// firstOutside is the index of the first endpoint for clients from outside.
const firstOutside = 1 << 31

var setNames = [numAllSets]string{"services", "split", "balancers", "guarded", "allowed", "endpoints", "closed", "identities", "live", "affinity", "hairpin",
	"cluster", "pods", "range", "announced", "near", "local",
	"draining", "outside", "dropped", "marks", "undelivered", "before"}

// interval reports whether a set of addresses holds ranges of them.
func (id setID) interval() bool {
	return id == cluster || id == pods || id == ranges || id == announced
}

// layout is what a table consists of.
type layout struct {
	sets   []setID
	chains func(*family) []chain
}

// balancing is the layout of Services, guarding that of a Guard.
var (
	balancing = layout{[]setID{services, split, balancers, guarded, allowed, endpoints, closed, identities, live, affinity, hairpin, cluster, pods, ranges, announced, near, local}, (*family).chains}
	guarding  = layout{[]setID{closed, draining, outside, dropped, marks, undelivered, guarded, allowed, hairpin, cluster, pods, ranges, announced, near, local, before}, (*family).guardChains}
)

// set describes a set to the kernel.
func (f *family) set(t *nftables.Table, id setID) *nftables.Set {
	s := &nftables.Set{Table: t, Name: setNames[id], Concatenation: true}
	port := []nftables.SetDatatype{f.addrType, nftables.TypeInetProto, nftables.TypeInetService}
	backend := nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
	switch id {
	case balancers:
		s.KeyType, s.Concatenation, s.IsMap, s.DataType = nftables.TypeMark, false, true, nftables.TypeVerdict
	case allowed:
		s.KeyType, s.Interval = concat(append(slices.Clone(port), f.addrType)...), true
	case endpoints, live:
		s.KeyType, s.IsMap, s.DataType = concat(append([]nftables.SetDatatype{nftables.TypeMark}, port...)...), true, backend
	case identities:
		s.KeyType, s.IsMap, s.DataType = concat(append([]nftables.SetDatatype{nftables.TypeMark}, port...)...), true, nftables.TypeMark
	case before:
		s.KeyType, s.Concatenation, s.IsMap, s.DataType = nftables.TypeMark, false, true, nftables.TypeMark
	case services, split, marks:
		s.KeyType, s.IsMap, s.DataType = concat(port...), true, nftables.TypeMark
	case closed, guarded, local, draining, outside, dropped, undelivered:
		s.KeyType = concat(port...)
	case affinity:
		s.KeyType, s.IsMap, s.DataType = concat(append([]nftables.SetDatatype{f.addrType}, port...)...), true, nftables.TypeMark
		s.Dynamic, s.HasTimeout, s.Size = true, true, affinitySize
	case hairpin:
		s.KeyType = concat(f.addrType, f.addrType)
	case near:
		s.KeyType, s.Concatenation = f.addrType, false
	case cluster, pods, ranges, announced:
		s.KeyType, s.Concatenation, s.Interval = f.addrType, false, true
	}
	return s
}

func concat(types ...nftables.SetDatatype) nftables.SetDatatype {
	return nftables.MustConcatSetType(types...)
}
