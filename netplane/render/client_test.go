package render_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/render"
)

// TestClient: a proxy on a node is led where the node's table leads clients in the cluster.
func TestClient(t *testing.T) {
	slice := func(family discoveryv1.AddressType, node string, ready bool, addr string) *discoveryv1.EndpointSlice {
		name, port, serving, ending := "http", int32(8080), true, !ready
		return &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: addr, Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}, AddressType: family,
			Ports:     []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{addr}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &ending}}},
		}
	}
	here4, there4 := slice(discoveryv1.AddressTypeIPv4, "here", true, "10.98.0.1"), slice(discoveryv1.AddressTypeIPv4, "there", true, "10.98.1.1")
	ending, here6 := slice(discoveryv1.AddressTypeIPv4, "here", false, "10.98.0.2"), slice(discoveryv1.AddressTypeIPv6, "here", true, "fd00::1")
	local := corev1.ServiceInternalTrafficPolicyLocal
	for name, tt := range map[string]struct {
		slices   []*discoveryv1.EndpointSlice
		families []corev1.IPFamily
		local    bool
		protocol corev1.Protocol
		want     string
	}{
		"all that are ready":          {slices: []*discoveryv1.EndpointSlice{there4, here4, ending}, want: "[10.98.0.1:8080 10.98.1.1:8080]"},
		"one that ends, if need be":   {slices: []*discoveryv1.EndpointSlice{ending}, want: "[10.98.0.2:8080]"},
		"one family":                  {slices: []*discoveryv1.EndpointSlice{here4, here6}, want: "[10.98.0.1:8080]"},
		"the primary family":          {slices: []*discoveryv1.EndpointSlice{here4, here6}, families: []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}, want: "[[fd00::1]:8080]"},
		"the family that there is":    {slices: []*discoveryv1.EndpointSlice{here4}, families: []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}, want: "[10.98.0.1:8080]"},
		"those of this node":          {slices: []*discoveryv1.EndpointSlice{here4, there4}, local: true, want: "[10.98.0.1:8080]"},
		"those of this node: no such": {slices: []*discoveryv1.EndpointSlice{there4}, local: true, want: "[]"},
		"no TCP":                      {slices: []*discoveryv1.EndpointSlice{here4}, protocol: corev1.ProtocolUDP, want: "[]"},
	} {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: "web"}, Spec: corev1.ServiceSpec{IPFamilies: tt.families, Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: tt.protocol}}}}
		if tt.local {
			svc.Spec.InternalTrafficPolicy = &local
		}
		c := render.NewClient(render.Desired{Node: "here", Services: []*corev1.Service{svc}, Slices: tt.slices})
		if got := fmt.Sprint(c.Endpoints(svc, &svc.Spec.Ports[0])); got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
}
