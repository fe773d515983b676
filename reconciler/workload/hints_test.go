package workload_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	"decree.dev/decree/netplane/render"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// zoned is a ready node in a zone, "" for none, with so many CPUs, 0 for unknown.
func zoned(name, zone string, cpus int64, change ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	if zone != "" {
		n.Labels[corev1.LabelTopologyZone] = zone
	}
	if cpus > 0 {
		n.Status.Allocatable = corev1.ResourceList{corev1.ResourceCPU: *resource.NewQuantity(cpus, resource.DecimalSI)}
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	for _, f := range change {
		f(n)
	}
	return n
}

func on(node string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.NodeName = node } }

// preferring is webService with a preference, or, for "Auto", with the annotation.
func preferring(what string) *corev1.Service {
	svc := webService()
	if what == "Auto" {
		svc.Annotations = map[string]string{corev1.AnnotationTopologyMode: what}
	} else if what != "" {
		svc.Spec.TrafficDistribution = &what
	}
	return svc
}

// hints is "address zones nodes" for each endpoint, in order.
func (w *world) hints() (out []string) {
	for s := range api.List[*discoveryv1.EndpointSlice](w.reader(), "") {
		for _, e := range s.Endpoints {
			text := e.Addresses[0][strings.LastIndex(e.Addresses[0], ".")+1:]
			if e.Hints != nil {
				for _, z := range e.Hints.ForZones {
					text += "%" + z.Name
				}
				for _, n := range e.Hints.ForNodes {
					text += "@" + n.Name
				}
			}
			out = append(out, text)
		}
	}
	slices.Sort(out)
	return out
}

