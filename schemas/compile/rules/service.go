package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

func (j *judge) service(s *corev1.ServiceSpec) {
	if s.Type == corev1.ServiceTypeExternalName {
		j.externalName(s)
		return
	}
	headless := s.ClusterIP == corev1.ClusterIPNone || slices.Contains(s.ClusterIPs, corev1.ClusterIPNone)
	if s.ExternalName != "" {
		j.remove("spec.externalName", "only a service of type ExternalName leads to a name")
	}
	if len(s.Selector) == 0 {
		j.add(Problem{Field: "spec.selector", Message: "a service without selector is not implemented by Decree", Expected: "at least one label"})
	}
	if len(s.Ports) == 0 && !headless {
		j.add(Problem{Field: "spec.ports", Message: "a service with an address needs a port", Expected: "at least one port"})
	}
	j.clusterIPs(s)
	j.families(s)
	j.servicePorts(s)
	j.external(s, headless)
	j.balancer(s)
	if s.SessionAffinityConfig != nil && s.SessionAffinity != corev1.ServiceAffinityClientIP {
		j.add(Problem{Field: "spec.sessionAffinityConfig", Message: "there is no session affinity to configure", Expected: `sessionAffinity: "ClientIP"`})
	}
	if headless && s.SessionAffinity == corev1.ServiceAffinityClientIP {
		j.add(Problem{Field: "spec.sessionAffinity", Message: "a headless service has no address that could keep to one pod", Expected: `"None"`, Found: `"ClientIP"`})
	}
}

func (j *judge) remove(field, message string) {
	j.add(Problem{Field: field, Message: message, Hint: "remove the field"})
}

// externalName judges a service that is an alias in DNS, and nothing else.
func (j *judge) externalName(s *corev1.ServiceSpec) {
	if s.ExternalName == "" {
		j.add(Problem{Field: "spec.externalName", Message: "a service of type ExternalName leads to a name", Expected: "a DNS name"})
	} else if _, err := netip.ParseAddr(s.ExternalName); err == nil {
		j.add(Problem{Field: "spec.externalName", Message: "the value is not allowed", Expected: "a DNS name, not an address", Found: fmt.Sprintf("%q", s.ExternalName)})
	}
	for _, f := range []choice{
		{"clusterIP", s.ClusterIP != ""}, {"clusterIPs", len(s.ClusterIPs) > 0}, {"ipFamilies", len(s.IPFamilies) > 0}, {"ipFamilyPolicy", s.IPFamilyPolicy != nil},
		{"externalIPs", len(s.ExternalIPs) > 0}, {"externalTrafficPolicy", s.ExternalTrafficPolicy != ""}, {"internalTrafficPolicy", s.InternalTrafficPolicy != nil},
		{"healthCheckNodePort", s.HealthCheckNodePort != 0}, {"loadBalancerIP", s.LoadBalancerIP != ""}, {"loadBalancerSourceRanges", len(s.LoadBalancerSourceRanges) > 0},
		{"allocateLoadBalancerNodePorts", s.AllocateLoadBalancerNodePorts != nil}, {"trafficDistribution", s.TrafficDistribution != nil}, {"sessionAffinityConfig", s.SessionAffinityConfig != nil},
	} {
		if f.set {
			j.remove("spec."+f.name, "a service of type ExternalName is an alias in DNS and has no "+f.name)
		}
	}
	j.servicePorts(s)
}

// address judges a text that the definitions took for an IP address.
func (j *judge) address(field, text string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		j.add(Problem{Field: field, Message: "the value is not allowed", Expected: "an IP address", Found: fmt.Sprintf("%q", text)})
		return a, false
	}
	return a, true
}

func (j *judge) clusterIPs(s *corev1.ServiceSpec) {
	if s.ClusterIP != "" && s.ClusterIP != corev1.ClusterIPNone {
		j.address("spec.clusterIP", s.ClusterIP)
	}
	if s.ClusterIP != "" && len(s.ClusterIPs) > 0 && s.ClusterIPs[0] != s.ClusterIP {
		j.add(Problem{Field: "spec.clusterIP", Message: "the first of clusterIPs is another one", Expected: fmt.Sprintf("%q", s.ClusterIPs[0]), Found: fmt.Sprintf("%q", s.ClusterIP)})
	}
	var families []bool
	for i, ip := range s.ClusterIPs {
		at := item("spec.clusterIPs", i, "")
		if ip == corev1.ClusterIPNone {
			if len(s.ClusterIPs) > 1 {
				j.add(Problem{Field: at, Message: "a headless service has no addresses", Expected: `"None" alone`})
			}
			continue
		}
		if a, ok := j.address(at, ip); ok {
			if slices.Contains(families, a.Is4()) {
				j.add(Problem{Field: at, Message: "the service has an address of this family already", Expected: "one address of each family", Found: fmt.Sprintf("%q", ip)})
			}
			families = append(families, a.Is4())
		}
	}
}

