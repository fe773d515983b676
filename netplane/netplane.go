// Package netplane is the network of one node: pod networks by CNI, services and policies in
// the kernel. What a node serves by itself (DNS, Ingress) is netplane/front. Callers hand over
// the whole desired network with Set; the difference is found and applied inside.
package netplane

import (
	"context"

	"decree.dev/decree/netplane/render"
)

// Desired is the whole network of one node as the cluster wants it.
type Desired = render.Desired

// Services is a kernel's service tables. netplane/ipvs is the one for IPVS, netplane/nft
// that for nftables, netplane/simnet the one for tests; both pass the suite in netplane/netplanetest.
//
// Methods may be called concurrently; they take turns.
type Services interface {
	// Sync makes the kernel hold t and returns how many service ports (and, as one
	// more, settings) it had to change. A service changes at once: no packet sees half
	// of it. The first Sync adopts what an earlier process left. After an error part
	// of the services may have changed; the next Sync starts from what is there.
	Sync(ctx context.Context, t render.Table) (int, error)
	// Read returns what the kernel holds. When that is not what the last Sync left,
	// the next Sync repairs it.
	Read(ctx context.Context) (render.Table, error)
	// Purge removes everything that any Sync ever made.
	Purge(ctx context.Context) error
}
