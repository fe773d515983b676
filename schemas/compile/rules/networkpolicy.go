package rules

import (
	"fmt"
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func (j *judge) networkPolicy(s *networkingv1.NetworkPolicySpec) {
	j.selector("spec.podSelector", &s.PodSelector)
	for i := range s.Ingress {
		at := fmt.Sprintf("spec.ingress[%d]", i)
		j.policyPeers(at+".from", s.Ingress[i].From)
		j.policyPorts(at+".ports", s.Ingress[i].Ports)
	}
	for i := range s.Egress {
		at := fmt.Sprintf("spec.egress[%d]", i)
		j.policyPeers(at+".to", s.Egress[i].To)
		j.policyPorts(at+".ports", s.Egress[i].Ports)
	}
	for _, x := range []struct {
		field string
		of    networkingv1.PolicyType
		rules int
	}{{"spec.ingress", networkingv1.PolicyTypeIngress, len(s.Ingress)}, {"spec.egress", networkingv1.PolicyTypeEgress, len(s.Egress)}} {
		if x.rules > 0 && len(s.PolicyTypes) > 0 && !slices.Contains(s.PolicyTypes, x.of) {
			j.add(Problem{Field: x.field, Message: "these rules would have no effect", Hint: fmt.Sprintf("add %s to spec.policyTypes, or remove them", x.of)})
		}
	}
}

// selector reports a label selector that nobody can understand.
func (j *judge) selector(field string, s *metav1.LabelSelector) {
	if s == nil {
		return
	}
	if _, err := metav1.LabelSelectorAsSelector(s); err != nil {
		j.add(Problem{Field: field, Message: "not a label selector", Found: err.Error()})
	}
}

func (j *judge) policyPeers(list string, peers []networkingv1.NetworkPolicyPeer) {
	for i := range peers {
		p, at := &peers[i], item(list, i, "")
		switch selects := p.PodSelector != nil || p.NamespaceSelector != nil; {
		case p.IPBlock != nil && selects:
			j.add(Problem{Field: at, Message: "a peer is addresses or pods, not both", Hint: "make two peers of it"})
		case p.IPBlock == nil && !selects:
			j.add(Problem{Field: at, Message: "a peer has to say who it is", Expected: "ipBlock, podSelector, namespaceSelector, or both selectors", Found: "none"})
		}
		j.selector(at+".podSelector", p.PodSelector)
		j.selector(at+".namespaceSelector", p.NamespaceSelector)
		if p.IPBlock != nil {
			j.ipBlock(at+".ipBlock", p.IPBlock)
		}
	}
}

func (j *judge) ipBlock(at string, b *networkingv1.IPBlock) {
	const expected = "a range such as 10.0.0.0/8 or 2001:db8::/32"
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		j.add(Problem{Field: at + ".cidr", Message: "not a range of addresses", Expected: expected, Found: b.CIDR})
		return
	}
	for i, text := range b.Except {
		except, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
			j.add(Problem{Field: item(at+".except", i, ""), Message: "not a range of addresses", Expected: expected, Found: text})
		case !cidr.Contains(except.Addr()) || except.Bits() <= cidr.Bits():
			j.add(Problem{Field: item(at+".except", i, ""), Message: "an exception has to be a part of its block", Expected: "a smaller range within " + b.CIDR, Found: text})
		}
	}
}

func (j *judge) policyPorts(list string, ports []networkingv1.NetworkPolicyPort) {
	for i := range ports {
		p := &ports[i]
		switch {
		case p.EndPort == nil:
		case p.Port == nil || p.Port.Type == intstr.String:
			j.add(Problem{Field: item(list, i, ".endPort"), Message: "a range of ports begins with a number", Hint: "set port to the first one"})
		case *p.EndPort < p.Port.IntVal:
			j.add(Problem{Field: item(list, i, ".endPort"), Message: "the range ends before it begins", Expected: fmt.Sprintf("%d or more", p.Port.IntVal), Found: fmt.Sprint(*p.EndPort)})
		}
	}
}
