package workload_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/reconciler/workload"
	"decree.dev/decree/schemas/api"
)

func webSet(replicas int32) *appsv1.ReplicaSet {
	d := web(replicas, "web:1")
	rs := &appsv1.ReplicaSet{ObjectMeta: d.ObjectMeta, Spec: appsv1.ReplicaSetSpec{Replicas: &replicas, Selector: d.Spec.Selector, Template: d.Spec.Template}}
	api.Default(rs)
	return rs
}

func (w *world) scaleSet(n int32) {
	rs := api.Clone(w.sets()[0])
	rs.Spec.Replicas = &n
	rs.Generation++
	w.put(rs)
}

func TestReplicaSetScalesAndReplaces(t *testing.T) {
	w := newWorld(t)
	w.put(webSet(3))
	w.stepSet(0)
	if len(w.pods()) != 3 {
		t.Fatalf("%d pods", len(w.pods()))
	}
	w.stepSet(0)
	if ms := w.stepSet(0); len(ms) != 0 {
		t.Errorf("a third pass does %v", ms)
	}
	for _, p := range w.pods() {
		w.start(p, true)
	}
	w.stepSet(0)
	if s := w.sets()[0].Status; s.Replicas != 3 || s.ReadyReplicas != 3 || s.AvailableReplicas != 3 || s.FullyLabeledReplicas != 3 || s.ObservedGeneration != 1 {
		t.Errorf("status %+v", s)
	}
	// One is evicted, one is deleted by hand: two replacements.
	w.now = w.now.Add(time.Minute)
	failed := api.Clone(w.pods()[0])
	failed.Status.Phase, failed.Status.Reason = corev1.PodFailed, "Evicted"
	w.put(failed)
	at := metav1.NewTime(w.now)
	leaving := api.Clone(w.pods()[1])
	leaving.DeletionTimestamp = &at
	w.put(leaving)
	w.stepSet(0)
	if n := len(w.pods()); n != 5 {
		t.Errorf("%d pods, want three and two replacements", n)
	}
	w.scaleSet(0)
	w.stepSet(0)
	for _, p := range w.pods() {
		if api.PodActive(p) {
			t.Errorf("pod %s is left", p.Name)
		}
	}
}

func TestReplicaSetDoesNotReplaceInACircle(t *testing.T) {
	w := newWorld(t)
	w.put(webSet(1))
	w.stepSet(0)
	for i := range 6 {
		for _, p := range w.pods() { // turned away at once
			if !api.PodFinished(p) {
				p = api.Clone(p)
				p.Status.Phase, p.Status.Reason = corev1.PodFailed, "OutOfcpu"
				w.put(p)
			}
		}
		ms, wait := workload.ReplicaSet(w.now, w.reader(), w.sets()[0])
		w.apply(ms)
		if wait != 10*time.Second {
			t.Fatalf("round %d: called again in %v, want 10s", i, wait)
		}
		for _, m := range ms {
			if m.Verb == api.Create && m.Key.Resource == api.Pods {
				t.Fatal("a pod that failed at once was replaced at once")
			}
		}
		w.now = w.now.Add(wait)
		w.stepSet(0)
	}
	finished := 0
	for _, p := range w.pods() {
		if api.PodFinished(p) {
			finished++
		}
	}
	if finished > 3 {
		t.Errorf("%d failed pods are kept, want 3", finished)
	}
}

func TestReplicaSetNamesAreNewAfterAChangeAndEqualBefore(t *testing.T) {
	w := newWorld(t)
	w.put(webSet(2))
	view := w.reader()
	rs := w.sets()[0]
	first, _ := workload.ReplicaSet(w.now, view, rs)
	second, _ := workload.ReplicaSet(w.now.Add(time.Second), view, rs)
	for i := range first {
		if first[i].Key != second[i].Key {
			t.Fatalf("two plans of one view make %s and %s: both would be applied", first[i].Key, second[i].Key)
		}
	}
	w.apply(first)
	names := map[string]bool{}
	for _, p := range w.pods() {
		names[p.Name] = true
		w.start(p, true)
	}
	w.stepSet(0)
	delete(w.objects, api.KeyOf(w.pods()[0]))
	w.stepSet(0)
	w.stepSet(0)
	old := 0
	for _, p := range w.pods() {
		if names[p.Name] {
			old++
		}
	}
	if len(w.pods()) != 2 || old != 1 {
		t.Errorf("%d pods, %d of the old names: a replacement must not look like its predecessor", len(w.pods()), old)
	}
}

func TestVictims(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	pod := func(name, node string, phase corev1.PodPhase, readyFor time.Duration, change ...func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(now.Add(-time.Hour))}}
		p.Spec.NodeName, p.Status.Phase = node, phase
		if readyFor > 0 {
			api.SetPodCondition(p, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue}, now.Add(-readyFor))
		}
		for _, f := range change {
			f(p)
		}
		return p
	}
	pods := []*corev1.Pod{
		pod("old", "n1", corev1.PodRunning, 30*time.Minute),
		pod("unbound", "", corev1.PodPending, 0),
		pod("pending", "n1", corev1.PodPending, 0),
		pod("unready", "n2", corev1.PodRunning, 0),
		pod("cheap", "n3", corev1.PodRunning, 40*time.Minute, func(p *corev1.Pod) {
			p.Annotations = map[string]string{corev1.PodDeletionCost: "-5"}
		}),
		pod("fresh", "n4", corev1.PodRunning, 5*time.Second), // ready, not yet available
		pod("young", "n5", corev1.PodRunning, 30*time.Minute, func(p *corev1.Pod) {
			p.CreationTimestamp = metav1.NewTime(now.Add(-40 * time.Minute))
		}),
		pod("restarted", "n6", corev1.PodRunning, 30*time.Minute, func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{RestartCount: 3}}
		}),
		pod("done", "n6", corev1.PodSucceeded, 0),
	}
	want := "unbound pending unready fresh cheap old restarted young"
	for range 5 {
		slices.Reverse(pods)
		var got []string
		for _, p := range workload.Victims(now, 10*time.Second, pods) {
			got = append(got, p.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("order %v, want %s", got, want)
		}
		pods = append(pods[3:], pods[:3]...)
	}
}
