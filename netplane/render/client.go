package render

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Client is a program on a node that chooses between endpoints itself, such as a proxy. It
// is led where the node's table would lead a client in the cluster.
type Client struct {
	renderer renderer
	slices   map[name][]*discoveryv1.EndpointSlice
}

// NewClient returns a client on the node of d. It is not safe for concurrent use.
func NewClient(d Desired) *Client {
	return &Client{*newRenderer(d), slicesByService(d.Slices)}
}

// Endpoints are where connections to one TCP port of svc go, in order: to the service's
// first address family that has endpoints, as others are the same pods again. There are
// none when the service's policy does not let the node reach those that there are.
func (c *Client) Endpoints(svc *corev1.Service, p *corev1.ServicePort) []netip.AddrPort {
	proto, ok := ProtoOf(p.Protocol)
	if !ok || proto != TCP {
		return nil
	}
	families := svc.Spec.IPFamilies
	if len(families) == 0 {
		families = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	}
	local := svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	for _, f := range families {
		eps := c.renderer.reachable(svc, c.slices[name{svc.Namespace, svc.Name}], f == corev1.IPv4Protocol, p.Name, proto)
		if s := eps.internal(local, 0); len(s.Endpoints) > 0 {
			return s.Endpoints
		}
	}
	return nil
}
