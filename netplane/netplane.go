// Package netplane is the network of one node: pod networks by CNI, services in
// the kernel, cluster DNS. Callers hand over the whole desired network with Set;
// the difference is found and applied inside.
package netplane

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Desired is the whole network of one node as the cluster wants it.
type Desired struct {
	Node        string
	PodCIDRs    []netip.Prefix // of this node
	ClusterCIDR []netip.Prefix // all pods
	ServiceCIDR []netip.Prefix
	DNS         netip.Addr // the cluster DNS address
	Domain      string     // "cluster.local"
	Services    []*corev1.Service
	Slices      []*discoveryv1.EndpointSlice
	Nodes       []*corev1.Node
}
