package render

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// HealthCheck is what a load balancer asks a node about one service: whether to send it
// traffic there. It is comparable.
type HealthCheck struct {
	Namespace, Name string
	// Port is the service's healthCheckNodePort.
	Port uint16
	// Endpoints is the number of ready endpoints on this node.
	Endpoints int
}

// HealthChecks returns the health checks of d's node, ordered by port. A port has one
// service: the first by namespace and name.
func HealthChecks(d Desired) []HealthCheck {
	var out []HealthCheck
	bySvc := map[name]int{} // 1 + index in out
	for _, svc := range d.Services {
		port := svc.Spec.HealthCheckNodePort
		if svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && port >= 1 && port <= 65535 {
			out = append(out, HealthCheck{Namespace: svc.Namespace, Name: svc.Name, Port: uint16(port)})
			bySvc[name{svc.Namespace, svc.Name}] = len(out)
		}
	}
	if len(out) == 0 {
		return nil
	}
	type member struct {
		i  int
		id string
	}
	seen := map[member]bool{} // a pod has an endpoint for each family and set of ports
	for _, s := range d.Slices {
		i := bySvc[name{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}]
		for j := range s.Endpoints {
			ep := &s.Endpoints[j]
			if m := (member{i, identity(ep)}); i > 0 && m.id != "" && !seen[m] && d.Node != "" && ep.NodeName != nil && *ep.NodeName == d.Node && (ep.Conditions.Ready == nil || *ep.Conditions.Ready) {
				seen[m] = true
				out[i-1].Endpoints++
			}
		}
	}
	slices.SortFunc(out, func(a, b HealthCheck) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return slices.CompactFunc(out, func(a, b HealthCheck) bool { return a.Port == b.Port })
}

// identity is the pod behind an endpoint, or its address where none is named.
func identity(ep *discoveryv1.Endpoint) string {
	switch {
	case ep.TargetRef != nil && ep.TargetRef.UID != "":
		return string(ep.TargetRef.UID)
	case len(ep.Addresses) > 0:
		return ep.Addresses[0]
	}
	return ""
}
