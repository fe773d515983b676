package control_test

import (
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

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
	step("create 4", 4, 60, func() { w.create(deployment(4)) })
	step("scale to 8", 8, 60, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 8 }) })
	step("scale to 2", 2, 60, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 2 }) })
	image := func(v string) func() {
		return func() {
			w.change(func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = v })
		}
	}
	step("roll out", 2, 60, image("web:2"))
	step("roll back", 2, 60, image("web:1"))
	step("to zero", 0, 60, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 0 }) })
	step("and back", 3, 60, func() { w.change(func(d *appsv1.Deployment) { *d.Spec.Replicas = 3 }) })
}

// What belongs to something goes with it, without waiting for a tick.
func TestDeletionCascades(t *testing.T) {
	w := newWorld(t)
	w.start()
	w.create(service())
	w.create(deployment(3))
	w.awaitSettled(3)
	svc, _ := api.Get[*corev1.Service](w.store.View(), "default", "web")
	begun := time.Now()
	w.mutate(
		api.Mutation{Verb: api.Delete, Key: api.KeyOf(w.web())},
		api.Mutation{Verb: api.Delete, Key: api.KeyOf(svc)},
	)
	w.await("everything is gone", func(r api.Reader) bool {
		for range api.List[*appsv1.ReplicaSet](r, "") {
			return false
		}
		for range api.List[*corev1.Pod](r, "") {
			return false
		}
		for range api.List[*discoveryv1.EndpointSlice](r, "") {
			return false
		}
		return true
	})
	if took := time.Since(begun); took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
	w.quiet()
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
		w.await("they are gone", func(r api.Reader) bool {
			for range api.List[*corev1.Pod](r, "") {
				return false
			}
			return true
		})
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
	w.await("the pods are gone", func(r api.Reader) bool {
		for range api.List[*corev1.Pod](r, "") {
			return false
		}
		return true
	})
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
	w.await("the pods are gone", func(r api.Reader) bool {
		for range api.List[*corev1.Pod](r, "") {
			return false
		}
		return true
	})
	w.stop()
	if w.store.lost < 3 {
		t.Errorf("the watch was lost %d times", w.store.lost)
	}
}
