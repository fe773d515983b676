package workload_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

func servingNode(name string, ready corev1.ConditionStatus, addresses ...corev1.NodeAddress) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{api.LabelIngressNode: "true"}}, Status: corev1.NodeStatus{
		Addresses: addresses, Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}},
	}}
}

// TestIngresses: an Ingress names the nodes that serve it, while they do.
func TestIngresses(t *testing.T) {
	internal := func(a string) corev1.NodeAddress { return corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a} }
	external := func(a string) corev1.NodeAddress { return corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: a} }
	off := servingNode("off", corev1.ConditionTrue, internal("10.0.0.9"))
	off.Labels[api.LabelIngressNode] = "false"
	excluded := servingNode("excluded", corev1.ConditionTrue, internal("10.0.0.8"))
	excluded.Labels[corev1.LabelNodeExcludeBalancers] = ""
	other := "nginx"
	ing := func(name string, class *string, had ...string) *networkingv1.Ingress {
		o := &networkingv1.Ingress{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, ResourceVersion: "7"}, Spec: networkingv1.IngressSpec{IngressClassName: class}}
		for _, a := range had {
			o.Status.LoadBalancer.Ingress = append(o.Status.LoadBalancer.Ingress, networkingv1.IngressLoadBalancerIngress{IP: a})
		}
		return o
	}
	view := api.NewSnapshot(9,
		servingNode("b", corev1.ConditionTrue, internal("10.0.0.2"), internal("2001:db8::2")), servingNode("a", corev1.ConditionTrue, internal("10.0.0.1"), external("203.0.113.1")),
		servingNode("silent", corev1.ConditionUnknown, internal("10.0.0.7")), off, excluded,
		ing("new", nil), ing("settled", nil, "203.0.113.1", "10.0.0.2", "2001:db8::2"), ing("others", &other, "10.0.0.1"))
	got := ""
	for _, m := range workload.Ingresses(view) {
		got += fmt.Sprint(m.Verb, " ", m.Key.Name, " at ", m.Revision, ":")
		for _, in := range m.Object.(*networkingv1.Ingress).Status.LoadBalancer.Ingress {
			got += " " + in.IP
		}
		got += "\n"
	}
	if want := "update status new at 7: 203.0.113.1 10.0.0.2 2001:db8::2\nupdate status others at 7:\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	var many []api.Object
	for i := range 40 {
		many = append(many, servingNode(fmt.Sprintf("n%02d", i), corev1.ConditionTrue, internal(fmt.Sprintf("10.0.0.%d", i))))
	}
	ms := workload.Ingresses(api.NewSnapshot(9, append(many, ing("new", nil))...))
	if in := ms[0].Object.(*networkingv1.Ingress).Status.LoadBalancer.Ingress; len(in) != 16 || in[15].IP != "10.0.0.15" {
		t.Errorf("with 40 nodes: %v", in)
	}
}