func TestHints(t *testing.T) {
	ready := func(ip int, node string) *corev1.Pod {
		return backend(fmt.Sprint("p", ip), fmt.Sprint("10.98.0.", ip), true, on(node))
	}
	unready := backend("p9", "10.98.0.9", false, on("a1"))
	three := []*corev1.Node{zoned("a1", "a", 2), zoned("b1", "b", 2), zoned("n1", "", 2)}
	two := three[:2]
	control := zoned("m1", "", 8, func(n *corev1.Node) { n.Labels["node-role.kubernetes.io/control-plane"] = "" })
	silent := zoned("s1", "", 8, func(n *corev1.Node) { n.Status.Conditions = nil })
	for _, c := range []struct {
		name, prefers string
		nodes         []*corev1.Node
		pods          []*corev1.Pod
		want          string
	}{
		{"nothing", "", two, []*corev1.Pod{ready(1, "a1"), ready(2, "b1")}, "1 2"},
		{"something unknown", "PreferFar", two, []*corev1.Pod{ready(1, "a1"), ready(2, "b1")}, "1 2"},
		{"close", "PreferClose", three, []*corev1.Pod{ready(1, "a1"), ready(2, "b1"), ready(3, "n1"), unready}, "1%a 2%b 3 9"},
		{"same zone", "PreferSameZone", two, []*corev1.Pod{ready(1, "a1"), ready(2, "b1")}, "1%a 2%b"},
		{"same node", "PreferSameNode", three, []*corev1.Pod{ready(1, "a1"), ready(3, "n1"), unready}, "1%a@a1 3@n1 9"},
		{"auto", "Auto", two, []*corev1.Pod{ready(1, "a1"), ready(2, "b1"), unready}, "1%a 2%b 9"},
		{"auto, one node without zone", "Auto", three, []*corev1.Pod{ready(1, "a1"), ready(2, "b1")}, "1 2"},
		{"auto, nodes that do not count", "Auto", append([]*corev1.Node{control, silent}, two...), []*corev1.Pod{ready(1, "a1"), ready(2, "b1")}, "1%a 2%b"},
		{"auto, an endpoint without zone", "Auto", append([]*corev1.Node{silent}, two...), []*corev1.Pod{ready(1, "a1"), ready(2, "b1"), ready(3, "s1")}, "1 2 3"},
		{"auto, one zone", "Auto", two[:1], []*corev1.Pod{ready(1, "a1"), ready(2, "a1")}, "1 2"},
		{"auto, unknown CPUs", "Auto", []*corev1.Node{two[0], zoned("b1", "b", 0)}, []*corev1.Pod{ready(1, "a1"), ready(2, "b1")}, "1 2"},
		{"auto, more zones than endpoints", "Auto", two, []*corev1.Pod{ready(1, "a1"), unready}, "1 9"},
		{"auto, all in one zone", "Auto", two, []*corev1.Pod{ready(1, "a1"), ready(2, "a1"), ready(3, "a1"), ready(4, "a1")}, "1%b 2%b 3%a 4%a"},
		{"auto, every deal overloads somebody", "Auto", two, []*corev1.Pod{ready(1, "a1"), ready(2, "a1"), ready(3, "a1"), ready(4, "b1"), ready(5, "b1")}, "1 2 3 4 5"},
		{"auto, within the threshold", "Auto", []*corev1.Node{zoned("a1", "a", 1), zoned("b1", "b", 2)},
			[]*corev1.Pod{ready(1, "a1"), ready(2, "a1"), ready(3, "a1"), ready(4, "b1"), ready(5, "b1"), ready(6, "b1"), ready(7, "b1")}, "1%a 2%a 3%a 4%b 5%b 6%b 7%b"},
		{"auto, a large and a small zone", "Auto", []*corev1.Node{zoned("a1", "a", 9), zoned("b1", "b", 3)}, []*corev1.Pod{ready(1, "a1"), ready(2, "a1"), ready(3, "a1"), ready(4, "b1")}, "1%a 2%a 3%a 4%b"},
		{"auto, a zone without nodes that count", "Auto", append([]*corev1.Node{zoned("c1", "c", 2, func(n *corev1.Node) { n.Status.Conditions = nil })}, two...),
			[]*corev1.Pod{ready(1, "a1"), ready(2, "b1"), ready(3, "c1"), ready(4, "c1")}, "1%a 2%b 3%a 4%b"},
	} {
		w := newWorld(t)
		w.put(preferring(c.prefers))
		for _, n := range c.nodes {
			w.put(n)
		}
		for _, p := range c.pods {
			w.put(p)
		}
		w.stepEndpoints()
		if got := strings.Join(w.hints(), " "); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		if ms := workload.Endpoints(w.now, w.reader(), w.service()); len(ms) != 0 {
			t.Errorf("%s: a second pass does %v", c.name, ms)
		}
	}
}

// TestHintsFollow: the annotation wins over the preference, its first name counts too, and
// hints go when nobody asks for them any more.
func TestHintsFollow(t *testing.T) {
	w := newWorld(t)
	w.put(zoned("a1", "a", 2))
	w.put(zoned("b1", "b", 2))
	for i := range 4 {
		w.put(backend(fmt.Sprint("p", i), fmt.Sprint("10.98.0.", i+1), true, on("a1")))
	}
	svc := w.put(preferring("PreferSameNode")).(*corev1.Service)
	for _, step := range []struct {
		annotations map[string]string
		want        string
	}{
		{nil, "1%a@a1 2%a@a1 3%a@a1 4%a@a1"},
		{map[string]string{corev1.AnnotationTopologyMode: "Auto"}, "1%b 2%b 3%a 4%a"},
		{map[string]string{"service.kubernetes.io/topology-aware-hints": "auto"}, "1%b 2%b 3%a 4%a"},
		{map[string]string{corev1.AnnotationTopologyMode: "Disabled"}, "1%a@a1 2%a@a1 3%a@a1 4%a@a1"},
	} {
		svc = api.Clone(svc)
		svc.Annotations = step.annotations
		w.put(svc)
		w.stepEndpoints()
		if got := strings.Join(w.hints(), " "); got != step.want {
			t.Errorf("%v: %s, want %s", step.annotations, got, step.want)
		}
	}
	w.put(func() *corev1.Service { s := preferring(""); s.UID = svc.UID; return s }())
	w.stepEndpoints()
	if got := strings.Join(w.hints(), " "); got != "1 2 3 4" {
		t.Errorf("nobody asks for hints: %s", got)
	}
}