func (j *judge) families(s *corev1.ServiceSpec) {
	for i, f := range s.IPFamilies {
		at := item("spec.ipFamilies", i, "")
		if slices.Contains(s.IPFamilies[:i], f) {
			j.add(Problem{Field: at, Message: "the family is there twice", Found: fmt.Sprintf("%q", f)})
			return
		}
	}
	single := s.IPFamilyPolicy != nil && *s.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack
	if n := max(len(s.IPFamilies), len(s.ClusterIPs)); single && n > 1 {
		j.add(Problem{Field: "spec.ipFamilyPolicy", Message: "a service with one address family names two", Expected: `"PreferDualStack" or "RequireDualStack"`, Found: `"SingleStack"`})
	}
	ips := s.ClusterIPs
	if len(ips) == 0 && s.ClusterIP != "" {
		ips = []string{s.ClusterIP}
	}
	for i := range min(len(ips), len(s.IPFamilies)) {
		if a, err := netip.ParseAddr(ips[i]); err == nil && a.Is4() != (s.IPFamilies[i] == corev1.IPv4Protocol) {
			j.add(Problem{Field: item("spec.ipFamilies", i, ""), Message: "the service's address is of another family", Expected: "the family of " + ips[i], Found: fmt.Sprintf("%q", s.IPFamilies[i])})
		}
	}
}

func (j *judge) servicePorts(s *corev1.ServiceSpec) {
	var names, numbers, nodePorts []string
	onNodes := s.Type == corev1.ServiceTypeNodePort || s.Type == corev1.ServiceTypeLoadBalancer
	for i, p := range s.Ports {
		protocol := p.Protocol
		if protocol == "" {
			protocol = corev1.ProtocolTCP
		}
		nodePort := ""
		switch {
		case p.NodePort != 0 && onNodes:
			nodePort = fmt.Sprintf("%d/%s", p.NodePort, protocol)
		case p.NodePort != 0:
			j.add(Problem{Field: item("spec.ports", i, ".nodePort"), Message: fmt.Sprintf("a service of type %s has no port on the nodes", typeOf(s)), Expected: `type: "NodePort" or "LoadBalancer", or no nodePort`})
		}
		names, numbers, nodePorts = append(names, p.Name), append(numbers, fmt.Sprintf("%d/%s", p.Port, protocol)), append(nodePorts, nodePort)
		if p.Name == "" && len(s.Ports) > 1 {
			j.add(Problem{Field: item("spec.ports", i, ".name"), Message: "with more than one port, each has a name"})
		}
	}
	j.unique("two ports of the service have the same name", func(i int) string { return item("spec.ports", i, ".name") }, names)
	j.unique("the service has this port twice", func(i int) string { return item("spec.ports", i, ".port") }, numbers)
	j.unique("two ports of the service have the same port on the nodes", func(i int) string { return item("spec.ports", i, ".nodePort") }, nodePorts)
}

func typeOf(s *corev1.ServiceSpec) corev1.ServiceType {
	if s.Type == "" {
		return corev1.ServiceTypeClusterIP
	}
	return s.Type
}

// external judges what clients outside the cluster use.
func (j *judge) external(s *corev1.ServiceSpec, headless bool) {
	onNodes := s.Type == corev1.ServiceTypeNodePort || s.Type == corev1.ServiceTypeLoadBalancer
	if headless && onNodes {
		j.add(Problem{Field: "spec.type", Message: "a headless service has no ports on the nodes", Expected: `"ClusterIP", or a service with an address`, Found: fmt.Sprintf("%q", s.Type)})
	}
	if headless && len(s.ExternalIPs) > 0 {
		j.remove("spec.externalIPs", "a headless service has no addresses")
	}
	for i, ip := range s.ExternalIPs {
		a, ok := j.address(item("spec.externalIPs", i, ""), ip)
		if ok && (a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast()) {
			j.add(Problem{Field: item("spec.externalIPs", i, ""), Message: "no host outside can reach this address", Found: fmt.Sprintf("%q", ip)})
		}
	}
	if s.ExternalTrafficPolicy != "" && !onNodes && len(s.ExternalIPs) == 0 {
		j.add(Problem{Field: "spec.externalTrafficPolicy", Message: fmt.Sprintf("a service of type %s has no clients from outside", typeOf(s)), Expected: `type: "NodePort" or "LoadBalancer", or externalIPs`})
	}
}

