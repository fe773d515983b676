package workload

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"decree.dev/decree/schemas/api"
)

const (
	// maxIngressNodes is how many nodes the status of an Ingress names: enough for a name
	// in DNS, few enough to be repeated in every Ingress.
	maxIngressNodes = 16
	// maxIngresses is how many Ingresses one pass changes.
	maxIngresses = 1000
)

// Ingresses returns what makes the status of every Ingress name the nodes that serve it:
// those that are ready, serve Ingresses and are not excluded from load balancing, the first
// by name. One that Decree does not serve has no address.
func Ingresses(r api.Reader) (ms []api.Mutation) {
	classes := slices.Collect(api.List[*networkingv1.IngressClass](r, ""))
	var at []networkingv1.IngressLoadBalancerIngress
	listed := false
	for ing := range api.List[*networkingv1.Ingress](r, "") {
		var want []networkingv1.IngressLoadBalancerIngress
		if ing.DeletionTimestamp == nil && api.ServesIngress(ing, classes) {
			if !listed {
				at, listed = ingressAddresses(r), true
			}
			want = at
		}
		if equality.Semantic.DeepEqual(ing.Status.LoadBalancer.Ingress, want) {
			continue
		}
		o := *ing
		o.Status.LoadBalancer.Ingress = want
		if ms = append(ms, api.Guarded(api.UpdateStatus, &o)); len(ms) == maxIngresses {
			break
		}
	}
	return ms
}

// ingressAddresses are those of the nodes that serve: of each its external ones, or else
// its internal ones.
func ingressAddresses(r api.Reader) (out []networkingv1.IngressLoadBalancerIngress) {
	var nodes []*corev1.Node
	for n := range api.List[*corev1.Node](r, "") {
		_, excluded := n.Labels[corev1.LabelNodeExcludeBalancers]
		if !excluded && n.DeletionTimestamp == nil && n.Labels[api.LabelIngressNode] == "true" && nodeReady(n).Status == corev1.ConditionTrue {
			nodes = append(nodes, n)
		}
	}
	slices.SortFunc(nodes, func(a, b *corev1.Node) int { return cmp.Compare(a.Name, b.Name) })
	for _, n := range nodes[:min(len(nodes), maxIngressNodes)] {
		addresses := addressesOf(n, corev1.NodeExternalIP)
		if len(addresses) == 0 {
			addresses = addressesOf(n, corev1.NodeInternalIP)
		}
		for _, a := range addresses {
			out = append(out, networkingv1.IngressLoadBalancerIngress{IP: a})
		}
	}
	return out
}

func addressesOf(n *corev1.Node, kind corev1.NodeAddressType) (out []string) {
	for _, a := range n.Status.Addresses {
		if a.Type == kind {
			out = append(out, a.Address)
		}
	}
	return out
}
