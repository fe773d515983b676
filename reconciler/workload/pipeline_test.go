package workload_test

import (
	"fmt"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/plan"
	"decree.dev/decree/reconciler/schedule"
	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// TestFromCommitToEndpoints runs all planners on one world, as the daemon does: a
// commit, its pods on nodes, its endpoints, a second commit, a third that is empty.
func TestFromCommitToEndpoints(t *testing.T) {
	w := newWorld(t)
	for i := range 2 {
		n := readyNode(fmt.Sprint("n", i))
		n.Status.Allocatable = corev1.ResourceList{"cpu": resource.MustParse("4"), "memory": resource.MustParse("4Gi")}
		w.put(n)
	}
	w.push(t, "c1", 0, web(4, "web:1"), webService())
	w.converge(t)
	perNode := map[string]int{}
	for _, p := range w.pods() {
		perNode[p.Spec.NodeName]++
	}
	if perNode["n0"] != 2 || perNode["n1"] != 2 {
		t.Errorf("pods per node %v", perNode)
	}
	w.push(t, "c2", 0, web(2, "web:2"), webService())
	w.converge(t)
	var images []string
	for _, p := range w.pods() {
		images = append(images, p.Spec.Containers[0].Image)
	}
	ready := 0
	for s := range api.List[*discoveryv1.EndpointSlice](w.reader(), "") {
		for _, e := range s.Endpoints {
			if *e.Conditions.Ready {
				ready++
			}
		}
	}
	if !slices.Equal(images, []string{"web:2", "web:2"}) || ready != 2 {
		t.Errorf("pods run %v, %d endpoints are ready", images, ready)
	}
	w.push(t, "c3", -1)
	w.converge(t)
	for k := range w.objects {
		if k.Resource != api.Nodes && k.Resource != api.Events {
			t.Errorf("%s is left", k)
		}
	}
}

// push applies a commit; its transaction may write what comes from Git.
func (w *world) push(t *testing.T, hash string, allow int, objects ...api.Object) {
	t.Helper()
	in := plan.Input{Source: &api.Source{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, Commit: hash, Current: w.reader(), AllowDeletions: allow}
	for i, o := range objects {
		in.Desired = append(in.Desired, plan.Desired{Object: o, Pos: api.Position{File: "a.cue", Line: i + 1}})
	}
	c := plan.Plan(in)
	if len(c.Refusals) > 0 {
		t.Fatal(c.Refusals[0])
	}
	for _, m := range c.Mutations {
		w.applyOne(m)
		if d, ok := w.objects[m.Key].(*appsv1.Deployment); ok && m.Verb == api.Update {
			d.Generation++
		}
	}
	in.Current = w.reader()
	if again := plan.Plan(in); len(again.Mutations) != 0 {
		t.Fatalf("the plan of a commit in force is not empty: %v", again.Changes)
	}
}

// converge runs every planner until none has anything to do.
func (w *world) converge(t *testing.T) {
	t.Helper()
	for range 200 {
		n := 0
		run := func(ms []api.Mutation) { w.apply(ms); n += len(ms) }
		for d := range api.List[*appsv1.Deployment](w.reader(), "") {
			ms, _ := workload.Deployment(w.now, w.reader(), d)
			run(ms)
		}
		for rs := range api.List[*appsv1.ReplicaSet](w.reader(), "") {
			ms, _ := workload.ReplicaSet(w.now, w.reader(), rs)
			run(ms)
		}
		run(schedule.Pass(w.now, w.reader()))
		for svc := range api.List[*corev1.Service](w.reader(), "") {
			run(workload.Endpoints(w.now, w.reader(), svc))
		}
		for _, p := range w.pods() { // the agents
			switch {
			case p.DeletionTimestamp != nil:
				run([]api.Mutation{{Verb: api.Delete, Key: api.KeyOf(p), Grace: new(int64)}})
			case p.Spec.NodeName != "" && !api.PodReady(p):
				node := p.Spec.NodeName
				w.start(p, true)
				p = api.Clone(w.pod(p.Name))
				p.Spec.NodeName = node
				w.put(p)
				n++
			}
		}
		run(workload.Garbage(w.now, w.reader()))
		if n == 0 {
			return
		}
	}
	t.Fatal("does not converge")
}
