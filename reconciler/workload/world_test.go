package workload_test

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

// fataler is *testing.T or *rapid.T.
type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

// world is a cluster in memory: the rules of the state machine that controllers
// depend on, and a clock.
type world struct {
	t        fataler
	now      time.Time
	revision uint64
	objects  map[api.Key]api.Object
}

func newWorld(t fataler) *world {
	return &world{t: t, now: time.Unix(1_000_000, 0), objects: map[api.Key]api.Object{}}
}

func (w *world) reader() *api.Snapshot {
	return api.NewSnapshot(w.revision, slices.Collect(maps.Values(w.objects))...)
}

// put stores o as a commit or an agent would.
func (w *world) put(o api.Object) api.Object {
	w.revision++
	o = api.Clone(o)
	o.SetResourceVersion(strconv.FormatUint(w.revision, 10))
	if o.GetUID() == "" {
		o.SetUID(types.UID(fmt.Sprint("uid-", w.revision)))
		o.SetCreationTimestamp(metav1.NewTime(w.now))
		o.SetGeneration(1)
	}
	w.objects[api.KeyOf(o)] = o
	return o
}

// apply is one transaction: preconditions first, then all or nothing.
func (w *world) apply(ms []api.Mutation) {
	w.t.Helper()
	seen := map[api.Key]bool{}
	for _, m := range ms {
		old, exists := w.objects[m.Key]
		switch {
		case seen[m.Key]:
			w.t.Fatalf("%s occurs twice in one transaction", m.Key)
		case exists == (m.Verb == api.Create):
			w.t.Fatalf("%s of %s, which exists: %v", m.Verb, m.Key, exists)
		case m.Revision != 0 && m.Revision != api.RevisionOf(old), m.UID != "" && m.UID != old.GetUID():
			w.t.Fatalf("%s of %s: precondition fails", m.Verb, m.Key)
		case m.Object != nil && api.KeyOf(m.Object) != m.Key:
			w.t.Fatalf("%s carries %s", m.Key, api.KeyOf(m.Object))
		}
		if exists {
			if _, git := api.OriginOf(old); git && m.Verb != api.UpdateStatus {
				w.t.Fatalf("%s of %s, which comes from git", m.Verb, m.Key)
			}
		}
		seen[m.Key] = true
	}
	for _, m := range ms {
		w.applyOne(m)
	}
}

func (w *world) applyOne(m api.Mutation) {
	old := w.objects[m.Key]
	switch m.Verb {
	case api.Create:
		o := api.Clone(m.Object)
		o.SetUID("")
		w.put(o)
	case api.Update:
		w.put(mergeStatus(m.Object, old))
	case api.UpdateStatus:
		w.put(mergeStatus(old, m.Object))
	case api.Delete:
		pod, ok := old.(*corev1.Pod)
		if ok && pod.Spec.NodeName != "" && !api.PodFinished(pod) && (m.Grace == nil || *m.Grace > 0) {
			p := api.Clone(pod)
			at := metav1.NewTime(w.now)
			p.DeletionTimestamp = &at
			w.put(p)
			return
		}
		w.revision++
		delete(w.objects, m.Key)
	}
}

// mergeStatus returns main with the status of the other, and a new generation if
// its spec differs from what is stored.
func mergeStatus(main, status api.Object) api.Object {
	o := api.Clone(main)
	switch o := o.(type) {
	case *appsv1.Deployment:
		o.Status = status.(*appsv1.Deployment).Status
	case *appsv1.ReplicaSet:
		s := status.(*appsv1.ReplicaSet)
		o.Status = s.Status
		if !equality.Semantic.DeepEqual(o.Spec, s.Spec) && main.GetGeneration() == s.Generation {
			o.Generation++
		}
	case *corev1.Pod:
		o.Status = status.(*corev1.Pod).Status
	case *corev1.Node:
		o.Status = status.(*corev1.Node).Status
	case *corev1.Service:
		o.Status = status.(*corev1.Service).Status
	case *api.AddressPool:
		o.Status = status.(*api.AddressPool).Status
	}
	return o
}

// commit stores a Deployment as Git would: same object, new spec.
func (w *world) commit(d *appsv1.Deployment) {
	d = api.Clone(d)
	api.Default(d)
	api.Origin{Source: "shop", Commit: "c1", Pos: api.Position{File: "a.cue", Line: 1}}.Set(d)
	if old, ok := w.objects[api.KeyOf(d)].(*appsv1.Deployment); ok {
		d.UID, d.Generation, d.CreationTimestamp, d.Status = old.UID, old.Generation+1, old.CreationTimestamp, old.Status
	}
	w.put(d)
}

func (w *world) deployment() *appsv1.Deployment {
	d, _ := api.Get[*appsv1.Deployment](w.reader(), "default", "web")
	return d
}

func (w *world) sets() []*appsv1.ReplicaSet {
	return slices.Collect(api.List[*appsv1.ReplicaSet](w.reader(), ""))
}

func (w *world) pods() []*corev1.Pod { return slices.Collect(api.List[*corev1.Pod](w.reader(), "")) }

// stepDeployment runs the Deployment controller once and returns what it did.
func (w *world) stepDeployment() ([]api.Mutation, time.Duration) {
	w.t.Helper()
	ms, wait := workload.Deployment(w.now, w.reader(), w.deployment())
	w.apply(ms)
	return ms, wait
}

func (w *world) stepSet(i int) []api.Mutation {
	w.t.Helper()
	ms, _ := workload.ReplicaSet(w.now, w.reader(), w.sets()[i])
	w.apply(ms)
	return ms
}

// start binds a pod and makes it run; ready as asked.
func (w *world) start(p *corev1.Pod, ready bool) {
	p = api.Clone(p)
	p.Spec.NodeName, p.Status.Phase = "n1", corev1.PodRunning
	p.Status.PodIP = fmt.Sprintf("10.98.%d.%d", w.revision/250%250, w.revision%250+1)
	c := corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionFalse}
	if ready {
		c.Status = corev1.ConditionTrue
	}
	api.SetPodCondition(p, c, w.now)
	w.put(p)
}

// settle runs everything, pods start at once, until nothing happens any more.
func (w *world) settle() {
	w.t.Helper()
	for range 500 {
		ms, wait := w.stepDeployment()
		n := len(ms)
		for i := 0; i < len(w.sets()); i++ {
			n += len(w.stepSet(i))
		}
		for _, p := range w.pods() {
			switch {
			case p.DeletionTimestamp != nil:
				delete(w.objects, api.KeyOf(p))
				n++
			case !api.PodReady(p) && !api.PodFinished(p):
				w.start(p, true)
				n++
			}
		}
		if n == 0 && wait == 0 {
			return
		}
		if n == 0 {
			w.now = w.now.Add(wait)
		}
	}
	w.t.Fatalf("does not settle")
}

func web(replicas int32, image string) *appsv1.Deployment {
	labels := map[string]string{"app": "web"}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "web", Image: image}}}},
		},
	}
}

// byImage counts the replicas that each set was told to have.
func (w *world) byImage() map[string]int32 {
	out := map[string]int32{}
	for _, rs := range w.sets() {
		out[rs.Spec.Template.Spec.Containers[0].Image] += *rs.Spec.Replicas
	}
	return out
}

func condition(t *testing.T, d *appsv1.Deployment, kind appsv1.DeploymentConditionType) appsv1.DeploymentCondition {
	t.Helper()
	for _, c := range d.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	t.Fatalf("no condition %s", kind)
	return appsv1.DeploymentCondition{}
}
