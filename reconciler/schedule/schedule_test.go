package schedule

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"decree.dev/decree/schemas/api"
)

var now = time.Unix(1_000_000, 0)

func list(cpu, memory string) corev1.ResourceList {
	l := corev1.ResourceList{}
	if cpu != "" {
		l[corev1.ResourceCPU] = resource.MustParse(cpu)
	}
	if memory != "" {
		l[corev1.ResourceMemory] = resource.MustParse(memory)
	}
	return l
}

func newNode(name, cpu, memory string, change ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), Labels: map[string]string{"kubernetes.io/hostname": name}}}
	n.Status.Allocatable = list(cpu, memory)
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	for _, f := range change {
		f(n)
	}
	return n
}

func newPod(name, owner, cpu, memory string, change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name), ResourceVersion: "7"}}
	p.Spec.Containers = []corev1.Container{{Name: "a", Resources: corev1.ResourceRequirements{Requests: list(cpu, memory)}}}
	if owner != "" {
		rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: owner, UID: types.UID(owner)}}
		p.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(rs, appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))}
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func on(node string) func(*corev1.Pod) { return func(p *corev1.Pod) { p.Spec.NodeName = node } }

func taint(key, value string, effect corev1.TaintEffect) func(*corev1.Node) {
	return func(n *corev1.Node) {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: key, Value: value, Effect: effect})
	}
}

func view(objects ...api.Object) *api.Snapshot { return api.NewSnapshot(7, objects...) }

func TestReasons(t *testing.T) {
	for name, c := range map[string]struct {
		objects []api.Object
		pod     *corev1.Pod
		want    string
	}{
		"no nodes": {nil, newPod("p", "", "1", ""), "the cluster has no nodes"},
		"memory and taint": {
			[]api.Object{newNode("a", "4", "1Gi"), newPod("x", "", "", "824Mi", on("a")), newNode("b", "4", "1Gi"), newPod("y", "", "", "924Mi", on("b")),
				newNode("c", "4", "4Gi", taint("dedicated", "db", corev1.TaintEffectNoSchedule))},
			newPod("p", "", "", "512Mi"),
			"0 of 3 nodes: 2 lack memory (need 512Mi, most free 200Mi), 1 has taint dedicated=db:NoSchedule that the pod does not tolerate",
		},
		"cpu and memory": {[]api.Object{newNode("a", "500m", "1Gi")}, newPod("p", "", "1500m", "2Gi"),
			"0 of 1 nodes: 1 lacks cpu (need 1500m, most free 500m), 1 lacks memory (need 2Gi, most free 1Gi)"},
		"not ready": {[]api.Object{newNode("a", "1", "1Gi", func(n *corev1.Node) { n.Status.Conditions = nil })}, newPod("p", "", "", ""), "0 of 1 nodes: 1 is not ready"},
		"cordoned":  {[]api.Object{newNode("a", "1", "1Gi", func(n *corev1.Node) { n.Spec.Unschedulable = true })}, newPod("p", "", "", ""), "0 of 1 nodes: 1 is cordoned"},
		"selector": {[]api.Object{newNode("a", "1", "1Gi"), newNode("b", "1", "1Gi")},
			newPod("p", "", "", "", func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "ssd", "arch": "arm"} }),
			"0 of 2 nodes: 2 do not match the nodeSelector arch=arm,disk=ssd"},
		"affinity": {[]api.Object{newNode("a", "1", "1Gi")}, newPod("p", "", "", "", affinity("zone", corev1.NodeSelectorOpIn, "east")),
			"0 of 1 nodes: 1 does not match the required node affinity"},
		"pods": {[]api.Object{newNode("a", "1", "1Gi", func(n *corev1.Node) { n.Status.Allocatable[corev1.ResourcePods] = resource.MustParse("1") }), newPod("x", "", "", "", on("a"))},
			newPod("p", "", "", ""), "0 of 1 nodes: 1 runs as many pods as it may"},
		"device": {[]api.Object{newNode("a", "1", "1Gi")},
			newPod("p", "", "", "", func(p *corev1.Pod) {
				p.Spec.Containers[0].Resources.Requests["example.com/gpu"] = resource.MustParse("2")
			}), "0 of 1 nodes: 1 lacks example.com/gpu (need 2, most free 0)"},
		"host port": {[]api.Object{newNode("a", "1", "1Gi"), newPod("x", "", "", "", on("a"), hostPort(80, ""))},
			newPod("p", "", "", "", hostPort(80, corev1.ProtocolTCP)), "0 of 1 nodes: 1 has host port 80/TCP in use"},
		"host ports of two protocols": {[]api.Object{newNode("a", "1", "1Gi"), newPod("x", "", "", "", on("a"), hostPort(53, ""))},
			newPod("p", "", "", "", hostPort(53, corev1.ProtocolUDP)), ""},
		"preferred taint is no obstacle": {[]api.Object{newNode("a", "1", "1Gi", taint("x", "", corev1.TaintEffectPreferNoSchedule))}, newPod("p", "", "", ""), ""},
		"tolerated": {[]api.Object{newNode("a", "1", "1Gi", taint("x", "", corev1.TaintEffectNoExecute))},
			newPod("p", "", "", "", func(p *corev1.Pod) {
				p.Spec.Tolerations = []corev1.Toleration{{Key: "x", Operator: corev1.TolerationOpExists}}
			}), ""},
		"affinity matches": {[]api.Object{newNode("a", "1", "1Gi")}, newPod("p", "", "", "", affinity("zone", corev1.NodeSelectorOpNotIn, "east")), ""},
	} {
		t.Run(name, func(t *testing.T) {
			plan := Schedule(NewTable(view(c.objects...)), []*corev1.Pod{c.pod})
			got := ""
			if len(plan.Unplaced) > 0 {
				got = plan.Unplaced[0].Reason
			}
			if got != c.want || len(plan.Bindings)+len(plan.Unplaced) != 1 {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

func hostPort(n int32, protocol corev1.Protocol) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports, corev1.ContainerPort{ContainerPort: n, HostPort: n, Protocol: protocol})
	}
}

func affinity(key string, op corev1.NodeSelectorOperator, values ...string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: op, Values: values}}}}}}}
	}
}

