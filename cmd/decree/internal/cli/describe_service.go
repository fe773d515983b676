package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"decree.dev/decree/schemas/api"
)

func (w *sheet) service(s *corev1.Service, parts []*discoveryv1.EndpointSlice, now time.Time) {
	w.line("Type:", string(s.Spec.Type))
	w.line("Selector:", orNone(labels.FormatLabels(s.Spec.Selector)))
	w.line("IP:", orNone(strings.Join(s.Spec.ClusterIPs, ", ")))
	w.optional("External Name:", s.Spec.ExternalName)
	w.optional("External IPs:", strings.Join(s.Spec.ExternalIPs, ", "))
	w.outside(s)
	for _, p := range s.Spec.Ports {
		text := fmt.Sprintf("%d/%s to %s", p.Port, p.Protocol, p.TargetPort.String())
		if p.NodePort > 0 {
			text += fmt.Sprintf(", node port %d", p.NodePort)
		}
		w.line("Port:", strings.TrimSpace(p.Name+" "+text))
	}
	var ready, other []string
	for _, slice := range parts {
		for _, e := range slice.Endpoints {
			if e.Conditions.Ready == nil || *e.Conditions.Ready {
				ready = append(ready, endpointAddresses(slice, e))
			} else {
				other = append(other, endpointAddresses(slice, e))
			}
		}
	}
	w.line("Endpoints:", orNone(strings.Join(ready, ", ")))
	w.optional("Not Ready:", strings.Join(other, ", "))
	w.line("Session Affinity:", string(s.Spec.SessionAffinity))
	w.conditions(s.Status.Conditions, now)
}

// outside are the lines about families and clients from outside that say something.
func (w *sheet) outside(s *corev1.Service) {
	if len(s.Spec.IPFamilies) > 1 && s.Spec.IPFamilyPolicy != nil {
		w.line("IP Families:", fmt.Sprintf("%s, %s (%s)", s.Spec.IPFamilies[0], s.Spec.IPFamilies[1], *s.Spec.IPFamilyPolicy))
	}
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		var ips []string
		for _, in := range s.Status.LoadBalancer.Ingress {
			ips = append(ips, in.IP+in.Hostname)
		}
		w.line("Load Balancer:", orNone(strings.Join(ips, ", ")))
		w.optional("Source Ranges:", strings.Join(s.Spec.LoadBalancerSourceRanges, ", "))
	}
	w.optional("External Traffic:", string(s.Spec.ExternalTrafficPolicy))
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p != corev1.ServiceInternalTrafficPolicyCluster {
		w.line("Internal Traffic:", string(*p))
	}
	if s.Spec.TrafficDistribution != nil {
		w.line("Traffic:", *s.Spec.TrafficDistribution)
	}
	if s.Spec.HealthCheckNodePort > 0 {
		w.line("Health Check Port:", strconv.Itoa(int(s.Spec.HealthCheckNodePort)))
	}
}

func (w *sheet) pool(p *api.AddressPool) {
	w.line("Addresses:", orNone(strings.Join(p.Spec.Addresses, ", ")))
	w.line("Assigned:", strconv.FormatInt(p.Status.Assigned, 10))
	w.line("Auto Assign:", strconv.FormatBool(p.Spec.AutoAssign == nil || *p.Spec.AutoAssign))
	w.optional("Services:", selection(p.Spec.ServiceSelector))
	w.optional("Namespaces:", selection(p.Spec.NamespaceSelector))
}

// selection is the text of a selector; "" for one that selects everything.
func selection(s *metav1.LabelSelector) string {
	if s == nil || len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
		return ""
	}
	return metav1.FormatLabelSelector(s)
}
