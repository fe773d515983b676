package render

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
)

// Client is a program on a node that chooses between endpoints itself, such as a proxy. It
// is led where the node's table would lead a client in the cluster.
type Client struct {
	renderer renderer
	groups   groups
}

// NewClient returns a client on the node of d. It is not safe for concurrent use.
func NewClient(d Desired) *Client {
	c := &Client{renderer: *newRenderer(d)}
	c.groups.set(d.Slices)
	return c
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
	slices := c.groups.of(name{svc.Namespace, svc.Name}).slices
	for _, f := range families {
		eps := c.renderer.reachable(svc, slices, f == corev1.IPv4Protocol, p.Name, proto)
		if s := eps.internal(local, 0); len(s.Endpoints) > 0 {
			return s.Endpoints
		}
	}
	return nil
}