func TestAffinityOperators(t *testing.T) {
	n := newNode("a", "1", "1Gi")
	n.Labels = map[string]string{"zone": "east", "cores": "8"}
	for _, c := range []struct {
		key    string
		op     corev1.NodeSelectorOperator
		values []string
		want   bool
	}{
		{"zone", corev1.NodeSelectorOpIn, []string{"west", "east"}, true}, {"zone", corev1.NodeSelectorOpIn, []string{"west"}, false},
		{"rack", corev1.NodeSelectorOpNotIn, []string{"1"}, true}, {"zone", corev1.NodeSelectorOpNotIn, []string{"east"}, false},
		{"zone", corev1.NodeSelectorOpExists, nil, true}, {"rack", corev1.NodeSelectorOpExists, nil, false},
		{"zone", corev1.NodeSelectorOpDoesNotExist, nil, false}, {"rack", corev1.NodeSelectorOpDoesNotExist, nil, true},
		{"cores", corev1.NodeSelectorOpGt, []string{"7"}, true}, {"cores", corev1.NodeSelectorOpGt, []string{"8"}, false},
		{"cores", corev1.NodeSelectorOpLt, []string{"9"}, true}, {"zone", corev1.NodeSelectorOpLt, []string{"9"}, false},
	} {
		p := newPod("p", "", "", "", affinity(c.key, c.op, c.values...))
		if got := matchesAny(requiredAffinity(&p.Spec).NodeSelectorTerms, n); got != c.want {
			t.Errorf("%s %s %v: %v", c.key, c.op, c.values, got)
		}
	}
}

