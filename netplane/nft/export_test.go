package nft

import (
	"net/netip"

	"github.com/google/nftables"

	"decree.dev/decree/netplane/render"
)

// EndpointSet is the set of endpoints in the family of an address.
func EndpointSet(a netip.Addr) *nftables.Set {
	f := familyOf(a)
	return f.set(&nftables.Table{Name: DefaultTable, Family: f.nf}, endpoints)
}

// PortKey is a service port as sets hold it.
func PortKey(p render.Port) string { return string(appendPort(nil, p)) }
