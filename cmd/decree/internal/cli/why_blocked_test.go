package cli

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"decree.dev/decree/schemas/api"
)

func podWith(namespace, name string, addrs ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}}}
	p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}
	p.Spec.NodeName, p.Status.HostIP = "n1", "192.0.2.1"
	for _, a := range addrs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: a})
	}
	return p
}

// policyKnown is a cluster in which web is reached by client alone, on port 8080.
func policyKnown() *known {
	only := func(app string) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
	}
	deny := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny"}, Spec: networkingv1.NetworkPolicySpec{PodSelector: *only("web")}}
	allow := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "allow"}, Spec: networkingv1.NetworkPolicySpec{
		PodSelector: *only("web"),
		Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: only("nobody")}}}, {
			From: []networkingv1.NetworkPolicyPeer{{PodSelector: only("client")}}, Ports: []networkingv1.NetworkPolicyPort{{Port: named("http")}}}},
	}}
	api.Origin{Source: "shop", Commit: "3f2a1c9000", Pos: api.Position{File: "net.cue", Line: 7}}.Set(deny)
	api.Origin{Source: "shop", Commit: "3f2a1c9000", Pos: api.Position{File: "net.cue", Line: 12}}.Set(allow)
	host := podWith("shop", "host", "192.0.2.1")
	host.Spec.HostNetwork = true
	return &known{
		namespace: "shop", dns: netip.MustParseAddr("10.97.0.10"), policies: []*networkingv1.NetworkPolicy{deny, allow},
		pods:     []*corev1.Pod{podWith("shop", "client", "10.98.0.2", "fd98::2"), podWith("shop", "web", "10.98.0.3", "fd98::3"), podWith("other", "client", "10.98.1.2"), podWith("shop", "new"), host},
		services: []*corev1.Service{{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}, Spec: corev1.ServiceSpec{ClusterIP: "10.97.0.5"}}},
	}
}

func TestWhyBlocked(t *testing.T) {
	for _, c := range []struct{ from, to, want string }{
		{"client", "web:http", "allowed: shop/client (10.98.0.2) to shop/web (10.98.0.3), tcp port 8080\n" +
			"  egress:  allowed: no policy isolates shop/client for egress\n" +
			"  ingress: allowed: ingress rule 2 of NetworkPolicy shop/allow (source \"shop\", net.cue:12 at 3f2a1c9)\n"},
		{"client", "web:9090", "blocked: shop/client (10.98.0.2) to shop/web (10.98.0.3), tcp port 9090\n" +
			"  egress:  allowed: no policy isolates shop/client for egress\n" +
			"  ingress: blocked: no policy allows it: shop/web is isolated for ingress\n" +
			"             by NetworkPolicy shop/allow (source \"shop\", net.cue:12 at 3f2a1c9)\n" +
			"             by NetworkPolicy shop/deny (source \"shop\", net.cue:7 at 3f2a1c9)\n"},
		{"other/client", "web:8080", "blocked: other/client"},
		{"client", "web:8080/udp", "blocked: shop/client"},
		{"host", "web:1", "a node always reaches its own pods"},
		{"192.0.2.1", "web:1", "a node always reaches its own pods"},
		{"192.0.2.2", "web:8080", "blocked: 192.0.2.2 to shop/web"},
		{"fd98::2", "[fd98::3]:8080", "allowed: shop/client (fd98::2) to shop/web (fd98::3)"},
		{"web", "web:1", "a pod always reaches itself"},
		{"web", "1.1.1.1:53/udp", "allowed: shop/web (10.98.0.3) to 1.1.1.1, udp port 53"},
		{"web", "other/client:1", "allowed: shop/web (10.98.0.3) to other/client (10.98.1.2)"},
		// What cannot be answered says what to do.
		{"nobody", "web:1", "there is no pod"},
		{"new", "web:1", "no address yet"},
		{"client", "web", "expected POD:PORT"},
		{"client", "fd98::3:80", "write [ADDRESS]:PORT"},
		{"client", "web:https", "or the name of a tcp port of shop/web"},
		{"client", "web:70000", "expected a number from 1 to 65535"},
		{"client", "10.97.0.5:80", "the address of service shop/web"},
		{"other/client", "[fd98::3]:80", "no addresses of the same family"},
	} {
		var out bytes.Buffer
		reports, err := policyKnown().why(c.from, c.to)
		if err != nil {
			out.WriteString(err.Error())
		} else {
			writeReports(&out, reports)
		}
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("%s to %s: got\n%s\nwant\n%s", c.from, c.to, out.String(), c.want)
		}
	}
}

// TestWhyBlockedJSON is what programs get.
func TestWhyBlockedJSON(t *testing.T) {
	reports, err := policyKnown().why("client", "web:8080")
	if err != nil {
		t.Fatal(err)
	}
	if len(reports) != 2 {
		t.Errorf("%d answers for two families", len(reports))
	}
	b, err := json.Marshal(reports[1].Ingress)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"by":{"policy":"shop/allow","rule":2,"source":"shop","commit":"3f2a1c9000","file":"net.cue","line":12}`, `"isolatedBy":[{"policy":"shop/allow"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s does not contain %s", b, want)
		}
	}
}

func named(name string) *intstr.IntOrString { p := intstr.FromString(name); return &p }