func TestSpreadAndLoad(t *testing.T) {
	var pods []*corev1.Pod
	for i := range 6 {
		pods = append(pods, newPod(fmt.Sprint("p", i), "web", "100m", "64Mi"))
	}
	objects := []api.Object{newNode("a", "4", "4Gi"), newNode("b", "4", "4Gi"), newNode("c", "4", "4Gi"), newPod("load", "", "1", "1Gi", on("b"))}
	perNode := map[string]int{}
	for _, b := range Schedule(NewTable(view(objects...)), pods).Bindings {
		perNode[b.Node]++
	}
	if perNode["a"] != 2 || perNode["b"] != 2 || perNode["c"] != 2 {
		t.Errorf("six pods of one owner on three nodes: %v", perNode)
	}
	if b := Schedule(NewTable(view(objects...)), pods[:1]).Bindings; b[0].Node != "a" {
		t.Errorf("the first of equal nodes is %s", b[0].Node)
	}
	if b := Schedule(NewTable(view(objects[1:]...)), pods[:1]).Bindings; b[0].Node != "c" {
		t.Errorf("the less loaded node is c, not %s", b[0].Node)
	}
	soft := newNode("a", "4", "4Gi", taint("slow", "", corev1.TaintEffectPreferNoSchedule))
	if b := Schedule(NewTable(view(soft, objects[2])), pods[:1]).Bindings; b[0].Node != "c" {
		t.Errorf("a node without a soft taint is preferred, not %s", b[0].Node)
	}
}

func TestPriorityGoesFirst(t *testing.T) {
	high := int32(100)
	first := newPod("z", "", "1", "", func(p *corev1.Pod) { p.Spec.Priority = &high })
	older := newPod("y", "", "1", "", func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(now.Add(-time.Hour)) })
	newer := newPod("a", "", "1", "", func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(now) })
	plan := Schedule(NewTable(view(newNode("n", "2", "1Gi"))), []*corev1.Pod{newer, older, first})
	var got []string
	for _, b := range plan.Bindings {
		got = append(got, b.Pod.Name)
	}
	if strings.Join(got, " ") != "z y" || plan.Unplaced[0].Pod.Name != "a" {
		t.Errorf("placed %v", got)
	}
}

func TestNeeds(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	c := func(cpu string) corev1.Container {
		return corev1.Container{Resources: corev1.ResourceRequirements{Requests: list(cpu, "")}}
	}
	sidecar := c("300m")
	sidecar.RestartPolicy = &always
	for name, x := range map[string]struct {
		spec corev1.PodSpec
		want int64
	}{
		"sum":              {corev1.PodSpec{Containers: []corev1.Container{c("1"), c("500m")}}, 1500},
		"init is more":     {corev1.PodSpec{InitContainers: []corev1.Container{c("2")}, Containers: []corev1.Container{c("1")}}, 2000},
		"init is less":     {corev1.PodSpec{InitContainers: []corev1.Container{c("500m"), c("800m")}, Containers: []corev1.Container{c("1")}}, 1000},
		"sidecar":          {corev1.PodSpec{InitContainers: []corev1.Container{sidecar}, Containers: []corev1.Container{c("1")}}, 1300},
		"init and sidecar": {corev1.PodSpec{InitContainers: []corev1.Container{sidecar, c("2")}, Containers: []corev1.Container{c("1")}}, 2300},
		"overhead":         {corev1.PodSpec{Containers: []corev1.Container{c("1")}, Overhead: list("50m", "")}, 1050},
		"pod level":        {corev1.PodSpec{Containers: []corev1.Container{c("1")}, Resources: &corev1.ResourceRequirements{Requests: list("4", "")}}, 4000},
	} {
		if got := needsOf(&corev1.Pod{Spec: x.spec}); got.cpu != x.want || got.pods != 1 {
			t.Errorf("%s: %d, want %d", name, got.cpu, x.want)
		}
	}
}

func TestMutationsSayItOnce(t *testing.T) {
	stuck, fine := newPod("stuck", "", "9", ""), newPod("fine", "", "1", "")
	r := view(newNode("a", "2", "2Gi"), stuck, fine)
	plan := Schedule(NewTable(r), Pending(r))
	ms := plan.Mutations(now)
	bound, waits := ms[0].Object.(*corev1.Pod), ms[1].Object.(*corev1.Pod)
	if ms[0].Verb != api.Update || bound.Spec.NodeName != "a" || ms[0].Revision != 7 || api.PodCondition(bound, corev1.PodScheduled).Status != corev1.ConditionTrue {
		t.Errorf("binding %+v", ms[0])
	}
	c := api.PodCondition(waits, corev1.PodScheduled)
	if ms[1].Verb != api.UpdateStatus || c.Status != corev1.ConditionFalse || c.Reason != "Unschedulable" || !strings.Contains(c.Message, "lacks cpu") {
		t.Errorf("status %+v", ms[1])
	}
	if fine.Spec.NodeName != "" || len(stuck.Status.Conditions) != 0 {
		t.Error("the pods that were read are modified")
	}
	notes := plan.Notes(now, r)
	if len(notes) != 2 || notes[0].Object.(*corev1.Event).Reason != "Scheduled" || notes[1].Object.(*corev1.Event).Reason != "FailedScheduling" {
		t.Errorf("events %+v", notes)
	}
	after := view(newNode("a", "2", "2Gi"), bound, waits, notes[1].Object)
	if ms := Pass(now.Add(time.Minute), after); len(ms) != 0 {
		t.Errorf("a stuck pod is written about in every pass: %v", ms)
	}
	if ms := Pass(now.Add(6*time.Minute), after); len(ms) != 1 || ms[0].Object.(*corev1.Event).Count != 2 {
		t.Errorf("after five minutes the event counts on: %v", ms)
	}
}

