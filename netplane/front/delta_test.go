package front

import (
	"bytes"
	"encoding/gob"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

// some draws objects: some of those of before, and others, in order.
func some(t *rapid.T, before Objects) Objects {
	o := before
	o.Services = list(t, "service", o.Services, func(m metav1.ObjectMeta) *corev1.Service {
		return &corev1.Service{ObjectMeta: m, Spec: corev1.ServiceSpec{ClusterIP: rapid.StringN(1, 5, 9).Draw(t, "address")}}
	})
	o.Slices = list(t, "slice", o.Slices, func(m metav1.ObjectMeta) *discoveryv1.EndpointSlice {
		return &discoveryv1.EndpointSlice{ObjectMeta: m, Endpoints: make([]discoveryv1.Endpoint, rapid.IntRange(1, 3).Draw(t, "endpoints"))}
	})
	o.Nodes = list(t, "node", o.Nodes, func(m metav1.ObjectMeta) *corev1.Node { return &corev1.Node{ObjectMeta: m} })
	o.Ingresses = list(t, "ingress", o.Ingresses, func(m metav1.ObjectMeta) *networkingv1.Ingress { return &networkingv1.Ingress{ObjectMeta: m} })
	o.Classes = list(t, "class", o.Classes, func(m metav1.ObjectMeta) *networkingv1.IngressClass { return &networkingv1.IngressClass{ObjectMeta: m} })
	o.Secrets = list(t, "secret", o.Secrets, func(m metav1.ObjectMeta) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: m, Data: map[string][]byte{"a": rapid.SliceOfN(rapid.Byte(), 1, 9).Draw(t, "data")}}
	})
	o.Node = rapid.SampledFrom([]string{"", "n1"}).Draw(t, "of node")
	o.DNS = rapid.SampledFrom([]netip.Addr{{}, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}).Draw(t, "dns")
	o.ServiceCIDR = rapid.SampledFrom([][]netip.Prefix{nil, {netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/64")}}).Draw(t, "range")
	return o
}

func list[P metav1.Object](t *rapid.T, what string, before []P, make func(metav1.ObjectMeta) P) (out []P) {
	for i := range 6 {
		n := name{fmt.Sprint("ns", i%2), fmt.Sprint(what, i)}
		had := slices.IndexFunc(before, func(o P) bool { return nameOf(o) == n })
		switch rapid.SampledFrom([]string{"none", "new", "same", "same"}).Draw(t, n.Name) {
		case "new":
			out = append(out, make(metav1.ObjectMeta{Namespace: n.Namespace, Name: n.Name}))
		case "same":
			if had >= 0 {
				out = append(out, before[had])
			}
		}
	}
	slices.SortFunc(out, func(a, b P) int { return nameOf(a).compare(nameOf(b)) })
	if rapid.Float64Range(0, 1).Draw(t, "order") < 0.1 {
		slices.Reverse(out) // nobody promises an order
	}
	return out
}

// TestDelta: what travels leads from what was there to what is there, in order, and what is the
// same stays the same object.
func TestDelta(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var sender, receiver Objects
		for range rapid.IntRange(1, 5).Draw(t, "steps") {
			next := some(t, sender)
			d, err := between("", &sender, &next)
			if err != nil {
				t.Fatal(err)
			}
			var wire bytes.Buffer
			if err := gob.NewEncoder(&wire).Encode(d); err != nil {
				t.Fatal(err)
			}
			var got delta
			if err := gob.NewDecoder(&wire).Decode(&got); err != nil {
				t.Fatal(err)
			}
			before := receiver
			if receiver, err = got.apply(receiver); err != nil {
				t.Fatal(err)
			}
			same(t, "services", next.Services, receiver.Services)
			same(t, "slices", next.Slices, receiver.Slices)
			same(t, "nodes", next.Nodes, receiver.Nodes)
			same(t, "ingresses", next.Ingresses, receiver.Ingresses)
			same(t, "classes", next.Classes, receiver.Classes)
			same(t, "secrets", next.Secrets, receiver.Secrets)
			if a, b := settingsOf(&next), settingsOf(&receiver); !a.equal(b) {
				t.Fatalf("settings are %v, want %v", b, a)
			}
			for _, s := range receiver.Services {
				i := slices.IndexFunc(before.Services, func(o *corev1.Service) bool { return o.Name == s.Name })
				kept := slices.ContainsFunc(sender.Services, func(o *corev1.Service) bool { return o.Name == s.Name && slices.Contains(next.Services, o) })
				if inOrder(sender.Services) && inOrder(next.Services) && kept && (i < 0 || before.Services[i] != s) {
					t.Fatalf("service %s has not changed, and is another object", s.Name)
				}
			}
			sender = next
		}
	})
}

func inOrder[P metav1.Object](list []P) bool {
	return slices.IsSortedFunc(list, func(a, b P) int { return nameOf(a).compare(nameOf(b)) })
}

// same fails unless two lists have equal objects, the second one in order.
func same[P metav1.Object](t *rapid.T, what string, want, got []P) {
	want = slices.Clone(want)
	slices.SortFunc(want, func(a, b P) int { return nameOf(a).compare(nameOf(b)) })
	if len(want) != len(got) {
		t.Fatalf("%d %s, want %d", len(got), what, len(want))
	}
	for i := range want {
		if !reflect.DeepEqual(want[i], got[i]) {
			t.Fatalf("%s: %v, want %v", what, got[i], want[i])
		}
	}
}

// TestOtherVersion: a kind that this version does not have is left out.
func TestOtherVersion(t *testing.T) {
	d := delta{To: "x", Changes: map[string]change{"gateways": {Come: [][]byte{[]byte("?")}}}, Settings: settings{Node: "n1"}}
	if o, err := d.apply(Objects{}); err != nil || o.Node != "n1" {
		t.Errorf("%v, %v", o, err)
	}
	d.Changes["services"] = change{Come: [][]byte{[]byte("?")}}
	if _, err := d.apply(Objects{}); err == nil {
		t.Error("what is no service is taken for one")
	}
}
