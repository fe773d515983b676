package control_test

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/raftstore"
	"decree.dev/decree/schemas/api"
)

func TestLifeOfADeployment(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.create(service())
	w.quiet()
	w.store.counts()
	step := func(name string, n int32, most int, f func()) {
		t.Helper()
		begun := time.Now()
		f()
		w.awaitSettled(n)
		took := time.Since(begun)
		w.quiet()
		done, rejected := w.store.counts()
		t.Logf("%s: %s, %d transactions (%s), rejected: %s", name, took.Round(time.Millisecond), total(done), actors(done), actors(rejected))
		if total(done) > most {
			t.Errorf("%s took %d transactions, %d are enough", name, total(done), most)
		}
	}
	step("create 4", 4, 32, func() { w.create(deployment(4)) })
	step("scale to 8", 8, 32, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 8 }) })
	step("scale to 2", 2, 36, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 2 }) })
	image := func(v string) func() {
		return func() {
			w.change(func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = v })
		}
	}
	step("roll out", 2, 40, image("web:2"))
	step("roll back", 2, 40, image("web:1"))
	step("to zero", 0, 16, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 0 }) })
	step("and back", 3, 28, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 3 }) })
}

// What belongs to something goes with it, without waiting for a tick.
func TestDeletionCascades(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.create(service())
	w.create(deployment(3))
	w.awaitSettled(3)
	svc, _ := api.Get[*corev1.Service](w.store.View(), "default", "web")
	w.mutate(
		api.Mutation{Verb: api.Delete, Key: api.KeyOf(w.web())},
		api.Mutation{Verb: api.Delete, Key: api.KeyOf(svc)},
	)
	w.soon("everything is gone", func(r api.Reader) bool {
		for range api.List[*appsv1.ReplicaSet](r, "") {
			return false
		}
		for range api.List[*discoveryv1.EndpointSlice](r, "") {
			return false
		}
		return gone(r)
	})
	w.quiet()
}

func gone(r api.Reader) bool {
	for range api.List[*corev1.Pod](r, "") {
		return false
	}
	return true
}

// soon waits for something that must not need a tick: the shortest is 5 s.
func (w *world) soon(what string, ok func(api.Reader) bool) {
	w.t.Helper()
	begun := time.Now()
	w.await(what, ok)
	if took := time.Since(begun); took > 2*time.Second {
		w.t.Errorf("%s after %s", what, took)
	}
}

// A planner with an outdated view may make something for an owner that has just
// gone.
func TestOrphanIsCollectedAtOnce(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.quiet()
	d := deployment(1)
	rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "late", OwnerReferences: []metav1.OwnerReference{
		*metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment")),
	}}, Spec: appsv1.ReplicaSetSpec{Replicas: new(int32), Selector: d.Spec.Selector, Template: d.Spec.Template}}
	rs.OwnerReferences[0].UID = "gone"
	w.create(rs)
	w.soon("the orphan is gone", func(r api.Reader) bool {
		_, ok := api.Get[*appsv1.ReplicaSet](r, "default", "late")
		return !ok
	})
}

// Pods move to where there is room: a new node, what another pod left, another node
// when theirs is removed.
func TestRoom(t *testing.T) {
	w := newWorld(t)
	w.start()
	d := deployment(1)
	d.Spec.Template.Spec.NodeSelector = map[string]string{"disk": "fast"}
	w.create(d)
	on := func(name, node string) func(api.Reader) bool {
		return func(r api.Reader) bool {
			for p := range api.List[*corev1.Pod](r, "") {
				if strings.HasPrefix(p.Name, name+"-") && p.DeletionTimestamp == nil && p.Spec.NodeName == node && api.PodReady(p) {
					return true
				}
			}
			return false
		}
	}
	w.soon("it says why it waits", func(r api.Reader) bool {
		for p := range api.List[*corev1.Pod](r, "") {
			if c := api.PodCondition(p, corev1.PodScheduled); c != nil {
				return c.Reason == corev1.PodReasonUnschedulable
			}
		}
		return false
	})
	w.quiet()
	w.node("n2", func(n *corev1.Node) {
		n.Labels = map[string]string{"disk": "fast"}
		n.Status.Allocatable[corev1.ResourcePods] = resource.MustParse("1")
	})
	w.soon("it runs on the new node", on("web", "n2"))
	other := deployment(1)
	other.Name, other.Spec.Template.Spec = "other", *d.Spec.Template.Spec.DeepCopy()
	w.create(other)
	w.soon("the other waits", func(r api.Reader) bool {
		for p := range api.List[*corev1.Pod](r, "") {
			if p.Spec.NodeName == "" && api.PodCondition(p, corev1.PodScheduled) != nil {
				return true
			}
		}
		return false
	})
	w.quiet()
	w.mutate(api.Mutation{Verb: api.Delete, Key: api.KeyOf(w.web())})
	w.soon("the other has the place", on("other", "n2"))
	n2, _ := api.Get[*corev1.Node](w.store.View(), "", "n2")
	w.node("n3", func(n *corev1.Node) { n.Labels = map[string]string{"disk": "fast"} })
	w.quiet()
	w.mutate(api.Mutation{Verb: api.Delete, Key: api.KeyOf(n2)})
	w.soon("it has moved", on("other", "n3"))
}