// simple is the definition of what Schedule must do: for every pod in turn, look at
// every node.
func simple(t *Table, pods []*corev1.Pod) []string {
	queue := slices.SortedStableFunc(slices.Values(pods), compareUrgency)
	var out []string
	for _, p := range queue {
		s := shapeOf(p)
		var best *node
		for _, n := range t.nodes {
			if s.suits(n) && n.fits(&s.needs) && (best == nil || s.scoreOn(n) > s.scoreOn(best)) {
				best = n
			}
		}
		name := ""
		if best != nil {
			name = best.name
			t.assume(best, p, s)
		}
		out = append(out, p.Name+"@"+name)
	}
	slices.Sort(out)
	return out
}

func placement(p Plan) []string {
	var out []string
	for _, b := range p.Bindings {
		out = append(out, b.Pod.Name+"@"+b.Node)
	}
	for _, u := range p.Unplaced {
		out = append(out, u.Pod.Name+"@")
	}
	slices.Sort(out)
	return out
}

func TestScheduleInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		objects, pending := drawCluster(t)
		got := Schedule(NewTable(view(objects...)), pending)

		if want := simple(NewTable(view(objects...)), pending); !slices.Equal(placement(got), want) {
			t.Fatalf("placed %v\nthe definition says %v", placement(got), want)
		}
		shuffled := Schedule(NewTable(view(rapid.Permutation(objects).Draw(t, "objects")...)), rapid.Permutation(pending).Draw(t, "pending"))
		if !slices.Equal(placement(got), placement(shuffled)) {
			t.Fatalf("the order of the input matters: %v, %v", placement(got), placement(shuffled))
		}
		if len(got.Bindings)+len(got.Unplaced) != len(pending) {
			t.Fatalf("%d pods in, %d and %d out", len(pending), len(got.Bindings), len(got.Unplaced))
		}
		after := slices.Clone(objects)
		for _, b := range got.Bindings {
			p := api.Clone(b.Pod)
			p.Spec.NodeName = b.Node
			after = append(after, p)
		}
		table := NewTable(view(after...))
		for _, n := range table.nodes {
			if n.object != nil && (n.used.cpu > n.allocatable.cpu || n.used.memory > n.allocatable.memory || n.used.pods > n.allocatable.pods) {
				t.Fatalf("node %s is overcommitted: %+v of %+v", n.name, n.used, n.allocatable)
			}
		}
		var rest []*corev1.Pod
		for _, u := range got.Unplaced {
			rest = append(rest, u.Pod)
		}
		if again := Schedule(table, rest); len(again.Bindings) != 0 {
			t.Fatalf("a second pass places %v, which the first could have", placement(again))
		}
	})
}