// balancer judges what only load balancers have.
func (j *judge) balancer(s *corev1.ServiceSpec) {
	if s.Type != corev1.ServiceTypeLoadBalancer {
		for _, f := range []choice{
			{"loadBalancerIP", s.LoadBalancerIP != ""}, {"loadBalancerSourceRanges", len(s.LoadBalancerSourceRanges) > 0},
			{"allocateLoadBalancerNodePorts", s.AllocateLoadBalancerNodePorts != nil}, {"healthCheckNodePort", s.HealthCheckNodePort != 0},
		} {
			if f.set {
				j.add(Problem{Field: "spec." + f.name, Message: fmt.Sprintf("a service of type %s has no load balancer", typeOf(s)), Expected: `type: "LoadBalancer"`})
			}
		}
		return
	}
	if s.LoadBalancerIP != "" {
		j.address("spec.loadBalancerIP", s.LoadBalancerIP)
	}
	for i, text := range s.LoadBalancerSourceRanges {
		if _, err := netip.ParsePrefix(strings.TrimSpace(text)); err != nil {
			j.add(Problem{Field: item("spec.loadBalancerSourceRanges", i, ""), Message: "the value is not allowed", Expected: "a network such as 203.0.113.0/24", Found: fmt.Sprintf("%q", text)})
		}
	}
	if s.HealthCheckNodePort == 0 {
		return
	}
	if s.ExternalTrafficPolicy != corev1.ServiceExternalTrafficPolicyLocal {
		j.add(Problem{Field: "spec.healthCheckNodePort", Message: "nobody needs to ask which nodes have endpoints", Expected: `externalTrafficPolicy: "Local"`})
	}
	if slices.ContainsFunc(s.Ports, func(p corev1.ServicePort) bool { return p.NodePort == s.HealthCheckNodePort }) {
		j.add(Problem{Field: "spec.healthCheckNodePort", Message: "one of the service's ports has this port on the nodes", Found: fmt.Sprint(s.HealthCheckNodePort)})
	}
}

func (j *judge) pool(s *api.AddressPoolSpec) {
	if len(s.Addresses) == 0 {
		j.add(Problem{Field: "spec.addresses", Message: "the pool is empty", Expected: "networks such as 203.0.113.16/28, or ranges such as 203.0.113.7-203.0.113.9"})
	}
	var ranges []api.AddressRange
	for i, text := range s.Addresses {
		at := item("spec.addresses", i, "")
		r, err := api.ParseAddressRange(text)
		if err != nil {
			j.add(Problem{Field: at, Message: "the value is not allowed", Expected: "a network such as 203.0.113.16/28, or a range such as 203.0.113.7-203.0.113.9", Found: fmt.Sprintf("%q", text)})
			continue
		}
		for _, other := range ranges {
			if r.Overlaps(other) {
				j.add(Problem{Field: at, Message: "the pool has some of these addresses already", Found: fmt.Sprintf("%q", text)})
				break
			}
		}
		ranges = append(ranges, r)
	}
	j.labels("spec.serviceSelector", s.ServiceSelector)
	j.labels("spec.namespaceSelector", s.NamespaceSelector)
}

// labels judges a selector that stands by itself.
func (j *judge) labels(at string, s *metav1.LabelSelector) {
	if s == nil {
		return
	}
	for i, e := range s.MatchExpressions {
		in := e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn
		switch field := item(at+".matchExpressions", i, ""); {
		case in && len(e.Values) == 0:
			j.add(Problem{Field: field, Message: fmt.Sprintf("the operator %s needs values", e.Operator), Expected: "values with at least one text"})
		case !in && len(e.Values) > 0:
			j.remove(field+".values", fmt.Sprintf("the operator %s takes no values", e.Operator))
		}
	}
}
