package cli

import (
	"fmt"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/netplane/policy"
)

func (w *sheet) networkPolicy(o *networkingv1.NetworkPolicy) {
	w.line("Pods:", selected(&o.Spec.PodSelector))
	ingress, egress := policy.Types(o)
	if ingress {
		w.line("Ingress:", orNobody(len(o.Spec.Ingress)))
		for i := range o.Spec.Ingress {
			r := &o.Spec.Ingress[i]
			w.line(fmt.Sprintf("  rule %d", i+1), "from "+peersText(r.From), portsText(r.Ports))
		}
	}
	if egress {
		w.line("Egress:", orNobody(len(o.Spec.Egress)))
		for i := range o.Spec.Egress {
			r := &o.Spec.Egress[i]
			w.line(fmt.Sprintf("  rule %d", i+1), "to "+peersText(r.To), portsText(r.Ports))
		}
	}
}

// selected is a selector in words.
func selected(s *metav1.LabelSelector) string {
	if s == nil || len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
		return "all"
	}
	return metav1.FormatLabelSelector(s)
}

func orNobody(rules int) string {
	if rules == 0 {
		return "nobody"
	}
	return ""
}

func peersText(peers []networkingv1.NetworkPolicyPeer) string {
	if len(peers) == 0 {
		return "anyone"
	}
	var parts []string
	for i := range peers {
		switch p := &peers[i]; {
		case p.IPBlock != nil && len(p.IPBlock.Except) > 0:
			parts = append(parts, p.IPBlock.CIDR+" without "+strings.Join(p.IPBlock.Except, ", "))
		case p.IPBlock != nil:
			parts = append(parts, p.IPBlock.CIDR)
		case p.NamespaceSelector != nil:
			parts = append(parts, fmt.Sprintf("pods (%s) of namespaces (%s)", selected(p.PodSelector), selected(p.NamespaceSelector)))
		default:
			parts = append(parts, fmt.Sprintf("pods (%s)", selected(p.PodSelector)))
		}
	}
	return strings.Join(parts, "; ")
}

func portsText(ports []networkingv1.NetworkPolicyPort) string {
	var parts []string
	for i := range ports {
		p := &ports[i]
		text := "any port"
		if p.Port != nil {
			text = p.Port.String()
		}
		if p.EndPort != nil {
			text += fmt.Sprintf("-%d", *p.EndPort)
		}
		if p.Protocol != nil {
			text += "/" + string(*p.Protocol)
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, ", ")
}