func drawCluster(t *rapid.T) (objects []api.Object, pending []*corev1.Pod) {
	zones := []string{"east", "west"}
	for i := range rapid.IntRange(0, 6).Draw(t, "nodes") {
		n := newNode(fmt.Sprint("n", i), rapid.SampledFrom([]string{"1", "2", "4"}).Draw(t, "cpu"), rapid.SampledFrom([]string{"1Gi", "2Gi"}).Draw(t, "memory"))
		n.Labels["zone"] = rapid.SampledFrom(zones).Draw(t, "zone")
		n.Status.Allocatable[corev1.ResourcePods] = resource.MustParse(fmt.Sprint(rapid.IntRange(1, 6).Draw(t, "max pods")))
		n.Spec.Unschedulable = rapid.IntRange(0, 5).Draw(t, "cordon") == 0
		if rapid.IntRange(0, 3).Draw(t, "taint") == 0 {
			taint("x", "", rapid.SampledFrom([]corev1.TaintEffect{corev1.TaintEffectNoSchedule, corev1.TaintEffectPreferNoSchedule}).Draw(t, "effect"))(n)
		}
		objects = append(objects, n)
	}
	for i := range rapid.IntRange(0, 20).Draw(t, "pods") {
		p := newPod(fmt.Sprint("p", i), rapid.SampledFrom([]string{"", "web", "db"}).Draw(t, "owner"),
			rapid.SampledFrom([]string{"", "100m", "700m"}).Draw(t, "request"), rapid.SampledFrom([]string{"", "300Mi"}).Draw(t, "request"))
		if rapid.IntRange(0, 4).Draw(t, "selects") == 0 {
			p.Spec.NodeSelector = map[string]string{"zone": rapid.SampledFrom(zones).Draw(t, "zone")}
		}
		if rapid.IntRange(0, 4).Draw(t, "tolerates") == 0 {
			p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
		}
		pending = append(pending, p)
	}
	return objects, pending
}

// TestTableFollowsChanges: a table that was changed step by step equals one that was
// built from the result.
func TestTableFollowsChanges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		table := NewTable(view())
		nodes, pods := map[string]*corev1.Node{}, map[types.UID]*corev1.Pod{}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			name := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "node")
			p := newPod(rapid.SampledFrom([]string{"p", "q", "r"}).Draw(t, "pod"), rapid.SampledFrom([]string{"", "web"}).Draw(t, "owner"), "100m", "1Mi", on(name))
			switch rapid.IntRange(0, 4).Draw(t, "step") {
			case 0:
				nodes[name] = newNode(name, rapid.SampledFrom([]string{"1", "2"}).Draw(t, "cpu"), "1Gi")
				table.SetNode(nodes[name])
			case 1:
				delete(nodes, name)
				table.RemoveNode(name)
			case 2:
				pods[p.UID] = p
				table.SetPod(p)
			case 3:
				p.Status.Phase = corev1.PodSucceeded
				pods[p.UID] = p
				table.SetPod(p)
			case 4:
				delete(pods, p.UID)
				table.RemovePod(p.UID)
			}
		}
		var objects []api.Object
		for _, n := range nodes {
			objects = append(objects, n)
		}
		for _, p := range pods {
			objects = append(objects, p)
		}
		if got, want := dump(table), dump(NewTable(view(objects...))); got != want {
			t.Fatalf("followed:\n%sbuilt:\n%s", got, want)
		}
	})
}

func dump(t *Table) string {
	var b strings.Builder
	for _, n := range t.nodes {
		fmt.Fprintln(&b, n.name, n.object != nil, n.ready, n.allocatable, n.used, n.scored, n.owners)
	}
	return b.String()
}

// BenchmarkSchedule places 10,000 pods of 100 and of 1,000 owners on 5,000 nodes.
func BenchmarkSchedule(b *testing.B) {
	for _, shapes := range []int{100, 1_000} {
		b.Run(fmt.Sprintf("nodes=5000/pods=10000/shapes=%d", shapes), func(b *testing.B) {
			var objects []api.Object
			for i := range 5_000 {
				objects = append(objects, newNode(fmt.Sprintf("n%04d", i), "8", "32Gi"))
			}
			var pods []*corev1.Pod
			for i := range 10_000 {
				pods = append(pods, newPod(fmt.Sprintf("p%05d", i), fmt.Sprint("owner-", i*shapes/10_000), "100m", "128Mi"))
			}
			r := view(objects...)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				table := NewTable(r)
				b.StartTimer()
				if plan := Schedule(table, pods); len(plan.Bindings) != len(pods) {
					b.Fatalf("%d placed: %s", len(plan.Bindings), plan.Unplaced[0].Reason)
				}
			}
			b.ReportMetric(float64(b.N*len(pods))/b.Elapsed().Seconds(), "pods/s")
		})
	}
}