// TestHintsReachEverybody: whatever there is of nodes, zones, pods and preferences, and
// however they come and go, a node has an endpoint as long as there is one; with Auto no zone
// has to do with less than its share, the threshold aside; and hints settle at once.
func TestHintsReachEverybody(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		kinds := []string{"", "Auto", "PreferClose", "PreferSameZone", "PreferSameNode"}
		svc := w.put(preferring(rapid.SampledFrom(kinds).Draw(t, "prefers"))).(*corev1.Service)
		for range 3 {
			for i := range rapid.IntRange(1, 6).Draw(t, "nodes") {
				n := zoned(fmt.Sprint("n", i), rapid.SampledFrom([]string{"a", "b", "c", "c", ""}).Draw(t, "zone"), rapid.Int64Range(0, 8).Draw(t, "cpus"))
				if rapid.IntRange(0, 5).Draw(t, "silent") == 0 {
					n.Status.Conditions = nil
				}
				n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprint("192.0.2.", i+1)}}
				w.put(n)
			}
			for range rapid.IntRange(0, 12).Draw(t, "pods") {
				i := rapid.IntRange(1, 20).Draw(t, "pod")
				w.put(backend(fmt.Sprint("p", i), fmt.Sprint("10.98.0.", i), rapid.IntRange(0, 4).Draw(t, "unready") > 0, on(fmt.Sprint("n", rapid.IntRange(0, 6).Draw(t, "on")))))
			}
			w.stepEndpoints()
			if ms := workload.Endpoints(w.now, w.reader(), w.service()); len(ms) != 0 {
				t.Fatalf("a second pass does %d things", len(ms))
			}
			all := slices.Collect(api.List[*discoveryv1.EndpointSlice](w.reader(), ""))
			nodes := slices.Collect(api.List[*corev1.Node](w.reader(), ""))
			any := false
			for _, p := range w.pods() {
				any = any || api.PodReady(p)
			}
			for _, n := range nodes {
				table := render.Render(render.Desired{Node: n.Name, Nodes: nodes, Services: []*corev1.Service{svc}, Slices: all})
				at := render.Port{Addr: netip.MustParseAddr("10.97.0.5"), Proto: render.TCP, Port: 80}
				if s, ok := table.Find(at); !ok || (len(s.Endpoints) > 0) != any {
					t.Fatalf("node %s has %v, of %q", n.Name, s.Endpoints, w.hints())
				}
			}
			checkShares(t, svc, nodes, all)
		}
	})
}

// checkShares: with hints of Auto each zone has one for each 1.2 that its CPUs stand for.
func checkShares(t *rapid.T, svc *corev1.Service, nodes []*corev1.Node, all []*discoveryv1.EndpointSlice) {
	if svc.Annotations[corev1.AnnotationTopologyMode] != "Auto" {
		return
	}
	cpus, total := map[string]float64{}, 0.0
	for _, n := range nodes {
		if len(n.Status.Conditions) > 0 {
			cpu := n.Status.Allocatable.Cpu().AsApproximateFloat64()
			cpus[n.Labels[corev1.LabelTopologyZone]] += cpu
			total += cpu
		}
	}
	dealt, count := map[string]int{}, 0
	for _, s := range all {
		for _, e := range s.Endpoints {
			if e.Hints != nil {
				dealt[e.Hints.ForZones[0].Name]++
				count++
			}
		}
	}
	for zone, n := range dealt {
		if cpus[zone] == 0 {
			t.Fatalf("%d endpoints are hinted for zone %q, which has no nodes", n, zone)
		}
	}
	for zone, cpu := range cpus {
		if share := float64(count) * cpu / total; count > 0 && float64(dealt[zone])*1.2 < share-1e-9 {
			t.Fatalf("zone %s has %d of %d endpoints, for a share of %.2f", zone, dealt[zone], count, share)
		}
	}
}
