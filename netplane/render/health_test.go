package render

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

func TestHealthChecks(t *testing.T) {
	spec := func(port int32) corev1.ServiceSpec {
		return corev1.ServiceSpec{Type: "LoadBalancer", ExternalTrafficPolicy: "Local", ClusterIP: "10.97.0.1", HealthCheckNodePort: port}
	}
	everywhere, nodePort := spec(30002), spec(30003)
	everywhere.ExternalTrafficPolicy, nodePort.Type = "Cluster", "NodePort"
	v6 := slice("a", discoveryv1.AddressTypeIPv6, 1, "fd98::2 @n1")
	v4 := slice("a", discoveryv1.AddressTypeIPv4, 1, "10.98.0.2 @n1", "10.98.0.3 @n1 notready", "10.98.0.4 @n1 notready serving terminating", "10.98.0.5 @n1", "10.98.1.2 @n2", "10.98.2.2")
	for _, s := range []*discoveryv1.EndpointSlice{v4, v6} {
		s.Endpoints[0].TargetRef = &corev1.ObjectReference{UID: "the same pod"}
	}
	d := cluster([]*corev1.Service{svc("c", spec(30001)), svc("b", spec(30004)), svc("a", spec(30001)), svc("d", everywhere), svc("e", nodePort)}, v4, v6)
	if got, want := fmt.Sprint(HealthChecks(d)), "[{d a 30001 2} {d b 30004 0}]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