// TestNodesChangeHints: when a node comes into another zone, the services that prefer endpoints
// near by learn of it, though no pod has changed.
func TestNodesChangeHints(t *testing.T) {
	w := newWorld(t)
	w.start()
	near, svc := corev1.ServiceTrafficDistributionPreferSameZone, service()
	svc.Spec.TrafficDistribution = &near
	w.create(svc)
	zone := func(z string) func(*corev1.Node) {
		return func(n *corev1.Node) { n.Labels = map[string]string{corev1.LabelTopologyZone: z} }
	}
	hinted := func(z string) func(api.Reader) bool {
		return func(r api.Reader) bool {
			for s := range api.List[*discoveryv1.EndpointSlice](r, "") {
				for _, e := range s.Endpoints {
					return e.Hints != nil && len(e.Hints.ForZones) == 1 && e.Hints.ForZones[0].Name == z
				}
			}
			return false
		}
	}
	w.create(deployment(1))
	w.quiet()
	for _, z := range []string{"east", "west"} {
		n, _ := api.Get[*corev1.Node](w.store.View(), "", "n1")
		n = api.Clone(n)
		zone(z)(n)
		w.mutate(api.Mutation{Verb: api.Update, Key: api.KeyOf(n), Object: n, UID: n.UID})
		w.soon("the endpoint is hinted for "+z, hinted(z))
	}
}

func TestBindingLatency(t *testing.T) {
	w := newWorld(t)
	w.start()
	var took []time.Duration
	for range 15 {
		begun := time.Now()
		w.create(deployment(3))
		w.await("three pods are bound", func(r api.Reader) bool {
			n := 0
			for p := range api.List[*corev1.Pod](r, "") {
				if p.Spec.NodeName != "" {
					n++
				}
			}
			return n == 3
		})
		took = append(took, time.Since(begun))
		w.mutate(api.Mutation{Verb: api.Delete, Key: api.KeyOf(w.web())})
		w.await("they are gone", gone)
	}
	slices.Sort(took)
	t.Logf("from proposal to bound: median %s, longest %s", took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > 100*time.Millisecond {
		t.Errorf("median %s", took[len(took)/2])
	}
}

// Readiness flaps while the Deployment scales: everything agrees in the end.
func TestConflictStorm(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.create(service())
	w.create(deployment(6))
	w.awaitSettled(6)
	w.store.counts()
	for i := range 60 {
		for p := range api.List[*corev1.Pod](w.store.View(), "") {
			w.propose("storm", readiness(p, false)) // the pod may be gone by now
		}
		w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = int32(3 + i%4) })
	}
	w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 5 })
	begun := time.Now()
	w.awaitSettled(5)
	w.quiet()
	done, rejected := w.store.counts()
	t.Logf("settled after %s; %s; rejected: %s", time.Since(begun).Round(time.Millisecond), actors(done), actors(rejected))
}

func TestRestart(t *testing.T) {
	w := newWorld(t)
	w.create(service())
	w.create(deployment(8))
	for i := range 20 {
		w.start()
		revision := w.store.View().Revision()
		w.await("something has happened", func(r api.Reader) bool { return r.Revision() > revision || settled(r, 8) })
		w.stop()
		if i == 10 {
			w.change(func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = "web:2" })
		}
	}
	// What changed while nobody looked is found at the start.
	w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 3 })
	w.start()
	w.awaitSettled(3)
	w.stop()
	svc, _ := api.Get[*corev1.Service](w.store.View(), "default", "web")
	w.mutate(api.Mutation{Verb: api.Delete, Key: api.KeyOf(w.web())}, api.Mutation{Verb: api.Delete, Key: api.KeyOf(svc)})
	w.start()
	w.await("the pods are gone", gone)
}

// A watch that is lost again and again costs time and nothing else.
func TestLostWatch(t *testing.T) {
	w := newWorld(t)
	w.store.batches = 2
	w.start()
	w.create(service())
	w.create(deployment(5))
	w.awaitSettled(5)
	w.change(func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = "web:2" })
	w.awaitSettled(5)
	w.mutate(api.Mutation{Verb: api.Delete, Key: api.KeyOf(w.web())})
	w.await("the pods are gone", gone)
	w.stop()
	if w.store.lost < 3 {
		t.Errorf("the watch was lost %d times", w.store.lost)
	}
}

// A history that holds next to nothing loses every watcher that is not quick.
func TestTinyHistory(t *testing.T) {
	w := newWorld(t, func(c *raftstore.Config) { c.HistoryEvents = 1 })
	w.start()
	w.create(service())
	w.create(deployment(20))
	w.awaitSettled(20)
	w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 1 })
	w.awaitSettled(1)
}

// A store that answers no watch is not asked in a busy loop.
func TestBrokenWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.store.broken = true
		w.start()
		time.Sleep(time.Minute)
		w.stop()
		if w.store.lost < 5 || w.store.lost > 40 {
			t.Errorf("asked %d times in a minute", w.store.lost)
		}
	})
}
